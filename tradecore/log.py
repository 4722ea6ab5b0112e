"""Logs: one line a record on stderr, as JSON or readable text, written by a thread of its own.

The caller only puts its record into a bounded queue; formatting, masking of secrets and writing
happen in the thread. A full queue (a blocked terminal or pipe) drops records, counts them and
says how many once it drains. Never log per trade; repeated causes go through `once_per`.
"""

import logging
import re
import sys
import threading
from collections.abc import Hashable, Iterable, Mapping
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO
from urllib.parse import unquote

import orjson

from tradecore import clock, journal
from tradecore.values import Secret

_QUEUE_RECORDS = 10_000
_WRITE_RECORDS = 256
_TICK_S = 1.0
_MAX_LIMITS = 1024

_OWN_FIELDS = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
_HEAD = ("ts", "level", "logger", "msg", "exc")
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))} | {
    ord("\n"): "\\n",
    ord("\t"): "\\t",
    ord("\r"): "\\r",
}
_CONTROL_IN_TRACEBACK = {code: text for code, text in _CONTROL.items() if code != ord("\n")}


class Masker:
    """Replace passwords in URLs, `password=` values and the given secrets by ***."""

    _IN_URL = re.compile(r"(://[^:/?#\s\"'@]*):[^/?#\s\"']*@")
    _NAMED = re.compile(
        r"""(password["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s&"',;}]+)""", re.IGNORECASE
    )

    def __init__(self, secrets: Iterable[Secret] = ()) -> None:
        texts: set[str] = set()
        for secret in secrets:
            whole = secret.reveal()
            texts.add(whole)
            for part in re.findall(r"://[^:/@\s]*:(.+)@|password=([^&\s]+)", whole):
                texts.update(text for raw in part if raw for text in (raw, unquote(raw)))
        # Whole words only: a password "postgres" must not spoil every "postgresql".
        words = (re.escape(text) for text in sorted(texts, key=len, reverse=True) if len(text) > 3)
        alternatives = "|".join(words)
        self._given = re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)") if alternatives else None

    def __call__(self, text: str) -> str:
        """Return `text` without secrets."""
        if self._given:
            text = self._given.sub("***", text)
        return self._NAMED.sub(r"\1***", self._IN_URL.sub(r"\1:***@", text))


class Formatter:
    """Turn a record into one line of bytes; extra fields may be of any type."""

    def __init__(self, as_json: bool, mask: Masker) -> None:
        self._as_json = as_json
        self._mask = mask
        self._traceback = logging.Formatter().formatException

    def line(self, record: logging.LogRecord) -> bytes:
        """Return the record as a line with its newline."""
        fields = {
            f"{name}_" if name in _HEAD else name: self._plain(value)
            for name, value in record.__dict__.items()
            if name not in _OWN_FIELDS
        }
        trace = self._mask(self._traceback(record.exc_info)) if record.exc_info else ""
        when = datetime.fromtimestamp(record.created, UTC).replace(tzinfo=None)
        ts = when.isoformat(timespec="microseconds" if self._as_json else "milliseconds") + "Z"
        level = record.levelname.lower()
        message = self._mask(record.getMessage())
        if self._as_json:
            head = dict(zip(_HEAD, (ts, level, record.name, _utf8(message)), strict=False))
            tail = {"exc": _utf8(trace)} if trace else {}
            return orjson.dumps(head | fields | tail) + b"\n"
        pairs = " ".join(f"{name}={_readable(value)}" for name, value in fields.items())
        name = record.name.removeprefix("tradecore.")
        text = f"{ts} {level:<8} {name:<16} {message.translate(_CONTROL):<40} {pairs}"
        if trace:
            text += "\n    " + trace.translate(_CONTROL_IN_TRACEBACK).replace("\n", "\n    ")
        return text.rstrip().encode(errors="backslashreplace") + b"\n"

    def _plain(self, value: Any) -> Any:
        """Return a masked value of types that JSON has."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            return int(value) if -(2**63) <= value < 2**64 else str(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping):
            return {_utf8(self._mask(str(k))): self._plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._plain(item) for item in value]
        if isinstance(value, bytes | bytearray | memoryview):
            value = bytes(value).decode(errors="backslashreplace")
        return _utf8(self._mask(str(value)))


def _utf8(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _readable(value: Any) -> str:
    text = value if isinstance(value, str) else orjson.dumps(value).decode()
    if isinstance(value, str) and not re.fullmatch(r"[^\s\"=]+", text):
        text = orjson.dumps(text).decode()
    return text.translate(_CONTROL)


_STOP = "stop"
_WAKE = "wake"
_Item = logging.LogRecord | str


class _QueueHandler(logging.Handler):
    """Put records into the queue as they are: no formatting in the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: SimpleQueue[_Item] = SimpleQueue()
        self.dropped = 0
        self._told = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.queue.qsize() < _QUEUE_RECORDS:
            self.queue.put(record)
        else:
            self.dropped += 1

    def count_dropped(self, change: int) -> None:
        self.acquire()
        self.dropped += change
        self.release()

    def take_dropped(self) -> int:
        self.acquire()
        dropped, self._told = self.dropped - self._told, self.dropped
        self.release()
        return dropped


