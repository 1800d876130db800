"""Scan container images with trivy (trivy.dev/docs) or grype (github.com/anchore/grype), whichever is installed. Docker
no longer has the manual's `docker scan`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.programs import answer, find_program, parsed
from tasks.dependencies.advisory import Advisory, Scan
from tasks.dependencies.form import known_form
from tasks.dependencies.severity import of_word

ARGUMENTS = {
    "trivy": ("image", "--quiet", "--scanners", "vuln", "--format", "json"),
    "grype": ("--quiet", "--output", "json"),
}
INSTALL = "install trivy (trivy.dev/docs, from its Debian repository) or grype (github.com/anchore/grype)"


def find_scanner() -> Path:
    """Find trivy, else grype.

    Raises:
        OpsError: neither is installed.
    """
    for name in ARGUMENTS:
        with contextlib.suppress(OpsError):
            return find_program(name)
    raise OpsError("no image scanner is installed", INSTALL)


@probe
def scan_image(image: str, seconds: float) -> Scan:
    """Scan the packages of one image, of its system and of languages.

    Raises:
        OpsError: no scanner, or no such image; the scanner failed, hung or printed no JSON, or has no database.
    """
    scanner = find_scanner()
    if image.startswith("-"):
        raise OpsError(f"“{image[:40]}” is no image", "correct [application] images")
    done = answer(
        [scanner, *ARGUMENTS[scanner.name], image],
        Path("/"),
        seconds=seconds,
        inherit=(*shell.NETWORK, "TRIVY_*", "GRYPE_*", "DOCKER_*"),
    )
    content = parsed(scanner.name, done.stdout, dict)
    with known_form(scanner.name):
        found, checked = (_of_trivy if scanner.name == "trivy" else _of_grype)(content, f"image {image}")
        gaps = _gaps(content)
    return Scan(scanner.name, f"image {image}", checked, found, gaps, done.stdout)


def _gaps(content: Mapping[str, Any]) -> tuple[str, ...]:
    """An unsupported system: nobody publishes its newer vulnerabilities. --quiet hides trivy's warning."""
    system = (content.get("Metadata") or {}).get("OS") or {}
    if system.get("EOSL"):
        return (
            f"{system.get('Family')} {system.get('Name')} is unsupported: its newer vulnerabilities are not published",
        )
    return ()


def _of_trivy(content: Mapping[str, Any], place: str) -> tuple[tuple[Advisory, ...], int]:
    results = content["Results"]
    items = [item for result in results for item in result.get("Vulnerabilities") or []]
    return tuple(
        Advisory(
            ids=tuple(dict.fromkeys((item["VulnerabilityID"], *(item.get("VendorIDs") or [])))),
            package=item["PkgName"],
            versions=(item["InstalledVersion"],),
            severity=of_word(item.get("Severity")),
            fixed=(item["FixedVersion"],) if item.get("FixedVersion") else (),
            summary=item.get("Title", ""),
            places=(place,),
        )
        for item in items
    ), len(results)


def _of_grype(content: Mapping[str, Any], place: str) -> tuple[tuple[Advisory, ...], int]:
    return tuple(
        Advisory(
            ids=(match["vulnerability"]["id"], *(other["id"] for other in match.get("relatedVulnerabilities") or [])),
            package=match["artifact"]["name"],
            versions=(match["artifact"]["version"],),
            severity=of_word(match["vulnerability"].get("severity")),
            fixed=tuple((match["vulnerability"].get("fix") or {}).get("versions") or ()),
            summary=match["vulnerability"].get("description", ""),
            places=(place,),
        )
        for match in content["matches"]
    ), 1 if content.get("source") else 0
