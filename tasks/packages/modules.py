"""Reinstall node_modules of a pnpm workspace from its lock file: staged, proven, swapped by renames (§3.1).

Names alone show the state of a killed run. `.<web>.ops-reinstall` next to the workspace has the staged packages.
`node_modules.ops-superseded` are the old ones. The file `proven` in the former means that the old ones can be deleted.

Source: https://pnpm.io/cli/install, https://pnpm.io/cli/list
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, VerificationFailed
from runbook.failpoint import failpoint
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.application.programs import NODE_VARIABLES, answer, find_program, parsed
from tasks.application.worktree import git, packages_of
from tasks.packages.users import users_of

REINSTALL = "reinstall"
SUPERSEDED = "node_modules.ops-superseded"
PROVEN = "proven"
LOCK = "pnpm-lock.yaml"
NODE = ("node", "next")  # names of Node.js processes


@dataclass(frozen=True)
class Installed:
    """The number of direct dependencies that are proven to have the lock file's versions."""

    dependencies: int
    seconds: float = 0.0


def staging_of(web: Path) -> Path:
    """The staging directory, on the workspace's file system: packages are renamed, not copied."""
    return web.parent / f".{web.name}.ops-reinstall"


@probe
def read_bytes(web: Path) -> int:
    """The size of its node_modules in bytes; a file with several hard links counts once."""
    sizes = dict[int, int]()
    for top in packages_of(web):
        for folder, _, files in os.walk(top):
            for name in files:
                status = Path(folder, name).lstat()
                sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


def _act(web: Path) -> Act:
    return Act(REINSTALL, str(web))


@action(of=_act, idempotent=True)
def settle_modules(web: Path) -> str:
    """Finish or revert an earlier run: restore the old packages, or delete them if the new ones are proven. Returns
    what was done, "" for nothing.

    Raises:
        OpsError: a process that started before the proof still uses the old packages.
    """
    staging, old = staging_of(web), _superseded(web)
    proven = (staging / PROVEN).exists()
    if not staging.exists() and not old:
        return ""
    if proven:
        if late := users_of(web, NODE, before=(staging / PROVEN).stat().st_mtime):
            raise OpsError(
                f"packages from before the last reinstallation are in use: {', '.join(late[:5])}",
                "restart these processes, then run this again",
            )
        _remove_old(web)
        return "deleted the old packages of an earlier run"
    restore_old(web)
    shutil.rmtree(staging, ignore_errors=True)
    return "reverted a killed run" if old else "deleted the staged packages of a killed run"


