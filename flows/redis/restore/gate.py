"""The gate before live data of Redis is replaced.

The server is stopped, with its replicas and Sentinels detached; then it is read how far it got, and what the replacing
data lacks is compared with what was confirmed. A run that would lose more ends here, with nothing replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blocks.environment import Environment
from blocks.redis.server import Redis
from flows.loss import require_confirmed
from runbook.guard.loss import Loss
from runbook.report import Report
from runbook.units import first_of
from tasks.backups.catalogue import Backup
from tasks.redis.restore.live import LiveRedis, require_fenced, require_judged, require_stopped
from tasks.redis.restore.survivors import PART, position_in
from tasks.redis.restore.swap import StoppedRedis, stop_redis
from tasks.redis.topology.isolation import detach
from tasks.redis.topology.topology import ReplicationTopology


@dataclass
class RedisGate:
    """The gate of one replacement. `judged`: the server that the plan was made for; `around`: its replicas and
    Sentinels; `stopped`, `fenced`: the server at its stop."""

    report: Report
    env: Environment
    around: ReplicationTopology
    judged: LiveRedis
    was_running: bool = False
    stopped: StoppedRedis | None = None
    fenced: LiveRedis | None = None
    _same: LiveRedis | None = None

    def detach(self, after: object = None) -> ReplicationTopology:
        """Detach the others from the server that was judged.

        Raises:
            LossExceeded: another process serves. Nothing was detached.
            OpsError: a Sentinel or a server refuses.
        """
        self._require_judged(after)
        if not self.around.is_alone:
            self.around = detach.bind(self.env.redis, self.around, self.env.reports_directory)()
        return self.around

    def stop(self) -> LiveRedis:
        """Stop the server, and prove that it is the judged one.

        Raises:
            LossExceeded: another process served meanwhile. Nothing was replaced.
            OpsError: it does not stop.
        """
        env = self.env
        self._require_judged()
        self.stopped = stop_redis.after(self.around)(env.redis, env.services)
        self.fenced = require_fenced.after(self.stopped)(env.redis, self.judged, self.stopped)
        return self.fenced

    def _require_judged(self, after: object = None) -> None:
        if not self._same:
            self.was_running = self.env.services.state("redis").comes_back
            self._same = require_judged.after(after)(self.env.redis, self.judged)

    def judge(self, loss: Loss, backup: Backup | None = None) -> LiveRedis:
        """Let the data pass to the swap, which follows at once. `loss`: what it lacks, measured behind the fence;
        `backup`: what it was restored from.

        Raises:
            LossExceeded: it lacks more than was confirmed, or the server ran again. Nothing was replaced.
        """
        assert self.fenced
        require_confirmed(self.report, loss)
        if backup:
            self.report.fact("replication offset since the backup", offset_since(self.fenced, backup))
        return require_stopped.after(self.fenced)(self.env.redis, self.fenced)


def pass_serving(report: Report, block: Redis, judged: LiveRedis, loss: Loss) -> LiveRedis:
    """The gate of a replacement that a server takes while it serves: it must still be the judged one.

    Raises:
        LossExceeded: it is not, or more would be lost than was confirmed. Nothing was replaced.
    """
    require_confirmed(report, loss)
    return require_judged(block, judged)


def loss_of(backup: Backup, prefixes: Sequence[str] = ()) -> Loss:
    """What a restore from a backup loses; of some prefixes, only their keys."""
    part = f"{PART} keys under {first_of(prefixes)}" if prefixes else PART
    return Loss.everything_since(part, backup.manifest.taken)


def offset_since(live: LiveRedis, backup: Backup) -> str:
    """How far the live server got beyond a backup, by their offsets in the replication stream."""
    if not live.run_id:
        return "unknown, because the server did not answer at its stop"
    position = position_in(backup)
    if position is None:
        return "unknown, because the backup has none"
    if position.replid != live.replid:
        return "unknown, because the backup is from another replication stream"
    return f"{live.offset - position.offset:,} more than the backup's"
