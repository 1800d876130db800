"""A PostgreSQL server and the application's database on it."""

from __future__ import annotations

import contextlib
import ipaddress
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, LiteralString
from urllib.parse import quote

import psycopg
from prefect.blocks.core import Block
from psycopg import sql
from psycopg.pq import ExecStatus
from psycopg.rows import TupleRow
from pydantic import Field, PrivateAttr, SecretStr

from blocks.postgres.refusals import WRONG_PASSWORD, LoginRefused, Starting, hint_for, sqlstate_of
from runbook import shell
from runbook.errors import OpsError, Unreachable

Connection = psycopg.Connection[TupleRow]

CONNECT_SECONDS = 5
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}
VERIFIED = ("verify-ca", "verify-full")
METHOD = ("authentication method requirement", "server requested")
# Backends that somebody waits for and that do nothing themselves: a lock, the client's next bytes, a standby.
_WORKING = """
SELECT CASE WHEN count(*) > 0 THEN clock_timestamp()::text ELSE '' END FROM pg_stat_activity
WHERE datname = %s AND pid <> pg_backend_pid() AND state = 'active' AND application_name = 'interview-ops'
  AND coalesce(wait_event_type, '') NOT IN ('Lock', 'Client') AND coalesce(wait_event, '') <> 'SyncRep'
"""
# Settings that end a statement, a transaction or a session, and the first version that has each. The server's own,
# a database's and a role's (ALTER … SET) are meant for the application.
TIMEOUTS = {
    "statement_timeout": 0,
    "lock_timeout": 0,
    "idle_in_transaction_session_timeout": 0,
    "idle_session_timeout": 0,
    "tcp_user_timeout": 0,
    "transaction_timeout": 170000,
}
# A pooler would keep the setting for the next client of that session: it announces another process id.
_NO_TIMEOUTS = """
SELECT set_config(name, '0', false) FROM unnest(%s::text[]) AS known(name)
WHERE pg_backend_pid() = %s AND current_setting(name, true) <> '0'
"""
# Starting, stopping, recovering; or its end came between the greeting and the answer.
NOT_YET = ("FATAL:  the database system is ", "FATAL:  データベースシステムは", "terminating connection", "接続を終了")


