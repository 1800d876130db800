"""Register environments in Prefect: their blocks and their locks. Idempotent. Then deploy, then the automations.

OPS_ENVIRONMENT=staging python -m deployments.register
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import yaml  # type: ignore[import-untyped]
from prefect.blocks.core import Block

from blocks.config import toml
from blocks.environment import Environment
from deployments.alerting import block_name, server_channel
from deployments.names import require_known_names
from flows.launch import CONTENTS, find_flow
from runbook.drivers import exit_code
from runbook.errors import OpsError
from runbook.guard.lease import ensure_limit
from tasks.gx.suites import read_suites
from tasks.integrity import judgeable, read_columns

CONNECT_SECONDS = 5


def register(environment: str) -> list[str]:
    """Save every block of an environment, and its lock; returns what was registered.

    Raises:
        OpsError: there is no such environment, or its TOML or a suite of its expectations is wrong.
    """
    found = toml.environment(environment)
    if found.suites:
        read_suites(found.suites)
    if found.has("approval"):
        check_approvable(found)
    require_known_names(found)
    with schemas_kept():
        done = _save_blocks(found, environment)
    ensure_limit(environment)
    return [*done, f"block ops-environment/{environment}", f"lock env-{environment}"]


def _save_blocks(found: Environment, environment: str) -> list[str]:
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
    return done


@contextlib.contextmanager
def schemas_kept() -> Iterator[None]:
    """Generate the schema of each block class once while the block runs.

    Prefect (3.9.1) generates it again for every field of every block that is saved: 3,000 times in 5 s of processor
    time for an environment and its second region.
    """
    generate = Block.__dict__["model_json_schema"]

    @functools.cache
    def kept(cls: type[Block], *arguments: Any, **named: Any) -> dict[str, Any]:
        return generate.__func__(cls, *arguments, **named)  # type: ignore[no-any-return]

    def schema(cls: type[Block], *arguments: Any, **named: Any) -> dict[str, Any]:
        return copy.deepcopy(kept(cls, *arguments, **named))

    Block.model_json_schema = classmethod(schema)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Block.model_json_schema = generate  # type: ignore[method-assign]


def describe_expectations(environment: str) -> list[str]:
    """Which expectations the environment has, and which of them its live database has no table or column for.

    Raises:
        OpsError: the TOML or a suite is wrong.
    """
    env = toml.environment(environment)
    if not env.suites:
        return [f"{environment}: no expectations are configured ([expectations] directory)"]
    suites = read_suites(env.suites)
    try:
        with env.postgres.connect(env.postgres.database, seconds=CONNECT_SECONDS) as connection:
            _, _, absent = judgeable(suites, read_columns(connection))
    except OpsError as error:
        return [
            f"{environment}: {len(suites)} suites of expectations; could not check them against the database: "
            f"{error.message}"
        ]
    return [f"{environment}: {len(suites)} suites of expectations", *(f"  not applicable: {one}" for one in absent)]


def check_approvable(env: Environment) -> None:
    """Each runbook that needs an approval is one that changes something, and no schedule confirms it.

    Raises:
        OpsError: `[approval] required` names another.
    """
    entries = yaml.safe_load(CONTENTS.read_text(encoding="utf-8"))["deployments"]
    for name in env.approval.required:
        try:
            parameters = find_flow(name).parameters.properties
        except OpsError as error:
            raise OpsError(f"[approval] required names {name}, which is no runbook", error.hint) from None
        if "confirm" not in parameters:
            raise OpsError(
                f"[approval] required names {name}, which only reads: it never needs an approval",
                "remove it from required",
            )
        function = f".{name.replace('-', '_')}"
        own = [entry for entry in entries if entry["entrypoint"].endswith(function)]
        given = [one.get("parameters") or {} for entry in own for one in (entry, *(entry.get("schedules") or []))]
        if any(one.get("confirm") for one in given):
            raise OpsError(
                f"[approval] required names {name}, which a schedule confirms: nobody would approve it",
                "remove confirm from its schedule in prefect.yaml, or the name from required",
            )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("environments", nargs="*", default=[os.environ.get("OPS_ENVIRONMENT", "")])
    try:
        for environment in parser.parse_args().environments:
            for line in register(environment):
                print(f"registered {line}")
            print("\n".join(describe_expectations(environment)))
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
