"""Parsers of setting values: text -> value, or ValueError that says what would be right."""

import ipaddress
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_MAX_SYMBOLS = 4096

DAY_S = 86400
YEAR_S = 365 * DAY_S
_UNIT_SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), DAY_S),
    **dict.fromkeys(("w", "week", "weeks"), 7 * DAY_S),
    **dict.fromkeys(("month", "months"), 30 * DAY_S),
    **dict.fromkeys(("y", "year", "years"), YEAR_S),
}


class Secret:
    """A text that shows itself to nobody but the caller of `reveal`."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the text itself."""
        return self._value

    def __repr__(self) -> str:
        return "Secret('***')"

    def __str__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and other._value == self._value

    def __hash__(self) -> int:
        return hash(self._value)


def whole(low: int, high: int, off: int | None = None) -> Callable[[str], int]:
    """Accept a whole number from `low` to `high`, or, where `off` is given, the word off as it."""
    or_off = "" if off is None else ", or off"

    def parse(text: str) -> int:
        if off is not None and text.lower() == "off":
            return off
        if re.fullmatch(r"[0-9]{1,18}", text) and low <= int(text) <= high:
            return int(text)
        raise ValueError(f"give a whole number from {low} to {high}{or_off}")

    return parse


def capacity(text: str) -> int:
    """Accept a number of rows that is a power of two; `1Mi` is 1048576."""
    low, high = 1 << 10, 1 << 27
    match = re.fullmatch(r"([0-9]{1,12})\s*(Ki|Mi)?", text, re.ASCII | re.IGNORECASE)
    if not match:
        raise ValueError(f"give a power of two from {low} to {high}, such as 1048576 or 1Mi")
    rows = int(match[1]) << {"": 0, "ki": 10, "mi": 20}[(match[2] or "").lower()]
    if rows & (rows - 1) or not low <= rows <= high:
        nearest = min(max(1 << max(rows - 1, 0).bit_length(), low), high)
        raise ValueError(f"give a power of two from {low} to {high}; the next one is {nearest}")
    return rows


_NO_OFF = -1


def duration(
    low_s: int, high_s: int, example: str, off: int | None = _NO_OFF
) -> Callable[[str], Any]:
    """Accept a count with a unit, as seconds, or, where `off` is given, the word off as `off`."""
    bounds = f"from {spoken(low_s)} to {spoken(high_s)}"
    or_off = "" if off == _NO_OFF else ", or off"

    def parse(text: str) -> int | None:
        if or_off and text.lower() == "off":
            return off
        match = re.fullmatch(r"([0-9]{1,9})\s*([a-z]+)", text.lower(), re.ASCII)
        unit_s = _UNIT_SECONDS.get(match[2]) if match else None
        if match and unit_s and low_s <= int(match[1]) * unit_s <= high_s:
            return int(match[1]) * unit_s
        raise ValueError(f"give a duration with its unit {bounds}, such as {example}{or_off}")

    return parse


def spoken(seconds: int) -> str:
    """Return a duration in its largest whole unit, as in "7 days"."""
    for unit in ("year", "day", "hour", "minute"):
        if seconds % _UNIT_SECONDS[unit] == 0:
            count = seconds // _UNIT_SECONDS[unit]
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return f"{seconds} seconds"


def choice(*choices: str, **also: str) -> Callable[[str], str]:
    """Accept one of `choices`, or another word `also` for one, in any case."""

    def parse(text: str) -> str:
        value = also.get(text.lower(), text.lower())
        if value in choices:
            return value
        raise ValueError(f"give one of {', '.join(choices)}")

    return parse


def switch(text: str) -> bool:
    """Accept on or off and their usual synonyms."""
    if text.lower() in ("on", "true", "yes", "1"):
        return True
    if text.lower() in ("off", "false", "no", "0"):
        return False
    raise ValueError("give on or off")


def _list(text: str) -> list[str]:
    items = [item.strip() for item in text.split(",")]
    return list(dict.fromkeys(item for item in items if item))


def symbols(text: str) -> tuple[str, ...]:
    """Accept names of symbols with commas between; doubled ones are merged."""
    from tradecore.schema import SYMBOL_MAX_BYTES  # late: the health probe needs no numpy

    # The venue's names are upper case in ASCII; other letters are kept as they are.
    symbols = _list(re.sub("[a-z]+", lambda match: match[0].upper(), text))
    for symbol in symbols:
        if not re.fullmatch(r"[A-Z0-9._\-\u0080-\U0010ffff]+", symbol):
            raise ValueError(f"{symbol!r} is no symbol; give names such as BTCUSDT,ETHUSDT")
        if len(symbol.encode()) > SYMBOL_MAX_BYTES:
            raise ValueError(f"{symbol!r} is longer than {SYMBOL_MAX_BYTES} bytes of UTF-8")
    if not 1 <= len(symbols) <= _MAX_SYMBOLS:
        raise ValueError(f"give 1 to {_MAX_SYMBOLS} symbols with commas between, as in BTCUSDT")
    return tuple(symbols)


