"""Dumps in zstd: compressed behind pg_dump, unpacked for pg_restore; and those of earlier versions, in gzip."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.database import restore_steps
from flows.database.backup import backup_database, verify_backup
from flows.database.restore import restore_database
from flows.database.tables import restore_tables
from runbook.errors import OpsError, RunbookFailed, VerificationFailed
from runbook.report import Report, Status
from runbook.wait import until
from tasks.backups import catalogue, codec, manifest
from tasks.drill import sabotage
from tasks.postgres.dump import compression
from tasks.postgres.restore.staged_copy import content_in, unpacking_in, unpacking_of
from tasks.postgres.server.server import program_version
from tasks.stores.directory import DirectoryStore
from tests.database.conftest import NAME, Trial
from tests.database.restore.test_restore import GOOD
from tests.fixtures.bits import GZIP_BACKUPS

# pg_dump in small: it writes a big file in two parts, then a small one, and waits for a line before each step.
WRITER = """
import pathlib, sys
directory = pathlib.Path(sys.argv[1])
directory.mkdir()
step = lambda: (print(flush=True), sys.stdin.readline())
with (directory / "7.dat").open("wb") as big:
    step()
    big.write(bytes(range(256)) * (1 << 17)); big.flush()
    step()
    big.write(b"the end")
