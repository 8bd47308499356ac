"""Define every way in which a request can fail, and nothing else.

GlimpseError
├── InvalidRequest        the caller can correct it: wrong field, wrong type, wrong value
│   ├── InvalidImage      the bytes are not an image that can be decoded
│   └── UnsupportedEncoding  the body is compressed in a way that the service does not decompress
├── Unauthenticated       no key, or one that is not valid
├── Forbidden             the key does not allow this
├── NotFound              unknown or expired image id, unknown model
├── SlowBody              the body did not arrive in time
├── TooLarge              over a limit on bytes or pixels
├── Overloaded            no room now; `retry_after_s` says when
│   ├── QuotaExceeded     the tenant has used its quota of this minute, or has too many requests at once
│   └── ShuttingDown      this process is stopping; another one answers
├── DeadlineExceeded      the request's own timeout or the server's
├── Cancelled             the caller went away
├── Unavailable           Triton or a model in it does not answer
│   └── FirstTokenLate    a Triton did not answer within the first-token budget
└── InternalError         a fault of the service; the text gives no internal details
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# What metrics and the log say instead of an error's code, if the service did not fail a question.
BATCH_WAIT = "batch_wait"  # of a refusal after which a question of a batch is asked again
SHORT_DEADLINE = "short_deadline"  # of a deadline, if the caller gave less time than the service does


class GlimpseError(Exception):
    """A failed request. `param` names the field at fault, `code` is stable for programs, the message is for people.

    `cause` is the original text of Triton or another component: for the log, never for the caller.
    """

    code = "error"
    type = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, cause: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.param = param
        self.code = code or type(self).code


def without_frames(error: BaseException) -> None:
    """Let go of what an error that was answered still holds: the frames that it passed, with bodies and images.

    Often one of those frames holds the error itself, and a group is the context of the error in it. Then nothing of it
    would be free until Python's garbage collector runs, and that counts objects, not bytes.
    """
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        each = left.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            left += [each.__cause__, each.__context__]
            each.__traceback__ = each.__context__ = None
            if isinstance(each, BaseExceptionGroup):
                left += each.exceptions


@contextmanager
def naming_image(index: int, of: int) -> Iterator[None]:
    """Add to an error about `image` which one of several images it is."""
    try:
        yield
    except GlimpseError as error:
        if of > 1 and error.param == "image":
            error.param = f"images.{index}"
            error.message = f"image {index + 1} of {of}: {error.message}"
            error.args = (error.message,)
        raise


@contextmanager
def naming_video() -> Iterator[None]:
    """Turn an error about `image` into one about `video`."""
    try:
        yield
    except GlimpseError as error:
        if error.param == "image":
            error.param = "video"
            error.message = re.sub(r"\A(the )?image\b", r"\1video", error.message)
            error.args = (error.message,)
        raise


@contextmanager
def naming_field(name: str) -> Iterator[None]:
    """Turn an error about `image` or `video` into one about the field that holds either."""
    try:
        yield
    except GlimpseError as error:
        if error.param in ("image", "video"):
            error.message = re.sub(rf"\A{error.param}\b", name, error.message)
            error.args = (error.message,)
            error.param = name
        raise


@contextmanager
def naming_frame(index: int, of: int) -> Iterator[None]:
    """Add to an error about `image` which frame of a clip it is."""
    try:
        yield
    except GlimpseError as error:
        if error.param == "image":
            error.param = f"frames.{index}"
            error.message = f"frame {index + 1} of {of}: {error.message}"
            error.args = (error.message,)
        raise


class InvalidRequest(GlimpseError):
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidImage(InvalidRequest):
    code = "invalid_image"


class UnsupportedEncoding(InvalidRequest):
    code = "unsupported_encoding"


class Unauthenticated(GlimpseError):
    code = "invalid_api_key"
    type = "invalid_request_error"


class Forbidden(GlimpseError):
    code = "insufficient_scope"
    type = "invalid_request_error"


class NotFound(GlimpseError):
    code = "not_found"
    type = "invalid_request_error"


class TooLarge(GlimpseError):
    code = "too_large"
    type = "invalid_request_error"


class SlowBody(GlimpseError):
    code = "slow_body"
    type = "timeout_error"


class Overloaded(GlimpseError):
    code = "overloaded"
    type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, code: str | None = None, cause: str = "") -> None:
        super().__init__(message, code=code, cause=cause)
        self.retry_after_s = retry_after_s
        self.is_wait = False  # True: a question of a batch waits, and is asked again


class QuotaExceeded(Overloaded):
    code = "rate_limit_exceeded"


class ShuttingDown(Overloaded):
    code = "shutting_down"


class DeadlineExceeded(GlimpseError):
    code = "deadline_exceeded"
    type = "timeout_error"


class Cancelled(GlimpseError):
    code = "cancelled"
    type = "cancelled"


class Unavailable(GlimpseError):
    code = "unavailable"
    type = "server_error"


class FirstTokenLate(Unavailable):
    """Raised to try another Triton or another variant."""


class InternalError(GlimpseError):
    code = "internal_error"
    type = "server_error"


def no_complete_answer(timeout_s: float) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"there was no complete answer within timeout_s={timeout_s:g}: raise timeout_s, or try again when the service "
        "is less busy",
        param="timeout_s",
    )


def internal_error(request_id: str) -> InternalError:
    return InternalError(f"internal error: ask the operator to look up request id {request_id} in the log")


# HTTP status and gRPC status name of each error; a subclass without a row takes its parent's.
STATUS: dict[type[GlimpseError], tuple[int, str]] = {
    InvalidRequest: (400, "INVALID_ARGUMENT"),
    UnsupportedEncoding: (415, "INVALID_ARGUMENT"),
    Unauthenticated: (401, "UNAUTHENTICATED"),
    Forbidden: (403, "PERMISSION_DENIED"),
    NotFound: (404, "NOT_FOUND"),
    SlowBody: (408, "DEADLINE_EXCEEDED"),
    TooLarge: (413, "INVALID_ARGUMENT"),
    Overloaded: (429, "RESOURCE_EXHAUSTED"),
    ShuttingDown: (503, "UNAVAILABLE"),  # load balancers send a 503 to another server, and not a 429
    Cancelled: (499, "CANCELLED"),
    InternalError: (500, "INTERNAL"),
    Unavailable: (503, "UNAVAILABLE"),
    DeadlineExceeded: (504, "DEADLINE_EXCEEDED"),
}


def status_of(error: GlimpseError) -> tuple[int, str]:
    """Return the row of STATUS of the error's class, or of its nearest parent."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    raise LookupError(f"{type(error).__name__} has no status")


def error_codes(kind: type[GlimpseError] = GlimpseError) -> list[str]:
    """Return the codes of all kinds of errors, sorted. A raised error may have a more specific code."""
    codes = {each.code for each in kind.__subclasses__()}
    return sorted(codes.union(*(error_codes(each) for each in kind.__subclasses__())))
