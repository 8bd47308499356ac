"""Let the background loops of the service outlive faults of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

log = structlog.get_logger()


class Watch:
    """One loop that runs as long as the service. If it ended with an error, the service would end with it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._complaint = ""  # the last round's error

    @contextmanager
    def surviving(self) -> Iterator[None]:
        """Wrap one round: an error ends nothing else, and is logged once, however often it comes in a row."""
        try:
            yield
        except Exception as exc:
            if self._complaint != repr(exc):
                log.exception("watch_failed", watch=self._name)
            self._complaint = repr(exc)
        else:
            self._complaint = ""
