"""Autovacuum: the tables where it falls behind, and the distance to wraparound (§1.3)."""

from __future__ import annotations

from dataclasses import dataclass

from blocks.postgres.server import Postgres, execute
from runbook.kinds import probe
from tasks.postgres.upkeep.session import upkeep_session


@dataclass(frozen=True)
class TableActivity:
    """Autovacuum's work for one table. Rows are PostgreSQL's estimates; a trigger is the number of rows that starts it.

    `last_times`: of vacuum, autovacuum, analyze, autoanalyze.
    """

    name: str
    rows: int
    live: int
    dead: int
    changed: int
    vacuum_trigger: float
    analyze_trigger: float
    scale_factor: float
    enabled: bool
    own_settings: str
    last_times: tuple[str, ...]
    autovacuums: int
    bytes: int
    xids: int

    @property
    def dead_ratio(self) -> float:
        """Dead rows of all rows, 0 for an empty table."""
        return self.dead / max(self.dead + self.live, 1)

    @property
    def is_unknown(self) -> bool:
        """Whether its counters were reset or lost in a crash: they count far fewer rows than pg_class."""
        return self.rows >= FEWEST_DEAD and self.live + self.dead < self.rows / 2

    @property
    def is_behind(self) -> bool:
        """Whether dead rows are far above the trigger, or above it with autovacuum disabled for the table."""
        factor = BEHIND if self.enabled else 1.0
        return self.dead >= FEWEST_DEAD and self.dead > factor * self.vacuum_trigger

    @property
    def is_stale(self) -> bool:
        """Whether changed rows are far above the analyze trigger: the planner uses old statistics."""
        return self.changed >= FEWEST_DEAD and self.changed > BEHIND * self.analyze_trigger

    @property
    def remedy(self) -> str:
        """ALTER TABLE text: the setting to use for this table."""
        statements = [] if self.enabled else [f"ALTER TABLE {self.name} RESET (autovacuum_enabled);"]
        factor = next(factor for rows, factor in SCALE_BY_ROWS if max(self.rows, self.live) >= rows)
        if self.scale_factor > factor:
            statements.append(f"ALTER TABLE {self.name} SET (autovacuum_vacuum_scale_factor = {factor});")
        elif self.enabled:  # it starts often enough, but is too slow
            statements.append(f"ALTER TABLE {self.name} SET (autovacuum_vacuum_cost_limit = {FASTER_COST_LIMIT});")
        return " ".join(statements)


BEHIND = 2.0
FEWEST_DEAD = 1000  # fewer dead rows do not matter, at any ratio
FASTER_COST_LIMIT = 2000  # ten times the default of vacuum_cost_limit
SCALE_BY_ROWS = ((10_000_000, 0.01), (1_000_000, 0.02), (0, 0.05))


@dataclass(frozen=True)
class TableAge:
    """The age of a database's oldest row, in transactions (or multixacts)."""

    what: str
    xids: int
    freeze_max_age: int


@dataclass(frozen=True)
class Autovacuum:
    """Tables and ages. `counted`: false if track_counts is off, and no number of rows is known."""

    tables: tuple[TableActivity, ...]
    ages: tuple[TableAge, ...]
    counted: bool
    stats_reset: str


@probe
def read_autovacuum(postgres: Postgres) -> Autovacuum:
    """Tables, the largest ratio of dead rows to the trigger first, and ages."""
    with upkeep_session(postgres) as connection:
        tables = [
            TableActivity(
                name,
                int(rows),
                int(live),
                int(dead),
                int(changed),
                float(trigger),
                float(analyze),
                float(factor),
                bool(on),
                own,
                tuple(times),
                int(runs),
                int(size),
                int(xids),
            )
            for name, rows, live, dead, changed, trigger, analyze, factor, on, own, times, runs, size, xids in execute(
                connection, _TABLES
            )
        ]
        counted, reset = execute(connection, _COUNTED)[0]
        return Autovacuum(
            tuple(sorted(tables, key=lambda t: -t.dead / max(t.vacuum_trigger, 1))),
            tuple(TableAge(str(what), int(xids), int(most)) for what, xids, most in execute(connection, _AGES)),
            counted == "on",
            str(reset),
        )


_COUNTED = """
SELECT current_setting('track_counts'), to_char(greatest(d.stats_reset, b.stats_reset), 'YYYY-MM-DD HH24:MI')
FROM pg_stat_database d, pg_stat_bgwriter b WHERE d.datname = current_database()
"""
_AGES = """
SELECT 'transactions', age(datfrozenxid), current_setting('autovacuum_freeze_max_age')::bigint
FROM pg_database WHERE datname = current_database()
UNION ALL
SELECT 'multixacts', mxid_age(datminmxid), current_setting('autovacuum_multixact_freeze_max_age')::bigint
FROM pg_database WHERE datname = current_database()
"""
# The trigger: threshold + scale factor × rows, the table's own setting before the server's; since 18 with a ceiling,
# which older servers do not have.
_TABLES = """
SELECT format('%I.%I', s.schemaname, s.relname), c.reltuples, s.n_live_tup, s.n_dead_tup, s.n_mod_since_analyze,
       CASE WHEN v.ceiling >= 0 THEN least(v.threshold + v.factor * v.rows, v.ceiling)
            ELSE v.threshold + v.factor * v.rows END,
       v.analyze_threshold + v.analyze_factor * v.rows, v.factor, v.enabled,
       coalesce(array_to_string(c.reloptions, ', '), ''),
       ARRAY(SELECT coalesce(to_char(t.last, 'YYYY-MM-DD HH24:MI'), 'never')
             FROM unnest(ARRAY[s.last_vacuum, s.last_autovacuum, s.last_analyze, s.last_autoanalyze])
                  WITH ORDINALITY AS t(last, n) ORDER BY t.n),
       s.autovacuum_count, c.relpages::bigint * current_setting('block_size')::bigint,
       greatest(age(c.relfrozenxid), 0)
FROM pg_stat_user_tables s JOIN pg_class c ON c.oid = s.relid
     CROSS JOIN LATERAL (SELECT jsonb_object_agg(option_name, option_value) AS own
                         FROM pg_options_to_table(c.reloptions)) AS o
     CROSS JOIN LATERAL (SELECT
         greatest(c.reltuples, 0) AS rows,
         coalesce(o.own->>'autovacuum_vacuum_threshold', current_setting('autovacuum_vacuum_threshold'))::float8
             AS threshold,
         coalesce(o.own->>'autovacuum_vacuum_scale_factor', current_setting('autovacuum_vacuum_scale_factor'))::float8
             AS factor,
         coalesce(o.own->>'autovacuum_vacuum_max_threshold', current_setting('autovacuum_vacuum_max_threshold', true),
                  '-1')::float8 AS ceiling,
         coalesce(o.own->>'autovacuum_analyze_threshold', current_setting('autovacuum_analyze_threshold'))::float8
             AS analyze_threshold,
         coalesce(o.own->>'autovacuum_analyze_scale_factor', current_setting('autovacuum_analyze_scale_factor'))::float8
             AS analyze_factor,
         coalesce(o.own->>'autovacuum_enabled', 'true')::boolean AS enabled) AS v
WHERE c.relkind IN ('r', 'm')
"""
