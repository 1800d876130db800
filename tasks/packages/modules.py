"""node_modules of a pnpm workspace, installed anew from its lock file: beside, proven, swapped by renames (§3.1).

Which state a killed run left is told by names alone. `.<web>.ops-reinstall` beside the workspace is where the new ones
are made; `node_modules.ops-superseded` are the old ones; the file `proven` in the former says that these may go.

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
from runbook.guard.permit import Permit
from runbook.kinds import action, probe
from tasks.application.programs import NODE_VARIABLES, answer, find_program, parsed
from tasks.application.worktree import git, packages_of
from tasks.packages.users import users_of

REINSTALL = "reinstall"
SUPERSEDED = "node_modules.ops-superseded"
PROVEN = "proven"
LOCK = "pnpm-lock.yaml"
NODE = ("node", "next")  # as processes of node call themselves


@dataclass(frozen=True)
class Installed:
    """What was proven: how many direct dependencies are there in the versions of the lock."""

    dependencies: int
    seconds: float = 0.0


def staging_of(web: Path) -> Path:
    """Beside the workspace, on its file system: what is there is renamed, not copied."""
    return web.parent / f".{web.name}.ops-reinstall"


@probe
def read_bytes(web: Path) -> int:
    """What its node_modules take, in bytes; a file with several names once."""
    sizes = dict[int, int]()
    for top in packages_of(web):
        for folder, _, files in os.walk(top):
            for name in files:
                status = Path(folder, name).lstat()
                sizes[status.st_ino] = status.st_blocks * 512
    return sum(sizes.values())


@action(idempotent=True)
def settle_modules(permit: Permit, web: Path) -> str:
    """Bring what an earlier run left to an end: the old ones come back, or go where the new ones are proven. Returns
    what was done, "" where there was nothing.

    Raises:
        OpsError: a process still runs from before the new ones were proven.
    """
    permit.require(REINSTALL, str(web))
    staging, old = staging_of(web), _superseded(web)
    proven = (staging / PROVEN).exists()
    if not staging.exists() and not old:
        return ""
    if proven:
        if late := users_of(web, NODE, before=(staging / PROVEN).stat().st_mtime):
            raise OpsError(
                f"packages from before the last reinstallation are in use: {', '.join(late[:5])}",
                "restart them, then launch this again",
            )
        _remove_old(web)
        return "the old packages that an earlier run had kept are gone"
    put_back(web)
    shutil.rmtree(staging, ignore_errors=True)
    return "a run that was killed is undone" if old else "what a killed run had begun to install is gone"


@action
def build_modules(permit: Permit, web: Path, seconds: float) -> Installed:
    """Install beside, from the lock file and nothing else, and prove it there.

    Raises:
        OpsError: pnpm is missing, hangs, or refuses (a lock that does not fit, a registry that does not answer).
        VerificationFailed: what is there is not what the lock says.
    """
    permit.require(REINSTALL, str(web))
    staging = staging_of(web)
    pnpm = find_program("pnpm")
    try:
        staging.mkdir()
    except OSError as error:
        raise OpsError(
            f"{staging} cannot be made: {error.strerror}", "give this user the right to write there"
        ) from None
    try:
        listed = git(web, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
        for name in {*listed, ".npmrc"} - {""}:  # which may hold a token, and then stands in no commit
            if (web / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(web / name, staging / name, follow_symlinks=False)
        said = answer(
            [pnpm, "install", "--frozen-lockfile", "--prefer-offline"],
            staging,
            seconds=seconds,
            environment={"CI": "true"},
            inherit=NODE_VARIABLES,
        )
        _require_there(staging)
        proven = _prove(pnpm, staging, seconds)
        _retarget(staging, web)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Installed(proven, said.seconds)


@action
def swap_modules(permit: Permit, web: Path) -> None:
    """Put each new node_modules in the place of the old one, which is kept beside it. A node_modules of which there is
    no new one is none of the workspace's packages (another project's, one inside a virtual environment): it stays."""
    permit.require(REINSTALL, str(web))
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
    """Whether pnpm finds every dependency of every package of the workspace, in place and in its version.

    Raises:
        VerificationFailed: one is missing or another one.
        OpsError: pnpm gave no answer.
    """
    return Installed(_prove(find_program("pnpm"), web, seconds))


@action(idempotent=True)
def keep_modules(permit: Permit, web: Path) -> None:
    """Note that the new ones are proven: from here on the old ones may go."""
    permit.require(REINSTALL, str(web))
    (staging_of(web) / PROVEN).touch()


@action(idempotent=True)
def drop_old_modules(permit: Permit, web: Path) -> None:
    """Remove the old ones; only where the new ones are proven."""
    permit.require(REINSTALL, str(web))
    if (staging_of(web) / PROVEN).exists():
        _remove_old(web)


@action(idempotent=True)
def clear_turbo(permit: Permit, web: Path) -> list[str]:
    """Remove Turbo's caches: `.turbo` of the workspace and its packages. What is in node_modules goes with those."""
    permit.require(REINSTALL, str(web))
    found = [path for path in (web / ".turbo", *sorted(web.glob("*/*/.turbo"))) if path.is_dir()]
    for path in found:
        shutil.rmtree(path)
    return [str(path.relative_to(web)) for path in found]


def put_back(web: Path) -> None:
    """Every old node_modules to its place again."""
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


def _require_there(staging: Path) -> None:
    if not (staging / "node_modules" / ".modules.yaml").is_file():
        raise VerificationFailed("pnpm install ended well and installed nothing", "run pnpm install by hand")


def _prove(pnpm: Path, web: Path, seconds: float) -> int:
    """Direct dependencies that are there, by what pnpm lists and by their own package.json."""
    said = answer([pnpm, "list", "--recursive", "--depth", "0", "--json"], web, seconds=seconds, inherit=NODE_VARIABLES)
    problems, count = list[str](), 0
    for package in parsed("pnpm list", said.stdout, list):
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
            f"packages are not what the lock says: {'; '.join(problems[:3])}",
            "run pnpm install by hand, and look at what it says",
        )
    if not count:
        raise VerificationFailed("pnpm lists no dependency of the workspace", "look at pnpm-workspace.yaml")
    return count


def _declared(package: Path) -> list[str]:
    """What a package.json asks for and must be there."""
    content = json.loads((package / "package.json").read_text(encoding="utf-8"))
    return [*content.get("dependencies", {}), *content.get("devDependencies", {})]


def _version(package: Path) -> str:
    try:
        return str(json.loads((package / "package.json").read_text(encoding="utf-8"))["version"])
    except (OSError, ValueError, KeyError):
        return ""


def _retarget(staging: Path, web: Path) -> None:
    """pnpm writes the workspace's path into the launchers in .bin and into its own state: there it becomes the one that
    they go to. Files with a second name are the store's, which nobody may write to; they name no path."""
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
