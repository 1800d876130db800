"""The steps that mend something, each followed by every check from outside."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lab.servers.postgres import DATABASE
from tests.fixtures.postgres.clusters import NAME
from tests.recovery.sequences import checks
from tests.recovery.sequences.checks import (
    Broken,
    Found,
    Seen,
    check_losses,
    check_system,
    check_untouched,
    compare,
    see,
)
from tests.recovery.sequences.ledger import Write
from tests.recovery.sequences.operator import Ran
from tests.recovery.sequences.promises import REDIS
from tests.recovery.sequences.steps import NOT_POSSIBLE, client_writing, correct_port, starting_again, step
from tests.recovery.sequences.world import UNRELATED, World


class Stuck(Exception):
    """A recovery was refused, with nothing changed. The round goes on if a server takes writes."""


@dataclass(frozen=True)
class Carried:
    """A plan and the confirmed run of it."""

    seen: Seen
    plan: Ran
    ran: Ran

    @property
    def log(self) -> str:
        """Both, for the record of a failure."""
        return f"PLAN {self.plan.flow}\n{self.plan.text}\n\nRUN\n{self.ran.text}\n{self.ran.output[-1500:]}"


def carry_out(world: World, chance: random.Random, flow: str, **parameters: Any) -> Carried:
    """Show the plan, then confirm it by its own form. A client that is no service may write on meanwhile.

    Raises:
        Stuck: the plan itself is refused, and nothing changed.
        Broken: a refused run changed something, or refused what its plan had offered.
    """
    seen = see(world)
    plan = world.launch(flow, **parameters)
    if plan.status != "PLANNED":
        _judge_refusal(world, seen, plan, plan)
        raise Stuck(f"{flow} plan: {plan.error or plan.headline or plan.output[-300:]}")
    writes_on = world.tokens.pop("client", False)
    by_form = chance.random() < world.by_form
    clients = client_writing(world.database, chance) if writes_on else contextlib.nullcontext()
    with clients, starting_again(world):
        ran = world.launch(flow, **{**parameters, **(plan.pins if by_form else {}), "confirm": NAME})
    checks.sessions_end(world)
    if not ran.is_done and not ran.has_replaced:
        _judge_refusal(world, seen, plan, ran)
        if not writes_on and "lost" not in f"{ran.error}{ran.headline}":
            refused = f"the plan was offered, and its run refused: {ran.error or ran.headline}"
            _raise(world, [refused], _log(plan, ran))
        raise Stuck(f"{flow}: {ran.error or ran.headline}")
    return Carried(seen, plan, ran)


def _judge_refusal(world: World, seen: Seen, plan: Ran, ran: Ran) -> None:
    _raise(world, check_untouched(world, seen, ran), _log(plan, ran))


def _raise(world: World, problems: list[str], log: str) -> None:
    """Raises Broken for the problems, but for those that are known."""
    if left := [one for one in problems if not (world.tolerated and world.tolerated.search(one))]:
        raise Broken("; ".join(left) + f"\n{log}")


def _log(plan: Ran, ran: Ran) -> str:
    return f"PLAN {plan.flow}\n{plan.text}\n\nRUN\n{ran.text}\n{ran.output[-1500:]}"


def settle(
    world: World,
    carried: Carried,
    *,
    back_to: dict[str, list[Write]] | None = None,
    more: list[str] | None = None,
) -> None:
    """Compare everything, and go on with the branches that are live now. `back_to`: the branches that were asked for.

    Raises:
        Broken: a promise was broken.
    """
    seen, ran = carried.seen, carried.ran
    problems, found, lost = list(more or ()), dict[str, Found](), dict[str, list[Write]]()
    for name, ledger in world.ledgers.items():
        wanted = back_to.get(name) if back_to else None
        content = ledger.store.read()
        part = compare(ledger, ledger.copy() if wanted is None else wanted, content)
        found[name] = part
        lost[name] = part.lost if wanted is None else compare(ledger, ledger.copy(), content).lost
        problems += part.problems
        if wanted is not None and part.lost:
            problems.append(f"{name}: {len(part.lost)} writes of the branch that was asked for are missing")
        if wanted is None and part.abandoned:
            problems.append(f"{name}: {len(part.abandoned)} writes of a branch that was left are there again")
    problems += check_losses(lost, carried.plan, ran)
    problems += _check_accidents(world, found, ran)
    for name, part in found.items():
        world.ledgers[name].restart(part.branch)
    problems += check_system(world, seen, ran)
    _raise(world, problems, carried.log)
    world.tokens["marks"] = [one for one in world.tokens.get("marks", []) if _is_on(world, one)]


def _check_accidents(world: World, found: dict[str, Found], ran: Ran) -> list[str]:
    """A table that an accident emptied, and that is empty still, is named."""
    problems = list[str]()
    for name, part in found.items():
        if part.branch and part.branch[-1].is_accident and name not in (REDIS,):
            words = ("without rows", "emptied", "TRUNCATE", "DELETE", "DROP TABLE", "missing")
            if ran.flow == "full-restore" and not any(word in ran.text for word in words):
                problems.append(f"{name}: the accident is still there, and no word says so")
    return problems


def _is_on(world: World, one: tuple[str, Any, dict[str, int]]) -> bool:
    """Whether the branches that are live have everything that a mark has."""
    for name, number in one[2].items():
        ids = {write.attempt for write in world.ledgers[name].writes}
        if any(write.is_acknowledged and write.attempt < number for write in world.ledgers[name].writes) and (
            max(ids, default=0) < number - 1
        ):
            return False
    return True


@contextlib.contextmanager
def _kept(world: World) -> Iterator[None]:
    """Remember the branch that the recovery replaces: undo-restore brings it back."""
    before = world.database.copy()
    yield
    world.tokens["kept"] = before


@step("full-restore", "recovery", 6)
def full_restore(world: World, chance: random.Random) -> str:
    """The main job, with its defaults."""
    return _full_restore(world, chance)


@step("full-restore-dump", "recovery", 0.7)
def full_restore_dump(world: World, chance: random.Random) -> str:
    """From the newest dump."""
    return _full_restore(world, chance, method="dump")


@step("full-restore-cluster", "recovery", 1)
def full_restore_cluster(world: World, chance: random.Random) -> str:
    """From the base backup and all WAL."""
    return _full_restore(world, chance, method="cluster")


def _full_restore(world: World, chance: random.Random, **parameters: Any) -> str:
    before = {name: ledger.copy() for name, ledger in world.ledgers.items()}
    try:
        carried = carry_out(world, chance, "full-restore", **parameters)
    finally:
        correct_port(world)
    settle(world, carried)
    world.tokens["kept"] = before[DATABASE] if "__old_" in carried.ran.text else None
    world.tokens["kept cluster"] = before if "data.superseded_" in carried.ran.text else None
    return f"{carried.ran.status}: {carried.plan.effect.split(';')[1].strip() if ';' in carried.plan.effect else ''}"


@step("restore-database", "recovery", 0.7)
def restore_database(world: World, chance: random.Random) -> str:
    """The application's database from its newest dump."""
    with _kept(world):
        carried = carry_out(world, chance, "restore-database")
        settle(world, carried)
    return carried.ran.status


