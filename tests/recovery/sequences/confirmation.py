"""A plan, and its confirmed run: by its own form or typed again, with clients, a server that comes back, or a signal
that ends the run in its middle."""

from __future__ import annotations

import contextlib
import random
import signal
from dataclasses import dataclass
from typing import Any

from tests.fixtures.postgres.clusters import NAME
from tests.recovery.sequences.accidents import starting_again
from tests.recovery.sequences.checks import Broken, Seen, check_untouched, see, sessions_end
from tests.recovery.sequences.operator import Ran
from tests.recovery.sequences.steps import client_writing
from tests.recovery.sequences.world import World


class Stuck(Exception):
    """A recovery was refused, with nothing changed. The round goes on if a server takes writes."""


@dataclass(frozen=True)
class Carried:
    """A plan and the confirmed run of it. `before`: the plan and the run that a signal ended; `client_wrote`: during the
    run, into what is replaced."""

    seen: Seen
    plan: Ran
    ran: Ran
    before: tuple[Ran, ...] = ()
    client_wrote: bool = False

    @property
    def plans(self) -> tuple[Ran, ...]:
        """Everything that was confirmed."""
        return (self.plan, *(one for one in self.before if one.status == "PLANNED"))

    @property
    def kept_is_unknown(self) -> bool:
        """Whether what was replaced is not what was there before: a client wrote into it, or a signal ended a first run
        that may have swapped already."""
        return bool(self.before) or self.client_wrote

    @property
    def texts(self) -> str:
        """Everything that a person has read."""
        return "\n".join(one.text for one in (*self.before, self.plan, self.ran))

    @property
    def log(self) -> str:
        """All of it, for the record of a failure."""
        return log_of(*self.before, self.plan, self.ran)


def carry_out(world: World, chance: random.Random, flow: str, **parameters: Any) -> Carried:
    """Show the plan, then confirm it by its own form. A client that is no service may write on meanwhile.

    Raises:
        Stuck: the plan itself is refused, and nothing changed.
        Broken: a refused run changed something, or refused what its plan had offered.
    """
    seen = see(world)
    plan = _plan(world, seen, flow, parameters)
    if ended := _interrupted(world, chance, plan, parameters):
        return _run_again(world, chance, seen, plan, ended, parameters)
    writes_on = world.tokens.pop("client", False)
    clients = client_writing(world.database, chance) if writes_on else contextlib.nullcontext()
    with clients, starting_again(world):
        ran = _confirm(world, chance, plan, parameters)
    if not seen.is_writable and _is_of_another_state(ran) and world.is_writable:
        plan = _plan(world, seen, flow, parameters)
        ran = _confirm(world, chance, plan, parameters)
    if not ran.is_done and not ran.has_replaced:
        _judge_refusal(world, seen, plan, ran)
        if not writes_on and "lost" not in f"{ran.error}{ran.headline}":
            refused = f"the plan was offered, and its run refused: {ran.error or ran.headline}"
            raise_broken(world, [refused], log_of(plan, ran))
        raise Stuck(f"{flow}: {ran.error or ran.headline}")
    return Carried(seen, plan, ran, client_wrote=writes_on)


def _plan(world: World, seen: Seen, flow: str, parameters: dict[str, Any]) -> Ran:
    plan = world.launch(flow, **parameters)
    if plan.status != "PLANNED":
        _judge_refusal(world, seen, plan, plan)
        raise Stuck(f"{flow} plan: {plan.error or plan.headline or plan.output[-300:]}")
    return plan


def _confirm(world: World, chance: random.Random, plan: Ran, parameters: dict[str, Any]) -> Ran:
    by_form = chance.random() < world.by_form
    try:
        return world.launch(plan.flow, **{**parameters, **(plan.pins if by_form else {}), "confirm": NAME})
    finally:
        sessions_end(world)


def _is_of_another_state(ran: Ran) -> bool:
    """Whether a run was refused, perhaps because the server that its plan found dead, or starting, runs now: by its plan,
    or by what it finds only on a running server."""
    return not ran.is_done and not ran.has_replaced


def _interrupted(world: World, chance: random.Random, plan: Ran, parameters: dict[str, Any]) -> Ran | None:
    """The confirmed run that a signal ended; None where none is due, or where it was over before."""
    if plan.flow.startswith("undo-") or "interrupt" not in world.tokens:
        return None  # an undo that is run again undoes itself
    number, seconds = world.tokens.pop("interrupt")
    world.tokens.pop("client", None)
    with starting_again(world):
        ran = world.launch(plan.flow, **{**parameters, **plan.pins, "confirm": NAME}, signal_at=(number, seconds))
    sessions_end(world)
    world.tokens["interrupted"] = f"{signal.Signals(number).name} after {seconds:.1f} s"
    return ran


def _run_again(
    world: World, chance: random.Random, seen: Seen, plan: Ran, ended: Ran, parameters: dict[str, Any]
) -> Carried:
    """What every runbook says of itself: if it is killed, run it again."""
    if ended.is_done:
        return Carried(seen, plan, ended)
    if ended.state.startswith("nothing live was replaced"):  # a cancelled run puts back what it stopped
        raise_broken(world, check_untouched(world, seen, ended), log_of(plan, ended))
    again = world.launch(plan.flow, **parameters)
    if again.is_done:  # nothing is left to do
        return Carried(seen, plan, again, (plan, ended))
    ran = _confirm(world, chance, again, parameters) if again.status == "PLANNED" else again
    if not ran.is_done and not ran.has_replaced:
        if not seen.is_writable and world.is_writable:  # its server was started again meanwhile
            raise Stuck(f"{plan.flow}: {ran.error or ran.headline}")
        refused = f"{world.tokens['interrupted']}, and then {plan.flow} is refused: {ran.error or ran.headline}"
        if "lost" in f"{ran.error}{ran.headline}":  # more than its plan said: it asks again, as after no signal
            raise_broken(world, check_untouched(world, seen, ran), log_of(plan, ended, again, ran))
            raise Stuck(refused)
        raise_broken(world, [refused], log_of(plan, ended, again, ran))
    return Carried(seen, again, ran, (plan, ended))


def _judge_refusal(world: World, seen: Seen, plan: Ran, ran: Ran) -> None:
    raise_broken(world, check_untouched(world, seen, ran), log_of(plan, ran))


def raise_broken(world: World, problems: list[str], log: str) -> None:
    """Raises Broken for the problems, but for those that are known."""
    if left := [one for one in problems if not (world.tolerated and world.tolerated.search(one))]:
        raise Broken("; ".join(left) + f"\n{log}")


def log_of(*runs: Ran) -> str:
    """What a person has read of them, and the end of their output."""
    return "\n\n".join(f"{one.status or 'ENDED'} {one.flow}\n{one.text}\n{one.output[-1500:]}" for one in runs)