def streams(text: str) -> tuple[str, ...]:
    """Accept names of streams with commas between; doubled ones are merged."""
    from tradecore.schema import STREAMS

    streams = _list(text.lower())
    for stream in streams:
        if stream not in STREAMS:
            near = get_close_matches(stream, STREAMS, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{stream!r} is none of {', '.join(STREAMS)}{hint}")
    if not streams:
        raise ValueError(f"give at least one of {', '.join(STREAMS)}")
    return tuple(streams)


def base_url(secure: str, plain: str, *endings: str) -> Callable[[str], str]:
    """Accept an origin of the venue, with or without one of `endings`, and cut it to its base."""

    def parse(text: str) -> str:
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            host, port = "", None
        if not host or parts.scheme not in (secure, plain) or not re.fullmatch(r"\S+", text):
            raise ValueError(f"give an address such as {secure}://host:443")
        if parts.scheme == plain and not is_loopback(host):
            raise ValueError(f"use {secure}://; {plain}:// is taken for loopback addresses only")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ValueError("give the address alone, without user, query and fragment")
        if parts.path.rstrip("/") not in ("", *endings):
            raise ValueError(f"give the address without a path, as in {secure}://{parts.netloc}")
        shown = f"[{host}]" if ":" in host else host
        return f"{parts.scheme}://{shown}" + (f":{port}" if port is not None else "")

    return parse


def several(parse_one: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """Accept what `parse_one` accepts, once or several times with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parse_one(item) for item in _list(text) or [""]))

    return parse


def name(text: str) -> str:
    """Accept a short name of letters, digits, dots and dashes."""
    if re.fullmatch(r"[\w.\-]{1,64}", text):
        return text
    raise ValueError("give 1 to 64 letters, digits, dots, dashes or underscores")


def is_loopback(host: str) -> bool:
    """Tell whether `host` is localhost or an address of 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def secret_url(*schemes: str) -> Callable[[str], Secret]:
    """Accept an address with a password in it; its owner takes it apart."""

    def parse(text: str) -> Secret:
        if not text.startswith(tuple(f"{scheme}://" for scheme in schemes)):
            raise ValueError(f"give an address that starts with {schemes[0]}://")
        return Secret(text)

    return parse


def host(text: str) -> str:
    """Accept an IP address or a host name."""
    host = text.removeprefix("[").removesuffix("]")
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not re.fullmatch(r"(?=.*[A-Za-z])[A-Za-z0-9]([A-Za-z0-9.\-]{0,251}[A-Za-z0-9])?", host):
            raise ValueError("give an address to listen on, such as 127.0.0.1") from None
    return host


def host_names(text: str) -> tuple[str, ...]:
    """Accept names of this machine with commas between; no wildcards, no ports."""
    names = _list(text.lower())
    for one in names:
        if not re.fullmatch(r"(?!-)[a-z0-9_\-]{1,63}(\.(?!-)[a-z0-9_\-]{1,63})*\.?", one):
            raise ValueError(f"{one!r} is no name of a host; give names such as capture.example")
    return tuple(dict.fromkeys(one.removesuffix(".") for one in names))


_TOKEN_CHARACTERS = 16, 512


def token(text: str) -> Secret:
    """Accept a token that fits into a header and is too long to be guessed."""
    least, most = _TOKEN_CHARACTERS
    if not least <= len(text) <= most or not re.fullmatch(r"[!-~]+", text):
        raise ValueError(
            f"give {least} to {most} printable ASCII characters without blanks,"
            " such as `openssl rand -hex 32` prints"
        )
    return Secret(text)


def folder(text: str) -> Path:
    """Accept a path; a leading ~ is the home folder."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError("there is no such home folder; give the whole path") from None


def origins(text: str) -> tuple[str, ...]:
    """Accept origins of web pages with commas between; no wildcards."""
    origins = _list(text.lower())
    for origin in origins:
        if not re.fullmatch(r"https?://(\[[0-9a-f:]+\]|[^\s/?#@:\[\]*]+)(:[0-9]{1,5})?", origin):
            raise ValueError(f"{origin!r} is no origin; name each one, as in https://example.com")
    return tuple(origins)
