"""Decompression bombs in stores: a few kilobytes that become gigabytes. Each decompression ends at the expected size."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import resource
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from runbook.errors import VerificationFailed
from tasks.backups import codec
from tasks.backups.archive import compare_members
from tasks.backups.archive import unpack as unpack_files
from tasks.backups.encryption import Key
from tasks.backups.entries import ArchiveEntry
from tasks.cluster.unpack import BASE
from tasks.cluster.unpack import unpack as unpack_cluster
from tasks.pgbackrest.repository import Repository, RepositoryArchive
from tasks.postgres.dump import compression
from tasks.redis.content.manifest import EXPIRING, RedisContent, RedisDatabaseContent, lines_of
from tasks.wal.archive.archive import Archive, StoredSegment
from tasks.wal.archive.place import DirectoryPlace
from tests.tasks.backups.test_tar import FILES, backup, manifest

BLOCK = bytes(64 << 20)
BLOCKS = 32
BYTES = BLOCKS * len(BLOCK)
"""2 GiB."""
MOST_GROWTH_KB = 400 << 10
SEGMENT = "000000010000000000000003"
PACK: dict[str, Callable[[bytes], bytes]] = {"zst": codec.compress, "gz": lambda content: gzip.compress(content, 1)}


@pytest.fixture(autouse=True)
def small_memory() -> Iterator[None]:
    """A bomb that goes off in memory is seen."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_GROWTH_KB


def bomb(form: str) -> bytes:
    """Frames, or members, one behind the other."""
    packed = PACK[form](BLOCK) * BLOCKS
    assert len(packed) < BYTES / 200
    return packed


@pytest.mark.parametrize("form", PACK)
def test_content_ends_at_its_expected_size(form: str) -> None:
    packed = bomb(form)
    with pytest.raises(codec.Oversized, match="larger than the expected 1,000 bytes"):
        codec.decompress(packed, 1000)
    with codec.reader(io.BytesIO(packed), 1000) as stream:
        assert stream.read(1000) == bytes(1000)
        with pytest.raises(codec.Oversized):
            stream.read(1)


@pytest.mark.parametrize("of", [SEGMENT, "00000002.history"])
@pytest.mark.parametrize("form", PACK)
def test_archived_wal(tmp_path: Path, form: str, of: str) -> None:
    """Its name has the SHA-256 of what it becomes: whoever writes to the store can compute that too."""
    archive, digest = Archive(DirectoryPlace(tmp_path), Key(())), hashlib.sha256()
    for _ in range(BLOCKS):
        digest.update(BLOCK)
    name = f"{of}-{digest.hexdigest()}.{form}"
    archive.place.put(name, bomb(form))
    with pytest.raises(VerificationFailed, match=rf"^{of} in .* is damaged: its content is larger than the expected 1"):
        archive.get(StoredSegment(name, of, digest.hexdigest(), 0))


@pytest.mark.parametrize(("form", "pack"), [("gz", PACK["gz"]), ("bz2", bz2.compress)])
def test_wal_in_pgbackrest_s_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, pack: Callable[[bytes], bytes]
) -> None:
    """What its repo-get returns is stood in for: pgBackRest stores no bomb."""
    monkeypatch.setattr(Repository, "get", lambda self, name: pack(BLOCK) * BLOCKS)
    place = Repository(Wal.model_construct(stanza="main"), Postgres.model_construct())
    name, digest = f"18-1/{SEGMENT[:16]}/{SEGMENT}-{'0' * 40}.{form}", "0" * 40
    with pytest.raises(VerificationFailed, match=r"is damaged: its content is larger than the expected 16,777,"):
        RepositoryArchive(place, Key(())).get(StoredSegment(name, SEGMENT, digest, 0))


def header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o640
    return member.tobuf(tarfile.USTAR_FORMAT)


def endless(path: Path, name: str) -> None:
    """A tar whose member has 2 GiB of zeros."""
    path.write_bytes(codec.compress(header(name, BYTES)) + bomb("zst") + codec.compress(bytes(1024)))


@pytest.mark.parametrize("name", ["base/1/1259", "pg_wal/000000010000000000000001", "base/1/9"])
def test_a_base_backup(tmp_path: Path, name: str) -> None:
    source = backup(tmp_path / "backup", "zstd")
    endless(source / BASE, name)
    (source / "backup_manifest").write_bytes(manifest(FILES))
    (tmp_path / "data" / name).parent.mkdir(parents=True)
    with pytest.raises(VerificationFailed, match=rf"^{name} has 2,147,483,648 bytes, expected were at most "):
        unpack_cluster(source, tmp_path / "data")
    assert not (tmp_path / "data" / name).exists()


def test_the_files_of_an_application(tmp_path: Path) -> None:
    root = ArchiveEntry(path=".", kind="directory", mode=0o755, uid=0, gid=0, user="root", group="root")
    file = root.model_copy(update={"path": "main.py", "kind": "file", "size": 5, "sha256": "0" * 64})
    member = tarfile.TarInfo(".")
    member.type = tarfile.DIRTYPE
    path = tmp_path / "files.tar.zst"
    endless(path, "main.py")
    path.write_bytes(codec.compress(member.tobuf()) + path.read_bytes())
    sentence = "files.tar.zst cannot be read to its end: its content is larger than the expected 65,541 bytes"
    with pytest.raises(VerificationFailed, match=sentence):
        unpack_files(path, tmp_path / "copy", [root, file])
    assert sum(one.stat().st_size for one in tmp_path.rglob("*.py")) < 1 << 20
    assert sentence in compare_members(path, [root, file])


def test_a_list_of_expiring_keys(tmp_path: Path) -> None:
    database = RedisDatabaseContent.model_construct(expiring_keys=2, expiring_fields=0)
    content = RedisContent.model_construct(databases={0: database})
    sidecar = tmp_path / EXPIRING
    sidecar.write_bytes(bomb("zst"))
    with pytest.raises(VerificationFailed, match="is damaged: its content is larger than the expected 768 bytes"):
        list(lines_of(sidecar, content))


def test_a_dump_that_is_unpacked_for_pg_restore(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "must_be_unpacked", lambda *_: True)
    dump = tmp_path / "dump"
    dump.mkdir()
    (dump / "7.dat.zst").write_bytes(bomb("zst"))
    with (
        pytest.raises(
            VerificationFailed, match="7.dat.zst is damaged: its content is larger than the expected 1,000,000"
        ),
        compression.readable(Postgres.model_construct(), dump, tmp_path / "plain", 1, 1_000_000),
    ):
        pass
