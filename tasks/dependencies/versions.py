"""The level of an update: patch, minor or major."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from packaging.version import InvalidVersion, Version

Level = Literal["patch", "minor", "major"]
LEVELS: tuple[Level, ...] = ("patch", "minor", "major")


@dataclass(frozen=True)
class Package:
    """An installed package. `places`: the workspace's packages that require it; empty for Python."""

    name: str
    version: str
    places: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outdated:
    """A package with a newer version."""

    name: str
    version: str
    newest: str
    places: tuple[str, ...] = ()


def step(version: str, newer: str) -> Level | None:
    """The first of the three numbers that differs; also for 0.x, whose minor versions often break compatibility."""
    try:
        old, new = Version(version).release, Version(newer).release
    except InvalidVersion:
        return None
    for level, place in (("major", 0), ("minor", 1)):
        if (old[place] if place < len(old) else 0) != (new[place] if place < len(new) else 0):
            return level  # type: ignore[return-value]
    return "patch"


def newest_within(version: str, known: Iterable[str], level: Level) -> str:
    """The newest version within `level` that is no pre-release; "" if none is newer."""
    best, text = _version(version), ""
    if best is None:
        return ""
    for one in known:
        found = _version(one)
        if found is None or found.is_prerelease or found <= best:
            continue
        level_of = step(version, one)
        if level_of and LEVELS.index(level_of) <= LEVELS.index(level):
            best, text = found, one
    return text


def newest_by_level(one: Outdated, known: Iterable[str]) -> tuple[str, str, str]:
    """The newest patch, minor and major version; each "" if the level before has the same one."""
    versions = [*known, one.newest]
    patch, minor, major = (newest_within(one.version, versions, level) for level in LEVELS)
    if not major:  # versions without numbers
        return "", "", one.newest
    return patch, minor if minor != patch else "", major if major != (minor or patch) else ""


def _version(text: str) -> Version | None:
    try:
        return Version(text)
    except InvalidVersion:
        return None
