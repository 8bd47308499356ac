"""What each worker of pytest-xdist runs: one of them every test that starts servers, the others the rest by file.

One Triton serves the session that way, and no test with a deadline runs beside another server's load. `--dist
loadgroup` of xdist 3.8 cannot do it: it writes the group into a test's id, which pytest 9.2 takes no notice of.
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
    """These start servers. All workers collect the same tests: one of them tells."""
    told = config.workerinput  # type: ignore[attr-defined]
    if told["workerid"] == FIRST:
        Path(told["servers"]).write_text("\n".join(item.nodeid for item in items))
