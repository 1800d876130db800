"""Container images, by the scanner that this machine has: trivy (trivy.dev/docs) or grype (github.com/anchore/grype).
`docker scan` of the manual is gone from Docker."""

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
INSTALL = "install trivy (trivy.dev/docs, a Debian repository of its own) or grype (github.com/anchore/grype)"


def find_scanner() -> Path:
    """trivy, else grype.

    Raises:
        OpsError: neither is installed.
    """
    for name in ARGUMENTS:
        with contextlib.suppress(OpsError):
            return find_program(name)
    raise OpsError("no scanner of images is installed", INSTALL)


@probe
def scan_image(image: str, seconds: float) -> Scan:
    """The packages of one image, of the system's and of languages.

    Raises:
        OpsError: there is no scanner, or no such image; it failed, hung or printed no JSON; its database is not there.
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
        found, looked_at = (_of_trivy if scanner.name == "trivy" else _of_grype)(content, f"image {image}")
        gaps = _gaps(content)
    return Scan(scanner.name, f"image {image}", looked_at, found, gaps, done.stdout)


def _gaps(content: Mapping[str, Any]) -> tuple[str, ...]:
    """trivy looks at a system past its support too, of whose newer holes nobody tells; --quiet hides its warning."""
    system = (content.get("Metadata") or {}).get("OS") or {}
    if system.get("EOSL"):
        return (f"{system.get('Family')} {system.get('Name')} is past its support: its packages' newer holes",)
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
