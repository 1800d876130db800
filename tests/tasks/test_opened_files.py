"""Directories of PostgreSQL's and Redis's accounts: `runbook.files` opens every file there, and nothing else does."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLACES = (
    *("tasks/wal", "tasks/cluster", "tasks/failover", "tasks/postgres/server", "tasks/stores/directory.py"),
    *("tasks/redis/restore", "tasks/redis/persistence", "tasks/redis/scratch.py", "tasks/redis/settings/file.py"),
)
OPENS = re.compile(
    r"(?<!inside)\.(?:read|write)_(?:text|bytes)\(|(?<!\w)open\("
    r"|\bos\.(?:link|symlink|l?chown|chmod|truncate)\(|\.(?:hardlink_to|symlink_to|touch|chmod)\("
    r"|\bshutil\.(?:copy\w*|move|chown)\("
)
EXCEPTIONS = {
    "tasks/wal/put.py": "PostgreSQL itself runs it, as its own account",
    "tasks/wal/reading/waldump.py: symlink_to": "in a private temporary directory of this run",
    "tasks/failover/segments.py: symlink_to": "in a private temporary directory of this run",
    "tasks/redis/persistence/place.py: read_text": "a file in /proc",
}


def _opened() -> list[tuple[str, int, str]]:
    """File, line and what opens it."""
    paths = [path for place in PLACES for path in (sorted((ROOT / place).rglob("*.py")) or [ROOT / place])]
    return [
        (path.relative_to(ROOT).as_posix(), number, match[0].strip(".("))
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := OPENS.search(line)) and not line.lstrip().startswith("def ")
    ]


def test_only_the_helper_opens_files_in_directories_of_other_accounts() -> None:
    opened = _opened()
    excepted = {name for path, _, what in opened for name in (path, f"{path}: {what}") if name in EXCEPTIONS}
    assert excepted == set(EXCEPTIONS), "an exception that nothing needs"
    left = [one for one in opened if one[0] not in EXCEPTIONS and f"{one[0]}: {one[2]}" not in EXCEPTIONS]
    assert not left, "use runbook.files.inside, or durable"
