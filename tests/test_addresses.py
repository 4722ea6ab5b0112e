"""Names while the name service works, fails and hangs."""

import asyncio
import socket
from typing import Any

import pytest

from tradecore.feed import addresses
from tradecore.feed.addresses import AddressBook, AddressInfo


def info(address: str, port: int = 443) -> AddressInfo:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))


class Names:
    """A name service: answers, fails (an error) or hangs (None)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer: list[AddressInfo] | OSError | None = [info("192.0.2.1")]
        self.asked: list[str] = []
        self.hanging = asyncio.Event()
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", self._resolve)

    async def _resolve(self, host: str, port: int, **_: Any) -> list[AddressInfo]:
        self.asked.append(host)
        answer = self.answer
        if answer is None:
            await self.hanging.wait()
            answer = self.answer
        if isinstance(answer, OSError):
            raise answer
        return answer or []


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    monkeypatch.setattr(addresses, "_IMPATIENT_S", 0.05)
    return Names(monkeypatch)


async def test_the_last_good_addresses_serve_while_names_fail(
    names: Names, caplog: pytest.LogCaptureFixture
) -> None:
    book = AddressBook()
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.1")]
    names.answer = [info("192.0.2.2")]
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.2")]
    names.answer = socket.gaierror(-3, "Temporary failure in name resolution")
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.2")]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    names.answer = [info("192.0.2.3")]
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.3")]


async def test_a_host_is_known_at_all_its_ports(names: Names) -> None:
    book = AddressBook()
    await book.resolve("venue", 9443, 1)
    six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 9443, 0, 3))
    names.answer = [info("192.0.2.1", 9443), six]
    await book.resolve("venue", 9443, 1)
    names.answer = OSError("down")
    assert await book.resolve("venue", 443, 1) == [
        info("192.0.2.1"),
        (*six[:4], ("2001:db8::1", 443, 0, 3)),
    ]


async def test_known_addresses_are_not_held_up_by_a_slow_name_service(
    names: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    names = Names(monkeypatch)
    book = AddressBook()
    await book.resolve("venue", 443, 1)
    names.answer = None
    async with asyncio.timeout(0.4):
        assert await book.resolve("venue", 443, 5) == [info("192.0.2.1")]
    names.answer = [info("192.0.2.7")]
    names.hanging.set()  # what was waited for no longer still counts
    await asyncio.sleep(0.01)
    names.answer = OSError("down")
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.7")]


async def test_the_same_while_the_name_service_hangs(names: Names) -> None:
    book = AddressBook()
    await book.resolve("venue", 443, 1)
    names.answer = None
    for _ in range(3):
        assert await book.resolve("venue", 443, 1) == [info("192.0.2.1")]
    assert len(names.asked) == 2  # a lookup holds a thread: one at a time
    names.answer = [info("192.0.2.9")]
    names.hanging.set()
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.9")]


async def test_a_name_never_known_is_an_error(names: Names) -> None:
    book = AddressBook()
    names.answer = socket.gaierror(-2, "Name or service not known")
    with pytest.raises(OSError, match="not known"):
        await book.resolve("nosuch", 443, 1)
    names.answer = None
    with pytest.raises(TimeoutError, match="name nosuch was not resolved"):
        await book.resolve("nosuch", 443, 0.05)
    names.answer = socket.gaierror(-2, "Name or service not known")
    names.hanging.set()
    with pytest.raises(OSError, match="not known"):
        await book.resolve("nosuch", 443, 1)


async def test_an_empty_answer_is_not_remembered(names: Names) -> None:
    book = AddressBook()
    await book.resolve("venue", 443, 1)
    names.answer = []
    assert await book.resolve("venue", 443, 1) == []
    names.answer = OSError("down")
    assert await book.resolve("venue", 443, 1) == [info("192.0.2.1")]


async def test_the_memory_is_bounded(names: Names) -> None:
    book = AddressBook()
    names.answer = [info("192.0.2.1")] * 100
    for number in range(3 * addresses.MAX_HOSTS):
        await book.resolve(f"host{number}", 443, 1)
    assert len(book._known) == addresses.MAX_HOSTS
    names.answer = OSError("down")
    assert len(await book.resolve(f"host{number}", 443, 1)) == addresses.MAX_ADDRESSES


async def test_a_given_up_wait_does_not_stop_the_lookup_of_others(names: Names) -> None:
    book = AddressBook()
    names.answer = None
    first, second = (asyncio.create_task(book.resolve("venue", 443, 5)) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    names.answer = [info("192.0.2.1")]
    names.hanging.set()
    assert await second == [info("192.0.2.1")]
    assert first.cancelled() and len(names.asked) == 1
