"""The faults. Each is over when its function returns: all that was stopped runs again.

Only the consequences are left: what was missed, what is broken, what must be found out.
"""

import asyncio
import os
import shutil
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random

import asyncpg

from tests.torture.arena import NEWCOMER, SYMBOLS, Arena
from tests.torture.link import CUTS

Fault = Callable[[Arena, Random], Awaitable[None]]
_LIMIT_S = 60.0
_RENEWED_S = 4.0
_ROLLOVER_S = 22.0
"""By then REST has been asked twice about a successor: what can go wrong has gone wrong."""
_spares = iter(range(10**6))


class Skipped(Exception):
    """This fault cannot be had here; the text says why."""


# -- the daemon --------------------------------------------------------------------------------


async def kill9(arena: Arena, random: Random) -> None:
    """Kill -9, once or several times, also while it starts."""
    async with arena.daemon_hand:
        for _ in range(random.choice((1, 1, 2, 3))):
            await asyncio.sleep(random.uniform(0, 1.5))
            await arena.daemon.kill()
            await asyncio.sleep(random.choice((0, random.uniform(0, 2))))
            await arena.daemon.start()


async def term(arena: Arena, random: Random) -> None:
    """SIGTERM, a pause, start."""
    async with arena.daemon_hand:
        code = await arena.daemon.terminate()
        assert code == 0, f"the daemon ended with {code}:\n{arena.daemon.log[-2000:]}"
        await asyncio.sleep(random.uniform(0, 2))
        await arena.daemon.start()


async def two_daemons(arena: Arena, random: Random) -> None:
    """Record with a second daemon into the same database; one of them dies."""
    second = arena.spare_daemon(next(_spares))
    async with arena.daemon_hand:
        await second.start()
        try:
            await second.until(lambda health: health["counts"]["trades_received"] > 0)
            await asyncio.sleep(random.uniform(0.5, 2))
            victim = random.choice((arena.daemon, second))
            await victim.kill()
            await asyncio.sleep(random.uniform(0, 2))
            if victim is arena.daemon:
                await arena.daemon.start()
                await asyncio.sleep(random.uniform(0, 2))
        finally:
            if second.process is not None and second.process.returncode is None:
                await second.terminate()
    shutil.rmtree(second.folder)


async def reload(arena: Arena, random: Random) -> None:
    """Change the recorded symbols by SIGHUP."""
    await _restful(arena)
    async with arena.daemon_hand:
        if NEWCOMER in arena.symbols:
            arena.symbols.remove(NEWCOMER)
        else:
            arena.symbols.append(NEWCOMER)
        arena.write_settings()
        process = arena.daemon.process
        assert process is not None
        process.send_signal(signal.SIGHUP)
        await asyncio.sleep(1)
        assert process.returncode is None, f"SIGHUP has ended the daemon with {process.returncode}"


async def _restful(arena: Arena) -> None:
    """Wait until the daemon can take signals."""
    async with asyncio.timeout(_LIMIT_S):
        while not await arena.daemon.health():
            await asyncio.sleep(0.05)


async def freeze(arena: Arena, random: Random) -> None:
    """Stop the daemon's process as a paused virtual machine is, and let it go on."""
    async with arena.daemon_hand:
        process = arena.daemon.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(random.choice((random.uniform(1, 4), random.uniform(4, 20))))
        finally:
            process.send_signal(signal.SIGCONT)


async def shards(arena: Arena, random: Random) -> None:
    """Let two daemons share the symbols, kill one, and let the other take its symbols over."""
    nodes = [arena.spare_daemon(next(_spares), SHARDS=4, NODE_NAME=f"n{i}") for i in range(2)]
    async with arena.daemon_hand:
        await arena.daemon.terminate()
        try:
            for node in nodes:
                await node.start()
            for node in nodes:
                await node.until(lambda body: len(body["symbols"]) > 0, "/health/binance")
            await asyncio.sleep(random.uniform(0, 4))
            random.shuffle(nodes)
            await nodes[0].kill()
            await nodes[1].until(
                lambda body: set(arena.symbols) <= body["symbols"].keys(), "/health/binance"
            )
            await asyncio.sleep(random.uniform(0, 2))
        finally:
            for node in nodes:
                if node.process is not None and node.process.returncode is None:
                    await node.terminate()
            await arena.daemon.start()
    for node in nodes:
        shutil.rmtree(node.folder)


