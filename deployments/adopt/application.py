"""The application of this host: its port, its directory, the connection strings in its variables, its health path."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import httpx
import psutil
import psycopg
import psycopg.conninfo

from deployments.adopt.servers import Unit, listening_ports, unit_of

ENV_FILES = (".env", "backend/.env", "app/.env")
DEPTH = 3
ANSWER_SECONDS = 3.0
HEALTH_PATHS = ("/ready", "/readyz", "/health", "/healthz", "/api/health", "/health-check", "/livez", "/ping")
"""Readiness first: it asks the database too, mere liveness does not."""
_HEALTH = re.compile(r"health|ready|alive|/live|ping", re.IGNORECASE)
_POSTGRES_URL = re.compile(r"postgres(?:ql)?(?:\+\w+)?://")
_REDIS_URL = re.compile(r"rediss?://")
_WORDS = ("host", "port", "dbname", "user", "password")
_OTHERS = re.compile(r"postgres|postmaster|redis|valkey|supervisord|systemd|sshd|docker|containerd|prefect")
# Applications without one connection string name its parts: libpq's variables, Docker images', frameworks' templates.
_PARTS = {
    "host": ("POSTGRES_SERVER", "POSTGRES_HOST", "PGHOST", "DB_HOST", "DATABASE_HOST"),
    "port": ("POSTGRES_PORT", "PGPORT", "DB_PORT", "DATABASE_PORT"),
    "database": ("POSTGRES_DB", "PGDATABASE", "DB_NAME", "DATABASE_NAME"),
    "user": ("POSTGRES_USER", "PGUSER", "DB_USER", "DATABASE_USER"),
    "password": ("POSTGRES_PASSWORD", "PGPASSWORD", "DB_PASSWORD", "DATABASE_PASSWORD"),
}
_REDIS_PARTS = {
    "host": ("REDIS_HOST",),
    "port": ("REDIS_PORT",),
    "username": ("REDIS_USER", "REDIS_USERNAME"),
    "password": ("REDIS_PASSWORD",),
}


@dataclass(frozen=True)
class FoundApplication:
    """Keys of [application], of [postgres] and of [redis] as the application has them. `secrets`: part → password."""

    values: Mapping[str, str] = field(default_factory=dict)
    postgres: Mapping[str, str] = field(default_factory=dict)
    redis: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict)
    unit: Unit | None = None


def find_application(directory: str, url: str, env_file: str) -> FoundApplication:
    """The application in a directory, at an address, or with a file of variables (each may be empty); else the process
    that listens and has a connection string of PostgreSQL or an alembic.ini."""
    process = _find_process(directory, urlsplit(url).port or 0)
    home = Path(directory) if directory else Path(_cwd(process)) if process else None
    file = Path(env_file) if env_file else _find_file(home)
    variables = {**(_environ(process) if process else {}), **(read_variables(file) if file else {})}
    name, postgres = _database(variables)
    redis = _connection(variables, _REDIS_URL, _REDIS_PARTS)
    port = next(iter(listening_ports(process)), 0) if process else 0
    address = url or (f"http://127.0.0.1:{port}" if port else "")
    alembic = _find_alembic(home)
    values = {
        "url": address,
        "health_path": _find_health(address),
        "backend_directory": str(alembic) if alembic else "",
        "python": _python(process) if alembic and process else "",
        "env_file": str(file) if file and name and name in read_variables(file) else "",
        "dsn_variable": name if file and name in read_variables(file) else "",
    }
    secrets = {"postgres": postgres.pop("password", ""), "redis": redis.pop("password", "")}
    return FoundApplication(values, postgres, redis, secrets, unit_of(process) if process else None)


def _find_process(directory: str, port: int) -> psutil.Process | None:
    """The only one that it can be: of two that listen on different ports nobody knows which is meant."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            ports = [] if _OTHERS.search(process.name()) else listening_ports(process)
            if not ports or (port and port not in ports):
                continue
            if directory and not Path(_cwd(process)).is_relative_to(directory):
                continue
            if port or directory or _database(_environ(process))[1] or _find_alembic(Path(_cwd(process))):
                found.setdefault(ports[0], process)
    return next(iter(found.values())) if len(found) == 1 else None


