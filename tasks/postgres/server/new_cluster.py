"""A new data directory where the old one is gone. https://www.postgresql.org/docs/current/app-initdb.html"""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook import shell
from runbook.failpoint import failpoint
from runbook.guard.permit import Permit
from runbook.kinds import action
from tasks.cluster.unpack import give
from tasks.postgres.restore.staged_copy import REPLACE

NEW = ".new"
NOBODY = "nobody"
LOCALE = "C.UTF-8"


@action
def create_cluster(permit: Permit, postgres: Postgres) -> Path:
    """`initdb` beside, checksums on, the administrator's password from the secrets; then renamed into place.

    What is left of an old data directory is renamed aside, never removed.
    """
    permit.require(REPLACE, postgres.database)
    data = Path(postgres.data_directory).resolve()  # a link stays: it leads to the disk that was chosen
    beside = data.with_name(data.name + NEW)
    if beside.exists():
        shutil.rmtree(beside)
    make_data(postgres, beside)
    if data.exists():
        data.rename(data.with_name(f"{data.name}.superseded_{datetime.now(UTC):%Y%m%d_%H%M%S}"))
    failpoint("cluster: before rename")
    beside.rename(data)
    return data


def make_data(postgres: Postgres, directory: Path, *options: str) -> None:
    """`initdb`, with more `options` where given, into a directory that is not there yet.

    Raises:
        CommandFailed: it ended with an error.
        OSError: the directory cannot be created.
    """
    with tempfile.NamedTemporaryFile("w", prefix="ops-", encoding="utf-8") as secret:
        secret.write(postgres.admin_password.get_secret_value() + "\n")
        secret.flush()
        maker = _maker(postgres.os_user)
        directory.mkdir(mode=0o700)
        give(Path(secret.name), maker)
        give(directory, maker)
        argv = [
            *(postgres.program("initdb"), f"--pgdata={directory}", f"--username={postgres.admin_user}"),
            *(f"--pwfile={secret.name}", "--auth=scram-sha-256", "--data-checksums", "--encoding=UTF8"),
            *(f"--locale={LOCALE}", "--no-instructions", *options),
        ]
        shell.run(argv, user=maker, environment={"LC_ALL": "C"}, directory=Path("/"))
        give(directory, postgres.os_user)


def _maker(user: str) -> str:
    """initdb wants a user with a name; a container's has none here."""
    if os.geteuid() != 0:
        return user
    try:
        return pwd.getpwuid(shell.owner_of(user)[0]).pw_name
    except KeyError:
        return NOBODY
