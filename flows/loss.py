"""The loss that a person confirmed, and the one that a gate measured directly before live data is replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from runbook.errors import LossExceeded
from runbook.guard.loss import Loss, exceeded, losses_text
from runbook.report import Report
from tasks.wal.reading.committed import Committed, count_by_database

AGAIN = "run this with an empty confirm, and confirm what the new plan says of the loss"


def again_with(backup: str, before: int = 0) -> str:
    """The next step where the planned backup failed its proof, and the next one loses more. `before`: the transaction
    before which that one stops, where only a copy showed it."""
    stop = f" before={before}" if before else ""
    return f"run this with backup={backup}{stop} and an empty confirm, and confirm what that plan says"


def planned_losses(report: Report) -> tuple[Loss, ...]:
    """The losses that this run's plan said, and that a person confirmed."""
    return report.effect.lost if report.effect and not isinstance(report.effect.lost, str) else ()


def planned_loss_of(report: Report, part: str) -> Loss:
    """The loss of one part that this run's plan said."""
    return next((loss for loss in planned_losses(report) if loss.part == part), Loss(part))


def require_confirmed(report: Report, *losses: Loss, hint: str = AGAIN) -> None:
    """Check that no more is lost than this run's plan said.

    Raises:
        LossExceeded: it is. The message has the new loss.
    """
    planned = planned_losses(report)
    if more := exceeded(planned, losses):
        said = [one for one in planned if one.part in {loss.part for loss in more}]
        raise LossExceeded(f"{losses_text(more)}, but the plan said: {losses_text(said)}", hint)


def loss_of(part: str, lost: Sequence[Committed], names: Mapping[int, str], read_to: int | None = None) -> Loss:
    """The loss of those commits. `names`: databases by OID. `read_to`: the LSN up to which the plan had read."""
    times = sorted(one.at for one in lost)
    return Loss(
        part,
        len(lost),
        first=times[0] if times else None,
        last=times[-1] if times else None,
        by=count_by_database(lost, names),
        # Not by time: the plan read before it was made.
        later=sum(one.lsn > read_to for one in lost) if read_to is not None else 0,
    )
