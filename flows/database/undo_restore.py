"""Undo of a restore of the application's database (§1.2): the replaced one becomes live again."""

from __future__ import annotations

from collections.abc import Sequence

from blocks.environment import Environment
from flows.database import restore_steps
from flows.database.gate import DatabaseCopy, DatabaseGate
from flows.database.staged_restore import SWAP_SECONDS
from flows.loss import planned_loss_of
from flows.pinned import pin_database
from runbook import clock
from runbook.change import Change, State, carrying_out
from runbook.errors import OpsError
from runbook.flow import flow
from runbook.guard.effect import Effect
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.run import runbook
from runbook.run_name import RunName
from tasks.postgres.restore.superseded import SupersededDatabase, find_superseded, read_writes
from tasks.postgres.restore.swap import Swapped, advisory_lock, swap_back
from tasks.postgres.server.server import (
    Identity,
    find_obstacles,
    read_identity,
    read_position,
)

NEWEST = "newest"


@flow(name="undo-restore", flow_run_name=RunName("undo-restore {environment} {kept}"))
def undo_restore(environment: str, kept: str = NEWEST, plan: str = "", confirm: str = "") -> Report:
    """リストアの取り消し (§1.2)

    Makes the database that the last restore replaced live again, and keeps the restored one under another name. Run it
    when a restore was a mistake. Run it again to swap once more.

    Writes since the swap stay in the restored database only; the plan shows how many commits that are. The plan's form
    names the database, so a confirmed plan never swaps twice. Evidence: both names, the counts.

    Args:
        environment: Environment (lab, staging, production …)
        kept: newest, or the name of a superseded database (…__old_YYYYMMDD_HHMMSS)
        plan: Fingerprint of the plan; the link in the plan's report fills it in. Empty: run without comparing with a
            plan
        confirm: Type the environment's name to carry it out. Empty: only show the plan
    """
    env = Environment.find(environment)
    with runbook("Undo restore", env, confirm, plan, changes=True, rank="recovery") as report:
        name = env.postgres.database
        old = choose_superseded(report, env, find_superseded(env.postgres), kept)
        live = read_identity(env.postgres, name)
        gate = _gate_of_undo(report, env, old, live)
        loss = gate.plan()
        report.fact("written since the swap, missing in the old database", loss.text)
        action = swap_back.bind(env.postgres, old, live.oid, gate.judge)

        def swap() -> Swapped:
            gate.look_ahead()
            with advisory_lock(env.postgres) as guard, restore_steps.swapping(report):
                return action(guard)

        swapping = Change(
            swap,
            "swap back",
            f"{old.name} (replaced {old.since} by {old.backup}) becomes {name}; the current {name} is kept",
            size=old.bytes,
            seconds=0.2,
            by=[action],
            pins=[lambda report: pin_database(report, env.postgres, replaced=True)],
            needs=[lambda report: restore_steps.judge_obstacles(report, find_obstacles(env.postgres, name))],
            begun=State("the live database is unchanged", "fix the findings above, then run this again"),
            done=lambda swapped: State(
                f"{old.name} is {name} again; the database that it replaced is kept as {swapped.kept}",
                "do not run this again: it would swap once more",
            ),
        )
        what = f"{name} is again the database that {old.backup} replaced {old.since}"
        effect = Effect(what, "run it again", (loss,), SWAP_SECONDS)
        with carrying_out(report, swapping, effect=effect) as carry:
            swapped = carry(swapping)
        report.loses(gate.measured)
        report.fact("outage for clients", f"{swapped.outage_seconds:.2f} s")
        report.outcome = f"{old.name} is {name} again"
        report.fact("replaced database", f"kept as {swapped.kept}")
    return report


def _gate_of_undo(report: Report, env: Environment, old: SupersededDatabase, live: Identity) -> DatabaseGate:
    """The gate of the live database, whose writes since the swap the kept one lacks. Where commits cannot be counted,
    the server's statistics count rows."""
    name, system = env.postgres.database, int(read_position(env.postgres, env.postgres.database).system)

    def rows(why: str) -> Loss:
        since, planned = read_writes.work(env.postgres, name) - old.writes, planned_loss_of(report, name)
        if report.effect and planned.unit != "row":
            return Loss.not_known(name, why)
        if old.writes < 0 or since < 0:
            return Loss.not_known(name, "the rows that were written since the swap were not counted")
        if report.effect:
            return Loss(name, since, "row", later=max(since - (planned.count or 0), 0))
        return Loss(name, since, "row", as_of=clock.now())

    copy = DatabaseCopy(name, old.lsn, system, (live.oid,) if live.oid else ())
    return DatabaseGate(report, env, copy, otherwise=rows)


def choose_superseded(
    report: Report, env: Environment, found: Sequence[SupersededDatabase], kept: str
) -> SupersededDatabase:
    """The replaced database to swap back.

    Raises:
        OpsError: there is none of that name.
    """
    chosen = [old for old in found if kept in (NEWEST, old.name)]
    if not chosen:
        names = ", ".join(old.name for old in found[:5])
        otherwise = "run undo-full-restore if a recovery replaced the whole cluster; otherwise nothing is kept"
        hint = f"choose one of these, newest first: {names}" if names else otherwise
        raise OpsError(f"there is no replaced database “{kept[:80]}”", hint)
    report.fact("database to swap back", chosen[0].name)
    report.pin("kept", chosen[0].name)
    return chosen[0]
