"""Limit how many calls are made again: if every Triton is in trouble, more calls make it worse.

A bucket of tokens, as in gRPC and Finagle. Each request adds a part of a token, and so does time. Each retry takes one.
"""

from __future__ import annotations

from dataclasses import dataclass

SHARE = 0.1  # of the requests
LEAST_PER_S = 1.0  # for a service with few requests
MOST_TOKENS = 20.0  # so many retries at once: what is in flight at a Triton that dies


@dataclass(slots=True)
class RetryBudget:
    """Hold the tokens of one gateway. Times are seconds of any one clock."""

    now: float
    tokens: float = MOST_TOKENS

    def request(self) -> None:
        """Record a request that is no retry."""
        self.tokens = min(self.tokens + SHARE, MOST_TOKENS)

    def take(self, now: float) -> bool:
        """Return whether a call may be made again, and take its token."""
        self.tokens = min(self.tokens + LEAST_PER_S * max(0.0, now - self.now), MOST_TOKENS)
        self.now = max(now, self.now)
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True
