"""The script that one writes in an afternoon: picows, orjson, Decimal, copy_records_to_table."""

import _usual
from picows import WSFrame, WSListener, WSTransport, ws_connect


class Listener(WSListener):
    """Hands each frame on."""

    def __init__(self, rows: _usual.Rows) -> None:
        self._rows = rows

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        self._rows.add(frame.get_payload_as_memoryview())


async def receive(url: str, rows: _usual.Rows) -> None:
    """Add what comes until the connection ends."""
    transport, _ = await ws_connect(lambda: Listener(rows), url)
    await transport.wait_disconnected()


if __name__ == "__main__":
    _usual.main(__doc__, receive)