async def clock_step(arena: Arena, random: Random) -> None:
    """Move the daemon's wall clock forth or back, then to the truth again."""
    assert arena.shim is not None
    try:
        for _ in range(random.choice((1, 2))):
            arena.shim.step(random.choice((-1, 1)) * random.choice((0.5, 7, 90, 3700, 90_000)))
            await asyncio.sleep(random.uniform(0.5, 2))
    finally:
        arena.shim.step(0)


# -- the database ------------------------------------------------------------------------------


async def pg_immediate(arena: Arena, random: Random) -> None:
    """Stop PostgreSQL as `stop -m immediate` does, and start it again."""
    async with arena.database_hand:
        await _crash_database(arena)
        await asyncio.sleep(random.uniform(0, 3))
        await arena.postgres.start()


async def ring_full(arena: Arena, random: Random) -> None:
    """Keep the database away until the daemon has refused trades."""
    async with arena.database_hand:
        await _crash_database(arena)
        before = await _counted(arena, "trades_refused")
        try:
            async with asyncio.timeout(_LIMIT_S):
                while (now := await _counted(arena, "trades_refused")) <= before:
                    before = min(before, now)  # the daemon may have started anew
                    await asyncio.sleep(0.1)
            await asyncio.sleep(random.uniform(0, 1))
        finally:
            await arena.postgres.start()


async def pg_terminate(arena: Arena, random: Random) -> None:
    """End the daemon's sessions in the server, again and again."""
    for _ in range(random.randint(1, 6)):
        await asyncio.sleep(random.uniform(0, 0.4))
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError):
            async with arena.database() as connection:
                await connection.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )


async def commit_cut(arena: Arena, random: Random) -> None:
    """Cut the daemon's connection around COMMIT and COPY; the answer to a COMMIT is lost."""
    before = sum(arena.link.done.values())
    wanted = random.randint(1, 4)
    for _ in range(wanted):
        arena.link.arm(random.choice((*CUTS, "after_commit")))
    try:
        async with asyncio.timeout(15):
            while sum(arena.link.done.values()) < before + wanted:
                await asyncio.sleep(0.02)
    except TimeoutError:
        arena.link.disarm()
        assert arena.mix, "there was nothing to cut for 15 s, and no other fault explains it"


async def db_hang(arena: Arena, random: Random) -> None:
    """Let the database hang for longer than connects, reads and statements may take."""
    arena.link.stall()
    try:
        await asyncio.sleep(random.uniform(35, 60))
    finally:
        arena.link.flow()


async def db_hang_start(arena: Arena, random: Random) -> None:
    """Start the daemon while the database hangs: it must capture all the same."""
    async with arena.daemon_hand:
        await arena.daemon.terminate()
        arena.link.stall()
        try:
            await arena.daemon.start()
            if not arena.mix:
                async with asyncio.timeout(8):
                    await arena.daemon.until(lambda health: health["ring"]["rows"] > 0)
            await asyncio.sleep(random.choice((0, random.uniform(0, 15))))
        finally:
            arena.link.flow()


async def db_stall(arena: Arena, random: Random) -> None:
    """Let the database hang: connections stay open and nothing passes; then all are cut or not."""
    arena.link.stall()
    try:
        await asyncio.sleep(random.uniform(0.5, 4))
        if random.random() < 0.5:
            arena.link.cut()
    finally:
        arena.link.flow()


async def disk_full(arena: Arena, random: Random) -> None:
    """Fill the disk of the database and of DATA_DIR; a server that dies of it is started again."""
    assert arena.disk is not None
    filler = arena.disk / "filler"
    async with arena.database_hand:
        try:
            with filler.open("wb") as file, suppress(OSError):
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
            await asyncio.sleep(random.uniform(1, 4))
        finally:
            filler.unlink()
            if not arena.postgres.running:
                await arena.postgres.start()


async def _crash_database(arena: Arena) -> None:
    assert arena.postgres.pid is not None
    os.kill(arena.postgres.pid, signal.SIGQUIT)
    async with asyncio.timeout(_LIMIT_S):
        while arena.postgres.running:
            await asyncio.sleep(0.02)


