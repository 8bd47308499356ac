"""Say how long a question that is refused for lack of capacity is asked again."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from service.core.errors import Overloaded, ShuttingDown


@dataclass(frozen=True, slots=True)
class Patience:
    """Wait for room until a time of the monotonic clock."""

    until: float

    def waits_for(self, refusal: Overloaded) -> bool:
        """Decide once for each refusal whether the question waits and is asked again, so that all who ask agree."""
        if not refusal.is_wait and not isinstance(refusal, ShuttingDown):
            refusal.is_wait = time.monotonic() + refusal.retry_after_s < self.until
        return refusal.is_wait


NO_PATIENCE = Patience(-math.inf)
