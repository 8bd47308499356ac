"""What files of several pages have in common."""

from __future__ import annotations

from service.core.errors import InvalidImage

MAX_PAGES = 10_000  # of a PDF
MAX_TIFF_PAGES = 2_000  # that are read: each takes a step, 0.8 µs, on the event loop


def page_not_found(page: int, pages: int) -> InvalidImage:
    """`pages`: how many the file has."""
    if pages == 1:
        return InvalidImage(
            f"page is {page:,}, and the image has one page: leave page out", param="page", code="page_not_found"
        )
    return InvalidImage(
        f"page is {page:,}, and the document has {pages:,} pages: send 1 to {pages:,}",
        param="page",
        code="page_not_found",
    )
