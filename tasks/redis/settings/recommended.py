"""The manual's Redis settings, and the comparison of a value with them by effect, not by text (§2.3, §2.4).

https://valkey.io/topics/valkey.conf/
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from runbook.errors import OpsError
from runbook.units import size

Kind = Literal["rules", "yes or no", "fsync", "number", "bytes", "name"]
Name = Literal[
    "save",
    "stop-writes-on-bgsave-error",
    "rdbcompression",
    "rdbchecksum",
    "dbfilename",
    "dir",
    "appendonly",
    "appendfilename",
    "appendfsync",
    "auto-aof-rewrite-percentage",
    "auto-aof-rewrite-min-size",
    "no-appendfsync-on-rewrite",
    "maxclients",
    "timeout",
    "maxmemory",
]
"""The manual's settings, and the one that its appendix sets for a time: the choices of a form."""

DEFAULTS = {
    "save": "3600 1 300 100 60 10000",
    "stop-writes-on-bgsave-error": "yes",
    "rdbcompression": "yes",
    "rdbchecksum": "yes",
    "dbfilename": "dump.rdb",
    "dir": "./",
    "appendonly": "no",
    "appendfilename": "appendonly.aof",
    "appenddirname": "appendonlydir",
    "appendfsync": "everysec",
    "no-appendfsync-on-rewrite": "no",
    "auto-aof-rewrite-percentage": "100",
    "auto-aof-rewrite-min-size": "67108864",
    "logfile": "",
    "disable-thp": "yes",
}
"""The settings of persistence, with their defaults."""
LIMITS = {"maxclients": "10000", "timeout": "0", "maxmemory": "0"}
"""The settings of §2.4, and the one that the manual's appendix sets for a time."""


class SettingRule(NamedTuple):
    """`save <seconds> <changes>`: a save after that many seconds, if there were that many changes."""

    seconds: int
    changes: int

    def __str__(self) -> str:
        return f"save {self.seconds} {self.changes}"


@dataclass(frozen=True)
class RecommendedRedisSettings:
    """A setting of the manual: its value for CONFIG SET, its section, and what is wrong with other values. `shown`:
    which values are accepted, for people."""

    name: str
    value: str
    section: str
    kind: Kind
    why: str = ""
    shown: str = ""

    def __str__(self) -> str:
        return self.shown or self.value


_GROWS = "the AOF grows for longer than the manual allows before it is rewritten"
_NAME = "any name: the server reports its files"
RECOMMENDED = (
    RecommendedRedisSettings("save", "900 1 300 10 60 10000", "§2.3", "rules", "no rule saves as early as"),
    RecommendedRedisSettings(
        "stop-writes-on-bgsave-error",
        "yes",
        "§2.3",
        "yes or no",
        "writes continue while saves fail, and nobody notices",
    ),
    RecommendedRedisSettings("rdbcompression", "yes", "§2.3", "yes or no", "the RDB is larger than necessary"),
    RecommendedRedisSettings("rdbchecksum", "yes", "§2.3", "yes or no", "a damaged RDB would be loaded unnoticed"),
    RecommendedRedisSettings("dbfilename", "dump.rdb", "§2.3", "name", shown=f"dump.rdb ({_NAME})"),
    RecommendedRedisSettings(
        "dir",
        "/var/lib/redis",
        "§2.3",
        "name",
        "it differs from [redis] data_directory",
        "/var/lib/redis, or [redis] data_directory",
    ),
    RecommendedRedisSettings("appendonly", "yes", "§2.3", "yes or no", "a kill loses every change since the last save"),
    RecommendedRedisSettings("appendfilename", "appendonly.aof", "§2.3", "name", shown=f"appendonly.aof ({_NAME})"),
    RecommendedRedisSettings(
        "appendfsync",
        "everysec",
        "§2.3",
        "fsync",
        "a power cut loses data that the kernel has not written",
        "everysec, or always",
    ),
    RecommendedRedisSettings("auto-aof-rewrite-percentage", "100", "§2.3", "number", _GROWS, "100 or less"),
    RecommendedRedisSettings(
        "auto-aof-rewrite-min-size", "64mb", "§2.3", "bytes", _GROWS, "64mb (67.1 MB), or the size of the data"
    ),
    RecommendedRedisSettings(
        "no-appendfsync-on-rewrite",
        "no",
        "default",
        "yes or no",
        "during a rewrite there is no fsync: a crash can lose 30 s",
        "no (the default)",
    ),
    RecommendedRedisSettings(
        "maxclients", "10000", "§2.4", "number", "fewer clients than in the manual", "10000 or more"
    ),
    RecommendedRedisSettings("timeout", "300", "§2.4", "number", "idle connections stay open", "300 or less, not 0"),
)
BY_NAME: Mapping[str, RecommendedRedisSettings] = {one.name: one for one in RECOMMENDED}
MAXMEMORY = "maxmemory"
KINDS: Mapping[str, Kind] = {**{one.name: one.kind for one in RECOMMENDED}, MAXMEMORY: "bytes"}
# The persistence check reports all of these but the names.
OF_PERSISTENCE = tuple(one.name for one in RECOMMENDED if one.section != "§2.4" and one.kind != "name")
MANUAL_RULES = (SettingRule(900, 1), SettingRule(300, 10), SettingRule(60, 10000))
MANUAL_PERCENTAGE = 100
MANUAL_MIN_BYTES = 64 * 1024**2
_NAMES = frozenset({"dir", "dbfilename", "appendfilename", "appenddirname", "logfile"})
_FSYNC = ("always", "everysec", "no")


