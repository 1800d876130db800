"""contain-incident and release-containment (§8.4): the data that is left is protected while an incident lasts."""

from __future__ import annotations

import argparse
import sys
import uuid
from dataclasses import dataclass, replace
from datetime import datetime
from socket import gethostname

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.launch import add_confirmation, launch
from runbook.change import Change, Check, Line, State, carrying_out
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.flow import flow
from runbook.guard import containment
from runbook.guard.containment import Contained, Restriction
from runbook.guard.effect import Effect
from runbook.guard.permit import Act
from runbook.kinds import action
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted
from tasks.postgres.replication import write_block
from tasks.postgres.replication.incident_slot import LET_GO, SLOT, drop_slot, keep_wal
from tasks.postgres.replication.replay import (
    RESUME,
    RUNNING,
    Replaying,
    pause_replay,
    read_replaying,
    resume_replay,
)
from tasks.postgres.replication.status import parse_sync_names, read_replication
from tasks.postgres.replication.synchronous import address
from tasks.postgres.replication.write_block import LET_IN, Writers, find_writers, let_in, try_to_write

REPLAY, ROLE, KEPT_WAL = "replay", "role", "WAL"
UNDO = {REPLAY: RESUME, ROLE: LET_IN, KEPT_WAL: LET_GO}
FREEZE, THAW = "freeze maintenance of", "let maintenance go on in"
AGAIN = (Next("contain-incident", "contain it again"),)


@flow(name="contain-incident", flow_run_name=RunName("contain-incident {environment}"))
def contain_incident(
    environment: str, block_writes: bool = False, reason: str = "", by: str = "", plan: str = "", confirm: str = ""
) -> Report:
    """障害の封じ込め (§8.4)

    Protects the data that is left while an incident is investigated. Run it as soon as data seems to be wrong, before
    the cause is known. It does this:

    - It pauses replay on the standbys. They keep the primary's content from before further damage.
    - It freezes maintenance. Runs that delete or change something are refused; one that is running is ended.
    - It keeps WAL.
    - With block_writes the application's roles get read-only transactions. Their sessions end with their uncommitted
      work.

    Backups and recoveries continue. Not blocked: superusers, a client that sends BEGIN READ WRITE, a prepared
    transaction that somebody commits. A standby that restarts forgets the pause: run this again. WAL accumulates on a
    paused standby.

    Undo: release-containment restores exactly what this changed. If this run is killed, run it again. Evidence: every
    restriction, and the LSN at which replay stopped.

    Departs from the manual: its first response does not protect the data that is left.

    Args:
        environment: Environment (lab, staging, production …)
        block_writes: Also stop writes of the application's role
        reason: Reason (required). It is shown when maintenance is refused
        by: Name of the person who does it (required)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Contain incident", env, confirm, plan, changes=True, rank="recovery") as report:
        if not reason.strip() or not by.strip():
            raise OpsError("reason or by is empty", "fill in both: refused runs show who contained it, and why")
        scope = read_scope(report, env, block_writes=block_writes)
        known = containment.read(env.name, env.reports_directory)
        freezing = Change(
            freeze_maintenance.bind(env, known, scope),
            "freeze maintenance",
            "runs that delete or change are refused; backups and recoveries continue",
            done=State(
                "maintenance is frozen; other restrictions may be missing", "run it again, or release-containment"
            ),
        )
        restricting = [_restricting(scope, one) for one in scope.restrictions]
        report_unrestricted(report, scope)
        writes = ", writes are blocked" if scope.writers else ""
        effect = Effect(
            f"maintenance is frozen, replay on standbys pauses{writes}",
            "release-containment",
            down="the application cannot write" if scope.writers else 0.0,
        )
        pins = [lambda report: report.pin_state("contained", known.id if known else "no")]
        with carrying_out(report, freezing, *restricting, effect=effect, pins=pins) as carry:
            contained = carry(freezing, reason.strip(), by.strip())
            for one, change in zip(scope.restrictions, restricting, strict=True):
                _report_restricted(report, one, carry(change))
        if scope.writers and scope.primary:
            _try_to_write(report, scope.primary)
        rows = [(one.kind, one.target, one.before or "nothing") for one in contained.held]
        report.table("Restrictions", ("what", "where", "before"), [("maintenance", "all of it", "allowed"), *rows])
        blocked = ", writes are blocked" if scope.writers else ""
        report.outcome = f"{contained.text}; {len(contained.held)} restrictions{blocked}; undo: release-containment"
    return report


@flow(name="release-containment", flow_run_name=RunName("release-containment {environment}"))
def release_containment(environment: str, plan: str = "", confirm: str = "") -> Report:
    """封じ込めの解除 (§8.4)

    Undoes contain-incident, and nothing else. Replay resumes where contain-incident paused it. Roles get their previous
    setting; their sessions end once more, because older sessions stay read-only. Maintenance is allowed again. Run it
    when the incident is over, or when a failover needs the standby.

    If a server is down, its restriction cannot be removed and the environment stays contained: run this again later.
    Undo: contain-incident. Evidence: each restriction and the state after it.

    Departs from the manual: it has no containment.

    Args:
        environment: Environment (lab, staging, production …)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Release containment", env, confirm, plan, changes=True, rank="recovery") as report:
        found = containment.read(env.name, env.reports_directory)
        if found is None:
            report.outcome = "it is not contained: there is nothing to release"
            return report
        report.fact("contained", found.text)
        release(report, env, found)
    return report


