"""Mistakes in an environment's TOML that its types do not show: literal secrets, relative paths, addresses, names of
roles, two things in one directory."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin
from urllib.parse import urlsplit

from prefect.blocks.core import Block
from pydantic import BaseModel

from blocks.config.secrets import PASSWORD_IN_URL, is_secret
from blocks.services.service import ROLES
from runbook.masking import without_logins

KINDS = ("postgres", "redis", "files", "cluster", "wal", "prefect")
STORES = ("backups", "copies")
DATA = ("postgres", "standby", "redis")
NUMBERED = re.compile(r"(?:redis-replica|sentinel)(?:-\d+)?")
"""Roles of which there may be several."""
HIDDEN = "a literal secret (not shown)"
SHOWN_CHARACTERS = 60
PORTS = range(1, 65536)
_RELATIVE = {("expectations", "directory")}
"""To the TOML."""
_PATHS = ("reports", "programs", "spool", "webroot", "repository", "env_file", "checkout")
_SECTION_PATHS = {"logs": ("app", "audit", "backup", "rotation"), "endpoint": ("file",)}


@dataclass(frozen=True)
class Mistake:
    """One wrong value: where it is, and what is expected there."""

    section: str
    key: str
    found: str
    expected: str


def shown(value: object) -> str:
    """A value as people read it in a message, cut; a password in an address is masked."""
    text = without_logins(f"{value}")
    text = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
    return f"“{text}”" if isinstance(value, str) else text


def near(word: str, known: list[str]) -> str:
    """` (did you mean database?)`, or the names that can stand there."""
    if found := difflib.get_close_matches(word, known, 1):
        return f" (did you mean {found[0]}?)"
    return f": {', '.join(known)}" if known else ""


def find_mistakes(section: str, kind: type[Block], values: Mapping[str, Any]) -> Iterator[Mistake]:
    """Those of one table, as it is written: before variables are put in."""
    for key, value in values.items():
        if is_secret(kind, key) and value != "":
            name = f"{key}_env"
            yield Mistake(
                section, key, HIDDEN, f"{name} = the name of an environment variable: secrets come from {name}"
            )
    for key, text in _texts(values):
        if section == "approval" and key.endswith(".secret"):
            expected = f"{key}_env = the name of an environment variable: secrets come from {key}_env"
            yield Mistake(section, key, HIDDEN, expected)
        if PASSWORD_IN_URL.search(text):
            yield Mistake(section, key, shown(text), "an address without a password: secrets come from a key in _env")
    for key, value in values.items():
        if isinstance(value, str) and value and not value.startswith("${"):
            yield from _places(section, key, value)
            yield from _addresses(section, key, value)
        if isinstance(value, list) and key in ("sentinels", "replicas"):
            for one in value:
                yield from _nodes(section, key, str(one))


def _texts(content: object, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value, key)
    elif isinstance(content, str):
        yield key, content


def _places(section: str, key: str, value: str) -> Iterator[Mistake]:
    place = section in STORES and key in KINDS
    path = key.endswith(("directory", "_file")) or key in (*_PATHS, *_SECTION_PATHS.get(section, ()))
    if (section, key) in _RELATIVE or not (place or path) or value.startswith("/"):
        return
    if place and value.startswith("s3://"):
        return
    expected = "an absolute path, as /var/backups/app" + (", or s3://bucket/prefix" if place else "")
    yield Mistake(section, key, shown(value), expected)


def _addresses(section: str, key: str, value: str) -> Iterator[Mistake]:
    if key != "url" and not key.endswith("_url"):
        return
    if "${" in value:  # of a variable, perhaps its port
        return
    if not _is_address(value):
        yield Mistake(section, key, shown(value), "an address, as http://127.0.0.1:8000")


def _is_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _nodes(section: str, key: str, value: str) -> Iterator[Mistake]:
    host, _, port = value.rpartition(":")
    if "${" not in value and not (host and port.isdecimal() and int(port) in PORTS):
        yield Mistake(section, key, shown(value), "host:port, as redis-2.example.com:26379")


def find_role_mistakes(services: Mapping[str, Any], sections: Mapping[str, Mapping[str, Any]]) -> Iterator[Mistake]:
    """Roles in [services] names that no runbook knows. [postgres], [wal] and others may name their own."""
    own = [str(sections.get(part, {}).get(key, "")) for part, key in _OWN_ROLES]
    own += list(sections.get("prefect_server", {}).get("roles", ("prefect-api", "prefect-services")))
    known = list(dict.fromkeys([*ROLES, *filter(None, own), "redis-replica", "sentinel"]))
    names = services.get("names", {})
    for role in names if isinstance(names, Mapping) else ():
        if role not in known and not NUMBERED.fullmatch(role):
            expected = f"a known role{near(role, [name for name in known if not name.startswith('prefect')])}"
            yield Mistake("services", f"names.{role}", "an unknown role", expected)
    hosts = services.get("hosts", {})
    for role in hosts if isinstance(hosts, Mapping) else ():
        if isinstance(names, Mapping) and role not in names:
            yield Mistake(
                "services", f"hosts.{role}", "an unknown role", f"a role of [services.names]{near(role, list(names))}"
            )


_OWN_ROLES = (("postgres", "service"), ("standby", "service"), ("wal", "service"), ("wal", "archiver"))


def find_place_mistakes(parts: Mapping[str, Block]) -> Iterator[Mistake]:
    """Two kinds of backups in one directory, copies where the backups are, backups in a data directory."""
    taken: dict[str, str] = {}
    data = {part: Path(getattr(parts[part], "data_directory")) for part in DATA if part in parts}  # noqa: B009
    for section in STORES:
        for kind in KINDS if section in parts else ():
            place = str(getattr(parts[section], kind))
            if not place:
                continue
            name, own = f"[{section}] {kind}", place.rstrip("/")
            if other := taken.get(own):
                yield Mistake(section, kind, shown(place), f"a separate directory: {other} uses this one")
            taken[own] = name
            for part, directory in data.items():
                if not place.startswith("s3://") and Path(place).is_relative_to(directory):
                    yield Mistake(section, kind, shown(place), f"a directory outside of [{part}] data_directory")


def keys_of(kind: object, path: tuple[int | str, ...]) -> list[str]:
    """The keys that a nested table can have: `path` leads to one of them from a block's own field."""
    found = kind
    for step in path[:-1]:
        if isinstance(found, type) and issubclass(found, BaseModel):
            field = found.model_fields.get(str(step))
            found = field.annotation if field else None
        else:
            found = (get_args(found) or (None,))[-1 if get_origin(found) is dict else 0]
    return list(found.model_fields) if isinstance(found, type) and issubclass(found, BaseModel) else []
