"""pip's requirement files: read them, compare them with a lock file, change a pin."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from runbook.errors import OpsError
from tasks.dependencies.advisory import canonical

_PIN = re.compile(r"(?P<head>\s*(?P<name>[A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*={2,3}\s*)(?P<version>[^\s;#\\]+)")
_HASH = re.compile(r"\s*--hash=\S+")


@dataclass(frozen=True)
class WantedPackage:
    """One requirement. `exact`: its pinned version, "" for a range."""

    requirement: Requirement
    file: Path

    @property
    def name(self) -> str:
        return canonical(self.requirement.name)

    @property
    def exact(self) -> str:
        pins = [one.version for one in self.requirement.specifier if one.operator in ("==", "===")]
        return pins[0] if len(pins) == 1 and "*" not in pins[0] else ""


def read_requirements(files: Sequence[Path]) -> list[WantedPackage]:
    """The requirements of these files; options (-r, -e, --index-url …) are ignored.

    Raises:
        OpsError: a file cannot be read, or a line is no requirement.
    """
    found = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise OpsError(
                f"{file} cannot be read: {type(error).__name__}",
                "correct [application] requirements, requirements_lock",
            ) from None
        for line in text.replace("\\\n", " ").splitlines():
            wanted = _HASH.sub("", re.sub(r"(^|\s)#.*", "", line)).strip()
            if not wanted or wanted.startswith("-"):
                continue
            try:
                found.append(WantedPackage(Requirement(wanted), file))
            except InvalidRequirement:
                raise OpsError(f"{file.name}: “{wanted[:60]}” is no requirement", "correct the line") from None
    return found


def out_of_step(wanted: Sequence[WantedPackage], lock: Sequence[WantedPackage]) -> list[str]:
    """How a lock file differs from the requirements."""
    pins = {one.name: one.exact for one in lock}
    problems = []
    for one in wanted:
        if one.requirement.marker and not one.requirement.marker.evaluate():
            continue
        pin = pins.get(one.name)
        if not pin:
            problems.append(f"{one.requirement.name} is not in it")
        elif not one.requirement.specifier.contains(pin, prereleases=True):
            problems.append(
                f"it has {one.requirement.name} {pin}, but {one.file.name} requires {one.requirement.specifier}"
            )
    return problems


def pin(file: Path, name: str, version: str) -> bool:
    """Change the pin of a package, without its hashes. Returns whether the file had a pin of it."""
    lines, changed, dropping = [], False, False
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if dropping:
            dropping = line.rstrip().endswith("\\")
            if line.lstrip().startswith("--hash="):
                continue
        found = _PIN.match(line)
        if found and canonical(found["name"]) == canonical(name):
            rest = line[found.end() :]
            dropping = rest.rstrip().endswith("\\")
            rest = _HASH.sub("", rest).rstrip().removesuffix("\\").rstrip()
            line, changed = f"{found['head']}{version}{rest}\n", True
        lines.append(line)
    if changed:
        file.write_text("".join(lines), encoding="utf-8")
    return changed