async def _counted(arena: Arena, name: str) -> int:
    health = await arena.daemon.health()
    return int(health["counts"][name]) if health else 0


# -- the venue: connections --------------------------------------------------------------------


def _order(name: str, **fixed: object) -> Fault:
    """Make a fault that the exchange carries out at once."""

    async def fault(arena: Arena, random: Random) -> None:
        await arena.fault(random, name, connections=random.choice(("all", "one")), **fixed)
        await asyncio.sleep(random.uniform(0.5, 1.5))  # something must be printed meanwhile

    return fault


async def reset(arena: Arena, random: Random) -> None:
    """TCP resets, some in a row."""
    for _ in range(random.randint(1, 3)):
        await arena.fault(random, "cut", connections=random.choice(("all", "one")))
        await asyncio.sleep(random.uniform(0, 0.8))


async def refuse(arena: Arena, random: Random) -> None:
    """Cut, and refuse the next connects."""
    await arena.fault(random, "refuse", n=random.randint(1, 5))
    await arena.fault(random, "cut")
    await asyncio.sleep(random.uniform(0, 1))


async def host_down(arena: Arena, random: Random) -> None:
    """Let a host of the venue, or all, be away for some seconds."""
    await arena.fault(random, "refuse", n=10**6)
    await arena.fault(random, "cut")
    await asyncio.sleep(random.uniform(1, 6))
    for host in arena.exchanges:
        await host.fault("refuse", n=0)


async def slow_handshake(arena: Arena, random: Random) -> None:
    """Cut, and let the next handshakes take long."""
    await arena.fault(
        random, "slow_handshake", n=random.randint(1, 2), seconds=random.choice((2, 6, 15))
    )
    await arena.fault(random, "cut")
    await asyncio.sleep(random.uniform(0, 1))


async def shutdown(arena: Arena, random: Random) -> None:
    """Announce serverShutdown, cut soon after."""
    seconds = random.uniform(1, 4)
    await arena.fault(random, "shutdown", seconds=seconds)
    await asyncio.sleep(seconds + random.uniform(0, 1))


async def shutdown_storm(arena: Arena, random: Random) -> None:
    """Announce serverShutdown to whatever is connected, each second for ten seconds."""
    for _ in range(10):
        await _announce(arena)
        await asyncio.sleep(1)


def _ban(status: int, *, tells: bool = True) -> Fault:
    """Make a fault that cuts, and refuses upgrades for a while: the judge counts who asks on."""

    async def fault(arena: Arena, random: Random) -> None:
        seconds = random.uniform(2, 12)
        await arena.fault(random, "ban", status=status, seconds=seconds, retry_after=int(tells))
        await _cut(arena)
        await asyncio.sleep(random.uniform(0, seconds))

    return fault


async def mute(arena: Arena, random: Random) -> None:
    """Cut, and let the next connections answer pings and requests and bring no data."""
    await _with_born(arena, random, "mute", _cut)


async def mute_start(arena: Arena, random: Random) -> None:
    """Start the daemon onto a mute connection."""
    await _with_born(arena, random, "mute", _start_again)


async def mute_successor(arena: Arena, random: Random) -> None:
    """Announce serverShutdown without a cut, and let the successor be mute.

    The old session brings everything on, so nothing may be late: LIMITS_S.
    """
    await _with_born(arena, random, "mute", _announce, _ROLLOVER_S)


async def tradeless(arena: Arena, random: Random) -> None:
    """Let new connections bring everything but trades."""
    await _with_born(arena, random, "tradeless", random.choice((_cut, _start_again, _announce)))


async def _with_born(
    arena: Arena,
    random: Random,
    kind: str,
    renew: Callable[[Arena], Awaitable[None]],
    wait_s: float = _RENEWED_S,
) -> None:
    """Make the daemon connect anew while new connections are ill, of one host or of all."""
    hosts = arena.exchanges if random.random() < 0.5 else [random.choice(arena.exchanges)]
    try:
        for host in hosts:
            await host.fault(kind, n=random.choice((1, 1, 2)))
        await renew(arena)
        await asyncio.sleep(wait_s)
    finally:
        for host in hosts:
            await host.fault(kind, n=0)


