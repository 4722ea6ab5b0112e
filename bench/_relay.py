"""The baseline of the fan-out's bench: the relay that one would write without tradecore.

picows on both sides, one send per client and event. It changes nothing, drops no duplicates,
bounds no buffer and answers no requests.
"""

import argparse

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_connect, ws_create_server

CLIENTS: set[WSTransport] = set()


class Upstream(WSListener):
    """The venue's side."""

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        payload = frame.get_payload_as_bytes()
        for client in CLIENTS:
            client.send(WSMsgType.TEXT, payload)


class Downstream(WSListener):
    """A client's side."""

    def on_ws_connected(self, transport: WSTransport) -> None:
        CLIENTS.add(transport)

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        CLIENTS.discard(transport)


async def relay(url: str, port: int) -> None:
    """Relay everything until the process is ended."""
    server = await ws_create_server(lambda _request: Downstream(), "127.0.0.1", port)
    await ws_connect(Upstream, url)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("port", type=int)
    options = parser.parse_args()
    uvloop.run(relay(options.url, options.port))
