"""Directories and addresses: backup stores, the application, its logs, its certificates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from blocks.http_step import TEXT, HttpQuestion, HttpStep, HttpWrites, LoadStep, unknown_name
from blocks.s3 import Bucket, bucket_and_prefix
from blocks.tls import TlsServer, certificate_names
from runbook.errors import OpsError

# What lines of the logs may have: §6.1 and §6.4, access lines, AI calls (§5.2).
LOG_FIELDS = (
    "timestamp",
    "level",
    "logger",
    "message",
    "module",
    "function",
    "line",
    "user_id",
    "action",
    "resource",
    "result",
    "ip_address",
    "user_agent",
    "method",
    "path",
    "status",
    "duration_ms",
    "provider",
    "model",
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "error",
    "exception",
)


def _needed(section: str, key: str, value: str) -> str:
    if not value:
        raise OpsError(f"[{section}] {key} is not configured", f"add {key} under [{section}] and register it")
    return value


class Keep(BaseModel):
    """Tiered retention of one set of stores: every backup of the last `hours`; then the newest of each day, of each ISO
    week and of each month, for so many of each. `verified`: so many of the newest verified backups stay whatever their
    age, and none is deleted before there are that many."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    hours: int = Field(default=48, ge=1, le=87600)
    daily: int = Field(default=30, ge=0, le=3650)
    weekly: int = Field(default=8, ge=0, le=520)
    monthly: int = Field(default=12, ge=0, le=240)
    verified: int = Field(default=3, ge=1, le=1000)


