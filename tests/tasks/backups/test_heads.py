"""The cache of long manifests' heads: it saves parsing, and nothing that a restore or a deletion needs trusts it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from runbook.errors import VerificationFailed
from tasks.backups import catalogue, fetched_files, heads, manifest, retention
from tasks.backups.manifest import MANIFEST, SEAL, FileSum, Manifest
from tasks.stores import directory
from tasks.stores.directory import DirectoryStore

FIRST = datetime(2026, 2, 1, 2, tzinfo=UTC)
BACKUPS, TABLES = 12, 300


def fill(store: DirectoryStore, number: int = BACKUPS, tables: int = TABLES) -> list[str]:
    names = []
    for hour in range(number):
        taken = FIRST + timedelta(hours=hour)
        names.append(f"backup_{taken:%Y%m%d_%H%M%S}")
        one = Manifest(
            kind="postgres",
            name=names[-1],
            environment="trial",
            taken=taken,
            seconds=1.0,
            host="db",
            tool="pg_dump",
            files={"x": FileSum(bytes=1, sha256=hashlib.sha256(b"x").hexdigest())},
            content={"tables": {f"public.t{table:05}": {"rows": 5, "hash": "0" * 19} for table in range(tables)}},
        )
        path = store.path / one.name
        path.mkdir(parents=True)
        (path / "x").write_text("x")
        manifest.write(path, one)
    return names


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DirectoryStore:
    monkeypatch.setattr(directory, "SETTLED_SECONDS", 0.0)
    monkeypatch.setattr(catalogue, "MOST_LETTERS", 1000)
    monkeypatch.setattr(manifest, "SHORT_ENTRIES", 0)
    return DirectoryStore(tmp_path / "store", hand=tmp_path / "spool")


class Parsed:
    """The manifests that were parsed since the last look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names, parse = list[str](), manifest.parse

        def counted(name: str, text: str | None, seal: str | None) -> Manifest:
            self.names.append(name)
            return parse(name, text, seal)

        monkeypatch.setattr(manifest, "parse", counted)

    def since(self) -> list[str]:
        found, self.names = sorted(self.names), []
        return found


def listed(store: DirectoryStore) -> tuple[list[str], list[str]]:
    found, unreadable = catalogue.open_all(store, "postgres")
    assert all(one.manifest.kind == "postgres" and one.manifest.bytes == 1 for one in found)
    return [one.name for one in found], unreadable


