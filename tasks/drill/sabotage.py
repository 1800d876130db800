"""Sabotaged copies of backups and archived WAL, for a drill's negative controls: a runbook must refuse them.

The originals are never changed: copies are hard links if possible, and a sabotaged file is always a new file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import re
import shutil
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.errors import OpsError
from tasks.backups import codec
from tasks.backups import manifest as manifests
from tasks.wal.format.names import MOST_SEGMENT_BYTES

_ARCHIVED = re.compile(r"(?P<of>.+)-(?P<sha256>[0-9a-f]{64})(?P<ending>\.(?:zst|gz))")
_UNFINISHED = shutil.ignore_patterns(".writing-*", ".at-hand-*")
_COPIES = 20
_ANY = rb'(?:"(?:[^"]|"")+"|[^",()\s]+)'
NULL = b"\\N"
_READABLE = (codec.ENDING, ".gz", "")


def copy_of(source: Path, target: Path) -> Path:
    """Copy the files of a directory, except those that another run is writing.

    Raises:
        OpsError: they cannot be copied.
    """
    for _ in range(_COPIES):
        try:
            shutil.copytree(source, target, copy_function=_link, ignore=_UNFINISHED)
        except OSError as error:  # shutil.Error is one
            lost = error.args[0] if isinstance(error, shutil.Error) else []
            if not any(not Path(name).exists() for name, *_ in lost):
                raise OpsError(
                    f"{source} cannot be copied to {target}: {str(error)[:200]}", "free disk space there"
                ) from None
            shutil.rmtree(target)  # the unfinished segment was replaced by a longer one
        else:
            return target
    raise OpsError(f"{source} changes while it is copied", "run it again")


def _link(source: str, target: str) -> None:
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copy2(source, target)


def remove_segment(archive: Path, segment: str) -> str:
    """Delete every file of a segment, finished or not."""
    for path in _of_segment(archive, segment):
        path.unlink()
    return f"WAL segment {segment} missing"


def alter_segment(archive: Path, segment: str, offset: int, *, resum: bool) -> str:
    """Change a byte of every file of a segment; with `resum` the SHA-256 in its name is right again, so that only the
    WAL itself shows the damage."""
    for path in _of_segment(archive, segment):
        match = _ARCHIVED.fullmatch(path.name)
        if match is None:
            raise OpsError(
                f"{path.name} is encrypted: it cannot be altered with a right checksum",
                "run the drill in an environment without encryption",
            )
        content = bytearray(codec.decompress(path.read_bytes(), MOST_SEGMENT_BYTES))
        if offset < len(content):
            content[offset] ^= 1
        path.unlink()
        name = f"{match['of']}-{hashlib.sha256(content).hexdigest()}{match['ending']}" if resum else path.name
        path.with_name(name).write_bytes(codec.compress(bytes(content)))
    return f"a byte of WAL segment {segment} changed" + (", its SHA-256 right again" if resum else "")


def _of_segment(archive: Path, segment: str) -> list[Path]:
    found = [path for path in archive.rglob(f"{segment}*") if path.is_file()]
    if not found:
        raise OpsError(f"{segment} is not in {archive}", "check the archiver: the negative control needs this segment")
    return found


def cut(backup: Path) -> str:
    """Cut the largest data file in half, like a dump whose disk was full."""
    victim = _largest(backup)
    _replace(victim, victim.read_bytes()[: victim.stat().st_size // 2])
    return f"{victim.name} of the dump cut in half"


def flip(backup: Path) -> str:
    """Change one bit of the largest data file."""
    victim = _largest(backup)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    _replace(victim, bytes(content))
    return f"a byte of {victim.name} of the dump changed"


def alter_row(postgres: Postgres, backup: Path, column: tuple[str, str, str]) -> str:
    """Change one text of a column (schema, table, column) in the dump; every SHA-256 and the manifest's seal are right
    again, so that only a comparison of the content shows it.

    Raises:
        OpsError: the dump has no such row.
    """
    schema, table, name = column
    victim, place = _data_of(postgres, backup, schema, table), _place_of(backup, schema, table, name)
    rows = _unpacked(victim)
    changed = _with_another_text(rows, place)
    if changed == rows:
        raise OpsError(f"{table}.{name} holds no text in {backup.name}", "take a backup of a system that contains data")
    _replace(victim, _packed(victim, changed))
    manifest = manifests.read(backup)
    named = victim.relative_to(backup).as_posix()
    _break_links(backup)
    manifests.write(backup, manifest.model_copy(update={"files": {**manifest.files, named: manifests.sum_of(victim)}}))
    return "one row changed in the dump, every checksum right again"


def _with_another_text(rows: bytes, place: int) -> bytes:
    """Put a letter before the first text of that column."""
    begin = 0
    for line in rows.splitlines(keepends=True):
        cells = line.rstrip(b"\n").split(b"\t")
        if len(cells) > place and cells[place] not in (NULL, b""):
            at = begin + sum(len(cell) + 1 for cell in cells[:place])
            return rows[:at] + b"x" + rows[at:]
        begin += len(line)
    return rows


def _dump_of(backup: Path) -> Path:
    return next((path.parent for path in backup.rglob("toc.dat")), backup)


def _place_of(backup: Path, schema: str, table: str, column: str) -> int:
    """The column's position in a row of the dump, from the COPY statement in its table of contents."""
    contents = (_dump_of(backup) / "toc.dat").read_bytes()
    copied = re.search(rb"COPY %s\.%s \((%s(?:, %s)*)\) FROM" % (_named(schema), _named(table), _ANY, _ANY), contents)
    columns = [_bare(found[0]) for found in re.finditer(_ANY, copied[1])] if copied else []
    if column not in columns:
        raise OpsError(f"{backup.name} has no column {table}.{column}", "correct stored_in in [application.writes]")
    return columns.index(column)