def main() -> int:
    """`python -m flows.recovery.forensics.containment contain|release --environment NAME …`: works without Prefect."""
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.forensics.containment")
    commands = parser.add_subparsers(dest="command", required=True)
    contain, release = commands.add_parser("contain"), commands.add_parser("release")
    for command in (contain, release):
        command.add_argument("--environment", required=True)
        add_confirmation(command)
    contain.add_argument("--block-writes", action="store_true")
    contain.add_argument("--reason", default="")
    contain.add_argument("--by", default="")
    given = vars(parser.parse_args())
    return launch(contain_incident if given.pop("command") == "contain" else release_containment, given)


@dataclass(frozen=True)
class Scope:
    """What can be restricted now. `primary` None: no server accepts writes; `writers` None: writes are not to be
    blocked; `standbys`: the nodes in recovery."""

    primary: Postgres | None
    standbys: tuple[Replaying, ...]
    writers: Writers | None
    restrictions: tuple[Restriction, ...]


def read_scope(report: Report, env: Environment, *, block_writes: bool) -> Scope:
    """Query every node. A server that is down does not keep the others from being restricted."""
    nodes = read_replaying(env.nodes())
    for one in nodes:
        if one.problem:
            report.warn(f"{one.address} answers", "run this again when it is back", value=one.problem, follow=AGAIN)
    primary = next((one.postgres for one in nodes if not one.state and not one.problem), None)
    if primary is None:
        report.warn("a primary", "run this again when a server accepts writes", value="none answers", follow=AGAIN)
    standbys = tuple(one for one in nodes if one.state)
    if not standbys:
        report.warn("a standby to pause", "take a backup now: every copy follows the primary", value="there is none")
    pausing = [one for one in standbys if one.state == RUNNING and not _is_waited_for(report, primary, one)]
    restrictions = [Restriction(REPLAY, one.address, one.state) for one in pausing]
    if primary and not env.has("wal") and not _has_slot(report, primary):
        restrictions.append(Restriction(KEPT_WAL, address(primary)))
    writers = find_writers(primary) if block_writes and primary else None
    restrictions += [Restriction(ROLE, one.role, one.setting) for one in writers.roles] if writers else []
    return Scope(primary, standbys, writers, tuple(restrictions))


