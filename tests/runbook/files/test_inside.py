"""Files in a directory of another account: its links lead nowhere, those of administrators go on working."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from runbook.files import durable, inside
from tests.fixtures.planting import SECRET, Planting, planting

__all__ = ["planting"]

Change = Callable[[Path], object]
CHANGES: dict[str, Change] = {
    "write": lambda path: inside.write(path, b"x"),
    "create": lambda path: inside.creating(path).close(),
    "copy": lambda path: inside.copy(Path(__file__), path),
    "link": lambda path: inside.link(path.with_name("regular"), path),
    "symlink": lambda path: inside.symlink(path, "/nowhere", (1, 1)),
    "directory": lambda path: inside.make_directory(path, 0o777, (1, 1)),
    "remove": inside.remove,
    "give": lambda path: inside.give(path, (1, 1)),
    "change mode": lambda path: inside.change_mode(path, 0o777),
    "change": lambda path: inside.changing(path).write(b"x"),
    "durable": lambda path: durable.write(path, "x", owner=(1, 1)),
    "append": lambda path: durable.append(path).close(),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("where", ["file", "directory", "above"])
def test_nothing_changes_what_a_link_of_the_account_leads_to(planting: Planting, name: str, where: str) -> None:
    data = planting.directory("data")
    planting.write(data / "regular")
    if where == "file":
        path = planting.link(data / "canary")
    else:
        planting.link(data / "link", planting.vault if where == "directory" else planting.vault.parent)
        path = data / "link" / ("canary" if where == "directory" else "vault/canary")
    with contextlib.suppress(OSError):
        CHANGES[name](path)
    planting.require_untouched()


@pytest.mark.parametrize("where", ["file", "directory"])
def test_a_link_of_the_account_is_not_read(planting: Planting, where: str) -> None:
    link = planting.link(planting.place / "link", planting.canary if where == "file" else planting.vault)
    path = link if where == "file" else link / "canary"
    with pytest.raises(PermissionError, match=f"{inside.NOT_FOLLOWED}: '{link}'"):
        inside.read(path)
    with pytest.raises(PermissionError):
        inside.copy(path, planting.place / "copy")
    with pytest.raises(PermissionError):
        inside.link(path, planting.place / "link-of-root")
    planting.require_untouched()


def test_links_of_administrators_and_to_files_of_the_same_account_are_followed(planting: Planting) -> None:
    """A data directory on another disk, a configuration in /etc, pg_wal elsewhere, by whoever set them up."""
    disk = planting.directory("disk")
    planting.write(disk / "main" / "PG_VERSION", "18\n")
    planting.write(disk / "wal" / "1", "wal\n")
    planting.link(planting.place / "by-account", disk / "main")
    planting.link(disk / "main" / "pg_wal", Path("../wal"))
    (planting.place / "by-root").symlink_to("by-account")
    (disk / "main" / "postgresql.conf").symlink_to(planting.canary)
    for data in (planting.place / "by-account", planting.place / "by-root"):
        assert inside.read_text(data / "PG_VERSION") == "18\n"
        assert inside.read(data / "pg_wal" / "1") == b"wal\n"
        assert SECRET in inside.read_text(data / "postgresql.conf"), "root made this link"
        inside.write(data / "pg_wal" / "2", b"x")
        durable.write(data / "postgresql.auto.conf", "x")
        assert (disk / "wal" / "2").read_bytes() == (disk / "main" / "postgresql.auto.conf").read_bytes() == b"x"
    planting.require_untouched()


def test_links_in_a_circle_end(planting: Planting) -> None:
    planting.link(planting.place / "a", Path("b"))
    planting.link(planting.place / "b", Path("a"))
    with pytest.raises(OSError, match="Too many levels"):
        inside.read(planting.place / "a")


def test_a_fifo_does_not_stop_a_run(planting: Planting) -> None:
    path = planting.place / "fifo"
    planting.run("mkfifo", path)
    for one in (inside.read, inside.changing, durable.append):
        with pytest.raises(OSError, match=rf"{inside.NOT_REGULAR}|No such device"):
            one(path)
    durable.sync_tree(planting.place)
    inside.write(path, b"x")
    assert path.read_bytes() == b"x"


def test_an_error_names_the_whole_path_and_no_descriptor_stays_open(planting: Planting) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for one in (
        inside.read,
        inside.changing,
        lambda path: inside.write(path, b""),
        lambda path: durable.write(path, ""),
    ):
        with pytest.raises(FileNotFoundError, match=f"'{planting.place}/missing(/file)?'$"):
            one(planting.place / "missing" / "file")
    with pytest.raises(FileExistsError, match=f"'{planting.vault}/canary'"):
        inside.creating(planting.canary)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_given_directory_keeps_what_its_links_lead_to(planting: Planting) -> None:
    data = planting.directory("data/inner").parent
    (data / "inner" / "of-root").write_text("x")
    planting.link(data / "inner" / "link")
    planting.link(data / "vault", planting.vault)
    inside.give(data, (planting.account.uid, planting.account.gid))
    assert (data / "inner" / "of-root").stat().st_uid == planting.account.uid
    planting.require_untouched()


SWAPPING = """
import os, sys
place, vault = sys.argv[1:]
os.chdir(place)
os.symlink(vault, "other")
print("begun", flush=True)
while True:
    os.rename("data", "real"); os.rename("other", "data")
    os.rename("data", "other"); os.rename("real", "data")
"""


@pytest.mark.parametrize("name", ["write", "durable", "directory", "symlink"])
def test_a_directory_that_becomes_a_link_at_any_moment_leads_nobody_away(planting: Planting, name: str) -> None:
    planting.directory("data")
    argv = [*planting.account.prefix, sys.executable, "-I", "-c", SWAPPING, planting.place, planting.vault]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd="/") as swapping:
        try:
            assert swapping.stdout
            assert swapping.stdout.readline() == b"begun\n"
            written, end = 0, time.monotonic() + 1
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    CHANGES[name](planting.place / "data" / f"file-{written}")
                    written += 1
        finally:
            swapping.kill()
    assert written
    planting.require_untouched()
