"""The same script with the library that most know: websockets in place of picows."""

import _usual
from websockets.asyncio.client import connect


async def receive(url: str, rows: _usual.Rows) -> None:
    """Add what comes until the connection ends."""
    async with connect(url) as connection:
        async for frame in connection:
            rows.add(frame)


if __name__ == "__main__":
    _usual.main(__doc__, receive)
