"""The processes of the embedded Triton, and the shared memory between them."""

from __future__ import annotations

from service.triton_server.processes import region_bytes


def test_regions_take_a_quarter_of_the_shared_memory_at_most() -> None:
    assert region_bytes(free=8 << 30, models=12) == 32 << 20
    assert region_bytes(free=512 << 20, models=16) == 8 << 20
    assert region_bytes(free=16 << 20, models=12) == 1 << 20  # Triton's own, which grows
