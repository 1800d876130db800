"""The database of a full restore from a dump: a staged copy of it is built, proven and migrated. Nothing live is
touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from blocks.environment import Environment
from flows.database import expectations as check
from flows.database import restore_steps as database
from flows.database.staged_restore import creation_steps
from flows.recovery.full import migration
from flows.recovery.full.choose import Chosen
from flows.recovery.full.parts import UNTOUCHED, StagedCopies, prove_others
from runbook.change import BegunLine, Carrier, Change, Line
from runbook.guard.permit import PlannedStep
from runbook.kinds import Pending
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.integrity import Expectations
from tasks.postgres.content.changes import read_states
from tasks.postgres.content.content import DatabaseContent, read_counts
from tasks.postgres.dump.fill import DumpSource
from tasks.postgres.restore.planner_statistics import PlannerStatistics, analyze
from tasks.postgres.restore.staged_copy import Copy, content_in, copy_name, create_copy, dump_in, fill_copy
from tasks.postgres.server.properties import Properties


@dataclass
class SystemCopies(StagedCopies):
    """All three: the database's is on the live server."""

    database: Copy = field(kw_only=True)


@dataclass
class Judging:
    """What is found out about the copy at the same time as it is compared with its manifest."""

    analyzing: Pending[PlannerStatistics]
    checking: Pending[Expectations] | None
    content: DatabaseContent


@dataclass(frozen=True)
class DatabaseBuild:
    """The lines that restore a dump next to the live database, prove it, and migrate it."""

    report: Report
    env: Environment
    creation: Change[[Properties], Copy]
    filling: Change[[DumpSource, Properties, Copy, int], Copy]
    proof: Change[[Backup, SystemCopies, int], Judging]
    judging: Change[[SystemCopies, Judging], None]
    migration: Sequence[Change[[Chosen, SystemCopies, Judging, int], object]]

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        filling: Sequence[PlannedStep],
        proof: PlannedStep,
        migrating: PlannedStep | None,
    ) -> DatabaseBuild:
        """Plan the lines. `filling`, `proof`, `migrating`: what is known of them before the run."""
        creation, first = creation_steps(env, ""), filling[0]
        suites = "great-expectations suites, " * bool(env.suites)
        return cls(
            *(report, env),
            Change(
                create_copy.bind(env.postgres, ""),
                creation[0].step,
                creation[0].detail,
                more=creation[1:],
                begun=UNTOUCHED,
            ),
            Change(
                fill_copy.bind(env.postgres, ""),
                first.step,
                first.detail,
                size=first.bytes,
                seconds=first.seconds,
                more=filling[1:],
            ),
            Change(partial(_compare, report, env), proof.step, proof.detail, seconds=proof.seconds),
            Change(partial(_judge, report), "expectations and statistics of the copy", f"{suites}ANALYZE", seconds=4),
            _plan_migration(report, env, migrating) if migrating else [],
        )

    @property
    def opening(self) -> list[Line[..., Any]]:
        """Return the lines that begin it."""
        return [self.creation, self.filling]

    @property
    def closing(self) -> list[Line[..., Any]]:
        """Return the lines that prove the built copy."""
        return [self.proof, self.judging, *self.migration]

    def begin(self, carry: Carrier, chosen: Chosen, jobs: int) -> BegunLine[Copy]:
        """Begin to restore the dump into a staged copy, at the same time as the caller goes on: unpacking, too."""
        source, properties = chosen.dump or dump_in(chosen.database), content_in(chosen.database).properties
        return carry.begin(self.filling, source, properties, carry(self.creation, properties), jobs)


def planned_dump(env: Environment, backup: Backup) -> tuple[Sequence[PlannedStep], PlannedStep]:
    """Return the planned steps that restore a backup, and the one that compares it."""
    copy = copy_name(env.postgres.database)
    filling = database.filling_steps(env, backup.name, backup, content_in(backup).bytes, copy)
    return filling, database.proof_step(backup)


def _compare(report: Report, env: Environment, backup: Backup, copies: SystemCopies, jobs: int) -> Judging:
    copy = copies.database
    analyzing = analyze.after(copy).submit(env.postgres, copy.database, jobs)
    # At the same time as the comparison: both only read.
    checking = check.start(report, env, copy.database, after=copy, origin=copies.origin, built=True)
    return Judging(analyzing, checking, database.prove_database(report, env, backup, copy))


def _judge(report: Report, copies: SystemCopies, found: Judging) -> None:
    database.judge_statistics(report, found.analyzing.result())
    copies.rules = check.report_results(report, found.checking, "on the copy", strict=copies.strict)
    copies.rows = {table: rows.rows for table, rows in found.content.tables.items()}


def _plan_migration(
    report: Report, env: Environment, planned: PlannedStep
) -> list[Change[[Chosen, SystemCopies, Judging, int], object]]:
    action = migration.action_of(env)

    def migrate(chosen: Chosen, copies: SystemCopies, found: Judging, jobs: int) -> object:
        name, revision = copies.database.database, content_in(chosen.database).revision
        migrated = migration.migrate(report, env, name, copies.files, revision=revision)
        if not migrated:
            return found.content
        database.judge_statistics(report, analyze.after(migrated)(env.postgres, name, jobs, everything=True))
        checking = check.start(report, env, name, after=migrated, origin=copies.origin)
        copies.rules = check.report_results(
            report, checking, "on the migrated copy", strict=copies.strict, before=copies.rules
        )
        copies.rows = dict(read_counts.after(migrated)(env.postgres, name).rows)
        return migrated

    return [Change(migrate, planned.step, planned.detail, by=[action])]


def prove(
    carry: Carrier, lines: DatabaseBuild, chosen: Chosen, copies: SystemCopies, *, jobs: int, strict: bool = False
) -> None:
    """Compare every copy with its manifest, run the expectations, migrate, run them again. An expectation that the
    backup already broke ends the run only if `strict`.

    Raises:
        RunbookFailed: a copy differs from its manifest. Nothing live was touched.
    """
    report, env = lines.report, lines.env
    prove_others(report, env, chosen, copies)
    copies.strict = strict
    found = carry(lines.proof, chosen.database, copies, jobs)
    carry(lines.judging, copies, found)
    last: object = found.content
    for one in lines.migration:
        last = carry(one, chosen, copies, found, jobs)
    copies.states = read_states.after(last)(env.postgres, copies.database.database)
    copies.login = database.try_application_login(report, env, copies.database, after=copies.states)
    report.fail_if_critical()
