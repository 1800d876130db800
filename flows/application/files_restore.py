"""Restore of the application's files only, and its undo (§8.2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blocks.environment import Environment, Stores
from flows.application.files_gate import (
    USERS,
    changes_since,
    measured_loss,
    pass_files,
    planned_loss,
    planned_loss_since,
)
from flows.application.health_checks import report_health
from flows.pinned import pin_paths
from flows.restart import start_again
from flows.store import choose_backup, mark_failed, mark_verified, measured
from runbook import clock
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect, back_to, seconds_from
from runbook.guard.permit import Act, CarriesOut, Permit
from runbook.kinds import permitted_by
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.application.connection_string import SWITCH, switch_target
from tasks.application.files import directory_of
from tasks.application.health import wait_healthy
from tasks.application.live_files import read_written
from tasks.application.staged_files import (
    REPLACE_FILES,
    FilesCopy,
    FilesSwapped,
    build_files_copy,
    judge_files_backup,
    swap_files,
)
from tasks.application.undo import (
    UNDO,
    choose_aside,
    end_undo,
    read_aside,
    replaced_files,
    restored_at,
    swap_files_back,
)
from tasks.backups.catalogue import Backup, instead_of
from tasks.host.services import read_services, start_services, stop_services

HEALTH_SECONDS = 120


@flow(name="restore-files", flow_run_name=RunName("restore-files {environment} {backup}"))
def restore_files(
    environment: str, backup: str = "latest", source: Stores = "backups", plan: str = "", confirm: str = ""
) -> Report:
    """アプリケーションファイルのリストア (§8.2)

    Restores only the application's files: code, settings, uploads. Run it when files are deleted or corrupt and the
    database and Redis are intact. The backup is unpacked alongside the live directory and compared with its manifest:
    content, mode and owner of every entry.

    What it changes: backend and frontend are stopped, the live directory is renamed to
    `<directory>.superseded_<time>`, the copy gets its name, and both are started. The plan counts the files that were
    changed since the backup. They are counted again after the stop: if more would be lost than the plan said, apart
    from later changes, nothing is replaced. If the restored settings name another
    database server than the current primary, the connection string is corrected. It is safe to run again after a kill.
    To undo: undo-restore-files; discard-superseded deletes the old files. Evidence: the comparison.

    Args:
        environment: Environment (lab, staging, production …)
        backup: latest, a date (YYYYMMDD) or a backup's name
        source: Store of the backups (backups: the usual one; copies: the replica store)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Restore files", env, confirm, plan, changes=True, rank="recovery") as report:
        chosen = choose_backup(report, env, "files", backup, source)
        _judge(report, env, chosen)
        report.plan(
            "restore alongside",
            f"{chosen.name} into {env.application.directory}.restoring, and compare it",
            size=chosen.manifest.bytes,
            seconds=1,
            by=[build_files_copy],
        )
        _plan_swap(report, env, f"{env.application.directory}.restoring", env.application.directory, swap_files)
        pin_paths(report, "live files", env.application.directory)
        taken, live = chosen.manifest.taken, directory_of(env.application)
        down = seconds_from(report.plan_steps, "stop services") if _roles(env) else 0.0
        changes = changes_since(chosen)
        loss = planned_loss_since(env, chosen)
        effect = Effect(back_to("the application's files", taken), "undo-restore-files", (loss,), down)
        permit = report.permit(Act(REPLACE_FILES, env.application.directory), *_switch_act(env), effect=effect)
        report.state_is("the live files are unchanged", "fix the findings above, then run this again")
        copy = build_files_copy(permit, env.application, chosen)
        _prove(report, chosen, copy)
        with services_stopped(report, env) as stopped:
            pass_files(report, env, live, changes)
            swapped = swap_files.after(stopped.last)(permit, env.application, copy)
            stopped.exchanged(report, f"{chosen.name} is live")
            report.loses(measured_loss(report, swapped.kept, changes))
            _switch(report, permit, env, swapped)
        _start(report, env, swapped)
        report.measure(*measured(chosen))
        mark_verified(report, chosen)
        report.fact("undo", f"undo-restore-files with kept={swapped.kept.name}" if swapped.kept else "nothing was live")
        report.outcome = f"{chosen.name} is live, equal to its manifest"
    return report


