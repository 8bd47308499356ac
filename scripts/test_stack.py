#!/usr/bin/env python3
"""Run the stack by a real Docker engine and test it: `make test-stack`. Leaves nothing behind.

Builds the images from the committed Dockerfile, starts docker-compose.yml, runs tests/stack, stops everything; then
builds and asks one image on the other Debian. Where no engine can be started, or its containers have no network, it
says so and ends with status 0: that is no fault of ours. From then on every failure is one. Options: --base IMAGE (of
Debian; the default is the Dockerfile's), --one-base (leave the other one out), --bare (nothing of that: `make serve` in
a bare container of each Debian), and after -- arguments for pytest.
"""

import argparse
import concurrent.futures
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
TESTS = "tests/stack/test_stack.py"  # the first of these measures the time from nothing to an answer
TESTS_OF_IMAGES = ("tests/stack/test_images.py", "tests/stack/test_configuration.py")
TESTS_OF_THE_OTHER_BASE = "tests/stack/test_other_base.py"
TESTS_OF_BARE = "tests/stack/test_bare.py"
BASE = next(iter(base_images.PYTHONS))
PYTHON = os.path.join(environment.VENV, "bin", "python")
COMPOSE = os.path.join(environment.VENV, "bin", "docker-compose")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PROJECT = "glimpse-test"  # of Compose: a stack that an operator started on this machine is left alone
# What a container of ours needs from the engine, the kernel and the network, in one command.
PROBE = (
    "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--memory", "256m", "--pids-limit", "128", "--user", "10001",
)  # fmt: skip
DOWNLOAD = "python3 -m venv /tmp/venv && /tmp/venv/bin/python -m pip download -q --no-cache-dir --no-deps -d /tmp wheel"
REACH_S = 15  # until one package index must have answered


class Phases:
    """Seconds since the beginning at which each phase ended, printed as it ends."""

    def __init__(self):
        self.began = time.monotonic()
        self._last = self.began

    def ended(self, what):
        now = time.monotonic()
        print(f"  {what}: {now - self._last:.0f} s, {now - self.began:.0f} s in all", flush=True)
        self._last = now


def main():
    given, for_pytest = arguments()
    for number in SIGNALS:
        signal.signal(number, end)
    phases = Phases()
    engine = Engine()
    try:
        # In this order: without an engine, what the threads still build ends at once.
        with concurrent.futures.ThreadPoolExecutor(2) as threads, engine:
            phases.ended("the engine")
            if given.bare:
                status = run_bare(engine, for_pytest, phases)
            else:
                status = run(engine, given, for_pytest, phases, threads)
    except NoEngine as exc:
        skipped("MAKE SERVE ON A BARE DEBIAN" if given.bare else "THE STACK", str(exc))
        return 0
    finally:
        engine.remove_files()  # once more: a thread may have written until now
    phases.ended("the engine's end")
    left = engine.left_over()
    if left:
        print("The engine left behind:\n  " + "\n  ".join(left), flush=True)
    return status or int(bool(left))


