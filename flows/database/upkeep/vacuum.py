"""Vacuum: manual runs, and whether autovacuum keeps up (§1.3)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from blocks.environment import Environment
from flows.database.server.holders import LONG_SECONDS, judge_holders, of_database
from flows.database.server.settings import judge_setting
from flows.pinned import pin_database
from flows.setting_overrides import find_overrides
from runbook.change import Change, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.next import Next
from runbook.report import Report, Status
from runbook.run import WithoutConfirm, runbook
from runbook.run_name import RunName
from runbook.units import first_of, size
from tasks.postgres.restore.staged_copy import check_jobs
from tasks.postgres.server.recommended import AUTOVACUUM
from tasks.postgres.server.server import read_server
from tasks.postgres.server.settings import read_settings
from tasks.postgres.sessions.holders import XminHolder, find_holders
from tasks.postgres.upkeep.autovacuum import Autovacuum, TableActivity, read_autovacuum
from tasks.postgres.upkeep.session import MOST_SHOWN, read_space, resolve
from tasks.postgres.upkeep.vacuum import (
    WRAPAROUND_XIDS,
    Mode,
    Vacuumed,
    VacuumTable,
    read_tables,
    rewrite_table,
    vacuum_tables,
)

# Dead rows left after a vacuum that are worth a warning.
MANY_DEAD, DEAD_RATIO = 1000, 0.1
REWRITE_BYTES_PER_SECOND = 40_000_000


@flow(name="vacuum-database", flow_run_name=RunName("vacuum-database {environment} {mode}"))
def vacuum_database(
    environment: str,
    mode: Mode = "plain",
    tables: list[str] = [],  # noqa: B006 (Prefect copies it; the form shows a list)
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    long_seconds: Annotated[int, Field(ge=0, le=86400)] = LONG_SECONDS,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """手動VACUUM実行 (§1.3)

    Removes dead rows, freezes old ones and updates the planner's statistics, several tables at a time. Run it monthly,
    after a mass deletion, or when check-autovacuum names tables.

    `plain` is VACUUM, `analyze` is ANALYZE, `plain_analyze` is both: they block neither reads nor writes and need no
    confirm. `full` rewrites chosen tables and returns their space to the disk. It blocks all reads and writes of each
    table meanwhile, so it needs `confirm`.

    It first names the transactions, prepared transactions, slots and standbys that hold dead rows back, because vacuum
    cannot remove those rows; `full` does not start then. There is nothing to undo. Evidence: dead rows, size and age of
    each table before and after.

    Departs from the manual: VACUUM FULL only for chosen tables, with a permit; it gives up a lock after 10 s.

    Args:
        environment: Environment (lab, staging, production …)
        mode: plain: VACUUM; analyze: ANALYZE; plain_analyze: both; full: VACUUM FULL (exclusive lock, needs confirm)
        tables: Tables (schema.table). Empty: all (required for full)
        jobs: Parallel jobs. 0: number of CPUs (full: always 1)
        long_seconds: Report transactions that have been open longer than this, in seconds
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: For full: type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    alone: WithoutConfirm = "reads" if mode == "full" else "changes"
    with runbook("Vacuum database", env, confirm, plan, changes=True, without_confirm=alone) as report:
        require_primary(env)
        workers = check_jobs(jobs)
        before = _chosen(read_tables(env.postgres), tables, mode)
        holders: tuple[XminHolder, ...] = ()
        if mode != "analyze":
            holders = of_database(find_holders(env.postgres), env.postgres.database, long_seconds)
            otherwise = Status.CRITICAL if mode == "full" else Status.WARN
            judge_holders(report, _relevant(holders, mode), what="holds dead rows back", otherwise=otherwise)
        if mode == "full":
            done = _rewrite(report, env, before)
        else:
            done = vacuum_tables(env.postgres, before, mode, workers, whole=not tables)
        after = read_tables.after(done)(env.postgres)
        _report_results(report, before, after, done)
        _judge_rest(report, before, after, mode, holders)
    return report


