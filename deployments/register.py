"""Register environments in Prefect: their blocks and their locks. Idempotent. Then deploy, then the automations.

OPS_ENVIRONMENT=staging python -m deployments.register
"""

from __future__ import annotations

import argparse
import os
import sys

from blocks import toml
from blocks.environment import Environment
from deployments.alerting import block_name, server_channel
from runbook.errors import OpsError
from runbook.lease import ensure_limit


def register(environment: str) -> list[str]:
    """Save every block of an environment, and its lock; returns what was registered.

    Raises:
        OpsError: there is no such environment, or its TOML is wrong.
    """
    found = toml.environment(environment)
    Environment.register_type_and_schema()
    done = []
    for part, block in found.parts().items():
        type(block).register_type_and_schema()
        block.save(found.slugs[part].partition("/")[2], overwrite=True)
        done.append(f"block {found.slugs[part]}")
    found.save(environment, overwrite=True)
    if found.has("alerts") and (channel := server_channel(found.alerts, environment)):
        channel.save(block_name(environment), overwrite=True)
        done.append(f"block {type(channel).get_block_type_slug()}/{block_name(environment)}")
    ensure_limit(environment)
    return [*done, f"block ops-environment/{environment}", f"lock env-{environment}"]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("environments", nargs="*", default=[os.environ.get("OPS_ENVIRONMENT", "")])
    try:
        for environment in parser.parse_args().environments:
            for line in register(environment):
                print(f"registered {line}")
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
