"""Deleted WAL stays deleted: the archiver does not store again what the receiver's directory still holds of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tasks.backups.encryption import Key
from tasks.wal.archive.archive import Archive, timeline_in
from tasks.wal.archive.continuity import chain_from
from tasks.wal.archive.place import BucketPlace, DirectoryPlace
from tasks.wal.archive.prune import OldWal, delete_wal
from tasks.wal.archive.ship import Destination, ship, tidy
from tasks.wal.format.header import HEADER
from tasks.wal.format.names import Segment
from tests.s3.servers import S3Server

BYTES, SYSTEM = 1 << 20, 7


@dataclass(frozen=True)
class Shipping:
    """A receiver's directory of small segments, and the archive to which it is shipped."""

    received: Path
    archive: Archive

    def receive(self, number: int, timeline: int = 1, *, partial: bool = False) -> str:
        one = Segment(number, timeline, BYTES)
        header = HEADER.pack(0xD118, 2, timeline, one.start, 0, SYSTEM, BYTES, 8192)
        name = one.name + ".partial" * partial
        (self.received / name).write_bytes((header + b"WAL").ljust(BYTES, b"\0"))
        return name

    @property
    def destination(self) -> Destination:
        """As it is after a restart, or ten minutes: what is in the archive is read again."""
        return Destination("backups", lambda _: self.archive)

    def ship(self) -> list[str]:
        return list(ship(self.received, self.destination).put)

    def segments(self) -> list[tuple[int, int]]:
        """Timeline and number of what the archive holds, finished or not."""
        listing = self.archive.listing()
        found = [Segment.named(name, BYTES) for name in (*listing.segments, *listing.partials)]
        return sorted((one.timeline, one.number) for one in found)

    def old(self, before: int) -> OldWal:
        """As `find_old_wal` finds it: of every timeline, unfinished segments too."""
        listing = self.archive.listing()
        files = [one for found in (listing.segments, listing.partials) for same in found.values() for one in same]
        doomed = [one for one in files if Segment.named(one.of, BYTES).number < before]
        return OldWal(SYSTEM, self.archive, tuple(sorted(doomed, key=lambda one: one.of[8:])), "x", len(files), 2)

    def prune(self, old: OldWal) -> None:
        delete_wal.work(old)


@pytest.fixture(params=["directory", "bucket"])
def shipping(request: pytest.FixtureRequest, tmp_path: Path) -> Shipping:
    received = tmp_path / "received"
    received.mkdir()
    if request.param == "directory":
        return Shipping(received, Archive(DirectoryPlace(tmp_path / "archive"), Key()))
    moto: S3Server = request.getfixturevalue("moto")
    return Shipping(received, Archive(BucketPlace(moto.bucket(), "e/7"), Key()))


def test_what_was_pruned_is_not_stored_again_and_the_receivers_directory_is_emptied_all_the_same(
    shipping: Shipping,
) -> None:
    for number in range(1, 9):
        shipping.receive(number)
    left_behind = shipping.receive(9, partial=True)  # of the timeline that was left there
    shipping.ship()
    (shipping.received / "00000002.history").write_text(f"1\t0/{9 * BYTES + 512:X}\tpromoted\n")
    shipping.receive(9, 2)
    shipping.receive(10, 2, partial=True)
    shipping.ship()
    everything = shipping.segments()
    old = shipping.old(5)
    shipping.archive.note_pruned(old.doomed, 2)  # killed here: nothing is deleted yet
    assert shipping.segments() == everything
    chain = chain_from(
        shipping.archive.listing(), timeline_in(shipping.archive, shipping.archive.listing(), 2), BYTES, BYTES
    )
    assert (len(chain.links), chain.trouble) == (10, ""), "what is there is used, whatever is noted of it"
    shipping.prune(shipping.old(5))
    whole = [(1, number) for number in (5, 6, 7, 8, 9)] + [(2, 9), (2, 10)]
    assert shipping.segments() == whole
    assert shipping.ship() == []
    assert shipping.segments() == whole
    listing = shipping.archive.listing()
    history = timeline_in(shipping.archive, listing, 2)
    chain = chain_from(listing, history, 5 * BYTES, BYTES)
    assert (len(chain.links), chain.trouble, chain.pruned) == (6, "", "")
    gap = chain_from(listing, history, 4 * BYTES, BYTES)
    assert (gap.missing, gap.pruned) == ("", Segment(4, 1, BYTES).name), "deleted on purpose: no gap"
    lost = replace(listing, segments={name: one for name, one in listing.segments.items() if name[-1] != "7"})
    assert chain_from(lost, history, 5 * BYTES, BYTES).missing == Segment(7, 1, BYTES).name, "that one is a gap"
    destination = shipping.destination
    ship(shipping.received, destination)
    gone = tidy(shipping.received, [destination], keep=1)
    assert [Segment.named(name, BYTES).number for name in gone] == list(range(1, 9)), "pruned or archived"

    for name in gone:
        shipping.receive(Segment.named(name, BYTES).number)
    shipping.prune(shipping.old(10))
    assert shipping.ship() == [], f"nor is {left_behind}, of a timeline that was left"
    assert shipping.segments() == [(2, 10)]
    assert len([name for name in shipping.archive.place.names() if name.endswith(".pruned")]) == 2, "one a timeline"


def test_an_archiver_that_listed_before_a_prune_does_not_put_its_segments_back(shipping: Shipping) -> None:
    """It lists once in ten minutes. A touched file, or one that it had not shipped yet, is shipped again."""
    for number in range(1, 9):
        shipping.receive(number)
    ship(shipping.received, destination := shipping.destination)
    late = shipping.destination
    late.known(SYSTEM)  # another archiver, which has listed and shipped nothing yet
    shipping.prune(shipping.old(5))
    (shipping.received / shipping.receive(3)).touch()
    assert ship(shipping.received, destination).put == ()
    whole = [(1, number) for number in (5, 6, 7, 8)]
    assert shipping.segments() == whole
    late._known[SYSTEM] = (shipping.archive, replace(late.known(SYSTEM)[1], segments={Segment(8, 1, BYTES).name: ()}))
    assert all(Segment.named(name, BYTES).number > 4 for name in ship(shipping.received, late).put)
    assert shipping.segments() == whole


def test_the_wal_of_a_newer_timeline_that_begins_before_the_mark_is_stored(shipping: Shipping) -> None:
    """A restore to a point in time goes back: what it writes has the numbers of what was pruned, and is needed."""
    for number in range(1, 6):
        shipping.receive(number)
    shipping.ship()
    shipping.prune(shipping.old(5))
    (shipping.received / "00000002.history").write_text(f"1\t0/{2 * BYTES + 512:X}\tno recovery target\n")
    shipping.receive(2, 2)
    shipping.receive(3, 2, partial=True)
    shipping.ship()
    assert shipping.segments() == [(1, 5), (2, 2), (2, 3)]
    assert 2 in shipping.archive.listing().histories
    shipping.prune(shipping.old(5))  # no base backup is on the new timeline yet: its WAL goes with the rest
    unfinished = shipping.received / shipping.receive(3, 2, partial=True)
    unfinished.rename(unfinished.with_suffix(""))
    shipping.receive(4, 2)
    shipping.ship()
    assert shipping.segments() == [(1, 5), (2, 3), (2, 4)], "one that was unfinished when it was pruned, and later ones"
