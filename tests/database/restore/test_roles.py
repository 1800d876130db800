"""The roles of a backup on a server that lacks some of them: those that are there stay as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flows.database.backup import backup_database
from runbook.errors import OpsError
from tasks.postgres.dump.dump import GLOBALS
from tasks.postgres.server.roles import create_roles
from tests.database.backup.test_backup import newest
from tests.database.conftest import NAME, Trial
from tests.fixtures.servers import running_postgres

ROLES = """
CREATE ROLE postgres;
ALTER ROLE postgres WITH NOSUPERUSER NOLOGIN;
ALTER ROLE postgres SET work_mem TO '1MB';
CREATE ROLE "odd one";
ALTER ROLE "odd one" WITH NOSUPERUSER LOGIN;
CREATE ROLE postgres_2;
ALTER ROLE postgres_2 WITH SUPERUSER LOGIN;
ALTER ROLE postgres_2 SET work_mem TO '2MB';
GRANT "odd one" TO postgres_2;
"""


def test_only_what_is_lacking_is_made(trial: Trial, tmp_path: Path) -> None:
    backup_database.fn(NAME)
    backup = replace(newest(trial), path=tmp_path)
    (tmp_path / GLOBALS).write_text(ROLES)
    attributes = "SELECT rolname, rolsuper, rolcanlogin FROM pg_roles WHERE rolname ~ 'odd|^postgres' ORDER BY 1"
    with running_postgres() as server:
        server.sql('CREATE ROLE "odd one" NOLOGIN; CREATE ROLE grc_user LOGIN')
        made = create_roles.work(server.block("grc_db"), backup, ["odd one", "postgres", "grc_user"])
        assert made.names == ("postgres_2",)
        assert server.sql(attributes) == [
            ("odd one", False, False),
            ("postgres", True, True),
            ("postgres_2", True, True),
        ]
        assert server.sql("SELECT setconfig FROM pg_db_role_setting") == [(["work_mem=2MB"],)]
        (tmp_path / GLOBALS).write_text("CREATE ROLE grc_user;\nALTER ROLE grc_user WITH NO SUCH THING;\n")
        with pytest.raises(OpsError, match='PostgreSQL refuses: role "grc_user" already exists'):
            create_roles.work(server.block("grc_db"), backup, ["postgres"])
