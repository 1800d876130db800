"""The lines of a restore next to the live database: a staged copy is built, proven and analysed, then takes its name.

Each line is planned by one function, so that another procedure can put it into its own plan.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from blocks.environment import Environment
from blocks.postgres.server import Connection, Postgres
from flows.database import restore_steps
from flows.database.gate import DatabaseGate
from runbook.change import Carrier, Change, Check, Line, State
from runbook.errors import Unreachable
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from tasks.backups.catalogue import Backup
from tasks.postgres.content.sequences import advance_sequences, find_rewound
from tasks.postgres.dump.fill import DumpSource
from tasks.postgres.dump.foreign import ForeignDump
from tasks.postgres.restore.staged_copy import (
    Copy,
    create_copy,
    fill_copy,
    oid_of,
    rename_copy,
    staged_name,
)
from tasks.postgres.restore.swap import Swapped, swap_databases
from tasks.postgres.server.properties import Properties
from tasks.postgres.server.server import Identity, find_obstacles

SWAP_SECONDS = 0.2


@dataclass(frozen=True)
class RestorableDatabase:
    """A dump, the attributes of its database, and the backup whose manifest proves it (None for a foreign dump)."""

    name: str
    source: DumpSource
    properties: Properties
    bytes: int
    backup: Backup | None
    foreign: ForeignDump | None = None


@dataclass(frozen=True)
class StagedBuild:
    """The lines that build a staged copy and prove it: of the live database, or of the new database `into`. Nothing
    live changes. `jobs`: of pg_restore and vacuumdb."""

    report: Report
    backup: Backup | None
    jobs: int
    creation: Change[[], Copy]
    filling: Change[[Copy, int], Copy]
    proof: Check[[Copy], object]
    analysis: Change[[Copy, object], str]

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        chosen: RestorableDatabase,
        jobs: int,
        into: str,
        prove: Callable[[Copy], object],
        begun: State,
    ) -> StagedBuild:
        """Plan the lines. `prove` raises if the copy is not fit for its name; `begun`: the state of the system
        meanwhile."""
        return cls(
            *(report, chosen.backup, jobs),
            plan_creation(report, env, chosen, into, begun),
            plan_filling(env, chosen, into),
            plan_proof(chosen, prove),
            plan_analysis(report, env, jobs, into),
        )

    @property
    def lines(self) -> Sequence[Line[..., Any]]:
        """Return them in order."""
        return self.creation, self.filling, self.proof, self.analysis

    def carry_out(self, carry: Carrier) -> Copy:
        """Build, prove and analyse the copy.

        Raises:
            RunbookFailed, VerificationFailed: it does not restore, or differs from its backup.
        """
        with restore_steps.noting_failure(self.report, self.backup):
            copy = carry(self.filling, carry(self.creation), self.jobs)
        carry(self.analysis, copy, carry(self.proof, copy))
        return copy


def plan_creation(
    report: Report, env: Environment, chosen: RestorableDatabase, into: str, begun: State
) -> Change[[], Copy]:
    """Plan to create the empty copy, and to drop a leftover under its name."""
    copy = staged_name(env.postgres, into)
    steps = [PlannedStep("create", f"the staged copy {copy}")]
    if _exists(env.postgres, copy):
        steps.insert(0, PlannedStep("drop", f"{copy}: the leftover of an interrupted run"))
    return Change(
        create_copy.bind(env.postgres, into, chosen.properties),
        steps[0].step,
        steps[0].detail,
        more=steps[1:],
        needs=[partial(_judge_space, env, chosen)],
        begun=begun,
    )


def _judge_space(env: Environment, chosen: RestorableDatabase, report: Report) -> None:
    restore_steps.judge_space(report, env, chosen.bytes, backup=chosen.backup)


def _exists(postgres: Postgres, database: str) -> bool:
    with contextlib.suppress(Unreachable), postgres.connect() as connection:
        return bool(oid_of(connection, database))
    return False


def plan_filling(env: Environment, chosen: RestorableDatabase, into: str) -> Change[[Copy, int], Copy]:
    """Plan to restore the dump into the copy; where pg_restore cannot read it, it is unpacked first."""
    first, *others = restore_steps.filling_steps(
        env, chosen.name, chosen.backup, chosen.bytes, staged_name(env.postgres, into)
    )
    return Change(
        fill_copy.bind(env.postgres, into, chosen.source, chosen.properties),
        first.step,
        first.detail,
        size=first.bytes,
        seconds=first.seconds,
        more=others,
    )


def plan_proof(chosen: RestorableDatabase, prove: Callable[[Copy], object]) -> Check[[Copy], object]:
    """Plan to compare the copy with the manifest; a dump without one is only checked."""
    if chosen.backup:
        planned = restore_steps.proof_step(chosen.backup)
        return Check(prove, planned.step, planned.detail, seconds=planned.seconds)
    seconds = restore_steps.proof_seconds(chosen.bytes)
    return Check(prove, "check the copy", "by the expectations alone: the dump has no manifest", seconds=seconds)


def plan_analysis(report: Report, env: Environment, jobs: int, into: str) -> Change[[Copy, object], str]:
    """Plan to analyse the proven copy, and to log in to it as the application's role."""

    def ready(built: Copy, proven: object) -> str:
        return restore_steps.ready_database(report, env, built, jobs, after=proven)

    copy = staged_name(env.postgres, into)
    return Change(ready, "ANALYZE", f"{copy}, then log in to it as {env.postgres.user}")


