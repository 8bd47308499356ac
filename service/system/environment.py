"""Read what is around the settings: variables that Kubernetes and platforms add, and secrets that stand in files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

FROM_FILE = "_FILE"
# Kubernetes tells each container the address of each Service, and Docker did so with --link. For a Service called
# `glimpse` these are GLIMPSE_SERVICE_HOST, GLIMPSE_SERVICE_PORT, GLIMPSE_PORT and others.
_LINK_NAMES = re.compile(r".+_SERVICE_(HOST|PORT(_[A-Z0-9_]+)?)|.+_PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?")
_LINK_VALUE = re.compile(r"(tcp|udp|sctp)://.*")
# What managed platforms set, and the settings that it is for. The first one counts.
PLATFORM = (
    ("AIP_HTTP_PORT", "GLIMPSE_HTTP_PORT"),
    ("PORT", "GLIMPSE_HTTP_PORT"),
    ("AIP_PREDICT_ROUTE", "GLIMPSE_VERTEX_PREDICT_ROUTE"),
    ("AIP_HEALTH_ROUTE", "GLIMPSE_VERTEX_HEALTH_ROUTE"),
)
SECRET_BYTES = 64 * 1024  # a longer file is no secret


class SecretFileError(ValueError):
    """A secret's file cannot be used; the message names the variable and the reason."""


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set the variable for a Service, and not the operator."""
    upper = name.upper()
    return bool(_LINK_NAMES.fullmatch(upper)) or (upper.endswith("_PORT") and bool(_LINK_VALUE.fullmatch(value)))


def with_platform(environ: Mapping[str, str]) -> dict[str, str]:
    """Set settings from the variables of managed platforms. A setting of the operator's own stays."""
    found = dict(environ)
    written = {name.upper() for name, value in environ.items() if value}
    for name, setting in PLATFORM:
        if setting not in written and environ.get(name):
            found[setting] = environ[name]
            written.add(setting)
    return found


def with_secrets(environ: Mapping[str, str], secrets: Iterable[str]) -> dict[str, str]:
    """Set each variable of `secrets` from the file that NAME_FILE names, without the line's end.

    Raises SecretFileError.
    """
    found = dict(environ)
    written = {name.upper(): name for name in environ}
    for name in secrets:
        source = written.get(name + FROM_FILE)
        if source is None:
            continue
        path = found.pop(source)
        if not path:
            continue
        if found.get(written.get(name, name)):
            raise SecretFileError(f"{name} and {source} are both set: unset one of them")
        found[name] = _read(source, path)
    return found


def _read(source: str, path: str) -> str:
    try:
        with Path(path).open("rb") as file:
            secret = file.read(SECRET_BYTES + 1).decode().strip("\r\n")
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "it is not text"
        raise SecretFileError(
            f"{source}: {path} cannot be read ({reason}): name a file that this user can read"
        ) from exc
    if not secret or len(secret) > SECRET_BYTES:
        raise SecretFileError(f"{source}: {path} is {'empty' if not secret else 'too long'}: write the secret into it")
    return secret
