"""The start of a recovered copy with the configuration that the live server will use, before it becomes live.

It runs on a separate port without archiving, streaming, subscriptions or autovacuum, and stops again. No preloaded
library runs: a background worker (pg_cron) would begin its work. Whether each can be loaded is judged instead.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import psycopg

from blocks.postgres.server import Postgres, execute
from runbook.errors import OpsError
from runbook.kinds import action
from runbook.wait import until
from tasks.cluster.configuration import live_configuration, main_file, place_configuration
from tasks.cluster.container import ServerContainer
from tasks.cluster.instance import ALONE, PrivateInstance, log_of, servers_in
from tasks.cluster.stopped import last_options, start_error
from tasks.cluster.trial import START_SECONDS, StartRefused, log_in_files, place_of, reached_at, serving_in_place
from tasks.cluster.unpack import give
from tasks.postgres.server.requirements import Requirement, read_preloads

PRELOADED = "shared_preload_libraries"
_SMALL = {"shared_buffers": "16MB", "huge_pages": "off"}
"""While the live server runs, the host may lack the memory for a second one."""


@action(idempotent=True)
def rehearse_start(
    postgres: Postgres, instance: PrivateInstance, container: ServerContainer | None = None
) -> tuple[Requirement, ...]:
    """Give a stopped copy the live server's configuration, start it once, and log in as the administrator. Returns
    whether its preloaded libraries can be loaded.

    Raises:
        StartRefused: it does not start.
        LoginRefused: it refuses the administrator's log-in.
        OpsError: it does not answer.
    """
    live = Path(postgres.data_directory).resolve()
    if configuration := live_configuration(postgres):
        place_configuration(configuration, instance.data, live, main_file(postgres))
    given = _given(postgres, instance, live, container)
    settings = {**given, **ALONE, **place_of(postgres, instance, in_container=container is not None)}
    settings |= _SMALL if servers_in(live) else {}
    instance.log.unlink(missing_ok=True)  # of the recovery, which succeeded
    give(instance.root, postgres.os_user)
    with serving_in_place(instance, settings, container) as has_ended:
        reached = reached_at(postgres, instance, settings)

        def answers() -> bool:
            if has_ended():
                raise StartRefused(
                    f"the restored cluster does not start with the live configuration: {start_error(log_of(instance))}",
                    f"correct {main_file(postgres) or f'the configuration in {live}'}, then run this again",
                )
            reached.connect(seconds=2).close()
            return True

        until(answers, what="the start of the restored cluster", seconds=START_SECONDS, every_seconds=0.05)
        return read_preloads(reached, _preloaded(reached, given))


def _given(
    postgres: Postgres, instance: PrivateInstance, live: Path, container: ServerContainer | None
) -> dict[str, str]:
    """The settings on the command line of the live server, with the paths of the copy."""
    given = {"config_file": main_file(postgres) or str(live / "postgresql.conf"), **last_options(live)}
    given |= {**container.settings, **log_in_files(instance, instance.data)} if container else {}
    for name in ("config_file", "hba_file", "ident_file"):
        for data in (str(live), container.data if container else ""):
            if data and given.get(name, "").startswith(f"{data}/"):
                given[name] = str(instance.data) + given[name][len(data) :]
    return given


def _preloaded(postgres: Postgres, given: dict[str, str]) -> list[str]:
    """The libraries that the configuration preloads; empty where this role may not read it."""
    text = given.get(PRELOADED, "")
    with contextlib.suppress(OpsError, psycopg.Error), postgres.connect() as connection:
        text = text or "".join(str(value) for (value,) in execute(connection, _FILED, PRELOADED))
    return [name for word in text.split(",") if (name := word.strip(" \"'"))]


_FILED = "SELECT setting FROM pg_file_settings WHERE name = %s ORDER BY seqno DESC LIMIT 1"
