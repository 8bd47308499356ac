"""Read numbers at an offset of bytes that may end too early."""

from __future__ import annotations

import struct


def unpack(layout: str, data: bytes | memoryview, offset: int) -> tuple[int, ...]:
    """Unpack at an offset; zeros if the bytes end too early. `layout` begins with its byte order."""
    if offset < 0 or len(data) < offset + struct.calcsize(layout):
        return (0,) * len(layout[1:])
    return struct.unpack_from(layout, data, offset)
