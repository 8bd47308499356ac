"""How the embedded Triton is reached: by a socket that only this user can open, or by a port that was asked for."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # of Triton and its models
FOLDER = re.compile(r"glimpse-\d+-[0-9a-f]{16}")
SOCKET_BYTES = 107  # the longest path of a unix socket
SOCKET_NAME = "grpc:1"  # Triton adds its port's number to the address, of a socket too
_PLAIN = re.compile(r"/[A-Za-z0-9._/-]+")  # gRPC reads the path as a part of a URL
# What can change Triton or tell of its inside. An opened port leaves health, metadata and inference to everybody.
RESTRICTED = ("shared-memory", "model-config", "model-repository", "statistics", "trace", "logging")
KEY_NAME = "glimpse"


@dataclass(frozen=True, slots=True)
class Ports:
    """Without a port for gRPC only this user's processes reach Triton."""

    grpc: int | None = None
    metrics: int = 8002
    host: str = "127.0.0.1"  # an address of this machine; 0.0.0.0 and :: stand for all


@dataclass(frozen=True, slots=True)
class Access:
    """The address of one embedded Triton, known before it starts."""

    folder: Path  # of the socket, mode 0700; its name begins the names of the shared-memory regions
    ports: Ports
    key: str

    @classmethod
    def choose(cls, ports: Ports | None = None) -> Access:
        """Choose names that nobody can guess. Makes nothing."""
        folder = f"glimpse-{os.getpid()}-{secrets.token_hex(8)}"
        return cls(_parent(len(f"/{folder}/{SOCKET_NAME}")) / folder, ports or Ports(), secrets.token_hex(16))

    @property
    def url(self) -> str:
        """The address for a gRPC client."""
        if not self.ports.grpc:
            return f"unix:{self.folder}/{SOCKET_NAME}"
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.ports.host, self.ports.host)
        return f"[{host}]:{self.ports.grpc}" if ":" in host else f"{host}:{self.ports.grpc}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call must carry to load or unload a model."""
        return ((f"triton-grpc-protocol-{KEY_NAME}", self.key),) if self.ports.grpc else ()

    @property
    def region_prefix(self) -> str:
        return f"{self.folder.name}-"

    def options(self) -> list[str]:
        """Of tritonserver."""
        name, _, number = SOCKET_NAME.rpartition(":")
        grpc = [f"--grpc-address=unix:{self.folder}/{name}", f"--grpc-port={number}"]
        if self.ports.grpc:
            grpc = [
                f"--grpc-address={self.ports.host}",
                f"--grpc-port={self.ports.grpc}",
                f"--grpc-restricted-protocol={','.join(RESTRICTED)}:{KEY_NAME}={self.key}",
            ]
        return [
            "--allow-http=false",
            *grpc,
            f"--metrics-address={self.ports.host}",
            f"--metrics-port={self.ports.metrics}",
        ]


def parents() -> list[Path]:
    """Where folders may lie, the preferred one first."""
    try:
        preferred = [tempfile.gettempdir()]
    except FileNotFoundError:  # nothing can be written anywhere: `claim` says so
        preferred = []
    return [Path(path) for path in dict.fromkeys((*preferred, "/tmp", "/var/tmp"))]


def _parent(length: int) -> Path:
    """The first one in which a socket's path is short and plain enough."""
    fits = (path for path in parents() if len(str(path)) + length <= SOCKET_BYTES and _PLAIN.fullmatch(str(path)))
    return next(fits)
