#!/usr/bin/env python3
"""Makes .venv ready once: `python3 scripts/set_up.py serve|build|bench|develop`.

Runs on any Python 3, so that one which is too old can say so. Needs nothing installed. A second run with nothing
changed does nothing.
"""

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
LOG = os.path.join(VENV, "set-up.log")
OLDEST, NEWEST = (3, 11), (3, 13)
GLIBC = (2, 35)
# Only the tritonserver binary inside this wheel is used; its Python dependencies (numpy < 2 among them) are not wanted.
TRITON = "nvidia-pytriton==0.7.0"
# Of these the tests use the parsers of command lines only, not what they need to run.
PARSERS = ("polygraphy==0.53.6", "nvidia-modelopt==0.47.0")
CONSTRAINTS = "constraints.txt"  # the versions that the tests ran with
# What each goal installs, the smaller ones first: who has a later one has the earlier ones too.
GOALS = {
    "serve": ("serve,draw", "the gateway and ONNX Runtime"),
    "build": ("serve,draw,build", "PyTorch, the exporter, the gateway and ONNX Runtime"),
    "bench": ("serve,draw,build,bench", "PyTorch, the exporter, the gateway and the servers it is measured beside"),
    "develop": ("serve,draw,build,bench,dev", "PyTorch, the exporter, the gateway, the tests and the linters"),
}


def stop(fault, mend):
    """Says what is missing and the command that mends it, and ends."""
    sys.exit(f"\nCannot set up Glimpse: {fault}\n  {mend}\n")


def use_a_fitting_python():
    """Starts again under a Python between OLDEST and NEWEST where this one is not."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        return
    for minor in range(NEWEST[1], OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found and subprocess.call([found, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            os.execv(found, [found, *sys.argv])
    stop(
        f"it needs Python 3.{OLDEST[1]} to 3.{NEWEST[1]}, and python3 is {platform.python_version()}.",
        "Debian 12, Ubuntu 24.04: sudo apt-get install python3 python3-venv   (or: uv python install 3.12)",
    )


def check_machine():
    """Linux on x86-64 with a glibc and a libpython that the bundled Triton can use."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        stop(
            f"the bundled Triton server runs on Linux x86-64, and this is {platform.system()} {platform.machine()}.",
            "Serve from a Linux x86-64 machine, WSL 2 or container, or point GLIMPSE_VISION_URL and GLIMPSE_LLM_URL "
            "at a Triton elsewhere.",
        )
    version = tuple(int(part) for part in os.confstr("CS_GNU_LIBC_VERSION").split()[1].split("."))
    if version < GLIBC:
        stop(
            "the bundled Triton server needs glibc 2.35 or newer, and this is {}.{}.".format(*version),
            "Use Debian 12, Ubuntu 22.04, Fedora 36 or newer.",
        )
    name = "libpython{}.{}.so.1.0".format(*sys.version_info)
    beside = os.path.join(sysconfig.get_config_var("LIBDIR") or "", name)
    cache = subprocess.run(["/sbin/ldconfig", "-p"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if not os.path.exists(beside) and name.encode() not in cache.stdout:
        stop(
            f"{name} is missing; Triton runs Python models with it.",
            "Debian, Ubuntu: sudo apt-get install libpython{}.{}".format(*sys.version_info),
        )


def check_tests_need():
    """What the tests run for real and pip cannot install."""
    for program, package in (("redis-server", "redis-server"), ("promtool", "prometheus")):
        if shutil.which(program) is None:
            stop(program + " is missing; the tests run a real one.", "Debian, Ubuntu: sudo apt-get install " + package)


def make_venv():
    """Creates .venv for this Python, replacing one of another version."""
    python = os.path.join(VENV, "bin", "python")
    version = "{}.{}".format(*sys.version_info)
    if os.path.exists(python):  # not where its Python is gone
        said = subprocess.run(
            [python, "-c", "import pip, sys; print('%d.%d' % sys.version_info[:2])"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False,
        ).stdout.decode().strip()  # fmt: skip
        if said == version:
            return python
    shutil.rmtree(VENV, ignore_errors=True)
    print("  making .venv with Python " + platform.python_version(), flush=True)
    command = [sys.executable, "-m", "venv", VENV]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        stop(
            "python3 cannot make a virtual environment: " + done.stdout.decode().strip().splitlines()[-1],
            "Debian, Ubuntu: sudo apt-get install python{}.{}-venv".format(*sys.version_info),
        )
    return python


def install(python, what, arguments):
    """pip install, one line a download on the screen, everything in the log."""
    print(f"  installing {what}", flush=True)
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments]
    with open(LOG, "a", encoding="utf-8") as log:
        log.write("$ {}\n".format(" ".join(command)))
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True
        )
        for line in process.stdout:
            log.write(line)
            if line.strip().startswith(("Downloading ", "Installing collected", "Building ")):
                print("    " + line.strip()[:100], flush=True)
    if process.wait():
        with open(LOG, encoding="utf-8") as log:
            errors = [line for line in log.read().splitlines() if "WARNING" not in line][-15:]
        stop("pip could not install {}.\n\n{}\n".format(what, "\n".join(errors)), "The whole log: " + LOG)


def main():
    goal = sys.argv[1] if len(sys.argv) == 2 else ""
    if goal not in GOALS:
        sys.exit(__doc__)
    use_a_fitting_python()
    check_machine()
    if goal == "develop":
        check_tests_need()
    digest = hashlib.sha256((sys.version + ROOT).encode())
    for name in ("pyproject.toml", CONSTRAINTS, os.path.abspath(__file__)):
        with open(os.path.join(ROOT, name), "rb") as source:
            digest.update(source.read())
    wanted = digest.hexdigest()
    goals = list(GOALS)
    marks = [os.path.join(VENV, ".ready-to-" + each) for each in goals[goals.index(goal) :]]
    for mark in marks:
        if os.path.exists(mark):
            with open(mark, encoding="ascii") as done:
                if done.read() == wanted:
                    return
    started = time.time()
    print(f"Setting up Glimpse to {goal} (once)", flush=True)
    python = make_venv()
    extras, what = GOALS[goal]
    install(python, what, ["-c", CONSTRAINTS, "-e", ".[" + extras + "]"])
    install(python, "the bundled Triton server", ["--no-deps", TRITON])
    if goal == "develop":
        install(python, "parsers of tools that need a GPU", ["--no-deps", *PARSERS])
    with open(marks[0], "w", encoding="ascii") as mark:
        mark.write(wanted)
    print(f"Set up in {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
