"""Whether a table's visibility map covers pages behind the end of its file: then the file has lost its end.

VACUUM cuts the map off with the table, and logs that; the map's file follows with the next checkpoint. So only a file
that was not changed since some time before the last checkpoint is compared with it. The free space map says nothing: it
is not logged, and may be older than the table.

https://www.postgresql.org/docs/current/storage-vm.html; src/backend/access/heap/visibilitymap.c
"""

from __future__ import annotations

import psycopg

from blocks.postgres.server import Connection, execute

PAGE_HEAD, BLOCKS_A_BYTE, BITS_A_BLOCK = 24, 4, 2
MARGIN_SECONDS = 120
"""How much older than the last checkpoint a file must be: a standby's checkpoints carry the primary's time."""


def lost_end(connection: Connection, oid: int) -> str:
    """How far the map goes behind the end of the file, as a sentence; "" where it does not, or nobody can tell.

    Raises:
        psycopg.Error: the file's size cannot be read.
    """
    path, heap_bytes, map_bytes, block_bytes, file_blocks = execute(connection, _FILES, oid, oid, oid)[0]
    if path is None or not map_bytes:
        return ""
    # Before the map's page in which the table ends nothing can be behind that end.
    begin = heap_bytes // block_bytes // _pages_of_one(block_bytes) * block_bytes
    try:
        content = execute(connection, _READ, f"{path}_vm", begin, max(map_bytes - begin, 0))[0][0]
        known = _known_pages(bytes(content), block_bytes, begin)
        # The size is read after the map: a table that grew meanwhile covers more.
        now, heap_bytes = execute(connection, _NOW, oid, oid)[0]
        if now != path or known <= (pages := heap_bytes // block_bytes):
            return ""
        last = max(pages - 1, 0) // file_blocks  # the file that was cut off is that one, or the next
        names = [f"{path}.{number}" if number else path for number in (last, last + 1)]
        if not execute(connection, _IS_OLD, MARGIN_SECONDS, names)[0][0]:
            return ""
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedFile):
        return ""  # this role reads no files; or the table was rewritten meanwhile
    return (
        f"the visibility map covers {known} pages, the file has {pages}: its end was cut off (or, rarely, a VACUUM "
        "that cut it was interrupted by an error)"
    )


def _pages_of_one(block_bytes: int) -> int:
    """How many pages of a table one of its map covers."""
    return (block_bytes - PAGE_HEAD) * BLOCKS_A_BYTE


def _known_pages(content: bytes, block_bytes: int, begin: int) -> int:
    """How many pages a map knows of: up to the last whose bits are set. `begin`: where in the map `content` begins."""
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
