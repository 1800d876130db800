"""An environment's TOML and its file of secrets, written from answers."""

from __future__ import annotations

import difflib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.config import secrets
from runbook.errors import OpsError

_HEAD = ("--", "++", "@@")
SERVICE_NAMES = "services.names."
NUMBERS = ("postgres.port", "redis.port")


@dataclass(frozen=True)
class AdoptQuestion:
    """One key of the TOML, the comment beside it, and what it is where nothing was found."""

    key: str
    text: str
    default: str = ""

    @property
    def flag(self) -> str:
        """`--postgres-port` of `postgres.port`; a path below [services] names is `--service-backend`."""
        name = self.key.replace(SERVICE_NAMES, "service.").replace("objectives.", "")
        return "--" + name.replace(".", "-").replace("_", "-")


QUESTIONS = (
    AdoptQuestion("title", "for people"),
    AdoptQuestion("tier", "production, staging or development", "production"),
    AdoptQuestion("timezone", "schedules and the names of backups are in this zone", "UTC"),
    AdoptQuestion("reports", "JSON reports of every run, and the lock's file"),
    AdoptQuestion("objectives.rpo", "how much data may be lost at most", "1h"),
    AdoptQuestion("objectives.rto", "how long a recovery may take at most", "4h"),
    AdoptQuestion("postgres.host", "where PostgreSQL listens; empty: there is no PostgreSQL"),
    AdoptQuestion("postgres.port", "its port", "5432"),
    AdoptQuestion("postgres.database", "the application's database"),
    AdoptQuestion("postgres.user", "the application's role"),
    AdoptQuestion("postgres.admin_user", "a superuser: dumps need BYPASSRLS, restores need owners", "postgres"),
    AdoptQuestion("postgres.programs", "directory of pg_dump, pg_restore and initdb, of the server's major version"),
    AdoptQuestion("postgres.data_directory", "SHOW data_directory"),
    AdoptQuestion("postgres.config_file", "postgresql.conf, where it is outside the data directory"),
    AdoptQuestion("postgres.os_user", "the user that the server runs as"),
    AdoptQuestion("redis.host", "where Redis or Valkey listens; empty: there is no Redis"),
    AdoptQuestion("redis.port", "its port", "6379"),
    AdoptQuestion("redis.username", "an ACL user; empty: the default user"),
    AdoptQuestion("redis.data_directory", "CONFIG GET dir"),
    AdoptQuestion("redis.config_file", "its configuration file"),
    AdoptQuestion("redis.server_program", "also used for scratch servers that prove a backup"),
    AdoptQuestion("redis.os_user", "the user that the server runs as"),
    AdoptQuestion("services.kind", "what starts the services: systemd, supervisor or docker", "systemd"),
    AdoptQuestion("services.url", "where supervisord listens"),
    AdoptQuestion("services.username", "supervisord's user; empty: it asks for none"),
    AdoptQuestion("services.names.postgres", "the unit, program or container of PostgreSQL"),
    AdoptQuestion("services.names.redis", "of Redis"),
    AdoptQuestion("services.names.backend", "of the application's backend"),
    AdoptQuestion("services.names.frontend", "of its frontend; empty: there is none"),
    AdoptQuestion("backups.directory", "each kind of backup gets a directory below it"),
    AdoptQuestion("application.url", "where the backend answers; empty: nothing is asked of it"),
    AdoptQuestion("application.health_path", "healthy when it answers 200 there; empty: no health check"),
    AdoptQuestion("application.frontend_url", "where the frontend answers; empty: there is none"),
    AdoptQuestion("application.directory", "files to back up and to restore; empty: none"),
    AdoptQuestion("application.backend_directory", "where alembic.ini is; empty: nothing is migrated"),
    AdoptQuestion("application.python", "the Python that runs the backend"),
    AdoptQuestion("application.env_file", "its variables: a failover changes the connection string in it"),
    AdoptQuestion("application.dsn_variable", "the connection string's name in that file"),
)
BY_KEY = {one.key: one for one in QUESTIONS}
HEADS = {
    "objectives": "Recovery point and recovery time: every report is judged by them.",
    "backups": 'On a mount of another machine add survives = "server". Replica store, [copies]: docs/backup-stores.md.',
    "application": "What else an application can offer, as requests that prove that it works: docs/application.md.",
}


