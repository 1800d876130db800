"""A Redis or Valkey server, its replicas and its Sentinels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import redis
from prefect.blocks.core import Block
from pydantic import Field, SecretStr, field_validator
from redis.backoff import NoBackoff
from redis.retry import Retry

from blocks.redis.refusals import meaning
from runbook.errors import OpsError

CONNECT_SECONDS = 5.0
SOCKET_SECONDS = 60.0


class Redis(Block):
    """Redis or Valkey: where it listens, its files, and what a restore does with each prefix.

    With Sentinels, host and port are those of the server whose files are on this host; which server is the master is
    found at run time (tasks.redis.sentinels), and the others are reached with the same credentials.
    """

    _block_type_name = "Ops Redis"
    _block_type_slug = "ops-redis"
    _description = "A Redis or Valkey server."

    host: str = Field(default="127.0.0.1")
    port: int = Field(default=6379, ge=1, le=65535)
    username: str = Field(default="", description="an ACL user; empty for the default user")
    password: SecretStr = SecretStr("")
    tls: bool = Field(default=False, description="rediss://: the server's certificate and host name are checked")
    tls_ca_file: str = Field(default="", description="empty: the system's own authorities")
    tls_certificate_file: str = Field(default="", description="this client's, where the server asks for it")
    tls_key_file: str = ""
    data_directory: str = Field(default="/var/lib/redis")
    config_file: str = Field(default="/etc/redis/redis.conf")
    server_program: str = Field(default="redis-server", description="also used for scratch servers that prove a backup")
    os_user: str = Field(default="redis", description="owner of the data directory; uid:gid of a container's")
    drop_prefixes: list[str] = Field(
        default=[], description="keys that a restore leaves out: made anew anyway, e.g. cache:"
    )
    protected_prefixes: list[str] = Field(
        default=[], description="keys that clear-cache deletes only where it names them, e.g. session:"
    )
    remote: bool = Field(
        default=False, description="its files cannot be reached from here: saved and restored by network"
    )
    replicas: list[str] = Field(default=[], description="host:port of replicas that no Sentinel knows")
    sentinels: list[str] = Field(default=[], description="host:port of each Sentinel")
    sentinel_master: str = Field(default="", description="the name under which they watch the master")
    sentinel_password: SecretStr = Field(default=SecretStr(""), description="the Sentinels' own, if any")

    @field_validator("protected_prefixes")
    @classmethod
    def _protecting(cls, prefixes: list[str]) -> list[str]:
        for prefix in prefixes:
            if not prefix or set(prefix) & set("*?["):
                raise ValueError(f"“{prefix}” protects nothing: write what keys begin with, as session: (a * as \\x2a)")
        return prefixes

    @property
    def address(self) -> str:
        """`host:port`."""
        return f"{self.host}:{self.port}"

    def at(self, address: str) -> Redis:
        """Another server of the same data set, at `host:port`: reached with the same credentials."""
        host, _, port = address.rpartition(":")
        return self.model_copy(update={"host": host.strip("[]"), "port": int(port)})

    def client(self, database: int = 0, answer_seconds: float | None = None) -> redis.Redis:
        """A client that returns bytes and waits so long for an answer (None: SOCKET_SECONDS), and no longer for a
        connection. Connects on first use."""
        return redis.Redis(
            host=self.host,
            port=self.port,
            db=database,
            username=self.username or None,
            password=self.password.get_secret_value() or None,
            **self._options() | self._limits(answer_seconds),
        )

    def sentinel(self, address: str, seconds: float = 0) -> redis.Redis:
        """A client of one Sentinel, at `host:port`, which waits so long for it (0: CONNECT_SECONDS)."""
        host, _, port = address.rpartition(":")
        return redis.Redis(
            host=host.strip("[]"),
            port=int(port),
            password=self.sentinel_password.get_secret_value() or None,
            **self._options() | self._limits(seconds or CONNECT_SECONDS),
        )

    def scratch(self, socket: Path, database: int = 0) -> redis.Redis:
        """A client of a scratch server on a Unix socket."""
        return redis.Redis(unix_socket_path=str(socket), db=database, socket_timeout=300)

    @staticmethod
    def _limits(answer_seconds: float | None) -> dict[str, float]:
        if not answer_seconds:
            return {}
        return {"socket_timeout": answer_seconds, "socket_connect_timeout": min(answer_seconds, CONNECT_SECONDS)}

    def _options(self) -> dict[str, Any]:
        secured = {
            "ssl": True,
            "ssl_ca_certs": self.tls_ca_file or None,
            "ssl_certfile": self.tls_certificate_file or None,
            "ssl_keyfile": self.tls_key_file or None,
            "ssl_check_hostname": True,
        }
        return {
            "socket_connect_timeout": CONNECT_SECONDS,
            "socket_timeout": SOCKET_SECONDS,
            "client_name": "interview-ops",
            "retry": Retry(NoBackoff(), 0),  # probes retry; a dead server must be said to be dead at once
            **(secured if self.tls else {}),
        }

    def refused(self, error: redis.RedisError) -> OpsError:
        """What a failed call means: Unreachable, or a refusal that no retry mends."""
        return meaning(self, error)
