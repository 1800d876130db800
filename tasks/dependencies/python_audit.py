"""pip-audit of the application's Python environment (pypi.org/project/pip-audit). It prints no severity, so the
severity is read from OSV's record of the id."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from blocks.places import Application
from runbook.errors import OpsError, Unreachable, excerpt
from runbook.kinds import probe
from tasks.application.programs import PYTHON_VARIABLES, answer, parsed, python_program
from tasks.dependencies.advisory import Advisory, Scan
from tasks.dependencies.form import known_form
from tasks.dependencies.severity import Severity, of_vector, of_word

# The site directories of a Python; -I: without the caller's.
_SITES = "import json, os, site; print(json.dumps([d for d in site.getsitepackages() if os.path.isdir(d)]))"
SOCKET_SECONDS = 15


@probe
def audit_python(application: Application, seconds: float) -> Scan:
    """Audit every package of `application.python`'s environment against OSV at `application.advisories`.

    Raises:
        OpsError: pip-audit is not installed, failed, hung or printed no JSON, or OSV gave no answer.
    """
    program = python_program(application, "pip-audit")
    python = Path(application.need("python"))
    sites = parsed("python", answer([python, "-I", "-c", _SITES], Path("/"), seconds=60).stdout, list)
    with tempfile.TemporaryDirectory(prefix="ops-audit-") as folder:
        out = Path(folder, "audit.json")
        service = ["--vulnerability-service", "osv", "--osv-url", f"{application.advisories.rstrip('/')}/v1/query"]
        form: list[str | Path] = [
            "--format",
            "json",
            "--output",
            out,
            "--progress-spinner",
            "off",
            "--cache-dir",
            Path(folder, "cache"),
        ]
        paths = [part for site in sites for part in ("--path", site)]
        argv = [program, *service, "--timeout", str(SOCKET_SECONDS), *form, *paths]
        # exit code 1: vulnerabilities, or a failure
        done = answer(argv, Path(folder), seconds=seconds, accepted=(0, 1), inherit=PYTHON_VARIABLES)
        raw = out.read_text(encoding="utf-8", errors="replace") if out.exists() else ""
    if not raw:
        raise OpsError(
            f"pip-audit gave no answer: {_last(done.stderr)}",
            f"check that {application.advisories} can be reached",
        )
    content = parsed("pip-audit", raw, dict)
    return _scan(application, content, raw, done.stderr)


def _scan(application: Application, content: Mapping[str, Any], raw: str, complaints: str) -> Scan:
    place = f"packages of {application.python}"
    with known_form("pip-audit"):
        entries = list(content["dependencies"])
        skipped = [f"{entry['name']}: {entry['skip_reason']}" for entry in entries if "skip_reason" in entry]
        with Osv(application.advisories) as osv:
            found = tuple(_advisory(entry, item, osv, place) for entry in entries for item in entry.get("vulns", []))
    # It skips records that it cannot parse, with a line on stderr.
    left_out = [line.strip() for line in complaints.splitlines() if line.startswith("WARNING") and "OSV" in line]
    gaps = [*skipped, *left_out]
    if osv.lost:
        gaps.append(f"severities: {osv.lost}")
    return Scan("pip-audit", place, len(entries) - len(skipped), found, tuple(gaps), raw)


def _advisory(entry: Mapping[str, Any], item: Mapping[str, Any], osv: Osv, place: str) -> Advisory:
    ids = tuple(dict.fromkeys((item["id"], *item.get("aliases", []))))
    return Advisory(
        ids=ids,
        package=entry["name"],
        versions=(entry["version"],),
        severity=osv.severity(ids),
        fixed=tuple(item.get("fix_versions", [])),
        summary=str(item.get("description", "")),
        places=(place,),
    )


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return excerpt(lines[-1], 200) if lines else "no message"


SECONDS = 20.0


class Osv:
    """A connection to OSV. After its first failure to answer it is not queried again: each query would wait as long."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        self.lost = ""
        self._client = httpx.Client(timeout=SECONDS, follow_redirects=True)

    def __enter__(self) -> Osv:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def severity(self, ids: Sequence[str]) -> Severity:
        """The worst severity in the records of these aliases; unknown if none has one."""
        found = Severity.UNKNOWN
        for one in sorted(ids, key=lambda one: not one.startswith("GHSA-")):  # GHSA records have the severity as a word
            try:
                found = max(found, self._of(one))
            except Unreachable as error:
                self.lost = error.message
            except OpsError as error:
                self.lost = self.lost or error.message
            if found:
                break
        return found

    def _of(self, one: str) -> Severity:
        if self.lost:
            return Severity.UNKNOWN
        try:
            answer = self._client.get(f"{self.address}/v1/vulns/{one}")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unreachable(f"{self.address} does not answer: {type(error).__name__}") from None
        if answer.status_code == httpx.codes.NOT_FOUND:  # OSV has no record of this alias
            return Severity.UNKNOWN
        try:
            record = answer.raise_for_status().json()
            word = of_word((record.get("database_specific") or {}).get("severity"))
            vectors = [str(item.get("score")) for item in record.get("severity") or []]
        except (httpx.HTTPError, ValueError, AttributeError, TypeError):
            raise OpsError(f"{self.address} answered {answer.status_code} with no record of {one}") from None
        return max([word, *map(of_vector, vectors)])
