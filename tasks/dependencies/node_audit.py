"""`pnpm audit` and `npm audit` of the web application: each reads its lock file and queries the registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook.errors import OpsError, excerpt
from runbook.kinds import probe
from tasks.application.programs import NODE_VARIABLES, answer, find_program, parsed
from tasks.dependencies.advisory import Advisory, Scan
from tasks.dependencies.form import known_form
from tasks.dependencies.severity import of_word

LOCKS = {"pnpm-lock.yaml": "pnpm", "package-lock.json": "npm"}
# One attempt each: otherwise an unreachable registry costs minutes.
PATIENCE = {"npm_config_fetch_retries": "0", "npm_config_fetch_timeout": "30000", "npm_config_update_notifier": "false"}
_GHSA = re.compile(r"GHSA(-[0-9a-z]{4}){3}")


def tools_of(web: Path) -> list[str]:
    """The audit tools, by the lock files.

    Raises:
        OpsError: there is no lock file: the versions are not known.
    """
    if found := [tool for lock, tool in LOCKS.items() if (web / lock).is_file()]:
        return found
    raise OpsError(
        f"{web} has no lock file",
        "create one (pnpm install --lockfile-only) and commit it, or correct [application] web_directory",
    )


@probe
def audit_node(web: Path, tool: str, only_production: bool, seconds: float) -> Scan:
    """Audit every package of the lock file. `tool`: pnpm or npm.

    Raises:
        OpsError: the tool is not installed, failed, hung or printed no JSON, or the registry returned no advisories.
    """
    find_program("node")
    narrow = {"pnpm": ["--prod"], "npm": ["--omit=dev"]}[tool] if only_production else []
    done = answer(
        [find_program(tool), "audit", "--json", *narrow],
        web,
        seconds=seconds,
        accepted=(0, 1),
        environment=PATIENCE,
        inherit=NODE_VARIABLES,
    )
    content = parsed(f"{tool} audit", done.stdout, dict)
    if problem := content.get("error") or content.get("message"):
        raise OpsError(
            f"{tool} audit gave no answer: {_said(problem)}",
            "check that the registry can be reached and serves advisories",
        )
    read = _of_pnpm if "advisories" in content else _of_npm
    with known_form(f"{tool} audit"):
        found = read(content, f"packages of {web}")
        numbers = content["metadata"]
        checked = int(numbers.get("totalDependencies") or _total(numbers.get("dependencies")))
    return Scan(f"{tool} audit", f"packages of {web}", checked, found, (), done.stdout)


def _of_pnpm(content: Mapping[str, Any], place: str) -> tuple[Advisory, ...]:
    """npm's first format, which pnpm prints."""
    return tuple(
        Advisory(
            ids=_ids(item.get("github_advisory_id"), *item.get("cves", []), *_GHSA_in(item.get("url")), otherwise=key),
            package=item["module_name"],
            versions=tuple(dict.fromkeys(found["version"] for found in item["findings"])),
            severity=of_word(item.get("severity")),
            fixed=_range(item.get("patched_versions")),
            summary=item.get("title", ""),
            places=(place,),
        )
        for key, item in content["advisories"].items()
    )


def _of_npm(content: Mapping[str, Any], place: str) -> tuple[Advisory, ...]:
    """npm's second format: by package, each with its advisories, or with the names of the vulnerable packages."""
    found = []
    for package in content["vulnerabilities"].values():
        fix = package.get("fixAvailable")
        for via in package["via"]:
            if isinstance(via, str):
                continue
            found.append(
                Advisory(
                    ids=_ids(*_GHSA_in(via.get("url")), otherwise=f"npm-{via.get('source')}"),
                    package=via["name"],
                    versions=(str(via.get("range", "")),),
                    severity=of_word(via.get("severity")),
                    fixed=(f"{fix['name']} {fix['version']}",)
                    if isinstance(fix, dict)
                    else ("npm update",)
                    if fix
                    else (),
                    summary=via.get("title", ""),
                    places=(place,),
                )
            )
    return tuple(found)


def _ids(*known: str | None, otherwise: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for one in known if one)) or (otherwise,)


def _GHSA_in(address: object) -> list[str]:
    return [found[0]] if (found := _GHSA.search(str(address))) else []


def _range(patched: object) -> tuple[str, ...]:
    """The fixed versions; the registry writes `<0.0.0` if there is none."""
    text = str(patched or "").strip()
    return (text,) if text and text != "<0.0.0" else ()


def _total(dependencies: object) -> int:
    return int(dependencies.get("total", 0)) if isinstance(dependencies, Mapping) else int(str(dependencies or 0))


def _said(problem: object) -> str:
    if isinstance(problem, Mapping):
        problem = problem.get("message") or problem.get("summary") or problem.get("detail") or problem
    return excerpt(str(problem), 200)
