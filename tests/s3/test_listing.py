"""What a large store costs: counted as requests that the server answered, not as time."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic_core import PydanticSerializationError

from runbook.current import use_report
from runbook.errors import VerificationFailed
from runbook.report import Report
from tasks.backups import catalogue, heads, retention
from tasks.backups import manifest as manifests
from tasks.backups.encryption import NO_KEY
from tasks.backups.manifest import MANIFEST, SEAL, FileSum, Listed, Manifest, seal_of, text_of
from tasks.stores.bucket import BucketStore
from tests.s3.servers import S3Server

BACKUPS, TABLES = 130, 6
FILES = {f"data/{table}.dat": FileSum(bytes=1, sha256=hashlib.sha256(b"x").hexdigest()) for table in range(TABLES)}
FIRST = datetime(2026, 2, 1, 2, tzinfo=UTC)


class Requests:
    """What moto wrote into its log since the last look, of one bucket."""

    def __init__(self, server: S3Server, bucket: str) -> None:
        self.log, self.bucket = server.root / "server.log", bucket
        self.at = self.log.stat().st_size

    def since(self) -> Counter[str]:
        with self.log.open("rb") as log:
            log.seek(self.at)
            text = log.read().decode(errors="replace")
            self.at = log.tell()
        found = re.findall(rf'"(GET|HEAD) /{self.bucket}(/?\?[^ ]*|/[^ ]*) HTTP', text)
        return Counter("list" if "list-type" in path else "read" for _, path in found)


def fill(store: BucketStore) -> list[str]:
    """Offered backups, as `offer` leaves them."""
    client, bucket = store.bucket.client(), store.bucket

    def put(number: int) -> str:
        taken = FIRST + timedelta(hours=number)
        name = f"backup_{taken:%Y%m%d_%H%M%S}"
        manifest = Manifest(
            kind="postgres",
            name=name,
            environment="other" if number % 10 == 9 else "trial",
            taken=taken,
            seconds=1.0,
            host="db",
            tool="pg_dump",
            files=FILES,
            content={},
        )
        text = text_of(manifest)
        for path in (*(f"data/{table}.dat" for table in range(TABLES)), SEAL, MANIFEST):
            content = {SEAL: seal_of(text), MANIFEST: text}.get(path, "x")
            client.put_object(Bucket=bucket.bucket, Key=bucket.key(f"{name}/{path}"), Body=content.encode())
        return name

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(put, range(BACKUPS)))


def test_a_listing_is_one_pass_and_a_run_reads_each_manifest_once(
    moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More objects than a page of a listing has: one that went over all of them took more pages than that of names.
    Long manifests are kept without what is long in them."""
    bucket = moto.bucket()
    store = BucketStore(bucket, tmp_path, NO_KEY)
    names = fill(store)
    catalogue.mark_verified(store, names[3], {})
    store.write(".partial-trial-backup_20260101_000000", "")  # a send that was killed before its manifest
    store.write("backup_20260101_000000/data/0.dat", "x")
    store.write("backup_20270101_000000/data/0.dat", "x")  # somebody's own copy, without a manifest
    asked = Requests(moto, bucket.bucket)
    assert BACKUPS * (TABLES + 2) > 1000, "the seed is right"
    with use_report(Report("test", "trial")):
        found, unreadable = catalogue.open_all(store, "postgres")
        assert ([one.name for one in found], unreadable) == (names, [])
        assert [one.name for one in found if one.verified] == [names[3]]
        first = asked.since()
        assert first["list"] <= 2, "the names, and the notes"
        assert 2 * BACKUPS <= first["read"] <= 2 * BACKUPS + 8, "manifest and seal, and what is doubtful"
        catalogue.mark_verified(store, names[5], {})
        asked.since()
        found, _ = catalogue.open_all(store, "postgres")
        assert [one.name for one in found if one.verified] == [names[3], names[5]], "a note that changed is read"
        again = asked.since()
        assert again["read"] <= 8, again
        (stored,) = retention.read_stores.work([(store, ("postgres",))], "trial")
        assert isinstance(stored, retention.StoredBackup)
        assert len(stored.backups) == BACKUPS * 9 // 10
        assert asked.since()["read"] <= 8, "several stores at once: the threads share what the run has read"
    with use_report(Report("test", "trial")):
        newest = catalogue.find_backup(store, "postgres", "latest", "trial")
        assert newest.name == names[-2], "the last one is another environment's"
        latest = asked.since()
        assert latest["read"] <= 16, "older ones are not read for the newest"
        assert latest["list"] <= 2
    monkeypatch.setattr(catalogue, "MOST_LETTERS", 0)
    with use_report(Report("test", "trial")):
        for reads in (4 * BACKUPS + 8, 8):  # once: manifest and seal, then the identity that the cache keeps
            long, _ = catalogue.open_all(store, "postgres")
            assert asked.since()["read"] <= reads
            assert [one.verified for one in long] == [one.verified for one in found]
    with use_report(Report("test", "trial")):
        opened = list[str]()
        monkeypatch.setattr(manifests, "parse", lambda name, *_: opened.append(name))
        later, _ = catalogue.open_all(store, "postgres")
        assert [one.manifest for one in later] == [one.manifest for one in long]
        assert not opened, "another run's listing parses no manifest"
        assert asked.since()["read"] <= 8, "they were compared a moment ago"
    monkeypatch.setattr(heads, "TRUSTED_SECONDS", 0)
    with use_report(Report("test", "trial")):
        assert [one.manifest for one in catalogue.open_all(store, "postgres")[0]] == [one.manifest for one in long]
        assert BACKUPS <= asked.since()["read"] <= 2 * BACKUPS + 8, "an identity and a seal each"
        assert not opened
    monkeypatch.undo()
    one = long[3].manifest
    assert isinstance(one, Listed)
    assert (one.bytes, one.is_encrypted, one.taken) == (TABLES, False, found[3].manifest.taken)
    assert not asked.since(), "what a listing shows is at hand"
    assert one.files == FILES
    assert 0 < asked.since()["read"] <= 4, "the rest is read when it is used"
    assert one == found[3].manifest != long[4].manifest
    with pytest.raises(PydanticSerializationError, match="write whole"):
        text_of(one)
    altered = text_of(one.whole()).replace("pg_dump", "pg-dump")
    store.write(f"{names[3]}/{MANIFEST}", altered)
    store.write(f"{names[3]}/{SEAL}", seal_of(altered))
    with pytest.raises(VerificationFailed, match="is not the backup that was listed"):
        one.files  # noqa: B018
    monkeypatch.setattr(catalogue, "MOST_LETTERS", 0)
    with use_report(Report("test", "trial")):
        assert catalogue.open_all(store, "postgres")[0][3].manifest.tool == "pg-dump", "the next listing reads it again"
