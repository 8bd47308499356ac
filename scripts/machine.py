"""Check what no package can change: the Python, the platform and the C library. Runs on any Python 3."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST, NEWEST = (3, 11), (3, 13)
GLIBC = (2, 35)
PYTHON = "{}.{}".format(*sys.version_info)
LIBPYTHON = f"libpython{PYTHON}.so.1.0"


def stop(fault, remedy):
    """Exit, and say what is wrong and what to do."""
    sys.exit(f"\nCannot set up Glimpse: {fault}\n  {remedy}\n")


def use_a_fitting_python():
    """Start again under a Python between OLDEST and NEWEST if this one is not."""
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


def check_platform():
    """The bundled Triton needs Linux on x86-64 with glibc 2.35."""
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


def has_libpython():
    """Whether the loader finds the shared library of this Python, beside it or in its cache."""
    if os.path.exists(os.path.join(sysconfig.get_config_var("LIBDIR") or "", LIBPYTHON)):
        return True
    cache = subprocess.run(["/sbin/ldconfig", "-p"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return LIBPYTHON.encode() in cache.stdout


def has_ensurepip():
    """Whether `python3 -m venv` can install pip: Debian packs that apart."""
    return subprocess.call([sys.executable, "-c", "import ensurepip"], stderr=subprocess.DEVNULL) == 0
