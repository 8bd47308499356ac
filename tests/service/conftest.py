from __future__ import annotations

import errno
import os
import socket

import pytest


@pytest.fixture
def without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse sockets of IPv6, as a kernel with ipv6.disable=1 does."""

    class OfIpv4(socket.socket):
        def __init__(self, family: int = socket.AF_INET, *arguments: int, **more: int | None) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *arguments, **more)

    monkeypatch.setattr(socket, "socket", OfIpv4)
