"""Which version takes a vulnerability away, and that it does, called with the open report (§3.2)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from blocks.environment import Environment
from blocks.places import Application
from flows.application.update_steps import Part, beside, set_node
from flows.application.vulnerability_findings import judge_unanswered
from runbook.errors import OpsError
from runbook.markdown import fenced
from runbook.report import Evidence, Report
from tasks.dependencies import node_packages as node
from tasks.dependencies.advisory import Advisory, Scan, canonical
from tasks.dependencies.node_audit import audit_node, tools_of
from tasks.dependencies.python_audit import audit_python
from tasks.dependencies.python_packages import dependents_of
from tasks.dependencies.python_update import pin_python
from tasks.worktree import Worktree

_VERSION = re.compile(r"\d+(?:\.\d+)*[\w.+-]*")


@dataclass(frozen=True)
class Hole:
    """A package of one part that has the vulnerability, and the version that has it no longer ("" for none)."""

    part: Part
    advisory: Advisory
    safe: str


def find_holes(report: Report, application: Application, wanted: str, seconds: float) -> list[Hole]:
    """Where the vulnerability is, by the audits of both parts.

    Raises:
        OpsError: no package has it, or no audit told.
    """
    scans = dict[Part, Scan]()
    for part in ("backend", "web") if application.web_directory else ("backend",):
        where = Path(application.web_directory if part == "web" else application.python)
        if scan := _audit(report, application, part, where, seconds):
            scans[part] = scan
    holes = [
        Hole(part, one, safe_version(one))
        for part, scan in scans.items()
        for one in scan.found
        if one.is_called(wanted)
    ]
    if not holes:
        told = "; ".join(f"{scan.looked_at} packages of {part} looked at" for part, scan in scans.items())
        raise OpsError(f"no package is known to have {wanted} ({told or 'nothing was looked at'})",
                       "see scan-vulnerabilities for its ids; what is not known there is not known here")  # fmt: skip
    return holes


def safe_version(advisory: Advisory) -> str:
    """The lowest version that fixes it and is newer than every one that is there; "" where none is known."""
    try:
        there = max(Version(one) for one in advisory.versions)
        fixes = [found[0] for text in advisory.fixed for found in [_VERSION.search(text)] if found]
        return min((one for one in fixes if Version(one) > there), key=Version, default="")
    except (InvalidVersion, ValueError):
        return ""


def tell_dependents(report: Report, application: Application, holes: Sequence[Hole], seconds: float) -> None:
    """Who depends on each, as pip and pnpm tell it."""
    for hole in holes:
        name = hole.advisory.package
        try:
            if hole.part == "backend":
                found = ", ".join(dependents_of(Path(application.need("python")), name, seconds)) or "no other package"
                text = f"Required by: {found}"
            else:
                text = node.node_dependents(Path(application.web_directory), name, seconds)
        except OpsError as error:
            report.warn(f"who depends on {name}", error.hint, value=f"not known: {error.message}")
            continue
        report.attach(Evidence(f"Who depends on {name} ({hole.part})", text=fenced(text)))


def apply(application: Application, tree: Worktree, holes: Sequence[Hole], seconds: float) -> None:
    """The safe versions in the worktree's files, lock files included.

    Raises:
        OpsError: they cannot be.
    """
    python = {hole.advisory.package: hole.safe for hole in holes if hole.part == "backend"}
    if python:
        pin_python(application, tree.at(application.source), python, seconds, add=True)
    packages = {hole.advisory.package: hole.safe for hole in holes if hole.part == "web"}
    if packages:
        web = tree.at(Path(application.web_directory))
        direct = {one.name for one in node.list_node(web, seconds)}
        if chosen := {name: safe for name, safe in packages.items() if name in direct}:
            set_node(web, chosen, seconds)
        if inner := [name for name in packages if name not in direct]:  # as far as those that want it allow
            argv = ("update", "--recursive", "--lockfile-only", "--ignore-scripts", "--depth", "100")
            node.pnpm(web, *argv, *inner, seconds=seconds)


def prove_gone(report: Report, env: Environment, tree: Worktree, holes: Sequence[Hole], seconds: float) -> None:
    """Audit again what was installed in the worktree: no answer is no proof."""
    for part in dict.fromkeys(hole.part for hole in holes):
        application = env.application
        where = beside(tree) / "bin" / "python" if part == "backend" else tree.at(Path(application.web_directory))
        scan = _audit(report, application, part, where, seconds)
        names = {canonical(hole.advisory.package) for hole in holes if hole.part == part}
        ids = {one for hole in holes for one in hole.advisory.ids}
        left = [one for one in scan.found if canonical(one.package) in names and ids & set(one.ids)] if scan else []
        value = (
            "not known" if scan is None else f"still there: {left[0].package} {left[0].versions}" if left else "gone"
        )
        report.expect(f"{part}: the vulnerability", scan is not None and not left,
                      "its dependents hold the old version: update them, or override it by hand (pnpm overrides)",
                      value=value, expected="gone by a second audit")  # fmt: skip


def _audit(report: Report, application: Application, part: Part, where: Path, seconds: float) -> Scan | None:
    try:
        if part == "backend":
            return audit_python(application.model_copy(update={"python": str(where)}), seconds)
        return audit_node(where, tools_of(where)[0], False, seconds)
    except OpsError as error:
        judge_unanswered(report, f"{part}: audit", error)
        return None