@action(of=_act)
def build_modules(web: Path, seconds: float) -> Installed:
    """Install staged packages from the lock file only, and prove them.

    Raises:
        OpsError: pnpm is missing, hangs, or refuses (a lock file that does not match, an unreachable registry).
        VerificationFailed: the packages differ from the lock file.
    """
    staging = staging_of(web)
    pnpm = find_program("pnpm")
    try:
        staging.mkdir()
    except OSError as error:
        raise OpsError(
            f"{staging} cannot be created: {error.strerror}", "give this user write permission there"
        ) from None
    try:
        listed = git(web, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
        for name in {*listed, ".npmrc"} - {""}:  # can contain a token, and is then not committed
            if (web / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(web / name, staging / name, follow_symlinks=False)
        done = answer(
            [pnpm, "install", "--frozen-lockfile", "--prefer-offline"],
            staging,
            seconds=seconds,
            environment={"CI": "true"},
            inherit=NODE_VARIABLES,
        )
        _require_installed(staging)
        proven = _prove(pnpm, staging, seconds)
        _retarget(staging, web)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Installed(proven, done.seconds)


@action(of=_act)
def swap_modules(web: Path) -> None:
    """Swap each node_modules; the old one is kept alongside. A node_modules without a staged one belongs to another
    project or a virtual environment and is not touched."""
    staging = staging_of(web)
    fresh = {path.parent.relative_to(staging): path for path in packages_of(staging)}
    for place in sorted(fresh):
        live = web / place / "node_modules"
        if live.exists() or live.is_symlink():
            live.rename(web / place / SUPERSEDED)
        failpoint("reinstall: between renames")
        fresh[place].rename(live)
    failpoint("reinstall: swapped")


@probe
def prove_modules(web: Path, seconds: float) -> Installed:
    """Check with pnpm that every dependency of the workspace is installed in its version.

    Raises:
        VerificationFailed: one is missing or has another version.
        OpsError: pnpm gave no answer.
    """
    return Installed(_prove(find_program("pnpm"), web, seconds))


@action(of=_act, idempotent=True)
def keep_modules(web: Path) -> None:
    """Record that the new packages are proven: the old ones can be deleted from here on."""
    (staging_of(web) / PROVEN).touch()


@action(of=_act, idempotent=True)
def drop_old_modules(web: Path) -> None:
    """Delete the old packages, only if the new ones are proven."""
    if (staging_of(web) / PROVEN).exists():
        _remove_old(web)


@action(of=_act, idempotent=True)
def clear_turbo(web: Path) -> list[str]:
    """Delete Turbo's caches: `.turbo` of the workspace and its packages. Those in node_modules are replaced with it."""
    found = [path for path in (web / ".turbo", *sorted(web.glob("*/*/.turbo"))) if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    return [str(path.relative_to(web)) for path in found]


def restore_old(web: Path) -> None:
    """Restore every old node_modules."""
    staging = staging_of(web)
    for number, old in enumerate(_superseded(web)):
        live = old.with_name("node_modules")
        if live.exists():
            staging.mkdir(exist_ok=True)
            aside = staging / f"discarded-{number}"
            shutil.rmtree(aside, ignore_errors=True)
            live.rename(aside)
        old.rename(live)


def _superseded(web: Path) -> list[Path]:
    found = [Path(folder) / SUPERSEDED for folder, _, _ in _folders(web)]
    return [path for path in found if path.is_dir()]


def _folders(web: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    for folder, names, files in os.walk(web):
        names[:] = [name for name in names if not name.startswith("node_modules") and name != ".git"]
        yield folder, names, files


def _remove_old(web: Path) -> None:
    for old in _superseded(web):
        shutil.rmtree(old)
    failpoint("reinstall: old ones removed")
    shutil.rmtree(staging_of(web))


def _require_installed(staging: Path) -> None:
    if not (staging / "node_modules" / ".modules.yaml").is_file():
        raise VerificationFailed("pnpm install succeeded but installed nothing", "run pnpm install by hand")


def _prove(pnpm: Path, web: Path, seconds: float) -> int:
    """The number of installed direct dependencies, by pnpm's list and by their own package.json."""
    done = answer([pnpm, "list", "--recursive", "--depth", "0", "--json"], web, seconds=seconds, inherit=NODE_VARIABLES)
    problems, count = list[str](), 0
    for package in parsed("pnpm list", done.stdout, list):
        own = Path(str(package.get("path")))
        listed = {**package.get("dependencies", {}), **package.get("devDependencies", {})}
        for name in _declared(own):
            one = listed.get(name) or {}
            version = str(one.get("version", ""))
            there = version if version.startswith("link:") else _version(own / "node_modules" / name)
            count += 1
            if not version or there != version or not (own / "node_modules" / name).exists():
                problems.append(f"{name} of {package.get('name')}: {there or 'missing'} instead of {version or 'one'}")
    if problems:
        raise VerificationFailed(
            f"packages differ from the lock file: {'; '.join(problems[:3])}",
            "run pnpm install by hand, and check its output",
        )
    if not count:
        raise VerificationFailed("pnpm lists no dependency of the workspace", "check pnpm-workspace.yaml")
    return count


def _declared(package: Path) -> list[str]:
    """The dependencies that a package.json requires."""
    content = json.loads((package / "package.json").read_text(encoding="utf-8"))
    return [*content.get("dependencies", {}), *content.get("devDependencies", {})]


def _version(package: Path) -> str:
    try:
        return str(json.loads((package / "package.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return ""


def _retarget(staging: Path, web: Path) -> None:
    """Replace the staging path in the launchers in .bin and in pnpm's own state by the final one. Files with a second
    hard link belong to pnpm's store, must not be changed, and contain no path."""
    old, new = bytes(staging), bytes(web)
    for top in packages_of(staging):
        for folder, _, files in os.walk(top):
            for name in files:
                path = Path(folder, name)
                if path.is_symlink() or path.stat().st_nlink > 1 or old not in (content := path.read_bytes()):
                    continue
                fresh = path.with_name(f"{name}.ops-new")
                fresh.write_bytes(content.replace(old, new))
                shutil.copymode(path, fresh)
                fresh.replace(path)
