"""What each worker of pytest-xdist runs: one of them every test that starts servers, the others the rest by file.

One Triton serves the session that way, and no test with a deadline runs beside another server's load. Tests of several
files that need the same long fixture run on one worker too, so that no other waits for it.

`--dist loadgroup` of xdist 3.8 cannot do it: it writes the group into a test's id, which pytest 9.2 takes no notice of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

FIRST = "gw0"  # the worker that tells which tests run together


class GroupsOnOneWorker(LoadScopeScheduling):
    """The tests of each group together, all others by their file; in the order in which they were collected."""

    def __init__(self, config: pytest.Config, log: Producer, groups: Path) -> None:
        super().__init__(config, log)
        self._file = groups

    @cached_property
    def _groups(self) -> dict[str, str]:
        return dict(json.loads(self._file.read_text()))

    def _split_scope(self, nodeid: str) -> str:
        return self._groups.get(nodeid) or nodeid.partition("::")[0]


class Workers:
    """A plugin: the tests to keep together go from the first worker to the scheduler through a file."""

    def __init__(self, folder: Path) -> None:
        self._groups = folder / "groups"

    def pytest_configure_node(self, node: WorkerController) -> None:
        node.workerinput["groups"] = str(self._groups)

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Producer) -> GroupsOnOneWorker:
        return GroupsOnOneWorker(config, log, self._groups)


def tell_groups(config: pytest.Config, groups: Mapping[str, str]) -> None:
    """Tell each test's group, by name. All workers collect the same tests: one of them tells."""
    told = config.workerinput  # type: ignore[attr-defined]
    if told["workerid"] == FIRST:
        Path(told["groups"]).write_text(json.dumps(dict(groups)))