def require_primary(env: Environment) -> None:
    """Refuse a standby, which replays its primary's vacuum.

    Raises:
        OpsError: the server is a standby.
    """
    if read_server(env.postgres).in_recovery:
        where = f"{env.postgres.host}:{env.postgres.port}"
        raise OpsError(f"the server at {where} is a standby", "run this on the primary: the standby replays it")


def _chosen(known: tuple[VacuumTable, ...], wanted: list[str], mode: Mode) -> tuple[VacuumTable, ...]:
    """The tables to work on. A partitioned table has no own rows: it is only analysed, which autovacuum never does."""
    if mode == "full" and not wanted:
        raise OpsError(
            "VACUUM FULL of all tables is refused: it would block all reads and writes",
            "choose tables; check-autovacuum and the table of a plain run show which can free the most space",
        )
    analyzes = mode in ("analyze", "plain_analyze")
    if not wanted:
        # System tables last: analysing the others leaves dead rows in their statistics.
        able = (table for table in known if analyzes or not table.parent)
        return tuple(sorted(able, key=lambda table: table.system))
    names = resolve(wanted, [(table.name, table.schema, table.relation) for table in known], "table")
    by_name = {table.name: table for table in known}
    chosen = tuple(by_name[name] for name in names)
    if not analyzes and (parents := [table.name for table in chosen if table.parent]):
        raise OpsError(
            f"{parents[0]} is partitioned: it has no own rows",
            "choose its partitions (pg_partition_tree lists them), or no table for all tables",
        )
    if mode == "full" and (system := [table.name for table in chosen if table.system]):
        raise OpsError(f"{system[0]} is a system table", "run VACUUM FULL by hand in a maintenance window, if at all")
    return chosen


def _relevant(holders: tuple[XminHolder, ...], mode: Mode) -> tuple[XminHolder, ...]:
    """A rewrite waits for every transaction; only those that hold xmin keep rows from a plain vacuum."""
    return holders if mode == "full" else tuple(holder for holder in holders if holder.holds_xmin)


def _judge_space(report: Report, env: Environment, tables: tuple[VacuumTable, ...]) -> None:
    """Free disk space for the largest table: VACUUM FULL keeps the old one until the new one is complete."""
    needed = max(table.total_bytes for table in tables)
    for space in read_space(env.postgres, [table.tablespace for table in tables]):
        judge_space(report, space.path, space.free_bytes, needed)


def judge_space(report: Report, path: str, free_bytes: int, needed_bytes: int) -> None:
    """Free disk space at one path; negative `free_bytes`: this host cannot measure it."""
    if free_bytes < 0:
        hint = f"check by hand that {size(needed_bytes)} are free there"
        report.warn(f"free space at {path}", hint, value="not measured")
        return
    report.require(
        f"free space at {path}",
        free_bytes > needed_bytes,
        f"free {size(needed_bytes - free_bytes)} there, or choose smaller tables or indexes",
        value=size(free_bytes),
        expected=f"more than {size(needed_bytes)}",
    )


def _rewrite(report: Report, env: Environment, tables: tuple[VacuumTable, ...]) -> tuple[Vacuumed, ...]:
    """VACUUM FULL, one table after the other."""
    needs = [lambda report: _judge_space(report, env, tables)]
    rewrites = [
        Change(
            rewrite_table.bind(env.postgres, table),
            "rewrite table",
            f"{table.name}: blocks all reads and writes meanwhile ({table.dead_ratio:.0%} of its rows are dead)",
            size=table.total_bytes,
            seconds=max(0.1, table.total_bytes / REWRITE_BYTES_PER_SECOND),
            needs=needs,
        )
        for table in tables
    ]
    effect = Effect(
        f"rewrites {first_of([table.name for table in tables])}",
        "not needed",
        down="no reads or writes of a table meanwhile",
    )
    with carrying_out(
        report, *rewrites, effect=effect, pins=[lambda report: pin_database(report, env.postgres)]
    ) as carry:
        return tuple(carry(rewrite) for rewrite in rewrites)


