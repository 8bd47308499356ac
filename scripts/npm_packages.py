"""Unpack the packages of npm that some tests need into .venv/npm/node_modules, without npm.

Debian's npm needs some hundred packages. These need nothing but Node.js or a browser: a package is one archive, whose
digest is pinned here.
"""

import base64
import hashlib
import io
import os
import shutil
import tarfile
import urllib.error
import urllib.request

import environment

REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org")
FOLDER = os.path.join(environment.VENV, "npm", "node_modules")
TIMEOUT_S = 60
# {name: (version, the archive's SHA-512 in base64, what it is for)}
PACKAGES = {
    "openai": (
        "6.49.0",  # 7 needs Node.js 22, and Debian 12 and 13 have 18 and 20
        "aYCc0C6L864eR6WSYIwQGyXriw/nIyZx0ObvhzOEVuk0zoBDpynjSbrionWI7q65B5H8jJX0DXR9snEzM6bfPg==",
        "the tests ask the service with OpenAI's JavaScript client",
    ),
    "axe-core": (
        "4.14.1",
        "FHfa+lmNjQZfJz1q8wKqIDwC6DExcHt/pkjNQb09a3NPjCKg2rhu5qb2S4r76ASyFNNtuFooJpZe37OgudVGtQ==",
        "the tests look for barriers on the page with it",
    ),
}


class NotFetched(Exception):
    """A package could not be had; the message says why."""


def install_all():
    """Install what is missing. Say what could not be had, and go on: only the tests named there need it."""
    for name, (version, digest, purpose) in PACKAGES.items():
        if _installed(name) == version:
            continue
        try:
            _unpack(name, _fetch(name, version, digest))
        except NotFetched as exc:
            print(f"  without npm's {name} ({purpose}): {exc}", flush=True)
        else:
            with open(_mark(name), "w", encoding="ascii") as mark:
                mark.write(version)


def _mark(name):
    return os.path.join(FOLDER, name, ".version")


def _installed(name):
    try:
        with open(_mark(name), encoding="ascii") as mark:
            return mark.read()
    except OSError:
        return None


def _fetch(name, version, digest):
    """The archive's bytes. Raises NotFetched."""
    url = f"{REGISTRY.rstrip('/')}/{name}/-/{name}-{version}.tgz"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            archive = response.read()
    except (OSError, urllib.error.URLError) as exc:
        raise NotFetched(f"{url} cannot be read: {exc}") from exc
    found = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if found != digest:
        raise NotFetched(f"{url} is not the archive that was pinned: its SHA-512 is {found}")
    return archive


def _unpack(name, archive):
    """Replace the package's folder. Every path in npm's archives begins with a folder, which is left out."""
    folder = os.path.join(FOLDER, name)
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in files.getmembers():
            inside = os.path.normpath(member.name.partition("/")[2])
            if not member.isfile() or inside.startswith(("..", "/")):
                continue
            path = os.path.join(folder, inside)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as target:
                shutil.copyfileobj(files.extractfile(member), target)
