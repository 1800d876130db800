"""Prefect's own database and API: what a backup of it must hold, and what a copy needs before it goes live."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import prefect

from blocks.postgres.server import execute
from blocks.prefect_server import PrefectServer
from runbook.errors import OpsError, Unreachable
from runbook.guard.holder import parse_holder
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from runbook.progress import progress
from runbook.wait import until
from tasks.postgres.restore.staged_copy import REPLACE, Copy

ANSWER_SECONDS = 10.0
START_SECONDS = 180.0
MOST_RUNS = PAGE = 200
TABLES = {"deployments": "public.deployment", "automations": "public.automation"}
# Their process may still live; nobody but itself can say how such a run ended.
UNDER_WAY = ("RUNNING", "PENDING", "CANCELLING")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
MOST_DELETED = 50
"""Prefect's own limit of one bulk deletion."""


@dataclass(frozen=True)
class PrefectDatabase:
    """Whether the key of the secrets is in it (or set outside: PREFECT_SERVER_ENCRYPTION_KEY), what runs, and the runs
    that hold an environment's lock, as sentences."""

    has_key: bool
    runs: tuple[str, ...]
    holders: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settled:
    """What was fixed in a copy: overdue scheduled runs, and slots that no run holds any more."""

    overdue: int
    slots: int


@dataclass(frozen=True)
class PrefectAnswer:
    """What a Prefect API says of itself and of what is in it."""

    version: str
    counts: Mapping[str, int]
    blocks: int


@probe
def read_prefect_database(server: PrefectServer) -> PrefectDatabase:
    """Whether the key is in it, the runs that are under way, and those of them that hold an environment's lock.

    Raises:
        Unreachable: it is down.
        OpsError: there is no such database, or it is not Prefect's.
    """
    with server.connect(server.database) as connection:
        if not execute(connection, "SELECT to_regclass('flow_run') IS NOT NULL")[0][0]:
            raise OpsError(f"{server.database} has no table flow_run", "correct [prefect_server] database")
        key = execute(connection, "SELECT 1 FROM configuration WHERE key = 'ENCRYPTION_KEY'")
        runs = tuple(str(name) for (name,) in execute(connection, _RUNS, list(UNDER_WAY)))
        return PrefectDatabase(bool(key), runs, _holders(execute(connection, _HOLDERS, list(UNDER_WAY))))


def _holders(rows: Iterable[Sequence[object]]) -> tuple[str, ...]:
    """A holder whose process is certainly dead holds nothing: its lease ends by itself."""
    found = [(str(environment), parse_holder(str(text))) for environment, text in rows]
    return tuple(one.sentence(environment).message for environment, one in found if one and not one.is_dead())


# Of every environment that this Prefect serves. The names are those of runbook.guard.lease and runbook.guard.holder.
_HOLDERS = """
SELECT substr(l.name, 5), v.value #>> '{}'
FROM concurrency_limit_v2 l
JOIN variable v ON v.name = l.name || '-holder'
JOIN flow_run r ON r.id::text = ((v.value #>> '{}')::jsonb ->> 'run_id')
WHERE l.name LIKE 'env-%%' AND l.active_slots > 0 AND r.state_type::text = ANY (%s)
ORDER BY l.name
"""
_RUNS = "SELECT name FROM flow_run WHERE state_type::text = ANY (%s) ORDER BY start_time DESC LIMIT 50"


@action(of=lambda server: Act(REPLACE, server.database), idempotent=True)
def settle_copy(server: PrefectServer, copy: Copy) -> Settled:
    """Make a proven copy fit for a later time than its own: what should have begun since the backup would all begin at
    once, and slots of concurrency limits (every environment's lock is one) would be held by leases that are gone."""
    with server.connect(copy.database, autocommit=False) as connection:
        overdue = connection.execute(_OVERDUE).rowcount
        slots = connection.execute("UPDATE concurrency_limit_v2 SET active_slots = 0 WHERE active_slots > 0").rowcount
    return Settled(overdue, slots)


_OVERDUE = """
DELETE FROM flow_run WHERE state_type = 'SCHEDULED' AND auto_scheduled AND expected_start_time < now()
"""


@cache
def revisions() -> tuple[str, ...]:
    """The revisions of a Prefect database that the installed Prefect knows, its own first."""
    from alembic.script import ScriptDirectory  # slow to import

    place = Path(prefect.__file__).parent / "server" / "database" / "_migrations"
    scripts = ScriptDirectory(str(place), version_locations=[str(place / "versions" / "postgresql")])
    return tuple(script.revision for script in scripts.walk_revisions())


@probe
def read_api(server: PrefectServer) -> PrefectAnswer:
    """Ask the API for its version, how many there are of what matters, and the secrets in clear (which are not kept):
    one that was encrypted with another key makes it fail.

    Raises:
        Unreachable: nobody answers.
        OpsError: the password is refused, or an answer is an error.
    """
    with _client(server) as client:
        version = str(_ask(client, "GET", "/admin/version"))
        counts = {what: int(_ask(client, "POST", f"/{what}/count", {})) for what in TABLES}
        blocks = 0
        wanted = {"include_secrets": True, "limit": PAGE}
        while page := _ask(client, "POST", "/block_documents/filter", {**wanted, "offset": blocks}):
            blocks += len(page)
        return PrefectAnswer(version, counts, blocks)