def plan_rename(env: Environment, into: str) -> Change[[Copy], str]:
    """Plan to give the copy the name of the new database."""
    text = restore_steps.rename_text(staged_name(env.postgres, into), into)
    return Change(rename_copy.bind(env.postgres, into), "rename", text)


def plan_swap(
    report: Report,
    env: Environment,
    chosen: RestorableDatabase,
    live: Identity,
    gate: DatabaseGate,
    done: Callable[[Swapped], State],
) -> Change[[Connection, Copy], Swapped]:
    """Plan to give the copy the live name. `gate`: counts what the copy lacks, when nobody can write to the live
    database any more; `done`: the state of the system from then on."""
    action = swap_databases.bind(env.postgres, live.oid, chosen.name, gate.judge)

    def swap(guard: Connection, copy: Copy) -> Swapped:
        gate.look_ahead()
        with restore_steps.swapping(report):
            return action(guard, copy)

    return Change(
        swap,
        "swap",
        restore_steps.swap_text(env, kept=bool(live.oid)),
        seconds=SWAP_SECONDS,
        by=[action],
        needs=[partial(_judge_obstacles, env)],
        done=done,
    )


def _judge_obstacles(env: Environment, report: Report) -> None:
    restore_steps.judge_obstacles(report, find_obstacles(env.postgres, env.postgres.database))


def plan_sequences(report: Report, env: Environment) -> Change[[str], None]:
    """Plan to advance sequences after the swap. The name of the replaced database is known then."""
    return Change(
        lambda kept: report_sequences(report, env, kept, advance=True),
        "advance sequences",
        "to the numbers that the replaced database already used",
        by=[advance_sequences.bind(env.postgres)],
    )


def report_sequences(report: Report, env: Environment, kept: str, *, advance: bool) -> None:
    """Report sequences behind the replaced database, and advance them if `advance`.

    It runs after the swap: clients of the old database took numbers until then.
    """
    rewound = find_rewound(env.postgres, kept, env.postgres.database) if kept else ()
    if not rewound:
        return
    if advance:
        advance_sequences.bind(env.postgres)(rewound)
    else:
        report.fact(
            "numbers that will be used twice",
            f"by {len(rewound)} sequences. This is harmless inside the database; if other systems store these numbers, "
            "restore with advance=true",
        )
    report.table(
        "Sequences behind the replaced database" + (" (advanced)" if advance else ""),
        ("sequence", "replaced database", "backup"),
        [(item.sequence, item.live, item.copy) for item in rewound],
    )
