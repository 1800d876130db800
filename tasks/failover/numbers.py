"""The numbers of timelines that are taken: a server promoted without knowing them would use one twice.

https://www.postgresql.org/docs/current/continuous-archiving.html#BACKUP-TIMELINES
"""

from __future__ import annotations

from pathlib import Path

from blocks.postgres.server import Postgres
from runbook.files import inside
from runbook.kinds import action
from tasks.cluster.unpack import give
from tasks.host.disk import is_here
from tasks.stores.directory import told
from tasks.wal.archive.archive import Archive, timeline_in


@action(idempotent=True)
def write_histories(standby: Postgres, archive: Archive, timeline: int, replayed: int) -> tuple[str, ...]:
    """Write the histories of the archive's higher timelines into a standby's pg_wal, if that is on this host. Left out
    are those that branch off after `replayed`, its position on `timeline`: a standby follows them at once.

    Raises:
        OpsError: the archive cannot be read, or the directory cannot be written.
    """
    if not is_here(standby.host):
        return ()
    listing, written = archive.listing(), []
    for number, stored in listing.histories.items():
        path = Path(standby.data_directory, "pg_wal", f"{number:08X}.history")
        left = timeline_in(archive, listing, number).left_at(timeline)
        if number <= timeline or path.exists() or (left is not None and left >= replayed):
            continue
        with told(path):
            inside.write(path, archive.get(stored[0]))
        give(path, standby.os_user)
        written.append(path.name)
    return tuple(written)
