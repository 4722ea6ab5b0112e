import io
import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tradecore import clock, log
from tradecore.values import Secret

logger = logging.getLogger("tradecore.test")


@pytest.fixture(autouse=True)
def level_restored() -> Iterator[None]:
    level = logging.getLogger().level
    log._limits.clear()  # what other tests have held back is not ours to report
    yield
    log.stop()
    logging.getLogger().setLevel(level)


def written(form: str, act: Callable[[], object], *secrets: str, level: str = "debug") -> str:
    stream = io.BytesIO()
    log.start(level, form, secrets=map(Secret, secrets), stream=stream)
    act()
    log.stop()
    return stream.getvalue().decode()


def objects(act: Callable[[], object], *secrets: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written("json", act, *secrets).splitlines()]


def test_json_is_one_object_a_line_with_extra_fields() -> None:
    before = datetime.now(UTC)
    extra = {"symbol": "币安人生USDT", "rows": 3, "ratio": 0.5, "ok": True, "none": None}
    (line,) = objects(lambda: logger.warning("trade %s refused", 7, extra=extra))
    assert list(line) == ["ts", "level", "logger", "msg", *extra]
    assert line["level"] == "warning"
    assert line["logger"] == "tradecore.test"
    assert line["msg"] == "trade 7 refused"
    assert {name: line[name] for name in extra} == extra
    assert line["ts"].endswith("Z") and len(line["ts"]) == len("2026-11-22T17:00:00.000000Z")
    assert before <= datetime.fromisoformat(line["ts"]) <= datetime.now(UTC)


def test_fields_of_any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    # What others keep of it, a process that is to report the lone surrogate cannot send.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    extra = {
        "big": 1 << 70,
        "id": np.int64(5),
        "price": Decimal("0.10"),
        "bytes": b'{"e"\xff',
        "bad": "\udcff",
        "list": [1, (2, "x")],
        "map": {1: Path("/x")},
        "level": "own",
        "nan": float("nan"),
    }
    (line,) = objects(lambda: logger.info("\ud800", extra=extra))
    assert line["msg"] == "\\ud800"
    assert line["big"] == str(1 << 70)
    assert line["id"] == "5"
    assert line["price"] == "0.10"
    assert line["bytes"] == '{"e"\\xff'
    assert line["bad"] == "\\udcff"
    assert line["list"] == [1, [2, "x"]]
    assert line["map"] == {"1": "/x"}
    assert line["level"] == "info" and line["level_"] == "own"
    assert line["nan"] is None


def test_text_is_aligned_and_one_line_a_record() -> None:
    text = written(
        "text",
        lambda: (
            logger.info("connected", extra={"line": "A", "streams": 21}),
            logger.error("frame\nrefused\x1b[31m", extra={"head": 'a "b"\n', "empty": ""}),
        ),
    )
    first, second = text.splitlines()
    assert first.index("connected") == second.index("frame")
    assert first[24:].split() == ["info", "test", "connected", "line=A", "streams=21"]
    assert "frame\\nrefused\\x1b[31m" in second
    assert second.endswith('head="a \\"b\\"\\n" empty=""')


@pytest.mark.parametrize("form", ["json", "text"])
def test_level(form: str) -> None:
    text = written(form, lambda: (logger.info("low"), logger.warning("high")), level="warning")
    assert "high" in text and "low" not in text


def test_auto_is_json_where_there_is_no_terminal() -> None:
    assert written("auto", lambda: logger.info("x")).startswith("{")


DSN = "postgresql://trader:p%40ss%2Fw0rd@db.example:5432/t"


