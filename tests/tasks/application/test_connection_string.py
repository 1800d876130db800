"""The connection string in the application's file: only its server is changed, whole or not at all."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest
from pydantic import SecretStr

from blocks.places import Application
from blocks.postgres.server import Postgres
from runbook.errors import NotConfirmed, OpsError
from runbook.guard.permit import Act
from tasks.application.connection_string import SWITCH, Switched, read_target, switch_target
from tests.fixtures import forked

ROOT = Path(__file__).parents[3]
HIDDEN = "s%3Acret@候"
STANDBY = Postgres(
    host="standby-server",
    port=5433,
    database="grc_db",
    user="u",
    password=SecretStr("x"),
    admin_password=SecretStr("x"),
)


def at(path: Path, variable: str = "DATABASE_URL") -> Application:
    return Application(env_file=str(path), dsn_variable=variable)


def switch(path: Path, variable: str = "DATABASE_URL", to: Postgres = STANDBY) -> Switched:
    return switch_target.work(at(path, variable), to)


@pytest.mark.parametrize(
    ("line", "before", "after"),
    [
        (
            "DATABASE_URL=postgresql://user:pass@db:5432/grc_db",
            "db:5432",
            "DATABASE_URL=postgresql://user:pass@standby-server:5433/grc_db",
        ),
        (
            "DATABASE_URL=postgresql+asyncpg://user:p%40ss@db/grc_db?ssl=on",
            "db:5432",
            "DATABASE_URL=postgresql+asyncpg://user:p%40ss@standby-server:5433/grc_db?ssl=on",
        ),
        (
            "DATABASE_URL='postgresql://user:db:5432@db:5432/grc_db'",
            "db:5432",
            "DATABASE_URL='postgresql://user:db:5432@standby-server:5433/grc_db'",
        ),
        (
            'export DATABASE_URL = "postgresql://db"',
            "db:5432",
            'export DATABASE_URL = "postgresql://standby-server:5433"',
        ),
        (
            "DATABASE_URL=postgresql://u:p@[::1]:5432/d",
            "[::1]:5432",
            "DATABASE_URL=postgresql://u:p@standby-server:5433/d",
        ),
        (
            "DATABASE_URL=postgresql://u:p@db?application_name=x",
            "db:5432",
            "DATABASE_URL=postgresql://u:p@standby-server:5433?application_name=x",
        ),
    ],
)
def test_only_the_server_is_changed(tmp_path: Path, line: str, before: str, after: str) -> None:
    path = tmp_path / ".env"
    around = "# DATABASE_URL=postgresql://old\nPORT=8000\nX_DATABASE_URL=a\n{}\nREDIS_URL=redis://db:5432/0\n"
    path.write_text(around.format(line), encoding="utf-8")
    path.chmod(0o640)
    assert read_target.work(at(path)) == before
    done = switch(path)
    assert (done.before, done.after, done.changed) == (before, "standby-server:5433", True)
    assert path.read_text(encoding="utf-8") == around.format(after)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [other.name for other in tmp_path.iterdir()] == [".env"]
    assert not switch(path).changed, "done twice it is done"


def test_the_last_line_counts_and_another_name_is_another_line(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("DSN=postgresql://a/x\nDSN=postgresql://b/x\n")
    assert read_target.work(at(path, "DSN")) == "b:5432"
    switch(path, "DSN")
    assert path.read_text() == "DSN=postgresql://a/x\nDSN=postgresql://standby-server:5433/x\n"


def test_a_list_of_servers_that_names_it_stays(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    text = "DATABASE_URL=postgresql://u:p@db:5432,standby-server:5433/d?target_session_attrs=read-write\n"
    path.write_text(text)
    assert not switch(path).changed
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read: No such file or directory — correct"),
        (b"\xff\xfe", "cannot be read: it is not UTF-8"),
        (b"PORT=1\n", "has no line DATABASE_URL=… — correct [application] env_file or dsn_variable"),
        (f"DATABASE_URL=host=db password={HIDDEN}\n".encode(), "is no URL with a host — write it as"),
        (f"DATABASE_URL=postgresql://u:{HIDDEN}@/d\n".encode(), "is no URL with a host"),
    ],
)
def test_what_cannot_be_switched_is_said_without_what_stands_there(
    tmp_path: Path, text: bytes | None, said: str
) -> None:
    path = tmp_path / ".env"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(OpsError) as error:
        switch(path)
    assert said in str(error.value)
    assert HIDDEN not in str(error.value)
    assert "\n" not in str(error.value)


def test_no_file_is_named() -> None:
    with pytest.raises(OpsError, match=r"\[application\] names no env_file — add the file"):
        read_target.work(Application())


def test_it_is_carried_out_by_a_plan_which_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("DATABASE_URL=postgresql://db/x\n")
    action = switch_target.bind(at(path), STANDBY)
    assert action.acts == (Act(SWITCH, str(path)),)
    with pytest.raises(NotConfirmed):
        action()
    assert path.read_text() == "DATABASE_URL=postgresql://db/x\n"


KILLED = """
import sys
from pathlib import Path
from tests.tasks.application.test_connection_string import switch
switch(Path(sys.argv[1]))
"""


def test_killed_before_the_rename_the_old_one_is_whole_and_the_next_run_ends_well(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("DATABASE_URL=postgresql://db/x\n")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OPS_FAILPOINT": "env file: before rename"}
    done = forked.run(["-c", KILLED, str(path)], variables)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "DATABASE_URL=postgresql://db/x\n"
    assert switch(path).changed
    assert [other.name for other in tmp_path.iterdir()] == [".env"]
