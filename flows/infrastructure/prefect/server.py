"""Prefect's own database: backed up, encrypted; brought back, proven; its upgrade rehearsed.

A restore replaces what a flow run is written to, so it runs without Prefect, on a host that reaches the database and
can stop Prefect's services:

    python -m flows.infrastructure.prefect.server restore --environment production --confirm production

An upgrade is rehearsed by the newer Prefect, in a checkout or an image that has it:

    python -m flows.infrastructure.prefect.server upgrade --environment production
"""

from __future__ import annotations

import argparse
import sys
from typing import Annotated

from prefect import flow
from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database import backup as taking
from flows.database import restore_steps
from flows.database.waiting_commits import alone_act, free_commits, judge_commits
from flows.infrastructure.prefect import steps as prefect_steps
from flows.infrastructure.prefect import upgrade
from flows.launch import launch
from flows.pinned import pin_database
from flows.store import mark_verified, measured, note, store_for, tidy
from runbook.drivers import exit_code
from runbook.report import Report
from runbook.run import runbook
from runbook.units import size
from tasks.postgres.restore.staged_copy import check_jobs, content_in, dump_in
from tasks.postgres.restore.swap import advisory_lock, swap_databases
from tasks.postgres.server.server import find_obstacles, read_identity, read_server
from tasks.prefect.server import settle_copy


@flow(name="backup-prefect", flow_run_name="backup-prefect {environment}")
def backup_prefect(environment: str, jobs: Annotated[int, Field(ge=0, le=32)] = 0) -> Report:
    """Prefect 自身のデータベースのバックアップ (§8.2)

    Takes a backup of the database that Prefect itself keeps its deployments, runs, blocks and automations in: in one
    snapshot, with a manifest of its content, as backup-database does of the application's. Run it daily, and before
    every upgrade of Prefect.

    It changes nothing. The database holds the key to every secret in it, so a backup that would not be encrypted is
    refused: `[backups]` needs `recipients`. verify-backup, replicate-backups and prune-backups know it as the kind
    prefect. Evidence: the manifest, the table of what is in it.

    Args:
        environment: 対象の環境
        jobs: 並列数。0 は CPU の数
    """
    env = Environment.find(environment)
    with runbook("Backup Prefect", env, changes=True) as report:
        own = env.of_prefect()
        store = store_for(env, "prefect")
        workers = check_jobs(jobs)
        server = read_server(own.postgres)
        prefect_steps.judge_encrypted(report, store)
        prefect_steps.judge_key_inside(report, env)
        taking.judge_source(report, own, server)
        report.fail_if_critical()
        tidy(report, env, store)
        taking.judge_room(report, own, store)
        report.fail_if_critical()
        tool = prefect_steps.version_told(report, env)
        backup = taking.take(report, own, server, store, workers, kind="prefect", tool=tool)
        report.outcome = f"{backup.name} is in the store"
        report.fact("backup", backup.name)
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
        prefect_steps.tell_stored(report, env, store)
    return report


