"""Prefect's own history: delete old flow runs, and vacuum its database."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from blocks.environment import Environment
from flows.deleting import judge_clocks
from runbook import clock
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.postgres.restore.staged_copy import check_jobs
from tasks.postgres.upkeep.vacuum import read_tables, vacuum_tables
from tasks.prefect.server import count_old_events, count_old_runs, delete_old_runs

EVENTS_SETTING = "PREFECT_SERVER_EVENTS_RETENTION_PERIOD"


@flow(name="clean-prefect-history", flow_run_name=RunName("clean-prefect-history {environment}"))
def clean_prefect_history(environment: str) -> Report:
    """Prefect 自身の実行履歴の削除と VACUUM (§8.2)

    Deletes the flow runs that ended more than `[prefect_server] keep_days` ago, with their task runs, logs and
    artifacts; then runs VACUUM and ANALYZE on every table of Prefect's database. Runs that are running, suspended,
    paused or scheduled are kept, however old they are. Run it daily.

    It has no `confirm`: keep_days in the environment's TOML is the consent. It cannot be undone. The reports of those
    runs stay in the environment's report folder, with their hashes. Prefect itself deletes events; events older than
    keep_days are a WARN. Evidence: the number of runs, the size of each table before and after.

    Args:
        environment: Environment (lab, staging, production …)
    """
    env = Environment.find(environment)
    with runbook("Clean Prefect history", env, changes=True) as report:
        server = env.prefect_server
        if not server.keep_days:
            raise OpsError("[prefect_server] keep_days is 0: all history is kept", "set it in the environment's TOML")
        judge_clocks(report, env, database=server)
        before = datetime.now(UTC) - timedelta(days=server.keep_days)
        report.fact("kept", f"{server.keep_days} days: runs that ended since {clock.text(before, 'minutes')}")
        report.fact("old flow runs", f"{count_old_runs(server, before):,}")
        deleted = delete_old_runs(server, before)
        _vacuum(report, env)
        _judge_events(report, env, before)
        report.outcome = f"{deleted:,} flow runs deleted"
    return report


def _vacuum(report: Report, env: Environment) -> None:
    """A plain VACUUM, which blocks no reads or writes."""
    database = env.of_prefect().postgres
    tables = read_tables(database)
    done = vacuum_tables(database, tables, "plain_analyze", check_jobs(1))
    after = {table.name: table for table in read_tables.after(done)(database)}
    for one in done:
        if one.failed:
            report.warn(f"VACUUM of {one.name}", one.hint, value=one.failed)
    largest = sorted((one for one in tables if one.name in after), key=lambda one: -one.total_bytes)
    report.table(
        "The largest tables of Prefect's database",
        ("table", "dead rows", "size with indexes"),
        [
            (
                one.name,
                f"{one.dead:,} → {after[one.name].dead:,}",
                f"{size(one.total_bytes)} → {size(after[one.name].total_bytes)}",
            )
            for one in largest
        ],
        most=15,
    )
    report.fact("database", f"{size(sum(one.total_bytes for one in after.values()))} in {len(after)} tables")


def _judge_events(report: Report, env: Environment, before: datetime) -> None:
    old = count_old_events(env.prefect_server, before)
    report.prefer(
        "events older than keep_days",
        not old,
        f"set {EVENTS_SETTING} of Prefect's server to {env.prefect_server.keep_days * 86_400} (seconds) or "
        "less; the server deletes them within an hour",
        value=f"{old:,}",
        expected="0: Prefect deletes them itself",
    )
