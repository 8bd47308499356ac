"""scripts/docker_engine.py and scripts/test_stack.py: what they say where no engine starts, and what they take away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from benchmarks.ports import free_ports
from tests.support.paths import PROJECT


def run(code: str, **variables: str) -> str:
    """What the code prints that runs beside the scripts."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / "scripts"), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def reason(call: str, **variables: str) -> str:
    """Why there is no engine."""
    code = f"import subprocess, docker_engine as d\ntry: {call}\nexcept d.NoEngine as e: print(e)"
    return run(code, **variables)


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_only_root_starts_an_engine() -> None:
    assert "only root can start one, and none runs" in reason("d.install_packages(1000)")


def test_what_cannot_be_installed_is_named_with_its_cause(tmp_path: Path) -> None:
    for name in ("env", "dpkg-query"):
        program(tmp_path, name, 'echo "E: Could not resolve the mirror" >&2; exit 100')
    program(tmp_path, "apt-get", "exit 100")
    said = reason("d.install_packages(0)", PATH=str(tmp_path))
    assert "docker.io, iptables, iproute2, mmdebstrap: not installed, and apt-get reached no package server" in said


def test_an_engine_that_ends_at_once_is_named_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('level=info msg="starting"\nfailed to mount overlay: operation not permitted\n')
    said = reason(f"d.wait_until_it_answers('unix:///nowhere', subprocess.Popen(['false']), {str(log)!r})")
    assert "dockerd did not start within 60 s: failed to mount overlay: operation not permitted" in said


def test_a_skip_is_loud() -> None:
    said = run("import test_stack; test_stack.skipped('THE STACK', 'no engine')")
    assert "THE STACK WAS NOT TESTED: no engine" in said
    assert "=" * 80 in said