class ServerSession(psycopg.Connection[TupleRow]):
    """A connection whose `with` block tells of a server that went away as of one that does not answer."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        there = not self.closed or self.broken
        where = f"PostgreSQL at {self.info.host}:{self.info.port}" if there else "PostgreSQL"
        try:
            if error is None and not self.closed:
                self.commit()
            elif not self.closed:
                with contextlib.suppress(psycopg.Error):  # psycopg's own would log the whole text
                    self.rollback()
        except psycopg.OperationalError as at_commit:
            if not self.broken:
                raise
            error = at_commit
        finally:
            broken = self.broken
            self.close()
        if broken and isinstance(error, psycopg.OperationalError):
            hint = "check its log, start it if it is stopped, and run this again"
            raise Unreachable(f"{where} ended the session: {first_line(error)}", hint) from None
        if isinstance(error, psycopg.errors.SerializationFailure):  # a standby's recovery cancels who stands in its way
            hint = "run it again; on a standby hot_standby_feedback = on prevents it"
            raise Unreachable(f"{where} cancelled what was read: {first_line(error)}", hint) from None


class Postgres(Block):
    """PostgreSQL: where it listens, its administrator, the application's role and database, its programs and files."""

    _block_type_name = "Ops PostgreSQL"
    _block_type_slug = "ops-postgresql"
    _description = "A PostgreSQL server and the application's database on it."

    host: str = Field(default="127.0.0.1")
    port: int = Field(default=5432, ge=1, le=65535)
    database: str = Field(description="the application's database")
    user: str = Field(description="the application's role")
    password: SecretStr
    admin_user: str = Field(default="postgres", description="a superuser: dumps need BYPASSRLS, restores need owners")
    admin_password: SecretStr
    programs: str = Field(default="/usr/lib/postgresql/18/bin", description="directory of pg_dump, pg_restore, initdb")
    data_directory: str = Field(default="/var/lib/postgresql/data")
    config_file: str = Field(default="", description="postgresql.conf, where it is outside the data directory")
    os_user: str = Field(default="postgres", description="the user that the server runs as; uid:gid of a container's")
    maintenance_database: str = Field(default="postgres")
    pool_applications: list[str] = Field(default=[], description="application_name of pools: idle ones are not closed")
    service: str = Field(default="postgres", description="this server's role in [services] names")
    name: str = Field(default="", description="its application_name, and in synchronous_standby_names, as a standby")
    accept: list[str] = Field(
        default=[], description="objects that a restore may leave out, as a refused restore names them"
    )
    slot: str = Field(default="", description="the physical slot that it streams from on the primary, as a standby")
    sslmode: Literal["", "disable", "allow", "prefer", "require", "verify-ca", "verify-full"] = Field(
        default="", description="as libpq's; empty: PGSSLMODE, else prefer"
    )
    sslrootcert: str = Field(default="", description="a file of authorities, or system, for verify-ca and verify-full")
    require_auth: str = Field(
        default="", description="libpq's; empty: no password in cleartext to another host, unless sslmode verifies it"
    )
    unanswered_seconds: int = Field(default=60, ge=1, description="a session ends when TCP is not answered for so long")
    stall_seconds: int = Field(
        default=900, ge=1, description="pg_dump, pg_restore, pg_rewind end when they make no progress for so long"
    )

    _version: int = PrivateAttr(0)  # of the server, since the first connection

    def connect(
        self,
        database: str = "",
        *,
        as_application: bool = False,
        autocommit: bool = True,
        seconds: int = 0,
        options: str = "",
        as_configured: bool = False,
    ) -> Connection:
        """Connect as administrator (or as the application's role), to the maintenance database by default, within
        `seconds` (0: `CONNECT_SECONDS`; libpq knows no less than 2). `options`: the session's settings, as PGOPTIONS.

        The session has no timeouts, except those in `options`. `as_configured`: it has the server's, to read them.

        Raises:
            Unreachable: nobody answers there.
            LoginRefused: the server answers and refuses (password, role, database, connection limit).
        """
        user, password = self._login(as_application)
        name = database or self.maintenance_database
        try:
            session = ServerSession.connect(
                host=self.host,
                port=self.port,
                user=user,
                password=password.get_secret_value(),
                dbname=name,
                autocommit=True,
                connect_timeout=seconds or CONNECT_SECONDS,
                application_name="interview-ops",
                # Of a database in SQL_ASCII (`initdb` under LC_ALL=C) psycopg would answer in bytes, names included.
                client_encoding="UTF8",
                options=options or None,
                **self.transport(),
            )
            self._version = session.info.server_version
            if not as_configured:
                names = [timeout for timeout in TIMEOUTS if timeout not in options]
                execute(session, _NO_TIMEOUTS, names, session.info.backend_pid)
        except psycopg.OperationalError as error:
            raise self._refused(error, user, name) from None
        session.autocommit = autocommit
        return session

    def environment(self, *, as_application: bool = False, options: str = "") -> dict[str, str]:
        """What libpq's programs need to reach the server, the password included: for a child's environment only.

        Their sessions have no timeouts, except those in `options` (as PGOPTIONS).
        """
        user, password = self._login(as_application)
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": user,
            "PGPASSWORD": password.get_secret_value(),
            "PGAPPNAME": "interview-ops",
            "PGCONNECT_TIMEOUT": "10",
            "PGOPTIONS": f"{self.without_timeouts} {options}".strip(),
            "LC_MESSAGES": "C",
            **self.security(),
        }

    @property
    def without_timeouts(self) -> str:
        """Options, as PGOPTIONS, of a session without timeouts. The server's version is known once it was queried."""
        return " ".join(f"-c {name}=0" for name, since in TIMEOUTS.items() if self._version >= since)

    def security(self) -> dict[str, str]:
        """TLS and the allowed log-ins, in libpq's variables (https://www.postgresql.org/docs/current/libpq-envars.html).

        libpq knows PGREQUIREAUTH from version 16 on; older programs ignore it.
        """
        given = {"PGSSLMODE": self.sslmode, "PGSSLROOTCERT": self.sslrootcert, "PGREQUIREAUTH": self._methods()}
        return {name: value for name, value in given.items() if value}

    def transport(self) -> dict[str, Any]:
        """The same as parameters of a connection, with what ends one whose peer is gone."""
        found = {name.removeprefix("PG").lower(): value for name, value in self.security().items()}
        if "requireauth" in found:
            found["require_auth"] = found.pop("requireauth")
        return {**found, **KEEPALIVES, "tcp_user_timeout": self.unanswered_seconds * 1000}

    def stall(self, database: str = "") -> shell.Stall:
        """How long one of libpq's programs may make no progress: it does none itself, and the server none for it."""

        def activity() -> str:
            with self.connect() as connection:
                return str(execute(connection, _WORKING, database or self.database)[0][0])

        return shell.Stall(self.stall_seconds, activity)

    def _methods(self) -> str:
        """`require_auth`. A server that is not verified may be somebody else's, who asks for the password as it is."""
        verified = (self.sslmode or os.environ.get("PGSSLMODE", "")) in VERIFIED
        if self.require_auth or verified or _is_local(self.host) or "PGREQUIREAUTH" in os.environ:
            return self.require_auth
        return "!password"

    def url(self, database: str, *, driver: str = "postgresql", as_application: bool = True) -> str:
        """A connection URL with the password: for a child's environment, never for a log or a report."""
        user, password = self._login(as_application)
        return psycopg_url(driver, user, password.get_secret_value(), self.host, self.port, database)

    def program(self, name: str) -> str:
        """The path of a client program.

        Raises:
            OpsError: it is not there.
        """
        path = Path(self.programs) / name
        if not path.exists():
            raise OpsError(f"{path} is not there", "install PostgreSQL's programs or correct [postgres] programs")
        return str(path)

    def _login(self, as_application: bool) -> tuple[str, SecretStr]:
        return (self.user, self.password) if as_application else (self.admin_user, self.admin_password)

    def _refused(self, error: psycopg.OperationalError, user: str, database: str) -> OpsError:
        # The last address that was tried: what libpq and the server add to it stands in lines of their own.
        lines = [line.strip() for line in str(error).strip().splitlines() if not line.startswith("\t")]
        text = ([line for line in lines if " failed: " in line] or lines)[-1]
        where = f"PostgreSQL at {self.host}:{self.port}"
        if METHOD[0] in text and METHOD[1] in text:
            return OpsError(
                f"{where} asks for another log-in than [postgres] require_auth allows: {text.rpartition(': ')[2]}",
                "set sslmode = 'verify-full' and sslrootcert, or scram-sha-256 in its pg_hba.conf; "
                "only on a network that nobody else reads: require_auth = 'password'",
            )
        said, code = text.split("FATAL:")[-1].strip(), sqlstate_of(text)
        if code == WRONG_PASSWORD:
            return LoginRefused(f"{where} refuses the password of role {user}", hint_for(text), code)
        if "FATAL" in text and not any(part in text for part in NOT_YET):
            return LoginRefused(f"{where} refuses {user} in database {database}: {said}", hint_for(text), code)
        why = text.rpartition(" failed: ")[2]
        if any(part in text for part in NOT_YET):
            return Starting(f"{where} does not answer: {why}", "it starts or stops: wait, then run this again")
        return Unreachable(f"{where} does not answer: {why}", "start it, or check its log")


