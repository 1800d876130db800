"""A new data directory in place of a lost one. https://www.postgresql.org/docs/current/app-initdb.html"""

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
from runbook.files import inside
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.cluster.configuration import (
    ServerConfiguration,
    live_configuration,
    main_file,
    note_of,
    place_configuration,
    save_configuration,
)
from tasks.cluster.unpack import give
from tasks.postgres.restore.staged_copy import REPLACE

NEW = ".new"
NOBODY = "nobody"
LOCALE = "C.UTF-8"


@action(of=lambda postgres: Act(REPLACE, postgres.database))
def create_cluster(postgres: Postgres) -> Path:
    """`initdb` into a staged directory with checksums and the administrator's password, then rename it into place.

    An existing data directory is renamed, never deleted. Its configuration stays.
    """
    data = Path(postgres.data_directory).resolve()  # keep a link: it leads to the chosen disk
    staged = data.with_name(data.name + NEW)
    if staged.exists():
        shutil.rmtree(staged)
    make_data(postgres, staged)
    if configuration := live_configuration(postgres):
        place_configuration(configuration, staged, data, main_file(postgres))
    if data.exists():
        kept = data.with_name(f"{data.name}.superseded_{datetime.now(UTC):%Y%m%d_%H%M%S}")
        save_configuration(note_of(data), configuration or ServerConfiguration(), kept)
        data.rename(kept)
    failpoint("cluster: before rename")
    staged.rename(data)
    note_of(data).unlink(missing_ok=True)
    return data


def make_data(postgres: Postgres, directory: Path, *options: str) -> None:
    """`initdb` into a directory that does not exist yet, with additional `options`.

    Raises:
        CommandFailed: it failed.
        OSError: the directory cannot be created.
    """
    with tempfile.NamedTemporaryFile("w", prefix="ops-", encoding="utf-8") as secret:
        secret.write(postgres.admin_password.get_secret_value() + "\n")
        secret.flush()
        maker = _maker(postgres.os_user)
        inside.make_directory(directory)
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
    """The user that runs initdb, which needs a name: a container's user has none on this host."""
    if os.geteuid() != 0:
        return user
    try:
        return pwd.getpwuid(shell.owner_of(user)[0]).pw_name
    except KeyError:
        return NOBODY