@step("undo-restore", "recovery", 0.8)
def undo_restore(world: World, chance: random.Random) -> str:
    """The database that the last restore replaced."""
    kept = world.tokens.get("kept")
    if not kept:
        return NOT_POSSIBLE
    now = world.database.copy()
    carried = carry_out(world, chance, "undo-restore")
    settle(world, carried, back_to={DATABASE: [*kept]})
    world.tokens["kept"] = now
    return carried.ran.status


@step("undo-full-restore", "recovery", 1.2)
def undo_full_restore(world: World, chance: random.Random) -> str:
    """The cluster that the last full restore replaced."""
    kept = world.tokens.get("kept cluster")
    if not kept:
        return NOT_POSSIBLE
    now = {name: ledger.copy() for name, ledger in world.ledgers.items()}
    carried = carry_out(world, chance, "undo-full-restore")
    settle(world, carried, back_to={name: writes for name, writes in kept.items() if name != REDIS})
    world.tokens["kept cluster"] = now
    return carried.ran.status


@step("restore-to-point", "recovery", 1)
def restore_to_point(world: World, chance: random.Random) -> str:
    """The whole cluster to one of the marks."""
    marks = world.tokens.get("marks")
    if not marks:
        return NOT_POSSIBLE
    lsn, moment, at = chance.choice(marks)
    by, target = chance.choice([("lsn", lsn), ("time", moment.isoformat(" ", "microseconds"))])
    carried = carry_out(world, chance, "restore-to-point", by=by, target=target)
    wanted = {
        name: [one for one in ledger.copy() if one.attempt < at[name]]
        for name, ledger in world.ledgers.items()
        if name != REDIS
    }
    more = list[str]()
    for name in wanted:
        content = world.ledgers[name].store.read()
        later = sorted(one for one in (content.attempts if content else ()) or () if one >= at[name])
        if later:
            more.append(f"{name}: {len(later)} writes after the target are there")
    settle(world, carried, back_to=wanted, more=more)
    return f"{carried.ran.status} by {by}"


@step("restore-unrelated", "recovery", 0.7)
def restore_unrelated(world: World, chance: random.Random) -> str:
    """One table goes back to the newest point, while everything else is in use."""
    carried = carry_out(world, chance, "restore-to-point", by="latest", mode="tables", tables=[f"public.{UNRELATED}"])
    settle(world, carried)
    return carried.ran.status


@step("failover", "recovery", 1)
def failover(world: World, chance: random.Random) -> str:
    """The standby takes over, because the primary is dead, or before work on its host."""
    if not world.variant.standby:
        return NOT_POSSIBLE
    writable = [role for role in world.roles if world.takes_writes(role)]
    carried = carry_out(world, chance, "postgres-failover", mode="planned" if writable else "unplanned")
    settle(world, carried)
    return f"{carried.ran.status} {'planned' if writable else 'unplanned'}"


@step("rejoin-standby", "quiet", 0.7)
def rejoin_standby(world: World, chance: random.Random) -> str:
    """What most recoveries name as the next step."""
    if not world.variant.standby:
        return NOT_POSSIBLE
    ran = world.launch("rejoin-standby", confirm=NAME)
    return ran.status or ran.error[:60]
