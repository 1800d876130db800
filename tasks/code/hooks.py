"""pre-commit: its configuration file, merged as text so that comments are kept, and its runs (§3.4).

Source: https://pre-commit.com/#plugins, https://pre-commit.com/#repository-local-hooks
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from runbook.errors import CommandFailed, OpsError, excerpt
from runbook.guard.permit import Act
from runbook.kinds import action, probe
from tasks.application.programs import PACKAGE_VARIABLES, answer
from tasks.application.worktree import Worktree, git

FILE = ".pre-commit-config.yaml"
INSTALL = "install hook"
RUFF = "https://github.com/astral-sh/ruff-pre-commit"
ESLINT = "https://github.com/pre-commit/mirrors-eslint"
IDS = ("ruff", "ruff-format", "eslint")
SAME = {"ruff-check": "ruff"}  # its name since ruff 0.11
WEB_FILES = r"\.(ts|tsx|mts|cts|js|jsx|mjs|cjs)$"
_REPOS = re.compile(r"^repos:\s*(\[\s*\])?\s*(#.*)?$")
_RESULT = re.compile(r"^(.+?)\.{3,}(?:\(.*\))?(Passed|Failed|Skipped)$", re.M)
_PINNED = re.compile(r"v?\d+(\.\d+)+\S*|[0-9a-f]{40}")


@dataclass(frozen=True)
class HooksPlace:
    """The tools' paths from the repository's top directory, and their versions."""

    ruff: str
    ruff_version: str
    eslint: str
    eslint_version: str
    backend: str
    web: str
    config: str


@dataclass(frozen=True)
class HookRun:
    """The result of each hook on all files: Passed, Failed or Skipped."""

    hooks: Mapping[str, str]
    text: str
    seconds: float


def read_hooks(text: str) -> dict[str, str]:
    """The ids of a file's hooks, with the revision of their repositories ("" for a local one).

    Raises:
        OpsError: it is not a pre-commit configuration.
    """
    try:
        found = yaml.safe_load(text) or {}
        return {
            SAME.get(hook["id"], hook["id"]): str(repo.get("rev", ""))
            for repo in found.get("repos") or []
            for hook in repo["hooks"]
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise OpsError(
            f"{FILE} cannot be read: {str(error).splitlines()[0]}", "correct it; pre-commit validate-config checks it"
        ) from None


def unpinned(hooks: Mapping[str, str]) -> list[str]:
    """Hooks whose revision is a branch, which can move at any time."""
    return [f"{hook} ({rev})" for hook, rev in hooks.items() if rev and not _PINNED.fullmatch(rev)]


def local_hooks(place: HooksPlace, missing: Sequence[str]) -> list[dict[str, Any]]:
    """A repository `local`, whose hooks run the application's own programs."""
    python = {"language": "system", "types_or": ["python", "pyi"], **_only(place.backend)}
    config = ["--config", place.config] if place.web else []
    eslint = " ".join([place.eslint, "--fix", "--no-warn-ignored", *config])
    hooks: dict[str, dict[str, Any]] = {
        "ruff": {"name": "ruff check", "entry": f"{place.ruff} check --fix --force-exclude", **python},
        "ruff-format": {"name": "ruff format", "entry": f"{place.ruff} format --force-exclude", **python},
        "eslint": {
            "name": "eslint",
            "entry": eslint,
            "language": "system",
            "files": f"^{re.escape(place.web)}/.*{WEB_FILES}" if place.web else WEB_FILES,
        },
    }
    return [{"repo": "local", "hooks": [{"id": hook, **hooks[hook]} for hook in missing]}] if missing else []


def remote_hooks(place: HooksPlace, missing: Sequence[str], packages: Sequence[str]) -> list[dict[str, Any]]:
    """The tools' own hook repositories, in the versions that the application uses."""
    found = list[dict[str, Any]]()
    ruff = [
        {"id": hook, **({"args": ["--fix"]} if hook == "ruff" else {}), **_only(place.backend)}
        for hook in missing
        if hook != "eslint"
    ]
    if ruff:
        found.append({"repo": RUFF, "rev": f"v{place.ruff_version}", "hooks": ruff})
    if "eslint" in missing:
        config = ["--config", place.config] if place.web else []
        files = f"^{re.escape(place.web)}/.*{WEB_FILES}" if place.web else WEB_FILES
        eslint = {
            "id": "eslint",
            "args": ["--fix", "--no-warn-ignored", *config],
            "files": files,
            "types": ["file"],
            "additional_dependencies": list(packages),
        }
        found.append({"repo": ESLINT, "rev": f"v{place.eslint_version}", "hooks": [eslint]})
    return found


