"""From a bucket to a live database (§8.2): restore_database from the second set of stores, which is S3, and in turns
the same from the local store."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from benchmarks.figures import Figure
from benchmarks.peers import Peers
from benchmarks.place import DATABASE, NAME, Called, Place
from benchmarks.s3 import copies_on, keep_newest
from runbook.units import size
from tests.s3.servers import running_gateway

ROUNDS = 1
REPLICATE = "flows.database.copies:replicate_backups"
RESTORE = "flows.database.restore:restore_database"


def figures(place: Place, peers: Peers, rows: Mapping[str, int]) -> list[Figure]:
    """Bytes of the database that is live at the end, a second of the whole flow.

    Raises:
        OpsError: a restore failed.
    """
    far: list[Called] = []
    near: list[Called] = []
    stored = keep_newest(place)
    backup = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
    with running_gateway() as server, copies_on(server, peers.directory):
        place.call(REPLICATE, direct=True, kind="postgres")
        for number in range(ROUNDS):
            place.settle(rows)
            far.append(place.call(RESTORE, direct=True, source="copies", confirm=NAME))
            place.settle(rows)
            near.append(place.call(RESTORE, direct=True, confirm=NAME))
            place.tell(f"from S3 {number + 1}: {far[-1].seconds:.1f} s, from the local store {near[-1].seconds:.1f} s")
    restored = int(place.sql(f"SELECT pg_database_size('{DATABASE}')")[0][0])  # not before: it was bloated by updates
    seconds = statistics.median(one.seconds for one in far)
    return [
        Figure(
            f"S3 → restored: a backup of {size(backup)}, to a live database of {size(restored)}",
            seconds,
            ours=seconds,
            unit="s",
            shown=f"{size(restored / seconds)} a second",
        ),
        Figure.ratio(
            "… ÷ the same restore from the local store", [one.seconds for one in far], [one.seconds for one in near]
        ),
        Figure.ratio(
            "… fetching and comparing every file by SHA-256 (verify_files) ÷ comparing local ones",
            [one.step("verify_files") for one in far],
            [one.step("verify_files") for one in near],
        ),
    ]
