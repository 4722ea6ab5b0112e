from typing import Any, Literal

from tradecore._symbols import SymbolTable

CAUSES: dict[int, str]

class FrameError(ValueError):
    cause: str
    head: bytes
    def __init__(self, cause: str, head: bytes) -> None: ...

def parse_event(
    payload: bytes, symbols: SymbolTable, path: Literal["auto", "fast", "slow"] = "auto"
) -> tuple[str, dict[str, Any]]: ...
def row_sizes() -> dict[str, int]: ...
