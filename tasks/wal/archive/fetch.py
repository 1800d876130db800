"""Segments fetched from the archive in parallel, each proven by its SHA-256 and its page header."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import VerificationFailed
from runbook.files import inside
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import Link
from tasks.wal.format.header import require_own

WORKERS = 8
BATCH = 32


@dataclass(frozen=True)
class Fetched:
    """Fetched segments, oldest first. `damage`: why the next one is missing ("" if none is)."""

    links: tuple[Link, ...]
    damage: str = ""


def fetch(archive: Archive, system: int, links: Sequence[Link], target: Path) -> Fetched:
    """Fetch segments in parallel, up to the first that is missing, damaged, or from another cluster."""

    def one(link: Link) -> str:
        try:
            content = archive.get(link.stored)
            require_own(content, link.segment, system)
        except VerificationFailed as error:
            return error.message
        with told(target):
            inside.write(target / link.segment.name, content)
        return ""

    with ThreadPoolExecutor(WORKERS) as pool:
        for index, why in enumerate(pool.map(one, links)):
            if why:
                return Fetched(tuple(links[:index]), why)
    return Fetched(tuple(links))


def fetch_histories(archive: Archive, target: Path) -> list[str]:
    """Fetch every history: a promotion must not reuse a timeline's number. Returns their names.

    Raises:
        VerificationFailed: one is damaged.
    """
    names = []
    for found in archive.listing().histories.values():
        content = archive.get(found[0])
        with told(target):
            inside.write(target / found[0].of, content)
        names.append(found[0].of)
    return sorted(names)