class KeepSuperseded(BaseModel):
    """Retention of what restores replaced: everything of the last `hours`, so that each restore can be undone for so
    long, and the `newest` of each kind whatever their age."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    newest: int = Field(default=1, ge=0, le=20)
    hours: int = Field(default=168, ge=0, le=87600)


class Backups(Block):
    """A place for each resource's backups: a directory of this host, or `s3://bucket/prefix`. An environment has one
    such set (`[backups]`) and may have a second elsewhere (`[copies]`), which replicate-backups fills."""

    _block_type_name = "Ops backups"
    _block_type_slug = "ops-backups"

    postgres: str = Field(default="/var/backups/postgresql")
    redis: str = Field(default="/var/backups/redis")
    files: str = Field(default="/var/backups/app")
    cluster: str = Field(default="/var/backups/cluster", description="base backups of the whole PostgreSQL cluster")
    wal: str = Field(default="/var/backups/wal", description="archived WAL segments")
    prefect: str = Field(default="", description="of Prefect's own database, always encrypted; empty: none is taken")
    spool: str = Field(default="/var/lib/interview-ops/spool", description="where those of a bucket are made and read")
    survives: Literal["", "server"] = Field(
        default="", description="server: its directories are another machine's (mounts), and outlive this host"
    )
    recipients: list[str] = Field(default=[], description="age1…: backups are encrypted to them; one is escrowed")
    identity: SecretStr = Field(default=SecretStr(""), description="AGE-SECRET-KEY-1…: reads encrypted backups")
    endpoint: str = Field(default="", description="of the S3 service; empty: AWS")
    region: str = ""
    profile: str = Field(default="", description="of the AWS configuration")
    access_key: str = Field(default="", description="empty: AWS's own chain of credentials")
    secret_key: SecretStr = SecretStr("")
    sse: Literal["", "AES256", "aws:kms"] = ""
    kms_key: str = ""
    lock_mode: Literal["", "GOVERNANCE", "COMPLIANCE"] = Field(default="", description="object lock of the backups")
    lock_days: int = Field(default=0, ge=0, description="for how long nobody can delete them")
    keep: Keep = Field(default=Keep(), description="tiered retention: what prune-backups keeps")
    keep_superseded: KeepSuperseded = Field(
        default=KeepSuperseded(), description="[backups] only: what discard-superseded keeps of what restores replaced"
    )
    patience_seconds: float = Field(default=120.0, gt=0, description="how long a request is tried again")

    def bucket(self, place: str) -> Bucket:
        """The bucket of a place `s3://bucket/prefix`.

        Raises:
            OpsError: it is no such address.
        """
        bucket, prefix = bucket_and_prefix(place)
        return Bucket(
            bucket=bucket,
            prefix=prefix,
            endpoint=self.endpoint,
            region=self.region,
            profile=self.profile,
            access_key=self.access_key,
            secret_key=self.secret_key,
            sse=self.sse,
            kms_key=self.kms_key,
            lock_mode=self.lock_mode,
            lock_days=self.lock_days,
            patience_seconds=self.patience_seconds,
        )


class Corruption(BaseModel):
    """A bug for the drill of data corruption: one transaction that sets columns of every row of a table."""

    model_config = ConfigDict(extra="forbid")

    table: str = Field(description="schema.table or table")
    time: str = Field(description="the column with the time of a row: older rows must be restored unchanged")
    set: dict[str, str | int | float | bool] = Field(description="column → value that breaks an expectation")

    @property
    def names(self) -> tuple[str, str]:
        """Schema and table."""
        schema, _, table = self.table.rpartition(".")
        return schema or "public", table


class Application(Block):
    """The application, by what it offers. Every key is optional: an empty one is absent, and what needs it reports “not
    configured” (docs/application.md)."""

    _block_type_name = "Ops application"
    _block_type_slug = "ops-application"

    url: str = Field(default="", description="of the backend")
    frontend_url: str = ""
    health_path: str | list[str] = Field(default="", description="below url; healthy when each answers health_status")
    frontend_health_path: str | list[str] = Field(default="", description="below frontend_url")
    health_port: int = Field(default=0, ge=0, le=65535, description="healthy when it takes connections, on url's host")
    health_command: list[str] = Field(default=[], description="healthy when it exits with 0")
    health_status: list[int] = Field(default=[200], description="accepted statuses of health_path")
    smoke: list[HttpStep] = Field(default=[], description="requests that prove that the application works")
    smoke_command: list[str] = Field(default=[], description="a program that proves it, by its exit status 0")
    smoke_seconds: float = Field(default=120.0, gt=0, description="deadline of smoke_command")
    writes: HttpWrites = Field(default=HttpWrites(), description="what the client of a drill writes")
    load_test: list[LoadStep] = Field(default=[], description="what the users of a load test do")
    corruption: Corruption | None = Field(default=None, description="for the drill of data corruption")
    ai: HttpQuestion = Field(default=HttpQuestion(), description="a user's question to the AI")
    user: str = Field(default="", description="{user} in the requests above")
    password: SecretStr = Field(default=SecretStr(""), description="{password} in them")
    secrets: SecretDict = Field(default=SecretDict({}), description="more secrets: name → {name} in them")
    directory: str = Field(default="", description="its files; empty: a full restore leaves them alone")
    backend_directory: str = Field(default="", description="where alembic.ini is")
    python: str = Field(default="", description="the Python that runs the backend")
    migrate_command: list[str] = Field(
        default=[], description="another tool's migrations instead of Alembic's; it gets DATABASE_URL and PGDATABASE"
    )
    repository: str = Field(default="", description="the git checkout that backend and web application are in")
    backend_source: str = Field(default="", description="the backend in it, where it does not run from there")
    web_directory: str = Field(default="", description="where pnpm-workspace.yaml is; empty: there is none")
    requirements: list[str] = Field(default=["requirements.txt"], description="pip's files, in the backend")
    requirements_lock: str = Field(default="", description="the lock file made from them; empty: there is none")
    lock_command: list[str] = Field(default=[], description="what makes that, run in the backend")
    start_command: list[str] = Field(
        default=[], description="starts it in the foreground, for diagnose-application; run in backend_directory"
    )
    start_variables: dict[str, str] = Field(
        default={}, description="variables that replace the application's for such a start, for example where it logs"
    )
    inherit: list[str] = Field(
        default=[], description="variables of the worker that these commands and tests may read; patterns too: TEST_*"
    )
    test_command: list[str] = Field(default=[], description="the backend's tests, run in the backend")
    web_test_command: list[str] = Field(default=["pnpm", "test"], description="run in web_directory")
    web_build_command: list[str] = Field(default=["pnpm", "build"], description="run in web_directory")
    release: list[str] = Field(
        default=[], description="what of the repository deploy-application unpacks, to the same places in directory"
    )
    images: list[str] = Field(default=[], description="the images that run, as the scanner of images is asked for them")
    advisories: str = Field(default="https://api.osv.dev", description="the OSV server that pip-audit asks")
    env_file: str = Field(default="", description="backend/.env, in which a failover changes the connection string")
    dsn_variable: str = Field(default="DATABASE_URL", description="the connection string's name in it")
    migrations: Literal["", "alembic", "none"] = Field(
        default="", description="what migrates the schema; empty: alembic where backend_directory has an alembic.ini"
    )

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        known = list(self.secrets.get_secret_value())
        question = [one for one in (self.ai.ask, self.ai.stored) if one]
        for key, steps, more in (
            ("smoke", self.smoke, []),
            ("writes", [*self.writes.login, *self.writes.steps], [TEXT]),
            ("load_test", self.load_test, [TEXT]),
            ("ai", [*self.ai.before, *question], [TEXT]),
        ):
            if unknown := unknown_name(steps, [*known, *more]):
                raise ValueError(f"{key}: {unknown}")
        if (self.smoke or self.writes.steps or self.load_test or self.ai.ask) and not self.url:
            raise ValueError("url is missing: smoke, writes, load_test and ai are requests to it")
        if (self.health_path and not self.url) or (self.frontend_health_path and not self.frontend_url):
            raise ValueError("health_path needs url, and frontend_health_path needs frontend_url")
        return self

    @property
    def uses_alembic(self) -> bool:
        """Whether Alembic migrates the database's schema."""
        if self.migrate_command:
            return False
        if self.migrations:
            return self.migrations == "alembic"
        return bool(self.backend_directory) and (Path(self.backend_directory) / "alembic.ini").is_file()

    @property
    def source(self) -> Path:
        """The backend in the repository."""
        return Path(self.backend_source or self.need("backend_directory"))

    def need(self, key: str) -> str:
        """A path that a runbook cannot do without.

        Raises:
            OpsError: it is not configured.
        """
        return _needed("application", key, str(getattr(self, key)))


