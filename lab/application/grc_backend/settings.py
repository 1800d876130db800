"""What the backend is told from outside: ``.env`` in the working directory, overridden by what this host says in the
file that ``GRC_ENV_FILE`` names (a release comes with the ``.env`` of another host), and by the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dotenv import dotenv_values


class InvalidSettings(Exception):
    """A key is missing or its value cannot be used; the text names the keys, never their values."""


def read_environment(directory: Path | None = None) -> dict[str, str]:
    """Return the keys of ``.env`` in `directory` (default: the working directory), overridden by the host's own and by
    the environment.

    Values are taken literally: a ``$`` in a password is not an interpolation.
    """
    files = ((directory or Path.cwd()) / ".env", Path(os.environ.get("GRC_ENV_FILE") or os.devnull))
    written: dict[str, str | None] = {}
    for path in files:
        written |= dotenv_values(path, interpolate=False, encoding="utf-8") if path.is_file() else {}
    return {key: value for key, value in {**written, **os.environ}.items() if value is not None}


AI_PROVIDERS = ("azure", "bedrock", "vertex")


@dataclass(frozen=True)
class Settings:
    """The backend's settings; the ``database_*`` keys are those of manual §1.5 (durations in seconds)."""

    host: str
    port: int
    database_url: str = field(repr=False)
    redis_url: str = field(repr=False)
    ai_providers_url: str
    log_directory: Path
    database_pool_size: int = 20
    database_max_overflow: int = 10
    database_pool_timeout: float = 30.0
    database_pool_recycle: int = 3600
    database_echo: bool = False
    ai_rate_limit: int = 100
    redis_sentinels: tuple[tuple[str, int], ...] = ()
    redis_master: str = "mymaster"
    ai_base_urls: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, directory: Path | None = None) -> Settings:
        """Read and convert all keys. Raises `InvalidSettings`."""
        return cls.from_mapping(read_environment(directory))

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> Settings:
        """Convert `values`, whose keys are written in capitals as in ``.env``. Raises `InvalidSettings`."""
        required = ("HOST", "PORT", "DATABASE_URL", "REDIS_URL", "AI_PROVIDERS_URL", "LOG_DIRECTORY")
        missing = [key for key in required if not values.get(key)]
        if missing:
            raise InvalidSettings(f"missing in .env and in the environment: {', '.join(missing)}")
        return cls(
            host=values["HOST"],
            port=_integer(values, "PORT", 0),
            database_url=values["DATABASE_URL"],
            redis_url=values["REDIS_URL"],
            ai_providers_url=values["AI_PROVIDERS_URL"].rstrip("/"),
            log_directory=Path(values["LOG_DIRECTORY"]),
            database_pool_size=_integer(values, "DATABASE_POOL_SIZE", 20),
            database_max_overflow=_integer(values, "DATABASE_MAX_OVERFLOW", 10),
            database_pool_timeout=float(_integer(values, "DATABASE_POOL_TIMEOUT", 30)),
            database_pool_recycle=_integer(values, "DATABASE_POOL_RECYCLE", 3600),
            database_echo=_boolean(values, "DATABASE_ECHO"),
            ai_rate_limit=_integer(values, "AI_RATE_LIMIT", 100),
            redis_sentinels=_addresses(values.get("REDIS_SENTINELS") or ""),
            redis_master=values.get("REDIS_MASTER") or "mymaster",
            ai_base_urls={name: url for name in AI_PROVIDERS if (url := values.get(f"{name.upper()}_BASE_URL"))},
        )


def _integer(values: Mapping[str, str], key: str, default: int) -> int:
    text = values.get(key) or str(default)
    try:
        return int(text)
    except ValueError:
        raise InvalidSettings(f"{key} is not a whole number") from None


def _addresses(text: str) -> tuple[tuple[str, int], ...]:
    """``host:port,host:port``."""
    try:
        return tuple((host, int(port)) for host, _, port in (item.rpartition(":") for item in text.split(",") if item))
    except ValueError:
        raise InvalidSettings("REDIS_SENTINELS is not host:port,host:port") from None


def _boolean(values: Mapping[str, str], key: str) -> bool:
    text = (values.get(key) or "false").strip().lower()
    if text not in {"true", "false", "1", "0"}:
        raise InvalidSettings(f"{key} is neither true nor false")
    return text in {"true", "1"}
