"""`deployments/environments/*.toml` as blocks. `${NAME}` in a text is the environment variable NAME; a key that ends in
`_env` names the variable that holds a secret. Variables come from the shell, or from NAME.env beside the TOML. Each
mistake gets one message: file, key, what was found, what is expected. Missing variables are listed all at once."""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.blocks.core import Block
from pydantic import ValidationError

from blocks.ai_providers import AIProviders
from blocks.cloud import Cloud
from blocks.config.mistakes import (
    HIDDEN,
    Mistake,
    find_mistakes,
    find_place_mistakes,
    find_role_mistakes,
    keys_of,
    near,
    shown,
)
from blocks.config.secrets import IN_TEXT, VARIABLE, is_secret, missing, variables_of
from blocks.config.secrets import file_of as secrets_file_of
from blocks.docker import Docker
from blocks.environment import CHECKOUT, Environment
from blocks.monitoring import Monitoring
from blocks.people.alerts import Alerts
from blocks.people.approval import Approval
from blocks.places import Application, Backups, Certificates, Endpoint, Logs
from blocks.postgres.server import Postgres
from blocks.postgres.wal import Wal
from blocks.prefect_server import PrefectServer
from blocks.redis.server import Redis
from blocks.services.service import DockerServices
from blocks.services.supervisor import SupervisorServices
from blocks.services.systemd import SystemdServices
from runbook.errors import OpsError
from runbook.log import logger

DIRECTORY = Path(__file__).parents[2] / "deployments" / "environments"
PARTS: dict[str, type[Block]] = {
    "postgres": Postgres,
    "standby": Postgres,
    "wal": Wal,
    "redis": Redis,
    "backups": Backups,
    "copies": Backups,
    "application": Application,
    "endpoint": Endpoint,
    "logs": Logs,
    "ai_providers": AIProviders,
    "certificates": Certificates,
    "docker": Docker,
    "cloud": Cloud,
    "alerts": Alerts,
    "approval": Approval,
    "monitoring": Monitoring,
    "prefect_server": PrefectServer,
}
SERVICES: dict[str, type[Block]] = {
    "supervisor": SupervisorServices,
    "systemd": SystemdServices,
    "docker": DockerServices,
}
BY_US = ("slugs", "rpo_seconds", "rto_seconds", "reviewed")
NAMED_BY = ("OPS_ENVIRONMENT", "OPS_OTHER_REGION")
DEFAULTS = {"standby": {"service": "standby"}}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PYDANTIC = re.compile(r"^Value error, |^Input should be |^List should have | after validation\b")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


def environment(name: str) -> Environment:
    """The environment of that name, with all its parts.

    Raises:
        OpsError: there is none, or its file is wrong.
    """
    path = file_of(name)
    found = read(path)
    if found.name != name:
        raise OpsError(f"{path.name} describes the environment {found.name}, not {name}", "correct its key name")
    return found


def reviewed(block: Environment) -> dict[str, Any]:
    """`unattended` and `disposable` of a registered environment, from its TOML on this host: a person who can edit a
    block in the UI could name any runbook there. Both are off where this host has another TOML than was registered, or
    none."""
    try:
        content = file_of(block.name).read_bytes()
        found = tomllib.loads(content.decode())
    except (OpsError, OSError, ValueError):
        content, found = b"", {}
    keys = {"unattended": found.get("unattended", []), "disposable": bool(found.get("disposable", False))}
    if hashlib.sha256(content).hexdigest() == block.reviewed:
        return keys
    logger().warning(
        "%s was not registered from this host's TOML: nothing runs unattended and no drill starts before "
        "`python -m deployments.register %s`",
        block.name,
        block.name,
    )
    return {"unattended": [], "disposable": False}


def file_of(name: str) -> Path:
    """The TOML of an environment: `OPS_ENVIRONMENT_FILE` for the one that `OPS_ENVIRONMENT` names, in the same way
    `OPS_OTHER_REGION_FILE` for the environment of its other region; else by its name."""
    check_name(name)
    for variable in NAMED_BY:
        if os.environ.get(variable) == name and (chosen := os.environ.get(f"{variable}_FILE", "")):
            return Path(chosen)
    path = DIRECTORY / f"{name}.toml"
    if not path.exists():
        raise unknown(name)
    return path


def check_name(name: str) -> None:
    """Raises OpsError where no environment can have that name: it becomes part of paths and addresses."""
    if not _NAME.fullmatch(name):
        raise unknown(name)


def unknown(name: str) -> OpsError:
    """What somebody reads who asked for an environment that is not there."""
    return OpsError(f"there is no environment “{name[:60]}”", f"choose one of {', '.join(known())}, or register it")


