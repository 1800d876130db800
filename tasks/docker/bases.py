"""The FROM lines of a Dockerfile, and the end of support of the images that they name."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from runbook.errors import OpsError

RELEASES = Path(__file__).with_name("releases.toml")
_FROM = re.compile(r"(\s*FROM\s+(?:--\S+\s+)*)(\S+)((?:\s+AS\s+(\S+))?\s*)", re.IGNORECASE)
_ARG = re.compile(r"\s*ARG\s+(\w+)=(\S*)\s*", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")


@dataclass(frozen=True)
class Base:
    """One FROM line: `written` as in the file, `reference` with its ARGs filled in; `line` starts at 1."""

    written: str
    reference: str
    line: int

    @property
    def digest(self) -> str:
        """Its pinned digest, sha256:…; "" if it is not pinned."""
        return self.reference.partition("@")[2]

    @property
    def tag(self) -> str:
        """Its tag; `latest` by default."""
        name = self.reference.partition("@")[0]
        return name.rpartition(":")[2] if ":" in name.rpartition("/")[2] else "latest"

    @property
    def repository(self) -> str:
        """The name without tag and digest."""
        return self.reference.partition("@")[0].removesuffix(f":{self.tag}")

    @property
    def named(self) -> str:
        """Repository and tag, without the digest."""
        return f"{self.repository}:{self.tag}"


@dataclass(frozen=True)
class Support:
    """The end of support of a product's release. `ends`: None if it is not announced; `known`: whether the table has
    the release."""

    product: str
    release: str
    ends: date | None
    known: bool
    source: str
    checked: date


def find_bases(dockerfile: str) -> list[Base]:
    """The base images of a Dockerfile, without `scratch` and its own earlier stages.

    https://docs.docker.com/reference/dockerfile/#from

    Raises:
        OpsError: a FROM line cannot be read, or its ARG has no value.
    """
    arguments, stages, found = dict[str, str](), set[str](), list[Base]()
    started = False
    for number, line in enumerate(dockerfile.splitlines(), 1):
        if not started and (argument := _ARG.fullmatch(line)):
            arguments[argument[1]] = argument[2].strip("\"'")
        if not re.match(r"\s*FROM\s", line, re.IGNORECASE):
            continue
        started = True
        match = _FROM.fullmatch(line.partition(" #")[0])
        if not match:
            raise OpsError(f"line {number} cannot be read: {line.strip()[:80]}", "write FROM image AS name in one line")
        reference = _filled(match[2], arguments, number)
        if reference.lower() not in {"scratch", *stages}:
            found.append(Base(match[2], reference, number))
        if match[4]:
            stages.add(match[4].lower())
    return found


def _filled(written: str, arguments: Mapping[str, str], number: int) -> str:
    def value(one: re.Match[str]) -> str:
        found = arguments.get(one[1] or one[3], one[2] or "")
        if not found:
            hint = f"give ARG {one[1] or one[3]} a default"
            raise OpsError(f"line {number} uses {one[0]}, which has no value", hint)
        return found

    return _VARIABLE.sub(value, written)


def replaced(dockerfile: str, base: Base, by: str) -> str:
    """The Dockerfile with another image in one FROM line; the rest is unchanged."""
    lines = dockerfile.splitlines(keepends=True)
    head, written, rest = lines[base.line - 1].partition(base.written)
    if not written:
        raise OpsError(f"line {base.line} does not name {base.written}", "check the Dockerfile")
    lines[base.line - 1] = head + by + rest
    return "".join(lines)


def read_support(base: Base) -> list[Support]:
    """The support of each part that an image's name shows: python:3.11-slim-bookworm is Python 3.11 and Debian
    bookworm. Empty if no part is in the tables."""
    tables = tomllib.loads(RELEASES.read_text(encoding="utf-8"))
    product, words = base.repository.rpartition("/")[2], base.tag.split("-")
    found = []
    if product in tables:
        found.append(_support(product, words[0], tables[product]))
    if product != "debian":
        found += [_support("debian", word, tables["debian"]) for word in words if word in tables["debian"]["ends"]]
    alpine = [word.removeprefix("alpine") for word in words if word.startswith("alpine")] if product != "alpine" else []
    return found + [_support("alpine", release, tables["alpine"]) for release in alpine if release]


def support_of(product: str, version: str) -> Support | None:
    """The support of a product's version (`postgres`, `18.6`); None if no table has the product."""
    tables = tomllib.loads(RELEASES.read_text(encoding="utf-8"))
    return _support(product, version, tables[product]) if product in tables else None


def _support(product: str, tag: str, table: Mapping[str, Any]) -> Support:
    ends: Mapping[str, str] = table["ends"]
    release = next((one for one in sorted(ends, key=len, reverse=True) if tag == one or tag.startswith(f"{one}.")), "")
    day = date.fromisoformat(ends[release]) if ends.get(release) else None
    return Support(product, release or tag, day, bool(release), table["source"], table["checked"])
