from collections.abc import Sequence

from picows import WSListener

from tradecore.capture import Capture

MAX_MESSAGE_BYTES: int

class FrameListener(WSListener):
    last_data_ns: int
    data_frames: int
    pongs: int
    def __init__(self, capture: Capture, owner: object, line: int, epoch: int) -> None: ...
    def unconfirmed(self, symbol_ids: Sequence[int]) -> list[int]: ...
    def mark(self) -> None: ...
    def left_out(self, symbol_ids: Sequence[int]) -> list[int]: ...
    def behind(self, symbol_ids: Sequence[int]) -> list[tuple[int, int, int]]: ...
