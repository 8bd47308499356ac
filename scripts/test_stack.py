#!/usr/bin/env python3
"""Run the stack by a real Docker engine and test it: `make test-stack`. Leaves nothing behind.

Builds the images from the committed Dockerfile, starts docker-compose.yml, runs tests/stack, stops everything. Where no
engine can be started, or its containers have no network, it says so and ends with status 0: that is no fault of ours.
From then on every failure is one. Options: --base IMAGE (of Debian; the default is the Dockerfile's), --both (build and
ask the other base too), and after -- arguments for pytest.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import base_images
import environment
import machine
from docker_engine import Engine, NoEngine

TARGETS = ("gateway", "triton-cpu", "all-in-one")
BASE, OTHER_BASE = base_images.PYTHONS
COMPOSE = os.path.join(environment.VENV, "bin", "docker-compose")
PROJECT = "glimpse-test"  # of Compose: a stack that an operator started on this machine is left alone
# What a container of ours needs from the engine, the kernel and the network, in one command.
PROBE = (
    "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--memory", "256m", "--pids-limit", "128", "--user", "10001",
)  # fmt: skip
DOWNLOAD = "python3 -m venv /tmp/venv && /tmp/venv/bin/python -m pip download -q --no-cache-dir --no-deps -d /tmp wheel"


def main():
    given, for_pytest = arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that the engine's context ends
    started = time.monotonic()
    engine = Engine()
    try:
        with engine:
            status = run(engine, given, for_pytest, started)
    except NoEngine as exc:
        skipped(str(exc))
        status = 0
    left = engine.left_over()
    if left:
        print("The engine left behind:\n  " + "\n  ".join(left), flush=True)
        status = status or 1
    return status


def arguments():
    own, rest = split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=base_images.PYTHONS, default=BASE)
    parser.add_argument("--both", action="store_true")
    return parser.parse_args(own), rest


def run(engine, given, for_pytest, started):
    """Build everything, then run the tests -> pytest's exit status. Raises NoEngine."""
    times = {"engine": time.monotonic() - started}
    bases = [given.base] + [base for base in base_images.PYTHONS if given.both and base != given.base]
    print(f"Docker engine {engine.said('version', '--format', '{{.Server.Version}}')} at {engine.address}", flush=True)
    python = os.path.join(environment.VENV, "bin", "python")
    environment.install(python, "the tests' tools", ["--no-deps", *environment.pins("stack")])
    stand_ins = provide(engine, bases)
    probe(engine, given.base)
    times["images of others"] = time.monotonic() - started
    for base in bases:
        for target in TARGETS if base == given.base else TARGETS[-1:]:
            build(engine, base, target, tag(base, given.base))
    times["images"] = time.monotonic() - started
    print("  ".join(f"{what}: {seconds:.0f} s" for what, seconds in times.items()), flush=True)
    told = {
        "DOCKER_HOST": engine.address,
        "COMPOSE_PROJECT_NAME": PROJECT,
        "STACK_BASE": given.base,
        "STACK_OTHER_BASE": bases[-1] if given.both else "",
        "STACK_STAND_INS": str(int(stand_ins)),
        "STACK_BEGAN": str(time.time() - (time.monotonic() - started)),
    }
    command = [os.path.join(environment.VENV, "bin", "python"), "-m", "pytest", "-m", "stack", "-v", "tests/stack"]
    try:
        done = subprocess.run([*command, *for_pytest], cwd=machine.ROOT, env={**os.environ, **told}, check=False)
    finally:
        remove_stack(engine)
    print(f"the whole stack's test: {time.monotonic() - started:.0f} s", flush=True)
    return done.returncode


def split(words):
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def tag(base, default):
    return "latest" if base == default else base.rpartition("-")[2]


def services():
    """{image's name: its reference} of the default services that are not ours, as docker-compose.yml names them."""
    listing = subprocess.run(
        [COMPOSE, "--env-file", os.devnull, "config", "--format", "json"],
        cwd=machine.ROOT, env={**os.environ, "REDIS_PASSWORD": "x"}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    images = [service["image"] for service in json.loads(listing.stdout)["services"].values()]
    return {image.rpartition(":")[0]: image for image in images if not image.startswith("glimpse/")}


def provide(engine, bases):
    """Pull the images that are not ours, or make stand-ins -> whether they are stand-ins. Raises NoEngine."""
    wanted = services()
    try:
        if base_images.registry_answers():
            print("pulling the base images", flush=True)
            base_images.pull(engine, [*bases, *wanted.values()])
            return False
    except base_images.NoImages as exc:
        print(f"  {exc}", flush=True)
    if not engine.is_ours:
        raise NoEngine("the engine that runs here cannot pull images, and its images are not ours to replace")
    print("no registry of images can be reached: making stand-ins of Debian's packages", flush=True)
    try:
        base_images.make(engine, bases, wanted)
    except base_images.NoImages as exc:
        raise NoEngine(str(exc)) from exc
    return True


def probe(engine, base):
    """Check what no code of ours can change. Raises NoEngine."""
    for what, command in (
        ("it cannot run a container as ours are run", ("python3", "-c", "print('ok')")),
        ("its containers do not reach the package index", ("sh", "-c", DOWNLOAD)),
    ):
        try:
            engine.docker(*PROBE, base, *command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60)
        except subprocess.CalledProcessError as exc:
            raise NoEngine(f"{what}: {' | '.join(exc.stderr.strip().splitlines()[-2:])}") from exc
        except subprocess.TimeoutExpired as exc:
            raise NoEngine(f"{what} within 60 s") from exc


def build(engine, base, target, image_tag):
    began = time.monotonic()
    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=machine.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    engine.docker(
        "build", "--quiet", "--build-arg", f"BASE={base}", "--build-arg", f"REVISION={revision or 'unknown'}",
        "--target", target, "--tag", f"glimpse/{target}:{image_tag}", ".",
        cwd=machine.ROOT, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"  built {target} on {base} in {time.monotonic() - began:.0f} s", flush=True)


def remove_stack(engine):
    """Remove what the tests left of the stack, for example because they were killed."""
    label = f"label=com.docker.compose.project={PROJECT}"
    for listing, removal in (
        (("ps", "--all"), ("rm", "--force", "--volumes")),
        (("network", "ls"), ("network", "rm")),
        (("volume", "ls"), ("volume", "rm")),
    ):
        found = engine.said(*listing, "--quiet", "--filter", label).split()
        if found:
            engine.docker(*removal, *found, stdout=subprocess.DEVNULL)


def skipped(reason):
    """Loud: nobody shall take a skipped test for a passed one."""
    line = "=" * 100
    print(f"\n{line}\nTHE STACK WAS NOT TESTED: {reason}\n{line}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
