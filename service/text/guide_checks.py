"""Check guides in the gateway, in a thread beside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from service.core.errors import InvalidRequest
from service.core.guide import Guide
from service.core.latest import Latest
from service.text.guides import Guides


class GuideChecks:
    """Check guides before any other work is done for their requests. Verdicts are kept.

    A check takes milliseconds and runs in a thread, without Python's lock. It needs no vocabulary: a guide that the
    256 bytes can follow can be followed by every tokenizer that spells them all.
    """

    def __init__(self, kept: int = 256) -> None:
        self._faults: Latest[Guide, str] = Latest(kept)  # empty for a guide that can be followed
        self._thread = ThreadPoolExecutor(1, "guides")  # it starts with the first check
        self._guides: Guides | None = None

    async def require(self, guide: Guide) -> None:
        """Raise InvalidRequest for a guide that no answer can follow."""
        fault = self._faults.get(guide)
        if fault is None:
            fault = await asyncio.get_running_loop().run_in_executor(self._thread, self._fault, guide)
            self._faults.keep(guide, fault)
        if fault:
            raise InvalidRequest(f"{guide.field} {fault}", param=guide.field)

    async def is_complete(self, guide: Guide, text: str) -> bool:
        """Return whether a text, without white space around it, is a whole answer that satisfies the guide."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._completes, guide, text)

    def _completes(self, guide: Guide, text: str) -> bool:
        matcher = self._compiler.compile(guide).matcher.deep_copy()
        data = [*text.encode()]
        return bool(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())

    @property
    def _compiler(self) -> Guides:
        if self._guides is None:
            self._guides = Guides.of_bytes()
        return self._guides

    def _fault(self, guide: Guide) -> str:
        try:
            self._compiler.compile(guide)
        except InvalidRequest as error:
            return error.message.removeprefix(f"{guide.field} ")
        return ""