def _has_slot(report: Report, primary: Postgres) -> bool:
    """Whether an earlier containment keeps WAL already; warns if the slot has lost it."""
    slots = [slot for slot in read_replication(primary).slots if slot.name == SLOT]
    if slots and slots[0].wal_status == "lost":
        report.warn(
            "WAL kept since the containment",
            "raise max_slot_wal_keep_size, drop the slot, and run this again to keep WAL from now on",
            value=f"slot {SLOT} has lost it: max_slot_wal_keep_size was reached",
            follow=(Next("find-transaction", "search the WAL that is left"), *AGAIN),
        )
    return bool(slots)


def _is_waited_for(report: Report, primary: Postgres | None, standby: Replaying) -> bool:
    """Whether commits wait for this standby's replay: a pause would hang every commit."""
    if primary is None:
        return False
    found = read_replication(primary)
    applies = "remote_apply" in " ".join([found.settings.sync_commit, *found.settings.sync_commit_elsewhere])
    names = parse_sync_names(found.settings.sync_names).names
    waits = applies and (standby.postgres.name in names or "*" in names)
    if waits:
        report.warn(
            f"replay on {standby.address} continues",
            "set synchronous_commit=on, or remove it from synchronous_standby_names; then run this again",
            value="commits wait for its replay (remote_apply): a pause would hang them",
            follow=AGAIN,
        )
    return waits


def _restricting(scope: Scope, one: Restriction) -> Change[[], str | int]:
    if one.kind == REPLAY:
        standby = next(standby for standby in scope.standbys if standby.address == one.target)
        pausing = pause_replay.bind(standby.postgres)
        return Change(pausing, "pause replay", f"{one.target}, at LSN {standby.at} now", seconds=1)
    assert scope.primary
    if one.kind == KEPT_WAL:
        detail = f"slot {SLOT} on {one.target}: its WAL is not archived"
        return Change(keep_wal.bind(scope.primary), "keep WAL", detail)
    sessions = next(role.sessions for role in scope.writers.roles if role.role == one.target) if scope.writers else 0
    blocked = f"of role {one.target}; {sessions} sessions end"
    return Change(write_block.block_writes.bind(scope.primary, one.target), "block writes", blocked, seconds=1)


def report_unrestricted(report: Report, scope: Scope) -> None:
    """What is paused already, and what can still write."""
    for standby in scope.standbys:
        if standby.state != RUNNING:
            report.fact(f"replay on {standby.address}", f"{standby.state} already, at LSN {standby.at}")
    if scope.writers:
        _report_limits(report, scope.writers)


def _report_limits(report: Report, writers: Writers) -> None:
    """What can still write."""
    report.fact("not blocked", "superusers, and a client that sends BEGIN READ WRITE or SET")
    if writers.superusers:
        report.warn(
            "sessions of superusers",
            "end those that are not yours",
            value=f"{writers.superusers} in this database: they can still write",
        )
    if writers.prepared:
        report.warn(
            "prepared transactions",
            "leave them alone until you know what they contain; then ROLLBACK PREPARED",
            value=f"{', '.join(writers.prepared[:5])}: COMMIT PREPARED still writes them",
        )
    if writers.subscriptions:
        report.warn(
            "subscriptions",
            "ALTER SUBSCRIPTION … DISABLE",
            value=f"{', '.join(writers.subscriptions[:5])}: they still write",
        )


@action(of=lambda env: Act(FREEZE, env.name), idempotent=True)
def freeze_maintenance(env: Environment, known: Contained | None, scope: Scope, reason: str, by: str) -> Contained:
    """Record every restriction and the state before it, before anything changes. Earlier records are kept."""
    now = datetime.now(env.zone)
    since = now.strftime("%Y-%m-%d %H:%M:%S %Z")
    found = known or Contained(uuid.uuid4().hex, now.timestamp(), by, reason, since, gethostname())
    recorded = {(one.kind, one.target) for one in found.held}
    new = [one for one in scope.restrictions if (one.kind, one.target) not in recorded]
    found = replace(found, held=(*found.held, *new))
    containment.write(env.name, env.reports_directory, found)
    failpoint("contain: recorded")
    return found


