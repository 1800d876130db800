"""Detect a truncated table file: its visibility map covers pages beyond the end of the file.

VACUUM truncates the map with the table and logs that; the map's file follows at the next checkpoint. So only files that
were not changed for some time before the last checkpoint are compared. The free space map cannot be used: it is not
logged, and can be older than the table.

https://www.postgresql.org/docs/current/storage-vm.html; src/backend/access/heap/visibilitymap.c
"""

from __future__ import annotations

import psycopg

from blocks.postgres.server import Connection, execute

PAGE_HEAD, BLOCKS_A_BYTE, BITS_A_BLOCK = 24, 4, 2
MARGIN_SECONDS = 120
"""How much older than the last checkpoint a file must be: a standby's checkpoints carry the primary's time."""


def lost_end(connection: Connection, oid: int) -> str:
    """The missing pages as a sentence; empty if none are missing, or if it cannot be decided.

    Raises:
        psycopg.Error: the file's size cannot be read.
    """
    path, heap_bytes, map_bytes, block_bytes, file_blocks = execute(connection, _FILES, oid, oid, oid)[0]
    if path is None or not map_bytes:
        return ""
    # Earlier pages of the map cannot cover pages beyond the end of the table.
    begin = heap_bytes // block_bytes // _pages_of_one(block_bytes) * block_bytes
    try:
        content = execute(connection, _READ, f"{path}_vm", begin, max(map_bytes - begin, 0))[0][0]
        known = _known_pages(bytes(content), block_bytes, begin)
        # The size is read after the map, because the table may have grown meanwhile.
        now, heap_bytes = execute(connection, _NOW, oid, oid)[0]
        if now != path or known <= (pages := heap_bytes // block_bytes):
            return ""
        last = max(pages - 1, 0) // file_blocks  # the truncated file is this one, or the next
        names = [f"{path}.{number}" if number else path for number in (last, last + 1)]
        if not execute(connection, _IS_OLD, MARGIN_SECONDS, names)[0][0]:
            return ""
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedFile):
        return ""  # this role cannot read files, or the table was rewritten meanwhile
    return (
        f"the visibility map covers {known} pages, the file has {pages}: the file is truncated (or, rarely, an error "
        "interrupted a VACUUM that truncated it)"
    )


def _pages_of_one(block_bytes: int) -> int:
    """The number of table pages that one page of the map covers."""
    return (block_bytes - PAGE_HEAD) * BLOCKS_A_BYTE


def _known_pages(content: bytes, block_bytes: int, begin: int) -> int:
    """The number of pages up to the last with bits set. `begin`: the offset of `content` in the map."""
    for start in range(len(content) // block_bytes - 1, -1, -1):
        bits = content[start * block_bytes + PAGE_HEAD : (start + 1) * block_bytes].rstrip(b"\0")
        if bits:
            in_byte = (bits[-1].bit_length() + BITS_A_BLOCK - 1) // BITS_A_BLOCK
            before = (begin // block_bytes + start) * _pages_of_one(block_bytes)
            return before + (len(bits) - 1) * BLOCKS_A_BYTE + in_byte
    return 0


_FILES = """
SELECT pg_relation_filepath(%s::oid::regclass), pg_relation_size(%s::oid::regclass),
       pg_relation_size(%s::oid::regclass, 'vm'), current_setting('block_size')::bigint,
       (SELECT setting::bigint FROM pg_settings WHERE name = 'segment_size')
"""
_READ = "SELECT pg_read_binary_file(%s, %s, %s)"
_NOW = "SELECT pg_relation_filepath(%s::oid::regclass), pg_relation_size(%s::oid::regclass)"
_IS_OLD = """
SELECT coalesce(max(found.modification) < (SELECT checkpoint_time FROM pg_control_checkpoint())
                                          - make_interval(secs => %s), false)
FROM unnest(%s::text[]) AS name, LATERAL pg_stat_file(name, true) AS found
"""
