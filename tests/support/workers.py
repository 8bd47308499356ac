"""What each worker of pytest-xdist runs: one of them every test that starts servers, the others the rest by file.

One Triton serves the session that way, and no test with a deadline runs beside another server's load. xdist's own
`--dist loadgroup` would do: but 3.8 groups nothing under pytest 9.2, where a test's id cannot be changed.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

FIRST = "gw0"  # the worker that tells which tests start servers


class ServersOnOneWorker(LoadScopeScheduling):
    """The tests named in a file together, all others by their file; in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Producer, names: Path) -> None:
        super().__init__(config, log)
        self._names = names

    @cached_property
    def _together(self) -> frozenset[str]:
        return frozenset(self._names.read_text().splitlines())

    def _split_scope(self, nodeid: str) -> str:
        return "servers" if nodeid in self._together else nodeid.partition("::")[0]


class Workers:
    """A plugin: the tests to keep together go from the first worker to the scheduler through a file."""

    def __init__(self, folder: Path) -> None:
        self._names = folder / "servers"

    def pytest_configure_node(self, node: WorkerController) -> None:
        node.workerinput["servers"] = str(self._names)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> ServersOnOneWorker:
        return ServersOnOneWorker(config, log, self._names)


def tell_servers(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.workerinput["workerid"] == FIRST:  # type: ignore[attr-defined]
        Path(config.workerinput["servers"]).write_text("\n".join(item.nodeid for item in items))  # type: ignore[attr-defined]
