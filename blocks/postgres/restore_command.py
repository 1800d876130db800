"""The `restore_command` of a standby that reads a receiver's directory, also the segment that is not whole yet.

https://www.postgresql.org/docs/current/runtime-config-wal.html#GUC-RESTORE-COMMAND
"""

from __future__ import annotations

_COMMAND = """\
cp "{0}/%f" "%p" 2>/dev/null && exit 0; part="{0}/%f.partial"; test -f "$part" || exit 1; \
if test -f "pg_wal/%f"; then \
at=$(LC_ALL=C cmp "pg_wal/%f" "$part" 2>/dev/null | awk -F"[ ,]+" '{{ print $(NF - 2) }}'); \
test -n "$at" && tail -c "+$at" "$part" | od -An -tx1 | tr -d " 0*" 2>/dev/null | grep -q . || exit 1; fi; \
cp "$part" "%p" 2>/dev/null"""


def restore_command(directory: str) -> str:
    """A finished segment; else a `.partial`, only where that goes on beyond the server's own copy of it.

    A server puts what it restores in the place of its own segment. A receiver that is behind would thus take the last
    acknowledged writes from it, and its promotion ends in a PANIC. What a receiver has not written yet are zeros: where
    the two begin to differ and the `.partial` has nothing but zeros, it is the shorter one.
    """
    return _COMMAND.format(directory)