async def _cut(arena: Arena) -> None:
    for host in arena.exchanges:
        await host.fault("cut")


async def _start_again(arena: Arena) -> None:
    async with arena.daemon_hand:
        await arena.daemon.terminate()
        await arena.daemon.start()


async def _announce(arena: Arena) -> None:
    for host in arena.exchanges:
        await host.fault("shutdown", seconds=0)


# -- the venue: trades -------------------------------------------------------------------------


def _trades(kind: str, most: int) -> Fault:
    async def fault(arena: Arena, random: Random) -> None:
        for _ in range(random.randint(1, 3)):
            which = random.choice(("all", "one"))
            await arena.fault(random, kind, n=random.randint(1, most), connections=which)
            await asyncio.sleep(random.uniform(0, 0.5))

    return fault


async def drop_stream(arena: Arena, random: Random) -> None:
    """Let a symbol's trades vanish from the present connections."""
    symbol = random.choice(SYMBOLS[:3])
    await arena.fault(
        random, "drop_stream", symbol=symbol, connections=random.choice(("all", "one"))
    )
    await asyncio.sleep(random.uniform(1, 2))


async def quiet(arena: Arena, random: Random) -> None:
    """Let the market, or a symbol, stand still, often over a cut."""
    if random.random() < 0.5:
        await arena.fault(random, "quiet", symbol=random.choice(SYMBOLS), seconds=3)
    else:
        await arena.fault(random, "pause")
    if random.random() < 0.6:
        await arena.fault(random, "cut")
    await asyncio.sleep(random.uniform(1, 4))
    await arena.fault(random, "resume")


# -- the venue: REST ---------------------------------------------------------------------------


def _rest(mode: str, longest_s: float = 5.0) -> Fault:
    """Make a fault of REST together with holes that need it."""

    async def fault(arena: Arena, random: Random) -> None:
        seconds = random.uniform(1, longest_s)
        await arena.fault(random, "rest", mode=mode, seconds=seconds, lag=seconds)
        await arena.fault(random, "drop", n=random.randint(1, 300))
        if random.random() < 0.4:
            await arena.fault(random, "cut")
        await asyncio.sleep(seconds)

    return fault


FAULTS: dict[str, Fault] = {
    "kill9": kill9,
    "term": term,
    "two_daemons": two_daemons,
    "reload": reload,
    "freeze": freeze,
    "shards": shards,
    "clock_step": clock_step,
    "pg_immediate": pg_immediate,
    "pg_terminate": pg_terminate,
    "commit_cut": commit_cut,
    "db_stall": db_stall,
    "db_hang": db_hang,
    "db_hang_start": db_hang_start,
    "ring_full": ring_full,
    "disk_full": disk_full,
    "reset": reset,
    "half_open": _order("half_open"),
    "stop_pong": _order("stop_pong"),
    "close_1001": _order("close", code=1001),
    "close_1008": _order("close", code=1008),
    "shutdown": shutdown,
    "shutdown_storm": shutdown_storm,
    "refuse": refuse,
    "host_down": host_down,
    "slow_handshake": slow_handshake,
    "mute": mute,
    "mute_start": mute_start,
    "mute_successor": mute_successor,
    "tradeless": tradeless,
    "drop": _trades("drop", 200),
    "duplicate": _trades("duplicate", 200),
    "reorder": _trades("reorder", 50),
    "garbage": _trades("garbage", 30),
    "drop_stream": drop_stream,
    "quiet": quiet,
    "ban_429": _ban(429),
    "ban_429_untold": _ban(429, tells=False),
    "ban_418": _ban(418),
    "rest_429": _rest("429"),
    "rest_418": _rest("418"),
    "rest_500": _rest("500"),
    "rest_hang": _rest("hang"),
    "rest_lag": _rest("lag"),
    "rest_garbage": _rest("garbage"),
}
SHORT = (
    "kill9", "reset", "drop", "two_daemons", "commit_cut", "pg_immediate", "reload", "tradeless",
    "ban_418",
)  # fmt: skip
"""Those that a short run has the time for."""
LIMITS_S = {"mute_successor": 10.0}
"""How soon all must be whole after a fault that a daemon should hardly notice, when it is alone."""
MIXED = "mixed"
