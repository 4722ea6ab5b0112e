"""Server frames taken apart."""


def payloads(data: bytes) -> list[bytes]:
    """Return the payloads of whole unmasked text frames; fails when anything else is there."""
    found = []
    while data:
        assert data[0] == 0x81, data[:20]
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
            assert size >= 126
        elif size == 127:
            size, start = int.from_bytes(data[2:10], "big"), 10
            assert size >= 65536
        assert len(data) >= start + size
        found.append(data[start : start + size])
        data = data[start + size :]
    return found
