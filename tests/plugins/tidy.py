"""What a file of tests leaves in the session's lab: nothing that another file's tests would meet (a plugin).

The lab is described in sentences (each database, table, setting, service, file …) when it is new, and again after the
last test of every file that used it, where `OPS_TEST_TIDY` is set: what it tells is a fault of order, which no one run
shows. What flows leave on purpose is in none of them: backups, reports, databases and directories that were kept aside,
rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import httpx
import psycopg
import pytest
import redis
from pydantic import TypeAdapter

from lab import lifecycle
from lab.client import Lab
from lab.servers import postgres
from lab.servers.replication import RECEIVER, STANDBY
from lab.servers.services import NAMES, LabServices
from lab.servers.valkey import MASTER
from lab.state.environment import api_url
from runbook.errors import OpsError, Unreachable
from runbook.guard.containment import Contained
from runbook.wait import until
from tasks.releases.release import RELEASE

SWITCH = "OPS_TEST_TIDY"
SETTLING_SECONDS = 300
REDIS_DATABASES = 16
# A backup's, a restore's or a failover's: named in its report, and away with `discard-superseded`.
_KEPT_ASIDE = re.compile(r"(__old_|\.superseded_)\d{8}|\.diverged_")
# Where the reports are: the chain, what a frequent check counts, locks that nobody holds (their text is looked at).
_REPORTS_OWN = (".chain-", ".same-", ".lock-")
# Written anew by the servers themselves at every start and failover.
_REWRITTEN = re.compile(r"valkey(-replica)?\.conf|sentinel-\d\.conf")
# Of a node that was a standby once; what it is now is told by `standby.signal`.
_OF_A_ROLE = "('primary_conninfo', 'primary_slot_name')"

_CLUSTER = f"""
SELECT 'database ' || datname FROM pg_database
UNION ALL SELECT 'role ' || rolname FROM pg_roles
UNION ALL SELECT 'tablespace ' || spcname FROM pg_tablespace
UNION ALL SELECT 'replication slot ' || slot_name FROM pg_replication_slots
UNION ALL SELECT application_name || ' streams' FROM pg_stat_replication WHERE state = 'streaming'
UNION ALL SELECT 'setting of a role or database ' || setconfig::text FROM pg_db_role_setting
UNION ALL SELECT 'ALTER SYSTEM SET ' || name || ' = ' || coalesce(setting, '') FROM pg_file_settings
    WHERE sourcefile LIKE '%auto.conf' AND name NOT IN {_OF_A_ROLE}
UNION ALL SELECT 'a password is in ' || sourcefile FROM pg_file_settings
    WHERE name = 'primary_conninfo' AND setting ~ '\\mpassword\\M'
UNION ALL SELECT 'prepared transaction ' || gid FROM pg_prepared_xacts
"""
_DATABASE = """
SELECT format('in grc_db: %s.%s (%s)', nspname, relname, relkind)
    FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace
    WHERE nspname !~ '^(pg_|information_schema)' AND relpersistence <> 't'