def eslint_packages(web: Path) -> list[str]:
    """The packages that ESLint needs, pinned: the workspace's devDependencies for it."""
    content = json.loads((web / "package.json").read_text(encoding="utf-8"))
    return [
        f"{name}@{version}"
        for name, version in content.get("devDependencies", {}).items()
        if "eslint" in name or name == "typescript"
    ]


def merged(text: str, added: Sequence[Mapping[str, Any]]) -> str:
    """The file with `added` at the end of its repositories; existing lines are unchanged.

    Raises:
        OpsError: its YAML style does not allow adding lines.
    """
    lines = text.splitlines()
    places = [number for number, line in enumerate(lines) if _REPOS.match(line)]
    if not places:
        lines, places = [*lines, "repos:"], [len(lines)]
    begin = places[0]
    lines[begin] = lines[begin].replace("[]", "").replace("[ ]", "").rstrip()
    end = next((number for number in range(begin + 1, len(lines)) if re.match(r"[^\s#-]", lines[number])), len(lines))
    while end > begin + 1 and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1
    indent = next((found[1] for line in lines[begin + 1 : end] if (found := re.match(r"(\s*)- ", line))), "  ")
    new = yaml.safe_dump(list(added), sort_keys=False, allow_unicode=True, width=200).splitlines()
    result = "\n".join([*lines[:end], *(indent + line for line in new), *lines[end:]]) + "\n"
    before, after = yaml.safe_load(text) or {}, yaml.safe_load(result)
    if after != {**before, "repos": [*(before.get("repos") or []), *added]}:
        raise OpsError(f"no lines can be added to {FILE}", "write its repos as a block list, one item per line")
    return result


@probe
def read_reachable(directory: Path, wanted: Mapping[str, str]) -> dict[str, str]:
    """Why each hook repository cannot be reached, or lacks its revision; "" if neither."""
    found = {}
    for url, revision in wanted.items():
        try:
            listed = git(directory, "ls-remote", "--tags", url, f"refs/tags/{revision}")
            found[url] = "" if listed.strip() else f"there is no {revision}"
        except CommandFailed as error:
            found[url] = error.message
        except OpsError as error:
            found[url] = error.message
    return found


@action(idempotent=True)
def run_hooks(program: Path, tree: Worktree, cache: Path, seconds: float) -> HookRun:
    """Run all hooks on all files of a worktree; they may write there.

    Raises:
        OpsError: pre-commit failed, hung, or reported no hook.
    """
    argv: list[str | Path] = [program, "run", "--all-files", "--color", "never"]
    done = answer(
        argv,
        tree.directory,
        seconds=seconds,
        accepted=(0, 1),
        inherit=PACKAGE_VARIABLES,
        environment={"PRE_COMMIT_HOME": str(cache)},
    )
    hooks = {name.strip(): how for name, how in _RESULT.findall(done.stdout)}
    if not hooks or (done.code and "Failed" not in hooks.values()):
        raise OpsError(
            f"pre-commit reported no hook: {excerpt(done.stdout)}",
            "run pre-commit run --all-files on the branch by hand",
        )
    return HookRun(hooks, done.stdout, done.seconds)


@action(of=lambda repository: Act(INSTALL, str(repository)), idempotent=True)
def install_hook(program: Path, repository: Path, seconds: float) -> str:
    """Run `pre-commit install` in the live checkout. An existing hook is kept and still runs; commits on a branch
    without the configuration file are allowed. Returns the hook's path.

    Raises:
        OpsError: pre-commit refuses (core.hooksPath is set), or the hook is missing afterwards.
    """
    answer([program, "install", "--allow-missing-config"], repository, seconds=seconds, inherit=PACKAGE_VARIABLES)
    hook = (repository / git(repository, "rev-parse", "--git-common-dir").strip() / "hooks" / "pre-commit").resolve()
    if not hook.is_file() or "pre-commit" not in hook.read_text(encoding="utf-8", errors="replace"):
        raise OpsError("pre-commit succeeded but installed no hook", "run pre-commit install by hand")
    return str(hook)


def _only(folder: str) -> dict[str, str]:
    return {"files": f"^{re.escape(folder)}/"} if folder else {}
