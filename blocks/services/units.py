"""Which units start another one, by systemd's own dependencies (systemd.unit(5))."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

RELATIONS = ("Wants", "Requires", "BindsTo", "Upholds", "OnFailure", "OnSuccess", "Triggers")
"""Each starts its units. `Requisite=` starts none, and `PartOf=` restarts only a unit that runs. They are read from the
unit that has them: their reverse properties (`BoundBy`, `OnFailureOf` …) are missing in older versions."""
PROPERTIES = ",".join(("Id", "ActiveState", "UnitFileState", *RELATIONS))
ENABLED = ("enabled", "enabled-runtime", "generated")
ENDED = ("inactive", "failed")


@dataclass(frozen=True)
class Starter:
    """A unit that starts another one. `causes`: the active or enabled units that lead to its own start, or itself."""

    unit: str
    relation: str
    is_active: bool
    causes: tuple[str, ...]

    @property
    def text(self) -> str:
        """For people, as `app.service (BindsTo=)`."""
        return f"{self.unit} ({self.relation}=)"

    @property
    def is_target(self) -> bool:
        """Most units are enabled by a link that makes a target want them; `systemctl disable` deletes it."""
        return self.unit.endswith(".target")


def find_starters(text: str, unit: str) -> list[Starter]:
    """Find what starts a unit, also indirectly, in the output of `systemctl show --all '*' --property=PROPERTIES`. A
    unit that is neither active nor enabled, and that no such unit starts, starts nothing."""
    units = _parse(text)
    wanting = defaultdict[str, dict[str, str]](dict)
    for name, found in units.items():
        for relation in RELATIONS:
            for wanted in found.get(relation, "").split():
                wanting[wanted].setdefault(name, relation)
    starters = []
    for name, relation in sorted(wanting[unit].items()):
        if name != unit and (causes := _causes(name, unit, units, wanting)):
            starters.append(Starter(name, relation, units[name].get("ActiveState") not in ENDED, causes))
    return starters


def _parse(text: str) -> dict[str, dict[str, str]]:
    blocks = [dict(line.split("=", 1) for line in block.splitlines() if "=" in line) for block in text.split("\n\n")]
    return {block["Id"]: block for block in blocks if "Id" in block}


def _causes(
    name: str, unit: str, units: Mapping[str, Mapping[str, str]], wanting: Mapping[str, Mapping[str, str]]
) -> tuple[str, ...]:
    """The nearest active or enabled units on each way to a unit that is none; `unit` itself causes nothing."""
    causes, seen, rest = set[str](), {unit}, [name]
    while rest:
        one = rest.pop()
        if one in seen:
            continue
        seen.add(one)
        found = units[one]
        if found.get("ActiveState") not in ENDED or found.get("UnitFileState") in ENABLED:
            causes.add(one)
        else:
            rest += wanting.get(one, {})
    return tuple(sorted(causes))
