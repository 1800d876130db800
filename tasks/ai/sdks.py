"""The installed versions of the providers' packages in the application's own Python (§5.1)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from blocks.places import Application
from runbook import shell
from runbook.errors import OpsError
from runbook.kinds import probe

SECONDS = 60.0
KNOWN = ("openai", "boto3", "google-cloud-aiplatform")
PROGRAM = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        found[name] = ""
print(json.dumps(found))
"""


@probe
def read_sdks(application: Application, packages: Sequence[str]) -> dict[str, str]:
    """The installed version of each package, "" if it is not installed.

    Raises:
        OpsError: that Python is missing, or does not answer.
    """
    hint = "correct [application] python"
    printed = shell.run(
        [application.need("python"), "-c", PROGRAM, *packages], timeout_seconds=SECONDS, hint=hint
    ).stdout
    try:
        found = json.loads(printed)
        return {name: str(found[name]) for name in packages}
    except (ValueError, KeyError, TypeError):
        raise OpsError(f"{application.python} does not print the versions", hint) from None


def is_behind(installed: str, needed: str) -> bool | None:
    """Whether a version is older than another, by their leading numbers; None if one has none."""
    if not (one := _numbers(installed)) or not (other := _numbers(needed)):
        return None
    length = max(len(one), len(other))
    return one + [0] * (length - len(one)) < other + [0] * (length - len(other))


def _numbers(version: str) -> list[int]:
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", version)
    return [int(part) for part in match[1].split(".")] if match else []
