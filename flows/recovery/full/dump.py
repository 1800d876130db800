"""A full restore with the database from a dump: next to the live one, then swapped in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from blocks.environment import Environment
from blocks.postgres.server import Connection
from flows.database import expectations as check
from flows.database.gate import DatabaseGate, gate_of_backup
from flows.database.restore_steps import noting_failure
from flows.database.staged_restore import plan_sequences, report_sequences
from flows.loss import require_confirmed
from flows.recovery.full import bring_up, build, choose, database_server, migration
from flows.recovery.full.build import DatabaseBuild, SystemCopies
from flows.recovery.full.choose import Chosen
from flows.recovery.full.database_server import FoundServer, ServerLines
from flows.recovery.full.parts import UNTOUCHED, PartLines
from flows.recovery.stopped_services import SystemServices, plan_stop
from flows.redis.restore.sources import remembered
from runbook.change import BegunLine, Carrier, Change, Line
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.guard.permit import PlannedStep
from runbook.report import Report
from tasks.postgres.restore.staged_copy import Copy, content_in
from tasks.postgres.restore.swap import advisory_lock
from tasks.postgres.server.server import Identity


@dataclass(frozen=True)
class SystemSwap:
    """The lines that restore a dump and the other parts, whatever dump it is. `first`: the services stop before the
    copies are built."""

    report: Report
    env: Environment
    services: SystemServices
    first: bool
    server: ServerLines
    build: DatabaseBuild
    stop: Change[[], None]
    parts: PartLines
    swap: bring_up.Swap
    sequences: Sequence[Change[[str], None]]
    start: bring_up.SystemStart

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        chosen: Chosen,
        found: FoundServer,
        steps: tuple[Sequence[PlannedStep], PlannedStep],
        revision: str,
        *,
        first: bool,
        advance: bool,
    ) -> SystemSwap:
        """Plan the lines. `steps`: as in `planned_dump`; `revision`: the schema's, as far as it is known."""
        services = bring_up.system_services(report, env, chosen, found.services)
        check.plan(report, env)
        migrating = migration.judge(report, env, revision, chosen.files)
        return cls(
            *(report, env, services, first),
            ServerLines.plan(report, env, found),
            DatabaseBuild.plan(report, env, *steps, migrating),
            plan_stop(services, services.stop, services.roles, seconds=2, begun=UNTOUCHED),
            PartLines.plan(report, env, chosen, services),
            bring_up.plan_swap(report, env, services),
            [plan_sequences(report, env)] if advance else [],
            bring_up.SystemStart.plan(report, env, chosen, services),
        )

    @property
    def opening(self) -> list[Line[..., Any]]:
        """Return the lines that begin to build the database's copy."""
        return [*self.server.lines, *self.build.opening]

    @property
    def stopping(self) -> list[Line[..., Any]]:
        """Return the lines that stop services before the copies are built."""
        return [self.stop, *self.parts.early] if self.first else []

    @property
    def closing(self) -> list[Line[..., Any]]:
        """Return the lines after these."""
        stop = [] if self.first else [self.stop]
        swap = [self.swap, *self.parts.swaps, *self.sequences]
        return [*self.parts.builds, *self.build.closing, *stop, *self.parts.late, *swap, *self.start.lines]

    def stop_first(self, carry: Carrier, chosen: Chosen) -> Chosen:
        """Stop the services, if they stop before the copies are built, and capture Redis's surviving data."""
        if self.first:
            carry(self.stop)
        return self.parts.capture(carry, chosen)

    def build_copies(
        self, carry: Carrier, chosen: Chosen, filling: BegunLine[Copy], jobs: int, *, strict: bool
    ) -> SystemCopies:
        """Build all three at the same time, as they do not depend on each other, and prove them.

        Raises:
            RunbookFailed: a copy fails its proof. Nothing live was replaced.
        """
        wait = self.parts.begin(carry, chosen)
        others = wait()
        with noting_failure(self.report, chosen.database):
            copy = filling.result()
        self.report.fact("database restored in", f"{copy.seconds:.1f} s with {jobs} jobs")
        origin = check.origin_of(chosen.database)
        copies = SystemCopies(others.redis, others.files, database=copy, origin=origin)
        build.prove(carry, self.build, chosen, copies, jobs=jobs, strict=strict)
        return copies

    def swap_in(
        self,
        carry: Carrier,
        chosen: Chosen,
        copies: SystemCopies,
        live: Identity,
        guard: Connection,
        gate: DatabaseGate,
    ) -> None:
        """Swap all three by rename, one after the other. `gate`: measures what the database loses.

        Raises:
            LossExceeded: more than was confirmed. Nothing live was replaced.
            OpsError: a live part is not the one that was judged.
        """
        gate.look_ahead()
        if not self.first:
            carry(self.stop)
        self.parts.stop_late(carry)
        self.parts.pass_gates(copies, chosen)
        done = carry(self.swap, live, chosen.database.name, gate, guard, copies)
        self.parts.swap(carry, copies, chosen)
        for advancing in self.sequences:
            carry(advancing, done.kept)
        if not self.sequences:
            report_sequences(self.report, self.env, done.kept, advance=False)
        self.report.fact("database swapped in", f"{done.outage_seconds:.2f} s")
        self.report.fact("replaced data kept", ", ".join(self.services.kept) or "none: there was no live data")