class _Writer(threading.Thread):
    """Write what is in the queue until it finds _STOP, then the rest."""

    def __init__(self, handler: _QueueHandler, formatter: Formatter, stream: BinaryIO) -> None:
        super().__init__(name="log", daemon=True)
        self._handler = handler
        self._formatter = formatter
        self._stream = stream
        self.is_terminal = stream.isatty()
        self._is_journal = journal.is_journal(stream)
        self.status = ""
        self._drawn = ""

    def run(self) -> None:
        going_on = True
        while going_on:
            items = self._take(_TICK_S)
            going_on = _STOP not in items
            self._write(items)
            if dropped := self._handler.take_dropped():
                self._write([_own_record("log records dropped, stderr is slow", dropped=dropped)])
            _report_suppressed(everything=not going_on)
        while last := self._take(0):
            self._write(last)
        self.status = ""
        self._write([])

    def _take(self, timeout_s: float) -> list[_Item]:
        items: list[_Item] = []
        try:
            items.append(self._handler.queue.get(timeout_s > 0, timeout_s))
            while len(items) < _WRITE_RECORDS and items[-1] is not _STOP:
                items.append(self._handler.queue.get_nowait())
        except Empty:
            pass
        return items

    def _write(self, items: list[_Item]) -> None:
        records = [item for item in items if isinstance(item, logging.LogRecord)]
        data = b"".join(map(self._line, records))
        if self.is_terminal and (data or self.status != self._drawn):
            # One writer for both, so that a log line never tears the status line.
            data = b"\r\x1b[K" + data + self.status.encode(errors="replace")
            self._drawn = self.status
        if not data:
            return
        try:
            self._stream.write(data)
            self._stream.flush()
        except (OSError, ValueError):  # gone, full or closed: told when it can be written again
            self._handler.count_dropped(len(records))

    def _line(self, record: logging.LogRecord) -> bytes:
        line = self._formatted(record)
        return journal.with_priority(line, record.levelno) if self._is_journal else line

    def _formatted(self, record: logging.LogRecord) -> bytes:
        try:
            return self._formatter.line(record)
        except Exception as error:  # noqa: BLE001 - a bad record must not end all logging
            source = f"{record.pathname}:{record.lineno}"
            return self._formatter.line(
                _own_record("a log record could not be formatted", source=source, error=repr(error))
            )


def _own_record(message: str, **fields: object) -> logging.LogRecord:
    own = {"name": __name__, "levelno": logging.WARNING, "levelname": "WARNING", "msg": message}
    return logging.makeLogRecord(own | fields)


_running: tuple[_QueueHandler, _Writer] | None = None
_mask = Masker()


def mask(text: str) -> str:
    """Return `text` without passwords and without the secrets that `start` was given last."""
    return _mask(text)


def start(
    level: str,
    form: str,
    *,
    secrets: Iterable[Secret] = (),
    stream: BinaryIO | None = None,
) -> None:
    """Send all logs from `level` up to `stream` (stderr) as `form`: json, text or auto.

    auto is text on a terminal and JSON elsewhere. Call `stop` at the end.
    """
    global _running, _mask
    stop()
    _mask = Masker(secrets)
    stream = stream or sys.stderr.buffer
    as_json = form == "json" or (form == "auto" and not stream.isatty())
    handler = _QueueHandler()
    writer = _Writer(handler, Formatter(as_json, _mask), stream)
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    writer.start()
    _running = handler, writer


