"""Archived WAL read from a point on, segment by segment: its commits, and the place at which reading fails although
more WAL exists. A damaged segment is read from an intact copy, if there is one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import get_args

from blocks.environment import Environment, Stores
from blocks.postgres.server import Postgres
from runbook import clock
from runbook.errors import OpsError
from runbook.files import inside
from runbook.kinds import action
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import Chain, Link
from tasks.wal.archive.destinations import archive_of
from tasks.wal.archive.fetch import BATCH, fetch
from tasks.wal.format.header import require_own
from tasks.wal.format.names import lsn_text
from tasks.wal.format.pages import PAGE_BYTES, Files, next_record, record_behind, skip_to
from tasks.wal.reading.local import find_segments
from tasks.wal.reading.supply import RECEIVED, directories_of
from tasks.wal.reading.waldump import Commit, PreparedTransactions, commits_in

Copies = Callable[[Link], Iterator[bytes]]
"""The other copies of a segment. A copy of an unfinished one may end earlier or later, or continue with older
content."""
MOST_LOOKED_AT = 8
PATIENCE_SECONDS = 10.0


@dataclass(frozen=True)
class Behind:
    """The WAL after a gap or a damaged place: its segments, and their newest commit (None: none was found)."""

    segments: int
    newest: Commit | None

    @property
    def text(self) -> str:
        """Its extent, as a phrase."""
        until = (
            f"with commits until {clock.text(self.newest.at)} ({self.newest.text})"
            if self.newest
            else "without a readable commit at their end"
        )
        more = f"{self.segments} later segments in the archive" if self.segments else "more of that segment"
        return f"{more}, {until}"


@dataclass
class Reader:
    """The segments of a chain, fetched into a directory and read. `read`: the fetched ones; `end`: the end of the
    readable WAL; `damage`: why that is not all; `undecodable`: the segment whose SHA-256 is right, but whose WAL does
    not decode; `replaced`: those read from an intact copy (`copies`). `keeps`: read segments stay in the directory."""

    postgres: Postgres
    archive: Archive
    system: int
    chain: Chain
    directory: Path
    copies: Copies = lambda _: iter(())
    commits: list[Commit] = field(default_factory=list)
    prepared: PreparedTransactions = field(default_factory=PreparedTransactions)
    read: tuple[Link, ...] = ()
    end: int = 0
    damage: str = ""
    undecodable: Link | None = None
    replaced: list[Link] = field(default_factory=list)
    keeps: bool = True

    def batches(self) -> Iterator[None]:
        """Read on, batch by batch, up to the first damage.

        Raises:
            OpsError, Unreachable: the archive does not answer, or the disk is full.
        """
        links = self.chain.links
        for start in range(0, len(links), BATCH):
            begun = max(len(self.read) - 1, 0)  # a record may cross the edge of two batches
            self._bring(links[start : start + BATCH])
            self._read_from(begun, is_last=len(self.read) == len(links))
            yield
            if self.damage:
                return
            for link in () if self.keeps else self.read[begun:-1]:
                if link not in self.replaced:
                    (self.directory / link.segment.name).unlink(missing_ok=True)

    @property
    def is_whole(self) -> bool:
        """Whether the whole chain was read."""
        return len(self.read) == len(self.chain.links) and not self.damage

    @property
    def later(self) -> tuple[Link, ...]:
        """The segments after the place at which reading, or the chain, ended."""
        number = self.undecodable.segment.number if self.undecodable else -1
        left = self.chain.links[len(self.read) + 1 :] if self.damage and not self.undecodable else ()
        left = left or tuple(link for link in self.chain.links if self.undecodable and link.segment.number > number)
        return (*left, *self.chain.behind)

    def behind(self) -> Behind | None:
        """The WAL after that place; None without any."""
        later = self.later
        if not later and not self.undecodable:
            return None
        looked_at = [*([self.undecodable] if self.undecodable else []), *later][-MOST_LOOKED_AT:]
        for link in reversed(looked_at):
            with contextlib.suppress(OpsError):
                if commits := self._commits_of(link):
                    return Behind(len(later), commits[-1])
        return Behind(len(later), None)

    def _commits_of(self, link: Link) -> list[Commit]:
        path = self.directory / f"later-{link.segment.name}"
        try:
            content = self.archive.get(link.stored)
            require_own(content, link.segment, self.system)
            inside.write(path, content)
            files = [(link.segment, path)]
            start = record_behind(files, self.end) if link.segment.start <= self.end else 0
            if start % PAGE_BYTES:
                skip_to(path, link.segment, start)
            there = commits_in(self.postgres, files, lambda _: None, jump=start)  # as far as it is readable
            return [one for one in there if one.lsn >= self.end]
        finally:
            path.unlink(missing_ok=True)

    def _bring(self, links: Sequence[Link]) -> None:
        while links:
            found = fetch(self.archive, self.system, links, self.directory)
            self.read, links = (*self.read, *found.links), links[len(found.links) :]
            if not found.damage:
                return
            if not self._bring_copy(links[0]):
                self.damage = found.damage
                return
            self.replaced.append(links[0])
            self.read, links = (*self.read, links[0]), links[1:]

    def _bring_copy(self, link: Link) -> bool:
        """An intact copy of a segment whose SHA-256 differs."""
        for content in self.copies(link):
            if hashlib.sha256(content).hexdigest() == link.stored.sha256:
                self._write(link, content)
                return True
        return False

    def _write(self, link: Link, content: bytes) -> None:
        with told(self.directory):
            inside.write(self.directory / link.segment.name, content)

    def _read_from(self, first: int, *, is_last: bool) -> None:
        links = self.read[first:]
        if not links:
            return
        files = [(link.segment, self.directory / link.segment.name) for link in links]
        found = self._decode(files, is_last=is_last)
        while better := self._replace(links, files, found, is_last=is_last):
            found = better
        last = self.commits[-1].lsn if self.commits else -1
        self.commits += [commit for commit in found.commits if commit.lsn > last]
        self.end = found.broken_at or max(self.read[-1].end, found.reached)
        if begin := found.broken_at:
            link = self.undecodable = next(link for link in links if link.segment.end > begin)
            what = "it has records after the end of decoding" if link.stored.end else "it is damaged"
            self.damage = (
                f"{link.segment.name} in {self.archive.place.where} does not decode from {lsn_text(begin)} on, "
                f"although its checksum is right: {what}"
            )

    def _decode(self, files: Files, *, is_last: bool) -> _Decoded:
        """At the end of the archive the last record may be incomplete: no other one follows it then."""
        ends = list[int]()
        commits = commits_in(self.postgres, files, ends.append, prepared=self.prepared)
        reached = next_record(files, ends[0]) if ends else files[-1][0].end
        is_broken = reached < files[-1][0].end and not (is_last and not record_behind(files, reached))
        return _Decoded(commits, reached, reached if is_broken else 0)

    def _replace(self, links: Sequence[Link], files: Files, found: _Decoded, *, is_last: bool) -> _Decoded | None:
        """Read again with an intact copy of the damaged segment: one from which reading continues into the next
        segment. For the last, unfinished segment: one that can be read further."""
        for index, link in enumerate(links):
            is_tail = bool(is_last and link is links[-1] and link.stored.end)
            first = found.reached // link.segment.bytes
            if not (found.broken_at and first <= link.segment.number <= first + 1) and not (
                is_tail and link.segment.start <= found.reached < link.end
            ):
                continue
            kept = inside.read(files[index][1])
            for content in self.copies(link):
                # A copy may be longer because of later writes: that is no damage here.
                if content == kept or (not found.broken_at and content.startswith(kept[: link.stored.end])):
                    continue
                self._write(link, content)
                better = self._decode(files, is_last=is_last)
                if is_tail and better.reached > found.reached:
                    if not better.broken_at:  # in a server's own file, what follows is older
                        there = content[: better.reached - link.segment.start]
                        self._write(link, there.ljust(link.segment.bytes, b"\0"))
                    self.replaced.append(link)
                    return better
                if not is_tail and (
                    not better.broken_at or better.broken_at // link.segment.bytes > link.segment.number
                ):
                    self.replaced.append(link)
                    return better
                self._write(link, kept)
        return None


@dataclass(frozen=True)
class _Decoded:
    """The commits of some segments, up to the end of their readable records. `broken_at`: an unreadable record that
    others follow (0: none)."""

    commits: list[Commit]
    reached: int
    broken_at: int


def copies_of(env: Environment, system: int, of: str = "") -> Copies:
    """Find the copies of an archived segment, of the same cluster, timeline and place: the receiver's; for an
    unfinished one also those in the pg_wal of servers on this host, and in every archive. `of`: the environment of the
    WAL, if that is another one. Without [wal] there are none: such an environment reads one archive only."""

    def find(link: Link) -> Iterator[bytes]:
        if not env.has("wal"):
            return
        for read in (*_local_copies(env, link, system), *(_archived_copies(env, link, system, of))):
            with contextlib.suppress(OSError, OpsError):
                content = read()
                require_own(content, link.segment, system)
                yield content

    return find


def _local_copies(env: Environment, link: Link, system: int) -> Iterator[Callable[[], bytes]]:
    for where, directory in directories_of(env):
        if not link.stored.end and where != RECEIVED:
            continue
        with contextlib.suppress(OpsError):
            for one in find_segments(directory):
                is_whole = not one.path.name.endswith(".partial")
                if one.segment == link.segment and one.system == system and (is_whole or link.stored.end):
                    yield partial(inside.read, one.path)


def _archived_copies(env: Environment, link: Link, system: int, of: str) -> Iterator[Callable[[], bytes]]:
    for which in get_args(Stores) if link.stored.end else ():
        with contextlib.suppress(OpsError):
            if env.has(which):
                archive = archive_of(env, which, system, of, patience_seconds=PATIENCE_SECONDS)
                listing, name = archive.listing(), link.segment.name
                for one in (*listing.segments.get(name, ()), *reversed(listing.partials.get(name, ()))):
                    yield partial(archive.get, one)


@action(idempotent=True)
def replace_damaged(archive: Archive, link: Link, content: bytes) -> str:
    """Put an intact copy of a segment into the archive. It replaces a file whose SHA-256 differs; a file that does not
    decode is marked and kept. Returns the name of the intact file.

    Raises:
        OpsError, Unreachable: the archive cannot be written.
    """
    if hashlib.sha256(content).hexdigest() == link.stored.sha256:
        archive.remove([link.stored])
    else:
        archive.mark(link.stored)
    return archive.put(link.segment.name, content).name


@action(idempotent=True)
def mark_damaged(archive: Archive, link: Link) -> str:
    """Mark in the archive that a segment does not decode, for later runs.

    Raises:
        OpsError, Unreachable: the archive cannot be written.
    """
    return archive.mark(link.stored).name
