"""Backups that wait for their store, and the places where they wait: refused, damaged, full, or closed to us."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from flows import store as flows_store
from flows.database import backup
from flows.database.backup import backup_database, prune_backups, verify_backup
from flows.database.restore import restore_database
from runbook.errors import OpsError, RunbookFailed, Unreachable, VerificationFailed
from tasks.backups import catalogue, manifest
from tasks.host.disk import Disk, disk_of
from tasks.s3 import objects
from tasks.stores.bucket import BucketStore
from tasks.stores.directory import DirectoryStore
from tasks.stores.store import store_of
from tests.database.backup.test_verify_and_prune import OLDER_THAN_30_DAYS, aged, claimed_by
from tests.database.conftest import NAME, Trial
from tests.database.places import configure, encrypted, in_bucket, killed, names, spool_of, spooled
from tests.database.restore.test_restore import GOOD, reseal
from tests.s3.servers import S3Server


def waiting_in(trial: Trial) -> list[str]:
    return [name for name in spooled(trial) if name.startswith("backup_")]


def test_a_server_that_refuses_does_not_make_a_good_backup_bad(trial: Trial, moto: S3Server) -> None:
    """Refused is what it would do to every other one: a bucket without object lock, where one is configured."""
    in_bucket(trial, moto.bucket())
    killed("receive: begun")
    [first] = waiting_in(trial)
    configure(trial, "backups", lock_mode="COMPLIANCE", lock_days=1)
    with pytest.raises(RunbookFailed, match="the bucket has no object lock") as caught:
        backup_database.fn(NAME)
    [told] = [found for found in caught.value.report.findings if first in found.name]
    assert "waits to be sent: it is intact, but s3://" in told.name
    assert "create one with object lock, or leave lock_mode empty; the next backup sends it too" in told.hint
    assert waiting_in(trial)[0] == first
    assert len(waiting_in(trial)) == 2
    configure(trial, "backups", lock_mode="", lock_days=0)
    assert backup_database.fn(NAME).status in GOOD
    assert (len(names(trial)), names(trial)[0], spooled(trial)) == (3, first, [])


def test_another_backup_of_its_name_does_not_make_it_bad(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    killed("receive: begun")
    [first] = waiting_in(trial)
    sealed = manifest.read(spool_of(trial) / first)
    other = manifest.text_of(sealed.model_copy(update={"environment": "staging"}))
    store = store_of(trial.environment, "postgres")
    for path, text in (("manifest.json.sha256", manifest.seal_of(other)), ("manifest.json", other)):
        store.write(f"{first}/{path}", text)
    report = backup_database.fn(NAME)
    [told] = [found for found in report.findings if first in found.name]
    assert "its own prefix" in told.hint
    assert waiting_in(trial) == [first]
    assert store.read(f"{first}/manifest.json") == other


def test_one_whose_manifest_was_damaged_while_it_waited_is_told(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    killed("receive: begun")
    [first] = waiting_in(trial)
    (spool_of(trial) / first / "manifest.json").write_text("{")
    report = backup_database.fn(NAME)
    assert any(found.name == f"{first} waited to be sent and is damaged" for found in report.findings)
    assert spooled(trial) == [f".bad-{first}"]


def test_one_whose_answer_got_lost_has_its_line_in_the_log(
    trial: Trial, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bucket(trial, gateway.bucket())
    killed("receive: begun")
    [first] = waiting_in(trial)
    offer, lost = BucketStore.offer, list[str]()

    def losing(store: BucketStore, directory: Path, name: str, files: Any) -> None:
        offer(store, directory, name, files)
        if not lost:
            lost.append(name)
            raise Unreachable("the answer got lost")

    monkeypatch.setattr(BucketStore, "offer", losing)
    report = backup_database.fn(NAME)
    assert lost == [first]
    assert report.facts["sent now"].startswith(first)
    assert f"Backup completed - {first}" in Path(trial.environment.logs.backup).read_text()


def test_each_environment_and_each_set_has_a_spool_of_its_own(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    in_bucket(trial, gateway.bucket(), "copies")
    other = trial.environment
    parts = other.parts()
    stranger = other.model_copy(update={"name": "staging"}).with_parts(parts)
    stores = [store_of(env, "postgres", which) for env in (other, stranger) for which in ("backups", "copies")]
    assert len({store.spool for store in stores}) == 4
    theirs = store_of(stranger, "postgres").spool / ".sent-backup_20260101_000000"
    theirs.mkdir(parents=True)
    backup_database.fn(NAME)
    assert theirs.is_dir(), "it may be removing that itself, now"


def test_a_name_in_a_bucket_that_several_want_is_one_environment_s(
    trial: Trial, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bucket(trial, gateway.bucket())
    store = store_of(trial.environment, "postgres")
    won = list[list[str]]()
    while len(won) < 15 or (len(won) < 200 and not any(won)):  # nobody has it where each has seen another's
        won.append(claimed_by(store, ("production", "staging", "testing"), f"backup_20260101_{len(won):06}"))
    assert max(len(found) for found in won) == 1
    backup_database.fn(NAME, kind="schema")
    [mine] = catalogue.names(store, "schema")
    late = "schema_20260101_030000"
    sealed = catalogue.open_backup(store, mine).manifest.model_copy(update={"name": late, "files": {}})
    for environment in ("production", "staging"):
        directory = trial.reports.parent / environment / late
        directory.mkdir(parents=True)
        manifest.write(directory, sealed.model_copy(update={"environment": environment}))
        store.receive(directory, late, environment, {})
    read_back = BucketStore.damage

    def meanwhile(found: BucketStore, name: str, sums: Any) -> list[str]:
        monkeypatch.setattr(BucketStore, "damage", read_back)
        assert found.accept(trial.reports.parent / "staging" / late, late, "staging", sums) == []
        return read_back(found, name, sums)

    monkeypatch.setattr(BucketStore, "damage", meanwhile)
    with pytest.raises(VerificationFailed, match="another backup of the name"):
        store.accept(trial.reports.parent / "production" / late, late, "production", {})
    assert catalogue.open_backup(store, late).manifest.environment == "staging"


@pytest.mark.parametrize("what", ["backup", "verify"])
def test_a_spool_that_cannot_be_written_to_is_told_in_a_sentence(trial: Trial, gateway: S3Server, what: str) -> None:
    if what == "backup":
        in_bucket(trial, gateway.bucket())
    else:
        encrypted(trial)
        backup_database.fn(NAME)
    (trial.reports.parent / "file").write_text("")
    configure(trial, "backups", spool=str(trial.reports.parent / "file" / "spool"))
    with pytest.raises(RunbookFailed, match="file/spool.*: Not a directory.*make it writable for this user") as caught:
        backup_database.fn(NAME) if what == "backup" else verify_backup.fn(NAME)
    assert not any("ended early" in found.name for found in caught.value.report.findings)


def test_a_store_that_is_no_directory_is_told_in_a_sentence(trial: Trial, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store, source = DirectoryStore(tmp_path / "file" / "store"), tmp_path / "backup_20260101_000000"
    (source / "dump").mkdir(parents=True)
    (source / "manifest.json").write_text("{}")
    for work in (
        lambda: store.claim(NAME, source.name),
        lambda: store.receive(source, source.name, NAME, {}),
        lambda: store.offer(source, source.name, {}),
        lambda: store.fetch(source.name, {}, tmp_path / "target"),
    ):
        with pytest.raises(OpsError, match="Not a directory.*free disk space at"):
            work()
    whole = DirectoryStore(tmp_path / "whole")
    (whole.path / source.name / "other").mkdir(parents=True)
    with pytest.raises(OpsError, match="Directory not empty"):
        whole.offer(source, source.name, {})
    assert (source / "dump").is_dir(), "nothing is lost"


def test_a_file_that_the_disk_does_not_give_back_is_named_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text(name)
    sums = manifest.sums_of(tmp_path)
    (tmp_path / "c").write_text("another")
    real = manifest.sum_of

    def broken(path: Path) -> manifest.FileSum:
        if path.name == "b":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(manifest, "sum_of", broken)
    assert manifest.damage(tmp_path, sums) == ["b cannot be read: Input/output error", "c has 7 bytes instead of 1"]


def test_what_a_killed_backup_left_does_not_take_the_room_of_the_next(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = trial.store / f".partial-{NAME}-backup_20260101_000000"
    left.mkdir(parents=True)
    (left / "dump").write_bytes(bytes(1_000_000))

    def small(path: Path) -> Disk:
        taken = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return dataclasses.replace(disk_of(path), free_bytes=disk_of(path).free_bytes if taken < 1_000_000 else 0)

    monkeypatch.setattr(backup, "read_disk", small)
    assert backup_database.fn(NAME).status in GOOD
    assert not left.exists()


def test_a_second_place_that_is_wrong_or_away_makes_no_backup_worse(
    trial: Trial, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, listing = list[Path](), DirectoryStore.names
    monkeypatch.setattr(DirectoryStore, "names", lambda store: (asked.append(store.path), listing(store))[1])
    in_bucket(trial, gateway.bucket(), "copies")
    configure(trial, "copies", redis="s3:///x", patience_seconds=600, endpoint="http://127.0.0.1:1")
    assert flows_store.LIST_PATIENCE_SECONDS < 10
    monkeypatch.setattr(flows_store, "LIST_PATIENCE_SECONDS", 0.1)
    report = backup_database.fn(NAME)
    told = {found.name: found.value for found in report.findings if "could not be listed" in found.name}
    assert "no place in S3" in told["copies of redis could not be listed"]
    assert "no connection to" in told["copies of postgres could not be listed"]
    assert f"Backup completed - {report.facts['backup']}" in Path(trial.environment.logs.backup).read_text()
    places = [path for path in asked if path.parent == trial.store.parent]
    assert sorted(path.name for path in places if path != trial.store) == ["cluster", "files", "redis"]
    assert asked.count(trial.store) == 2, "once for the four kinds in it, once for the backup before this one"


def test_the_log_has_its_line_before_the_other_places_are_asked(trial: Trial) -> None:
    killed("before read_stores")
    assert "Backup completed - " in Path(trial.environment.logs.backup).read_text()


def test_a_manifest_that_is_too_large_is_refused_before_anything_is_sent_and_hides_no_other(
    trial: Trial, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = gateway.bucket()
    in_bucket(trial, bucket)
    backup_database.fn(NAME)
    [first] = names(trial)
    monkeypatch.setattr(objects, "SMALL_BYTES", 1000)
    store = store_of(trial.environment, "postgres")
    assert catalogue.open_all(store, "postgres") == ([], [first])
    report = prune_backups.fn(NAME)
    assert any(found.name == "manifests that cannot be read" and found.value == first for found in report.findings)
    before = objects.list_objects(bucket, "")
    with pytest.raises(RunbookFailed, match="manifest of backup_.* 1.0 kB is the most.*store these backups in a dir"):
        backup_database.fn(NAME)
    after = {key for key in set(objects.list_objects(bucket, "")) - set(before) if ".partial-" not in key}
    assert after == set()


@pytest.mark.parametrize("path", ["../../evil", "/tmp/evil", "a/../../evil", "dump//x"])
def test_a_manifest_that_names_what_lies_outside_is_none(trial: Trial, gateway: S3Server, path: str) -> None:
    in_bucket(trial, gateway.bucket())
    killed("receive: begun")
    [name] = waiting_in(trial)
    directory = spool_of(trial) / name
    whole = manifest.read(directory)
    assert manifest.parse(name, manifest.text_of(whole), manifest.seal_of(manifest.text_of(whole))) == whole
    one = next(iter(whole.files.values()))
    for change in ({"files": {path: one}}, {"clear": {path: one}}, {"environment": path}):
        text = manifest.text_of(whole.model_copy(update=change))
        with pytest.raises(VerificationFailed, match="is outside the backup.*forged"):
            manifest.parse(name, text, manifest.seal_of(text))


def test_a_forged_manifest_is_refused_before_it_is_followed(trial: Trial) -> None:
    backup_database.fn(NAME)
    path = trial.store / names(trial)[0]
    reseal(path, lambda content: content["files"].update({"../../evil": {"bytes": 1, "sha256": "0" * 64}}))
    with pytest.raises(RunbookFailed, match="is outside the backup"):
        verify_backup.fn(NAME)


def test_pruning_where_versions_cannot_be_asked_for_is_no_failure(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    backup_database.fn(NAME)
    catalogue.mark_verified.work(DirectoryStore(trial.store), names(trial)[-1], {"by": "test"})
    aged(trial, 40)
    asked = list[int]()
    monkeypatch.setattr(DirectoryStore, "keeps_deleted", lambda store: asked.append(len(store.names())))
    report = prune_backups.fn(NAME, keep_verified=1, **OLDER_THAN_30_DAYS, confirm=NAME)
    assert report.status in GOOD
    assert "1 deleted" in report.outcome
    assert "s3:GetBucketVersioning" in report.outcome
    assert asked == [2], "asked while both were there"


@pytest.mark.parametrize(("name", "said"), [("dump_20260101_000000", "redis"), ("app_20260101_000000", "files")])
def test_a_backup_of_something_else_is_refused_with_what_takes_it(trial: Trial, name: str, said: str) -> None:
    hint = {"redis": "restore-redis restores it", "files": "restore-files restores it"}[said]
    with pytest.raises(RunbookFailed, match=f"{name} is a backup of {said}, not of postgres.*{hint}"):
        restore_database.fn(NAME, backup=name)
    shutil.rmtree(trial.store, ignore_errors=True)
    with pytest.raises(RunbookFailed, match=f"there is no {said} backup “{name}” in .*/{said}. Next: the newest"):
        verify_backup.fn(NAME, backup=name)
