"""Tables that outlive their run."""

from __future__ import annotations

import json

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from runbook.page.shown import show_table


@pytest.mark.usefixtures("prefect_server")
def test_the_newest_version_is_found_by_its_key() -> None:
    @flow(name="showing")
    def show(size: str) -> None:
        show_table("backups-shown", "すべてのバックアップ", ("backup", "size"), [("backup_1", size)])

    show("3 MB")
    show("4 MB")
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["backups-shown"]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=wanted)
    newest = max(found, key=lambda artifact: artifact.created)
    rows = newest.data if isinstance(newest.data, list) else json.loads(str(newest.data))
    assert (newest.type, rows) == ("table", [{"backup": "backup_1", "size": "4 MB"}])


def test_outside_of_a_run_nothing_is_shown() -> None:
    show_table("backups-shown", "", ("a",), [(1,)])
