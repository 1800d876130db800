"""The PostgreSQL block against a real server: what each refusal is called, and where the password is not."""

from __future__ import annotations

import contextlib
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from blocks.postgres import Postgres, execute, psycopg_url
from blocks.postgres_refusals import LoginRefused
from runbook import shell
from runbook.errors import OpsError, Unreachable
from tests.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, free_port

DATABASE = 'blocks "候補者"'
WRONG = "wr0ng password"


@pytest.fixture(scope="module")
def postgres(postgres_server: PostgresServer) -> Iterator[Postgres]:
    postgres_server.create_database(DATABASE)
    yield postgres_server.block(DATABASE)
    postgres_server.drop_database(DATABASE)


def refused(postgres: Postgres, **how: object) -> OpsError:
    with pytest.raises(OpsError) as error:
        postgres.connect(**how)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is None, "libpq's own text does not follow"
    return error.value


def changed(postgres: Postgres, **fields: object) -> Postgres:
    return postgres.model_copy(update=fields)


def test_the_administrator_and_the_application(postgres: Postgres) -> None:
    with postgres.connect() as connection:
        assert execute(connection, "SELECT current_user, current_database()") == [("postgres", "postgres")]
        assert connection.autocommit
    with postgres.connect(DATABASE, as_application=True, autocommit=False) as connection:
        assert execute(connection, "SELECT current_user, current_database()") == [("grc_user", DATABASE)]
        assert execute(connection, "SHOW application_name") == [("interview-ops",)]
        assert not connection.autocommit


