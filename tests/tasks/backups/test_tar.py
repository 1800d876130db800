"""A base backup's tar: a damaged one is not offered, in either form, and this host's own trouble makes no backup bad."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from runbook.errors import OpsError, VerificationFailed
from tasks.backups import codec
from tasks.cluster import unpack as unpacking
from tasks.cluster.catalog import find_in_backup
from tasks.cluster.unpack import BASE, GZIP_BASE, GZIP_WAL, unpack

FILES = {"PG_VERSION": b"1" * 300_000, "base/1/1259": b"row", "global/pg_control": b"control" * 9}
WAL = {"000000010000000000000001": b"record" * 100_000}


def packed(files: Mapping[str, bytes]) -> bytes:
    """A tar, as pg_basebackup writes it."""
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for folder in sorted({name.rpartition("/")[0] for name in files} - {""}):
            for part in (folder.partition("/")[0], folder):
                entry = tarfile.TarInfo(part)
                entry.type, entry.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(entry)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o640
            tar.addfile(entry, io.BytesIO(content))
    return memory.getvalue()


def manifest(files: Mapping[str, bytes]) -> bytes:
    """PostgreSQL's, with its own checksum in the last line."""
    listed = [
        {
            "Path": name,
            "Size": len(content),
            "Checksum-Algorithm": "SHA256",
            "Checksum": hashlib.sha256(content).hexdigest(),
        }
        for name, content in files.items()
    ]
    ranges = [{"Timeline": 1, "Start-LSN": "0/1000028", "End-LSN": "0/1000100"}]
    text = f'{{ "Files": {json.dumps(listed)},\n"WAL-Ranges": {json.dumps(ranges)},\n'.encode()
    return text + b'"Manifest-Checksum": "%s"}\n' % hashlib.sha256(text).hexdigest().encode()


def backup(directory: Path, form: str) -> Path:
    """As it is written now, or as earlier versions wrote it: the WAL in a second tar, both compressed with gzip."""
    directory.mkdir()
    (directory / "backup_manifest").write_bytes(manifest(FILES))
    if form == "zstd":
        own = {"backup_manifest": manifest(FILES), **{f"pg_wal/{name}": content for name, content in WAL.items()}}
        (directory / BASE).write_bytes(codec.compress(packed({**FILES, **own})))
    else:
        import gzip

        (directory / GZIP_BASE).write_bytes(gzip.compress(packed(FILES), 0))
        (directory / GZIP_WAL).write_bytes(gzip.compress(packed(WAL), 0))
    return directory


@pytest.mark.parametrize("form", ["zstd", "gzip"])
def test_a_whole_one_is_unpacked_and_a_damaged_one_is_not_whole(tmp_path: Path, form: str) -> None:
    source, data = backup(tmp_path / "backup", form), tmp_path / "data"
    unpack(source, data)
    found = {path.relative_to(data).as_posix(): path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert found == FILES | {f"pg_wal/{name}": content for name, content in WAL.items()}
    assert (data / "PG_VERSION").stat().st_mode & 0o777 == 0o640
    unpack(source, tmp_path / "part", wal=False)
    assert list((tmp_path / "part" / "pg_wal").iterdir()) == [], "the WAL of a part is not needed"
    archive = source / (BASE if form == "zstd" else GZIP_BASE)
    content = archive.read_bytes()
    half, middle = len(content) // 2, bytes([content[-30] ^ 1])
    damages = (content[:half], b"x" * 1000, content[:-30] + middle + content[-29:], content[:-1])
    for number, damaged in enumerate(damages):
        archive.write_bytes(damaged)
        with pytest.raises(VerificationFailed, match="cannot be unpacked: "):
            unpack(source, tmp_path / f"data-{number}")
    with pytest.raises(VerificationFailed, match="the catalog of b cannot be read"):
        find_in_backup(source, "grc", "users", tmp_path, "b")


@pytest.mark.parametrize(
    ("altered", "why"),
    [
        ({"base/1/1259": b"raw"}, "base/1/1259 differs from backup_manifest"),
        ({"base/1/1259": None}, "base/1/1259 is missing"),
        ({"base/1/9": b"x"}, "base/1/9 is not in backup_manifest"),
        ({"../outside": b"x"}, r"\.\. does not belong into a base backup"),
        ({"backup_manifest": b"{}"}, "backup_manifest cannot be read"),
        ({"backup_manifest": manifest(FILES).replace(b"1259", b"1258")}, "backup_manifest is damaged"),
    ],
)
def test_a_file_that_differs_from_postgresql_s_manifest_is_found(
    tmp_path: Path, altered: dict[str, bytes | None], why: str
) -> None:
    """Its own checksum is right: PostgreSQL's manifest alone shows the difference."""
    source = backup(tmp_path / "backup", "zstd")
    files = {name: content for name, content in {**FILES, **altered}.items() if content is not None}
    (source / "backup_manifest").write_bytes(files.pop("backup_manifest", manifest(FILES)))
    (source / BASE).write_bytes(codec.compress(packed(files)))
    with pytest.raises(VerificationFailed, match=why):
        unpack(source, tmp_path / "data")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("trouble", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EMFILE])
def test_this_host_s_own_trouble_makes_no_backup_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: int
) -> None:
    """A stand-in for the disk: no test may fill this host's."""

    class Disk(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(trouble, "no")

    monkeypatch.setattr(unpacking.inside, "creating", lambda *_: Disk())
    source = backup(tmp_path / "backup", "zstd")
    (source / BASE).write_bytes(codec.compress(packed({**FILES, "global/pg_filenode.map": b"x"})))
    for work in (
        lambda: unpack(source, tmp_path / "data"),
        lambda: find_in_backup(source, "grc", "users", tmp_path, "b"),
    ):
        with pytest.raises(OpsError, match="no") as error:
            work()
        assert not isinstance(error.value, VerificationFailed)
        assert "free disk space" in error.value.hint
