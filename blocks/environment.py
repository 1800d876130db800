"""One environment: everything that a flow needs to know of a system, loaded by name."""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, cast
from zoneinfo import ZoneInfo, available_timezones

from prefect.blocks.core import Block
from prefect.context import FlowRunContext
from pydantic import Field, PrivateAttr, field_validator

from blocks.ai_providers import AIProviders
from blocks.cloud import Cloud
from blocks.docker import Docker
from blocks.exclusion import Cluster, Directory, Exclusion, LockedPart, keyspaces
from blocks.hosts import is_here
from blocks.monitoring import Monitoring
from blocks.people.alerts import COLUMNS, Alerts
from blocks.people.approval import Approval
from blocks.places import Application, Backups, Certificates, Endpoint, Logs
from blocks.postgres.nodes import primary_first
from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from blocks.prefect_server import PrefectServer
from blocks.redis.server import Redis
from blocks.services.service import Services
from runbook.errors import OpsError
from runbook.guard.brief import asked_briefly
from runbook.language.say import Language
from runbook.metrics import default_limits

Stores = Literal["backups", "copies"]
Tier = Literal["production", "staging", "development"]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]
# Stopping is §8.2's order. Starting is by dependency: data before what reads it.
STOP_ORDER = ("backend", "frontend", "redis")
START_ORDER = ("postgres", "redis", "backend", "frontend")
_NOBODY: Mapping[str, Environment] = MappingProxyType({})
CHECKOUT = Path(__file__).resolve().parents[1]
_stand_ins: ContextVar[Mapping[str, Environment]] = ContextVar("stand_ins", default=_NOBODY)


@functools.cache
def _zones() -> frozenset[str]:
    """All names; reading them takes as long as the rest of an environment."""
    return frozenset(available_timezones())


