"""A region's recovery from base backup and WAL, or from a dump: built and proven first, then made live. A failure in
the first half touches nothing live."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from blocks.environment import START_ORDER, Environment
from flows.database.gate import gate_of_backup
from flows.recovery.full import cluster, recovered
from flows.recovery.full.choose import Chosen
from flows.recovery.full.cluster import ClusterLines
from flows.recovery.full.dump import DumpRestore
from flows.recovery.full.recovered import ClusterRun
from flows.recovery.options import RestoreOptions
from flows.recovery.restore_option import RestoreOption
from flows.recovery.stopped_services import SystemServices
from runbook.change import Carrier, Change, Line
from runbook.guard.loss import Loss
from runbook.report import Report
from tasks.application.endpoint import Sent, send_users
from tasks.host.services import read_services
from tasks.postgres.restore.staged_copy import check_jobs
from tasks.postgres.restore.swap import advisory_lock

Finish = Callable[[Loss], SystemServices]
"""Makes proven copies live, with the loss that the gate measured."""


@dataclass(frozen=True)
class RegionRestore:
    """The lines of a region's recovery. `send`: users are sent here, after everything is proven."""

    report: Report
    env: Environment
    options: RestoreOptions
    option: RestoreOption
    chosen: Chosen
    strict: bool
    procedure: ClusterLines | DumpRestore
    send: Change[[], Sent]

    @classmethod
    def plan(
        cls,
        report: Report,
        env: Environment,
        options: RestoreOptions,
        option: RestoreOption,
        chosen: Chosen,
        *,
        strict: bool,
    ) -> RegionRestore:
        """Plan the lines."""
        procedure: ClusterLines | DumpRestore
        if option.replay:
            found = read_services(env.services, env.services_in(START_ORDER))
            procedure = ClusterLines.plan(report, env, option, chosen, found, "the old region's")
        else:
            jobs = check_jobs(0)
            procedure = DumpRestore.plan(report, env, chosen, jobs=jobs, stop_services="at_swap", strict=strict)
        send = Change(
            send_users.bind(env.endpoint, env.application),
            "send users here",
            f"{env.endpoint.file}: {env.application.url}, after everything is proven",
        )
        return cls(report, env, options, option, chosen, strict, procedure, send)

    @property
    def lines(self) -> list[Line[..., Any]]:
        """Return them in order."""
        return [*self.procedure.lines, self.send]

    def prepare(self, carry: Carrier, stack: contextlib.ExitStack) -> Finish:
        """Build and prove the copies. Returns the function that makes them live. Locks are on `stack`.

        Raises:
            RunbookFailed, VerificationFailed: a copy fails its proof.
        """
        if isinstance(self.procedure, ClusterLines):
            return self._prepare_cluster(carry, self.procedure)
        return self._prepare_dump(carry, self.procedure, stack)

    def _prepare_cluster(self, carry: Carrier, lines: ClusterLines) -> Finish:
        report, env, option = self.report, self.env, self.option
        assert option.replay
        run = ClusterRun(report, env, self.options, self.chosen, self.strict)
        building = recovered.begin_building(carry, lines.building, env, option.replay)
        copies = cluster.build_copies(
            carry, lines, run, replace(option, replay=replace(option.replay, building=building))
        )

        def finish(loss: Loss) -> SystemServices:
            lines.swap_in(carry, replace(run, measured=loss), copies)
            report_in_place(report, env, lines.services.kept)
            lines.start_cluster(carry, copies)
            report.fact("timeline", f"{copies.timeline}; only this region has its WAL")
            lines.start.carry_out(carry, copies)
            return lines.services

        return finish

    def _prepare_dump(self, carry: Carrier, lines: DumpRestore, stack: contextlib.ExitStack) -> Finish:
        report, env, chosen, system = self.report, self.env, self.chosen, lines.system
        report.fail_if_critical()
        live = system.server.carry_out(carry, chosen.database, lines.found, lines.jobs)
        system.services.last = live
        guard = stack.enter_context(advisory_lock(env.postgres))
        filling = system.build.begin(carry, chosen, lines.jobs)
        copies = system.build_copies(carry, chosen, filling, lines.jobs, strict=self.strict)

        def finish(loss: Loss) -> SystemServices:
            gate = gate_of_backup(report, env, chosen.database, live.oid)
            system.swap_in(carry, chosen, copies, live, guard, gate)
            report.loses(loss)
            report_in_place(report, env, system.services.kept)
            system.start.carry_out(carry, copies)
            return system.services

        return finish


def report_in_place(report: Report, env: Environment, kept: list[str]) -> None:
    """The state between the swap and the redirection of users."""
    replaced = f"; the replaced data is kept: {', '.join(kept)}" if kept else ""
    report.state_is(
        f"the data is in place in {env.name}, and no user is sent to it yet{replaced}",
        f"fix the findings above, then run it again with confirm={env.name}: it restores everything from the start",
    )