@probe
def answers(server: PrefectServer) -> bool:
    """Return True if the API gives any answer: it renews leases also where its database is away."""
    with contextlib.suppress(httpx.HTTPError), _client(server) as client:
        return bool(client.get("/health").status_code)
    return False


@action(idempotent=True)
def wait_for_api(server: PrefectServer) -> str:
    """Until the API answers that it is ready, database included.

    Raises:
        OpsError: it does not in time.
    """

    def ready() -> bool:
        with contextlib.suppress(httpx.HTTPError), _client(server) as client:
            return client.get("/ready").status_code == httpx.codes.OK
        return False

    try:
        until(ready, what="that Prefect's API is ready", seconds=START_SECONDS)
    except Unreachable as error:
        raise OpsError(error.message, "read the API's log") from None
    return server.api_url


@action(idempotent=True)
def end_lost_runs(server: PrefectServer) -> tuple[str, ...]:
    """Mark as cancelled what the restored database takes for running: such a run ended, or did not, after the backup,
    and would stay Running for ever. Cancelled and not Crashed: nobody is to be called for it."""
    state = {"type": "CANCELLED", "name": "Cancelled", "message": "its end is not in the backup that was restored"}
    with _client(server) as client:
        wanted = {"flow_runs": {"state": {"type": {"any_": list(UNDER_WAY)}}}, "limit": MOST_RUNS}
        runs = _ask(client, "POST", "/flow_runs/filter", wanted)
        for run in runs:
            _ask(client, "POST", f"/flow_runs/{run['id']}/set_state", {"state": state, "force": True})
    return tuple(str(run["name"]) for run in runs)


@probe
def count_old_runs(server: PrefectServer, before: datetime) -> int:
    """Flow runs that ended before a moment; whatever runs, waits or is scheduled is not among them.

    Raises:
        Unreachable: nobody answers.
        OpsError: the password is refused, or an answer is an error.
    """
    with _client(server) as client:
        return int(_ask(client, "POST", "/flow_runs/count", {"flow_runs": _old(before)}))


@action(idempotent=True)
def delete_old_runs(server: PrefectServer, before: datetime) -> int:
    """Delete the flow runs that ended before a moment, with their task runs, artifacts and logs (Prefect deletes the
    logs a moment later). Returns how many.

    Raises:
        Unreachable: nobody answers.
        OpsError: the password is refused, or an answer is an error.
    """
    deleted = 0
    with _client(server) as client, progress(lambda: f"{deleted:,} flow runs are deleted"):
        while runs := _ask(client, "POST", "/flow_runs/filter", {"flow_runs": _old(before), "limit": MOST_DELETED}):
            chosen = {"any_": [run["id"] for run in runs]}
            of_them = {"artifacts": {"flow_run_id": chosen}, "limit": PAGE}
            while artifacts := _ask(client, "POST", "/artifacts/filter", of_them):
                for artifact in artifacts:
                    _ask(client, "DELETE", f"/artifacts/{artifact['id']}")
            gone = _ask(client, "POST", "/flow_runs/bulk_delete", {"flow_runs": {**_old(before), "id": chosen}})
            deleted += len(gone["deleted"])
            if not gone["deleted"]:
                raise OpsError("Prefect's API deletes none of the old flow runs", "read its log")
    return deleted


def _old(before: datetime) -> dict[str, object]:
    return {"state": {"type": {"any_": list(ENDED)}}, "end_time": {"before_": before.isoformat()}}


@probe
def count_old_events(server: PrefectServer, before: datetime) -> int:
    """Events from before a moment, which Prefect's own vacuum deletes.

    Raises:
        Unreachable: nobody answers.
        OpsError: the password is refused, or an answer is an error.
    """
    wanted = {
        "filter": {"occurred": {"since": datetime(2020, 1, 1, tzinfo=UTC).isoformat(), "until": before.isoformat()}},
        "limit": 1,
    }
    with _client(server) as client:
        return int(_ask(client, "POST", "/events/filter", wanted)["total"])


def missing_in(rows: Mapping[str, int], answer: PrefectAnswer) -> list[str]:
    """What the API knows fewer of than there are rows (per table), as sentences."""
    return [
        f"{answer.counts[what]} of {rows[table]} {what}"
        for what, table in TABLES.items()
        if answer.counts[what] < rows[table]
    ]


def _client(server: PrefectServer) -> httpx.Client:
    return httpx.Client(base_url=server.api_url, auth=server.login(), timeout=ANSWER_SECONDS, trust_env=False)


def _ask(client: httpx.Client, method: str, path: str, body: object = None) -> Any:
    try:
        answer = client.request(method, path, json=body)
    except httpx.HTTPError as error:
        raise Unreachable(f"Prefect's API at {client.base_url} does not answer: {type(error).__name__}") from None
    if answer.status_code == httpx.codes.UNAUTHORIZED:
        raise OpsError(f"Prefect's API at {client.base_url} refuses the password", "correct [prefect_server] auth_env")
    if answer.is_error:
        raise OpsError(f"Prefect's API answers {answer.status_code} to {path}", "read its log")
    return answer.json() if answer.content else None
