"""Remember how large the pages of PDFs are: only their renderer knows, and a page that is cached is not rendered."""

from __future__ import annotations

from collections import OrderedDict

MOST_KNOWN = 4096  # pages


class PageSizes:
    """The sizes of the pages that were measured last. Made once by the pipeline, for all variants."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def get(self, digest: str) -> tuple[int, int] | None:
        """Return a page's width and height; None if it was not measured."""
        if digest in self._sizes:
            self._sizes.move_to_end(digest)
        return self._sizes.get(digest)

    def keep(self, digest: str, size: tuple[int, int]) -> None:
        """Remember a page's width and height."""
        self._sizes[digest] = size
        self._sizes.move_to_end(digest)
        if len(self._sizes) > MOST_KNOWN:
            self._sizes.popitem(last=False)
