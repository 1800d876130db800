"""Links that the account of PostgreSQL or Redis plants where root writes, copies or reads: none leads root away."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import SecretStr

from blocks.postgres.server import Postgres
from blocks.redis.server import Redis
from runbook.errors import OpsError
from tasks.backups.encryption import Key
from tasks.backups.manifest import MANIFEST, SEAL, FileSum, sum_of
from tasks.cluster import recovery
from tasks.cluster.configuration import (
    ConfigurationFile,
    ServerConfiguration,
    load_configuration,
    note_of,
    place_configuration,
    read_configuration,
    save_configuration,
)
from tasks.cluster.instance import PrivateInstance
from tasks.failover import member
from tasks.failover.following import follow
from tasks.failover.numbers import write_histories
from tasks.redis.backup import aof, snapshot
from tasks.redis.restore import copy, kept
from tasks.redis.restore.login import rules_of
from tasks.redis.settings.file import Configuration, masked
from tasks.stores.directory import DirectoryStore
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import Link
from tasks.wal.archive.fetch import fetch, fetch_histories
from tasks.wal.archive.place import DirectoryPlace
from tasks.wal.format.header import HEADER
from tasks.wal.format.names import Segment
from tests.fixtures.planting import SECRET, Planting, planting

__all__ = ["planting"]
REFUSED = "a symbolic link to a file of another account is not followed"
SYSTEM, BYTES, HISTORY = 7, 1 << 20, b"1\t0/1000000\tno recovery target specified\n"
SEGMENT = Segment(3, 1, BYTES)


def postgres_at(data: Path) -> Postgres:
    user = OS_USER
    return Postgres(
        database="app", user="app", password=SecretStr("x"), admin_password=SecretStr("x"),
        data_directory=str(data), os_user=user,
    )  # fmt: skip


OS_USER = "nobody"


def archive_in(place: Path) -> tuple[Archive, Link]:
    """An archive with a segment and the history of timeline 2."""
    archive = Archive(DirectoryPlace(place), Key())
    header = HEADER.pack(0xD118, 2, 1, SEGMENT.start, 0, SYSTEM, BYTES, 8192)
    stored = archive.put(SEGMENT.name, (header + b"WAL").ljust(BYTES, b"\0"))
    archive.put("00000002.history", HISTORY)
    return archive, Link(SEGMENT, stored)


def test_wal_is_fetched_into_files_of_its_own(planting: Planting, tmp_path: Path) -> None:
    archive, link = archive_in(tmp_path)
    staging = planting.directory("restoring/pg_wal")
    planting.link(staging / SEGMENT.name)
    planting.link(staging / "00000002.history")
    planting.link(staging / "00000003.history", planting.vault / "new")
    assert fetch(archive, SYSTEM, [link], staging).links == (link,)
    assert fetch_histories(archive, staging) == ["00000002.history"]
    planting.require_untouched()
    assert (staging / "00000002.history").read_bytes() == HISTORY
    assert not (staging / SEGMENT.name).is_symlink()


def test_wal_is_not_fetched_into_a_directory_of_another_account(planting: Planting, tmp_path: Path) -> None:
    archive, link = archive_in(tmp_path)
    staging = planting.link(planting.place / "pg_wal", planting.vault)
    for one in (lambda: fetch(archive, SYSTEM, [link], staging), lambda: fetch_histories(archive, staging)):
        with pytest.raises(OpsError, match=f"pg_wal.*: {REFUSED}"):
            one()
    planting.require_untouched()


def test_histories_are_written_into_a_standby_as_files_of_its_account(planting: Planting, tmp_path: Path) -> None:
    archive, _ = archive_in(tmp_path)
    data = planting.directory("data/pg_wal").parent
    path = planting.link(data / "pg_wal" / "00000002.history", planting.vault / "new")
    assert write_histories.work(postgres_at(data), archive, 1, 1 << 30) == (path.name,)
    planting.require_untouched()
    assert (path.read_bytes(), path.stat().st_uid) == (HISTORY, planting.account.uid)


@pytest.mark.parametrize("named", ["pg_hba.conf", "postgresql.auto.conf"])
def test_the_configuration_of_a_server_does_not_name_what_a_file_of_root_says(planting: Planting, named: str) -> None:
    planting.canary.write_text("include 'inner.conf'\n")
    data = planting.directory("data")
    for name in ("postgresql.conf", "inner.conf"):
        planting.write(data / name)
    planting.link(data / named)
    assert set(read_configuration(data).files) == {"postgresql.conf", named}


@pytest.mark.parametrize("where", ["data", "conf.d"])
def test_a_configuration_is_not_placed_in_a_directory_of_root(planting: Planting, where: str) -> None:
    data = planting.directory("data")
    link = planting.place / "data" if where == "data" else data / where
    planting.run("rm", "-rf", link)
    planting.link(link, planting.vault)
    name = "canary" if where == "data" else "conf.d/canary"
    with pytest.raises(OpsError, match=REFUSED):
        place_configuration(ServerConfiguration({name: ConfigurationFile("eHg=")}), data, planting.place / "live")
    planting.require_untouched()


def test_a_noted_configuration_that_leads_out_of_the_data_directory_is_not_used(planting: Planting) -> None:
    live = planting.directory("data")
    note = note_of(live)
    save_configuration(note, ServerConfiguration({"a.conf": ConfigurationFile()}), live)
    assert load_configuration(note)
    planting.write(note, note.read_text().replace("a.conf", "../../vault/new"))
    assert load_configuration(note) is None
    planting.run("rm", note)
    planting.link(note)
    with pytest.raises(OpsError, match=REFUSED):
        load_configuration(note)


def test_a_standby_is_not_configured_from_a_file_of_root(planting: Planting) -> None:
    data = planting.directory("data")
    planting.link(data / "postgresql.auto.conf")
    with pytest.raises(OpsError, match=REFUSED):
        follow(postgres_at(data), "host=a")
    planting.require_untouched()
    with pytest.raises(OpsError, match=REFUSED):
        member._altered_in(postgres_at(data))


def test_a_log_that_leads_to_a_file_of_root_is_not_reported(planting: Planting) -> None:
    root = planting.directory("restoring")
    instance = PrivateInstance(root, postgres_at(root / "data"))
    planting.link(instance.log)
    with pytest.raises(OpsError, match=REFUSED):
        recovery.last_words(instance)


def redis_at(live: Path) -> Redis:
    return Redis(port=1, data_directory=str(live), config_file=str(live / "redis.conf"), os_user=OS_USER)


ACL = Configuration((), {"aclfile": "users.acl"})


def test_an_acl_file_of_root_is_not_copied_into_the_staged_data(planting: Planting, tmp_path: Path) -> None:
    live = planting.directory("redis")
    planting.link(live / "users.acl")
    (tmp_path / "dump.rdb").write_bytes(b"REDIS0011")
    backup = cast("Any", SimpleNamespace(path=tmp_path))
    with pytest.raises(OSError, match=REFUSED):
        copy._seed(redis_at(live), ACL, backup, live, planting.place / "redis.restoring")
    planting.require_untouched()
    with pytest.raises(OpsError, match="cannot be read"):
        rules_of(redis_at(live), ACL)
    with pytest.raises(OpsError, match="cannot be read"):
        masked(live / "users.acl")


def test_an_acl_file_outside_of_the_data_directory_is_not_copied(planting: Planting, tmp_path: Path) -> None:
    live, staged = planting.directory("deep/redis"), planting.place / "deep" / "deeper" / "redis.restoring"
    planting.directory("deep/deeper")
    (tmp_path / "dump.rdb").write_bytes(b"REDIS0011")
    named = os.path.relpath(planting.canary, live)
    outside = Configuration((), {"aclfile": named})
    copy._seed(redis_at(live), outside, cast("Any", SimpleNamespace(path=tmp_path)), live, staged)
    planting.require_untouched()
    assert not (staged / named).exists()


def test_kept_data_whose_rdb_leads_to_a_file_of_root_is_not_given_to_the_account(planting: Planting) -> None:
    directory = planting.directory("redis.superseded_20260101_000000")
    planting.link(directory / "dump.rdb")
    with pytest.raises(OSError, match=REFUSED):
        kept._seed(redis_at(directory), Configuration((), {}), directory)
    planting.require_untouched()


def test_a_backup_of_redis_has_no_file_of_root(planting: Planting, tmp_path: Path) -> None:
    live = planting.directory("redis")
    rdb = planting.link(live / "dump.rdb")
    with pytest.raises(OpsError, match=REFUSED):
        snapshot._copy(rdb, tmp_path / "dump.rdb", datetime.fromtimestamp(0, UTC))
    planting.link(live / "appendonly.aof.1.base.rdb")
    manifest = planting.write(live / "appendonly.aof.manifest", "file appendonly.aof.1.base.rdb seq 1 type b\n")
    with pytest.raises(OpsError, match=REFUSED):
        aof.copy_aof(aof.read_parts(manifest), tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text()]


def stored_backup(planting: Planting) -> tuple[DirectoryStore, dict[str, FileSum]]:
    """A store of another account, with a backup of two files."""
    backup = planting.directory("store/postgres_20260101_000000")
    for name in (MANIFEST, SEAL, "dump", "parts/1"):
        planting.write(backup / name)
    return DirectoryStore(backup.parent), {name: sum_of(backup / name) for name in ("dump", "parts/1")}


def test_only_what_the_manifest_names_is_fetched_from_a_store(planting: Planting, tmp_path: Path) -> None:
    store, files = stored_backup(planting)
    backup = store.path / "postgres_20260101_000000"
    planting.link(backup / "canary")
    planting.link(backup / "parts" / "vault", planting.vault)
    store.fetch(backup.name, files, tmp_path / "fetched")
    store.receive(backup, "postgres_20260101_000001", "test", files)
    for target in (tmp_path / "fetched", store.path / ".partial-test-postgres_20260101_000001"):
        fetched = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
        assert fetched == {MANIFEST, SEAL, *files}


@pytest.mark.parametrize("planted", ["dump", MANIFEST, "parts"])
def test_a_link_in_a_store_is_not_fetched(planting: Planting, tmp_path: Path, planted: str) -> None:
    store, files = stored_backup(planting)
    backup = store.path / "postgres_20260101_000000"
    planting.run("rm", "-rf", backup / planted)
    planting.write(planting.place / "bait", "")
    planting.link(backup / planted, planting.vault if planted == "parts" else None)
    (planting.vault / "1").write_text(SECRET)
    with pytest.raises(OpsError, match=REFUSED):
        store.fetch(backup.name, files, tmp_path / "fetched")
    with pytest.raises(OpsError, match=REFUSED):
        store.receive(backup, "postgres_20260101_000001", "test", files)
    copied = [path for path in (*tmp_path.rglob("*"), *store.path.glob(".partial*/**/*")) if path.is_file()]
    assert not [path for path in copied if SECRET in path.read_text()]
    assert (store.read(f"{backup.name}/{planted}") is None) or planted == "parts"