class Endpoint(Block):
    """Where users are sent: the address of the region that serves, in a file that a proxy or DNS reads. Only a failover
    of the region writes it; which region serves is read there, and stands in no block."""

    _block_type_name = "Ops endpoint"
    _block_type_slug = "ops-endpoint"

    file: str = Field(description="one line: the URL of the application that serves")
    region: str = Field(default="", description="what people call this environment's region")
    other: str = Field(default="", description="the environment that takes over when this region is lost")


class Logs(Block):
    """The application's JSON logs."""

    _block_type_name = "Ops logs"
    _block_type_slug = "ops-logs"

    app: str = Field(default="", description="JSON lines of the application")
    audit: str = Field(default="", description="JSON lines of its audit log")
    backup: str = Field(default="", description="what cron's backups print")
    rotation: str = Field(default="", description="logrotate's configuration for them")
    access_logger: str = Field(default="", description="the logger of request lines; empty: lines with status and time")
    access_message: str = Field(default="", description="the message of request lines; empty: any")
    not_data: list[str] = Field(default=[], description="paths whose POST changes no data, e.g. a log-in's")
    ai_message: str = Field(default="", description="the message of a line about an AI call; empty: there is none")
    fields: dict[str, str] = Field(default={}, description="field as the manual calls it (§6.1) → as it is called here")

    @field_validator("fields")
    @classmethod
    def _known_fields(cls, fields: dict[str, str]) -> dict[str, str]:
        for ours, theirs in fields.items():
            if ours not in LOG_FIELDS:
                raise ValueError(f"{ours} is no field: one of {', '.join(LOG_FIELDS)}")
            if not re.fullmatch(r"[\w@.-]+", theirs):
                raise ValueError(f"{theirs} cannot be a field's name: letters, digits and _ @ . -")
        return fields

    def field(self, name: str) -> str:
        """How this application calls a field."""
        return self.fields.get(name, name)

    def need(self, key: str) -> str:
        """A log that a runbook cannot do without.

        Raises:
            OpsError: it is not configured.
        """
        return _needed("logs", key, str(getattr(self, key)))


