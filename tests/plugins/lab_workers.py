"""Where `OPS_TEST_LABS` is set, so many workers start a lab (a plugin): one in `make test`.

Each worker has its own lab: a dozen servers that take 15 s of processor time to start, and use the processor until the
run ends. Under `--dist loadfile` the next file goes to the first worker that asks, so every worker would start a lab. A
file that uses it waits for a worker that has one; the others take it when they have nothing else left.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

VARIABLE = "OPS_TEST_LABS"


def listed_files() -> Path:
    """Where the first worker lists the files that use the lab: only workers collect tests."""
    return Path(os.environ["OPS_LAB_BASE"]) / "files-with-lab.json"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """After pytest chose the tests by their marks."""
    if getattr(config, "workerinput", {}).get("workerid") == "gw0":
        found = {item.nodeid.partition("::")[0] for item in items if "lab" in getattr(item, "fixturenames", ())}
        listed_files().write_text(json.dumps(sorted(found)))


class LabScheduling(LoadFileScheduling):
    """Files in their order, but those with the lab wait for a worker that has one."""

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        self.most = int(os.environ[VARIABLE])
        self.with_lab = set[WorkerController]()
        self.files: Collection[str] = ()

    def schedule(self) -> None:
        """Every worker has collected its tests."""
        self.files = frozenset(json.loads(listed_files().read_text()))
        super().schedule()

    def _assign_work_unit(self, node: WorkerController) -> None:
        chosen = next(iter(self.workqueue))
        if node in self.with_lab or len(self.with_lab) >= self.most:
            suitable = (file for file in self.workqueue if (file in self.files) == (node in self.with_lab))
            chosen = next(suitable, chosen)
        if chosen in self.files:
            self.with_lab.add(node)
        self.workqueue.move_to_end(chosen, last=False)
        super()._assign_work_unit(node)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LabScheduling | None:
    """In the controller, for `--dist loadfile`; xdist's own scheduler where the variable is not set."""
    chosen = VARIABLE in os.environ and config.getvalue("dist") == "loadfile"
    return LabScheduling(config, log) if chosen else None