def known() -> list[str]:
    """The names of all environments that have a file."""
    chosen = {os.environ.get(variable, "") for variable in NAMED_BY} - {""}
    return sorted({path.stem for path in DIRECTORY.glob("*.toml")} | chosen)


def read(path: Path) -> Environment:
    """One file as an environment.

    Raises:
        OpsError: the file is wrong; the message names the key.
    """
    try:
        text = path.read_bytes()
        content = tomllib.loads(text.decode())
    except (OSError, ValueError) as error:  # TOML's own error and a file that is not UTF-8
        raise OpsError(f"{path.name} cannot be read: {error}", "correct the file") from None
    file = _File(path, variables_of(path))
    sections = {key: file.table(key, content.pop(key)) for key in list(content) if key in PARTS}
    services = file.table("services", content.pop("services", {"kind": "systemd"}))
    kind = SERVICES.get(str(given := services.pop("kind", "systemd")))
    if kind is None:
        raise file.wrong("services", "kind", f"one of {', '.join(SERVICES)}", shown(given))
    objectives = file.table("objectives", content.pop("objectives", {}))
    file.check_tables({"": content, **sections, "services": services}, objectives, kind)
    for key in ("rpo", "rto"):
        content[f"{key}_seconds"] = file.seconds(key, objectives.get(key))
    content["expectations"] = file.suites(file.table("expectations", content.pop("expectations", {})))
    content["drills"] = file.directory("", "drills", content.get("drills", ""))
    name = str(file.expanded("", "name", content.get("name", path.stem)))
    if not _NAME.fullmatch(name):
        raise file.wrong("", "name", "a lower-case letter, then at most 30 of a-z, 0-9 and -", shown(name))
    parts = {
        part: file.block(part, PARTS[part], {**DEFAULTS.get(part, {}), **values}) for part, values in sections.items()
    }
    parts["services"] = file.block("services", kind, services)
    file.check(find_place_mistakes(parts))
    slugs = {part: f"{type(block).get_block_type_slug()}/{_document(part, name)}" for part, block in parts.items()}
    found = {**content, "name": name, "slugs": slugs, "reviewed": hashlib.sha256(text).hexdigest()}
    built = file.block("", Environment, found)
    assert isinstance(built, Environment)
    if isinstance(approval := parts.get("approval"), Approval) and (both := {*approval.required} & {*built.unattended}):
        expected = "no runbook of unattended: nobody could approve it"
        raise file.wrong("approval", "required", expected, shown(sorted(both)[0]))
    return built.with_parts(parts)


def _document(part: str, name: str) -> str:
    """The name of a part's block: the environment's, but where it has two blocks of that type."""
    return f"{name}-{part}" if part in ("copies", "standby") else name