def test_a_container_s_probe_passes_only_if_every_index_answers() -> None:
    """One address answers, one refuses, one takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent, answering() as good:
        mute = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        (closed,) = free_ports(1)
        refused = f"http://127.0.0.1:{closed}/"
        for urls, answer_s, passes in (((good,), 60, True), ((good, refused), 60, False), ((good, mute), 0.5, False)):
            code = f"import test_stack; test_stack.REACH_S = {answer_s}; print(test_stack.reach(*{urls}), end='')"
            command = run(code).replace("python3", sys.executable, 1)
            assert (subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode == 0) is passes


@contextmanager
def answering() -> Iterator[str]:
    """The address of an HTTP server of this process."""
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/LICENSE"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("rule", "is_dockers"),
    [
        ("nat -A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", True),
        ("filter :DOCKER-USER -", True),
        ("filter -A FORWARD -i br-0123456789ab -j ACCEPT", True),
        ("filter -A FORWARD -j DOCKER-USER", True),
        ("filter -A FORWARD -i br-lan -o eth0 -j ACCEPT", False),
        ('filter -A INPUT -m comment --comment "no br-0123456789ab" -j DROP', False),
        ("filter :FORWARD DROP", False),
        ("filter -A INPUT -p tcp --dport 22 -j ACCEPT", False),
        ("filter :INPUT DROP", False),
    ],
)
def test_only_dockers_rules_are_taken_away(rule: str, is_dockers: bool) -> None:
    assert run(f"import docker_engine as d; print(d.is_dockers({rule!r}))").strip() == str(is_dockers)


NOW = ["*filter", ":FORWARD DROP [3:180]", ":DOCKER - [0:0]", "-A FORWARD -i br-lan -j ACCEPT",
       "-A FORWARD -i docker0 -j ACCEPT", '-A INPUT -m comment --comment "ours alone" -j DROP', "COMMIT"]  # fmt: skip
TAKEN_AWAY = ["-t filter -D FORWARD -i docker0 -j ACCEPT", "-t filter -F DOCKER", "-t filter -X DOCKER"]


def fake_iptables(folder: Path) -> Path:
    """Programs that list NOW, and note what they are told to change -> the file of notes."""
    changes = folder / "changes"
    changes.write_text("")
    for name in ("iptables-save", "ip6tables-save"):
        program(folder, name, "/bin/cat <<'EOF'\n" + ("\n".join(NOW) if name == "iptables-save" else "") + "\nEOF")
    for name in ("iptables", "ip6tables"):
        program(folder, name, f'echo "$*" >> {changes}')
    for name in ("ip", "umount"):
        program(folder, name, "exit 0")
    program(folder, "rm", 'exec /bin/rm "$@"')
    return changes


@pytest.mark.parametrize(
    ("before", "policy"),
    [
        ([], []),
        (["filter :FORWARD DROP"], []),
        (["filter :FORWARD ACCEPT"], ["-t filter -P FORWARD ACCEPT"]),
    ],
    ids=["nothing recorded", "closed before", "open before"],
)
def test_a_firewall_is_opened_only_if_it_was_open(before: list[str], policy: list[str], tmp_path: Path) -> None:
    changes = fake_iptables(tmp_path)
    run(f"import docker_engine as d; d.restore('iptables-save', {before})", PATH=str(tmp_path))
    assert changes.read_text().splitlines() == policy + TAKEN_AWAY


RECORD = '{"rules": {"iptables-save": ["filter :FORWARD ACCEPT"]}, "interfaces": [], "forwarding": "0"}'


def killed_run(folders: Path, record: str, owner: int = 0) -> str:
    """Leave what a killed run leaves, begin another one -> the code that does so."""
    folder = folders / "glimpse-dk0"
    folder.mkdir(parents=True, mode=0o711)
    if record:
        (folder / "before.json").write_text(record)
    return (
        f"import os, docker_engine as d; d.FOLDERS = {str(folders)!r}; d.programs = set\n"
        f"d.FORWARDING, real = {str(folders.parent / 'forwarding')!r}, os.lstat\n"
        "def lstat(path):\n"
        f"    mode, *rest = real(path); rest[3] = {owner}; return os.stat_result([mode, *rest])\n"
        "os.lstat = lstat; d.remove_what_killed_runs_left(); print(os.listdir(d.FOLDERS))"
    )


@pytest.mark.parametrize(
    ("record", "owner", "left", "changed"),
    [
        (RECORD, 0, [],
         ["-t filter -P FORWARD ACCEPT", *TAKEN_AWAY]),
        ("", 0, [], []),
        ('{"rules": {"ipta', 0, [], []),
        (RECORD, 1000, ["glimpse-dk0"], []),
    ],
    ids=["recorded", "no record", "half a record", "somebody else's folder"],
)  # fmt: skip
def test_only_what_a_killed_run_recorded_is_taken_away(
    record: str, owner: int, left: list[str], changed: list[str], tmp_path: Path
) -> None:
    changes = fake_iptables(tmp_path)
    (tmp_path / "forwarding").write_text("1")
    said = run(killed_run(tmp_path / "folders", record, owner), PATH=str(tmp_path))
    assert said.strip() == str(left)
    assert changes.read_text().splitlines() == changed
    assert (tmp_path / "forwarding").read_text() == ("0" if changed else "1")


def test_what_was_there_is_recorded_for_a_later_run(tmp_path: Path) -> None:
    code = "import docker_engine as d; d.write_record({0!r}, {{'iptables-save': ['x']}}, {{'docker0'}}, '0'); "
    said = run((code + "print(d.read_record({0!r}))").format(str(tmp_path)))
    assert said.strip() == "{'rules': {'iptables-save': ['x']}, 'interfaces': ['docker0'], 'forwarding': '0'}"


def test_arguments_after_two_dashes_are_pytests() -> None:
    said = run("import test_stack as t; print(t.split(['--one-base', '--', '-k', 'x']), t.split(['--one-base']))")
    assert said.strip() == "(['--one-base'], ['-k', 'x']) (['--one-base'], [])"


def test_the_tests_programs_are_known_by_name() -> None:
    assert "python" in run("import docker_engine as d; print(d.programs())")