@dataclass(frozen=True)
class DumpRestore:
    """A full restore from a dump of the database."""

    report: Report
    env: Environment
    chosen: Chosen
    found: FoundServer
    gate: DatabaseGate
    jobs: int
    strict: bool
    system: SystemSwap

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        chosen: Chosen,
        *,
        jobs: int,
        stop_services: str,
        advance: bool = False,
        strict: bool = False,
    ) -> DumpRestore:
        """Judge the server, and plan the lines."""
        found = database_server.judge(report, env, chosen.database, jobs)
        gate = gate_of_backup(report, env, chosen.database, found.live.oid if found.live else 0)
        steps = build.planned_dump(env, chosen.database)
        first = stop_services == "first" or bool(chosen.redis_survivor)
        revision = content_in(chosen.database).revision
        system = SystemSwap.plan(report, env, chosen, found, steps, revision, first=first, advance=advance)
        return cls(report, env, chosen, found, gate, jobs, strict, system)

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        return [*self.system.opening, *self.system.stopping, *self.system.closing]

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The other databases that were lost with the data directory."""
        return tuple(map(Loss.everything, self.found.lost_databases))

    @property
    def effect(self) -> Effect:
        """For the plan's headline."""
        found = self.found
        return choose.effect(self.env, self.chosen, found.presence, self.gate, found.lost_databases, self.lines)

    def carry_out(self, carry: Carrier) -> None:
        """Restore everything, and report the results.

        Raises:
            LossExceeded: more would be lost than was confirmed. Nothing live was replaced.
            RunbookFailed, OpsError: a copy fails its proof, or a service does not start.
        """
        report, env, system, chosen, services = self.report, self.env, self.system, self.chosen, self.system.services
        require_confirmed(report, *self.losses)
        report.fail_if_critical()
        live = system.server.carry_out(carry, chosen.database, self.found, self.jobs)
        services.last = live
        known = remembered(env, chosen.redis_survivor or chosen.redis_kept, services.swapped)
        with advisory_lock(env.postgres) as guard, known:
            filling = system.build.begin(carry, chosen, self.jobs)  # while the services stop
            chosen = system.stop_first(carry, chosen)
            copies = system.build_copies(carry, chosen, filling, self.jobs, strict=self.strict)
            system.swap_in(carry, chosen, copies, live, guard, self.gate)
        if self.losses:
            report.loses(*self.losses)
        system.start.carry_out(carry, copies)
        bring_up.report_results(report, env, chosen, services, self.gate)
