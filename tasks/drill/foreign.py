"""A standby of another cluster, for a drill's negative control: a failover must not promote it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.failpoint import failpoint
from runbook.wait import until
from tasks.cluster.instance import prepare_instance, put_away, root_for, running, sweep_instance

FOREIGN = ".foreign"
_LIKE_OTHERS = ("--encoding=UTF8", "--no-locale", "--auth=trust", "--no-sync")


@contextlib.contextmanager
def foreign_standby(standby: Postgres) -> Iterator[Postgres]:
    """A new cluster in recovery with nothing to replay, under the standby's name, next to the standby's data directory.
    It is deleted at the end of the block.

    Raises:
        OpsError: it cannot be created, or does not start.
    """
    sweep_foreign(standby)
    instance = prepare_instance(standby, root_for(standby, FOREIGN))
    try:
        shell.run(
            [standby.program("initdb"), "-D", instance.data, "-U", standby.admin_user, *_LIKE_OTHERS],
            user=standby.os_user,
            environment={"LC_ALL": "C"},
            directory=Path("/"),
        )
        with running(instance, None, as_standby=True):
            until(lambda: _answers(instance.postgres), what="the start of another cluster's standby", seconds=60)
            failpoint("drill: another cluster's standby")
            yield instance.postgres
    finally:
        put_away(instance)


def sweep_foreign(standby: Postgres) -> None:
    """Delete what a killed run left."""
    sweep_instance(root_for(standby, FOREIGN))


def _answers(postgres: Postgres) -> bool:
    with postgres.connect(seconds=2):
        return True
