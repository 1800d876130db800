"""Describe a running system as an environment, then check it with the doctor. Nothing is changed on its servers.

What runs on this host is found: PostgreSQL, Redis, what starts them, the application with its connection string. A flag
comes before what was found. At a terminal each answer is asked, with --yes none is. It writes the environment's TOML, a
file of secrets (mode 0600), lists every secret that is missing, and ends with the doctor's page.

python -m deployments.adopt blue --yes --application-directory /srv/shop
"""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis
from pydantic import SecretStr

from blocks.config import secrets, toml
from blocks.redis.server import Redis
from deployments.adopt.application import ANSWER_SECONDS, find_application
from deployments.adopt.description import BY_KEY, QUESTIONS, describe, variables, write_description, write_secrets
from deployments.adopt.servers import FoundServerProcess, Unit, find_postgres, find_redis
from deployments.doctor.__main__ import examine, show
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.files.state import state_directory
from tasks.redis.server import setting

NEEDED = ("database", "user", "admin_user", "programs", "data_directory", "os_user")
LOCAL = ("", "localhost", "127.0.0.1", "::1")
ZONE = Path("/etc/localtime")


def path_of(name: str) -> Path:
    """The TOML that is written: where `OPS_ENVIRONMENT_FILE` says for this environment, else among the others.

    Raises:
        OpsError: no environment can have that name.
    """
    toml.check_name(name)
    chosen = os.environ.get("OPS_ENVIRONMENT_FILE", "") if os.environ.get("OPS_ENVIRONMENT") == name else ""
    return Path(chosen) if chosen else toml.DIRECTORY / f"{name}.toml"


def pick(servers: Sequence[FoundServerProcess], what: str, port: str) -> FoundServerProcess | None:
    """The server at a port; without one, the only server.

    Raises:
        OpsError: there are several.
    """
    here = [one for one in servers if not port or one.port == int(port)]
    if len(here) > 1:
        ports = ", ".join(f"{one.port} ({one.values['data_directory'] or 'directory unknown'})" for one in here)
        raise OpsError(f"there are several {what} servers here: {ports}", f"choose one: --{what}-port PORT")
    return here[0] if here else None


