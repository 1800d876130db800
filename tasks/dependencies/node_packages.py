"""Packages of the web application's workspace, read by pnpm from its lock file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from runbook import shell
from runbook.errors import OpsError, excerpt
from runbook.kinds import action, probe
from tasks.application.programs import NODE_VARIABLES, answer, find_program, parsed
from tasks.dependencies.form import known_form
from tasks.dependencies.node_audit import PATIENCE
from tasks.dependencies.versions import Outdated, Package

MANIFESTS = ("package.json", "pnpm-lock.yaml", "pnpm-workspace.yaml", ".npmrc", ".pnpmfile.cjs")
_KINDS = ("dependencies", "devDependencies", "optionalDependencies")
_ANY = range(256)


def pnpm(web: Path, *arguments: str, seconds: float, accepted: Sequence[int] = (0,)) -> shell.Completed:
    """Run a pnpm command in a workspace, with one attempt per request.

    Raises:
        OpsError: pnpm failed, hung or is not installed.
    """
    find_program("node")
    return answer(
        [find_program("pnpm"), *arguments],
        web,
        seconds=seconds,
        accepted=accepted,
        environment={**PATIENCE, "CI": "true"},
        inherit=NODE_VARIABLES,
    )


def require_pnpm_lock(web: Path) -> None:
    """Raises OpsError if the workspace has no pnpm lock file."""
    if not (web / "pnpm-lock.yaml").is_file():
        raise OpsError(f"{web} has no pnpm-lock.yaml", "create one (pnpm install --lockfile-only) and commit it")


@probe
def list_node(web: Path, seconds: float) -> tuple[Package, ...]:
    """The direct dependencies of every package of the workspace, in the versions of the lock file.

    Raises:
        OpsError: pnpm gave no answer.
    """
    require_pnpm_lock(web)
    argv = ("list", "--recursive", "--depth", "0", "--json", "--lockfile-only")
    places: dict[tuple[str, str], list[str]] = {}
    members = parsed("pnpm list", pnpm(web, *argv, seconds=seconds).stdout, list)
    with known_form("pnpm list"):
        for member in members:
            for name, found in (item for kind in _KINDS for item in (member.get(kind) or {}).items()):
                places.setdefault((name, str(found.get("version", ""))), []).append(str(member.get("name", "")))
    return tuple(Package(name, version, tuple(where)) for (name, version), where in sorted(places.items()))


@probe
def find_outdated_node(web: Path, seconds: float) -> tuple[Outdated, ...]:
    """Newer versions of the workspace's direct dependencies.

    Raises:
        OpsError: the registry or pnpm gave no answer.
    """
    require_pnpm_lock(web)
    done = pnpm(web, "outdated", "--recursive", "--format", "json", seconds=seconds, accepted=(0, 1))
    rows: Mapping[str, Any] = parsed("pnpm outdated", done.stdout, dict)
    found = []
    with known_form("pnpm outdated"):
        for name, row in rows.items():
            version = str(
                row.get("current") or row.get("wanted") or ""
            )  # without current its packages are not installed
            if version != row["latest"]:
                places = tuple(str(one.get("name", "")) for one in row.get("dependentPackages") or [])
                found.append(Outdated(name, version, str(row["latest"]), places))
    return tuple(found)


@probe
def find_peer_problems(web: Path, seconds: float) -> tuple[str, ...]:
    """Peer dependencies that are missing or have the wrong version, in every package of the workspace.

    Raises:
        OpsError: the registry or pnpm gave no answer.
    """
    with copied(web) as copy:
        argv = ("install", "--resolution-only", "--no-frozen-lockfile", "--ignore-scripts", "--reporter=ndjson")
        done = pnpm(copy, *argv, seconds=seconds, accepted=_ANY)
    events = []
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    records = [one for one in events if isinstance(one, dict)]
    with known_form("pnpm install"):
        issues = [item for one in records for item in (one.get("issuesByProjects") or {}).items()]
        problems = [text for place, found in issues for text in _peers(place, found)]
    resolved = any(one.get("stage") == "resolution_done" for one in records)
    if not problems and (done.code or not resolved):
        why = next((str((one.get("err") or {}).get("message")) for one in records if one.get("err")), "no message")
        raise OpsError(
            f"pnpm could not check peer dependencies: {excerpt(why, 200)}", "check that the registry can be reached"
        )
    return tuple(dict.fromkeys(problems))


def _peers(place: str, issues: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("missing", "bad"):
        for peer, found in (issues.get(kind) or {}).items():
            for one in found:
                if not one.get("optional"):
                    by = " of ".join(f"{parent['name']} {parent['version']}" for parent in reversed(one["parents"]))
                    has = f"has {one['foundVersion']}" if one.get("foundVersion") else "has none"
                    yield f"{place}: {by} requires {peer} {one.get('wantedRange', '')} but {has}"


@probe
def find_node_lock_problem(web: Path, seconds: float) -> str:
    """How pnpm-lock.yaml differs from the workspace's package.json files; "" if it matches.

    Raises:
        OpsError: pnpm gave no answer.
    """
    require_pnpm_lock(web)
    with copied(web) as copy:
        argv = ("install", "--frozen-lockfile", "--lockfile-only", "--ignore-scripts", "--loglevel", "info")
        done = pnpm(copy, *argv, seconds=seconds, accepted=_ANY)
    if not done.code and "Done in" in done.stdout:
        return ""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if any("ERR_PNPM_OUTDATED_LOCKFILE" in line for line in lines):
        heads = [number for number, line in enumerate(lines) if "specifiers in the lockfile" in line]
        return " ".join(lines[heads[0] + 1 :] if heads else lines[:2])[:300] or lines[0]
    raise OpsError(
        f"pnpm could not judge the lock file: {excerpt(' / '.join(lines[-3:]), 200)}", "run pnpm install by hand"
    )


@action
def install_node(web: Path, seconds: float) -> Path:
    """Install a worktree's packages from its lock file, which proves that the file matches; returns the workspace.

    Raises:
        OpsError: pnpm failed.
    """
    pnpm(web, "install", "--frozen-lockfile", seconds=seconds)
    return web


@contextlib.contextmanager
def copied(web: Path) -> Iterator[Path]:
    """A temporary copy of the workspace's manifests and lock file, which pnpm may change."""
    with tempfile.TemporaryDirectory(prefix="ops-pnpm-") as folder:
        for directory, names, files in os.walk(web):
            names[:] = [name for name in names if name not in ("node_modules", ".git", "dist", ".next", ".turbo")]
            target = Path(folder, Path(directory).relative_to(web))
            for name in (name for name in files if name in MANIFESTS or name.endswith(".patch")):
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(Path(directory, name), target / name)
        yield Path(folder)


def node_versions(web: Path, name: str, seconds: float) -> list[str]:
    """Every version of a package in the registry.

    Raises:
        OpsError: the registry gave no answer.
    """
    done = pnpm(web, "view", name, "versions", "--json", seconds=seconds)
    with known_form("pnpm view"):
        content = json.loads(done.stdout)
    return [str(one) for one in (content if isinstance(content, list) else [content])]


def node_dependents(web: Path, name: str, seconds: float) -> str:
    """The output of `pnpm why`; "" if the packages are not installed.

    Raises:
        OpsError: pnpm gave no answer.
    """
    return pnpm(web, "why", "--recursive", name, seconds=seconds, accepted=(0, 1)).stdout.strip()
