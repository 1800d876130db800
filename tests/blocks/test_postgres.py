"""The PostgreSQL block against a real server: what each refusal is called, and where the password is not."""

from __future__ import annotations

import contextlib
import itertools
import pickle
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr

from blocks.postgres.refusals import LoginRefused
from blocks.postgres.server import Postgres, execute, psycopg_url
from runbook import shell
from runbook.errors import CommandFailed, OpsError, Unreachable
from tasks.failover.following import _password_in, follow, passfile_of
from tests.fixtures.servers import ADMIN_PASSWORD, ROLE_PASSWORD, PostgresServer, free_port

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
        assert len(execute(connection, "SELECT FROM t")) == 2, "rows without columns"


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
    monkeypatch.setattr("blocks.postgres.server.CONNECT_SECONDS", 5)
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
        ("53100", "could not write init file: No space left on device", "free-disk-emergency"),
        ("28P01", "Passwort-Authentifizierung fehlgeschlagen", "the server's own words"),
    ],
)
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
        pytest.raises(Unreachable, match="cancelled what was read: .*conflict with recovery — run it again"),
        postgres.connect() as connection,
    ):
        connection.execute(raised.encode())


@contextlib.contextmanager
def asking_for_the_password_as_it_is() -> Iterator[tuple[int, list[bytes]]]:
    """A server that asks for a cleartext password: what it is sent."""
    sent = list[bytes]()
    with socket.create_server(("0.0.0.0", 0)) as listening:  # noqa: S104 - this host under an address that is not loopback

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    line, _ = listening.accept()
                    with line:
                        while (asked := line.recv(4096))[4:8] in (b"\x04\xd2\x16\x2f", b"\x04\xd2\x16\x30"):  # TLS, GSS
                            line.sendall(b"N")
                        line.sendall(b"R\0\0\0\x08\0\0\0\x03")
                        sent.append(asked and line.recv(4096))

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1], sent


