"""Backups of the database in buckets and encrypted: over real HTTP, with real faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from pyrage import x25519

from flows.database.backup import backup_database, prune_backups, verify_backup
from flows.database.restore import restore_database
from runbook.errors import RunbookFailed, VerificationFailed
from tasks.backups import catalogue, manifest
from tasks.backups.retention import delete_backups
from tasks.s3 import objects
from tasks.stores.store import store_of
from tests.database.conftest import ESCROWED, NAME, Trial
from tests.database.places import configure, encrypted, in_bucket, killed, names, spool_of, spooled
from tests.database.restore.test_restore import GOOD, flip
from tests.s3.proxy import Proxy
from tests.s3.servers import SECRET_KEY, S3Server


@pytest.mark.parametrize("kind", ["gateway", "moto"])
def test_a_bucket_is_a_store_like_any_other(trial: Trial, request: pytest.FixtureRequest, kind: str) -> None:
    server: S3Server = request.getfixturevalue(kind)
    in_bucket(trial, server.bucket("deep/place"))
    report = backup_database.fn(NAME)
    assert report.status in GOOD
    assert names(trial) == [report.facts["backup"]]
    assert spooled(trial) == [], "it is in the bucket and nowhere else"
    assert verify_backup.fn(NAME).status in GOOD
    trial.sql("DELETE FROM answers")
    assert restore_database.fn(NAME).status == "PLANNED"
    assert restore_database.fn(NAME, confirm=NAME).status in GOOD
    assert trial.sql("SELECT count(*) FROM answers") == [(500,)]
    store = store_of(trial.environment, "postgres")
    assert catalogue.open_backup(store, names(trial)[0]).verified
    assert spooled(trial) == []
    assert prune_backups.fn(NAME, confirm=NAME).outcome == "nothing to delete"


@pytest.mark.parametrize("point", ["publish: sealed", "receive: begun", "receive: files sent", "receive: offered"])
def test_killed_while_it_is_sent_it_waits_and_goes_with_the_next(trial: Trial, gateway: S3Server, point: str) -> None:
    in_bucket(trial, gateway.bucket())
    killed(point)
    offered = names(trial)
    assert len(offered) == (point == "receive: offered")
    report = backup_database.fn(NAME)
    expected = 1 if point == "publish: sealed" else 2
    assert len(names(trial)) == expected, "one that was whole is sent now"
    assert names(trial)[-1] == report.facts["backup"]
    for name in names(trial):
        assert verify_backup.fn(NAME, backup=name).status in GOOD
    assert spooled(trial) == []
    store = store_of(trial.environment, "postgres")
    assert store.unfinished(NAME) == []


def test_a_store_that_is_away_loses_nothing(trial: Trial, gateway: S3Server) -> None:
    with Proxy(gateway.port) as proxy:
        in_bucket(trial, gateway.bucket(endpoint=proxy.endpoint))
        backup_database.fn(NAME)
        first = names(trial)
        proxy.answer(503, "SlowDown", times=3)
        backup_database.fn(NAME)
        assert len(names(trial)) == 2, "throttled, and still there"
        proxy.cut_requests(after_bytes=30_000, times=-1)
        with pytest.raises(RunbookFailed, match="in s3://.*run it again"):
            backup_database.fn(NAME)
        proxy.heal()
        assert len(names(trial)) == 2
        waiting = [name for name in spooled(trial) if name.startswith("backup_")]
        backup_database.fn(NAME)
        assert len(names(trial)) == 4, f"{first} and the one that waited: {waiting}"
        assert spooled(trial) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"access_key": "nobody"}, "access key is unknown.*correct the keys"),
        ({"secret_key_env": "TRIAL_PASSWORD"}, "secret key is wrong"),
        ({"postgres": "s3://there-is-none/x"}, "the bucket does not exist.*create it"),
        ({"postgres": "s3:///x"}, "no place in S3"),
    ],
)
def test_a_wrong_store_is_told_before_anything_is_dumped(
    trial: Trial, gateway: S3Server, change: dict[str, str], said: str
) -> None:
    in_bucket(trial, gateway.bucket())
    configure(trial, "backups", **change)
    with pytest.raises(RunbookFailed, match=said) as caught:
        backup_database.fn(NAME)
    assert SECRET_KEY not in str(caught.value)
    assert spooled(trial) == []


def test_an_object_altered_in_place_is_found(trial: Trial, gateway: S3Server) -> None:
    bucket = gateway.bucket()
    in_bucket(trial, bucket)
    report = backup_database.fn(NAME)
    key = max(
        (key for key in objects.list_objects(bucket, "") if "/dump/" in key),
        key=lambda key: objects.list_objects(bucket, "")[key],
    )
    content = bytearray(objects.read_small(bucket, key) or b"")
    content[len(content) // 2] ^= 1
    direct = bucket.client()
    told = direct.head_object(Bucket=bucket.bucket, Key=bucket.key(key))["Metadata"]
    direct.put_object(Bucket=bucket.bucket, Key=bucket.key(key), Body=bytes(content), Metadata=told)
    with pytest.raises(RunbookFailed, match="SHA-256"):
        verify_backup.fn(NAME)
    oid = trial.oid()
    with pytest.raises(RunbookFailed, match="SHA-256"):
        restore_database.fn(NAME, backup=report.facts["backup"], confirm=NAME)
    assert trial.oid() == oid
    assert spooled(trial) == []


@pytest.mark.parametrize(("seconds", "told"), [(90, "behind"), (-90, "ahead of"), (45, "")])
def test_a_bucket_s_clock_that_differs_from_this_host_s_deletes_nothing(
    trial: Trial, gateway: S3Server, seconds: int, told: str
) -> None:
    """The Date of its answers."""
    with Proxy(gateway.port, clock_seconds=seconds) as proxy:
        bucket = gateway.bucket(endpoint=proxy.endpoint)
        in_bucket(trial, bucket)
        if told:
            with pytest.raises(RunbookFailed, match=rf"clock: {told} .*{bucket.bucket}.* by 1 min (29|30|31) s"):
                prune_backups.fn(NAME, confirm=NAME)
        else:
            assert prune_backups.fn(NAME, confirm=NAME).outcome == "nothing to delete"


def test_a_locked_backup_stays_whatever_is_pruned(trial: Trial, moto: S3Server) -> None:
    bucket = moto.bucket(locked=True)
    in_bucket(trial, bucket, lock_mode="COMPLIANCE", lock_days=40, sse="AES256")
    report = backup_database.fn(NAME)
    key = f"postgresql/{report.facts['backup']}/manifest.json"
    head = bucket.client().head_object(Bucket=bucket.bucket, Key=bucket.key(key))
    assert head["ObjectLockMode"] == "COMPLIANCE"
    assert head["ServerSideEncryption"] == "AES256"
    client, place = bucket.client(), {"Bucket": bucket.bucket, "Key": bucket.key(key)}
    with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
        client.delete_object(**place, VersionId=head["VersionId"])
    assert verify_backup.fn(NAME).status in GOOD
    store = store_of(trial.environment, "postgres")
    delete_backups.work(NAME, [catalogue.open_backup(store, names(trial)[0])])
    assert catalogue.open_all(store, "postgres") == ([], []), "out of sight"
    kept = client.get_object(**place, VersionId=head["VersionId"])["Body"].read()
    assert b'"kind": "postgres"' in kept, "and still there"
    assert store.keeps_deleted()


def test_encrypted_on_this_host_and_decrypted_to_verify(trial: Trial) -> None:
    encrypted(trial)
    report = backup_database.fn(NAME, kind="sql")
    assert report.facts["encrypted"] == "to 2 keys"
    store = trial.environment.backups.postgres
    told = [path for path in Path(store).rglob("*") if path.is_file()]
    assert {path.suffix for path in told} == {".age", ".json", ".sha256"}
    assert "候補者".encode() not in b"".join(path.read_bytes() for path in told)
    assert verify_backup.fn(NAME, backup=report.facts["backup"]).status in GOOD
    trial.sql("DELETE FROM answers")
    assert restore_database.fn(NAME, backup=report.facts["backup"], confirm=NAME).status in GOOD
    assert trial.sql("SELECT count(*) FROM answers") == [(500,)]
    assert not list(Path(store).glob(".at-hand-*")), "nothing in clear is left"


def test_the_escrowed_key_reads_what_the_lost_one_wrote(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    encrypted(trial)
    backup_database.fn(NAME)
    stranger = x25519.Identity.generate()
    for identity, said in (("", "this environment has no key"), (str(stranger), "encrypted to other keys")):
        monkeypatch.setenv("TRIAL_IDENTITY", identity)
        with pytest.raises(RunbookFailed, match=said) as caught:
            verify_backup.fn(NAME)
        assert "AGE-SECRET" not in str(caught.value)
    monkeypatch.setenv("TRIAL_IDENTITY", str(ESCROWED))
    assert verify_backup.fn(NAME).status in GOOD
    store = Path(trial.environment.backups.postgres)
    flip(max((path for path in store.rglob("*.age")), key=lambda path: path.stat().st_size))
    with pytest.raises(RunbookFailed, match="SHA-256"):
        verify_backup.fn(NAME)
    assert not list(store.glob(".at-hand-*"))


def test_a_key_of_which_there_is_no_second_and_one_that_does_not_fit_are_told(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted(trial, ESCROWED)
    report = backup_database.fn(NAME)
    bad = {found.name for found in report.findings if found.status == "WARN"}
    assert {"escrowed key", "key of the backups"} <= bad
    configure(trial, "backups", recipients=["age1nonsense"])
    with pytest.raises(RunbookFailed, match="no public key of age"):
        backup_database.fn(NAME)


def test_a_marker_that_was_left_never_takes_an_offered_backup_along(trial: Trial, gateway: S3Server) -> None:
    """Killed after the manifest was written; then the spool is lost with its host."""
    in_bucket(trial, gateway.bucket())
    killed("receive: offered")
    first = names(trial)
    assert len(first) == 1
    shutil.rmtree(trial.reports.parent / "spool")
    backup_database.fn(NAME)
    assert names(trial)[0] == first[0]
    assert len(names(trial)) == 2
    assert store_of(trial.environment, "postgres").unfinished(NAME) == []


def test_killed_while_its_spool_is_emptied_nothing_is_lost_and_nothing_stuck(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    backup_database.fn(NAME)
    spool = spool_of(trial)
    (spool / ".sent-backup_20260101_000000").mkdir()
    backup_database.fn(NAME)
    assert len(names(trial)) == 2
    assert spooled(trial) == []


def test_one_that_was_damaged_while_it_waited_keeps_no_other_from_being_taken(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    killed("receive: begun")
    spool = spool_of(trial)
    [waiting] = [path for path in spool.iterdir() if not path.name.startswith(".")]
    flip(max((waiting / "dump").iterdir(), key=lambda path: path.stat().st_size))
    report = backup_database.fn(NAME)
    assert names(trial) == [report.facts["backup"]]
    assert any("waited to be sent and is damaged" in found.name for found in report.findings)
    assert [path.name for path in spool.iterdir()] == [f".bad-{waiting.name}"]
    again = backup_database.fn(NAME)
    assert len(names(trial)) == 2
    assert not any("damaged" in found.name for found in again.findings)


def test_one_that_was_sent_late_has_its_line_in_the_log(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    killed("receive: begun")
    backup_database.fn(NAME)
    log = Path(trial.environment.logs.backup).read_text()
    assert [log.count(f"Backup completed - {name}") for name in names(trial)] == [1, 1]


def test_environments_in_one_bucket_leave_each_other_alone(trial: Trial, gateway: S3Server) -> None:
    in_bucket(trial, gateway.bucket())
    store = store_of(trial.environment, "postgres")
    name = "backup_20260101_030000"
    assert store.claim(f"{NAME}-eu", name)
    assert store.unfinished(NAME) == []
    assert store.unfinished(f"{NAME}-eu") == [name]
    assert not store.claim("a-first", name), "taken, whoever comes first in the alphabet"
    backup_database.fn(NAME, kind="schema")
    [mine] = catalogue.names(store, "schema")
    sealed = catalogue.open_backup(store, mine).manifest
    other = trial.reports.parent / mine
    other.mkdir()
    manifest.write(other, sealed.model_copy(update={"environment": "staging"}))
    with pytest.raises(VerificationFailed, match=f"another backup of the name {mine}.*its own prefix"):
        store.receive(other, mine, "staging", {})
    assert catalogue.open_backup(store, mine).manifest == sealed
    assert not store.claim("z-last", name), "in the same second: it takes the next one"
    backup_database.fn(NAME)
    assert store.unfinished(f"{NAME}-eu") == [name]


def test_nothing_in_clear_outlives_a_killed_run(trial: Trial) -> None:
    encrypted(trial)
    configure(trial, "backups", spool=str(trial.reports.parent / "spool"))
    backup_database.fn(NAME)
    killed("after verify_files", "flows.database.backup.verify_backup")
    spool = spool_of(trial)
    assert list(spool.glob(".at-hand-*/*/clear/*")), "it was in clear when it was killed"
    assert not list(trial.store.glob(".at-hand-*")), "never in the store itself"
    backup_database.fn(NAME, kind="schema")
    assert not list(spool.glob(".at-hand-*"))


def test_a_backup_that_cannot_be_encrypted_leaves_nothing_in_clear(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    encrypted(trial)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyrage.encrypt_file", full)
    with pytest.raises(RunbookFailed, match="cannot be encrypted: No space left.*free disk space"):
        backup_database.fn(NAME)
    assert not list(trial.store.iterdir())
