"""Back up, restore and upgrade Prefect's own database.

A restore replaces the database that flow runs are written to. So it runs without Prefect, on a host that reaches the
database and can stop Prefect's services:

    python -m flows.infrastructure.prefect.server restore --environment production --confirm production

The newer Prefect rehearses an upgrade, in a checkout or an image that has it installed:

    python -m flows.infrastructure.prefect.server upgrade --environment production
"""

from __future__ import annotations

import argparse
import sys
from typing import Annotated

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.database import backup as taking
from flows.database import restore_steps
from flows.database.gate import gate_of_backup
from flows.database.waiting_commits import alone_act, free_commits, judge_commits
from flows.infrastructure.prefect import recovery, upgrade
from flows.launch import add_confirmation, launch
from flows.pinned import pin_database
from flows.store import mark_verified, measured, note, store_for, tidy
from runbook.drivers import exit_code
from runbook.flow import flow
from runbook.guard.effect import Effect, back_to, seconds_from
from runbook.kinds import permitted_by
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import about, size
from tasks.postgres.restore.staged_copy import check_jobs, content_in, dump_in
from tasks.postgres.restore.swap import advisory_lock, swap_databases
from tasks.postgres.server.server import find_obstacles, read_identity, read_server
from tasks.prefect.server import settle_copy


@flow(name="backup-prefect", flow_run_name=RunName("backup-prefect {environment}"))
def backup_prefect(environment: str, jobs: Annotated[int, Field(ge=0, le=32)] = 0) -> Report:
    """Prefect 自身のデータベースのバックアップ (§8.2)

    Backs up Prefect's own database (deployments, runs, blocks, automations) in one snapshot, with a manifest of its
    content, like backup-database does for the application. Run it daily, and before every upgrade of Prefect.

    It changes nothing. The database contains the key to all its secrets, so an unencrypted backup is refused:
    `[backups]` needs `recipients`. For verify-backup, replicate-backups and prune-backups its kind is prefect.
    Evidence: the manifest, and the table of its content.

    Args:
        environment: Environment (lab, staging, production …)
        jobs: Parallel jobs. 0: number of CPUs
    """
    env = Environment.find(environment)
    with runbook("Backup Prefect", env, changes=True) as report:
        own = env.of_prefect()
        store = store_for(env, "prefect")
        workers = check_jobs(jobs)
        server = read_server(own.postgres)
        recovery.judge_encrypted(report, store)
        recovery.judge_key_inside(report, env)
        taking.judge_source(report, own, server)
        report.fail_if_critical()
        tidy(report, env, store)
        taking.judge_room(report, own, store)
        report.fail_if_critical()
        tool = recovery.read_version(report, env)
        backup = taking.take(report, own, server, store, workers, kind="prefect", tool=tool)
        report.outcome = f"{backup.name} is in the store"
        report.fact("backup", backup.name)
        note(report, env, f"Backup completed - {backup.name}, {size(backup.manifest.bytes)}")
        recovery.attach_stored(report, env, store)
    return report


