"""Propose expectations from a database's own schema and rows, as great-expectations JSON, one file a table, for review.

python -m deployments.suggest_expectations production
python -m deployments.suggest_expectations production --check

A file that is there already is not changed: what would be suggested now is put beside it, as NAME.json.suggested.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blocks.config import toml
from blocks.environment import Environment
from runbook.drivers import exit_code
from runbook.errors import OpsError
from tasks.gx.declared import read_tables
from tasks.gx.suggestion import left_out, suggest, write
from tasks.integrity import run_expectations


def directory_for(env: Environment) -> Path:
    """The environment's own, else one next to its TOML."""
    return env.suites or toml.file_of(env.name).parent / "expectations" / env.name


def propose(env: Environment, directory: Path) -> Iterator[str]:
    """Write a suite for every table, and say what was done.

    Raises:
        Unreachable: the database does not answer.
        OpsError: the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for table in read_tables(env.postgres, env.postgres.database):
            yield write(directory, table, suggest(table))
            if skipped := left_out(table):
                yield f"  not read, the table is large: {', '.join(skipped)}"
    except OSError as error:
        raise OpsError(
            f"{directory} cannot be written to: {error.strerror}", "correct its owner, or name another --directory"
        ) from None
    if env.suites != directory.resolve():
        yield f"review them, then name the directory in {toml.file_of(env.name).name}: [expectations] directory"


def check(env: Environment, directory: Path) -> Iterator[str]:
    """Judge the live database by the suites in the directory; every sentence is a rule that it breaks.

    Raises:
        OpsError: a suite is wrong, or the database does not answer.
    """
    with tempfile.TemporaryDirectory(prefix="ops-expectations-") as evidence:
        yield from run_expectations(env.postgres, env.postgres.database, Path(evidence), directory).failed


def main() -> int:
    """The command line: 1 where the database breaks a rule (--check) or something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.suggest_expectations",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("environment")
    parser.add_argument("--directory", type=Path, help="where the suites are (the environment's own)")
    parser.add_argument("--check", action="store_true", help="write nothing: judge the live database by the suites")
    given = parser.parse_args()
    try:
        env = toml.environment(given.environment)
        directory = given.directory or directory_for(env)
        if not given.check:
            for line in propose(env, directory):
                print(line)
            return 0
        broken = list(check(env, directory))
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join(broken) or f"the live data keeps every expectation in {directory}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(exit_code(main))