class Certificates(Block):
    """The certificates that the web server and others serve, and how certbot renews them."""

    _block_type_name = "Ops certificates"
    _block_type_slug = "ops-certificates"

    domains: list[str] = Field(
        default=[], description="one certificate each: its names, separated by spaces; the first is its directory's"
    )
    directory: str = Field(default="/etc/letsencrypt/live", description="<directory>/<domain>/fullchain.pem")
    served: list[str] = Field(
        default=[],
        description="where they are served: host:443, name@address:443, smtp://host:25, postgres://host:5432",
    )
    authorities: str = Field(default="", description="a file of CAs that are trusted in addition to the system's")
    web_server: str = Field(default="nginx", description="the unit to reload after a renewal")
    reload: list[str] = Field(default=[], description="what reloads it; empty: systemctl reload <web_server>")
    challenge: Literal["webroot", "dns-01", "standalone"] = Field(
        default="webroot", description="how the authority is shown that the names are ours; wildcards need dns-01"
    )
    webroot: str = Field(default="/var/www/html", description="what it serves by HTTP: challenges are answered there")
    standalone_port: int = Field(default=80, ge=1, le=65535, description="certbot listens there for standalone")
    dns_plugin: list[str] = Field(
        default=[], description="certbot's options for dns-01, e.g. --dns-route53, or with a file of credentials"
    )
    dns_auth_hook: list[str] = Field(
        default=[], description="argv that adds the TXT record CERTBOT_VALIDATION and waits until it is served"
    )
    dns_cleanup_hook: list[str] = Field(default=[], description="argv that removes that record; empty: it stays")
    renew_command: list[str] = Field(
        default=[], description="argv run in certbot's place; writes fullchain.pem and privkey.pem of OPS_CERTIFICATE"
    )
    inherit: list[str] = Field(
        default=[], description="variables of the worker that certbot, its hooks or renew_command may read: AWS_*"
    )
    email: str = Field(default="", description="of the account at the authority; empty: none")
    acme_server: str = Field(default="", description="another authority than Let's Encrypt")
    acme_authorities: str = Field(default="", description="a file of authorities that vouch for that server's own TLS")
    certbot_directory: str = Field(default="", description="for certbot's work and logs; empty: its own in /var")

    @field_validator("domains")
    @classmethod
    def _known_names(cls, domains: list[str]) -> list[str]:
        for text in domains:
            certificate_names(text)
        return domains

    @field_validator("served")
    @classmethod
    def _known_servers(cls, served: list[str]) -> list[str]:
        for text in served:
            TlsServer.parse(text)
        return served

    @model_validator(mode="after")
    def _challenge_is_whole(self) -> Self:
        if bool(self.dns_plugin) + bool(self.dns_auth_hook) != (self.challenge == "dns-01"):
            raise ValueError("dns_plugin or dns_auth_hook: dns-01 needs exactly one of them, other challenges neither")
        if self.dns_plugin and not self.dns_plugin[0].startswith("--dns-"):
            raise ValueError(f"dns_plugin is “{self.dns_plugin[0]}”; expected is an option such as --dns-route53")
        return self

    def lineages(self) -> list[tuple[str, ...]]:
        """The names of each certificate."""
        return [certificate_names(text) for text in self.domains]

    def servers(self) -> list[TlsServer]:
        """Where they are served."""
        return [TlsServer.parse(text) for text in self.served]

    def reloading(self) -> list[str]:
        """The argv that has the web server read its certificates again."""
        return self.reload or ["systemctl", "reload", self.web_server]