def test_the_second_listing_parses_no_manifest_and_a_changed_file_is_read_again(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, parsed = fill(store), Parsed(monkeypatch)
    cache = store.hands / heads.FILE
    for expected in (names, []):
        assert listed(store) == (names, [])
        assert parsed.since() == expected
    assert cache.stat().st_mode & 0o777 == 0o600
    # One manifest altered in place with its size and time kept, one with its seal, one seal alone, one missing.
    altered, sealed, bare, missing = names[2:6]
    for name in (altered, sealed):
        path = store.path / name / MANIFEST
        was, text = path.stat(), path.read_text().replace("pg_dump", "pg_damp")
        path.write_text(text)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        if name == sealed:
            (store.path / name / SEAL).write_text(manifest.seal_of(text))
    (store.path / bare / SEAL).unlink()
    (store.path / missing / MANIFEST).unlink()
    found, unreadable = catalogue.open_all(store, "postgres")
    assert unreadable == [altered, bare, missing]
    assert [one.manifest.tool for one in found if one.name == sealed] == ["pg_damp"]
    assert parsed.since() == [altered, sealed, bare, missing]
    # A file that is too young may change again within the same tick: it is not kept.
    monkeypatch.setattr(directory, "SETTLED_SECONDS", 3600.0)
    assert len(listed(store)[0]) == BACKUPS - 3
    assert len(parsed.since()) == BACKUPS


def rewritten(cache: Path, **changes: object) -> None:
    """A forged cache whose own digest is right."""
    content = json.loads(cache.read_text().partition("\n")[2])
    for head in content["heads"].values():
        head["head"].update(changes)
    text = json.dumps(content)
    cache.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def test_a_damaged_or_foreign_cache_is_ignored(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    names, parsed = fill(store), Parsed(monkeypatch)
    listed(store)
    cache = store.hands / heads.FILE
    good, elsewhere = cache.read_bytes(), store.hands / "elsewhere"
    assert parsed.since() == names
    _, _, text = good.partition(b"\n")

    def spoiled(number: int) -> None:
        match number:
            case 0:
                cache.write_bytes(good.replace(b"trial", b"other"))  # the digest is wrong
            case 1:
                cache.write_bytes(good[: len(good) // 2])
            case 2:
                cache.write_bytes(b"")
            case 3:  # another store's, or another format's
                other = text.replace(str(store.path).encode(), b"/other/store")
                cache.write_bytes(hashlib.sha256(other).hexdigest().encode() + b"\n" + other)
            case 4:
                other = text.replace(b'"format":2', b'"format":1')
                cache.write_bytes(hashlib.sha256(other).hexdigest().encode() + b"\n" + other)
            case 5:
                cache.chmod(0o640)  # another user could have written it, or its group reads it
            case 6:
                cache.rename(elsewhere)
                cache.symlink_to(elsewhere)
            case 7:
                cache.unlink()
                os.mkfifo(cache)
            case 8:
                monkeypatch.setattr(heads, "MOST_BYTES", 100)

    for number in range(9):
        cache.unlink(missing_ok=True)
        cache.write_bytes(good)
        cache.chmod(0o600)
        spoiled(number)
        assert listed(store) == (names, []), number
        assert parsed.since() == names, number


def test_a_forged_head_proves_and_deletes_nothing(store: DirectoryStore) -> None:
    names = fill(store)
    listed(store)
    rewritten(store.hands / heads.FILE, environment="trial ", taken="2020-01-01T00:00:00Z")
    found, _ = catalogue.open_all(store, "postgres")
    forged = found[0]
    assert forged.manifest.taken.year == 2020, "the seed is right"
    with pytest.raises(VerificationFailed, match="is not the backup that was listed"):
        fetched_files.verify_files.work(forged)
    with pytest.raises(VerificationFailed, match="is not the backup that was listed"):
        catalogue.find_nearest.work(store, "postgres", FIRST, "trial ")
    with pytest.raises(VerificationFailed, match="is not the backup that was listed"):
        retention.delete_backups.work("trial", [forged])
    assert store.names().count(names[0]) == 1
    newest = catalogue.find_backup.work(store, "postgres", "latest", "trial")
    assert (newest.name, newest.manifest.environment) == (names[-1], "trial"), "what is restored is read itself"


def test_several_workers_share_the_cache_and_it_follows_the_store(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, parsed = fill(store), Parsed(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        assert all(found == (names, []) for found in pool.map(lambda _: listed(store), range(4)))
    parsed.since()
    assert listed(store) == (names, [])
    assert not parsed.since()
    assert [path.name for path in store.hands.iterdir()] == [heads.FILE], "nothing is left of the writing"
    for name in names[:3]:
        store.remove("trial", name)
    (new,) = fill(DirectoryStore(store.path / "new"), 1)
    (store.path / "new" / new).rename(store.path / new)
    listed(store)
    assert parsed.since() == [new]
    assert sorted(json.loads((store.hands / heads.FILE).read_text().partition("\n")[2])["heads"]) == [new, *names[3:]]
    store.hands.chmod(0o500)  # a cache that cannot be written costs time, and nothing else
    assert listed(store)[1] == []
    store.hands.chmod(0o700)


@pytest.mark.soak
def test_a_thousand_backups_of_ten_thousand_tables_are_listed_within_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes for the first listing of a host, seconds for every other one."""
    monkeypatch.setattr(directory, "SETTLED_SECONDS", 0.0)
    store = DirectoryStore(tmp_path / "store", hand=tmp_path / "spool")
    names = fill(store, 1000, 10_000)
    took = []
    for _ in range(2):
        began = time.process_time()
        assert [one.name for one in catalogue.open_all(store, "postgres")[0]] == names
        took.append(time.process_time() - began)
    assert took[1] < min(5.0, took[0] / 5), took
