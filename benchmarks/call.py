"""One flow, called in a process and a session of its own as a worker does it: nothing is imported or cached by the call
before.

    python -m benchmarks.call flows.database.backup:backup_database '{"environment": "bench"}' [--direct]

Prints what it took as one line of JSON. `--direct` calls the function itself, without Prefect.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time

from runbook.errors import OpsError
from runbook.report import Report


def main(target: str, parameters: str, *options: str) -> int:
    """Seconds are those of the call; imports are not in them."""
    os.setsid()
    module, name = target.split(":")
    flow = getattr(importlib.import_module(module), name)
    call = flow.fn if "--direct" in options else flow
    started = time.monotonic()
    try:
        report: Report = call(**json.loads(parameters))
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    seconds = time.monotonic() - started
    steps = [(s.name, (s.started - report.started).total_seconds(), s.seconds) for s in report.steps]
    told = {"seconds": seconds, "steps": steps, "facts": report.facts, "report": str(report.path or "")}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
