"""What a confirmed run will do to the environment: the headline of its plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from runbook import clock
from runbook.guard.loss import Loss, losses_text
from runbook.guard.permit import PlannedStep
from runbook.next import Next
from runbook.units import about


@dataclass(frozen=True)
class NoUndo:
    """Why nothing undoes a change: a clause."""

    why: str


@dataclass(frozen=True)
class Effect:
    """What is done, what is lost, how long the system is down, and what undoes it.

    `what`: a clause. `lost`: the losses of the parts that are replaced, or a clause about what is deleted; "" where
    nothing is. `down`: an estimate of the seconds for which the system is down, NaN where it is unknown; a clause where
    only a part of it waits. `undo`: the runbook that undoes it, or how; "" or why, where nothing does.
    """

    what: str
    undo: str | Next | NoUndo
    lost: str | tuple[Loss, ...] = ""
    down: float | str = 0.0

    def __str__(self) -> str:
        if isinstance(self.undo, NoUndo):
            undo = f"no undo: {self.undo.why}"
        else:
            undo = f"undo: {self.undo}" if self.undo else "cannot be undone"
        lost = self.lost if isinstance(self.lost, str) else losses_text(self.lost)
        return "; ".join((self.what, lost or losses_text(()), self._down, undo))

    @property
    def _down(self) -> str:
        if isinstance(self.down, str):
            return self.down
        if math.isnan(self.down):
            return "downtime unknown"
        return f"{about(self.down)} down" if self.down else "no downtime"


def back_to(what: str, at: datetime) -> str:
    """`app_db goes back to 01:59 (+09:00)`."""
    return f"{what} goes back to {clock.short(at)}"


def seconds_from(steps: Sequence[PlannedStep], name: str) -> float:
    """The estimated seconds of a plan from its step `name` on; of all steps where there is none of that name."""
    names = [step.step for step in steps]
    return sum(step.seconds for step in steps[names.index(name) if name in names else 0 :])
