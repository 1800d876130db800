"""A Redis or Valkey server."""

from __future__ import annotations

from pathlib import Path

import redis
from prefect.blocks.core import Block
from pydantic import Field, SecretStr
from redis.backoff import NoBackoff
from redis.retry import Retry

from runbook.errors import OpsError, Unreachable


class Redis(Block):
    """Redis or Valkey: where it listens, its files, and what a restore does with each prefix."""

    _block_type_name = "Ops Redis"
    _block_type_slug = "ops-redis"
    _description = "A Redis or Valkey server."

    host: str = Field(default="127.0.0.1")
    port: int = Field(default=6379, ge=1, le=65535)
    password: SecretStr = SecretStr("")
    data_directory: str = Field(default="/var/lib/redis")
    config_file: str = Field(default="/etc/redis/redis.conf")
    server_program: str = Field(default="redis-server", description="also used for scratch servers that prove a backup")
    os_user: str = Field(default="redis", description="owner of the data directory")
    drop_prefixes: list[str] = Field(default=["cache:"], description="keys that a restore leaves out: made anew anyway")
    sentinels: list[str] = Field(default=[], description="host:port of each Sentinel")
    sentinel_master: str = Field(default="")

    def client(self, database: int = 0) -> redis.Redis:
        """A client that returns bytes. Connects on first use."""
        return redis.Redis(
            host=self.host,
            port=self.port,
            db=database,
            password=self.password.get_secret_value() or None,
            socket_connect_timeout=5,
            socket_timeout=60,
            client_name="interview-ops",
            retry=Retry(NoBackoff(), 0),  # probes retry; a dead server must be said to be dead at once
        )

    def scratch(self, socket: Path, database: int = 0) -> redis.Redis:
        """A client of a scratch server on a Unix socket."""
        return redis.Redis(unix_socket_path=str(socket), db=database, socket_timeout=300)

    def refused(self, error: redis.RedisError) -> OpsError:
        """What a failed call means: Unreachable, or a refusal that no retry mends."""
        where = f"Redis at {self.host}:{self.port}"
        if isinstance(error, redis.exceptions.AuthenticationError | redis.exceptions.AuthorizationError):
            return OpsError(f"{where} refuses the password", "correct the secret and register the blocks again")
        if isinstance(error, redis.exceptions.NoPermissionError):
            return OpsError(f"{where} forbids a command to this user: {error}", "give the ACL user that command")
        if isinstance(error, redis.ConnectionError | redis.TimeoutError):
            return Unreachable(f"{where} does not answer", "start it, or look at its log")
        return OpsError(f"{where}: {error}")