@flow(name="undo-restore-files", flow_run_name=RunName("undo-restore-files {environment} {kept}"))
def undo_restore_files(environment: str, kept: str = "latest", plan: str = "", confirm: str = "") -> Report:
    """アプリケーションファイルのリストアの取り消し (§8.2)

    Returns to the files that restore-files or full-restore replaced. Run it when the restored files turn out to be
    wrong. Files that were written since the restore are kept in the replaced directory. The plan counts them, and the
    run again after the stop: if more would be lost than the plan said, apart from later changes, nothing is replaced.

    What it changes: backend and frontend are stopped, the two directories exchange their names, and both are
    started. It is safe to run again after a kill: the next run finishes the exchange. To undo: run it again. Evidence:
    the number and size of the files, and the list of those written since.

    Args:
        environment: Environment (lab, staging, production …)
        kept: latest, or the name of a superseded directory (….superseded_YYYYMMDD_HHMMSS)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    name = "undo-restore-files"
    with runbook("Undo restore of files", env, confirm, plan, changes=True, rank="recovery", name=name) as report:
        aside = choose_aside(env.application, kept, env.reports_directory)
        report.pin("kept", aside.name)
        report.fact("return to", aside.name)
        if aside.exists():
            _judge_aside(report, env, aside)
        _plan_swap(report, env, str(aside), env.application.directory, swap_files_back)
        pin_paths(report, "live files", env.application.directory)
        since, replaced = restored_at(aside), replaced_files(env.application, aside, env.reports_directory)
        changes = partial(read_written, since=since)
        down = seconds_from(report.plan_steps, "stop services") if _roles(env) else 0.0
        loss = planned_loss(replaced, changes, since)
        effect = Effect(f"the files of {aside.name} are live again", "run it again", (loss,), down)
        permit = report.permit(Act(UNDO, str(aside)), *_switch_act(env), effect=effect)
        with services_stopped(report, env) as stopped:
            pass_files(report, env, replaced, changes)
            swapped = swap_files_back.after(stopped.last)(permit, env.application, aside, env.reports_directory)
            stopped.exchanged(report, f"the files of {aside.name} are live")
            report.loses(measured_loss(report, swapped.kept, changes))
            _switch(report, permit, env, swapped)
        _start(report, env, swapped)
        end_undo(env.reports_directory)
        report.fact("kept", swapped.kept or "nothing was live")
        report.outcome = f"the files of {aside.name} are live again"
    return report


@dataclass
class StoppedRoles:
    """The services during the swap. `last`: the step that the next one follows in the run graph."""

    running: tuple[str, ...]
    last: object
    done: bool = False

    def exchanged(self, report: Report, what: str) -> None:
        """From here on the services are started on the new files, not reverted to the old ones."""
        self.done = True
        report.state_is(f"{what}; backend and frontend may be stopped", "run this again: it is safe")


@contextlib.contextmanager
def services_stopped(report: Report, env: Environment) -> Iterator[StoppedRoles]:
    """Stop backend and frontend during the block. If it fails before the swap, start those that ran."""
    roles = _roles(env)
    states = read_services(env.services, roles) if roles else None
    stopped = StoppedRoles(states.wanted if states else (), states)
    report.state_is("services may be stopped; no file was deleted", "run this again: it is safe")
    try:
        if roles:
            stopped.last = stop_services.after(states)(env.services, roles)
        yield stopped
    except BaseException:
        if not stopped.done:
            _start_again(report, env, stopped)
        raise


def _start_again(report: Report, env: Environment, stopped: StoppedRoles) -> None:
    if start_again(report, env.services, stopped.running):
        report.state_is(
            "the live files are unchanged; services run as before", "fix the findings above, then run this again"
        )


def _roles(env: Environment) -> list[str]:
    """The services that use the application's directory, in the order of their stop and start."""
    return env.services_in(USERS) if env.has("services") else []


def _judge(report: Report, env: Environment, chosen: Backup) -> None:
    found = judge_files_backup(env.application, chosen)
    report.require(
        "directory of the restored files",
        not found.problems,
        "free disk space there, or correct [application] directory",
        value="; ".join(found.problems[:3]) or f"{size(found.bytes_needed)} needed, {size(found.bytes_free)} free",
        expected="space for a staged copy, in a directory that can be renamed",
    )
    report.table("Notes about this restore", ("note",), [(text,) for text in found.notes])


def _prove(report: Report, chosen: Backup, copy: FilesCopy) -> None:
    equal = report.require(
        "files equal to the backup",
        not copy.differences,
        f"the live files are unchanged; {instead_of(chosen)}" if copy.differences else "",
        value="; ".join(copy.differences[:3]) or f"{copy.entries:,} entries, {size(copy.bytes)}",
        expected="content, mode and owner of every entry",
    )
    if not equal:
        mark_failed(report, chosen, copy.differences[0])
    report.fail_if_critical()


def _plan_swap(report: Report, env: Environment, incoming: str, live: str, swaps: CarriesOut) -> None:
    roles = _roles(env)
    if roles:
        report.plan("stop services", ", ".join(roles), seconds=2, by=[stop_services])
    swap = f"{live} is kept as {live}.superseded_<time>; {incoming} becomes {live}"
    report.plan("swap", swap, seconds=0.1, by=[swaps])
    if roles:
        healthy: list[CarriesOut] = [wait_healthy] if "backend" in roles else []
        start = f"{', '.join(roles)}, then wait until healthy"
        report.plan("start services", start, seconds=8, by=[start_services, *healthy])


def _switch_act(env: Environment) -> list[Act]:
    return [Act(SWITCH, env.application.env_file)] * bool(env.application.env_file and env.has("postgres"))


def _switch(report: Report, permit: Permit, env: Environment, swapped: FilesSwapped) -> None:
    """The restored connection string can be older than a failover: correct it."""
    if not _switch_act(env):
        return
    try:
        with permitted_by(permit, after=swapped):
            done = switch_target.bind(env.application, env.postgres)()
    except OpsError as error:
        report.warn("connection string of the application", error.hint, value=error.message)
        return
    if done.changed:
        report.fact("connection string of the application", f"{done.before} → {done.after}")


def _start(report: Report, env: Environment, swapped: FilesSwapped) -> None:
    """Start every service of the directory, also one that did not run before: a killed run may have stopped it."""
    if not (roles := _roles(env)):
        return
    started = start_services.after(swapped)(env.services, roles)
    if "backend" in roles:
        health = wait_healthy.after(started)(env.application, seconds=HEALTH_SECONDS, services=env.services)
        report_health(report, health)


def _judge_aside(report: Report, env: Environment, aside: Path) -> None:
    found = read_aside(env.application, aside)
    report.fact("files in it", f"{found.files:,}, {size(found.bytes)}")
    report.require(
        "files in the directory",
        found.files > 0,
        "name another directory in kept",
        value=f"{found.files:,}",
        expected="at least 1",
    )
    if found.written:
        report.warn(
            "files written since the restore",
            "copy the files that you need out of the replaced directory",
            value=f"{len(found.written):,}; the undo keeps them in the replaced directory",
        )
        report.table(
            f"Files written since {clock.text(found.since) if found.since else 'the restore'}",
            ("file",),
            [(name,) for name in found.written],
            most=50,
        )
