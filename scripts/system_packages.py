"""Install Debian packages as root, or through a sudo that asks no password. Runs on any Python 3."""

import os
import re
import shutil
import subprocess

APT = (
    "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=60", "-o", "Acquire::Retries=1",
    "-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20",
)  # fmt: skip
INSTALL = ("install", "-y", "--no-install-recommends")
# What apt-get says when it fails, and what to do. The first that matches counts.
FAILURES = (
    (
        r"Could not get lock|Unable to acquire the dpkg frontend lock|Unable to lock",
        "another program is using apt",
        "Wait until it has ended, then run this again.",
    ),
    (
        r"dpkg was interrupted|unmet dependencies|Unmet dependencies",
        "an earlier installation on this machine was not finished",
        "Finish it as root, then run this again: dpkg --configure -a; apt-get -f install",
    ),
    (
        r"Could not resolve|Temporary failure|Could not connect|Failed to fetch|[Tt]imed out|unreachable",
        "apt-get reached no package server",
        "Check the network, the proxy and /etc/apt/sources.list, then run this again.",
    ),
    (
        r"Unable to locate package|has no installation candidate",
        "this system's package servers do not have every one",
        "Use the system's own Python (make PYTHON=/usr/bin/python3 ...), or one from `uv python install 3.12`.",
    ),
)
SERVICES = {  # what Debian starts: package, unit
    "redis-server": "redis-server",
    "prometheus": "prometheus",
    "prometheus-alertmanager": "prometheus-alertmanager",
}


class NotInstalled(Exception):
    """Packages are missing still: `fault` is the cause, `remedy` is what to do."""

    def __init__(self, fault, remedy):
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def install(wanted, user_id):
    """Install the packages, {package: what it is for}, and say so in one line each. Raises NotInstalled."""
    if shutil.which("apt-get") is None:
        raise NotInstalled("this system has no apt-get", "Install what Debian calls " + ", ".join(wanted) + ".")
    become_root = _become_root(user_id)
    if become_root is None:
        raise NotInstalled("only root can install packages", command(wanted))
    for package, purpose in wanted.items():
        print(f"  installing {package} with apt-get: {purpose}", flush=True)
    environment = ["env", "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C"]
    said = ""
    for arguments in (("update",), (*INSTALL, *wanted)):  # update also fails if one unrelated source is down
        done = subprocess.run(
            [*become_root, *environment, *APT, *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        said += done.stdout.decode(errors="replace")
    # Not by the exit status: without an index, apt-get takes "libpython3.13" as a pattern that matches what is there.
    if not all(map(_is_installed, wanted)):
        raise NotInstalled(*explain(said))
    _stop_services(become_root, wanted)


def command(wanted):
    """Name the one command that installs the packages."""
    steps = " ".join(("apt-get update && apt-get", *INSTALL, *wanted))
    return f"Run this once: sudo sh -c '{steps}'" if shutil.which("sudo") else f"Run this once as root: {steps}"


def explain(said):
    """What apt-get printed -> (what is wrong, what to do)."""
    for pattern, fault, remedy in FAILURES:
        if re.search(pattern, said):
            return fault, remedy
    errors = [line for line in said.splitlines() if line.startswith("E:")] or said.splitlines() or ["no output"]
    return "apt-get failed: " + errors[0], "Mend that, then run this again."


def _is_installed(package):
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", package]
    done = subprocess.run(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    return done.stdout == b"installed"


def _become_root(user_id):
    """What to put before a command so that root runs it; None if that takes a password."""
    if user_id == 0:
        return []
    sudo = shutil.which("sudo")
    if sudo and subprocess.call([sudo, "-n", "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0:
        return [sudo, "-n"]
    return None


def _stop_services(become_root, installed):
    """Debian starts a service once it is installed. The tests start their own, so nobody needs these."""
    if os.path.isdir("/run/systemd/system"):
        for unit in (SERVICES[package] for package in installed if package in SERVICES):
            subprocess.call(
                [*become_root, "systemctl", "disable", "--now", unit],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
