"""Say what pages of other origins may send and read, also in responses that the application does not write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from service.core.access import QUOTA_HEADERS
from service.edges.caller import TRACE_ID_KEY, VARIANT_KEY, trace_id_in

METHODS = ("GET", "POST", "PATCH", "DELETE")
# Any header, because clients send their own: OpenAI's for JavaScript sends x-stainless-lang and others. Cookies and
# other credentials of the browser are not let in.
SENT = ("*",)
READ = (TRACE_ID_KEY, VARIANT_KEY, "retry-after", *QUOTA_HEADERS)


def early_headers(sent: Iterable[tuple[bytes, bytes]], origins: Sequence[str]) -> list[tuple[bytes, bytes]]:
    """Return what a response needs besides its body if neither RequestScope nor the CORS middleware writes it.

    `sent` are the request's headers, as far as they have come. `origins` are those that may read the response.
    """
    sent = list(sent)
    trace_id = trace_id_in(value.decode("latin-1") for name, value in sent if name == TRACE_ID_KEY.encode())
    headers = [(TRACE_ID_KEY.encode(), trace_id.encode())]
    origin = next((value.decode("latin-1") for name, value in sent if name == b"origin"), None)
    if not origins or origin is None:
        return headers
    if "*" in origins:
        headers.append((b"access-control-allow-origin", b"*"))
    elif origin in origins:
        headers += [(b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"Origin")]
    else:
        return headers
    return [*headers, (b"access-control-expose-headers", ", ".join(READ).encode())]
