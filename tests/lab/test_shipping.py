"""The lab's WAL is in both archives within seconds, whoever dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import psutil
import pytest

from lab.client import Lab
from lab.servers.shipping import ARCHIVER_PROGRAM
from runbook.wait import until
from tests.fixtures.postgres.shipped import commit, forget, wait_shipped


@pytest.fixture(autouse=True)
def forgotten(lab: Lab) -> Iterator[None]:
    """The table goes with the test."""
    yield
    forget(lab)


def test_wal_is_in_both_archives_and_goes_on_when_the_archiver_was_killed(lab: Lab) -> None:
    before = lab.status()["services"][ARCHIVER_PROGRAM]
    assert before["running"], "the lab brings it up"
    wait_shipped(lab, commit(lab, "before"))
    os.kill(before["pid"], signal.SIGKILL)
    lsn = commit(lab, "meanwhile")
    until(
        lambda: lab.status()["services"][ARCHIVER_PROGRAM]["pid"] not in (None, before["pid"]),
        what="its restart",
        seconds=120,
    )
    wait_shipped(lab, lsn)
    (log,) = [path for path in lab.logs() if path.stem == ARCHIVER_PROGRAM]
    assert " to backups, copies" in log.read_text()


def test_it_needs_no_prefect_server_and_its_argv_has_no_secret(lab: Lab) -> None:
    process = psutil.Process(lab.status()["services"][ARCHIVER_PROGRAM]["pid"])
    assert "PREFECT_API_URL" not in process.environ()
    secrets = [value for name, value in lab.environ().items() if name.endswith("_PASSWORD")]
    assert not [word for word in process.cmdline() if any(secret in word for secret in secrets)]
