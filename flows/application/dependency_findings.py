"""How what is known of the application's packages is judged, called with the open report (§3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from blocks.places import Application
from runbook.errors import OpsError
from runbook.kinds import Pending
from runbook.report import Report, Status
from tasks.dependencies.python_packages import Newer
from tasks.dependencies.requirements import out_of_step, read_requirements
from tasks.dependencies.versions import LEVELS, Level, Outdated, Package, newest_by_level

T = TypeVar("T")
Known = Callable[[str, str], Iterable[str]]
MOST = 5


def answered(report: Report, what: str, pending: Pending[T], nothing: T) -> T:
    """Its answer; without one it is told, and `nothing` goes on."""
    try:
        return pending.result()
    except OpsError as error:
        report.warn(what, error.hint, value=f"not known: {error.message}", expected="an answer")
        return nothing


def judge_python(
    report: Report,
    listed: Pending[tuple[Package, ...]],
    outdated: Pending[Newer],
    conflicts: Pending[tuple[str, ...]],
) -> list[tuple[str, Outdated]]:
    """Inventory and conflicts; returns what is outdated."""
    packages = answered(report, "Python: installed packages", listed, ())
    report.table("Python packages", ("package", "version"), [(one.name, one.version) for one in packages])
    report.fact("Python packages", len(packages) or "not known")
    newer = answered(report, "Python: outdated packages", outdated, Newer((), ()))
    if newer.not_known:
        report.warn("Python: newer versions", "see that pip's index can be reached; these may be outdated too",
                    value=f"not known of {len(newer.not_known)}: {_few(newer.not_known)}")  # fmt: skip
    _judge_none(report, "Python: conflicts", conflicts, "pip installs what is required by: pip install --upgrade")
    return [("Python", one) for one in newer.found]


def judge_python_lock(report: Report, application: Application) -> None:
    """Whether the lock file gives what the requirement files want."""
    backend = application.source
    if not application.requirements_lock:
        report.fact("Python lock file", "none is named in [application] requirements_lock")
        return
    try:
        wanted = read_requirements([backend / name for name in application.requirements])
        problems = out_of_step(wanted, read_requirements([backend / application.requirements_lock]))
    except OpsError as error:
        report.warn("Python: lock file", error.hint, value=f"not known: {error.message}")
        return
    report.expect("Python: lock file", not problems, "make it anew from its manifests, and commit it",
                  value=f"out of step: {_few(problems)}" if problems else "in step",
                  otherwise=Status.WARN)  # fmt: skip


def judge_node(
    report: Report,
    listed: Pending[tuple[Package, ...]],
    outdated: Pending[tuple[Outdated, ...]],
    peers: Pending[tuple[str, ...]],
    lock: Pending[str],
) -> list[tuple[str, Outdated]]:
    """Inventory, peers and lock file; returns what is outdated."""
    packages = answered(report, "node: packages", listed, ())
    rows = [(one.name, one.version, ", ".join(one.places)) for one in packages]
    report.table("node packages", ("package", "version", "wanted by"), rows)
    report.fact("node packages", f"{len(packages)} wanted directly" if packages else "not known")
    _judge_none(report, "node: peers", peers, "install the peer in the version that is wanted, or update who wants it")
    problem = answered(report, "node: lock file", lock, None)
    if problem is not None:
        report.expect("node: lock file", not problem, "pnpm install --lockfile-only, and commit pnpm-lock.yaml",
                      value=f"out of step: {problem[:200]}" if problem else "in step",
                      otherwise=Status.WARN)  # fmt: skip
    return [("node", one) for one in answered(report, "node: outdated packages", outdated, ())]


def tell_outdated(report: Report, outdated: Sequence[tuple[str, Outdated]], known: Known) -> str:
    """The newest version of each level, and one finding for a level; returns it in a sentence. The tools tell the very
    newest only: behind a major version there may be a patch that is wanted."""
    rows, missed, counted = [], [], Counter[Level]()
    for of, one in sorted(outdated, key=lambda item: (item[0], item[1].name)):
        try:
            found = newest_by_level(one, known(of, one.name))
        except OpsError:
            missed.append(one.name)
            found = newest_by_level(one, ())
        rows.append((one.name, one.version, *found, of, ", ".join(one.places)))
        counted.update(level for level, version in zip(LEVELS, found, strict=True) if version)
    report.table("Outdated", ("package", "installed", "patch", "minor", "major", "of", "wanted by"), rows)
    if missed:
        report.warn("versions before the newest", "see that the index and the registry can be reached",
                    value=f"not known of {len(missed)}: {_few(missed)}")  # fmt: skip
    for place, level in enumerate(LEVELS, 2):
        names = [f"{row[0]} {row[1]} → {row[place]}" for row in rows if row[place]]
        if level == "major":  # to be decided, not to be hurried
            report.fact("major versions", f"{len(names)}: {_few(names)}" if names else "none")
            continue
        report.expect(f"outdated by a {level} version", not names, f"update-dependencies with level={level}",
                      value=f"{len(names)}: {_few(names)}" if names else "none", otherwise=Status.WARN)  # fmt: skip
    told = ", ".join(f"{counted[level]} {level}" for level in LEVELS if counted[level])
    return f"newer versions: {told}" if told else "nothing is known to be outdated"


def _judge_none(report: Report, what: str, pending: Pending[tuple[str, ...]], hint: str) -> None:
    try:
        problems = pending.result()
    except OpsError as error:
        report.warn(what, error.hint, value=f"not known: {error.message}", expected="an answer")
        return
    report.expect(what, not problems, hint, value=f"{len(problems)}: {_few(problems)}" if problems else "none",
                  otherwise=Status.WARN)  # fmt: skip


def _few(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - MOST} more" if len(texts) > MOST else ""
    return "; ".join(texts[:MOST]) + more
