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
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.flow import flow
from runbook.guard import containment
from runbook.guard.containment import Contained, Restriction
from runbook.guard.effect import Effect
from runbook.guard.permit import Act, Permit
from runbook.next import Next
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from runbook.units import counted
from tasks.postgres.replication import write_block
from tasks.postgres.replication.incident_slot import KEEP_WAL, LET_GO, SLOT, drop_slot, keep_wal
from tasks.postgres.replication.replay import (
    PAUSE,
    RESUME,
    RUNNING,
    Replaying,
    pause_replay,
    read_replaying,
    resume_replay,
)
from tasks.postgres.replication.status import parse_sync_names, read_replication
from tasks.postgres.replication.synchronous import address
from tasks.postgres.replication.write_block import BLOCK, LET_IN, Writers, find_writers, let_in, try_to_write

REPLAY, ROLE, KEPT_WAL = "replay", "role", "WAL"
APPLY = {REPLAY: PAUSE, ROLE: BLOCK, KEPT_WAL: KEEP_WAL}
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
        report.pin_state("contained", known.id if known else "no")
        writes = ", writes are blocked" if scope.writers else ""
        effect = Effect(
            f"maintenance is frozen, replay on standbys pauses{writes}",
            "release-containment",
            down="the application cannot write" if scope.writers else 0.0,
        )
        permit = report.permit(*plan_containment(report, env, scope), effect=effect)
        contained = record_containment(env, known, scope, reason.strip(), by.strip())
        report.state_is(
            "maintenance is frozen; other restrictions may be missing", "run it again, or release-containment"
        )
        restrict(report, permit, scope)
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
        report.pin_state("contained", found.id)
        effect = Effect(
            f"removes {counted(len(found.held), 'restriction')}, allows maintenance again", "contain-incident"
        )
        permit = report.permit(*plan_release(report, found), effect=effect)
        release(report, permit, env, found)
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


def plan_containment(report: Report, env: Environment, scope: Scope) -> list[Act]:
    """Every step; returns the acts for the permit."""
    report.plan("freeze maintenance", "runs that delete or change are refused; backups and recoveries continue")
    at = {one.address: one.at for one in scope.standbys}
    sessions = {one.role: one.sessions for one in scope.writers.roles} if scope.writers else {}
    for one in scope.restrictions:
        if one.kind == REPLAY:
            report.plan("pause replay", f"{one.target}, at LSN {at[one.target]} now", seconds=1, by=[pause_replay])
        elif one.kind == KEPT_WAL:
            report.plan("keep WAL", f"slot {SLOT} on {one.target}: its WAL is not archived", by=[keep_wal])
        else:
            blocked = f"of role {one.target}; {sessions[one.target]} sessions end"
            report.plan("block writes", blocked, seconds=1, by=[write_block.block_writes])
    for standby in scope.standbys:
        if standby.state != RUNNING:
            report.fact(f"replay on {standby.address}", f"{standby.state} already, at LSN {standby.at}")
    if scope.writers:
        _report_limits(report, scope.writers)
    return [Act(FREEZE, env.name), *(Act(APPLY[one.kind], one.target) for one in scope.restrictions)]


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


def record_containment(env: Environment, known: Contained | None, scope: Scope, reason: str, by: str) -> Contained:
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


def restrict(report: Report, permit: Permit, scope: Scope) -> None:
    """Replay first: it is about to copy the damage."""
    standbys = {one.address: one.postgres for one in scope.standbys}
    for one in scope.restrictions:
        if one.kind == REPLAY:
            report.fact(f"replay on {one.target}", f"paused at LSN {pause_replay(permit, standbys[one.target])}")
        elif scope.primary and one.kind == KEPT_WAL:
            report.fact("WAL kept from", keep_wal(permit, scope.primary))
        elif scope.primary:
            left = write_block.block_writes(permit, scope.primary, one.target)
            report.require(
                f"writes of role {one.target} are blocked",
                not left,
                "start the standby that their commits wait for, then run this again: those commits are not cancelled",
                value=f"{left} earlier sessions are left" if left else "its earlier sessions ended",
                follow=AGAIN,
            )
    if scope.writers and scope.primary:
        refusal = try_to_write(scope.primary)
        report.require(
            "the application cannot write",
            bool(refusal),
            "check pg_db_role_setting: somebody has changed the setting",
            value=refusal or f"{scope.primary.user} could write in a new session",
        )


def plan_release(report: Report, found: Contained) -> list[Act]:
    """Every step; returns the acts for the permit."""
    report.fact("contained", found.text)
    for one in reversed(found.held):
        report.plan(UNDO[one.kind], f"{one.target} (before: {one.before or 'nothing'})", seconds=1)
    report.plan("allow maintenance", "when everything above is done")
    return [Act(THAW, report.environment), *(Act(UNDO[one.kind], one.target) for one in found.held)]


def release(report: Report, permit: Permit, env: Environment, found: Contained) -> None:
    """Remove one restriction after the other; those that cannot be removed stay recorded."""
    left, rows = list[Restriction](), list[tuple[str, str, str]]()
    for one in reversed(found.held):
        try:
            done = _release_one(permit, env, one)
        except OpsError as error:
            left.append(one)
            report.fail(
                f"{one.kind} of {one.target} is restored",
                error.hint or "start the server, then run this again",
                value=error.message,
                follow=[Next("release-containment", "release the rest")],
            )
            continue
        rows.append((one.kind, one.target, done))
        failpoint("release: one")
    report.table("Restored", ("what", "where", "state"), rows)
    if left:
        containment.write(env.name, env.reports_directory, replace(found, held=tuple(reversed(left))))
        report.state_is("the environment stays contained", "fix the findings above, then run release-containment again")
        report.fail_if_critical()
    containment.end(env.name, env.reports_directory, found)
    report.outcome = f"released; it was {found.text}"


def _release_one(permit: Permit, env: Environment, one: Restriction) -> str:
    if one.kind == ROLE:
        return let_in(permit, env.postgres, one.target, one.before) or f"{one.before or 'nothing'} is set, as before"
    node = next((node for node in read_replaying(env.nodes()) if node.address == one.target), None)
    if node is None:
        return "the environment does not name it any more"
    if one.kind == KEPT_WAL:
        return drop_slot(permit, node.postgres)
    if not node.state and not node.problem:
        return "it is not a standby any more"
    return f"resumed at LSN {resume_replay(permit, node.postgres)}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
