"""A server's rates of WAL and transaction ids.

https://www.postgresql.org/docs/current/monitoring-stats.html#MONITORING-PG-STAT-WAL-VIEW
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from runbook.wait import until


@dataclass(frozen=True)
class Rate:
    """A rate per second: in the few seconds of this run, and the long-term average."""

    present: float
    mean: float

    def seconds_left(self, amount: float) -> float:
        """Seconds until `amount` is used up at the current rate; infinite if nothing is written."""
        return seconds_until(amount, self.present)

    def seconds_left_on_average(self, amount: float) -> float:
        """Seconds at the average rate, which is too high for a server that was just created or filled."""
        return seconds_until(amount, self.mean)


def seconds_until(amount: float, per_second: float) -> float:
    """Seconds until an amount is used up: infinite at a rate of 0, 0 if it is already used up."""
    return max(amount, 0.0) / per_second if per_second > 0 else math.inf


@dataclass(frozen=True)
class Rates:
    """Growth of WAL in bytes and of transaction ids; `failures`: of the archiver in these seconds."""

    seconds: float
    wal: Rate
    xids: Rate
    failures: int


@probe
def measure_rates(postgres: Postgres, seconds: float) -> Rates:
    """Two readings `seconds` apart.

    Raises:
        Unreachable: it is down.
    """
    with postgres.connect() as connection:
        first = execute(connection, _COUNTERS)[0]
        end = time.monotonic() + seconds
        until(lambda: time.monotonic() >= end, what="the end of the measurement", seconds=seconds + 5)
        second = execute(connection, _COUNTERS)[0]
        mean_wal, mean_xids = execute(connection, _MEANS)[0]
    took = float(second[0]) - float(first[0])
    wal, xids = (float(second[i] - first[i]) / took for i in (1, 2))
    return Rates(took, Rate(wal, float(mean_wal)), Rate(xids, float(mean_xids)), int(second[3] - first[3]))


_COUNTERS = """
SELECT extract(epoch FROM clock_timestamp()),
       pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN coalesce(pg_last_wal_replay_lsn(), '0/0')
                            ELSE pg_current_wal_lsn() END, '0/0'),
       pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
       (SELECT failed_count FROM pg_stat_archiver)
"""
# The upper half of the system identifier is the second in which initdb ran.
_MEANS = """
SELECT coalesce((SELECT wal_bytes / nullif(extract(epoch FROM now() - stats_reset), 0) FROM pg_stat_wal), 0),
       coalesce(pg_snapshot_xmax(pg_current_snapshot())::text::bigint / nullif(
           extract(epoch FROM now()) - (SELECT system_identifier >> 32 FROM pg_control_system()), 0), 0)
"""
