"""The first minutes of an incident (§8.4): nothing more is lost while people look, and one way back."""

from __future__ import annotations

import argparse
import sys
import uuid
from dataclasses import dataclass, replace
from datetime import datetime
from socket import gethostname

from prefect import flow

from blocks.environment import Environment
from blocks.postgres.server import Postgres
from flows.launch import launch
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.guard import containment
from runbook.guard.containment import Contained, Held
from runbook.guard.permit import Act, Permit
from runbook.report import Report
from runbook.run import runbook
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
from tasks.postgres.replication.write_block import (
    BLOCK,
    LET_IN,
    Writers,
    block_writes,
    find_writers,
    let_in,
    try_to_write,
)


@flow(name="contain-incident", flow_run_name="contain-incident {environment}")
def contain_incident(
    environment: str, block_writes: bool = False, reason: str = "", by: str = "", plan: str = "", confirm: str = ""
) -> Report:
    """障害の封じ込め (§8.4)

    Keeps what is there while an incident is looked into: replay is paused on the standbys (they hold what the primary
    held before more of a bug's work arrives), maintenance is frozen (whatever deletes or changes is refused, a run of
    it that goes on is ended), WAL stays where it is. With block_writes the application's roles cannot write any more:
    their transactions are read-only, their sessions end, with what they had not committed. Run it as soon as data seems
    to go wrong, before anybody knows why.

    Backups and recoveries go on. Writes are not held off from superusers, from a client that asks for BEGIN READ WRITE
    by name, or from a prepared transaction that somebody commits. A standby that restarts goes on replaying: launch it
    again then. The longer it lasts, the more WAL piles up on a paused standby.

    Undo: release-containment puts back exactly what this changed. Killed anywhere, launch it again. Evidence: what was
    held still, and at which LSN.

    Departs from the manual: its first response names no way to keep what is there.

    Args:
        environment: 対象の環境
        block_writes: アプリケーションのロールの書き込みも止める
        reason: 理由 (必須)。拒否されたメンテナンスの表示に出る
        by: 実施者の名前 (必須)
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Contain incident", env, confirm, plan, changes=True, rank="recovery") as report:
        if not reason.strip() or not by.strip():
            raise OpsError("who contains it, and why, is not said", "fill in by and reason: refused runs show them")
        scene = survey(report, env, block_writes=block_writes)
        known = containment.read(env.name, env.reports_directory)
        report.pin_state("contained", known.id if known else "no")
        permit = report.permit(*plan_containment(report, env, scene))
        contained = noted(env, known, scene, reason.strip(), by.strip())
        report.state_is("maintenance is frozen; not all is held still yet", "launch it again, or release-containment")
        hold_still(report, permit, env, scene)
        conclude(report, contained, scene)
    return report


@flow(name="release-containment", flow_run_name="release-containment {environment}")
def release_containment(environment: str, plan: str = "", confirm: str = "") -> Report:
    """封じ込めの解除 (§8.4)

    Puts back what contain-incident changed, and nothing else: replay goes on where that had paused it, roles get the
    setting back that they had (their sessions end once more, since what began meanwhile stays read-only), maintenance
    may run again. Run it when the incident is over, or when a failover needs the standby.

    What cannot be put back now (a server is down) keeps the environment contained: launch it again then. Undo:
    contain-incident. Evidence: each thing, as it was and as it is.

    Departs from the manual: it knows no containment.

    Args:
        environment: 対象の環境
        plan: 計画の指紋。計画レポートのリンクが入力する。空なら計画と照合せずに実行
        confirm: 環境名を入力すると実行。空なら計画だけを表示
    """
    env = Environment.find(environment)
    with runbook("Release containment", env, confirm, plan, changes=True, rank="recovery") as report:
        found = containment.read(env.name, env.reports_directory)
        if found is None:
            report.outcome = "it is not contained: there is nothing to release"
            return report
        report.pin_state("contained", found.id)
        permit = report.permit(*plan_release(report, found))
        release(report, permit, env, found)
    return report


def main() -> int:
    """`python -m flows.recovery.forensics.containment contain|release --environment NAME …`: works without Prefect."""
    parser = argparse.ArgumentParser(prog="python -m flows.recovery.forensics.containment")
    commands = parser.add_subparsers(dest="command", required=True)
    contain, release = commands.add_parser("contain"), commands.add_parser("release")
    for command in (contain, release):
        command.add_argument("--environment", required=True)
        command.add_argument("--confirm", default="", help="the environment's name; without it the plan is shown")
    contain.add_argument("--block-writes", action="store_true")
    contain.add_argument("--reason", default="")
    contain.add_argument("--by", default="")
    given = vars(parser.parse_args())
    return launch(contain_incident if given.pop("command") == "contain" else release_containment, given)


REPLAY, ROLE, KEPT_WAL = "replay", "role", "WAL"
FREEZE, THAW = "freeze maintenance of", "let maintenance go on in"


@dataclass(frozen=True)
class Scene:
    """The servers as they are: standbys to be paused, the primary (None: nobody takes writes), who may write (None:
    writes are not to be blocked), and whether WAL must be kept on the primary, since nothing carries it away."""

    pausing: tuple[Replaying, ...]
    paused: tuple[Replaying, ...]
    primary: Postgres | None
    writers: Writers | None
    keeps_wal: bool


def survey(report: Report, env: Environment, *, block_writes: bool) -> Scene:
    """What there is to hold still. A server that is down is no reason to leave the others alone."""
    nodes = read_replaying(env.nodes())
    for one in nodes:
        if one.problem:
            report.warn(f"{one.address} answers", "when it is back, launch this again", value=one.problem)
    primary = next((one.postgres for one in nodes if not one.state and not one.problem), None)
    if primary is None:
        report.warn("a primary", "nobody takes writes; launch this again when one does", value="none answers")
    standing = [one for one in nodes if one.state]
    pausing = [one for one in standing if one.state == RUNNING and not _waits_for(report, primary, one)]
    writers = find_writers(primary) if block_writes and primary else None
    keeps = primary is not None and not env.has("wal") and not _has_slot(report, primary)
    if not standing:
        report.warn("a standby to pause", "nothing to do", value="there is none: all copies follow what goes wrong")
    return Scene(tuple(pausing), tuple(one for one in standing if one.state != RUNNING), primary, writers, keeps)


def _has_slot(report: Report, primary: Postgres) -> bool:
    """Whether the slot is there that keeps WAL; that it has lost it is told."""
    slots = [slot for slot in read_replication(primary).slots if slot.name == SLOT]
    if slots and slots[0].wal_status == "lost":
        report.warn(
            "WAL that was kept",
            "look at pg_wal with find-transaction for what is left; raise "
            "max_slot_wal_keep_size, drop the slot, and launch this again to keep what comes",
            value=f"slot {SLOT} has lost it: max_slot_wal_keep_size was reached",
        )
    return bool(slots)


def _waits_for(report: Report, primary: Postgres | None, standby: Replaying) -> bool:
    """Whether commits wait until this standby has replayed them: paused, it would hang every one of them."""
    if primary is None:
        return False
    found = read_replication(primary)
    applies = "remote_apply" in " ".join([found.settings.sync_commit, *found.settings.sync_commit_elsewhere])
    names = parse_sync_names(found.settings.sync_names).names
    waits = applies and (standby.postgres.name in names or "*" in names)
    if waits:
        report.warn(
            f"replay on {standby.address} goes on",
            "take it out of synchronous_standby_names, or choose synchronous_commit=on, then launch this again",
            value="commits wait for its replay (remote_apply): paused, it would hang them",
        )
    return waits


def plan_containment(report: Report, env: Environment, scene: Scene) -> list[Act]:
    """Every step; returns what a permit is needed for."""
    acts = [Act(FREEZE, env.name)]
    report.plan("freeze maintenance", "whatever deletes or changes is refused; backups and recoveries go on")
    for one in scene.pausing:
        acts.append(Act(PAUSE, one.address))
        report.plan("pause replay", f"{one.address}, at LSN {one.at} now", seconds=1)
    for one in scene.paused:
        report.fact(f"replay on {one.address}", f"{one.state} already, at LSN {one.at}")
    if scene.keeps_wal and scene.primary:
        acts.append(Act(KEEP_WAL, address(scene.primary)))
        report.plan("keep WAL", f"slot {SLOT} on {address(scene.primary)}: nothing carries WAL away from it")
    for writer in scene.writers.roles if scene.writers else ():
        acts.append(Act(BLOCK, writer.role))
        report.plan("block writes", f"of role {writer.role}; {writer.sessions} sessions end", seconds=1)
    if scene.writers:
        _tell_limits(report, scene.writers)
    return acts


def _tell_limits(report: Report, writers: Writers) -> None:
    """What goes on writing all the same."""
    report.fact("not held off", "superusers, and a client that asks for BEGIN READ WRITE or SET by name")
    if writers.superusers:
        report.warn(
            "sessions of superusers",
            "end them by hand where they are not yours",
            value=f"{writers.superusers} in this database",
        )
    if writers.prepared:
        report.warn(
            "prepared transactions",
            "COMMIT PREPARED would still write them: leave them alone, or ROLLBACK "
            "PREPARED when you know what they are",
            value=", ".join(writers.prepared[:5]),
        )
    if writers.subscriptions:
        report.warn(
            "subscriptions",
            "they go on writing: ALTER SUBSCRIPTION … DISABLE",
            value=", ".join(writers.subscriptions[:5]),
        )


def noted(env: Environment, known: Contained | None, scene: Scene, reason: str, by: str) -> Contained:
    """Written down before anything is held still, with how it was; what an earlier run noted stays as it noted it."""
    now = datetime.now(env.zone)
    since = now.strftime("%Y-%m-%d %H:%M:%S %Z")
    found = known or Contained(uuid.uuid4().hex, now.timestamp(), by, reason, since, gethostname())
    held = [Held(REPLAY, one.address, one.state) for one in scene.pausing]
    if scene.keeps_wal and scene.primary:
        held.append(Held(KEPT_WAL, address(scene.primary)))
    held += [Held(ROLE, writer.role, writer.setting) for writer in (scene.writers.roles if scene.writers else ())]
    there = {(one.kind, one.target) for one in found.held}
    found = replace(found, held=(*found.held, *(one for one in held if (one.kind, one.target) not in there)))
    containment.write(env.name, env.reports_directory, found)
    failpoint("contain: recorded")
    return found


def hold_still(report: Report, permit: Permit, env: Environment, scene: Scene) -> None:
    """Replay first: a bug's work is on its way."""
    for one in scene.pausing:
        at = pause_replay(permit, one.postgres)
        report.fact(f"replay on {one.address}", f"paused at LSN {at}")
    if scene.keeps_wal and scene.primary:
        report.fact("WAL kept from", keep_wal(permit, scene.primary))
    if not scene.writers or not scene.primary:
        return
    for writer in scene.writers.roles:
        left = block_writes(permit, scene.primary, writer.role)
        report.require(
            f"writes of role {writer.role} are blocked",
            not left,
            "their commits wait for a standby, and are not cancelled: start the standby, then launch this again",
            value=f"{left} sessions of before are left" if left else f"{writer.sessions} sessions ended",
        )
    refusal = try_to_write(scene.primary)
    report.require(
        "the application cannot write",
        bool(refusal),
        "somebody has set it back: look at pg_db_role_setting",
        value=refusal or f"{scene.primary.user} could write in a new session",
    )


