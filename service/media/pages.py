"""What files of several pages have in common."""

from __future__ import annotations

from service.core.errors import InvalidImage

MAX_PAGES = 10_000  # that are counted: a step each in a TIFF


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
