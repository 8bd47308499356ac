"""Say what each path needs of a caller, and check its key before anything of its body is read."""

from __future__ import annotations

from starlette.types import Scope as AsgiScope

from service.core.access import Authenticator, Grant, Scope
from service.edges.caller import API_KEY_KEY, AUTHORIZATION_KEY, TENANT_KEY, admitted, key_in

GRANT = "glimpse.grant"  # in the scope of ASGI
METRICS = "/metrics"
# The first path that is the request's, or that its path goes on from, counts. None: any key will do.
SCOPES: tuple[tuple[str, Scope | None], ...] = (
    ("/v1/vqa", Scope.ASK),
    ("/v1/chat", Scope.ASK),
    ("/v1/images", Scope.UPLOAD),
    ("/v1/files", Scope.UPLOAD),
    ("/v1/variants", Scope.ADMIN),
    ("/v1/models", None),
    (METRICS, Scope.METRICS),
)
# Paths that need no key: health, and what is the same for everyone.
OPEN = ("/health", "/docs", "/redoc", "/page", "/openapi.json")


def is_open(path: str, metrics_are_open: bool) -> bool:
    """Whether a path needs no key."""
    return path == "/" or any(is_under(path, each) for each in OPEN) or (metrics_are_open and path == METRICS)


def scope_of(path: str) -> Scope | None:
    """Return what a key needs for a path. A path that nobody knows takes any key, and then gets 404."""
    return next((scope for each, scope in SCOPES if is_under(path, each)), None)


def is_under(path: str, parent: str) -> bool:
    return path == parent or path.startswith(f"{parent}/")


def let_in(scope: AsgiScope, access: Authenticator, *, metrics_are_open: bool) -> Grant:
    """Return what a request's caller may do. Raises Unauthenticated, Forbidden, Unavailable, InvalidRequest."""
    path: str = scope["path"]
    if access.has_keys and is_open(path, metrics_are_open):
        return Grant("", scopes=frozenset())
    needed = scope_of(path) if access.has_keys else None

    def key() -> str:
        return key_in(words(scope, AUTHORIZATION_KEY), words(scope, API_KEY_KEY))

    tenants = words(scope, TENANT_KEY) if access.has_keys else []
    return admitted(access, key, needed, next(filter(None, tenants), ""))


def words(scope: AsgiScope, name: str) -> list[str]:
    """Return every value of a header."""
    wanted = name.encode()
    return [value.decode("latin-1") for key, value in scope["headers"] if key == wanted]
