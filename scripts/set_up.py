#!/usr/bin/env python3
"""Make .venv ready once: `python3 scripts/set_up.py serve|build|bench|develop`.

Runs on any Python 3, so that one which is too old can say so. Needs nothing installed. As root, or with a sudo that
asks no password, it installs the system's packages too. A second run with nothing changed does nothing.
"""

import hashlib
import os
import shutil
import sys
import time

import environment
import machine
import npm_packages
import system_packages

CONSTRAINTS = "constraints.txt"  # the versions that the tests ran with
# What each goal installs, the smaller ones first: a later one includes the earlier ones.
GOALS = {
    "serve": ("serve,draw", "the gateway and ONNX Runtime"),
    "build": ("serve,draw,build", "the exporter, the gateway and ONNX Runtime"),
    "bench": ("serve,draw,build,bench", "the exporter, the gateway and the servers it is measured beside"),
    "develop": ("serve,draw,build,bench,dev", "the exporter, the gateway, the tests and the linters"),
}


def needed_packages():
    """{package: what it is for} that nothing works without and that this machine lacks."""
    needed = {}
    if not machine.has_libpython():
        needed[f"libpython{machine.PYTHON}"] = f"Triton runs Python models with {machine.LIBPYTHON}"
    if not machine.has_ensurepip():
        needed[f"python{machine.PYTHON}-venv"] = "it makes .venv"
    return needed


def packages_for_tests():
    """{package: what it is for} that this machine lacks and that some tests need."""
    needed = {}
    if not has_redis():
        needed["redis-server"] = "the tests run one"
    if shutil.which("promtool") is None:
        needed["prometheus"] = "the tests check metrics with its promtool"
    if shutil.which("amtool") is None:
        needed["prometheus-alertmanager"] = "the tests check its configuration with its amtool"
    if shutil.which("curl") is None:
        needed["curl"] = "the tests ask the service with it"
    if shutil.which("node") is None:
        needed["nodejs"] = "the tests ask the service with its fetch"
    if shutil.which("chromium") is None:
        needed["chromium"] = "the tests open the service's page in it"
    return needed


def install_system_packages(needed, for_tests, user_id):
    """What pip cannot install. Exit if one of the needed packages cannot be installed."""
    wanted = {**needed, **for_tests}
    if not wanted:
        return
    try:
        system_packages.install(wanted, user_id)
    except system_packages.NotInstalled as exc:
        if needed:
            machine.stop(f"{', '.join(wanted)}: not installed, and {exc.fault}.", exc.remedy)
        print(f"  without {', '.join(for_tests)}: {exc.fault}. {exc.remedy}", flush=True)


def has_redis():
    return bool(shutil.which("redis-server")) or os.path.exists(environment.REDIS)


def digest():
    """Of everything that decides what .venv holds."""
    found = hashlib.sha256((sys.version + machine.ROOT).encode())
    for name in (
        "pyproject.toml",
        CONSTRAINTS,
        "scripts/environment.py",
        "scripts/npm_packages.py",
        "scripts/set_up.py",
    ):
        with open(os.path.join(machine.ROOT, name), "rb") as source:
            found.update(source.read())
    return found.hexdigest()


def is_ready(goal, wanted):
    """Whether .venv was made ready for this goal or one that includes it."""
    goals = list(GOALS)
    for each in goals[goals.index(goal) :]:
        if os.path.exists(mark(each)):
            with open(mark(each), encoding="ascii") as done:
                if done.read() == wanted:
                    return True
    return False


def mark(goal):
    return os.path.join(environment.VENV, ".ready-to-" + goal)


def fill_venv(goal):
    """Create .venv and install everything that the goal needs."""
    python = environment.make_venv()
    extras, what = GOALS[goal]
    if goal != "serve":
        environment.install_torch(python)
    environment.install(python, what, ["-c", CONSTRAINTS, "-e", ".[" + extras + "]"])
    # Only the tritonserver binary inside this wheel is used; its Python dependencies (numpy < 2) are not wanted.
    environment.install(python, "the bundled Triton server", ["--no-deps", *environment.pins("triton")])
    if goal == "develop":
        environment.install(python, "parsers of tools that need a GPU", ["--no-deps", *environment.pins("parsers")])
        npm_packages.install_all()


def main():
    goal = sys.argv[1] if len(sys.argv) == 2 else ""
    if goal not in GOALS:
        sys.exit(__doc__)
    machine.use_a_fitting_python()
    machine.check_platform()
    install_system_packages(needed_packages(), packages_for_tests() if goal == "develop" else {}, os.geteuid())
    wanted = digest()
    if not is_ready(goal, wanted):
        started = time.time()
        print(f"Setting up Glimpse to {goal} (once)", flush=True)
        fill_venv(goal)
        with open(mark(goal), "w", encoding="ascii") as done:
            done.write(wanted)
        print(f"Set up in {time.time() - started:.0f} s", flush=True)
    if goal in ("bench", "develop") and not has_redis():
        python = environment.make_venv()
        if not environment.install_redis(python):
            print(f"  without a Redis server: pip could not install one, see {environment.LOG}", flush=True)


if __name__ == "__main__":
    main()
