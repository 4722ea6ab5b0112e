"""Reads the parameters of the venue's endpoints, strictly; whatever is wrong raises RefusedError.

The order of the checks is the venue's as far as its answers show: doubled names, too many, missing
ones, unknown ones, then the values. A limit above its maximum is taken for the maximum, which is
what Spot does (its futures refuse it).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import orjson
from aiohttp import web

from tradecore.http import venue_errors

_SYMBOL = re.compile(r"[\w\-.]{1,50}")
_LOWER = re.compile(r"[a-z]")
_NUMBER = re.compile(r"[0-9]{1,20}", re.ASCII)
_ZONE = re.compile(r"([+-]?)([0-9]{1,2})(?::([0-9]{2}))?", re.ASCII)
_STATUSES = ("TRADING", "END_OF_DAY", "HALT", "BREAK", "CANCEL_ONLY")

_MICRO_FROM = 10**14
"""Times from here on are microseconds: as milliseconds they would be after the year 5100."""
_ID_MAX = 2**63 - 1
LIMIT_MAX = 1000
LIMIT_DEFAULT = 500
_MINUTE_US = 60_000_000
_ZONE_MIN, _ZONE_MAX = -12 * 60, 14 * 60


class Names(NamedTuple):
    """The parameters of an endpoint."""

    mandatory: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


class Query:
    """The parameters of one request, checked when they are asked for."""

    def __init__(self, request: web.Request, names: Names) -> None:
        """Check what was sent as a whole. Raises RefusedError."""
        sent = list(request.query.items())
        self._values = dict(sent)
        known = {*names.mandatory, *names.optional}
        if len(self._values) != len(sent):
            raise venue_errors.repeated()
        if len(sent) > len(known):
            raise venue_errors.too_many_parameters(len(known), len(sent))
        for name in names.mandatory:
            if name not in self._values:
                raise venue_errors.missing(name)
        if unknown := self._values.keys() - known:
            raise venue_errors.unread(len(sent) - len(unknown), len(sent))
        for name, value in sent:
            if not value:
                raise venue_errors.empty(name)
        self.micro = _is_micro(request)

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def text(self, name: str, default: str = "") -> str:
        """Return a parameter as it was sent."""
        return self._values.get(name, default)

    def number(self, name: str) -> int | None:
        """Return a whole number of 1 to 20 digits; None when it was not sent."""
        text = self._values.get(name)
        if text is None:
            return None
        if not _NUMBER.fullmatch(text):
            raise venue_errors.illegal(name, venue_errors.NUMBER)
        return int(text)

    def trade_id(self, name: str) -> int | None:
        """Return an id; one beyond 64 bits is none."""
        number = self.number(name)
        if number is not None and number > _ID_MAX:
            raise venue_errors.bad_data(name)
        return number

    def limit(self) -> int:
        """Return `limit`: LIMIT_DEFAULT unless it was sent, LIMIT_MAX at most."""
        number = self.number("limit")
        if number == 0:
            raise venue_errors.missing("limit")
        return min(number or LIMIT_DEFAULT, LIMIT_MAX)

    def time_us(self, name: str) -> int | None:
        """Return a time that was sent in milliseconds or microseconds, in microseconds."""
        number = self.number(name)
        if number is None:
            return None
        us = number if number >= _MICRO_FROM else number * 1000
        if us > _ID_MAX:
            raise venue_errors.bad_data(name)
        return us

    def range_us(self) -> tuple[int | None, int | None]:
        """Return startTime and endTime, which must not be before it."""
        start_us, end_us = self.time_us("startTime"), self.time_us("endTime")
        if start_us is not None and end_us is not None and start_us > end_us:
            raise venue_errors.bad_combination()
        return start_us, end_us

    def zone_us(self) -> int:
        """Return timeZone as its distance from UTC: "-1:00", "05:45", "8"; 0 when not sent.

        A multiple of 15 minutes, as all zones are: others would be made of single minutes.
        """
        text = self._values.get("timeZone")
        if text is None:
            return 0
        match = _ZONE.fullmatch(text.replace(" ", "+", 1))  # an unescaped plus arrives as a blank
        if match is None:
            raise venue_errors.bad_data("timeZone")
        minutes = int(match[2]) * 60 + int(match[3] or 0)
        minutes = -minutes if match[1] == "-" else minutes
        if not _ZONE_MIN <= minutes <= _ZONE_MAX or int(match[3] or 0) not in (0, 15, 30, 45):
            raise venue_errors.bad_data("timeZone")
        return minutes * _MINUTE_US

    def symbol(self) -> str:
        """Return `symbol`, well spelt; whether it is known is for others to say."""
        text = self._values["symbol"]
        if not _is_symbol(text):
            raise venue_errors.illegal("symbol", venue_errors.SYMBOL)
        return text

    def symbols(self) -> list[str] | None:
        """Return `symbol` or the list `symbols`; None when neither was sent."""
        if "symbol" in self and "symbols" in self:
            raise venue_errors.bad_combination()
        if "symbol" in self:
            return [self.symbol()]
        if "symbols" not in self:
            return None
        names = self._list("symbols")
        if not all(isinstance(name, str) and _is_symbol(name) for name in names):
            raise venue_errors.illegal("symbols", venue_errors.SYMBOLS)
        if not names:
            raise venue_errors.missing("symbols")
        if len(set(names)) != len(names):
            raise venue_errors.repeated_symbols()
        return names

    def permissions(self) -> list[str]:
        """Return `permissions`: one, or a JSON list of them."""
        text = self._values.get("permissions", "SPOT")
        return self._list("permissions") if text.startswith("[") else [text]

    def status(self) -> str | None:
        """Return `symbolStatus`."""
        text = self._values.get("symbolStatus")
        if text is not None and text not in _STATUSES:
            raise venue_errors.bad_status()
        return text

    def is_mini(self) -> bool:
        """Tell whether `type` is MINI, not FULL."""
        text = self._values.get("type", "FULL")
        if text not in ("FULL", "MINI"):
            raise venue_errors.bad_ticker_type()
        return text == "MINI"

    def _list(self, name: str) -> list[str]:
        try:
            names = orjson.loads(self._values[name])
        except orjson.JSONDecodeError:
            names = None
        if not isinstance(names, list):
            raise venue_errors.illegal(name, venue_errors.SYMBOLS)
        return names


def trading(wanted: str | None, symbols: Sequence[str], single: bool) -> Sequence[str]:
    """Filter by status: what is captured counts as TRADING."""
    if wanted in (None, "TRADING"):
        return symbols
    if single:
        raise venue_errors.other_status()
    return ()


def _is_symbol(text: str) -> bool:
    return bool(_SYMBOL.fullmatch(text)) and not _LOWER.search(text)


def _is_micro(request: web.Request) -> bool:
    if "X-MBX-SBE" in request.headers:
        raise venue_errors.no_sbe()
    unit = request.headers.get("X-MBX-TIME-UNIT", "MILLISECOND").upper()
    if unit not in ("MICROSECOND", "MILLISECOND"):
        raise venue_errors.bad_time_unit()
    return unit == "MICROSECOND"