@flow(name="restore-prefect", flow_run_name=RunName("restore-prefect {environment} {backup}"))
def restore_prefect(
    environment: str,
    backup: str = "latest",
    source: Stores = "backups",
    jobs: Annotated[int, Field(ge=0, le=32)] = 0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """Prefect 自身のデータベースのリストア (§8.2)

    Restores Prefect's own database alongside the live one, or into a new, empty cluster. Proves it equal to the
    backup's snapshot, then swaps it in while Prefect's services are stopped briefly. Run it when Prefect's database is
    lost or damaged. Then also give Prefect an empty Redis: the old one belongs to the lost database.

    From the UI it shows only the plan, because it would replace the database that the run is written to. Carry it out
    on a host, without Prefect: `python -m flows.infrastructure.prefect.server restore --environment … --confirm …`.

    After the proof it changes two things in the copy: it removes overdue scheduled runs, which would all start at once,
    and frees the slots of all locks. So it is refused while a run holds an environment's lock; it names that run. Runs
    that ended after the backup are marked cancelled. The old database is kept under another name. Evidence: the table
    of the comparison, the API's answers.

    Args:
        environment: Environment (lab, staging, production …)
        backup: latest, a date (YYYYMMDD) or a backup's name (prefect_…)
        source: Store. copies: the replica store
        jobs: Parallel jobs. 0: number of CPUs
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out (on the command line only). Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Restore Prefect", env, confirm, plan, changes=True, rank="recovery") as report:
        own, workers = env.of_prefect(), check_jobs(jobs)
        recovery.judge_caller(report, env, confirm)
        server = read_server(own.postgres)
        chosen = restore_steps.choose_backup(report, own, backup, source, "prefect")
        recovery.judge_revision(report, chosen)
        restore_steps.judge_server(report, own, chosen, server, roles_are_made=True)
        restore_steps.judge_obstacles(report, find_obstacles(own.postgres, own.postgres.database))
        restore_steps.judge_space(report, own, content_in(chosen).bytes, backup=chosen)
        judge_commits(report, own)
        live = read_identity(own.postgres, own.postgres.database)
        found = recovery.judge_services(report, env, live)
        recovery.plan(report, env, own, chosen, server)
        pin_database(report, own.postgres, replaced=True)
        gate = gate_of_backup(report, own, chosen, live.oid, "Prefect's database")
        effect = Effect(
            back_to("Prefect's database", chosen.manifest.taken),
            "the replaced database is kept",
            (gate.plan(),),
            f"Prefect is stopped for {about(seconds_from(report.plan_steps, 'stop Prefect'))}",
        )
        permit = report.permit(restore_steps.replace_act(own), alone_act(own), effect=effect)
        report.state_is("Prefect's database is unchanged", "fix the findings above, then run this again")
        free_commits(report, permit, own, after=live)
        made = recovery.make_roles(report, permit, own, chosen, server)
        with advisory_lock(own.postgres) as guard:
            content = content_in(chosen)
            copy = restore_steps.build_database(permit, own, dump_in(chosen), content.properties, workers)
            proven = restore_steps.prove_database(report, own, chosen, copy)
            settled = settle_copy.after(proven, made)(permit, env.prefect_server, copy)
            restore_steps.ready_database(report, own, copy, workers, after=settled)
            gate.look_ahead()
            with (
                recovery.services_stopped(report, env, found, live),
                restore_steps.swapping(report),
                permitted_by(permit),
            ):
                swapped = swap_databases.bind(own.postgres, live.oid, chosen.name, gate.judge)(guard, copy)
        recovery.report_swapped(report, chosen, swapped, settled)
        recovery.bring_up(report, env, {table: one.rows for table, one in proven.tables.items()}, swapped)
        report.fail_if_critical()
        restore_steps.judge_data_loss(report, env, chosen, gate)
        mark_verified(report, chosen)
        report.measure(*measured(chosen))
        report.outcome = f"Prefect is what it was in {chosen.name}, proven by content"
    return report


@flow(name="rehearse-prefect-upgrade", flow_run_name=RunName("rehearse-prefect-upgrade {environment} {backup}"))
def rehearse_prefect_upgrade(
    environment: str, backup: str = "latest", source: Stores = "backups", jobs: Annotated[int, Field(ge=0, le=32)] = 0
) -> Report:
    """Prefect のアップグレードのリハーサル (§8.2)

    Rehearses an upgrade of Prefect before anything is stopped:

    1. restores a backup of its database into a scratch database, and proves it equal to the backup;
    2. migrates it with the Prefect that is installed here, and compares it again table by table;
    3. serves it with that Prefect's API, which must know every deployment and automation and read every secret.

    Then it lists the steps of the switch. Run it before every upgrade. Run it again afterwards: it also checks that the
    live Prefect has everything.

    It tests the Prefect of this checkout: install the new version, then run it on the command line (`python -m
    flows.infrastructure.prefect.server upgrade --environment …`), which needs no Prefect. With the installed version
    equal to the live one there is nothing to upgrade; the report states it.

    Nothing live is changed; the scratch database is deleted at the end. It needs as much free disk space as a restore.
    Evidence: the tables that the migration changed, its duration, the new API's answers.

    Args:
        environment: Environment (lab, staging, production …)
        backup: latest, a date (YYYYMMDD) or a backup's name (prefect_…)
        source: Store. copies: the replica store
        jobs: Parallel jobs. 0: number of CPUs
    """
    env = Environment.find(environment)
    with runbook("Rehearse Prefect upgrade", env, changes=True) as report:
        own, workers = env.of_prefect(), check_jobs(jobs)
        chosen = restore_steps.choose_backup(report, own, backup, source, "prefect")
        is_newer = upgrade.judge_versions(report, chosen)
        restore_steps.judge_server(report, own, chosen, read_server(own.postgres))
        restore_steps.judge_space(report, own, content_in(chosen).bytes, backup=chosen)
        report.fail_if_critical()
        upgrade.judge_live(report, env, content_in(chosen))
        upgrade.rehearse(report, own, env, chosen, workers)
        upgrade.attach_switch(report, env)
        report.outcome = upgrade.outcome(chosen, is_newer)
    return report


def main() -> int:
    """The command line: a restore and a rehearsal by a newer Prefect are never flow runs."""
    parser = argparse.ArgumentParser(prog="python -m flows.infrastructure.prefect.server")
    commands = parser.add_subparsers(dest="what", required=True)
    parsers = {name: commands.add_parser(name) for name in ("backup", "restore", "upgrade")}
    for one in parsers.values():
        one.add_argument("--environment", required=True, help="its TOML is in deployments/environments")
        one.add_argument("--jobs", type=int, default=0, help="workers; 0 is one per core")
    for one in (parsers["restore"], parsers["upgrade"]):
        one.add_argument("--backup", default="latest", help="latest, YYYYMMDD, or a backup's name")
        one.add_argument("--source", choices=["backups", "copies"], default="backups")
    add_confirmation(parsers["restore"])
    parameters = vars(parser.parse_args())
    what = parameters.pop("what")
    if what == "backup":
        return launch(backup_prefect, parameters)
    return launch(restore_prefect if what == "restore" else rehearse_prefect_upgrade, parameters, alone=True)


if __name__ == "__main__":
    sys.exit(exit_code(main))