def _report_results(
    report: Report, before: tuple[VacuumTable, ...], now: tuple[VacuumTable, ...], done: tuple[Vacuumed, ...]
) -> None:
    after = {table.oid: table for table in now}
    seconds = {one.name: one.seconds for one in done}
    rows = [
        (
            old.name,
            f"{old.dead:,} → {new.dead:,}",
            f"{new.live:,}",
            f"{size(old.total_bytes)} → {size(new.total_bytes)}",
            f"{old.xids:,} → {new.xids:,} ({new.xids / WRAPAROUND_XIDS:.1%})",
            f"{seconds.get(old.name, 0):.1f}",
        )
        for old in sorted(before, key=lambda table: (table.system, -table.dead, -table.total_bytes))
        if (new := after.get(old.oid))
    ]
    columns = ("table", "dead rows", "live rows", "size with indexes", "age (of the limit)", "seconds")
    report.table("Before and after", columns, rows, most=MOST_SHOWN)
    failed = [one for one in done if one.failed]
    for one in failed[:MOST_SHOWN]:
        report.fail(f"table {one.name}", one.hint, value=one.failed)
    warned = [one for one in done if one.warned and not one.failed]
    for one in warned[:MOST_SHOWN]:
        report.warn(f"table {one.name}", one.hint or "check the server's log", value=f"done; warned: {one.warned}")
    freed = sum(old.total_bytes - after[old.oid].total_bytes for old in before if old.oid in after)
    report.fact(
        "dead rows", f"{sum(t.dead for t in before):,} → {sum(after[t.oid].dead for t in before if t.oid in after):,}"
    )
    report.fact("returned to the disk", size(max(freed, 0)))
    report.outcome = f"{len(done) - len(failed)} of {len(before)} tables done"


def _judge_rest(
    report: Report,
    before: tuple[VacuumTable, ...],
    now: tuple[VacuumTable, ...],
    mode: Mode,
    holders: tuple[XminHolder, ...],
) -> None:
    """Dead rows after a vacuum are those that it could not remove."""
    if mode == "analyze":
        return
    names = {table.name for table in before}
    left = [t for t in now if t.name in names and t.dead >= MANY_DEAD and t.dead_ratio > DEAD_RATIO]
    blamed = [holder for holder in holders if holder.holds_xmin]
    hint = (
        f"{blamed[0].remedy}; then run this again"
        if blamed
        else "run this again with long_seconds=0 to find a younger transaction. If there is none, load is the cause"
    )
    report.prefer(
        "dead rows that vacuum could not remove",
        not left,
        hint,
        value=", ".join(f"{t.name}: {t.dead:,} ({t.dead_ratio:.0%})" for t in left[:5]) or "few",
        expected=f"below {DEAD_RATIO:.0%} of each table",
    )


@flow(name="check-autovacuum", flow_run_name=RunName("check-autovacuum {environment}"))
def check_autovacuum(environment: str, long_seconds: Annotated[int, Field(ge=0, le=86400)] = LONG_SECONDS) -> Report:
    """自動VACUUM設定確認 (§1.3)

    Compares autovacuum's settings with the manual's, and shows its work for each table. For tables where it falls
    behind, it shows the setting to use. Run it monthly, and when queries slow down or tables grow for no reason.

    It reads only. A setting more eager than the manual's is accepted. Evidence: the settings, the tables.

    Departs from the manual: it judges a table by its dead rows against autovacuum's trigger, including the table's own
    settings, not by the time of its last vacuum.

    Args:
        environment: Environment (lab, staging, production …)
        long_seconds: Report transactions that have been open longer than this, in seconds
    """
    env = Environment.find(environment)
    with runbook("Check autovacuum", env) as report:
        found = read_autovacuum(env.postgres)
        holders = of_database(find_holders(env.postgres), env.postgres.database, long_seconds)
        judge_holders(report, [holder for holder in holders if holder.holds_xmin], what="holds dead rows back")
        judge_settings(report, env, found)
        judge_tables(report, found)
        judge_ages(report, found)
        behind = sum(table.is_behind for table in found.tables)
        report.outcome = f"autovacuum keeps up with {len(found.tables) - behind} of {len(found.tables)} tables"
    return report


MOSTLY_DEAD = 0.5
# Autovacuum starts to freeze at autovacuum_freeze_max_age, whatever its other settings.
FREEZE_IS_LATE, WRAPAROUND_IS_NEAR = 1.25, 1_000_000_000