def _is_local(host: str) -> bool:
    """Whether nothing leaves this host: a socket's directory, or a loopback address."""
    if host.startswith(("/", "@")) or host in ("", "localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def is_pooled(connection: Connection) -> bool:
    """Whether a connection pooler (PgBouncer …) answers in the server's place: it announces a process id of its own.

    In transaction mode it gives the next statement to another session: advisory locks and settings are lost, or stay
    with a session that others use (https://www.pgbouncer.org/features.html).
    """
    return int(execute(connection, "SELECT pg_backend_pid()")[0][0]) != connection.info.backend_pid


def refuse_pooler(connection: Connection) -> None:
    """Raises OpsError where a pooler answers: locks that belong to a session protect nothing there."""
    if is_pooled(connection):
        where = f"{connection.info.host}:{connection.info.port}"
        raise OpsError(f"a connection pooler answers at {where}, not PostgreSQL itself: {POOLED}", DIRECT)


POOLED = "an advisory lock taken through it is lost, or held by somebody else's session"
DIRECT = "set [postgres] host and port to the server itself; the application can go on using the pooler"


def first_line(error: psycopg.Error) -> str:
    """What PostgreSQL or libpq said, without what it adds in lines of their own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("consuming input failed: ")


def psycopg_url(driver: str, user: str, password: str, host: str, port: int, database: str) -> str:
    """`driver://user:password@host:port/database`, each part quoted."""
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    return f"{driver}://{login}@{host}:{port}/{quote(database, safe='')}"


def execute(connection: Connection, statement: LiteralString | sql.Composed, *parameters: object) -> list[TupleRow]:
    """Run one statement and return its rows (none for a command). Rows may have no columns: `SELECT FROM …`."""
    cursor = connection.execute(statement, parameters or None)
    return cursor.fetchall() if cursor.pgresult and cursor.pgresult.status == ExecStatus.TUPLES_OK else []