(directory / "8.dat").write_bytes(b"small")
(directory / "blobs_9.toc").write_bytes(b"x" * 5000)
(directory / "toc.dat").write_bytes(b"PGDMP" + bytes([1, 16, 0, 4, 8, 3, 0]) + b"x" * 5000)
step()
"""


def test_a_growing_file_is_compressed_and_its_text_removed_behind_the_writer(tmp_path: Path) -> None:
    target = tmp_path / "store" / "dump"
    target.parent.mkdir()
    big = target / "7.dat"
    argv = [sys.executable, "-c", WRITER, str(target)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin
        assert writer.stdout

        def go_on() -> None:
            assert writer.stdout
            assert writer.stdin
            writer.stdout.readline()
            writer.stdin.write("\n")
            writer.stdin.flush()

        with compression.compressing(target, 2, 10) as done:
            go_on()
            writer.stdout.readline()
            until(lambda: big.stat().st_blocks == 0, what="the text removed", seconds=60)
            assert big.stat().st_size == 32 << 20, "the writer goes on at its end"
            writer.stdin.write("\n")
            writer.stdin.flush()
            until(lambda: not big.exists(), what="the file finished while others are written", seconds=60)
            go_on()
            writer.wait(60)
    assert codec.decompress((target / "7.dat.zst").read_bytes()) == bytes(range(256)) * (1 << 17) + b"the end"
    assert sorted(path.name for path in target.iterdir()) == ["7.dat.zst", "8.dat", "blobs_9.toc", "toc.dat"]
    assert (target / "toc.dat").read_bytes()[11] == 3, "pg_dump's number of zstd"
    assert done.text_bytes == (32 << 20) + 7
    assert 0 < done.peak_bytes <= 32 << 20


def test_a_full_disk_behind_pg_dump_is_named_and_a_failed_pg_dump_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "store" / "dump"
    target.mkdir(parents=True)
    (target / "toc.dat").write_bytes(b"PGDMP")
    (target / "7.dat").write_bytes(bytes(10000))
    with pytest.raises(ZeroDivisionError), compression.compressing(target, 1, 0):
        raise ZeroDivisionError
    (target / "7.dat").write_bytes(bytes(10000))
    (target / "7.dat.zst").unlink(missing_ok=True)
    (target / "7.dat.zst").symlink_to("/dev/full")
    with (
        pytest.raises(OpsError, match="cannot be compressed: No space left") as error,
        compression.compressing(target, 1, 0),
    ):
        pass
    assert error.value.hint.startswith(f"free disk space at {tmp_path}")


def test_a_backup_is_zstd_and_what_its_restore_unpacks_is_planned_and_removed(trial: Trial) -> None:
    assert backup_database.fn(NAME).status in GOOD
    store = DirectoryStore(trial.store)
    backup = catalogue.find_backup(store, "postgres")
    assert any(name.endswith(".dat.zst") for name in backup.manifest.files)
    assert not any(name.endswith(".dat.gz") for name in backup.manifest.files)
    postgres, content = trial.environment.postgres, content_in(backup)
    if compression.knows_compression(postgres, compression.ZSTD):  # pg_restore reads it as it is
        assert unpacking_of(postgres, backup) == {}
        assert not [step for step in restore_database.fn(NAME).plan_steps if step.step.startswith("unpack ")]
        return
    planned = {step.step: step for step in restore_database.fn(NAME).plan_steps}
    assert planned[f"unpack {backup.name}"].bytes == content.text_bytes > 0
    much = backup.manifest.whole().model_copy(update={"content": {**backup.manifest.content, "text_bytes": 1 << 60}})
    manifest.write(backup.path, much)
    report = Report("trial", NAME)
    changed = catalogue.find_backup(store, "postgres")
    restore_steps.judge_space(report, trial.environment, 1000, backup=changed)
    [critical] = [found for found in report.findings if found.status is Status.CRITICAL]
    assert "for the unpacked dump in" in critical.expected
    [some] = unpacking_of(postgres, changed, [name for name in much.files if name.endswith(".dat.zst")][:1]).values()
    assert some < 1 << 30, "of one table"
    assert not unpacking_in(backup).parent.exists()


def test_a_damaged_file_of_a_dump_is_named_and_nothing_unpacked_is_left(trial: Trial, tmp_path: Path) -> None:
    dump, place = tmp_path / "dump", tmp_path / "hand" / "unpacked"
    dump.mkdir()
    (dump / "7.dat.zst").write_bytes(codec.compress(bytes(range(256)) * 100)[:-9])
    postgres = trial.environment.postgres
    if compression.knows_compression(postgres, compression.ZSTD):  # it is pg_restore that finds the damage
        with compression.readable(postgres, dump, place, 1, 0) as read:
            assert read == dump
        assert not place.parent.exists()
        return
    with (
        pytest.raises(VerificationFailed, match=r"7\.dat\.zst is damaged"),
        compression.readable(postgres, dump, place, 1, 0),
    ):
        pass
    assert not place.parent.exists()


@pytest.mark.parametrize("trial", ["trial_gzip"], indirect=True)
def test_a_backup_of_the_earlier_gzip_form_is_verified_and_restored(trial: Trial, tmp_path: Path) -> None:
    """A dump, rows of a table whose generated column cannot be computed again, a large object."""
    [kept] = (GZIP_BACKUPS / "postgresql").iterdir()
    shutil.copytree(kept, trial.store / kept.name)
    if program_version(trial.environment.postgres, "pg_restore") < 18:  # it is of PostgreSQL 18
        with pytest.raises(RunbookFailed, match="server version"):
            verify_backup.fn(NAME)
        return
    assert verify_backup.fn(NAME).status in GOOD
    assert catalogue.find_backup(DirectoryStore(trial.store), "postgres").verified
    assert restore_database.fn(NAME, confirm=NAME).status in GOOD
    assert trial.sql("SELECT count(*), max(body) FROM notes") == [(300, "note 99")]
    assert trial.sql("SELECT count(*) FROM stamped WHERE at < '2026-11-30'") == [(2,)], "as stored, not computed"
    assert trial.sql("SELECT lo_get(424242)") == [(b"a large object",)]
    trial.sql("DELETE FROM notes")
    assert restore_tables.fn(NAME, tables=["notes"], confirm=NAME).status in GOOD
    assert trial.sql("SELECT count(*) FROM notes") == [(300,)]
    told = sabotage.alter_row(trial.environment.postgres, trial.store / kept.name, ("public", "notes", "body"))
    assert told.startswith("one row changed")
    with pytest.raises(RunbookFailed, match="differ"):
        verify_backup.fn(NAME)


@pytest.mark.parametrize(("table", "column", "is_small"), [("people", "name", False), ("tiny", "body", True)])
def test_a_sabotaged_row_is_found_in_each_form(trial: Trial, table: str, column: str, is_small: bool) -> None:
    """A small file stays plain, unless pg_dump itself compresses: it compresses every file."""
    trial.sql("CREATE TABLE tiny AS SELECT 'x'::text AS body")
    report = backup_database.fn(NAME)
    backup = trial.store / report.facts["backup"]
    before = manifest.read(backup).files
    sabotage.alter_row(trial.environment.postgres, backup, ("public", table, column))
    [changed] = [name for name, file in manifest.read(backup).files.items() if before[name] != file]
    is_plain = is_small and not compression.knows_compression(trial.environment.postgres, compression.ZSTD)
    assert changed.endswith(".dat" if is_plain else ".dat.zst")
    with pytest.raises(RunbookFailed):
        verify_backup.fn(NAME)