def test_no_password_goes_over_a_network_as_it_is(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither psycopg nor PostgreSQL's programs send it; over loopback they do, and where somebody allows it."""
    secret = postgres.admin_password.get_secret_value().encode()
    with asking_for_the_password_as_it_is() as (port, sent):
        away = changed(postgres, host="0.0.0.0", port=port)  # noqa: S104
        error = refused(away)
        assert "asks for another log-in than [postgres] require_auth allows: server requested" in error.message
        assert "require_auth = 'password'" in error.hint
        with pytest.raises(CommandFailed, match="authentication method requirement"):
            shell.run([away.program("psql"), "-c", "SELECT 1"], environment=away.environment())
        assert not any(secret in message for message in sent)
        for allowing in (changed(away, require_auth="password"), changed(away, host="127.0.0.1")):
            sent.clear()
            refused(allowing)
            assert any(secret in message for message in sent)
    monkeypatch.delenv("PGSSLMODE", raising=False)
    verified = changed(postgres, host="db.example.com", sslmode="verify-full", sslrootcert="system")
    assert verified.security() == {"PGSSLMODE": "verify-full", "PGSSLROOTCERT": "system"}
    assert changed(postgres, host="db.example.com").security() == {"PGREQUIREAUTH": "!password"}
    assert changed(postgres, host="/run/postgresql").security() == changed(postgres, host="::1").security() == {}


def test_a_session_whose_peer_is_gone_ends(postgres: Postgres) -> None:
    with changed(postgres, unanswered_seconds=7).connect() as connection:
        told = connection.info.get_parameters()
        assert {name: told[name] for name in ("keepalives_idle", "tcp_user_timeout")} == {
            "keepalives_idle": "30",
            "tcp_user_timeout": "7000",
        }
        descriptor = socket.socket(fileno=connection.fileno())
        try:
            assert descriptor.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000
            assert descriptor.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        finally:
            descriptor.detach()


def test_a_program_that_waits_for_a_lock_is_ended_and_one_whose_server_works_is_not(postgres: Postgres) -> None:
    block = changed(postgres, stall_seconds=1)
    environment = {**block.environment(), "PGDATABASE": block.database}

    def run(statement: str) -> float:
        argv = [block.program("psql"), "-X", "-c", statement]
        return shell.run(argv, environment=environment, stall=block.stall()).seconds

    with block.connect(block.database, autocommit=False) as holding:
        holding.execute("CREATE TABLE held (n int)")
        holding.commit()
        holding.execute("LOCK TABLE held")
        with pytest.raises(OpsError, match="psql made no progress for 1 s and was ended"):
            run("SELECT * FROM held")
    assert run("SELECT pg_sleep(2.5)") > 2.4, "nothing is read or written, and the server works"


def test_the_superuser_s_password_is_in_a_passfile_and_nowhere_else(postgres: Postgres, tmp_path: Path) -> None:
    """Also one with what separates the fields of a passfile; and the next standby finds it there."""
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    standby = changed(postgres, data_directory=str(data))
    for password in (r"a:b\'c d", ADMIN_PASSWORD):
        login = {"host": postgres.host, "port": postgres.port, "user": postgres.admin_user}
        follow(standby, psycopg.conninfo.make_conninfo("", **login, password=password))
        text, path = (data / "postgresql.auto.conf").read_text(), passfile_of(standby)
        assert "password=" not in text
        assert ADMIN_PASSWORD not in text
        assert path.parent == tmp_path
        assert path.stat().st_mode & 0o777 == 0o600
        assert _password_in(str(path)) == password
    (told,) = [line.split(" = ", 1)[1] for line in text.splitlines() if line.startswith("primary_conninfo")]
    with psycopg.connect(told.strip("'").replace("''", "'"), dbname="postgres") as connection:
        assert connection.execute("SELECT current_user").fetchone() == (postgres.admin_user,)


TIMEOUTS = ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout", "transaction_timeout")


@pytest.fixture
def impatient(postgres: Postgres, postgres_server: PostgresServer) -> Iterator[Postgres]:
    """The database, the role and the role in the database end sessions, as an application's owner sets it."""
    with postgres.connect() as connection:
        known = [name for name in TIMEOUTS if execute(connection, "SELECT current_setting(%s, true)", name)[0][0]]
    assert set(TIMEOUTS[:3]) <= set(known)
    database = f"DATABASE {sql.Identifier(DATABASE).as_string()}"
    narrower = (database, "ROLE postgres", f"ROLE postgres IN {database}")
    for where, name in itertools.product(narrower, known):
        postgres_server.sql(f"ALTER {where} SET {name} = '50ms'")
    yield postgres
    for where in narrower:
        postgres_server.sql(f"ALTER {where} RESET ALL")


def test_no_timeout_of_the_application_ends_a_session(impatient: Postgres) -> None:
    """A database's statement_timeout cancelled the backup."""
    for autocommit in (True, False):
        with impatient.connect(DATABASE, autocommit=autocommit) as connection, impatient.connect() as clock:
            assert connection.autocommit == autocommit
            execute(connection, "SELECT pg_sleep(0.1)")
            execute(clock, "SELECT pg_sleep(0.1)")  # the other is idle; without autocommit in its transaction
            assert execute(connection, "SELECT 1") == [(1,)]
    with impatient.connect(DATABASE, options="-c statement_timeout=40ms") as connection:
        with pytest.raises(psycopg.errors.QueryCanceled):
            execute(connection, "SELECT pg_sleep(1)")
        assert execute(connection, "SHOW idle_session_timeout") == [("0",)]
    with impatient.connect(DATABASE, as_configured=True) as connection:
        assert execute(connection, "SHOW statement_timeout") == [("50ms",)]


def test_no_timeout_of_the_application_ends_a_program(impatient: Postgres) -> None:
    environment = {**impatient.environment(options="-c lc_messages=C"), "PGDATABASE": DATABASE}
    two = "BEGIN; SELECT pg_sleep(0.06); SELECT pg_sleep(0.06); COMMIT; SELECT current_setting('lc_messages')"
    argv = [impatient.program("psql"), "-XAtq", *(arg for one in two.split("; ") for arg in ("-c", one))]
    assert shell.run(argv, environment=environment).stdout.split() == ["C"]