class Environment(Block):
    """Composes the blocks of one system. They are referred to by slug (`type/name`): a nested block that is edited in
    the Prefect UI loses its reference and its password."""

    _block_type_name = "Ops environment"
    _block_type_slug = "ops-environment"
    _parts: dict[str, Block] = PrivateAttr(default_factory=dict)
    _ranked: list[Postgres] = PrivateAttr(default_factory=list)

    name: str
    title: str = Field(default="", description="for people, e.g. Production")
    tier: Tier = "development"
    timezone: str = "Asia/Tokyo"
    language: Language = Field(default="en", description="of reports and forms: en or ja")
    disposable: bool = Field(default=False, description="faults and drills refuse anything else")
    drill_environment: str = Field(default="", description="the disposable environment for drills and load, if another")
    drills: str = Field(default="", description="directory of declared drills, from the checkout's root or absolute")
    pools: dict[str, str] = Field(default={}, description="chapter → work pool of the host that runs it, if another")
    shares: list[str] = Field(default=[], description="environments that describe the same servers or directories")
    unattended: list[str] = Field(default=[], description="runbooks that may run without a person's confirm")
    unattended_share: float = Field(
        default=0.5, ge=0.01, le=1, description="the largest share of backups, logs … that one unattended run deletes"
    )
    reports: str = Field(default="/var/lib/interview-ops/reports")
    rpo_seconds: float = Field(gt=0)
    rto_seconds: float = Field(gt=0)
    thresholds: dict[str, Pair] = Field(default={}, description="metric → [warn above, critical above]")
    expectations: str = Field(default="", description="directory of the suites, from the checkout's root or absolute")
    slugs: dict[str, str] = Field(default={}, description="part → type/name of its block")
    reviewed: str = Field(default="", description="SHA-256 of the TOML that this was registered from")

    @field_validator("timezone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        if name not in _zones():
            raise ValueError(f"{name} is no time zone; one is Asia/Tokyo")
        return name

    @field_validator("thresholds")
    @classmethod
    def _known_metrics(cls, thresholds: dict[str, Pair]) -> dict[str, Pair]:
        """A misspelt metric would leave the default in force."""
        known = sorted(default_limits(1))
        for name, (warn, critical) in thresholds.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(
                    f"{name} is not a metric"
                    + (f" (did you mean {near[0]}?)" if near else f"; one of {', '.join(known)}")
                )
            if warn > critical:
                raise ValueError(f"{name} = [{warn:g}, {critical:g}] warns above its critical limit")
        return thresholds

    @classmethod
    def find(cls, name: str) -> Environment:
        """Load an environment: its block inside a flow run, its TOML outside (Prefect may be down).

        Raises:
            OpsError: there is none of that name, or its TOML is wrong.
        """
        from blocks.config import toml  # it builds environments, so it imports this module

        toml.check_name(name)
        if stand_in := _stand_ins.get().get(name):
            return stand_in
        if FlowRunContext.get() is None:
            return toml.environment(name)
        try:
            found = cast(Environment, cls.load(name))
        except ValueError:
            raise toml.unknown(name) from None
        return found.model_copy(update=toml.reviewed(found))

    @property
    def reports_directory(self) -> Path:
        """Where JSON reports and the lock file are kept."""
        return Path(self.reports)

    @property
    def limits(self) -> Mapping[str, tuple[float, float]]:
        """The limits of every metric: [thresholds], and the defaults of those that it does not set."""
        own = {metric: (pair[0], pair[1]) for metric, pair in self.thresholds.items()}
        return {**default_limits(self.rpo_seconds), **own}

    @property
    def suites(self) -> Path | None:
        """The directory of its great-expectations suites; None where it has none (`[expectations] directory`)."""
        return CHECKOUT / self.expectations if self.expectations else None

    @property
    def zone(self) -> ZoneInfo:
        """The operators' time zone: backups are named in it."""
        return ZoneInfo(self.timezone)

    def nodes(self) -> list[Postgres]:
        """`[postgres]` and, where it is named, `[standby]`. Which of them is the primary stands in no block."""
        return [cast(Postgres, self._part(part)) for part in ("postgres", "standby") if self.has(part)]

    @property
    def postgres(self) -> Postgres:
        """The primary: the only database server; of two the one that is not in recovery now. They are asked once
        (2 s each at most) and then not again before `forget_roles`; who is chosen in doubt: blocks.postgres.nodes."""
        return self._primary_first()[0] if self.has("standby") else cast(Postgres, self._part("postgres"))

    @property
    def standby(self) -> Postgres:
        """The node that is not the primary, where there are two (`has("standby")`)."""
        return self._primary_first()[1] if self.has("standby") else cast(Postgres, self._part("standby"))

    def forget_roles(self) -> None:
        """A failover changed them: the nodes are asked again."""
        self._ranked = []

    def _primary_first(self) -> list[Postgres]:
        if not self._ranked:
            self._ranked = primary_first(self.nodes())
        return self._ranked

    @property
    def wal(self) -> Wal:
        """How WAL is received and archived, where it is (`has("wal")`)."""
        return cast(Wal, self._part("wal"))

    @property
    def redis(self) -> Redis:
        """The Redis or Valkey server."""
        return cast(Redis, self._part("redis"))

    @property
    def services(self) -> Services:
        """The service manager."""
        return cast(Services, self._part("services"))

    @property
    def backups(self) -> Backups:
        """The backup stores."""
        return cast(Backups, self._part("backups"))

    def stores(self, which: Stores) -> Backups:
        """The first or the second set of backup stores."""
        return cast(Backups, self._part(which))

    @property
    def application(self) -> Application:
        """The application; without `[application]` one that offers nothing."""
        return cast(Application, self._part("application")) if self.has("application") else Application()

    @property
    def endpoint(self) -> Endpoint:
        """Where users are sent, where there is more than one region (`has("endpoint")`)."""
        return cast(Endpoint, self._part("endpoint"))

    @property
    def logs(self) -> Logs:
        """The application's logs."""
        return cast(Logs, self._part("logs"))

    @property
    def ai_providers(self) -> AIProviders:
        """The AI providers (`has("ai_providers")`)."""
        return cast(AIProviders, self._part("ai_providers"))

    @property
    def certificates(self) -> Certificates:
        """The certificates."""
        return cast(Certificates, self._part("certificates"))

    @property
    def docker(self) -> Docker:
        """The Docker Engine, and the application's containers (`has("docker")`)."""
        return cast(Docker, self._part("docker"))

    @property
    def cloud(self) -> Cloud:
        """The account at a cloud provider (`has("cloud")`)."""
        return cast(Cloud, self._part("cloud"))

    @property
    def alerts(self) -> Alerts:
        """Whom to tell, and how (`has("alerts")`)."""
        return cast(Alerts, self._part("alerts"))

    @property
    def prefect_server(self) -> PrefectServer:
        """Prefect's own database and services (`has("prefect_server")`)."""
        return cast(PrefectServer, self._part("prefect_server"))

    @property
    def monitoring(self) -> Monitoring:
        """How metrics are served, and who measures other hosts (`has("monitoring")`)."""
        return cast(Monitoring, self._part("monitoring"))

    @property
    def approval(self) -> Approval:
        """Who approves which runbooks (`has("approval")`)."""
        return cast(Approval, self._part("approval"))

    def exclusion(self, runbook: str) -> Exclusion:
        """The locks of its servers and of the directories of this host that it describes, not taken yet."""
        run, nodes = f"interview-ops {self.name}: {runbook}", self.nodes()
        found: list[LockedPart] = [Cluster(node, run) for node in nodes]
        directories = [node.data_directory for node in nodes if is_here(node.host)]
        if self.has("redis"):
            found += keyspaces(self.redis, run)
            directories += [self.redis.data_directory] if is_here(self.redis.host) and not self.redis.remote else []
        directories.append(self.application.directory)
        self._load_the_rest()
        places = {os.path.realpath(path): path for path in directories if path}  # a link leads to another one, perhaps
        return Exclusion([*found, *(Directory(path, run) for path in places.values())])

    def _load_the_rest(self) -> None:
        """A run that is permitted its acts does not have to query Prefect in the middle of an outage."""
        for part in self.slugs:
            with contextlib.suppress(Exception), asked_briefly():  # whoever needs it is told then
                self._part(part)

    def approval_of(self, runbook: str) -> Approval | None:
        """Who must approve a runbook (its name, `full-restore`); None: nobody."""
        return self.approval if self.has("approval") and runbook in self.approval.required else None

    def whom_to_call(self, owners: Collection[str]) -> Sequence[Sequence[str]]:
        """Names of columns, then contacts and vendors, the owners' own first; empty where [alerts] is missing."""
        if not self.has("alerts"):
            return []
        with asked_briefly():  # Prefect may be what is down
            return [COLUMNS, *self.alerts.rows(owners)]

    def with_parts(self, parts: Mapping[str, Block]) -> Environment:
        """This environment with its parts at hand, so that none is loaded from Prefect."""
        self._parts = dict(parts)
        return self

    def parts(self) -> Mapping[str, Block]:
        """The parts at hand."""
        return self._parts

    def whole(self) -> Mapping[str, Block]:
        """All parts that it names, loaded."""
        return {part: self._part(part) for part in self.slugs}

    def derived(self, replaced: Mapping[str, Block], *, without: Sequence[str] = (), reports: Path) -> Environment:
        """One of the same name, in memory only: with other blocks, without some, with reports elsewhere."""
        slugs = {part: slug for part, slug in self.slugs.items() if part not in without}
        parts = {part: self._part(part) for part in slugs} | dict(replaced)
        copy = self.model_copy(update={"slugs": slugs, "reports": str(reports)})
        copy._ranked = []
        return copy.with_parts(parts)

    def of_prefect(self) -> Environment:
        """The same with Prefect's own database in the place of the application's, so that every step of a backup or a
        restore of a database works on it. It is one server, and its WAL is none of ours."""
        return self.derived(
            {"postgres": self.prefect_server}, without=("standby", "wal"), reports=self.reports_directory
        )

    @contextlib.contextmanager
    def stands_in(self) -> Iterator[None]:
        """`find` gives this one in the place of the registered one while the block runs: how a drill has a runbook
        judge a sabotaged copy."""
        token = _stand_ins.set({**_stand_ins.get(), self.name: self})
        try:
            yield
        finally:
            _stand_ins.reset(token)

    def has(self, part: str) -> bool:
        """Whether the environment has a part (`redis`), a field of a part that is not empty (`application.repository`),
        a service (`services.backend`), or a setting of its own that is not empty (`disposable`)."""
        name, _, field = part.partition(".")
        if name not in self.slugs:
            return not field and name in Environment.model_fields and bool(getattr(self, name))
        if not field:
            return True
        block = self._part(name)
        return field in block.names if isinstance(block, Services) else bool(getattr(block, field))

    def services_in(self, order: Sequence[str]) -> list[str]:
        """The roles of an order that this environment has."""
        return [role for role in order if role in self.services.names]

    def _part(self, part: str) -> Block:
        if part not in self._parts:
            if part not in self.slugs:
                raise OpsError(f"environment {self.name} names no {part}", f"add [{part}] to its TOML and register it")
            self._parts[part] = cast(Block, Block.load(self.slugs[part]))
        return self._parts[part]
