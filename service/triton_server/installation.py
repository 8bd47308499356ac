"""Find the bundled Triton, and check before its start everything that could make it fail or hang."""

from __future__ import annotations

import errno
import importlib.util
import os
import platform
import socket
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

from service.system.heap import TRITON
from service.triton_server.access import SHARED_MEMORY, Ports

LISTED_WITHIN_S = 30.0  # a program's libraries, which takes milliseconds


class StartFailed(Exception):
    """Triton cannot start here. The message names the cause and the remedy."""


@dataclass(frozen=True, slots=True)
class Installation:
    """Hold the paths of the nvidia-pytriton wheel, and the libraries that its programs load."""

    server: Path
    stub: Path
    backend: Path  # the python backend's folder
    library_path: str
    preload: str = ""  # a library to load before the others, by its name in `library_path` or the loader's cache

    @classmethod
    def find(cls) -> Installation:
        """Find the wheel. Raises StartFailed if it is missing or does not support this Python."""
        spec = importlib.util.find_spec("pytriton")
        if spec is None or spec.origin is None:
            raise StartFailed(
                "the Triton server is not installed: `make serve` in Glimpse's folder installs it. Or name one "
                "that runs elsewhere with GLIMPSE_VISION_URL and GLIMPSE_LLM_URL"
            )
        package = Path(spec.origin).parent
        root = package / "tritonserver"
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / python / "triton_python_backend_stub"
        if not stub.is_file():
            raise StartFailed(f"nvidia-pytriton has no stub for Python {python}: use Python 3.11 to 3.13")
        bundled = package.parent / "nvidia_pytriton.libs"
        libraries = (
            sysconfig.get_config_var("LIBDIR"),
            f"{sys.base_prefix}/lib",
            str(bundled),
            os.environ.get("LD_LIBRARY_PATH"),
        )
        # The wheel's stub for 3.13 links the wheel's own libpython through its RPATH. With another build of 3.13 every
        # model then fails with "PyCapsule_Import could not import module datetime". So this Python's library is loaded
        # first, and the stub uses it.
        bundles_libpython = any(bundled.glob(f"libpython{sys.version_info.major}-*.{sys.version_info.minor}.so*"))
        return cls(
            server=root / "bin" / "tritonserver",
            stub=stub,
            backend=root / "backends" / "python",
            library_path=":".join(dict.fromkeys(path for path in libraries if path)),
            preload=f"libpython{python}.so.1.0" if bundles_libpython else "",
        )

    def link_backend(self, folder: Path) -> None:
        """Make a backends directory with the stub of this Python. site-packages is not changed."""
        python = folder / "python"
        python.mkdir(parents=True)
        for file in (self.backend / "libtriton_python.so", self.backend / "triton_python_backend_utils.py", self.stub):
            (python / file.name).symlink_to(file)

    def environment(self) -> dict[str, str]:
        """Make Triton's environment. The stub embeds the first Python on PATH, so this one comes first there."""
        environment = {
            **os.environ,
            **TRITON.environment(),
            "LD_LIBRARY_PATH": self.library_path,
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}",
        }
        if self.preload:
            environment["LD_PRELOAD"] = f"{self.preload}:{os.environ.get('LD_PRELOAD', '')}"
        return environment


def check(repository: Path, ports: Ports) -> Installation:
    """Check everything that can be checked before the start. Raises StartFailed."""
    check_platform(sys.platform, platform.machine(), platform.libc_ver())
    installation = Installation.find()
    check_libraries(installation)
    check_repository(repository)
    check_shared_memory(SHARED_MEMORY)
    check_ports(ports)
    return installation


def check_platform(system: str, machine: str, libc: tuple[str, str]) -> None:
    if system != "linux" or machine != "x86_64":
        raise StartFailed(
            f"the bundled Triton runs on Linux x86-64, this is {system} {machine}: "
            "run Triton elsewhere and set GLIMPSE_VISION_URL and GLIMPSE_LLM_URL"
        )
    name, version = libc
    if name != "glibc" or tuple(int(part) for part in version.split(".")[:2]) < (2, 35):
        raise StartFailed(
            f"the bundled Triton needs glibc 2.35 or newer, this is {name or 'another libc'} {version}: "
            "use Debian 12, Ubuntu 22.04 or newer"
        )


def check_libraries(installation: Installation) -> None:
    """Ask the loader which libraries are missing, without running a program.

    Without libpython every load of a model would hang forever.
    """
    for program in (installation.server, installation.stub):
        environment = {**installation.environment(), "LD_TRACE_LOADED_OBJECTS": "1"}
        try:
            listing = subprocess.run(
                [program], env=environment, capture_output=True, text=True, check=False, timeout=LISTED_WITHIN_S
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise StartFailed(
                f"the libraries of {program} cannot be listed ({exc}): start the service again when this machine has "
                "processes, memory and open files left; if that does not help, install nvidia-pytriton again"
            ) from exc
        missing = sorted(line.split()[0] for line in listing.stdout.splitlines() if "not found" in line)
        if installation.preload not in listing.stdout:
            missing.append(installation.preload)
        if any(name.startswith("libpython") for name in missing):
            python = f"python{sys.version_info.major}.{sys.version_info.minor}"
            raise StartFailed(
                f"{', '.join(missing)} was not found, Triton's models need it: run `sudo apt-get install lib{python}` "
                "(or use a Python built with --enable-shared)"
            )
        if missing:
            raise StartFailed(f"{program.name} does not find its libraries {', '.join(missing)}: install them")


def check_repository(repository: Path) -> None:
    absent = [
        name for name in ("card.json", "see/config.pbtxt", "llm/config.pbtxt") if not (repository / name).exists()
    ]
    if absent:
        raise StartFailed(
            f"{repository} is not a model repository, it lacks {', '.join(absent)}: "
            "set GLIMPSE_MODEL_REPOSITORY to a folder that `glimpse build` wrote"
        )


def check_shared_memory(folder: Path) -> None:
    """Triton and its models exchange tensors there; without it Triton ends with a trace of its own."""
    try:
        descriptor, path = tempfile.mkstemp(dir=folder, prefix="glimpse-")
        os.close(descriptor)
        os.unlink(path)
    except OSError as exc:
        raise StartFailed(
            f"nothing can be written in {folder}, the shared memory of Triton's models ({exc.strerror}): mount a tmpfs "
            "of at least 64 MB there (docker run --shm-size=64m; in Kubernetes an emptyDir with medium Memory)"
        ) from exc


def check_ports(ports: Ports) -> None:
    for name, port in (("GRPC", ports.grpc), ("METRICS", ports.metrics)):
        if port is None:
            continue
        try:
            with socket.socket(socket.AF_INET6 if ":" in ports.host else socket.AF_INET) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((ports.host, port))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise StartFailed(
                    f"Triton cannot listen on {ports.host}:{port} ({exc.strerror}): choose another address or port"
                ) from exc
            raise StartFailed(
                f"port {port} is taken: stop the program that uses it (`ss -ltnp 'sport = :{port}'` shows it) "
                f"or set GLIMPSE_TRITON_{name}_PORT"
            ) from exc
