"""The second place of all backups: filled with proven copies only, whatever is killed, away, refused or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from flows.database.backup import backup_database, verify_backup
from flows.database.copies import replicate_backups
from flows.database.restore import restore_database
from runbook.errors import OpsError, RunbookFailed
from runbook.files import inside
from tasks.backups import catalogue, replicas
from tasks.host.disk import Disk
from tasks.stores import bucket as bucket_store
from tasks.stores.store import store_of
from tests.database.conftest import NAME, Trial
from tests.database.places import configure, encrypted, in_bucket, killed, names, spool_of, spooled
from tests.database.restore.test_restore import GOOD, flip
from tests.s3.proxy import Proxy
from tests.s3.servers import S3Server


def test_copies_in_another_place_restore_when_the_first_is_gone(trial: Trial, gateway: S3Server) -> None:
    encrypted(trial)
    in_bucket(trial, gateway.bucket("osaka"), "copies", identity_env="TRIAL_IDENTITY")
    backup_database.fn(NAME)
    backup_database.fn(NAME, kind="schema")
    report = replicate_backups.fn(NAME)
    assert report.status in GOOD
    assert report.outcome.startswith("2 copied")
    assert names(trial, "copies") == names(trial)
    verify_backup.fn(NAME)
    again = replicate_backups.fn(NAME, read="all")
    assert again.outcome == "every backup has a copy"
    copy = catalogue.open_backup(store_of(trial.environment, "postgres", "copies"), names(trial, "copies")[0])
    assert copy.verified, "proven of the same bytes"
    shutil.rmtree(trial.store)
    trial.sql("DELETE FROM answers")
    assert restore_database.fn(NAME, source="copies", confirm=NAME).status in GOOD
    assert trial.sql("SELECT count(*) FROM answers") == [(500,)]


def test_a_bad_backup_is_not_copied_and_a_bad_copy_is_found(trial: Trial) -> None:
    configure(trial, "copies", postgres=str(trial.store.parent / "copies"))
    backup_database.fn(NAME)
    bad = names(trial)[-1]
    backup_database.fn(NAME)
    good = names(trial)[-1]
    flip(max((trial.store / bad / "dump").iterdir(), key=lambda path: path.stat().st_size))
    with pytest.raises(RunbookFailed, match=f"copy of {bad}.*SHA-256"):
        replicate_backups.fn(NAME)
    assert names(trial, "copies") == [good], "one bad backup keeps no other from being copied"
    shutil.rmtree(trial.store / bad)
    copies = trial.store.parent / "copies"
    flip(max((copies / good / "dump").iterdir(), key=lambda path: path.stat().st_size))
    assert replicate_backups.fn(NAME).status in GOOD, "only what is new is read by default"
    with pytest.raises(RunbookFailed, match="copies of postgres.*SHA-256"):
        replicate_backups.fn(NAME, read="all")


def largest_file(directory: Path) -> Path:
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_copying_is_killed_and_goes_on(trial: Trial, gateway: S3Server) -> None:
    with Proxy(gateway.port) as proxy:
        in_bucket(trial, gateway.bucket(endpoint=proxy.endpoint), "copies")
        # More than the requests themselves take, which the proxy counts too.
        trial.sql("CREATE TABLE bulk AS SELECT n, md5(random()::text) AS text FROM generate_series(1, 20000) n")
        backup_database.fn(NAME)
        for point in ("receive: begun", "receive: files sent", "after copy_backup"):
            killed(point, "flows.database.copies.replicate_backups")
            assert names(trial, "copies") == [], f"{point}: nobody has read it back"
        before, whole = proxy.sent_bytes, catalogue.find_backup(store_of(trial.environment, "postgres"), "postgres")
        killed("receive: offered", "flows.database.copies.replicate_backups")
        assert names(trial, "copies") == names(trial), "it has its name: it was read back"
        texts = sum((whole.path / name).stat().st_size for name in ("manifest.json", "manifest.json.sha256"))
        assert proxy.sent_bytes - before < texts + whole.manifest.bytes / 2, "what was there is not sent again"
        assert replicate_backups.fn(NAME).status in GOOD
        store = store_of(trial.environment, "postgres", "copies")
        assert store.unfinished(NAME) == []


def test_a_copy_that_nobody_has_read_back_is_read_before_it_has_its_name(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket(), "copies")
    backup_database.fn(NAME)
    [name] = names(trial)
    killed("after copy_backup", "flows.database.copies.replicate_backups")
    gateway.flip_stored_byte((trial.store / name / "dump" / "toc.dat").read_bytes())
    with pytest.raises(
        RunbookFailed, match=f"copy of {name}.*is damaged.*SHA-256.*run it again: the damaged copy was deleted"
    ):
        replicate_backups.fn(NAME)
    assert names(trial, "copies") == []
    assert replicate_backups.fn(NAME).status in GOOD
    assert names(trial, "copies") == [name]


def copy_in(trial: Trial) -> catalogue.Backup:
    store = store_of(trial.environment, "postgres", "copies")
    return catalogue.open_backup(store, names(trial, "copies")[0])


def in_directory(trial: Trial) -> Path:
    """A second place in a directory."""
    place = trial.store.parent / "copies"
    configure(trial, "copies", postgres=str(place), redis=f"{place}-redis", files=f"{place}-files")
    return place


def test_a_copy_goes_bad_before_its_backup_is_verified(trial: Trial) -> None:
    """What is true of the backup is true of the copy's bytes, not of what its disk made of them."""
    copies = in_directory(trial)
    backup_database.fn(NAME)
    replicate_backups.fn(NAME)
    verify_backup.fn(NAME)
    flip(largest_file(copies / names(trial)[0] / "dump"))
    with pytest.raises(RunbookFailed, match="existing copies of postgres.*SHA-256"):
        replicate_backups.fn(NAME)
    for read in ("new", "all", "new"):
        assert not copy_in(trial).verified
        if read == "all":
            with pytest.raises(RunbookFailed, match="SHA-256"):
                replicate_backups.fn(NAME, read="all")
            continue
        report = replicate_backups.fn(NAME)
        [known] = [found for found in report.findings if found.name == f"copy of {names(trial)[0]}"]
        assert (known.status, known.value[:26]) == ("WARN", "failed its verification: 2")
    shutil.rmtree(copies / names(trial)[0])
    report = replicate_backups.fn(NAME)
    assert not any(found.name.startswith("copy of") for found in report.findings)
    assert copy_in(trial).verified, "made anew, and read back"


