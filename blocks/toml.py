"""`deployments/environments/*.toml` as blocks. `${NAME}` in a text is the environment variable NAME; a key that ends in
`_env` names the variable that holds a secret. Whatever is wrong gets one message: file, key, what is expected."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefect.blocks.core import Block
from pydantic import ValidationError

from blocks.ai_providers import AIProviders
from blocks.alerts import Alerts
from blocks.approval import Approval
from blocks.cloud import Cloud
from blocks.docker import Docker
from blocks.environment import CHECKOUT, Environment
from blocks.monitoring import Monitoring
from blocks.places import Application, Backups, Certificates, Endpoint, Logs
from blocks.postgres import Postgres
from blocks.prefect_server import PrefectServer
from blocks.redis import Redis
from blocks.services import DockerServices, SupervisorServices
from blocks.systemd import SystemdServices
from blocks.wal import Wal
from runbook.errors import OpsError

DIRECTORY = Path(__file__).parent.parent / "deployments" / "environments"
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
NAMED_BY = ("OPS_ENVIRONMENT", "OPS_OTHER_REGION")
DEFAULTS = {"standby": {"service": "standby"}}
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
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
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # TOML's own error and a file that is not UTF-8
        raise OpsError(f"{path.name} cannot be read: {error}", "correct the file") from None
    sections = {key: _table(path, key, content.pop(key)) for key in list(content) if key in PARTS}
    _check_keys(path, "", [key for key in content if key not in ("services", "objectives")], Environment)
    services = _table(path, "services", content.pop("services", {"kind": "systemd"}))
    kind = SERVICES.get(str(services.pop("kind", "systemd")))
    if kind is None:
        raise _wrong(path, "services", "kind", f"one of {', '.join(SERVICES)}")
    objectives = _table(path, "objectives", content.pop("objectives", {}))
    for key in ("rpo", "rto"):
        content[f"{key}_seconds"] = _seconds(path, key, objectives.get(key))
    content["expectations"] = _suites(path, _table(path, "expectations", content.pop("expectations", {})))
    content["drills"] = _directory(path, "", "drills", content.get("drills", ""))
    name = str(_expanded(path, "", "name", content.get("name", path.stem)))
    if not _NAME.fullmatch(name):
        raise _wrong(path, "", "name", "a lower-case letter, then at most 30 of a-z, 0-9 and -")
    parts = {
        part: _block(path, part, PARTS[part], {**DEFAULTS.get(part, {}), **values}) for part, values in sections.items()
    }
    parts["services"] = _block(path, "services", kind, services)
    slugs = {part: f"{type(block).get_block_type_slug()}/{_document(part, name)}" for part, block in parts.items()}
    built = _block(path, "", Environment, {**content, "name": name, "slugs": slugs})
    assert isinstance(built, Environment)
    if isinstance(approval := parts.get("approval"), Approval) and (both := {*approval.required} & {*built.unattended}):
        raise _wrong(path, "approval", "required", f"no runbook of unattended: nobody could approve {sorted(both)[0]}")
    return built.with_parts(parts)


def _document(part: str, name: str) -> str:
    """The name of a part's block: the environment's, but where it has two blocks of that type."""
    return f"{name}-{part}" if part in ("copies", "standby") else name


def _table(path: Path, section: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "", section, f"a table: [{section}]")
    return value


def _check_keys(path: Path, section: str, keys: Iterable[str], kind: type[Block]) -> None:
    known = [*kind.model_fields, *(() if section else (*PARTS, "services", "objectives"))]
    for key in keys:
        field = key.removesuffix("_env")
        if field not in kind.model_fields:
            near = difflib.get_close_matches(field, known, 1)
            raise _wrong(path, section, key, f"a known key{f' (did you mean {near[0]}?)' if near else ''}")


def _block(path: Path, section: str, kind: type[Block], values: dict[str, Any]) -> Block:
    _check_keys(path, section, values, kind)
    fields = {}
    for key, value in values.items():
        field = key.removesuffix("_env")
        fields[field] = _secret(path, section, key, value) if field != key else _expanded(path, section, key, value)
    try:
        return kind(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise _wrong(path, section, ".".join(map(str, first["loc"])), first["msg"]) from None


def _secret(path: Path, section: str, key: str, variable: object) -> object:
    if isinstance(variable, dict):
        return {name: _secret(path, section, f"{key}.{name}", one) for name, one in variable.items()}
    if not isinstance(variable, str) or not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):  # the secret itself, perhaps
        raise _wrong(path, section, key, "the name of an environment variable (capitals, digits and _)")
    if variable not in os.environ:
        raise _wrong(path, section, key, f"the environment variable {variable} to be set")
    return os.environ[variable]


def _expanded(path: Path, section: str, key: str, value: object) -> object:
    if isinstance(value, dict):
        return dict(_inner(path, section, key, inner, item) for inner, item in value.items())
    if isinstance(value, list):
        return [_expanded(path, section, key, item) for item in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise _wrong(path, section, key, f"the environment variable {match[1]} to be set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)


def _inner(path: Path, section: str, key: str, inner: str, value: object) -> tuple[str, object]:
    """An entry of a table within a section; its `secret_env` names a variable too."""
    within = f"{key}.{inner}"
    if inner == "secret_env":
        return "secret", _secret(path, section, within, value)
    return inner, _expanded(path, section, within, value)


def _seconds(path: Path, key: str, text: object) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", str(text))
    if not match:
        raise _wrong(path, "objectives", key, "a duration such as 30m, 1h or 7d")
    return float(int(match[1]) * UNITS[match[2]])


def _suites(path: Path, section: dict[str, Any]) -> str:
    """`[expectations] directory`, relative to the file. Inside the checkout it is stored relative to that: a worker on
    another host may have its checkout elsewhere. Whether it exists is registration's question: a recovery goes on."""
    for key in section:
        if key != "directory":
            raise _wrong(path, "expectations", key, "a known key (did you mean directory?)")
    return _directory(path, "expectations", "directory", section.get("directory", ""))


def _directory(path: Path, section: str, key: str, given: Any) -> str:
    """Relative to the file that names it, as it is stored."""
    directory = _expanded(path, section, key, given)
    if not isinstance(directory, str):
        raise _wrong(path, section, key, "the path of a directory, relative to this file")
    if not directory:
        return ""
    found = (path.parent / directory).resolve()
    return str(found.relative_to(CHECKOUT) if found.is_relative_to(CHECKOUT) else found)


def _wrong(path: Path, section: str, key: str, expected: str) -> OpsError:
    where = f"[{section}] {key}" if section else key
    return OpsError(f"{path.name}: {where} is wrong", f"expected: {expected}")
