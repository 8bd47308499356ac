"""What the embedded Triton says when it cannot start."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from service.system.heap import TRITON
from service.triton_server import installation
from service.triton_server.access import Ports
from service.triton_server.installation import (
    Installation,
    StartFailed,
    check_libraries,
    check_platform,
    check_ports,
    check_repository,
    check_shared_memory,
)
from tests.support.servers import free_ports


@pytest.mark.parametrize(
    ("system", "machine", "libc", "said"),
    [
        ("darwin", "arm64", ("", ""), "Linux x86-64, this is darwin arm64"),
        ("linux", "aarch64", ("glibc", "2.36"), "this is linux aarch64"),
        ("linux", "x86_64", ("glibc", "2.31"), "glibc 2.35 or newer, this is glibc 2.31"),
        ("linux", "x86_64", ("", ""), "another libc"),
    ],
)
def test_another_platform_is_named(system: str, machine: str, libc: tuple[str, str], said: str) -> None:
    with pytest.raises(StartFailed, match=said):
        check_platform(system, machine, libc)


def test_missing_libpython_is_named_with_its_package() -> None:
    """The wheel has stubs for other Pythons: without their libpython on the path they show what ours would."""
    found = Installation.find()
    stub = found.stub.parent.parent / "3.8" / found.stub.name
    with pytest.raises(StartFailed, match=r"libpython3\.8\.so.* apt-get install libpython3"):
        check_libraries(replace(found, stub=stub, library_path=""))
    check_libraries(found)


def test_a_program_whose_libraries_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Installation.find()
    with pytest.raises(StartFailed, match=r"the libraries of .*none cannot be listed \(.*No such file"):
        check_libraries(replace(found, server=tmp_path / "none"))
    monkeypatch.setattr(installation, "LISTED_WITHIN_S", 0.0)
    with pytest.raises(StartFailed, match=r"the libraries of .*tritonserver cannot be listed \(.*timed out"):
        check_libraries(found)


def libpythons(installation: Installation) -> list[str]:
    """Where the loader finds each libpython of the stub, in the order in which the stub takes symbols from them."""
    environment = {**installation.environment(), "LD_TRACE_LOADED_OBJECTS": "1"}
    listing = subprocess.run([installation.stub], env=environment, capture_output=True, text=True, check=True).stdout
    return [line.split()[2] for line in listing.splitlines() if "libpython" in line]


def test_models_run_in_this_pythons_library_though_the_wheel_bundles_another() -> None:
    """The wheel's stub for 3.13 links a libpython of the wheel's. Listing runs nothing, so any Python can list it."""
    found = Installation.find()
    assert ".libs/" not in libpythons(found)[0]
    assert found.preload == ("" if sys.version_info < (3, 13) else "libpython3.13.so.1.0")
    stub = found.stub.parent.parent / "3.13" / found.stub.name
    assert ".libs/" in libpythons(replace(found, stub=stub, preload=""))[0]
    own = "libpython{}.{}.so.1.0".format(*sys.version_info)
    cured = replace(found, stub=stub, preload=own)
    assert libpythons(cured)[0].endswith(own)
    check_libraries(cured)


def test_a_missing_library_of_this_python_is_named_though_the_wheel_bundles_one() -> None:
    found = Installation.find()
    stub = found.stub.parent.parent / "3.13" / found.stub.name
    with pytest.raises(StartFailed, match=r"libpython3\.99\.so.* apt-get install libpython3"):
        check_libraries(replace(found, stub=stub, preload="libpython3.99.so.1.0"))


def test_a_taken_port_is_named_with_its_setting() -> None:
    grpc, metrics = free_ports(2)
    check_ports(Ports(grpc, metrics))
    with (
        socket.create_server(("127.0.0.1", grpc)),
        pytest.raises(StartFailed, match=f"{grpc} .*GLIMPSE_TRITON_GRPC_PORT"),
    ):
        check_ports(Ports(grpc, metrics))


def test_a_folder_without_models_is_named(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(StartFailed, match=r"lacks card\.json.*GLIMPSE_MODEL_REPOSITORY"):
        check_repository(tmp_path)
    check_repository(repository)


def test_shared_memory_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    check_shared_memory(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(StartFailed, match=r"nothing can be written in .*none.*No such file.*--shm-size=64m"):
        check_shared_memory(tmp_path / "none")


def test_a_port_is_tried_on_its_own_host() -> None:
    check_ports(Ports(*free_ports(2), host="127.0.0.1"))
    with pytest.raises(StartFailed, match=r"cannot listen on 192\.0\.2\.1:\d+"):
        check_ports(Ports(*free_ports(2), host="192.0.2.1"))


def test_a_host_of_ipv6_where_there_is_none_is_told(without_ipv6: None) -> None:
    with pytest.raises(StartFailed, match=r"cannot listen on ::1:\d+ \(Address family not supported"):
        check_ports(Ports(*free_ports(2), host="::1"))


def test_tritons_processes_give_large_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    assert Installation.find().environment().items() >= TRITON.environment().items()
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "123456")
    assert Installation.find().environment()["MALLOC_MMAP_THRESHOLD_"] == "123456"