@dataclass(frozen=True)
class _File:
    """One TOML, and the variables that it can name."""

    path: Path
    variables: Mapping[str, str]

    def wrong(self, section: str, key: str, expected: str, found: str = "nothing") -> OpsError:
        where = f"[{section}] {key}" if section else key
        return OpsError(f"{self.path.name}: {where} is wrong: found {found}", f"expected: {expected}")

    def check_tables(
        self, tables: Mapping[str, dict[str, Any]], objectives: Mapping[str, Any], services: type[Block]
    ) -> None:
        """Raises OpsError for the first mistake in what is written, then for every variable that is not set."""
        for key in objectives:
            if key not in ("rpo", "rto"):
                raise self.wrong("objectives", key, f"a known key{near(key, ['rpo', 'rto'])}", "an unknown key")
        for part, values in tables.items():
            kind = PARTS.get(part, services if part else Environment)
            self.check_keys(part, values, kind)
            self.check(find_mistakes(part, kind, values))
        self.check(find_role_mistakes(tables["services"], tables))
        self.require_variables({**tables[""], **{part: values for part, values in tables.items() if part}})

    def check(self, mistakes: Iterable[Mistake]) -> None:
        for one in mistakes:
            raise self.wrong(one.section, one.key, one.expected, one.found)

    def table(self, section: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.wrong("", section, f"a table: [{section}]", shown(value))
        return dict(value)

    def check_keys(self, section: str, keys: Iterable[str], kind: type[Block]) -> None:
        own = [name for name in kind.model_fields if section or name not in BY_US]
        known = [*own, *(() if section else (*PARTS, "services", "objectives"))]
        named = [f"{name}_env" if is_secret(kind, name) else name for name in known]
        for key in keys:
            if key.removesuffix("_env") not in own:
                meant = near(key, named)
                raise self.wrong(section, key, f"a known key{meant if 'did you' in meant else ''}", "an unknown key")

    def require_variables(self, content: Mapping[str, Any]) -> None:
        """Raises OpsError with every variable that is not set, and the keys that name it."""
        wanted: dict[str, list[str]] = {}
        for variable, key in missing(content, self.variables):
            section, _, own = key.partition(".")
            wanted.setdefault(variable, []).append(f"[{section}] {own}" if section in (*PARTS, "services") else key)
        if wanted:
            told = ", ".join(f"{variable} ({', '.join(dict.fromkeys(keys))})" for variable, keys in wanted.items())
            count = "1 variable is" if len(wanted) == 1 else f"{len(wanted)} variables are"
            hint = f"set them in this shell, or as lines NAME='value' in {secrets_file_of(self.path)} (mode 0600)"
            raise OpsError(f"{self.path.name}: {count} not set: {told}", hint)

    def block(self, section: str, kind: type[Block], values: dict[str, Any]) -> Block:
        fields = {}
        for key, value in values.items():
            field = key.removesuffix("_env")
            fields[field] = (self.secret if field != key else self.expanded)(section, key, value)
        try:
            return kind(**fields)
        except ValidationError as error:
            first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")  # it explains what is missing
            raise self._invalid(section, kind, values, first["loc"], first["type"], first["msg"]) from None

    def _invalid(
        self, section: str, kind: type[Block], values: object, path: tuple[int | str, ...], what: str, message: str
    ) -> OpsError:
        """Pydantic's first error. The value is shown as the file has it: a variable's own is perhaps a secret."""
        key = ".".join(map(str, path))
        if what == "extra_forbidden":
            known = keys_of(kind, path)
            return self.wrong(section, key, f"a known key{near(str(path[-1]), known)}", "an unknown key")
        if what == "missing":
            text = kind.model_fields[str(path[0])].description if len(path) == 1 else ""
            wanted = f"{key}_env" if is_secret(kind, str(path[0])) else key
            return self.wrong(section, wanted, f"a value{f': {text}' if text else ''}")
        found = values
        for step in path:
            try:
                found = found[step]  # type: ignore[index]
            except (KeyError, IndexError, TypeError):
                break
        told = HIDDEN if path and is_secret(kind, str(path[0])) else shown(found) if path else "the values of its keys"
        expected = _PYDANTIC.sub("", message)
        return self.wrong(section, key or "as a whole", expected, told)

    def _inner(self, section: str, key: str, inner: str, value: object) -> tuple[str, object]:
        """An entry of a table within a section; its `secret_env` names a variable too."""
        if inner == "secret_env":
            return "secret", self.secret(section, key, value)
        return inner, self.expanded(section, key, value)

    def secret(self, section: str, key: str, variable: object) -> object:
        if isinstance(variable, dict):
            return {name: self.secret(section, f"{key}.{name}", one) for name, one in variable.items()}
        if not isinstance(variable, str) or not VARIABLE.fullmatch(variable):  # the secret itself, perhaps
            expected = "the name of an environment variable (capitals, digits and _)"
            raise self.wrong(section, key, expected, "something else (not shown)")
        return self.variables[variable]

    def expanded(self, section: str, key: str, value: object) -> object:
        if isinstance(value, dict):
            return dict(self._inner(section, f"{key}.{inner}", inner, item) for inner, item in value.items())
        if isinstance(value, list):
            return [self.expanded(section, key, item) for item in value]
        return IN_TEXT.sub(lambda match: self.variables[match[1]], value) if isinstance(value, str) else value

    def seconds(self, key: str, text: object) -> float:
        match = re.fullmatch(r"(\d+)([smhd])", str(text))
        if not match or not int(match[1]):
            found = "nothing" if text is None else shown(text)
            raise self.wrong("objectives", key, "a duration above 0, as 30m, 1h or 7d", found)
        return float(int(match[1]) * UNITS[match[2]])

    def suites(self, section: dict[str, Any]) -> str:
        """`[expectations] directory`. Whether it exists is registration's question: a recovery goes on."""
        for key in section:
            if key != "directory":
                raise self.wrong("expectations", key, "a known key (did you mean directory?)", "an unknown key")
        return self.directory("expectations", "directory", section.get("directory", ""))

    def directory(self, section: str, key: str, given: object) -> str:
        """Relative to the file. Inside the checkout it is stored relative to that: a worker on another host may have
        its checkout elsewhere."""
        directory = self.expanded(section, key, given)
        if not isinstance(directory, str):
            raise self.wrong(section, key, "the path of a directory, relative to this file", shown(directory))
        if not directory:
            return ""
        found = (self.path.parent / directory).resolve()
        return str(found.relative_to(CHECKOUT) if found.is_relative_to(CHECKOUT) else found)