def _named(name: str) -> bytes:
    """A pattern for a name as pg_dump writes it: quoted if it is a word of SQL (`"position"`)."""
    quoted = '"' + name.replace('"', '""') + '"'
    return b"(?:%s|%s)" % (re.escape(name.encode()), re.escape(quoted.encode()))


def _bare(name: bytes) -> str:
    text = name.decode()
    return text[1:-1].replace('""', '"') if text.startswith('"') else text


def _data_of(postgres: Postgres, backup: Path, schema: str, table: str) -> Path:
    dump = _dump_of(backup)
    listed = shell.run([postgres.program("pg_restore"), "--list", dump]).stdout
    for line in listed.splitlines():
        if match := re.match(rf"(\d+); \d+ \d+ TABLE DATA {re.escape(schema)} {re.escape(table)} ", line):
            for ending in _READABLE:
                if (path := dump / f"{match[1]}.dat{ending}").exists():
                    return path
    raise OpsError(f"{backup.name} holds no data of {table} that can be altered", "run the drill with a full dump")


def _unpacked(path: Path) -> bytes:
    return path.read_bytes() if path.suffix == ".dat" else codec.decompress(path.read_bytes())


def _packed(path: Path, rows: bytes) -> bytes:
    """Rows in the form of that file."""
    if path.suffix == ".dat":
        return rows
    return codec.compress(rows) if path.suffix == codec.ENDING else gzip.compress(rows, 1)


def _largest(backup: Path) -> Path:
    return max(manifests.files_in(backup), key=lambda path: path.stat().st_size)


def _replace(path: Path, content: bytes) -> None:
    """As a new file: the copy may be a hard link to the original."""
    path.unlink()
    path.write_bytes(content)


def _break_links(backup: Path) -> None:
    """Manifest and seal are written in place: they must not be hard links to the originals."""
    for name in (manifests.MANIFEST, manifests.SEAL):
        _replace(backup / name, (backup / name).read_bytes())
