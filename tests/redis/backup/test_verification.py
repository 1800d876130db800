"""verify_backup of Redis: really loaded, every key compared, and only then noted; what prune_backups goes by."""

from __future__ import annotations

import gzip
import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from flows.database.backup import prune_backups, verify_backup
from flows.redis.persistence import backup_redis, restore_redis
from runbook.errors import RunbookFailed
from runbook.report import Status
from tasks.backups import catalogue, codec, manifest
from tasks.backups.manifest import Manifest
from tasks.redis.content.manifest import EXPIRING
from tasks.redis.server import family, version_of
from tasks.stores.directory import DirectoryStore
from tests.fixtures.bits import GZIP_BACKUPS
from tests.redis.conftest import NAME, Rig
from tests.redis.data import fill


@pytest.fixture
def backup(rig: Rig) -> str:
    """A backup of a server with something of everything, which is down since."""
    fill({n: rig.client(n) for n in (0, 3)})
    name = backup_redis.fn(NAME).facts["backup"]
    rig.services.stop("redis")
    return name


def opened(rig: Rig, name: str) -> catalogue.Backup:
    return catalogue.open_backup(DirectoryStore(rig.store), name)


def reseal(directory: Path, **content: object) -> None:
    """Change a manifest, and have all of its sums right."""
    told = json.loads((directory / "manifest.json").read_text())
    told["content"].update(content)
    told["files"] = {name: found.model_dump() for name, found in manifest.sums_of(directory).items()}
    manifest.write(directory, Manifest.model_validate(told))


def test_a_backup_is_verified_without_the_live_server(rig: Rig, backup: str) -> None:
    before = sorted(path.name for path in rig.store.rglob("*"))
    report = verify_backup.fn(NAME, kind="redis")
    assert report.status in (Status.OK, Status.WARN), report.sentence()
    assert opened(rig, backup).verified
    [table] = [table for table in report.evidence if table.name == "Proven equal to the backup"]
    assert [row[0] for row in table.rows] == ["db 0", "db 3"]
    assert sorted(path.name for path in rig.store.rglob("*")) == sorted([*before, ".verified", f"{backup}.json"])
    again = verify_backup.fn(NAME, backup=backup)
    [trend] = [table for table in again.evidence if table.name.startswith("Verifications")]
    assert [row[1].split(",")[0] for row in trend.rows] == [backup], "its name tells its kind"


@pytest.mark.parametrize("kind", ["a byte", "a key less", "an empty sidecar", "no RDB"])
def test_a_bad_backup_is_not_verified(rig: Rig, backup: str, kind: str) -> None:
    catalogue.mark_verified.work(DirectoryStore(rig.store), backup, {"by": "test"})
    directory = rig.store / backup
    if kind == "a byte":
        content = bytearray((directory / "dump.rdb").read_bytes())
        content[len(content) // 2] ^= 1
        (directory / "dump.rdb").write_bytes(content)
    if kind == "a key less":
        databases = opened(rig, backup).manifest.content["databases"]
        databases["0"]["persistent_keys"] += 1
        reseal(directory, databases=databases)
    if kind == "an empty sidecar":
        (directory / EXPIRING).write_bytes(codec.compress(b""))
        reseal(directory)
    if kind == "no RDB":
        (directory / "dump.rdb").write_bytes(b"REDIS0011 and nothing more")
        reseal(directory)
    said = {
        "a byte": "SHA-256",
        "a key less": "keys without a TTL instead of",
        "an empty sidecar": "keys with a TTL are not in the backup",
        "no RDB": "the server cannot load this data",
    }[kind]
    with pytest.raises(RunbookFailed, match=said):
        verify_backup.fn(NAME, kind="redis")
    assert not opened(rig, backup).verified


def test_a_backup_of_the_earlier_gzip_form_is_verified_and_restored(rig: Rig) -> None:
    [kept] = (GZIP_BACKUPS / "redis").iterdir()
    shutil.copytree(kept, rig.store / kept.name)
    if family(version_of(rig.client())) != "valkey":  # the kept RDB is Valkey's
        with pytest.raises(RunbookFailed, match="CRITICAL"):
            verify_backup.fn(NAME, kind="redis")
        return
    assert verify_backup.fn(NAME, kind="redis").status in (Status.OK, Status.WARN)
    assert restore_redis.fn(NAME, confirm=NAME).status in (Status.OK, Status.WARN)
    assert rig.client().dbsize() == 40
    (rig.store / kept.name / "expiring.tsv.gz").write_bytes(gzip.compress(b""))
    reseal(rig.store / kept.name)
    with pytest.raises(RunbookFailed, match="keys with a TTL are not in the backup"):
        verify_backup.fn(NAME, kind="redis")


def test_what_is_verified_lets_older_ones_go(rig: Rig, backup: str) -> None:
    told = json.loads((rig.store / backup / "manifest.json").read_text())
    taken = datetime.now(UTC) - timedelta(days=40)
    old = f"dump_{taken:%Y%m%d_%H%M%S}"
    shutil.copytree(rig.store / backup, rig.store / old)
    manifest.write(rig.store / old, Manifest.model_validate(told | {"name": old, "taken": taken.isoformat()}))
    report = prune_backups.fn(
        NAME, kind="redis", keep_verified=1, hours=720, daily=0, weekly=0, monthly=0, confirm=NAME
    )
    [hint] = [found.hint for found in report.findings if found.name == "verified backups"]
    assert hint.startswith("run verify-backup with kind=redis")
    verify_backup.fn(NAME, kind="redis")
    prune_backups.fn(NAME, kind="redis", keep_verified=1, hours=720, daily=0, weekly=0, monthly=0, confirm=NAME)
    assert catalogue.names(DirectoryStore(rig.store), "redis") == [backup]