@flow(name="restore-prefect", flow_run_name="restore-prefect {environment} {backup}")
def restore_prefect(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """Prefect 自身のデータベースのリストア (§8.2)

    Brings Prefect's own database back: restored beside the live one, or into a new and empty cluster, proven equal to
    the backup's snapshot, then swapped in while Prefect's services are stopped for a moment. Run it when Prefect's
    database is lost or damaged. Give Prefect an empty Redis then: what is in the old one is of the lost database.

    Launched here it shows the plan only: carried out, it would replace the database that its own run is written to. On
    a host: `python -m flows.infrastructure.prefect.server restore --environment … --confirm …`, which needs no Prefect.

    Two things are put right in the copy, after its proof: scheduled runs that are overdue by now are removed (all would
    start at once), and the slots of all locks are freed. So it is refused while a run holds an environment's lock, and
    names that run. Runs that ended after the backup are marked cancelled. The old database is kept under another name.
    Evidence: the table of what was proven, the API's answers.

    Args:
        environment: 対象の環境
        backup: latest、日付 (YYYYMMDD)、またはバックアップ名 (prefect_…)
        source: 保管先。copies は複製先
        jobs: 並列数。0 は CPU の数
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行 (コマンドラインのみ)。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Restore Prefect", env, confirm, plan, changes=True, rank="recovery") as report:
        own, workers = env.of_prefect(), check_jobs(jobs)
        prefect_steps.judge_caller(report, env, confirm)
        server = read_server(own.postgres)
        chosen = restore_steps.choose_backup(report, own, backup, source, "prefect")
        prefect_steps.judge_revision(report, chosen)
        restore_steps.judge_server(report, own, chosen, server, roles_are_made=True)
        restore_steps.judge_obstacles(report, find_obstacles(own.postgres, own.postgres.database))
        restore_steps.judge_space(report, own, content_in(chosen).bytes)
        judge_commits(report, own)
        live = read_identity(own.postgres, own.postgres.database)
        found = prefect_steps.judge_services(report, env, live)
        prefect_steps.plan(report, env, own, chosen, server)
        pin_database(report, own.postgres, replaced=True)
        permit = report.permit(restore_steps.replace_act(own), alone_act(own))
        report.state_is("Prefect's database was not touched", "launch it again when what is said above is put right")
        free_commits(report, permit, own, after=live)
        made = prefect_steps.make_roles(report, permit, own, chosen, server)
        with advisory_lock(own.postgres) as guard:
            content = content_in(chosen)
            copy = restore_steps.build_database(permit, own, dump_in(chosen), content.properties, workers)
            proven = restore_steps.prove_database(report, own, chosen, copy)
            settled = settle_copy.after(proven, made)(permit, env.prefect_server, copy)
            ready = restore_steps.ready_database(report, own, copy, workers, after=settled)
            with prefect_steps.stopped(report, env, found, live), restore_steps.swapping(report):
                swapped = swap_databases.after(ready)(permit, own.postgres, guard, copy, live.oid, chosen.name)
        prefect_steps.tell_swapped(report, chosen, swapped, settled)
        prefect_steps.bring_up(report, env, {table: one.rows for table, one in proven.tables.items()}, swapped)
        report.fail_if_critical()
        restore_steps.judge_data_loss(report, env, chosen)
        mark_verified(report, chosen)
        report.measure(*measured(chosen))
        report.outcome = f"Prefect is what it was in {chosen.name}, proven by content"
    return report


@flow(name="rehearse-prefect-upgrade", flow_run_name="rehearse-prefect-upgrade {environment} {backup}")
def rehearse_prefect_upgrade(
    environment: str, backup: str = "latest", source: Stores = "backups", jobs: Annotated[int, Field(ge=0, le=32)] = 0
) -> Report:
    """Prefect のアップグレードのリハーサル (§8.2)

    Shows that an upgrade of Prefect will work before anything is stopped: a backup of its database is restored into a
    scratch database, proven equal to the backup, migrated by the Prefect that is installed here, compared again table
    by table, and served by that Prefect's API, which must know every deployment and automation and read every secret.
    Then it says what to do for the switch. Run it before every upgrade, and once more after it, when it also says
    whether the live Prefect has everything.

    The Prefect that is tried is that of this checkout: launch it with the new version installed, on the command line
    (`python -m flows.infrastructure.prefect.server upgrade --environment …`), which needs no Prefect. A worker of the
    version that runs already has nothing to upgrade to, and says so.

    Nothing live is touched; the scratch database is removed at the end. It needs as much room as a restore. Evidence:
    the tables that the migration changed, its seconds, the new API's answers.

    Args:
        environment: 対象の環境
        backup: latest、日付 (YYYYMMDD)、またはバックアップ名 (prefect_…)
        source: 保管先。copies は複製先
        jobs: 並列数。0 は CPU の数
    """
    env = Environment.find(environment)
    with runbook("Rehearse Prefect upgrade", env, changes=True) as report:
        own, workers = env.of_prefect(), check_jobs(jobs)
        chosen = restore_steps.choose_backup(report, own, backup, source, "prefect")
        is_newer = upgrade.judge_versions(report, chosen)
        restore_steps.judge_server(report, own, chosen, read_server(own.postgres))
        restore_steps.judge_space(report, own, content_in(chosen).bytes)
        report.fail_if_critical()
        upgrade.judge_live(report, env, content_in(chosen))
        upgrade.rehearse(report, own, env, chosen, workers)
        upgrade.tell_switch(report, env)
        report.outcome = upgrade.outcome(chosen, is_newer)
    return report


def main() -> int:
    """The command line. A restore is never a flow run, nor is what a newer Prefect tries."""
    parser = argparse.ArgumentParser(prog="python -m flows.infrastructure.prefect.server")
    commands = parser.add_subparsers(dest="what", required=True)
    parsers = {name: commands.add_parser(name) for name in ("backup", "restore", "upgrade")}
    for one in parsers.values():
        one.add_argument("--environment", required=True, help="its TOML is in deployments/environments")
        one.add_argument("--jobs", type=int, default=0, help="workers; 0 is one per core")
    for one in (parsers["restore"], parsers["upgrade"]):
        one.add_argument("--backup", default="latest", help="latest, YYYYMMDD, or a backup's name")
        one.add_argument("--source", choices=["backups", "copies"], default="backups")
    parsers["restore"].add_argument(
        "--confirm", default="", help="the environment's name; without it the plan is shown"
    )
    parameters = vars(parser.parse_args())
    what = parameters.pop("what")
    if what == "backup":
        return launch(backup_prefect, parameters)
    return launch(restore_prefect if what == "restore" else rehearse_prefect_upgrade, parameters, alone=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
