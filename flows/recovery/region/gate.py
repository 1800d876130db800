"""The gate of a region failover: which commits of the old region the copy lacks, read again before it is made live.

A plan calls the same function, without the fence.
"""

from __future__ import annotations

from pathlib import Path

from blocks.environment import Environment
from flows.loss import loss_of, require_confirmed
from flows.recovery.point.choice import with_newest
from flows.recovery.postgres.gate import commits_after
from flows.recovery.restore_option import RestoreOption
from runbook.errors import OpsError
from runbook.guard.loss import Loss
from runbook.kinds import probe
from runbook.report import Report
from tasks.failover.fencing import SIGNAL, Fencing
from tasks.host.disk import is_here


def pass_region(report: Report, env: Environment, old: Environment, option: RestoreOption, fencing: Fencing) -> Loss:
    """Let the proven copies pass to their swap, which follows at once: the old region is fenced, and the archive has no
    more WAL than the copy. Returns the loss.

    Raises:
        LossExceeded: more would be lost than was confirmed. Nothing here was replaced.
        OpsError: WAL arrived that the copy lacks.
    """
    if option.replay and with_newest(option.replay.origin).chain.end > option.replay.origin.chain.end:
        raise OpsError(
            f"more WAL of {old.name} arrived in the archive while the copy was built",
            f"make sure that {old.name} is fenced, then run this again: it uses the new WAL too",
        )
    loss = measure.after(fencing)(old, option, env.postgres.database)
    require_confirmed(report, loss)
    return loss


@probe
def measure(old: Environment, option: RestoreOption, part: str) -> Loss:
    """Count the commits of the old region that a copy lacks, where its primary's files are on this host. Otherwise
    everything after the newest restored write may be lost."""
    since = Loss.everything_since(part, option.newest)
    primaries = [node for node in old.nodes() if is_here(node.host) and not Path(node.data_directory, SIGNAL).exists()]
    if not option.replay or len(primaries) != 1:
        return since
    copy = option.copy(part)
    history = copy.origin.chain.timeline
    try:
        read = commits_after(primaries[0], copy.origin.content.system, history.number, copy.end + 1)
    except OpsError:
        return since
    return loss_of(part, [one for one in read if one.xid not in copy.without], {})
