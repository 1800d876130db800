"""Archived WAL: zstd, gzip of earlier versions beside it, and one compression for all archives."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyrage import x25519

from runbook.errors import Unreachable
from tasks.backups import codec
from tasks.backups.encryption import Key
from tasks.drill import sabotage
from tasks.wal.archive import received
from tasks.wal.archive.archive import Archive
from tasks.wal.archive.continuity import chain_from
from tasks.wal.archive.place import DirectoryPlace
from tasks.wal.archive.ship import ArchivedContent, Destination, ship, ship_to_all, tidy
from tasks.wal.archiver import WalArchiver
from tasks.wal.format.names import Timeline
from tests.tasks.backups.test_wal_pruned import BYTES, Shipping


@pytest.fixture
def shipping(tmp_path: Path) -> Shipping:
    (tmp_path / "received").mkdir()
    return Shipping(tmp_path / "received", Archive(DirectoryPlace(tmp_path / "archive"), Key()))


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of everything that is compressed."""
    lengths, compress = list[int](), codec.compress

    def counted(content: bytes) -> bytes:
        lengths.append(len(content))
        return compress(content)

    monkeypatch.setattr(received.codec, "compress", counted)
    return lengths


def as_before(archive: Archive) -> list[str]:
    """Make the files of an archive those of a version that compressed with gzip."""
    assert isinstance(archive.place, DirectoryPlace)
    for path in archive.place.path.glob("*.zst"):
        path.with_suffix(".gz").write_bytes(gzip.compress(codec.decompress(path.read_bytes()), 1, mtime=0))
        path.unlink()
    return sorted(archive.place.names())


def test_segments_of_earlier_versions_stay_and_count_the_same(shipping: Shipping) -> None:
    for number in (3, 4):
        shipping.receive(number)
    shipping.receive(5, partial=True)
    shipping.ship()
    old = as_before(shipping.archive)
    assert [name[-3:] for name in old] == [".gz"] * 3
    assert shipping.ship() == [], "nothing is stored again"
    shipping.receive(6)
    assert shipping.ship() == [shipping.receive(6)]
    (shipping.received / shipping.receive(5, partial=True)).unlink()
    shipping.receive(5)
    shipping.ship()
    names = sorted(shipping.archive.place.names())
    assert [name.rpartition(".")[2] for name in names] == ["gz", "gz", "zst", "zst"], "the unfinished one was replaced"
    chain = chain_from(shipping.archive.listing(), Timeline(1), 3 * BYTES, BYTES)
    assert not chain.trouble
    assert [len(shipping.archive.get(link.stored)) for link in chain.links] == [BYTES] * 4
    # Two versions of the archiver have run at the same time: one content under two names.
    one = next(name for name in names if name.endswith(".gz"))
    assert isinstance(shipping.archive.place, DirectoryPlace)
    content = codec.decompress(shipping.archive.place.get(one))
    assert shipping.archive.put(one[:24], content).name in shipping.archive.place.names()
    listing = shipping.archive.listing()
    assert len(listing.segments[one[:24]]) == 2
    assert not chain_from(listing, Timeline(1), 3 * BYTES, BYTES).double
    destination = shipping.destination
    ship(shipping.received, destination)
    assert len(tidy(shipping.received, [destination], keep=1)) == 3, "the archive has them in either form"
    shipping.prune(shipping.old(before=5))
    assert shipping.segments() == [(1, 5), (1, 6)], "both files of a content are deleted"