def stop(timeout_s: float = 5.0) -> None:
    """Write what is queued, for `timeout_s` at most, and end; does nothing when not started."""
    global _running
    if _running is None:
        return
    handler, writer = _running
    _running = None
    handler.queue.put(_STOP)
    writer.join(timeout_s)
    logging.captureWarnings(False)
    logging.getLogger().removeHandler(handler)


def records_dropped() -> int:
    """Return how many records were lost since the start, because stderr is slow or gone."""
    return _running[0].dropped if _running is not None else 0


def on_terminal() -> bool:
    """Tell whether the logs go to a terminal, so that `show_status` shows something."""
    return _running is not None and _running[1].is_terminal


def show_status(text: str) -> None:
    """Keep `text` as the last line of the terminal, below the logs; "" takes it away.

    Does nothing where the logs do not go to a terminal.
    """
    if _running and _running[1].is_terminal:
        _running[1].status = text
        _running[0].queue.put(_WAKE)


# -- once per cause and minute --------------------------------------------------------------------


class RateLimited:
    """A logger that lets one record through per interval, counts the others and tells the count."""

    def __init__(self, logger: logging.Logger, interval_s: float) -> None:
        self._logger = logger
        self._interval_ns = int(interval_s * 1e9)
        self._quiet_until_ns = 0
        self._suppressed = 0
        self._last: tuple[int, str] = logging.NOTSET, ""
        self._lock = threading.Lock()

    def info(self, message: str, extra: Mapping[str, object] | None = None) -> None:
        """Log at level info, or count."""
        self.log(logging.INFO, message, extra)

    def warning(self, message: str, extra: Mapping[str, object] | None = None) -> None:
        """Log at level warning, or count."""
        self.log(logging.WARNING, message, extra)

    def error(
        self,
        message: str,
        extra: Mapping[str, object] | None = None,
        exc_info: BaseException | None = None,
    ) -> None:
        """Log at level error, or count."""
        self.log(logging.ERROR, message, extra, exc_info)

    def log(
        self,
        level: int,
        message: str,
        extra: Mapping[str, object] | None = None,
        exc_info: BaseException | None = None,
    ) -> None:
        """Log, or count if this key has logged within the interval."""
        now_ns = clock.mono_ns()
        with self._lock:
            if now_ns < self._quiet_until_ns:
                self._suppressed += 1
                self._last = level, message
                return
            suppressed, self._suppressed = self._suppressed, 0
            self._quiet_until_ns = now_ns + self._interval_ns
        more = {"suppressed": suppressed} if suppressed else {}
        self._logger.log(level, message, exc_info=exc_info, extra={**(extra or {}), **more})

    def report(self, *, everything: bool = False) -> None:
        """Tell what was counted since the last record, if its interval is over or `everything`."""
        with self._lock:
            if not self._suppressed or not (everything or clock.mono_ns() >= self._quiet_until_ns):
                return
            suppressed, self._suppressed = self._suppressed, 0
        level, message = self._last
        self._logger.log(level, "%s, more of the same", message, extra={"suppressed": suppressed})


_limits: dict[tuple[str, Hashable], RateLimited] = {}


def once_per(logger: logging.Logger, key: Hashable, interval_s: float = 60.0) -> RateLimited:
    """Return the limiter of `key`, as in `once_per(log, cause).warning("frame refused")`.

    The first record goes out at once, the others of the interval are counted and reported.
    """
    limit = _limits.get((logger.name, key))
    if limit is None:
        if len(_limits) >= _MAX_LIMITS:
            _limits.pop(next(iter(_limits))).report(everything=True)
        limit = _limits[logger.name, key] = RateLimited(logger, interval_s)
    return limit


def _report_suppressed(*, everything: bool) -> None:
    for limit in list(_limits.values()):
        limit.report(everything=everything)
    if everything:
        _limits.clear()