UNION ALL SELECT 'in grc_db: extension ' || extname FROM pg_extension
UNION ALL SELECT 'in grc_db: revision ' || version_num FROM alembic_version
"""


def _of_postgres(lab: LabServices) -> Iterator[str]:
    primary, _ = lab.nodes
    yield f"the primary is {primary.program}"
    for question, database in ((_CLUSTER, "postgres"), (_DATABASE, "grc_db")):
        with psycopg.connect(postgres.admin_dsn(lab.state, primary.port, database), connect_timeout=20) as connection:
            yield from (told for (told,) in connection.execute(question.encode()))


def _of_services(lab: LabServices) -> Iterator[str]:
    for name, service in lab.supervisor.services().items():
        yield f"{name} is {service.state}"
    second = lifecycle.second_region(lab)
    for name, service in second.supervisor.services().items():
        yield f"{name} of the second region is {service.state}"


def _of_redis(lab: LabServices) -> Iterator[str]:
    for port in (lab.state.ports.redis, lab.state.ports.redis_replica):
        with _client(lab, port) as client:
            name = "Redis" if port == lab.state.ports.redis else "its replica"
            yield f"{name} is a {client.role()[0]!r}"
            yield f"clients of {name} are paused: {client.info('clients').get('paused_reason', 'none')}"
            yield from (f"{name} knows the user {user}" for user in client.acl_users())
            settings = client.config_get("*").items()
            yield from (f"{name} has {key} = {value}" for key, value in settings if not re.search("pass|auth", key))
    for database in range(REDIS_DATABASES):
        with _client(lab, lab.state.ports.redis, database) as client:
            prefixes = {re.split(b"[:0-9]", key)[0].decode(errors="replace") for key in client.scan_iter(count=5000)}
            yield from (f"Redis has keys {prefix}… in database {database}" for prefix in prefixes)
    for number, port in enumerate(lab.state.ports.sentinels, 1):
        with redis.Redis(port=port, socket_timeout=20) as client:
            told = client.sentinel_master(MASTER)
            names = ("ip", "port", "quorum", "down-after-milliseconds", "failover-timeout", "num-slaves")
            yield f"Sentinel {number} says {[told[name] for name in names]}"


def _client(lab: LabServices, port: int, database: int = 0) -> redis.Redis:
    return redis.Redis(port=port, db=database, password=lab.state.passwords.redis, socket_timeout=20)


def _of_files(lab: LabServices) -> Iterator[str]:
    second = lifecycle.second_region(lab)
    for layout in (lab.layout, second.layout):
        live = (layout.postgres_data, layout.standby_data, layout.redis_data, layout.replica_data, layout.application)
        for directory in {layout.root, layout.store("wal").parent, *(path.parent for path in live)}:
            yield from (f"{path} is there" for path in directory.glob("*") if not path.name.endswith(".pid"))
        for path in (*layout.application.rglob("*"), *layout.etc.rglob("*"), layout.endpoint):
            if path.is_file() and path.suffix != ".pyc" and not _REWRITTEN.fullmatch(path.name):
                content = path.read_bytes()
                if path.name == RELEASE:  # by whatever name it was deployed
                    content = content.split()[-1]
                yield f"{path} has the content {hashlib.sha256(content).hexdigest()[:12]}"
        for path in layout.reports.glob(".*"):
            if not path.name.startswith(_REPORTS_OWN) or (path.name.startswith(".lock-") and path.read_text()):
                yield f"{path} is there, or is not empty"


def _of_providers(lab: LabServices) -> Iterator[str]:
    answer = httpx.get(f"http://127.0.0.1:{lab.state.ports.ai_providers}/health", timeout=20, trust_env=False)
    for name, state in answer.raise_for_status().json()["providers"].items():
        yield f"AI provider {name} is {state}"


def _of_prefect(lab: LabServices) -> Iterator[str]:
    name, (_, control) = lab.layout.name, lifecycle.existing(lab.layout.name)
    with httpx.Client(base_url=api_url(control.state), auth=control.state.login, timeout=20, trust_env=False) as client:
        limit = client.get(f"/v2/concurrency_limits/env-{name}")
        if limit.is_success:
            yield f"{limit.json()['active_slots']} runs hold the lock of {name}"
        contained = client.get(f"/variables/name/env-{name}-contained")
        if contained.is_success and not TypeAdapter(Contained).validate_json(contained.json()["value"]).released:
            yield f"{name} is contained"


_PARTS: tuple[Callable[[LabServices], Iterable[str]], ...] = (
    *(_of_services, _of_postgres, _of_redis, _of_files, _of_providers, _of_prefect),
)
_ERRORS = (OpsError, OSError, psycopg.OperationalError, redis.RedisError, httpx.HTTPError)


def describe(lab: Lab) -> frozenset[str]:
    """The lab now, in sentences; of what does not answer, that it does not."""
    services, _ = lifecycle.existing(lab.name)
    found: set[str] = set()
    for part in _PARTS:
        try:
            found.update(part(services))
        except _ERRORS as error:
            found.add(f"{part.__name__.strip('_')} cannot be told: {error}")
    return frozenset(told for told in found if not _KEPT_ASIDE.search(told))


@dataclass
class Tidy:
    """The lab as it is to be left by every file of tests, and whether one has used it since it was looked at."""

    lab: Lab
    wanted: frozenset[str]
    used: bool = True

    @classmethod
    def settled(cls, lab: Lab) -> Tidy:
        """A new lab as it is when all that starts with it has started."""
        told = until(lambda: _all_well(describe(lab)), what="that all of the lab runs", seconds=SETTLING_SECONDS)
        return cls(lab, told)

    def require(self, who: str) -> None:
        """Raises AssertionError when there is something else, or less, once everything has settled."""
        self.used = False
        with contextlib.suppress(Unreachable):
            until(lambda: not self._left(), what="order", seconds=SETTLING_SECONDS, every_seconds=0.5)
            return
        left = "\n".join(self._left())
        self.wanted = describe(self.lab)  # the files that come after this one did not leave it
        assert not left, f"{who} left the lab with this (+) and without that (-):\n{left}"

    def _left(self) -> list[str]:
        found = describe(self.lab)
        # What expires, and what a restore drops (the cache), may be gone.
        gone = [told for told in self.wanted - found if not told.startswith("Redis has keys")]
        return sorted([*(f"+ {told}" for told in found - self.wanted), *(f"- {told}" for told in gone)])


def _all_well(told: frozenset[str]) -> frozenset[str]:
    """The sentences, if they are of a lab of which everything runs; else none."""
    states = [one for one in told if " is RUNNING" in one]
    waited = (f"{name} streams" in told for name in (STANDBY, RECEIVER))
    well = len(states) == len(NAMES) and all(waited) and not any("cannot be told" in one for one in told)
    return told if well else frozenset()


_current: list[Tidy] = []


@contextlib.contextmanager
def tidy(lab: Lab) -> Iterator[None]:
    """While the block runs, every file of tests that uses the lab is asked to leave it as it was; the last one at the
    block's end."""
    if not os.environ.get(SWITCH):
        yield
        return
    _current.append(Tidy.settled(lab))
    try:
        yield
        if _current[0].used:
            _current[0].require("the last file of tests")
    finally:
        _current.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the last test of a file that used the lab."""
    yield
    for kept in _current:
        kept.used = kept.used or "lab" in getattr(item, "fixturenames", ())
        if kept.used and (nextitem is None or nextitem.path != item.path):
            kept.require(item.path.name)
