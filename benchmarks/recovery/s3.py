"""From a bucket to a live database (§8.2): restore_database from the second set of stores, which is S3."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, Place
from benchmarks.s3 import copies_on, keep_newest
from runbook.units import size
from tests.s3.servers import running_gateway

REPLICATE = "flows.database.copies:replicate_backups"
RESTORE = "flows.database.restore:restore_database"


def figures(place: Place, peers: Peers, rows: Mapping[str, int]) -> list[Figure]:
    """Bytes of the database that is live at the end, a second of the whole flow.

    Raises:
        OpsError: the restore failed.
    """
    stored = keep_newest(place)
    backup = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
    with running_gateway() as server, copies_on(server, peers.directory):
        place.call(REPLICATE, direct=True, kind="postgres")
        place.settle(rows)
        called = place.call(RESTORE, direct=True, source="copies", confirm=NAME)
    place.tell(f"from S3: {called.seconds:.1f} s")
    restored = int(place.sql(f"SELECT pg_database_size('{DATABASE}')")[0][0])  # not before: it was bloated by updates
    return [
        Figure(
            f"S3 → restored: a backup of {size(backup)}, to a live database of {size(restored)}",
            called.seconds,
            ours=called.seconds,
            unit="s",
            shown=f"{size(restored / called.seconds)} a second",
        ),
        Figure.seconds(
            "… of that, fetching and comparing every file by SHA-256 (verify_files)", [called.step("verify_files")]
        ),
    ]