def test_a_copy_that_was_verified_goes_bad(trial: Trial) -> None:
    copies = in_directory(trial)
    backup_database.fn(NAME)
    verify_backup.fn(NAME)
    replicate_backups.fn(NAME)
    assert copy_in(trial).verified
    flip(largest_file(copies / names(trial)[0] / "dump"))
    with pytest.raises(RunbookFailed, match="SHA-256"):
        replicate_backups.fn(NAME, read="all")
    assert not copy_in(trial).verified, "also not in the run that found it"
    replicate_backups.fn(NAME)
    assert not copy_in(trial).verified


def test_what_waits_for_the_first_place_does_not_go_to_the_second(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    in_bucket(trial, gateway.bucket("osaka"), "copies")
    killed("receive: begun")
    waiting = [name for name in spooled(trial) if name.startswith("backup_")]
    assert len(waiting) == 1
    replicate_backups.fn(NAME)
    assert (names(trial), names(trial, "copies"), spooled(trial)) == ([], [], waiting)
    backup_database.fn(NAME)
    assert names(trial)[0] == waiting[0]
    assert len(names(trial)) == 2
    assert replicate_backups.fn(NAME).outcome.startswith("2 copied")
    assert names(trial, "copies") == names(trial)
    assert (spooled(trial), spooled(trial, "copies")) == ([], []), "nothing is on its way any more"


def test_a_disk_that_does_not_give_a_file_back_keeps_no_other_backup_from_being_copied(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_directory(trial)
    backup_database.fn(NAME)
    backup_database.fn(NAME)
    bad, good = names(trial)
    sector = largest_file(trial.store / bad)
    copy = inside.copy

    def broken(source: Path, target: Path) -> None:
        if source == sector:
            raise OSError(5, "Input/output error", str(source))
        copy(source, target)

    monkeypatch.setattr(inside, "copy", broken)
    with pytest.raises(RunbookFailed, match=f"copy of {bad}: {sector}: .*Input/output error.*free disk space"):
        replicate_backups.fn(NAME)
    assert names(trial, "copies") == [good]


def test_on_its_way_from_a_bucket_it_is_gone_on_with(
    trial: Trial, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(gateway.port) as proxy:
        in_bucket(trial, gateway.bucket(endpoint=proxy.endpoint))
        in_directory(trial)
        backup_database.fn(NAME)
        [name] = names(trial)
        monkeypatch.setattr("runbook.kinds.RETRY_DELAYS_SECONDS", [])
        whole = catalogue.find_backup(store_of(trial.environment, "postgres"), "postgres").manifest
        download = bucket_store.download_file
        reached = []

        def away(*arguments: object, **more: object) -> None:
            reached.append(arguments[1])
            if len(reached) > len(whole.files) - 2:
                proxy.cut_answers(after_bytes=1, times=-1)
            download(*arguments, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(bucket_store, "download_file", away)
        with pytest.raises(RunbookFailed, match="did not happen within"):
            replicate_backups.fn(NAME)
        assert spooled(trial) == [f".transit-{name}"]
        proxy.heal()
        reached.clear()
        monkeypatch.setattr(bucket_store, "download_file", lambda *a, **m: (reached.append(a[1]), download(*a, **m)))
        assert replicate_backups.fn(NAME).status in GOOD
        assert len(reached) == 2, "the others were here"
        assert (names(trial, "copies"), spooled(trial)) == ([name], [])


def test_on_its_way_it_is_removed_where_nobody_wants_it_any_more(
    trial: Trial, gateway: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = gateway.bucket()
    in_bucket(trial, bucket)
    in_directory(trial)
    backup_database.fn(NAME)
    [name] = names(trial)
    kept = spool_of(trial) / f".transit-{name}"
    for path in (kept, spool_of(trial) / ".transit-backup_20200101_000000"):
        path.mkdir()
    backup_database.fn(NAME)
    assert spooled(trial) == [kept.name], "its backup is there, and may still be copied"
    with monkeypatch.context() as full:
        full.setattr(replicas, "disk_of", lambda path: Disk(str(path), 1 << 30, 1000, 0))
        with pytest.raises(RunbookFailed, match="on its way in .* and 1.0 kB are free.*spool"):
            replicate_backups.fn(NAME)
    assert replicate_backups.fn(NAME).status in GOOD
    kept.mkdir()
    assert replicate_backups.fn(NAME).outcome == "every backup has a copy"
    assert spooled(trial) == []


def test_there_must_be_a_second_place(trial: Trial) -> None:
    with pytest.raises(RunbookFailed, match="no replica store.*add \\[copies\\]"):
        replicate_backups.fn(NAME)
    configure(trial, "copies", postgres=str(trial.store), redis="/nowhere/r", files="/nowhere/f")
    with pytest.raises(OpsError, match="a separate directory: \\[backups\\] postgres uses this one"):
        replicate_backups.fn(NAME)


def test_copies_killed_at_their_end_survive_becoming_the_first_place(trial: Trial, gateway: S3Server) -> None:
    bucket = gateway.bucket()
    in_bucket(trial, bucket, "copies")
    backup_database.fn(NAME)
    killed("receive: offered", "flows.database.copies.replicate_backups")
    [copy] = names(trial, "copies")
    shutil.rmtree(trial.store)
    in_bucket(trial, bucket)
    backup_database.fn(NAME)
    assert copy in names(trial)


def test_a_second_place_is_tidied_and_a_copy_without_manifest_told(trial: Trial) -> None:
    copies = trial.store.parent / "copies"
    configure(trial, "copies", postgres=str(copies))
    backup_database.fn(NAME)
    killed("receive: copied", "flows.database.copies.replicate_backups")
    assert list(copies.glob(".partial-*"))
    [name] = names(trial)
    shutil.copytree(trial.store / name, copies / name)
    (copies / name / "manifest.json").unlink()
    backup_database.fn(NAME)
    with pytest.raises(RunbookFailed, match=f"copy of {name}: its manifest cannot be read.*move it out"):
        replicate_backups.fn(NAME)
    assert not list(copies.glob(".partial-*"))
    assert len(list(copies.iterdir())) == 2, "one bad copy keeps no other from being made"
    shutil.rmtree(copies / name)
    assert replicate_backups.fn(NAME).status in GOOD
    assert names(trial, "copies") == names(trial)
