KINDS: tuple[str, ...]
COMBINED: int
MICRO: int

def reframe(kind: int, data: bytes, name: bytes, mode: int, path: str = "auto") -> bytes: ...
