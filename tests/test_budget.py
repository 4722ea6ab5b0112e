"""The request budget: weights, silences, and what of them outlives the process."""

import asyncio
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tradecore import block, clock
from tradecore.rest import budget
from tradecore.rest.budget import Budget, RestError, Ticket

S = 10**9
HOST = "api.binance.com"
DAY_S = 86_400
START_S = 1_800_000_000  # a clock minute begins
AFTER_2_H = "Fri, 15 Jan 2027 10:00:00 GMT"
AFTER_3_H = "Fri, 15 Jan 2027 11:00:00 GMT"


class Clocks:
    """Both clocks in the hands of the test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.mono_s = 5_000.0
        self.wall_s = float(START_S)
        monkeypatch.setattr(clock, "mono_ns", lambda: round(self.mono_s * S))
        monkeypatch.setattr(clock, "wall_ns", lambda: round(self.wall_s * S))
        monkeypatch.setattr(budget, "_POLL_S", 0.01)

    def tick(self, seconds: float) -> None:
        self.mono_s += seconds
        self.wall_s += seconds

    def step(self, seconds: float) -> None:
        """Set the wall clock."""
        self.wall_s += seconds


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / budget.STATE_NAME


async def spend(target: Budget, weight: int, times: int = 1) -> None:
    for _ in range(times):
        target.done(await target.take(weight, 0))


async def refused(target: Budget, weight: int = 1, limit_s: float = 0) -> RestError:
    with pytest.raises(RestError) as caught:
        await target.take(weight, limit_s)
    return caught.value


def used(weight: int, **more: str) -> dict[str, str]:
    return {"X-MBX-USED-WEIGHT-1M": str(weight), **more}


# -- weight ---------------------------------------------------------------------------------------


async def test_our_own_weight_stays_below_nine_tenths_of_any_minute(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    await spend(target, 25, 200)
    clocks.tick(30)
    await spend(target, 25, 16)
    assert target.used_weight == 5400 and target.limit_weight == 6000
    error = await refused(target, 1)
    assert error.kind == "limited" and error.retry_after_s == pytest.approx(30)
    assert "5400 of 6000" in str(error)
    clocks.tick(30)
    await spend(target, 25, 200)
    assert (await refused(target, 1)).retry_after_s == pytest.approx(30)


async def test_random_weights_never_pass_the_share(clocks: Clocks) -> None:
    rng = random.Random(7)
    target = Budget(None, HOST, limit_weight=600)
    sent: list[tuple[float, int]] = []
    for _ in range(5000):
        weight = rng.choice([1, 2, 25, 40, 80])
        try:
            await spend(target, weight)
        except RestError as error:
            clocks.tick(max(error.retry_after_s, 0.001))
        else:
            sent.append((clocks.mono_s, weight))
            clocks.tick(rng.choice([0, 0.01, 1]))
    for index, (begin_s, _) in enumerate(sent):
        window = [w for at_s, w in sent[index : index + 600] if at_s < begin_s + 60]
        assert sum(window) <= 540


async def test_the_venues_count_holds_us_until_its_minute_turns(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    target.observe(200, used(5390, Date="Tue, 24 Nov 2026 03:41:48 GMT"))
    await spend(target, 10)
    error = await refused(target, 25)
    assert error.kind == "limited" and error.retry_after_s == pytest.approx(12)
    clocks.step(-3600)  # the venue's clock counts
    clocks.tick(12)
    await spend(target, 25)


async def test_without_a_date_the_host_clock_tells_the_minute(clocks: Clocks) -> None:
    clocks.tick(45)
    target = Budget(None, HOST)
    target.observe(200, used(6000))
    assert (await refused(target)).retry_after_s == pytest.approx(16)


async def test_requests_under_way_count_before_their_answer(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    target.observe(200, used(5300))
    ticket = await target.take(80, 0)
    clocks.tick(2)
    assert (await refused(target, 25)).kind == "limited"
    target.done(ticket)


async def test_a_reserve_is_left_to_others(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    target.observe(200, used(5100))
    with pytest.raises(RestError, match="no room"):
        await target.take(25, 0, reserve=300)
    await spend(target, 25)
    small = Budget(None, HOST, limit_weight=100)
    small.observe(200, used(50))
    small.done(await small.take(25, 0, reserve=300))


async def test_a_request_heavier_than_a_learnt_ceiling_goes_alone(clocks: Clocks) -> None:
    target = Budget(None, HOST, limit_weight=50)
    await spend(target, 80)
    assert (await refused(target, 80)).retry_after_s == pytest.approx(60)
    clocks.tick(60)
    await spend(target, 80)


# -- silence --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "headers", "kind", "seconds"),
    [
        (429, {"Retry-After": "17"}, "limited", 18),
        (429, {}, "limited", 61),
        (429, {"Retry-After": "soon"}, "limited", 61),
        (429, {"Retry-After": "0"}, "limited", 61),
        (418, {"Retry-After": "600"}, "banned", 601),
        (418, {}, "banned", 121),
        (418, {"Retry-After": "999999999"}, "banned", 3 * DAY_S),
        (418, {"Retry-After": "9" * 400}, "banned", 3 * DAY_S),
        (418, {"Retry-After": "10800.0"}, "banned", 10_801),
        (418, {"Retry-After": "-5"}, "banned", 121),
        (418, {"Retry-After": AFTER_3_H}, "banned", 10_801),
        (418, {"Retry-After": AFTER_3_H, "Date": AFTER_2_H}, "banned", 3601),
        (418, {"Retry-After": AFTER_2_H, "Date": AFTER_3_H}, "banned", 121),
        (418, {"Retry-After": AFTER_3_H, "Date": "now"}, "banned", 10_801),
        (418, {"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, "banned", 3 * DAY_S),
        (429, {"Retry-After": AFTER_2_H}, "limited", 7201),
        (403, {}, "refused", 301),
        (451, {}, "refused", 61),
    ],
)
async def test_nobody_asks_before_the_time_is_over(
    clocks: Clocks, path: Path, status: int, headers: dict[str, str], kind: str, seconds: float
) -> None:
    target = Budget(path, HOST)
    await spend(target, 1)
    target.observe(status, headers)
    assert target.refusals == {status: 1}
    for one in (target, Budget(path, HOST)):
        error = await refused(one, 1, limit_s=seconds - 0.5)
        assert error.kind == kind and error.retry_after_s == pytest.approx(seconds)
        assert one.banned_until_s == pytest.approx(clocks.wall_s + seconds)
    clocks.tick(seconds - 0.01)
    await refused(target)
    clocks.tick(0.02)
    await spend(target, 1)
    await spend(Budget(path, HOST), 1)
    assert target.banned_until_s == 0


async def test_the_body_tells_the_end_of_a_ban(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    until_ms = int((clocks.wall_s + 1000) * 1000)
    body = b'{"code":-1003,"msg":"Way too much weight used; IP banned until %d. Please"}' % until_ms
    target.observe(418, {})
    assert (await refused(target)).retry_after_s == pytest.approx(121)
    target.hear({}, body)
    error = await refused(target)
    assert error.kind == "banned" and error.retry_after_s == pytest.approx(1001)
    target.hear({"Date": "Fri, 15 Jan 2027 07:00:00 GMT"}, body)  # by its clock an hour longer
    assert (await refused(target)).retry_after_s == pytest.approx(4601)
    target.hear({}, body)
    target.hear({}, b"no")
    assert (await refused(target)).retry_after_s == pytest.approx(4601), "never shorter"


async def test_bans_without_a_length_double(clocks: Clocks, path: Path) -> None:
    for seconds in (121, 241, 481):
        target = Budget(path, HOST)  # each time after a restart
        target.observe(418, {})
        assert (await refused(target)).retry_after_s == pytest.approx(seconds)
        clocks.tick(seconds + 1)
        await spend(target, 1)
    clocks.tick(DAY_S)
    target.observe(200, {})
    target.observe(418, {})
    assert (await refused(target)).retry_after_s == pytest.approx(121)


async def test_a_shorter_silence_does_not_end_a_longer_one(clocks: Clocks, path: Path) -> None:
    target = Budget(path, HOST)
    target.observe(418, {"Retry-After": "600"})
    target.observe(429, {"Retry-After": "5"})
    target.observe(200, used(10))
    for one in (target, Budget(path, HOST)):
        error = await refused(one)
        assert error.kind == "banned" and error.retry_after_s == pytest.approx(601)


async def test_a_429_lowers_the_ceiling_and_peace_raises_it(clocks: Clocks, path: Path) -> None:
    target = Budget(path, HOST)
    target.observe(429, used(4000, **{"Retry-After": "10"}))
    assert target.limit_weight == 4000 and Budget(path, HOST).limit_weight == 4000
    clocks.tick(60)
    target.observe(200, used(1))
    assert target.limit_weight == 4200
    clocks.tick(60 * 60)
    target.observe(200, used(1))
    assert target.limit_weight == 6000


async def test_a_429_far_below_the_limit_teaches_only_when_it_comes_again(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    target.observe(429, used(1200, **{"Retry-After": "3"}))
    assert target.limit_weight == 6000, "its cause is another one"
    assert target.silent_s == pytest.approx(4), "and it is obeyed"
    clocks.tick(5)
    target.observe(429, used(1225, **{"Retry-After": "3"}))
    assert target.limit_weight == 6000, "the same minute is the same cause"
    clocks.tick(60)
    target.observe(429, used(3))
    assert target.limit_weight == 6000
    clocks.tick(60)
    target.observe(429, used(1180))
    clocks.tick(60)
    target.observe(429, used(1200))
    assert target.limit_weight == 1200, "this venue allows less"
    target.observe(429, used(3))
    clocks.tick(60)
    target.observe(429, used(3))
    assert target.limit_weight == 600, "an odd 429 must not stop everything"


async def test_waiters_look_again_after_their_wait(clocks: Clocks) -> None:
    """Nothing follows a 429, however many requests stand in line."""
    target = Budget(None, HOST)
    first = await target.take(1, 0)
    waiting = [asyncio.create_task(target.take(1, 30)) for _ in range(10)]
    await asyncio.sleep(0.05)
    target.observe(429, {"Retry-After": "100"})
    target.done(first)
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [getattr(o, "kind", o) for o in outcomes] == ["limited"] * 10
    assert target.waits == 10


async def test_a_silence_that_ends_in_time_is_waited_out(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    target.observe(429, {"Retry-After": "10"})
    waiting = [asyncio.create_task(target.take(1, 30)) for _ in range(3)]
    await asyncio.sleep(0.05)
    clocks.tick(10.5)
    await asyncio.sleep(0.05)
    assert not any(task.done() for task in waiting)
    clocks.tick(1)
    done, rest = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED, timeout=10)
    assert len(done) == 1, "and only one goes to see whether it is true"
    target.observe(418, {"Retry-After": "100"})
    target.done(done.pop().result())
    outcomes = await asyncio.gather(*rest, return_exceptions=True)
    assert [getattr(o, "kind", o) for o in outcomes] == ["banned"] * 2


async def test_one_at_a_time_unless_one_hangs(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    tickets: list[Ticket] = []
    for _ in range(3):
        tickets.append(await target.take(1, 0))
        await refused(target)
        clocks.tick(0.99)
        await refused(target)
        clocks.tick(0.01)
    await refused(target)
    clocks.tick(100)
    await refused(target)
    for ticket in tickets:
        target.done(ticket)
        target.done(ticket)
    await spend(target, 1)


async def test_the_line_is_bounded(clocks: Clocks) -> None:
    target = Budget(None, HOST)
    target.observe(429, {"Retry-After": "10"})
    waiting = [asyncio.create_task(target.take(1, 30)) for _ in range(64)]
    await asyncio.sleep(0.02)
    assert "64 requests" in str(await refused(target, 1, 30))
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    clocks.tick(20)
    await spend(target, 1)


# -- clocks that step -----------------------------------------------------------------------------


@pytest.mark.parametrize("step_s", [-10 * 365 * DAY_S, -3600, 3600, 10 * 365 * DAY_S])
async def test_a_step_of_the_clock_neither_opens_nor_extends_a_ban(
    clocks: Clocks, path: Path, step_s: float
) -> None:
    target = Budget(path, HOST)
    target.observe(418, {"Retry-After": "600"})
    clocks.step(step_s)
    assert (await refused(target)).retry_after_s == pytest.approx(601)
    restarted = Budget(path, HOST)
    assert (await refused(restarted)).retry_after_s == pytest.approx(601)
    clocks.tick(602)
    await spend(target, 1)
    await spend(restarted, 1)


async def test_after_a_boot_the_wall_clock_counts(
    clocks: Clocks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Budget(path, HOST).observe(418, {"Retry-After": "600"})
    monkeypatch.setattr(block, "_boot_id", lambda: "another")
    clocks.tick(100)
    clocks.mono_s = 3.0
    target = Budget(path, HOST)
    assert (await refused(target)).retry_after_s == pytest.approx(501)
    clocks.step(-365 * DAY_S)
    assert (await refused(Budget(path, HOST))).retry_after_s == pytest.approx(601)
    clocks.tick(502)
    await spend(target, 1)


# -- the file -------------------------------------------------------------------------------------


async def test_a_ban_is_on_the_disk_before_anything_else(
    clocks: Clocks, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(path.exists())
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    Budget(path, HOST).observe(418, {"Retry-After": "600"})
    assert synced == [False, True], "the content before the rename, the folder after it"
    assert json.loads(path.read_bytes())[HOST]["block"]["kind"] == "banned"
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, path.name + ".lock"]


async def test_another_process_learns_of_a_ban_at_once(clocks: Clocks, path: Path) -> None:
    daemon, backfill, other = Budget(path, HOST), Budget(path, HOST), Budget(path, "127.0.0.1:1")
    await spend(daemon, 1)
    backfill.observe(418, {"Retry-After": "600"})
    assert (await refused(daemon)).kind == "banned"
    daemon.observe(429, {"Retry-After": "1"})
    assert (await refused(Budget(path, HOST))).kind == "banned"
    await spend(other, 1)
    other.observe(429, {"Retry-After": "1"})
    assert (await refused(Budget(path, HOST))).kind == "banned", "hosts do not overwrite another"


async def test_used_weight_survives_a_restart(clocks: Clocks, path: Path) -> None:
    target = Budget(path, HOST)
    clocks.tick(6)
    target.observe(200, used(5380))
    restarted = Budget(path, HOST)
    assert restarted.used_weight == 5380
    await refused(restarted, 25)
    clocks.tick(56)
    await spend(Budget(path, HOST), 25)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"api.binance.com": 7}',
        b'{"api.binance.com": {}}',
        b'{"api.binance.com": {"boot":"","block":{"kind":"x"},"strikes":0}}',
        b"\0" * 300,
    ],
)
async def test_a_damaged_file_may_have_held_a_ban(
    clocks: Clocks, path: Path, content: bytes
) -> None:
    path.write_bytes(content)
    for _ in range(3):  # a restart loop does not get through, nor does it start anew each time
        assert (await refused(Budget(path, HOST))).retry_after_s > 60
        clocks.tick(15)
    clocks.tick(120)
    await spend(Budget(path, HOST), 1)


async def test_numbers_in_the_file_that_make_no_sense_do_not_lock_us_out(
    clocks: Clocks, path: Path
) -> None:
    target = Budget(path, HOST)
    target.observe(418, {"Retry-After": "600"})
    content: dict[str, Any] = json.loads(path.read_bytes())
    content[HOST]["block"] |= {"until_wall_s": 1e300, "until_mono_s": 1e300, "length_s": 1e300}
    path.write_text(json.dumps(content))
    assert (await refused(Budget(path, HOST))).retry_after_s <= 3 * DAY_S


async def test_a_file_that_cannot_be_written_costs_no_ban(clocks: Clocks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    target = Budget(tmp_path / "file" / "rest_budget.json", HOST)
    target.observe(418, {"Retry-After": "600"})
    assert target.write_failures == 1 and (await refused(target)).kind == "banned"


async def test_only_a_ban_makes_the_folder(clocks: Clocks, tmp_path: Path) -> None:
    target = Budget.of(tmp_path / "data", f"https://{HOST}")
    target.save()
    assert not (tmp_path / "data").exists() and target.write_failures == 0
    target.observe(418, {"Retry-After": "600"})
    assert (await refused(Budget.of(tmp_path / "data", f"https://{HOST}/"))).kind == "banned"


async def test_a_stopped_holder_of_the_lock_stops_nobody(clocks: Clocks, path: Path) -> None:
    holder = block.BlockFile(path, HOST)
    target = Budget(path, HOST)
    with holder._locked():
        target.observe(418, {"Retry-After": "600"})
    assert (await refused(Budget(path, HOST))).kind == "banned"
