"""The second region, prepared and empty: everything comes back there from the copies alone, and the lab is not touched."""

from __future__ import annotations

from pathlib import Path

import httpx

from blocks.environment import Environment
from flows.database.copies import replicate_backups
from runbook.report import Status
from tests.recovery.conftest import System, restore


def test_a_full_restore_from_the_copies_brings_everything_up_there(system: System) -> None:
    region = System(system.lab.region())
    assert replicate_backups.fn(system.name).status in (Status.OK, Status.WARN)
    backup = max(path.name for path in region.store("postgres").iterdir() if path.name.startswith("backup_"))
    users, before = system.sql("SELECT count(*) FROM users"), system.untouched()
    try:
        refused = restore(region)
        assert refused.returncode == 1
        assert f"name another environment's backup in full, e.g. {backup}" in refused.stderr
        assert not Path(region.lab.status()["postgres"]["data"]).exists()
        done = restore(region, "--backup", backup)
        assert done.returncode == 0, done.stderr[-2000:]
        assert region.sql("SELECT count(*) FROM users") == users
        assert region.log_in()
        assert region.healthy()
        url = region.lab.status()["application"]["url"]
        assert httpx.get(f"{url}/health", timeout=60).json() == {"status": "healthy", "database": "ok", "redis": "ok"}
        assert url != system.lab.status()["application"]["url"]
        assert Environment.find(region.name).postgres.port == int(region.lab.environ()["OPS_LAB_DR_POSTGRES_PORT"])
        assert system.untouched() == before
        assert system.lab.endpoint() == system.lab.status()["application"]["url"], (
            "only a failover of the region moves it"
        )
    finally:
        system.lab.empty_region()
    assert {row["running"] for row in region.lab.status()["services"].values()} == {False}