def end(*_):
    """End, and let the engine's context remove everything: that takes seconds, and no second signal may stop it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def arguments():
    own, rest = split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=base_images.PYTHONS, default=BASE)
    parser.add_argument("--one-base", action="store_true")
    parser.add_argument("--bare", action="store_true")
    return parser.parse_args(own), rest


def run(engine, given, for_pytest, phases, threads):
    """Build everything, run the tests -> an exit status. Raises NoEngine, subprocess.CalledProcessError."""
    print(f"Docker engine {engine.said('version', '--format', '{{.Server.Version}}')} at {engine.address}", flush=True)
    wanted = services()
    tools = threads.submit(environment.install, PYTHON, "the tests' tools", ["--no-deps", *environment.pins("stack")])
    stand_ins = provide(engine, given.base, wanted)
    tools.result()
    phases.ended("the base's stand-in and the tests' tools" if stand_ins else "pulling")
    probe(engine, given.base)
    jobs = [threads.submit(base_images.make_services, engine, given.base, wanted)] if stand_ins else []
    jobs += [threads.submit(build, engine, given.base, target, "latest") for target in TARGETS]
    for job in jobs:
        job.result()
    phases.ended("building the images")
    told = {
        "DOCKER_HOST": engine.address,
        "COMPOSE_PROJECT_NAME": PROJECT,
        "STACK_BASE": given.base,
        "STACK_BEGAN": str(time.time() - (time.monotonic() - phases.began)),
    }
    if given.one_base or for_pytest:
        return run_tests(engine, [TESTS, *TESTS_OF_IMAGES], told, for_pytest)
    status = run_tests(engine, [TESTS], told)
    phases.ended("the tests of the stack")
    (other,) = (base for base in base_images.PYTHONS if base != given.base)
    built = threads.submit(build_other, engine, other)  # the tests of images wait more than they work
    status = run_tests(engine, TESTS_OF_IMAGES, told) or status
    try:
        built.result()
    except NoEngine as exc:
        skipped("THE OTHER BASE", str(exc))
        return status
    phases.ended("the tests of images, beside the other base and one image on it")
    status = run_tests(engine, [TESTS_OF_THE_OTHER_BASE], {**told, "STACK_OTHER_BASE": other}) or status
    phases.ended("the test of the other base")
    return status


def run_bare(engine, for_pytest, phases):
    """Serve in a container with what the README asks for, and nothing else -> an exit status. Raises NoEngine."""
    if not engine.is_ours:
        print("  the images glimpse/bare stay in the engine that runs here", flush=True)
    try:
        first, *others = base_images.PYTHONS
        images = [base_images.make_bare(engine, first)]
        phases.ended("a bare Debian")
        probe(engine, images[0], reach(*base_images.INDEXES))
        images += [base_images.make_bare(engine, base) for base in others]
    except base_images.NoImages as exc:
        raise NoEngine(str(exc)) from exc
    phases.ended("all bare Debians")
    told = {"DOCKER_HOST": engine.address, "STACK_BASE": BASE, "STACK_BARE": " ".join(images)}
    try:
        return run_tests(engine, [TESTS_OF_BARE], told, for_pytest)
    finally:
        phases.ended("make serve on each of them")


def build_other(engine, base):
    provide(engine, base, {})
    build(engine, base, TARGETS[-1], "other-base")


def run_tests(engine, files, told, for_pytest=()):
    """Run the tests, and those that failed once more, on a stack of their own -> pytest's exit status."""
    command = [
        PYTHON,
        "-m",
        "tests.support.again",
        "-m",
        "stack",
        "-v",
        "--durations=8",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    try:
        return subprocess.run(
            [*command, *for_pytest], cwd=machine.ROOT, env={**os.environ, **told}, check=False
        ).returncode
    finally:
        remove_stack(engine)


def split(words):
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def services():
    """{image's name: its reference} of the default services that are not ours, as docker-compose.yml names them."""
    listing = subprocess.run(
        [COMPOSE, "--env-file", os.devnull, "config", "--format", "json"],
        cwd=machine.ROOT, env={**os.environ, "REDIS_PASSWORD": "x"}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    images = [service["image"] for service in json.loads(listing.stdout)["services"].values()]
    return {image.rpartition(":")[0]: image for image in images if not image.startswith("glimpse/")}


def provide(engine, base, others):
    """Pull these images, or make a stand-in for the base -> whether it is one. Raises NoEngine.

    `others` are those of services, {image's name: its reference}.
    """
    try:
        if base_images.registry_answers():
            base_images.pull(engine, [base, *others.values()])
            return False
    except base_images.NoImages as exc:
        print(f"  {exc}", flush=True)
    if not engine.is_ours:
        raise NoEngine("the engine that runs here cannot pull images, and its images are not ours to replace")
    print(f"  no registry of images can be reached: making a stand-in for {base}", flush=True)
    try:
        base_images.make_base(engine, base)
    except base_images.NoImages as exc:
        raise NoEngine(str(exc)) from exc
    return True


def reach(*urls):
    """The shell's command that fails, soon, unless every index answers."""
    asked = f'[r.urlopen(url, timeout={REACH_S}) for url in "{" ".join(urls)}".split()]'
    return f"python3 -c 'import urllib.request as r; {asked}'"


def probe(engine, base, download=DOWNLOAD):
    """Check what no code of ours can change. Raises NoEngine."""
    for what, command in (
        ("it cannot run a container as ours are run", ("python3", "-c", "print('ok')")),
        ("its containers do not reach the package indexes", ("sh", "-c", download)),
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


def skipped(what, reason):
    """Loud: nobody shall take a skipped test for a passed one."""
    line = "=" * 100
    print(f"\n{line}\n{what} WAS NOT TESTED: {reason}\n{line}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