def _cwd(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return process.cwd()
    return "/nonexistent"


def _environ(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def _python(process: psutil.Process) -> str:
    """As it was called: a virtual environment's own link, not what that leads to."""
    with contextlib.suppress(psutil.Error):
        word = process.cmdline()[0]
        return word if word.startswith("/") and "python" in Path(word).name else ""
    return ""


def _find_file(home: Path | None) -> Path | None:
    found = (home / name for name in ENV_FILES) if home else ()
    return next((path for path in found if path.is_file() and os.access(path, os.R_OK)), None)


def _find_alembic(home: Path | None) -> Path | None:
    """The directory with alembic.ini: here, or at most `DEPTH` below."""
    if home is None or not home.is_dir() or home == Path("/"):
        return None
    patterns = ("/".join(["*"] * depth + ["alembic.ini"]) for depth in range(DEPTH))
    return next((path.parent for pattern in patterns for path in sorted(home.glob(pattern))), None)


def read_variables(path: Path) -> dict[str, str]:
    """`NAME=value` lines as dotenv has them; what is no assignment is passed over."""
    found = {}
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text(encoding="utf-8").splitlines():
            name, is_assigned, value = line.strip().removeprefix("export ").partition("=")
            if is_assigned and name.strip().isidentifier():
                with contextlib.suppress(ValueError):
                    words = shlex.split(value, comments=True)
                    found[name.strip()] = words[0] if len(words) == 1 else value.strip()
    return found


def _database(variables: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """The variable with the connection string ("" where its parts are apart), and what is in it. A password may be
    apart from the string."""
    apart = _of_parts(variables, _PARTS)
    for name in sorted(variables, key=lambda one: one != "DATABASE_URL"):
        if _POSTGRES_URL.match(variables[name]):
            found = _of_url(variables[name])
        elif "dbname=" in variables[name]:
            found = _of_words(variables[name])
        else:
            continue
        return name, {**({"password": apart["password"]} if "password" in apart else {}), **found}
    return "", apart


def _of_words(text: str) -> dict[str, str]:
    """`host=… dbname=…`: https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING"""
    with contextlib.suppress(psycopg.ProgrammingError):
        found = psycopg.conninfo.conninfo_to_dict(text)
        return {("database" if key == "dbname" else key): str(found[key]) for key in _WORDS if found.get(key)}
    return {}


def _connection(
    variables: Mapping[str, str], pattern: re.Pattern[str], parts: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    urls = (value for value in variables.values() if pattern.match(value))
    if url := next(urls, ""):
        found = _of_url(url)
        return {key: value for key, value in found.items() if key in parts} | _username(found)
    return _of_parts(variables, parts)


def _username(found: Mapping[str, str]) -> dict[str, str]:
    return {"username": found["user"]} if found.get("user") else {}


def _of_parts(variables: Mapping[str, str], parts: Mapping[str, Sequence[str]]) -> dict[str, str]:
    found = {key: next((variables[name] for name in names if variables.get(name)), "") for key, names in parts.items()}
    return {key: value for key, value in found.items() if value}


def _of_url(url: str) -> dict[str, str]:
    parts = urlsplit(url)
    found = {
        "host": parts.hostname or "",
        "port": str(parts.port or ""),
        "database": unquote(parts.path.lstrip("/")),
        "user": unquote(parts.username or ""),
        "password": unquote(parts.password or ""),
    }
    return {key: value for key, value in found.items() if value}


def _find_health(address: str) -> str:
    """A path that answers 200 now: of those in the application's OpenAPI document, then of usual ones."""
    if not address:
        return ""
    with httpx.Client(base_url=address, timeout=ANSWER_SECONDS, trust_env=False) as client:
        for path in (*_described(client), *HEALTH_PATHS):
            with contextlib.suppress(httpx.HTTPError):
                if client.get(path).status_code == httpx.codes.OK:
                    return path
    return ""


def _described(client: httpx.Client) -> Iterator[str]:
    with contextlib.suppress(httpx.HTTPError, ValueError, AttributeError):
        paths = client.get("/openapi.json").json().get("paths", {})
        yield from (
            path for path, calls in paths.items() if _HEALTH.search(path) and "get" in calls and "{" not in path
        )
