"""Failover to another region, from what was replicated there (§8.3, scenario 2 of §8.4).

It also runs without a Prefect server, which may have been in the failed region:

    python -m flows.recovery.region.failover --environment lab-dr --source lab --confirm lab-dr
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, get_args

from pydantic import Field

from blocks.environment import Environment, Stores
from flows.application.files_gate import PART
from flows.database import expectations
from flows.database import restore_steps as database
from flows.launch import add_confirmation, launch
from flows.loss import again_with, require_confirmed
from flows.pinned import pin_database
from flows.recovery.full import choose
from flows.recovery.full.parts import UNTOUCHED
from flows.recovery.full.start import judge_lost_databases
from flows.recovery.options import RestoreOptions, attempting, require_known
from flows.recovery.point import choice, swap
from flows.recovery.point.server_state import judge_slots
from flows.recovery.region import gate, summary
from flows.recovery.region.build import RegionRestore
from flows.recovery.region.summary import RegionPhases
from flows.recovery.restore_option import RestoreOption
from flows.recovery.stopped_services import SystemServices
from flows.store import mark_verified
from runbook.change import Carrier, carrying_out
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect, seconds_from
from runbook.guard.loss import Loss
from runbook.guard.permit import Act
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.application.endpoint import SEND
from tasks.backups.catalogue import LATEST
from tasks.failover.fencing import Fencing, named_person
from tasks.failover.region import find_region
from tasks.postgres.restore.staged_copy import dump_in
from tasks.wal.archive.archive import Archive


@flow(name="region-failover", flow_run_name=RunName("region-failover {environment} from-{source}"))
def region_failover(
    environment: str,
    source: str = "",
    backup: str = LATEST,
    fenced_by: str = "",
    without: tuple[choose.Part, ...] = (),
    strict: bool = False,
    accept: list[str] = [],  # noqa: B006 (Prefect's form wants a value; nobody changes it)
    timeline: Annotated[int, Field(ge=0, le=1_000_000)] = 0,
    plan: str = "",
    confirm: str = "",
) -> Report:
    """リージョン切り替え (§8.3)

    Restores database, Redis and application in another region whose hosts are empty, from the backups and the WAL that
    were replicated to it. It proves them, then sends users there. Run it when a whole region is lost, or is unreachable
    and will not recover within the RTO.

    The database is restored with the least loss: from the newest base backup and all WAL after it, otherwise from the
    newest dump. If one fails its proof, the report says why, and the run tries the next. Redis and files are those
    nearest in time. Staged copies are proven, swapped in and started; then it checks health, expectations, a log-in, a
    session and an AI answer. Last, it sends users here by one atomic file.

    Two active regions would both take writes: the run is refused while any part of the old one answers or sends WAL.
    What cannot be checked from here must be attested (fenced_by); the report separates that from what is proven. The
    fence is checked again after the confirmation, and before users are sent.

    If it is killed, run it again: until users are sent here it restores everything from the start; afterwards it
    changes nothing. Evidence: the newest point, the possible loss, seconds per phase. Then run backup-cluster at once.

    Departs from the manual, which names the scenario and no procedure.

    Args:
        environment: Environment (region) to fail over to
        source: Environment where the fault is (required). Its backups are in the store of the environment to fail over
            to
        backup: latest: choose the recovery option with the least loss. Or the backup to try first (base_… or backup_…)
        fenced_by: Required if it cannot be verified from here: the person who isolated the old region, by the name in
            [alerts] or [approval], and how
        without: Parts to leave out. A part with neither backup nor existing data starts empty only if it is named here
        strict: Stop before users are switched over if the backup already violated expectations when it was taken
        accept: Objects to leave unrestored (a refused restore's report names them). Empty: restore everything
        timeline: Timeline to follow. 0: the one in use
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the name of the environment to fail over to. Empty: only show the plan
    """
    env = Environment.find(environment)
    expectations.prepare(env)
    with runbook(
        "Region failover", env, confirm, plan, changes=True, without_confirm="stages", rank="recovery"
    ) as report:
        old, phases = other_region(env, source), RegionPhases()
        if unknown := set(without) - set(get_args(choose.Part)):
            raise OpsError(f"without is {', '.join(sorted(unknown))}", "choose redis, files or both")
        require_known(env, source, backup)
        if summary.judge_users(report, env, old):
            summary.report_follow_up(report, env, old)
            report.outcome = f"users are sent to {env.name} already: nothing was changed"
            return report
        fence = Fence(old, named_person(fenced_by, env, old))
        with phases.of("decision"):
            fence.judge(report, "before the plan")
            judge_slots(report, old)
            options = RestoreOptions(report, env, source, backup, timeline=timeline)
            parts = Parts(without, tuple(accept))
            option, chosen = _choose(report, env, options, fence, parts)
        planned = RegionRestore.plan(report, env, options, option, chosen, strict=strict)
        loss = gate.measure.work(old, option, env.postgres.database)
        effect = Effect(
            f"{source} is served from {env.name}: {choose.whole_system(env, chosen, option.newest)}",
            "a region failover back, once the old region follows",
            (loss, *_judge_others(report, env, source, option, chosen)),
            seconds_from([step for one in planned.lines for step in one.planned], ""),
        )
        pins = [partial(pin_database, postgres=env.postgres), partial(_pin_wal, env, option)]
        following = _acts(env, chosen)
        with carrying_out(report, *planned.lines, effect=effect, pins=pins, may_follow=following) as carry:
            report.state_is("nothing serves here, and no user is sent here", UNTOUCHED.hint)
            fence.judge(report, "after the confirmation")
            planned, services, loss = _restore(carry, planned, parts, phases, fence)
            with phases.of("switch"):
                fence.judge(report, "before users are sent here", services.last)
                sent = carry(planned.send)
            report.state_is(f"users are sent to {env.name}", "fix the findings above; do not run this again")
        summary.report_switch(report, env, sent)
        summary.report_loss(report, env, old, options.used or option, loss)
        phases.report_results(report, env)
        summary.report_follow_up(report, env, old)
        report.outcome = f"{env.name} serves, and users are sent to it"
    return report


def _pin_wal(env: Environment, option: RestoreOption, report: Report) -> None:
    if option.replay:
        end = option.copy(env.postgres.database).end
        report.pin_state("recovered WAL", option.replay.origin.chain.timeline.number, written=end)


def _judge_others(
    report: Report, env: Environment, source: str, option: RestoreOption, chosen: choose.Chosen
) -> tuple[Loss, ...]:
    """Return the losses of Redis and the files, and of the old cluster's other databases, which no dump restores."""
    hint = "name a base backup (backup=base_…): it restores all databases"
    lost = () if option.replay else judge_lost_databases(report, env, source, hint)
    return (*map(Loss.everything, lost), *choose.losses_of_others(chosen))


def _acts(env: Environment, chosen: choose.Chosen) -> tuple[Act, ...]:
    """The acts of both kinds of recovery."""
    return (*dict.fromkeys([*chosen.acts(env), *swap.acts(env)]), Act(SEND, env.endpoint.file))


@dataclass(frozen=True)
class Parts:
    """What is not restored: whole parts, and objects of the database that a person accepted by name."""

    without: tuple[choose.Part, ...]
    accepted: tuple[str, ...]

    def choose(self, report: Report, env: Environment, option: RestoreOption) -> choose.Chosen:
        """All backups that are restored together. A base backup leaves no object out."""
        chosen = choose.with_others(report, env, option.backup, option.newest, "backups", self.without)
        if chosen.files:  # the old region's changes since are lost, whatever this region's files are
            chosen = replace(chosen, files_loss=Loss.everything_since(PART, chosen.files.manifest.taken))
        if option.replay:
            if self.accepted:
                names = "; ".join(self.accepted)
                report.fact("accept", f"{names}: used only if a dump is restored; a base backup has every object")
            return chosen
        dump = database.without_accepted(report, env, dump_in(option.backup), self.accepted)
        report.fail_if_critical()
        return replace(chosen, dump=dump)


def _choose(
    report: Report, env: Environment, options: RestoreOptions, fence: Fence, parts: Parts
) -> tuple[RestoreOption, choose.Chosen]:
    option = options.choose()
    if option.replay and fence.archive is None:
        fence.watch(option.replay.origin.archive)
    return option, parts.choose(report, env, option)


def _restore(
    carry: Carrier, planned: RegionRestore, parts: Parts, phases: RegionPhases, fence: Fence
) -> tuple[RegionRestore, SystemServices, Loss]:
    """Restore from the first option that passes its proof. Returns its plan, and the loss too.

    Raises:
        OpsError: none does.
        LossExceeded: more would be lost than was confirmed. Nothing here was replaced.
    """
    report, env, options = planned.report, planned.env, planned.options
    choice.ship_rest(report, env)
    while True:
        ready, option = contextlib.ExitStack(), planned.option
        with (
            phases.of("build and proof"),
            attempting(report, option.backup.name) as attempt,
            contextlib.ExitStack() as stack,
        ):
            finish = planned.prepare(carry, stack)
            ready = stack.pop_all()
        if not attempt.failure:
            break
        carry.abandon()
        options.tried.add(option.backup.name)
        why = f"{option.backup.name} is not used: {attempt.failure}"
        option = options.choose()
        again = again_with(option.backup.name)
        require_confirmed(report, gate.measure(fence.old, option, env.postgres.database), hint=again)
        chosen = parts.choose(report, env, option)
        require_confirmed(report, *_judge_others(report, env, options.source, option, chosen), hint=again)
        planned = RegionRestore.plan(report, env, options, option, chosen, strict=planned.strict)
        report.fail_if_critical()
        carry.instead(*planned.lines, why=why)
    options.used = options.used or planned.option
    with ready, phases.of("bring up"):
        fencing = fence.judge(report, "before the data is made live")
        loss = gate.pass_region(report, env, fence.old, options.used, fencing)
        services = finish(loss)
    mark_verified(report, planned.option.backup)
    report.fail_if_critical()
    return planned, services, loss


def main() -> int:
    """The command line: it runs through Prefect if that answers, otherwise without it."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.recovery.region.failover", description="region failover (§8.3)"
    )
    parser.add_argument("--environment", required=True, help="the target region")
    parser.add_argument("--source", required=True, help="the environment that failed")
    parser.add_argument("--backup", default=LATEST, help="latest, or the backup to try first")
    parser.add_argument("--fenced-by", default="", help="who fenced the old region, and how")
    parser.add_argument("--without", nargs="*", default=[], choices=get_args(choose.Part), help="parts not to restore")
    parser.add_argument("--strict", action="store_true", help="refuse data that broke an expectation at its backup")
    parser.add_argument("--accept", nargs="*", default=[], help="objects to leave out, as a refused restore names them")
    parser.add_argument("--timeline", type=int, default=0, help="the timeline to follow; 0 is the one in use")
    add_confirmation(parser)
    return launch(region_failover, vars(parser.parse_args()))


def other_region(env: Environment, source: str) -> Environment:
    """The environment that failed.

    Raises:
        OpsError: `source` is empty, is this environment, or does not exist.
    """
    if not source.strip():
        raise OpsError("no source was given", "give the failed environment: its backups are in this one's stores")
    if source == env.name:
        raise OpsError(
            f"source and environment are both {source}",
            "give the target region as environment and the failed one as source; full-restore restores in place",
        )
    if not env.has("endpoint"):
        raise OpsError(f"{env.name} has no endpoint", "add [endpoint] to its TOML: it sends users there")
    if not env.application.url:
        raise OpsError(f"[application] url of {env.name} is not set", "add it: users are sent there")
    if not (env.has("application") and env.has("backups")):
        raise OpsError(f"{env.name} cannot run the application", f"add [{get_args(Stores)[0]}] and [application]")
    return Environment.find(source)


@dataclass
class Fence:
    """Evidence that the old region is dead. `shipped`: the files of its WAL in the archive when the run began."""

    old: Environment
    attested: str
    archive: Archive | None = None
    shipped: frozenset[str] = field(default_factory=frozenset)

    def judge(self, report: Report, when: str, after: object = None) -> Fencing:
        """Check it.

        Raises:
            RunbookFailed: it answers, sends WAL, or is neither proven nor attested to be fenced.
        """
        found = find_region.after(after)(self.old)
        report.table(
            f"Fence of {found.server}, {when}",
            ("what", "holds", "seen"),
            [(row.what, _word(row.holds, self.attested), row.seen) for row in found.rows],
        )
        against, unknown = found.against, found.unknown
        report.require(
            f"the region {found.server} is dead ({when})",
            not against,
            against[0].hint if against else "",
            value="; ".join(f"{row.what}: not true, {row.seen}" for row in against[:3]) or "nothing answers",
            expected="nothing answers, and nothing starts it again",
        )
        if unknown and not against:
            report.require(
                f"the region {found.server} is fenced ({when})",
                bool(self.attested),
                unknown[0].hint,
                value=f"attested: {self.attested}" if self.attested else f"{unknown[0].what}: {unknown[0].seen}",
                expected="proven, or attested by a named person",
            )
        self._judge_silence(report, when)
        proof = f"attested for {len(unknown)} of {len(found.rows)}: {self.attested}" if unknown else "proven"
        report.fact(f"fence of {found.server}", proof)
        report.fail_if_critical()
        return found

    def watch(self, archive: Archive) -> None:
        """From now on, new WAL in the archive means that the old region takes writes."""
        self.archive, self.shipped = archive, frozenset(archive.place.names())

    def _judge_silence(self, report: Report, when: str) -> None:
        if self.archive is None:
            return
        new = sorted(frozenset(self.archive.place.names()) - self.shipped)
        report.require(
            f"no new WAL of {self.old.name} ({when})",
            not new,
            "fence the old region, which still sends WAL, then run this again: it uses the new WAL too",
            value=", ".join(name[:40] for name in new[:3]) or "none since this run began",
        )


def _word(holds: bool | None, attested: str) -> str:
    if holds is None:
        return "attested" if attested else "unknown"
    return "proven" if holds else "NO"


if __name__ == "__main__":
    sys.exit(exit_code(main))