def conclude(report: Report, contained: Contained, scene: Scene) -> None:
    """What is held still, and how to go back."""
    report.table(
        "Held still",
        ("what", "where", "before"),
        [
            ("maintenance", "everything that deletes or changes", "free"),
            *((one.kind, one.target, one.before or "nothing") for one in contained.held),
        ],
    )
    blocked = ", writes are blocked" if scene.writers else ""
    report.outcome = f"{contained.told}; {len(contained.held)} things held still{blocked}; undo: release-containment"


def plan_release(report: Report, found: Contained) -> list[Act]:
    """Every step; returns what a permit is needed for."""
    report.fact("contained", found.told)
    kinds = {REPLAY: RESUME, ROLE: LET_IN, KEPT_WAL: LET_GO}
    for one in reversed(found.held):
        report.plan(kinds[one.kind], f"{one.target} (before: {one.before or 'nothing'})", seconds=1)
    report.plan("let maintenance go on", "from then on")
    return [Act(THAW, report.environment), *(Act(kinds[one.kind], one.target) for one in found.held)]


def release(report: Report, permit: Permit, env: Environment, found: Contained) -> None:
    """One thing after the other; what cannot be put back stays noted."""
    left, rows = list[Held](), list[tuple[str, str, str]]()
    for one in reversed(found.held):
        try:
            done = _release_one(permit, env, one)
        except OpsError as error:
            left.append(one)
            report.fail(
                f"{one.kind} of {one.target} is as it was",
                error.hint or "start the server, then launch this again",
                value=error.message,
            )
            continue
        rows.append((one.kind, one.target, done))
        failpoint("release: one")
    report.table("Put back", ("what", "where", "how it is"), rows)
    if left:
        containment.write(env.name, env.reports_directory, replace(found, held=tuple(reversed(left))))
        report.state_is("the environment stays contained", "launch release-containment again when that is put right")
        report.fail_if_critical()
    containment.end(env.name, env.reports_directory, found)
    report.outcome = f"released; it was {found.told}"


def _release_one(permit: Permit, env: Environment, one: Held) -> str:
    node = next((node for node in read_replaying(env.nodes()) if node.address == one.target), None)
    if one.kind in (REPLAY, KEPT_WAL) and node is None:
        return "the environment does not name it any more"
    if one.kind == REPLAY and node:
        if not node.state and not node.problem:
            return "it is no standby any more"
        return f"goes on at LSN {resume_replay(permit, node.postgres)}"
    if one.kind == KEPT_WAL and node:
        return drop_slot(permit, node.postgres)
    return let_in(permit, env.postgres, one.target, one.before) or f"{one.before or 'nothing'} is set, as before"


if __name__ == "__main__":
    sys.exit(exit_code(main))