def judge_settings(report: Report, env: Environment, found: Autovacuum) -> None:
    """The settings of §1.3, judged as in check-postgres-settings; autovacuum off is CRITICAL."""
    settings = read_settings(env.postgres)
    overrides = find_overrides(env, settings)
    for name in AUTOVACUUM:
        if name in settings.by_name:
            judge_setting(report, settings.by_name[name], overrides)
    report.require(
        "track_counts",
        found.counted,
        "ALTER SYSTEM SET track_counts = on, then SELECT pg_reload_conf(): without it autovacuum does nothing",
        value="on" if found.counted else "off: dead rows are not measured",
        expected="on",
    )


def judge_tables(report: Report, found: Autovacuum) -> None:
    """The tables where autovacuum falls behind, each with the setting to use; all tables as evidence."""
    report.fact("statistics since", f"{found.stats_reset} UTC")
    behind = [table for table in found.tables if table.is_behind]
    for table in behind[:MOST_SHOWN]:
        why = "" if table.enabled else ", autovacuum is off for it"
        report.fail(
            f"autovacuum keeps up with {table.name}",
            f"{table.remedy} Then run vacuum-database for it",
            value=f"{table.dead:,} dead rows, {table.dead_ratio:.0%} of all{why}",
            expected=f"autovacuum starts at {table.vacuum_trigger:,.0f}",
            worst=Status.CRITICAL if table.dead_ratio >= MOSTLY_DEAD else Status.WARN,
            follow=[Next("vacuum-database", "vacuum it", {"tables": [table.name]})],
        )
    if unknown := [table for table in found.tables if table.is_unknown]:
        report.warn(
            "tables whose rows are not counted",
            "run vacuum-database with mode=analyze, then run this again",
            value=f"not measured: {', '.join(table.name for table in unknown[:5])} ({len(unknown)}); counters lost",
            follow=[Next("vacuum-database", "count their rows", {"mode": "analyze"})],
        )
    if not behind and not unknown and found.counted:
        report.passed("autovacuum keeps up with every table", value=f"{len(found.tables)} tables")
    stale = [table for table in found.tables if table.is_stale]
    report.prefer(
        "planner statistics",
        not stale,
        "run vacuum-database with mode=analyze and these tables",
        value=", ".join(f"{t.name}: {t.changed:,} rows changed" for t in stale[:5]) or "recent",
        expected="updated after few changes",
        follow=[Next("vacuum-database", "analyse them", {"mode": "analyze", "tables": [t.name for t in stale]})],
    )
    rows = [_row(table) for table in found.tables]
    report.table("Tables, by dead rows against autovacuum's trigger", _COLUMNS, rows, most=MOST_SHOWN)
    if behind:
        report.table("Settings to use", ("statement",), [(table.remedy,) for table in behind], most=MOST_SHOWN)


_COLUMNS = (
    *("table", "size", "live rows", "dead rows", "trigger", "changed since analyze"),
    *("last vacuum (UTC)", "last autovacuum", "last analyze", "last autoanalyze", "own settings"),
)


def _row(table: TableActivity) -> tuple[str, ...]:
    return (
        table.name,
        size(table.bytes),
        f"{table.live:,}",
        f"{table.dead:,} ({table.dead_ratio:.0%})",
        f"{table.vacuum_trigger:,.0f}",
        f"{table.changed:,}",
        *table.last_times,
        table.own_settings,
    )


def judge_ages(report: Report, found: Autovacuum) -> None:
    """The distance to wraparound."""
    for age in found.ages:
        late = FREEZE_IS_LATE * age.freeze_max_age
        near = age.xids > WRAPAROUND_IS_NEAR
        report.require(
            f"age in {age.what}",
            age.xids <= late and not near,
            "end the holders of dead rows, then run vacuum-database for all tables, which freezes old rows",
            value=f"{age.xids:,}, {age.xids / WRAPAROUND_XIDS:.1%} of the limit",
            expected=f"≤ {late:,.0f}",
            worst=Status.CRITICAL if near else Status.WARN,
            follow=[Next("vacuum-database", "freeze old rows")],
        )