def _report_restricted(report: Report, one: Restriction, result: str | int) -> None:
    if one.kind == REPLAY:
        report.fact(f"replay on {one.target}", f"paused at LSN {result}")
    elif one.kind == KEPT_WAL:
        report.fact("WAL kept from", result)
    else:
        report.require(
            f"writes of role {one.target} are blocked",
            not result,
            "start the standby that their commits wait for, then run this again: those commits are not cancelled",
            value=f"{result} earlier sessions are left" if result else "its earlier sessions ended",
            follow=AGAIN,
        )


def _try_to_write(report: Report, primary: Postgres) -> None:
    refusal = try_to_write(primary)
    report.require(
        "the application cannot write",
        bool(refusal),
        "check pg_db_role_setting: somebody has changed the setting",
        value=refusal or f"{primary.user} could write in a new session",
    )


def release(report: Report, env: Environment, found: Contained) -> None:
    """Remove one restriction after the other; those that cannot be removed stay recorded."""
    held = list(reversed(found.held))
    releasing = [_releasing(env, one) for one in held]
    thawing = Change(thaw_maintenance.bind(env, found), "allow maintenance", "when everything above is done")
    effect = Effect(f"removes {counted(len(held), 'restriction')}, allows maintenance again", "contain-incident")
    pins = [lambda report: report.pin_state("contained", found.id)]
    with carrying_out(report, *releasing, thawing, effect=effect, pins=pins) as carry:
        left, rows = list[Restriction](), list[tuple[str, str, str]]()
        for one, line in zip(held, releasing, strict=True):
            try:
                rows.append((one.kind, one.target, carry(line)))
            except OpsError as error:
                left.append(one)
                report.fail(
                    f"{one.kind} of {one.target} is restored",
                    error.hint or "start the server, then run this again",
                    value=error.message,
                    follow=[Next("release-containment", "release the rest")],
                )
                continue
            failpoint("release: one")
        report.table("Restored", ("what", "where", "state"), rows)
        if left:
            containment.write(env.name, env.reports_directory, replace(found, held=tuple(reversed(left))))
            report.fail_if_critical()
        carry(thawing)
    report.outcome = f"released; it was {found.text}"


def _releasing(env: Environment, one: Restriction) -> Line[[], str]:
    step, detail = UNDO[one.kind], f"{one.target} (before: {one.before or 'nothing'})"
    if one.kind == ROLE:
        letting_in, as_before = (
            let_in.bind(env.postgres, one.target, one.before),
            f"{one.before or 'nothing'} is set, as before",
        )
        return Change(lambda: letting_in() or as_before, step, detail, seconds=1, by=[letting_in], failed=_contained)
    node = next((node for node in env.nodes() if address(node) == one.target), None)
    if node is None:
        return Check(lambda: "the environment does not name it any more", step, detail)
    if one.kind == KEPT_WAL:
        return Change(drop_slot.bind(node), step, detail, seconds=1, failed=_contained)
    resuming = resume_replay.bind(node)

    def resume() -> str:
        (now,) = read_replaying([node])
        if not now.state and not now.problem:
            return "it is not a standby any more"
        return f"resumed at LSN {resuming()}"

    return Change(resume, step, detail, seconds=1, by=[resuming], failed=_contained)


def _contained(_error: OpsError) -> State:
    return State("the environment stays contained", "fix the findings above, then run release-containment again")


@action(of=lambda env: Act(THAW, env.name), idempotent=True)
def thaw_maintenance(env: Environment, found: Contained) -> None:
    """Record that maintenance is allowed again."""
    containment.end(env.name, env.reports_directory, found)


if __name__ == "__main__":
    sys.exit(exit_code(main))