@pytest.mark.parametrize("before", [False, True])
def test_a_drill_alters_segments_in_either_form(shipping: Shipping, before: bool) -> None:
    name = shipping.receive(3)
    shipping.ship()
    if before:
        as_before(shipping.archive)
    assert isinstance(shipping.archive.place, DirectoryPlace)
    sabotage.alter_segment(shipping.archive.place.path, name, 100, resum=True)
    (stored,) = shipping.archive.listing().segments[name]
    content = shipping.archive.get(stored)
    assert content != (shipping.received / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == stored.sha256


def test_a_segment_is_compressed_once_for_all_archives_and_one_that_is_away_delays_no_other(
    tmp_path: Path, shipping: Shipping, compressed: list[int]
) -> None:
    keys = [x25519.Identity.generate() for _ in range(2)]
    archives = [
        Archive(DirectoryPlace(tmp_path / str(index)), Key.of([str(key.to_public())], str(key)))
        for index, key in enumerate(keys)
    ]

    def away(_: int) -> Archive:
        raise Unreachable("the bucket does not answer", "wait")

    opened: list[Callable[[int], Archive]] = [away, lambda _: archives[0], lambda _: archives[1]]
    destinations = [Destination(str(number), archive_of) for number, archive_of in enumerate(opened)]
    names = [shipping.receive(number) for number in (3, 4)]
    done = ship_to_all(shipping.received, destinations)
    assert compressed == [BYTES] * 2
    assert [list(done[str(number)].put) for number in range(3)] == [[], names, names]
    assert isinstance(done["0"].failure, Unreachable)
    for archive in archives:
        for found in archive.listing().segments.values():
            assert archive.get(found[0]) == (shipping.received / found[0].of).read_bytes()
    with pytest.raises(Unreachable):
        ship(shipping.received, destinations[0])
    assert tidy(shipping.received, destinations, keep=0) == [], "one of them has nothing"
    assert tidy(shipping.received, destinations[1:], keep=1) == names[:1]
    shutil.rmtree(tmp_path / "1")
    assert tidy(shipping.received, destinations[1:], keep=0) == [], "it is listed again before anything is deleted"


def test_a_run_that_ships_again_reads_only_what_is_new_or_lacking(
    shipping: Shipping, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, sha256 = list[int](), hashlib.sha256

    def counted(content: bytes) -> object:
        read.append(len(content))
        return sha256(content)

    monkeypatch.setattr(received, "hashlib", SimpleNamespace(sha256=counted))
    seen = dict[received.Mark, ArchivedContent]()

    def again() -> tuple[list[str], int]:
        """A new listing, with what was read before. The files put, and the number read."""
        read.clear()
        put = ship(shipping.received, Destination("backups", lambda _: shipping.archive, seen)).put
        return list(put), len(read)

    names = [shipping.receive(number) for number in range(3, 9)]
    last = shipping.receive(9, partial=True)
    assert again() == ([*names, last], 7)
    assert again() == ([], 0)
    shipping.archive.remove(shipping.archive.listing().segments[names[2]])
    (shipping.received / names[4]).touch()
    assert again() == (names[2:3], 2), "the archive is asked, not remembered"


def test_an_unfinished_segment_without_content_stops_nothing(shipping: Shipping) -> None:
    """The receiver creates it filled with zeros."""
    names = [shipping.receive(number) for number in (3, 4)]
    (shipping.received / shipping.receive(5, partial=True)).write_bytes(bytes(BYTES))
    done = ship(shipping.received, shipping.destination)
    assert list(done.put) == names
    assert ["no WAL segment header" in text for text in done.refused] == [True]


def test_of_an_unfinished_segment_only_the_new_part_is_compressed(
    shipping: Shipping, compressed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(received, "FRAME_BYTES", BYTES // 16)
    archiver = WalArchiver(shipping.received, [shipping.destination])
    path = shipping.received / shipping.receive(3, partial=True)
    content = bytearray(path.read_bytes())
    for end, blocks in ((BYTES // 2, 8), (BYTES // 2 + 9, 0), (BYTES // 4 * 3, 4), (BYTES // 4 * 3 + 9, 12)):
        compressed.clear()
        content[64:end] = b"x" * (end - 64)
        if blocks == 12:
            content[70] ^= 1  # the receiver began again: nothing before it is trusted
        path.write_bytes(content)
        archiver.round(last=True)
        assert compressed == [BYTES // 16] * blocks + [BYTES - end // (BYTES // 16) * (BYTES // 16)]
        ((stored,),) = shipping.archive.listing().partials.values()
        assert (shipping.archive.get(stored), stored.end) == (content, end)