@pytest.mark.parametrize("form", ["json", "text"])
def test_secrets_are_masked_everywhere(form: str) -> None:
    def act() -> None:
        logger.info("connecting to %s", DSN)
        logger.info("fields", extra={"dsn": DSN, "deep": [{"a": DSN, DSN: "p@ss/w0rd"}]})
        logger.info("other://user:hunter2@host and redis://:hunter2@h")
        logger.info("host=db password=hunter2 user=u", extra={"conn": "password='hunter2' x"})
        logger.info("%r", {"password": "hunter2"})
        try:
            raise ConnectionError(f"cannot reach {DSN} with p@ss/w0rd, b://a:hunter2@b")
        except ConnectionError:
            logger.exception("failed")
        warnings.warn(f"from {DSN}", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        text = written(form, act, DSN, "hunter2-is-no-url")
    assert "p%40ss" not in text and "p@ss" not in text and "w0rd" not in text
    assert "hunter2" not in text
    assert "user:***@host" in text and "Traceback" in text and "ConnectionError" in text


def test_addresses_without_password_stay_readable() -> None:
    texts = [
        "wss://stream.binance.com:9443/ws/btcusdt@trade",
        "wss://h:9443/stream?streams=btcusdt@trade/ethusdt@trade",
        "postgresql://postgres@localhost:5432/postgres",
        "password authentication failed for user",
    ]
    mask = log.Masker([Secret("postgresql://u:postgres9@h/d")])
    assert [mask(text) for text in texts] == texts


def test_a_password_that_is_a_usual_word_spoils_only_itself() -> None:
    mask = log.Masker([Secret("postgresql://postgres:postgres@h/postgres")])
    assert mask("postgresql is up for postgres") == "postgresql is up for ***"


@given(st.text(min_size=4, max_size=20).filter(lambda s: not set(s) & set("@:/?#&%\"' \n")))
def test_any_password_is_masked(password: str) -> None:
    dsn = f"postgresql://u:{password}@h/d"
    mask = log.Masker([Secret(dsn)])
    assert mask(f"<{dsn}>") == "<***>"
    assert mask(f"({password})") == "(***)"


def test_traceback_stays_one_record(capfd: pytest.CaptureFixture[str]) -> None:
    def act() -> None:
        try:
            raise ValueError("bad\x1b")
        except ValueError:
            logger.exception("broken", extra={"n": 1})

    (line,) = objects(act)
    assert line["exc"].startswith("Traceback") and line["n"] == 1
    lines = written("text", act).splitlines()
    assert "broken" in lines[0] and all(rest.startswith("    ") for rest in lines[1:])
    assert "\x1b" not in "".join(lines)


def test_a_record_that_cannot_be_formatted_does_not_end_the_log() -> None:
    class Rude:
        def __str__(self) -> str:
            raise RuntimeError("no")

    bad = logger.makeRecord("a", logging.INFO, "/x/test_log.py", 1, "%d", ("x",), None)
    lines = objects(
        lambda: (
            logging.getLogger().handlers[-1].handle(bad),
            logger.info("a", extra={"rude": Rude()}),
            logger.info("good"),
        )
    )
    assert [line["msg"] for line in lines] == ["a log record could not be formatted"] * 2 + ["good"]
    assert "test_log.py:" in lines[0]["source"]


class Gate(io.BytesIO):
    """A stream that blocks its writer until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.entered = threading.Event()
        self.open = threading.Event()

    def write(self, data: Any) -> int:
        self.entered.set()
        assert self.open.wait(20)
        return super().write(data)


def test_a_blocked_stream_never_blocks_the_caller_and_drops_are_counted() -> None:
    gate = Gate()
    log.start("info", "json", stream=gate)
    logger.info("first")
    assert gate.entered.wait(10)
    for number in range(10_500):
        logger.info("more", extra={"number": number})
    assert log.records_dropped() == 500
    gate.open.set()
    log.stop()
    lines = [json.loads(line) for line in gate.getvalue().splitlines()]
    told = [line["dropped"] for line in lines if "dropped" in line]
    assert sum(told) == 500
    assert [line["number"] for line in lines if "number" in line] == list(range(10_000))


def test_stop_has_a_time_limit() -> None:
    gate = Gate()
    log.start("info", "json", stream=gate)
    logger.info("stuck")
    assert gate.entered.wait(10)
    started = time.monotonic()
    log.stop(0.05)
    assert time.monotonic() - started < 5
    gate.open.set()


def test_a_broken_stream_is_survived() -> None:
    class Broken(io.BytesIO):
        def write(self, data: Any) -> int:
            if b"lost" in bytes(data):
                raise BrokenPipeError
            return super().write(data)

    stream = Broken()
    log.start("info", "json", stream=stream)
    logger.info("lost")
    deadline = time.monotonic() + 10
    while b"dropped" not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    logger.info("after")
    log.stop()
    assert [json.loads(line).get("dropped") for line in stream.getvalue().splitlines()] == [1, None]


def test_stop_twice_and_start_twice() -> None:
    one, two = io.BytesIO(), io.BytesIO()
    log.start("info", "json", stream=one)
    log.start("info", "json", stream=two)
    logger.info("x")
    log.stop()
    log.stop()
    assert one.getvalue() == b"" and two.getvalue().count(b"\n") == 1
    assert not any(thread.name == "log" for thread in threading.enumerate())


def test_the_caller_does_not_format() -> None:
    class Slow:
        formatted_by = ""

        def __str__(self) -> str:
            Slow.formatted_by = threading.current_thread().name
            return "slow"

    (line,) = objects(lambda: logger.info("%s", Slow()))
    assert line["msg"] == "slow" and Slow.formatted_by == "log"


# -- once per cause and minute --------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    time_ns = [10**9]
    monkeypatch.setattr(clock, "mono_ns", lambda: time_ns[0])
    return time_ns


def test_once_per_key_and_interval(now: list[int]) -> None:
    def act() -> None:
        for round_ in range(3):
            for cause in ("truncated", "unknown"):
                for number in range(4):
                    extra = {"cause": cause, "number": number}
                    log.once_per(logger, cause, 60).warning("frame refused", extra=extra)
            now[0] += (59, 1, 0)[round_] * 10**9

    lines = objects(act)
    shown = [line["cause"] for line in lines if line["msg"] == "frame refused"]
    assert shown == ["truncated", "unknown", "truncated", "unknown"]
    assert sum(line.get("suppressed", 0) for line in lines) == 20


def test_counts_are_told_without_a_next_record(now: list[int]) -> None:
    stream = io.BytesIO()
    log.start("info", "json", stream=stream)
    for _ in range(5):
        log.once_per(logger, "quiet").error("connect failed")
    now[0] += 61 * 10**9
    deadline = time.monotonic() + 10
    while b"suppressed" not in stream.getvalue() and time.monotonic() < deadline:
        time.sleep(0.01)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [(line["msg"], line.get("suppressed")) for line in lines] == [
        ("connect failed", None),
        ("connect failed, more of the same", 4),
    ]
    assert lines[1]["level"] == "error"


def test_keys_are_bounded() -> None:
    def act() -> None:
        for number in range(3000):
            log.once_per(logger, number).info("x")
            log.once_per(logger, number).info("x")

    lines = objects(act)
    assert sum(line.get("suppressed", 0) for line in lines) == 3000
    assert sum("suppressed" not in line for line in lines) == 3000


# -- journal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["json", "text"])
def test_each_line_for_the_journal_carries_its_priority(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            logger.exception("it fails, and\u2028 is no end of a line")

    path = tmp_path / "journal"
    with path.open("wb") as stream:
        found = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        log.start("debug", form, stream=stream)
        logger.debug("one")
        logger.info("two")
        logger.warning("three")
        fail()
        logger.critical("four")
        log.stop()
    lines = path.read_bytes().split(b"\n")[:-1]
    marks = [line[:3].decode() for line in lines]
    errors = ["<3>"] * (len(lines) - 4)
    assert marks == ["<7>", "<6>", "<4>", *errors, "<2>"]
    assert len(errors) == 1 if form == "json" else len(errors) > 3
    if form == "json":
        assert [json.loads(line[3:])["msg"] for line in lines[:3]] == ["one", "two", "three"]


def test_another_stream_than_the_journal_gets_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")  # of our parent, whose stderr is not ours
    with (tmp_path / "log").open("wb") as stream:
        log.start("info", "json", stream=stream)
        logger.warning("x")
        log.stop()
    assert json.loads((tmp_path / "log").read_bytes())["level"] == "warning"


def test_what_ends_the_daemon_is_an_error_in_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "journal").open("wb") as stream:
        found = os.fstat(stream.fileno())
        environ = {
            **os.environ,
            "JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}",
            "BATCH_SIZE": "many",
        }
        command = [sys.executable, "-m", "tradecore", "run"]
        done = subprocess.run(command, env=environ, stderr=stream, timeout=30)
    lines = (tmp_path / "journal").read_text().splitlines()
    assert done.returncode == 2
    assert lines and all(line.startswith("<3>tradecore: ") for line in lines)


# -- terminal -------------------------------------------------------------------------------------


def test_status_line_is_kept_below_the_logs(terminal: tuple[int, int]) -> None:
    master, slave = terminal
    with open(slave, "wb", buffering=0) as stream, open(master, "rb", buffering=0) as screen:  # noqa: PTH123
        log.start("info", "auto", stream=stream)
        log.show_status("1,000 trades/s")
        seen = b""
        while b"trades/s" not in seen:
            seen += screen.read(4096)
        logger.info("hello")
        while seen.count(b"trades/s") < 2:
            seen += screen.read(4096)
        log.stop()
        os.set_blocking(master, False)
        seen += screen.read(4096) or b""
    assert seen.startswith(b"\r\x1b[K1,000 trades/s\r\x1b[K2")
    assert b" hello\r\n1,000 trades/s" in seen
    assert seen.endswith(b"\r\x1b[K")


def test_no_status_line_without_a_terminal() -> None:
    assert written("json", lambda: log.show_status("x")) == ""


def test_stderr_is_the_default() -> None:
    code = "import logging; from tradecore import log; log.start('info', 'auto'); "
    code += "logging.getLogger('a').info('hello'); log.stop()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert json.loads(done.stderr)["msg"] == "hello" and done.stdout == b""
