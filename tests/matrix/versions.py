"""PostgreSQL 15, 16 and 17 from PyPI's wheels, in a directory of their own, where the servers' user can run them.

    python -m tests.matrix.versions          # installs what is missing; prints where each version's programs are
    OPS_TEST_POSTGRES=16 python -m pytest …  # every test server is a PostgreSQL 16 (tests/fixtures/servers.py)
    OPS_TEST_POSTGRES=/usr/lib/postgresql/15/bin python -m pytest …  # or any other, such as Debian's

The wheels of 15 and 16 come without contrib (pgvector's `vector` alone), that of 17 with it. None of these packages is
imported, nor seen by the project's environment: only their programs are used.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
VARIABLE = "OPS_TEST_POSTGRES"
MAJORS = (15, 16, 17)
EMBEDDED = 18
"""The version of the wheel in requirements.lock: what tests run on when nothing else is asked for."""
_FOR_PYTHON = "3.11"  # any: nothing of a wheel is imported, and 15's has none for Python 3.13


def chosen(base: Path) -> Path | None:
    """The directory of programs that the environment asks for, of those below `base`; None for the lab's own.

    Raises:
        ValueError, FileNotFoundError: it is not known, or not installed.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked in ("", str(EMBEDDED)):
        return None
    if asked.startswith("/"):
        return Path(asked)
    if asked not in map(str, MAJORS):
        raise ValueError(f"{VARIABLE} is {asked}: there are {MAJORS} and {EMBEDDED}, or a directory of programs")
    return programs(base, int(asked))


def programs(base: Path, major: int) -> Path:
    """The directory of one version's programs below `base`.

    Raises:
        FileNotFoundError: not installed.
    """
    found = sorted((base / _folder(major)).glob("*/pginstall/bin/postgres"))
    if not found:
        raise FileNotFoundError(f"PostgreSQL {major} is not installed for tests: run `make test-matrix`")
    return found[0].parent


def install(base: Path, major: int) -> Path:
    """Install one version where it is missing (some seconds); whole or not at all. Returns where its programs are."""
    target = base / _folder(major)
    if not target.exists():
        base.mkdir(parents=True, exist_ok=True)
        base.chmod(0o755)
        partial = target.with_name(target.name + ".new")
        shutil.rmtree(partial, ignore_errors=True)
        _pip(partial, _requirements(major))
        _readable(partial)
        partial.rename(target)
    return programs(base, major)


def _requirements(major: int) -> Path:
    return HERE / f"requirements-{major}.txt"


def _folder(major: int) -> str:
    """Named after the pinned version: another pin is another folder."""
    pin = re.match(r"(\S+)==(\S+)", _requirements(major).read_text())
    assert pin, f"{_requirements(major)} names no version"
    return f"postgresql-{major}-{pin[1]}-{pin[2]}"


def _pip(target: Path, requirements: Path) -> None:
    options = ("--no-deps", "--require-hashes", "--only-binary=:all:", f"--python-version={_FOR_PYTHON}")
    quiet = ("--quiet", "--disable-pip-version-check", "--no-compile", "--no-warn-conflicts")
    argv = [sys.executable, "-m", "pip", "install", *quiet, *options, "--target", str(target), "-r", str(requirements)]
    subprocess.run(argv, check=True)


def _readable(tree: Path) -> None:
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            program = path.is_dir() or path.parent.name == "bin"
            path.chmod(path.stat().st_mode | (0o755 if program else 0o444))


if __name__ == "__main__":
    from tests.fixtures.servers import programs_base

    with programs_base() as directory:
        for number in MAJORS:
            print(f"PostgreSQL {number}: {install(directory, number)}")
