"""Restore of the application's files only, and its undo (§8.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from blocks.environment import Environment, Stores
from flows.application.files_gate import changes_since, planned_loss, planned_loss_since
from flows.application.files_swap import UNCHANGED, FilesSwap, plan_files_swap
from flows.pinned import pin_paths
from flows.store import choose_backup, mark_failed, mark_verified, measured
from runbook import clock
from runbook.change import Carrier, Change, Line, carrying_out
from runbook.flow import flow
from runbook.guard.effect import Effect, back_to
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import size
from tasks.application.files import directory_of
from tasks.application.live_files import read_written
from tasks.application.staged_files import (
    FilesCopy,
    FilesSwapped,
    build_files_copy,
    judge_files_backup,
    swap_files,
)
from tasks.application.undo import (
    choose_aside,
    end_undo,
    has_files,
    read_aside,
    replaced_files,
    restored_at,
    swap_files_back,
)
from tasks.backups.catalogue import Backup, instead_of


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
        restore = FilesRestore.plan(report, env, chosen)
        loss = planned_loss_since(env, chosen)
        taken = chosen.manifest.taken
        effect = Effect(back_to("the application's files", taken), "undo-restore-files", (loss,), restore.swap.down)
        with carrying_out(report, *restore.lines, effect=effect, pins=[_pin(env)]) as carry:
            swapped = restore.carry_out(carry)
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
            _describe_aside(report, env, aside)
        since, replaced = restored_at(aside), replaced_files(env.application, aside, env.reports_directory)
        changes = partial(read_written, since=since)
        swap = plan_files_swap(
            *(report, env, swap_files_back.bind(env.application, aside, env.reports_directory), str(aside)),
            replaced=replaced,
            changes=changes,
            what=f"the files of {aside.name} are live",
            needs=[partial(_judge_aside, aside=aside)],
        )
        loss = planned_loss(replaced, changes, since)
        effect = Effect(f"the files of {aside.name} are live again", "run it again", (loss,), swap.down)
        with carrying_out(report, *swap.lines, effect=effect, pins=[_pin(env)]) as carry:
            swapped = swap.carry_out(carry)
        end_undo(env.reports_directory)
        report.fact("kept", swapped.kept or "nothing was live")
        report.outcome = f"the files of {aside.name} are live again"
    return report


@dataclass(frozen=True)
class FilesRestore:
    """The lines of a restore: a staged copy, which is compared with its manifest, and its swap."""

    report: Report
    chosen: Backup
    build: Change[[], FilesCopy]
    swap: FilesSwap[[FilesCopy]]

    @classmethod
    def plan(cls, report: Report, env: Environment, chosen: Backup) -> FilesRestore:
        """Plan the restore of a backup."""
        application, incoming = env.application, f"{env.application.directory}.restoring"
        build = Change(
            build_files_copy.bind(application, chosen),
            "restore alongside",
            f"{chosen.name} into {application.directory}.restoring, and compare it",
            size=chosen.manifest.bytes,
            seconds=1,
            needs=[partial(_judge, env=env, chosen=chosen)],
            begun=UNCHANGED,
        )
        swap = plan_files_swap(
            *(report, env, swap_files.bind(application), incoming),
            replaced=directory_of(application),
            changes=changes_since(chosen),
            what=f"{chosen.name} is live",
        )
        return cls(report, chosen, build, swap)

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return [self.build, *self.swap.lines]

    def carry_out(self, carry: Carrier) -> FilesSwapped:
        """Build the copy, prove it, and swap it in.

        Raises:
            RunbookFailed: the copy differs from its manifest. Nothing was replaced.
            LossExceeded: more would be lost than was confirmed. Nothing was replaced.
        """
        copy = carry(self.build)
        self.prove(copy)
        return self.swap.carry_out(carry, copy)

    def prove(self, copy: FilesCopy) -> None:
        """Judge whether the copy equals its manifest, and note a backup of which it differs.

        Raises:
            RunbookFailed: it differs. The live files are unchanged.
        """
        chosen = self.chosen
        equal = self.report.require(
            "files equal to the backup",
            not copy.differences,
            f"the live files are unchanged; {instead_of(chosen)}" if copy.differences else "",
            value="; ".join(copy.differences[:3]) or f"{copy.entries:,} entries, {size(copy.bytes)}",
            expected="content, mode and owner of every entry",
        )
        if not equal:
            mark_failed(self.report, chosen, copy.differences[0])
        self.report.fail_if_critical()


def _pin(env: Environment) -> Callable[[Report], object]:
    return lambda report: pin_paths(report, "live files", env.application.directory)


def _judge(report: Report, env: Environment, chosen: Backup) -> None:
    found = judge_files_backup(env.application, chosen)
    report.require(
        "directory of the restored files",
        not found.problems,
        "free disk space there, or correct [application] directory",
        value="; ".join(found.problems[:3]) or f"{size(found.bytes_needed)} needed, {size(found.bytes_free)} free",
        expected="space for a staged copy, in a directory that can be renamed",
    )
    if not report.permitted:  # they do not change until the copy is built
        report.table("Notes about this restore", ("note",), [(text,) for text in found.notes])


def _judge_aside(report: Report, aside: Path) -> None:
    if aside.exists():  # a killed undo has renamed it
        found = has_files(aside)
        report.require(
            "files in the directory",
            found,
            "name another directory in kept",
            value="" if found else "none",
            expected="at least 1",
        )


def _describe_aside(report: Report, env: Environment, aside: Path) -> None:
    found = read_aside(env.application, aside)
    report.fact("files in it", f"{found.files:,}, {size(found.bytes)}")
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
