"""The base backups that a recovery of a cluster may start from."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.backups.catalogue import Backup
from tasks.cluster.content import ClusterContent, cluster_in
from tasks.wal.format.names import Timeline


def own_backups(backups: Sequence[Backup], environment: str, system: int) -> list[Backup]:
    """An environment's base backups by the LSN at which they end: of the cluster `system`, or (0: the server is down)
    of the newest backup's cluster. Backups that failed a verification are left out.

    Raises:
        VerificationFailed: one has no readable content.
    """
    own = [one for one in backups if one.manifest.environment == environment and not one.failed]
    if own:
        cluster = system or cluster_in(max(own, key=lambda one: one.manifest.taken)).system
        own = [one for one in own if cluster_in(one).system == cluster]
    return sorted(own, key=lambda one: (cluster_in(one).stop, one.manifest.taken))


def is_on(history: Timeline, content: ClusterContent) -> bool:
    """Whether a base backup is part of a timeline's history."""
    left = history.left_at(content.timeline)
    return left is not None and content.stop <= left
