"""Archived WAL read from a point on, segment by segment: its commits, and the place from which nothing more can be read
although more is there. A damaged segment is read from an intact copy, where there is one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from blocks.environment import Environment
from blocks.postgres import Postgres
from runbook.errors import OpsError, VerificationFailed
from runbook.kinds import action
from tasks.stores.directory import told
from tasks.wal.archive import Archive
from tasks.wal.continuity import Chain, Link
from tasks.wal.dump import Commit, commits_in
from tasks.wal.fetch import BATCH, fetch
from tasks.wal.header import require_own
from tasks.wal.local import find_segments
from tasks.wal.names import lsn_text
from tasks.wal.pages import Files, next_record, records_follow

Copies = Callable[[Link], Iterator[bytes]]
MOST_LOOKED_AT = 8


@dataclass(frozen=True)
class Behind:
    """What lies behind a gap or a damaged place: how many segments, and their newest commit (None: none was found)."""

    segments: int
    newest: Commit | None

    @property
    def told(self) -> str:
        """For people."""
        until = f"with commits until {self.newest.at:%Y-%m-%d %H:%M:%S UTC} ({self.newest.told})" if self.newest else (
            "in whose end no commit could be read")  # fmt: skip
        more = f"{self.segments} later segments are in the archive" if self.segments else "more of that segment follows"
        return f"{more}, {until}"


@dataclass
class Reader:
    """The segments of a chain, brought to a directory and read. `read`: those that are at hand; `end`: up to where they
    could be read; `damage`: why that is not all; `undecodable`: the segment whose SHA-256 is right and whose WAL is
    not; `replaced`: those that were read from an intact copy; `copies` offers such. `keeps`: what was read stays."""

    postgres: Postgres
    archive: Archive
    system: int
    chain: Chain
    directory: Path
    copies: Copies = lambda _: iter(())
    commits: list[Commit] = field(default_factory=list)
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
            begun = max(len(self.read) - 1, 0)  # a record may go over the edge of two batches
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
        """Whether everything of the chain was read."""
        return len(self.read) == len(self.chain.links) and not self.damage

    @property
    def later(self) -> tuple[Link, ...]:
        """The segments behind the place at which reading ended, or the chain does."""
        number = self.undecodable.segment.number if self.undecodable else -1
        left = self.chain.links[len(self.read) + 1 :] if self.damage and not self.undecodable else ()
        left = left or tuple(link for link in self.chain.links if self.undecodable and link.segment.number > number)
        return (*left, *self.chain.behind)

    def behind(self) -> Behind | None:
        """What lies behind that place; None where nothing does."""
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
            path.write_bytes(content)
            return [one for one in commits_in(self.postgres, [(link.segment, path)]) if one.lsn >= self.end]
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
        """Of a segment that is not what its SHA-256 says: a copy that is."""
        for content in self.copies(link):
            if hashlib.sha256(content).hexdigest() == link.stored.sha256:
                self._write(link, content)
                return True
        return False

    def _write(self, link: Link, content: bytes) -> None:
        with told(self.directory):
            (self.directory / link.segment.name).write_bytes(content)

    def _read_from(self, first: int, *, is_last: bool) -> None:
        links = self.read[first:]
        if not links:
            return
        files = [(link.segment, self.directory / link.segment.name) for link in links]
        commits, begin = self._decode(files, is_last=is_last)
        while begin and (better := self._replace(links, files, begin, is_last=is_last)):
            commits, begin = better
        last = self.commits[-1].lsn if self.commits else -1
        self.commits += [commit for commit in commits if commit.lsn > last]
        self.end = begin or self.read[-1].end
        if begin:
            link = self.undecodable = next(link for link in links if link.segment.end > begin)
            self.damage = (f"{link.segment.name} in {self.archive.place.where} is damaged: its WAL does not decode "
                           f"from {lsn_text(begin)} on, although its checksum is right")  # fmt: skip

    def _decode(self, files: Files, *, is_last: bool) -> tuple[list[Commit], int]:
        """The commits, and the LSN at which a record that cannot be read begins (0: it was read to its end). Where the
        archive ends the last record may not be whole yet: no other follows it then."""
        ends = list[int]()
        commits = commits_in(self.postgres, files, ends.append)
        if not ends:
            return commits, 0
        begin = next_record(files, ends[0])
        if begin >= files[-1][0].end or (is_last and not records_follow(files, self._last_place(begin))):
            return commits, 0
        return commits, begin

    def _last_place(self, begin: int) -> int:
        """Records behind this place are there only where the one at `begin` is damaged: a segment is flushed before it
        is finished, and before the next one is written. Of an unfinished one, after a power failure, the end may be
        there and the middle not."""
        link = next(link for link in self.read if link.segment.end > begin)
        return link.segment.end - 1 if link.stored.end else begin

    def _replace(
        self, links: Sequence[Link], files: Files, begin: int, *, is_last: bool
    ) -> tuple[list[Commit], int] | None:
        """The same with an intact copy in the place of the damaged segment: one from which WAL can be read on into the
        next segment, which fits to what is before it and after it by that."""
        for index, link in enumerate(links):
            if not begin // link.segment.bytes <= link.segment.number <= begin // link.segment.bytes + 1:
                continue
            kept = files[index][1].read_bytes()
            for content in self.copies(link):
                if content == kept:
                    continue
                self._write(link, content)
                commits, reached = self._decode(files, is_last=is_last)
                if not reached or reached // link.segment.bytes > link.segment.number:
                    self.replaced.append(link)
                    return commits, reached
                self._write(link, kept)
        return None


def copies_of(env: Environment, system: int) -> Copies:
    """Copies of an archived segment on this host: the receiver's, of the same cluster, timeline and place."""

    def find(link: Link) -> Iterator[bytes]:
        if not env.has("wal") or not env.wal.directory or not Path(env.wal.directory).is_dir():
            return
        with contextlib.suppress(OpsError):
            for one in find_segments(Path(env.wal.directory)):
                if one.segment == link.segment and one.system == system and not one.path.name.endswith(".partial"):
                    with contextlib.suppress(OSError, VerificationFailed):
                        content = one.path.read_bytes()
                        require_own(content, link.segment, system)
                        yield content

    return find


@action(idempotent=True)
def replace_damaged(archive: Archive, link: Link, content: bytes) -> str:
    """Put an intact copy of a segment into the archive: in place of a file that is not what its SHA-256 says; beside
    one that is and does not decode, which is marked. Returns the name of the intact file.

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
    """Note in the archive that a segment does not decode, for every run that comes after this one.

    Raises:
        OpsError, Unreachable: the archive cannot be written.
    """
    return archive.mark(link.stored).name
