"""Remember how large the pages of PDFs are: only their renderer knows, and a page that is cached is not rendered."""

from __future__ import annotations

from service.vision_stage.latest import Latest


class PageSizes(Latest[str, tuple[int, int]]):
    """The width and height of the pages that were measured last, by digest. Made once by the pipeline."""
