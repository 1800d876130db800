"""What check-autovacuum says of what it read (§1.3)."""

from __future__ import annotations

from blocks.environment import Environment
from flows.database.setting_steps import find_overrides, judge_setting
from runbook.render import size
from runbook.report import Report, Status
from tasks.postgres.autovacuum import Activity, Autovacuum
from tasks.postgres.recommended import AUTOVACUUM
from tasks.postgres.settings import read_settings
from tasks.postgres.upkeep import MOST_SHOWN
from tasks.postgres.vacuum import WRAPAROUND_XIDS

MOSTLY_DEAD = 0.5
# Ages: autovacuum begins to freeze at autovacuum_freeze_max_age whatever its other settings say.
FREEZE_IS_LATE, WRAPAROUND_IS_NEAR = 1.25, 1_000_000_000


def judge_settings(report: Report, env: Environment, found: Autovacuum) -> None:
    """Each of §1.3's, as check-postgres-settings judges it; off is critical."""
    settings = read_settings(env.postgres)
    overrides = find_overrides(env, settings)
    for name in AUTOVACUUM:
        if name in settings.by_name:
            judge_setting(report, settings.by_name[name], overrides)
    report.expect(
        "track_counts",
        found.counted,
        "ALTER SYSTEM SET track_counts = on; then SELECT pg_reload_conf(): without it autovacuum does nothing",
        value="on" if found.counted else "off: dead rows are not measured",
        expected="on",
    )


def judge_tables(report: Report, found: Autovacuum) -> None:
    """Those that autovacuum does not keep up with, each with the setting to use; all of them in a table."""
    report.fact("statistics since", f"{found.stats_reset} UTC")
    behind = [table for table in found.tables if table.is_behind]
    for table in behind[:MOST_SHOWN]:
        why = "" if table.enabled else ", autovacuum is off for it"
        report.expect(
            f"autovacuum keeps up with {table.name}",
            False,
            f"{table.remedy} Then vacuum-database with tables=[{table.name}]",
            value=f"{table.dead:,} dead rows, {table.dead_ratio:.0%} of all{why}",
            expected=f"it comes at {table.vacuum_trigger:,.0f}",
            otherwise=Status.CRITICAL if table.dead_ratio >= MOSTLY_DEAD else Status.WARN,
        )
    if unknown := [table for table in found.tables if table.is_unknown]:
        report.warn(
            "tables whose rows are not counted",
            "vacuum-database with mode=analyze counts them; then look again",
            value=f"not measured: {', '.join(table.name for table in unknown[:5])} ({len(unknown)}); counters lost",
        )
    if not behind and not unknown and found.counted:
        report.expect("autovacuum keeps up with every table", True, "", value=f"{len(found.tables)} tables")
    stale = [table for table in found.tables if table.is_stale]
    report.expect(
        "planner statistics",
        not stale,
        "vacuum-database with mode=analyze and these tables",
        value=", ".join(f"{t.name}: {t.changed:,} rows changed" for t in stale[:5]) or "recent",
        expected="renewed after few changes",
        otherwise=Status.WARN,
    )
    rows = [_row(table) for table in found.tables]
    more = f" (the first {MOST_SHOWN} of {len(rows)})" if len(rows) > MOST_SHOWN else ""
    report.table(f"Tables, by dead rows against what calls autovacuum{more}", _COLUMNS, rows[:MOST_SHOWN])
    if behind:
        report.table("Settings to use", ("statement",), [(table.remedy,) for table in behind[:MOST_SHOWN]])


_COLUMNS = (
    *("table", "size", "live rows", "dead rows", "called at", "changed since analyze"),
    *("last vacuum (UTC)", "last autovacuum", "last analyze", "last autoanalyze", "own settings"),
)


def _row(table: Activity) -> tuple[str, ...]:
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
    """How far wraparound is."""
    for age in found.ages:
        late = FREEZE_IS_LATE * age.freeze_max_age
        near = age.xids > WRAPAROUND_IS_NEAR
        report.expect(
            f"age in {age.what}",
            age.xids <= late and not near,
            "end what holds dead rows back, then vacuum-database (plain, all tables): it freezes old rows",
            value=f"{age.xids:,}, {age.xids / WRAPAROUND_XIDS:.1%} of the way to wraparound",
            expected=f"≤ {late:,.0f}",
            otherwise=Status.CRITICAL if near else Status.WARN,
        )