@pytest.fixture
def ascii_database(postgres_server: PostgresServer) -> Iterator[str]:
    """As `initdb` makes them under LC_ALL=C."""
    postgres_server.sql("CREATE DATABASE ascii ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    yield "ascii"
    postgres_server.drop_database("ascii")


def test_names_are_texts_where_a_database_knows_no_encoding(postgres: Postgres, ascii_database: str) -> None:
    """Bytes are equal to no text: a standby's state was never understood, and no table could be named."""
    maintenance = changed(postgres, maintenance_database=ascii_database)
    for connection in (maintenance.connect(), postgres.connect(ascii_database)):
        with connection:
            assert execute(connection, "SELECT current_database(), text '日本'") == [("ascii", "日本")]


def test_execute_returns_rows_of_a_query_and_none_of_a_command(postgres: Postgres) -> None:
    with postgres.connect(DATABASE) as connection:
        assert execute(connection, "CREATE TEMPORARY TABLE t (id int)") == []
        assert execute(connection, "INSERT INTO t VALUES (%s), (%s)", 1, 2) == []
        assert execute(connection, "SELECT id FROM t WHERE id > %s", 1) == [(2,)]


@pytest.mark.parametrize("as_application", [True, False])
def test_a_wrong_password_is_one_clear_sentence_without_it(postgres: Postgres, as_application: bool) -> None:
    wrong = changed(postgres, password=SecretStr(WRONG), admin_password=SecretStr(WRONG))
    error = refused(wrong, as_application=as_application)
    role = "grc_user" if as_application else "postgres"
    assert error.message == f"PostgreSQL at 127.0.0.1:{postgres.port} refuses the password of role {role}"
    assert "correct the secret" in error.hint
    assert not isinstance(error, Unreachable), "no retry mends it"
    assert WRONG not in f"{error!r} {error}"


def test_no_password_at_all(postgres: Postgres) -> None:
    assert "refuses the password of role postgres" in str(refused(changed(postgres, admin_password=SecretStr(""))))


def test_an_unknown_role_is_not_told_from_a_wrong_password(postgres: Postgres) -> None:
    assert "refuses the password of role nobody" in str(refused(changed(postgres, admin_user="nobody")))


@pytest.mark.parametrize("name", ["nowhere", "passwords", "in recovery"])
def test_an_unknown_database_is_named(postgres: Postgres, name: str) -> None:
    error = refused(postgres, database=name)
    where = f"PostgreSQL at 127.0.0.1:{postgres.port}"
    assert error.message == f'{where} refuses postgres in database {name}: database "{name}" does not exist'
    assert not isinstance(error, Unreachable)


def test_nobody_listening_is_unreachable(postgres: Postgres) -> None:
    error = refused(changed(postgres, port=free_port()))
    assert isinstance(error, Unreachable)
    assert "does not answer" in error.message
    assert "start it" in error.hint


def test_somebody_who_does_not_answer_is_unreachable(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.postgres.CONNECT_SECONDS", 5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        error = refused(changed(postgres, port=silent.getsockname()[1]))
    assert isinstance(error, Unreachable)


@pytest.mark.parametrize("state", ["starting up", "shutting down", "in recovery mode", "not yet accepting connections"])
def test_a_server_that_starts_or_stops_is_unreachable_for_now(postgres: Postgres, state: str) -> None:
    text = f"connection failed: FATAL:  the database system is {state}"
    error = postgres._refused(psycopg.OperationalError(text), "postgres", "grc_db")
    assert isinstance(error, Unreachable)


def test_the_environment_of_a_program(postgres: Postgres) -> None:
    program = postgres.program("pg_dump")
    assert Path(program).is_file()
    argv = [program, "--schema-only", "--no-owner", DATABASE]
    assert "PostgreSQL database dump" in shell.run(argv, environment=postgres.environment()).stdout
    application = postgres.environment(as_application=True)
    assert (application["PGUSER"], application["PGPASSWORD"]) == ("grc_user", ROLE_PASSWORD)
    assert postgres.environment()["PGPASSWORD"] == ADMIN_PASSWORD


def test_a_missing_program_is_named(postgres: Postgres) -> None:
    with pytest.raises(OpsError, match="/nowhere/pg_dump is not there — install PostgreSQL's programs"):
        changed(postgres, programs="/nowhere").program("pg_dump")


def test_the_url_reaches_the_database_whatever_is_in_its_parts(postgres: Postgres) -> None:
    with psycopg.connect(postgres.url(DATABASE)) as connection:
        assert execute(connection, "SELECT current_user, current_database()") == [("grc_user", DATABASE)]
    with psycopg.connect(postgres.url(DATABASE, as_application=False)) as connection:
        assert execute(connection, "SELECT current_user") == [("postgres",)]
    assert psycopg_url("postgresql+psycopg", "a@b", "c:d/e ?", "h", 1, "f/g") == (
        "postgresql+psycopg://a%40b:c%3Ad%2Fe%20%3F@h:1/f%2Fg"
    )


@contextlib.contextmanager
def server_that_says(code: str, message: str) -> Iterator[int]:
    """The port of a server that refuses every log-in with such an ErrorResponse, as one with lc_messages=ja_JP does."""
    fields = b"".join(part.encode() + b"\0" for part in ("SFATAL", "VFATAL", f"C{code}", f"M{message}")) + b"\0"

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed: the test is over
            while True:
                connection, _address = listener.accept()
                with connection:
                    while int.from_bytes(connection.recv(65536)[4:8]) in (80877103, 80877104):  # SSL, GSS: none here
                        connection.sendall(b"N")
                    connection.sendall(b"E" + (len(fields) + 4).to_bytes(4) + fields)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def test_a_server_that_speaks_japanese(postgres: Postgres) -> None:
    with server_that_says("28P01", 'ユーザー"postgres"のパスワード認証に失敗しました') as port:
        assert "refuses the password of role postgres" in str(refused(changed(postgres, port=port)))
    with server_that_says("57P03", "データベースシステムは起動処理中です") as port, pytest.raises(Unreachable):
        changed(postgres, port=port).connect()


@pytest.mark.parametrize(
    ("code", "said", "hint"),
    [
        ("53300", "現在クライアント数が多すぎます", "close-idle-connections"),
        ("53300", "remaining connection slots are reserved for roles with the SUPERUSER attribute", "close-idle"),
        ("53300", 'too many connections for role "password"', "ALTER ROLE … CONNECTION LIMIT"),
        ("53300", 'データベース"grc_db"への接続が多すぎます', "ALTER DATABASE … CONNECTION LIMIT"),
        ("08P01", "no more connections allowed (max_client_conn)", "PgBouncer is full"),
        ("28000", 'no pg_hba.conf entry for host "10.0.0.1", user "postgres"', "pg_hba.conf"),
        ("28000", 'role "too many clients" is not permitted to log in', "LOGIN right"),
        ("55000", 'database "connections" is not currently accepting connections', "datallowconn"),
        ("42501", 'permission denied for database "grc_db"', "GRANT CONNECT"),
        ("53100", 'could not write init file: No space left on device', "free-disk-emergency"),
        ("28P01", "Passwort-Authentifizierung fehlgeschlagen", "the server's own words"),
    ],
)  # fmt: skip
def test_a_refused_login_is_classified_by_its_code(postgres: Postgres, code: str, said: str, hint: str) -> None:
    """In a language that is not known no cause is guessed; nothing but 28P01 is blamed on a password."""
    with server_that_says(code, said) as port:
        error = refused(changed(postgres, port=port))
    assert isinstance(error, LoginRefused)
    assert said in error.message
    assert hint in error.hint
    assert "correct the secret" not in error.hint
    known = error.sqlstate in (code, "53300" if code == "08P01" else code)
    assert known or (error.sqlstate == "" and "Passwort" in said)
    assert pickle.loads(pickle.dumps(error)).sqlstate == error.sqlstate  # noqa: S301 - of this very line


def test_what_a_standby_s_recovery_cancels_is_worth_another_try(postgres_server: PostgresServer) -> None:
    postgres = postgres_server.block("postgres")
    raised = (
        "DO $$ BEGIN RAISE SQLSTATE '40001' USING MESSAGE = 'canceling statement due to conflict with recovery'; END $$"
    )
    with (
        pytest.raises(Unreachable, match="cancelled what was read: .*conflict with recovery — launch it again"),
        postgres.connect() as connection,
    ):
        connection.execute(raised.encode())
