"""Another user of the host, while backups, restores and proofs run: no data, no password, no report."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest

from flows.database.backup import backup_database, verify_backup
from flows.database.base_backup import backup_cluster
from flows.database.tables import restore_tables
from flows.recovery.full_restore import full_restore
from flows.recovery.undo_full_restore import undo_full_restore
from tests.fixtures.postgres.clusters import NAME, Cluster

STRANGER = 65533  # nobody runs the servers of the tests
PRIVATE = ("backups", "reports", "wal", "postgresql")
MARKS = re.compile(r"/\.verified/\w+\.json$|/carried-out/last-[\w-]+$")  # a name and a time
# Reads all it can, over and over, until its input ends: files, command lines, environments.
READ = """
import json, os, select, sys
given = json.loads(sys.stdin.readline())
words, found = [word.encode() for word in given["words"]], {}
def read(path, private):
    try:
        with open(path, "rb") as file:
            content = file.read(1 << 25)
    except OSError:
        return
    held = [word.decode() for word in words if word in content]
    if held or private:
        found[path] = held
def look():
    for root, private in given["roots"].items():
        for directory, _, names in os.walk(root):
            for name in names:
                read(os.path.join(directory, name), private)
    for process in filter(str.isdecimal, os.listdir("/proc")):
        for name in ("cmdline", "environ"):
            read(f"/proc/{process}/{name}", False)
while True:
    last = bool(select.select([sys.stdin], [], [], 0)[0])
    look()
    if last:
        break
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery needs no Prefect server."""
    monkeypatch.setenv("PREFECT_API_URL", "")


@contextlib.contextmanager
def other_user(roots: Mapping[str, bool], words: list[str]) -> Iterator[dict[str, list[str]]]:
    """What another user could read while the block runs, by path. `roots`: whether each is private as a whole."""
    found = dict[str, list[str]]()
    argv, pipe = ["/usr/bin/python3", "-c", READ], subprocess.PIPE
    with subprocess.Popen(
        argv, user=STRANGER, group=STRANGER, extra_groups=[], cwd="/", env={}, text=True, stdin=pipe, stdout=pipe
    ) as process:
        assert process.stdin
        process.stdin.write(json.dumps({"roots": dict(roots), "words": words}) + "\n")
        process.stdin.flush()
        yield found
        out, _ = process.communicate(timeout=120)
        found.update(cast(dict[str, list[str]], json.loads(out)))


def test_no_data_and_no_password_can_be_read_meanwhile(cluster: Cluster) -> None:
    cluster.sql("postgres", "CREATE TABLE people AS SELECT 'person-4711-private' AS name FROM generate_series(1, 9)")
    passwords = [value for name, value in cluster.variables.items() if "PASSWORD" in name and value]
    assert passwords
    readable = Path(cluster.root, "backups", "readable")
    roots = {f"{cluster.root / name}": True for name in PRIVATE} | {"/tmp": False, "/dev/shm": False, "/var/tmp": False}
    with other_user(roots, [*passwords, "person-4711-private"]) as found:
        backup_database.fn(NAME)
        backup_cluster.fn(NAME)
        for kind in ("postgres", "cluster"):
            verify_backup.fn(NAME, kind=kind)
        restore_tables.fn(NAME, ["people"], confirm=NAME)
        full_restore.fn(NAME, method="cluster", confirm=NAME)
        undo_full_restore.fn(NAME, confirm=NAME)
        full_restore.fn(NAME, method="dump", confirm=NAME)
        readable.write_text("person-4711-private", encoding="utf-8")  # what the other user would find
    assert found.pop(str(readable)) == ["person-4711-private"], "the reader reads"
    assert {path: words for path, words in found.items() if words or not MARKS.search(path)} == {}