def find(name: str, given: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """What was found of a system: answers by key, and passwords by part.

    Raises:
        OpsError: there are several servers, and nothing says which is meant.
    """
    app = find_application(
        given.get("application.directory") or given.get("application.backend_directory", ""),
        given.get("application.url", ""),
        given.get("application.env_file", ""),
    )
    found = {f"application.{key}": value for key, value in app.values.items()}
    units: dict[str, Unit | None] = {"backend": app.unit}
    for part, servers, own in (("postgres", find_postgres(), app.postgres), ("redis", find_redis(), app.redis)):
        if given.get(f"{part}.host") == "":
            continue  # there is none
        host = given.get(f"{part}.host", own.get("host", ""))
        port = given.get(f"{part}.port") or own.get("port", "")
        server = pick(servers, part, port) if host in LOCAL else None
        units[part] = server.unit if server else None
        values = {**(server.values if server else {}), **own}
        found |= {f"{part}.{key}": value for key, value in values.items()}
    passwords = {part: password for part, password in app.secrets.items() if password}
    found |= _asked_of_redis(found, passwords) | _managed(units, passwords) | _usual(name)
    return {key: value for key, value in found.items() if value and key in BY_KEY}, passwords


def _asked_of_redis(found: Mapping[str, str], passwords: dict[str, str]) -> dict[str, str]:
    """What Redis itself answers: its directory and its configuration file, or that it wants a password."""
    if not (found.get("redis.host") and found.get("redis.port")):
        return {}
    block = Redis(
        host=found["redis.host"],
        port=int(found["redis.port"]),
        username=found.get("redis.username", ""),
        password=SecretStr(passwords.get("redis", "")),
    )
    try:
        client = block.client(answer_seconds=ANSWER_SECONDS)
        try:
            configuration, directory = client.info("server").get("config_file", ""), setting(client, "dir")
        finally:
            client.close()
    except redis.AuthenticationError:
        passwords.setdefault("redis", "")
    except redis.RedisError:
        pass  # the doctor reports it
    else:
        return {"redis.config_file": str(configuration), "redis.data_directory": directory}
    return {}


def _managed(units: Mapping[str, Unit | None], passwords: dict[str, str]) -> dict[str, str]:
    """[services], of the manager that starts most of them."""
    known = {role: unit for role, unit in units.items() if unit}
    kinds = [unit.kind for unit in known.values()]
    if not kinds:
        return {}
    kind = max(kinds, key=kinds.count)
    own = {role: unit for role, unit in known.items() if unit.kind == kind}
    first = next(iter(own.values()))
    if first.password:
        passwords["services"] = first.password
    names = {f"services.names.{role}": unit.name for role, unit in own.items()}
    return {"services.kind": kind, "services.url": first.url, "services.username": first.username, **names}


def _usual(name: str) -> dict[str, str]:
    """Directories that this user can write, and the host's time zone."""
    base = state_directory()
    zone = str(ZONE.resolve()).partition("/zoneinfo/")[2]
    return {
        "title": name,
        "reports": str(base / name / "reports"),
        "backups.directory": str(base / name / "backups"),
        "timezone": zone if "/" in zone and not zone.startswith("Etc/") else "",
    }


def complete(found: Mapping[str, str], given: Mapping[str, str], *, ask: bool) -> dict[str, str]:
    """Every answer: a flag, what was found, or the default; `ask`: each one at the terminal.

    Raises:
        OpsError: what cannot be left out was not found.
    """
    answers: dict[str, str] = {}
    for question in QUESTIONS:
        part = question.key.partition(".")[0]
        optional = part in ("postgres", "redis") and question.key != f"{part}.host"
        if optional and not answers.get(f"{part}.host"):
            continue  # there is none
        value = given.get(question.key, found.get(question.key, question.default))
        if ask and question.key not in given:
            value = input(f"{question.key}: {question.text} [{value}]: ").strip() or value
            value = "" if value == "-" else value
        answers[question.key] = value
    _require(answers)
    return answers


def _require(answers: Mapping[str, str]) -> None:
    if not answers.get("postgres.host") and not answers.get("redis.host"):
        hint = "name one: --postgres-host HOST --postgres-port PORT, or --redis-host and --redis-port"
        raise OpsError("neither PostgreSQL nor Redis was found on this host", hint)
    parts = [part for part in ("postgres", "redis") if answers.get(f"{part}.host")]
    needed = [f"{part}.port" for part in parts] + [f"postgres.{key}" for key in NEEDED if "postgres" in parts]
    if missing := [BY_KEY[key] for key in needed if not answers.get(key)]:
        told = "; ".join(f"{one.flag} ({one.text})" for one in missing)
        raise OpsError("not found, and needed", f"add {told}")


def adopt(name: str, given: Mapping[str, str], *, ask: bool, force: bool) -> int:
    """Find, ask, write, check; 1 where the doctor finds something critical.

    Raises:
        OpsError: something needed was not found, or a file cannot be written.
    """
    path = path_of(name)
    found, passwords = find(name, given)
    answers = complete(found, given, ask=ask)
    if answers.get("postgres.admin_user") == answers.get("postgres.user"):
        passwords["postgres admin"] = passwords.get("postgres", "")
    if "services.username" in given and "services" not in passwords:
        passwords["services"] = ""
    print(write_description(path, describe(name, answers, list(passwords)), force=force))
    keep_secrets(path, name, answers, passwords, ask=ask)
    return show(examine(name))


def keep_secrets(path: Path, name: str, answers: Mapping[str, str], passwords: Mapping[str, str], *, ask: bool) -> None:
    """Write the file of secrets, and list all that is missing."""
    wanted = variables(name, answers, list(passwords))
    values = {variable: passwords.get(part, "") for part, key, variable, _ in wanted if key == "password_env"}
    whose = {variable: text for _, _, variable, text in wanted}
    if ask:
        for variable, text in whose.items():
            if not values.get(variable) and variable not in os.environ:
                values[variable] = getpass.getpass(f"password {text} (empty: into the file later): ")
    file = secrets.file_of(path)
    missing = write_secrets(file, whose, values)
    print(f"{file} (mode 0600) has the variables of {len(whose)} secrets")
    for variable in missing:
        print(f"to fill in: {variable}, the password {whose[variable]}")


def parser() -> argparse.ArgumentParser:
    """A flag for every question."""
    made = argparse.ArgumentParser(
        prog="python -m deployments.adopt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "name",
        nargs="?",
        default=os.environ.get("OPS_ENVIRONMENT", "") or "live",
        help="of the environment; default: OPS_ENVIRONMENT, or live",
    )
    made.add_argument("--yes", action="store_true", help="take what was found, ask nothing")
    made.add_argument("--force", action="store_true", help="write the TOML anew where it is there")
    for question in QUESTIONS:
        made.add_argument(
            question.flag,
            dest=question.key,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{question.text}".replace("%", "%%"),
        )
    return made


def main() -> int:
    """The command line: 1 where something is critical, 2 where nothing could be written."""
    given = vars(parser().parse_args())
    name, yes, force = given.pop("name"), given.pop("yes"), given.pop("force")
    try:
        return adopt(name, given, ask=sys.stdin.isatty() and not yes, force=force)
    except OpsError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(exit_code(main))