@dataclass(frozen=True)
class JudgedSetting:
    """One setting: its running value, the manual's, and whether it is accepted; if not, `why`."""

    name: str
    running: str
    manual: str
    ok: bool
    why: str


def judged(name: str, value: str, *, dataset_bytes: int = 0, directory: str = "") -> JudgedSetting:
    """Compare a value with the manual's. `directory`: the environment's data directory, "": unknown."""
    manual = BY_NAME[name]
    running, ok, why = value, False, manual.why
    match name:
        case "save":
            rules = parse_rules(value)
            lost = [rule for rule in MANUAL_RULES if not covers(rules, rule)]
            running = " ".join(f"{rule.seconds} {rule.changes}" for rule in rules)
            ok, why = not lost, f"{why} {', '.join(map(str, lost))}"
        case "appendfsync":
            ok = value != "no"
        case "auto-aof-rewrite-percentage":
            ok = 0 < int(value) <= MANUAL_PERCENTAGE
            why = why if int(value) else "the AOF is never rewritten: it grows until the disk is full"
        case "auto-aof-rewrite-min-size":
            running, ok = size(int(value)), int(value) <= max(MANUAL_MIN_BYTES, dataset_bytes)
        case "maxclients":
            ok = int(value) >= int(manual.value)
        case "timeout":
            ok = 0 < int(value) <= int(manual.value)
        case "dir":
            ok = not directory or not value or Path(value).resolve() == Path(directory).resolve()
        case "dbfilename" | "appendfilename":
            ok = True
        case _:
            ok = value == manual.value
    return JudgedSetting(name, running, str(manual), ok, why)


def parse_rules(text: str) -> tuple[SettingRule, ...]:
    """`900 1 300 10`, as CONFIG GET save answers it."""
    numbers = [int(word) for word in text.split()]
    return tuple(SettingRule(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True))


def covers(rules: Sequence[SettingRule], wanted: SettingRule) -> bool:
    """Whether one of the rules saves no later than the wanted one."""
    return any(rule.seconds <= wanted.seconds and rule.changes <= wanted.changes for rule in rules)


def normal(name: str, value: str) -> str:
    """A value as CONFIG GET returns it: `64mb` is 67108864, `Yes` is yes; names are unchanged."""
    kind = KINDS.get(name)
    if kind == "bytes":
        found = re.fullmatch(r"(\d+)([kmgt]?)(b?)", value.strip().lower())
        return str(int(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " ")) if found else value
    if kind in ("rules", "number"):
        return " ".join(str(int(word)) if word.isdigit() else word for word in value.split())
    return value if name in _NAMES else value.lower()


def shown(name: str, value: str) -> str:
    """A value for people: `2gb`, or `off` for an empty one."""
    if KINDS.get(name) == "bytes" and value.isdigit():
        for power, unit in ((3, "gb"), (2, "mb"), (1, "kb")):
            if int(value) and int(value) % 1024**power == 0:
                return f"{int(value) // 1024**power}{unit}"
    return value or "off"


def same(name: str, first: str, second: str) -> bool:
    """Whether two texts mean the same value."""
    if name == "save":
        return sorted(parse_rules(first)) == sorted(parse_rules(second))
    return normal(name, first) == normal(name, second)


def require_possible(name: str, value: str) -> None:
    """Refuse an invalid value before it is sent to the server.

    Raises:
        OpsError: the value is invalid.
    """
    patterns: Mapping[Kind, str] = {
        "rules": r"(\d+ \d+( \d+ \d+)*)?",
        "yes or no": "yes|no",
        "fsync": "|".join(_FSYNC),
        "number": r"\d+",
        "bytes": r"(?i)\d+([kmgt]b?|b?)",
        "name": r".+",
    }
    if not re.fullmatch(patterns[KINDS[name]], value):
        example = BY_NAME[name].value if name in BY_NAME else "2gb"
        raise OpsError(f"“{value[:40]}” is not a valid value of {name}", f"write for example {name} = {example}")
