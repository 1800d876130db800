"""The pages that crash recovery reads from the files of a stopped server, verified as the server verifies them.

Recovery reads a page if the first record about it since the checkpoint has no image of it, and does not initialize it.
An invalid one ends the recovery: the server does not start. src/backend/access/transam/xlogutils.c
(XLogReadBufferForRedoExtended), src/backend/storage/page/bufpage.c (PageIsVerified)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook.errors import OpsError
from runbook.files import inside
from runbook.kinds import probe
from tasks.cluster.stopped import StoppedServer, read_control
from tasks.cluster.trial import segments_from
from tasks.stores.directory import told
from tasks.wal.format.pages import PAGE_BYTES
from tasks.wal.reading.waldump import lines_in

MOST_PAGES = 50_000
_BLOCK = re.compile(r"blkref #\d+: rel (\d+)/(\d+)/(\d+)( fork \w+)? blk (\d+)( FPW(?! for))?")
# Records whose blocks a page image or the file itself always serves: for others nothing is concluded.
_READING = re.compile(r"^rmgr: (?:Heap2?|Btree) .* desc: (?!\S*(?:INIT|NEWROOT|SPLIT|UNLINK))")
_PAGES_IN_FILE = (1 << 30) // PAGE_BYTES
_DEFAULT, _GLOBAL = 1663, 1664
_HEAD = struct.Struct("<QHHHHH")  # LSN, checksum, flags, lower, upper, special
_FLAGS = 0x0007
# src/include/storage/checksum_impl.h
_PRIME, _LANES = 16777619, 32
_OFFSETS = """
5B1F36E9 B8525960 02AB50AA 1DE66D2A 79FF467A 9BB9F8A3 217E7CD2 83E13D2C F8D4474F E39EB970 42C6AE16 993216FA 7B093B5D
98DAFF3C F718902A 0B1C9CDB E58F764B 187636BC 5D7B3BB1 E73DE7DE 92BEC979 CCA6C0B2 304A0979 85AA43D4 783125BB 6CA8EAA2
E407EAC6 4B5CFC3E 9FBF8C76 15CA20BE F2CA9FD3 959BD756
"""

Page = tuple[int, int, int, int]  # tablespace, database, file, number


@probe
def find_invalid_page(postgres: Postgres, stopped: StoppedServer) -> str:
    """Return the first page that ends the crash recovery, as the server's log would name it; "" where none does.

    Raises:
        OpsError: there are too many pages, or WAL or a file cannot be read.
    """
    data, first = Path(postgres.data_directory).resolve(), stopped.first
    if first is None:
        return ""
    control, problem = read_control(postgres, data)
    if problem:
        raise OpsError(problem)
    wal, checked = data / "pg_wal", control.get("Data page checksum version", "0") != "0"
    with told(data):
        files = [(one, wal / one.name) for one in segments_from(wal, first, stopped.system)]
        for page in _read_by(lines_in(postgres, files, [], stopped=lambda _: None, start=stopped.redo)):
            path = _path(data, page)
            content = _content(path, page[3] % _PAGES_IN_FILE) if path else b""
            if path and content and not is_valid(content, page[3], checked=checked):
                return f"invalid page in block {page[3]} of {path.relative_to(data)}"
    return ""


def _read_by(lines: Iterable[str]) -> Iterator[Page]:
    """Yield the pages that are read, by the output of pg_waldump."""
    seen = set[Page]()
    for line in lines:
        reads = _READING.search(line)
        for match in _BLOCK.finditer(line):
            page = (int(match[1]), int(match[2]), int(match[3]), int(match[5]))
            if match[4] or page in seen:
                continue
            seen.add(page)
            if len(seen) > MOST_PAGES:
                raise OpsError(f"its recovery changes more than {MOST_PAGES:,} pages")
            if reads and not match[6]:
                yield page


def _path(data: Path, page: Page) -> Path | None:
    """Return the file of a page; None where it is missing: a later record has dropped it."""
    space, database, file, number = page
    name = f"{file}.{number // _PAGES_IN_FILE}" if number >= _PAGES_IN_FILE else str(file)
    if space == _GLOBAL:
        places = [data / "global" / name]
    elif space == _DEFAULT:
        places = [data / "base" / str(database) / name]
    else:
        places = list((data / "pg_tblspc" / str(space)).glob(f"PG_*/{database}/{name}"))
    return next((place for place in places if place.is_file()), None)


def _content(path: Path, number: int) -> bytes:
    """Return a page; empty where the file is shorter: the page is new."""
    with inside.reading(path) as file:
        file.seek(number * PAGE_BYTES)
        content = file.read(PAGE_BYTES)
    return content if len(content) == PAGE_BYTES else b""


def is_valid(content: bytes, number: int, *, checked: bool) -> bool:
    """Return whether the server accepts a page: PageIsVerified. `checked`: pages have checksums."""
    if not any(content):
        return True
    _, checksum, flags, lower, upper, special = _HEAD.unpack_from(content)
    if checked and checksum != checksum_of(content, number):
        return False
    return not flags & ~_FLAGS and lower <= upper <= special <= PAGE_BYTES and special % 8 == 0


def checksum_of(content: bytes, number: int) -> int:
    """Return the checksum of a page: pg_checksum_page."""
    import numpy as np  # slow to import

    words = np.frombuffer(content, dtype="<u4").copy().reshape(-1, _LANES)
    words[0, 2] &= 0xFFFF0000  # without the checksum itself
    sums = np.array([int(word, 16) for word in _OFFSETS.split()], dtype=np.uint32)
    zeros = np.zeros((2, _LANES), dtype=np.uint32)
    for row in (*words, *zeros):
        mixed = sums ^ row
        sums = mixed * np.uint32(_PRIME) ^ (mixed >> np.uint32(17))
    return (int(np.bitwise_xor.reduce(sums)) ^ number) % 65535 + 1