def describe(name: str, answers: Mapping[str, str], passwords: Sequence[str]) -> str:
    """The TOML. `passwords`: the parts that have one."""
    sections: dict[str, list[str]] = {}
    for question in QUESTIONS:
        value = answers.get(question.key, "")
        section, _, key = question.key.rpartition(".")
        if value and question.key != "backups.directory":
            number = question.key in NUMBERS
            text = value if number else json.dumps(value, ensure_ascii=False)
            sections.setdefault(section, []).append(f"{key} = {text} # {question.text}")
    sections["backups"] = _backups(answers)
    for part, key, variable, text in variables(name, answers, passwords):
        sections.setdefault(part, []).append(f'{key} = "{variable}" # {text}')
    lines = [
        f"# {name}: written by python -m deployments.adopt. Secrets are in {name}.env next to it, mode 0600.",
        f'name = "{name}"',
        *sections.pop("", []),
    ]
    lines += ["unattended = [] # runbooks that may run without a person's confirm (docs/plans.md)"]
    for section, keys in sections.items():
        lines += ["", *([f"# {HEADS[section]}"] if section in HEADS else []), f"[{section}]", *keys]
    return "\n".join([*lines, ""])


def _backups(answers: Mapping[str, str]) -> list[str]:
    base = answers["backups.directory"]
    wanted = {
        "postgres": bool(answers.get("postgres.host")),
        "redis": bool(answers.get("redis.host")),
        "files": bool(answers.get("application.directory")),
        "cluster": False,
        "wal": False,
    }
    more = {
        "cluster": " # base backups, for recovery to a point in time: docs/point-in-time.md",
        "wal": " # with [wal]",
    }
    return [f'{kind} = "{f"{base}/{kind}" if there else ""}"{more.get(kind, "")}' for kind, there in wanted.items()]


def variables(name: str, answers: Mapping[str, str], passwords: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Every secret: part, key, variable, whose password it is."""
    prefix = name.upper().replace("-", "_")
    wanted = []
    if answers.get("postgres.host"):
        user, admin = answers["postgres.user"], answers["postgres.admin_user"]
        wanted.append(("postgres", "password_env", f"{prefix}_POSTGRES_PASSWORD", f"of the role {user}"))
        variable = f"{prefix}_POSTGRES_{'ADMIN_' if admin != user else ''}PASSWORD"
        wanted.append(("postgres", "admin_password_env", variable, f"of the superuser {admin}"))
    if "redis" in passwords:
        wanted.append(("redis", "password_env", f"{prefix}_REDIS_PASSWORD", "of Redis"))
    if "services" in passwords:
        user = answers["services.username"]
        wanted.append(("services", "password_env", f"{prefix}_SUPERVISOR_PASSWORD", f"of supervisord's user {user}"))
    return wanted


def write_description(path: Path, text: str, *, force: bool) -> str:
    """Write the TOML; returns what was done. One that is there and differs stays, but for `force`."""
    if path.exists() and path.read_text(encoding="utf-8") != text and not force:
        there = path.read_text(encoding="utf-8").splitlines()
        changed = [
            line for line in difflib.unified_diff(there, text.splitlines(), n=0, lineterm="") if line[:2] not in _HEAD
        ]
        return "\n".join([f"{path} is kept; --force writes it anew, with these changes:", *changed])
    if path.exists() and not force:
        return f"{path} is unchanged"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return f"wrote {path}"


def write_secrets(path: Path, wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Add the variables that a file of secrets lacks (variable → whose), with the values that were found; mode 0600.
    Returns those that have no value yet.

    Raises:
        OpsError: others can read the file, or it cannot be written.
    """
    there = secrets.read_file(path)
    lines = (
        path.read_text(encoding="utf-8").splitlines()
        if path.exists()
        else [
            "# Secrets. NAME= without a value is not filled in yet. A variable of the shell comes before the one here."
        ]
    )
    values = {variable: there.get(variable) or found.get(variable, "") for variable in wanted}
    for variable, whose in wanted.items():
        if variable not in there:
            lines = [line for line in lines if line.strip() != f"{variable}="]
            lines = [line for line in lines if line != f"# {whose}"]
            lines += [f"# {whose}", f"{variable}={shlex.quote(values[variable]) if values[variable] else ''}"]
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(file, "w", encoding="utf-8") as opened:
            opened.write("\n".join([*lines, ""]))
    except OSError as error:
        raise OpsError(f"{path} cannot be written: {error.strerror}", "name another file of the TOML") from None
    return [
        variable for variable in wanted if not values[variable] and variable not in os.environ and variable not in there
    ]
