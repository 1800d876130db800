"""A new data directory where the old one is gone. https://www.postgresql.org/docs/current/app-initdb.html"""

from __future__ import annotations

import os
import shutil
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from blocks.postgres import Postgres
from runbook import shell
from runbook.failpoint import failpoint
from runbook.kinds import action
from runbook.permit import Permit
from tasks.postgres.copy import REPLACE

NEW = ".new"


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
    with tempfile.NamedTemporaryFile("w", prefix="ops-", encoding="utf-8") as secret:
        secret.write(postgres.admin_password.get_secret_value() + "\n")
        secret.flush()
        _give(Path(secret.name), postgres.os_user)
        beside.mkdir(mode=0o700)
        _give(beside, postgres.os_user)
        argv = [
            *(postgres.program("initdb"), f"--pgdata={beside}", f"--username={postgres.admin_user}"),
            *(f"--pwfile={secret.name}", "--auth=scram-sha-256", "--data-checksums", "--encoding=UTF8"),
            *("--locale=C.UTF-8", "--no-instructions"),
        ]
        shell.run(argv, user=postgres.os_user, environment={"LC_ALL": "C"}, directory=Path("/"))
    if data.exists():
        data.rename(data.with_name(f"{data.name}.superseded_{datetime.now(UTC):%Y%m%d_%H%M%S}"))
    failpoint("cluster: before rename")
    beside.rename(data)
    return data


def _give(path: Path, user: str) -> None:
    if os.geteuid() == 0:
        os.chown(path, *shell.owner_of(user))
