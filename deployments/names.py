"""Names in an environment's TOML that only this project can judge: runbooks of `unattended` and of [approval], chapters
of [pools]."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from blocks.config.mistakes import Mistake, near, shown
from blocks.environment import Environment
from runbook.errors import OpsError

ROOT = Path(__file__).resolve().parents[1]


def find_wrong_names(env: Environment) -> Iterator[Mistake]:
    """Each name that is no runbook that changes something, or no chapter."""
    known = confirmed_by_runbook()
    changing = sorted(name for name, confirms in known.items() if confirms)
    for section, key, names in (("", "unattended", env.unattended), ("approval", "required", _approved(env))):
        for name in names:
            if name not in known:
                meant = near(name, changing)
                expected = f"a runbook{meant if 'did you' in meant else ', as in docs/catalogue.md'}"
                yield Mistake(section, key, shown(name), expected)
            elif not known[name]:
                yield Mistake(section, key, shown(name), f"a runbook that changes something: {name} only reads")
    chapters = sorted(path.name for path in (ROOT / "flows").iterdir() if (path / "__init__.py").exists())
    for chapter in env.pools:
        if chapter not in chapters:
            yield Mistake("pools", chapter, "an unknown key", f"a chapter{near(chapter, chapters)}")


def _approved(env: Environment) -> list[str]:
    return list(getattr(env.parts().get("approval"), "required", ()))


def require_known_names(env: Environment) -> None:
    """Raises OpsError for the first of them."""
    for one in find_wrong_names(env):
        where = f"[{one.section}] {one.key}" if one.section else one.key
        raise OpsError(f"{env.name}.toml: {where} is wrong: found {one.found}", f"expected: {one.expected}")


@cache
def confirmed_by_runbook() -> dict[str, bool]:
    """Every deployed runbook, and whether it takes `confirm`: read from its file, since importing all takes seconds."""
    entries = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    found = {}
    for entrypoint in {str(entry["entrypoint"]) for entry in entries}:
        module, _, function = entrypoint.rpartition(".")
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == function:
                arguments = (*node.args.args, *node.args.kwonlyargs)
                found[function.replace("_", "-")] = "confirm" in {one.arg for one in arguments}
    return found
