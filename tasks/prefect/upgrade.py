"""Another version of Prefect on a copy of its database: migrated by the Prefect that is installed here, then served by
it. Nothing here touches the live database, nor the live Redis."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import prefect
from pydantic import SecretStr

from blocks.postgres.server import execute
from blocks.prefect_server import PrefectServer
from runbook import shell
from runbook.errors import CommandFailed, OpsError, VerificationFailed
from runbook.kinds import action, probe
from runbook.wait import until
from tasks.postgres.restore.staged_copy import Copy
from tasks.prefect.server import PrefectAnswer, read_api

MIGRATE_SECONDS = 6 * 3600.0
"""Indexes of years of events are built in it; a hang must end some day."""
START_SECONDS = 240.0
HINT = f"do not upgrade to Prefect {prefect.__version__}: look in its release notes, choose another version"
PROGRAM = (sys.executable, "-m", "prefect", "server")
KEPT = ("PREFECT_SERVER_ENCRYPTION_KEY",)
"""None of its other settings is a running Prefect's: they would name the live Redis."""


@dataclass(frozen=True)
class MigratedPrefect:
    """The revision that a copy has after it, and the seconds that it took."""

    revision: str
    seconds: float


@probe
def read_revision(server: PrefectServer, database: str) -> str:
    """The revision of the tables; empty where there are none.

    Raises:
        Unreachable: it is down.
        OpsError: there is no such database.
    """
    with server.connect(database) as connection:
        if not execute(connection, "SELECT to_regclass('alembic_version') IS NOT NULL")[0][0]:
            return ""
        return ", ".join(str(revision) for (revision,) in execute(connection, "SELECT * FROM alembic_version"))


@action(idempotent=True)
def migrate_copy(server: PrefectServer, copy: Copy) -> MigratedPrefect:
    """`prefect server database upgrade` of the Prefect that is installed here, as the role that Prefect logs in as.

    Raises:
        VerificationFailed: it fails; what it said.
    """
    with tempfile.TemporaryDirectory(prefix="ops-prefect-") as home:
        variables = _variables(server, copy, home)
        argv = [*PROGRAM, "database", "upgrade", "-y"]
        try:
            done = shell.run(argv, environment=variables, inherit=KEPT, timeout_seconds=MIGRATE_SECONDS, hint=HINT)
        except OpsError as error:
            text = f"{error.stdout}\n{error.stderr}" if isinstance(error, CommandFailed) else error.message
            raise VerificationFailed(f"the migration of the copy failed: {_last(text)}", HINT) from None
    return MigratedPrefect(read_revision.work(server, copy.database), done.seconds)


@probe
def read_served(server: PrefectServer, copy: Copy) -> PrefectAnswer:
    """Start the API that is installed here on the copy, without its background services (nothing is scheduled), ask it
    for everything that matters, end it. Loopback, behind a password of its own.

    Raises:
        VerificationFailed: it does not start, or answers with an error.
    """
    with _served(server, copy) as trial:
        try:
            return read_api.work(trial)
        except OpsError as error:
            raise VerificationFailed(f"on the upgraded copy, {error.message}", HINT) from None


@contextlib.contextmanager
def _served(server: PrefectServer, copy: Copy) -> Iterator[PrefectServer]:
    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port = int(line.getsockname()[1])
    auth, url = SecretStr(f"trial:{secrets.token_hex(24)}"), f"http://127.0.0.1:{port}/api"
    with tempfile.TemporaryDirectory(prefix="ops-prefect-") as home:
        variables = _variables(server, copy, home) | {
            "PREFECT_SERVER_API_AUTH_STRING": auth.get_secret_value(),
            "PREFECT_API_URL": url,
        }
        argv = [*PROGRAM, "start", "--no-services", "--host", "127.0.0.1", "--port", str(port)]
        log = Path(home) / "log"
        with (
            log.open("wb") as out,
            shell.spawn(argv, environment=variables, inherit=KEPT, stdout=out, stderr=out) as child,
        ):
            _wait(child, url, log)
            yield server.model_copy(update={"api_url": url, "auth": auth})


def _wait(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    def decided() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{url}/ready", trust_env=False, timeout=10).is_success:
                return True
        return child.poll() is not None

    with contextlib.suppress(OpsError):  # what it said tells more than that it took too long
        until(decided, what="that the API is ready", seconds=START_SECONDS)
        if child.poll() is None:
            return
    raise VerificationFailed(f"its API does not start on the upgraded copy: {_last(log.read_text())}", HINT)


def _variables(server: PrefectServer, copy: Copy, home: str) -> dict[str, str]:
    return {
        "PREFECT_HOME": home,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": server.url(copy.database, driver="postgresql+asyncpg"),
        "PREFECT_SERVER_DATABASE_MIGRATE_ON_START": "false",
        "PREFECT_SERVER_UI_ENABLED": "false",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
    }


def _last(text: str) -> str:
    """The last line that says something; a rich console frames it."""
    lines = [line.strip("│╭╮╰╯─ \t") for line in text.splitlines()]
    told = [line for line in lines if line and not line.startswith(("[SQL", "(Background"))]
    errors = [line for line in told if "Error" in line or "error" in line]
    return ((errors or told or ["it said nothing"])[-1])[:300]
