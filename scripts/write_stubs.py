#!/usr/bin/env python3
"""Write the gRPC stubs in service/edges/grpc/stubs from the proto: `make proto`. Needs grpcio-tools."""

import sys
import tempfile
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "service" / "edges" / "grpc" / "proto"
STUBS = ROOT / "service" / "edges" / "grpc" / "stubs"
WELL_KNOWN = Path(grpc_tools.__file__).parent / "_proto"  # google/protobuf/*.proto


def stubs() -> dict[str, str]:
    """Return the text of each stub by its file's name."""
    sources = [str(path.relative_to(PROTO)) for path in sorted(PROTO.rglob("*.proto"))]
    with tempfile.TemporaryDirectory() as folder:
        out = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        status = protoc.main(["protoc", f"-I{PROTO}", f"-I{WELL_KNOWN}", *out, *sources])
        if status:
            sys.exit(status)
        written = sorted(path for path in Path(folder).rglob("*.py*"))
        return {path.name: placed(path.read_text()) for path in written}


def placed(text: str) -> str:
    """protoc imports stubs by the path of their proto; ours lie in another package."""
    return text.replace("from glimpse.v1 import ", "from service.edges.grpc.stubs import ")


def main() -> None:
    for name, text in stubs().items():
        (STUBS / name).write_text(text)


if __name__ == "__main__":
    main()
