"""A PostgreSQL server and the application's database on it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import LiteralString
from urllib.parse import quote

import psycopg
from prefect.blocks.core import Block
from psycopg import sql
from psycopg.rows import TupleRow
from pydantic import Field, SecretStr

from blocks.postgres_refusals import WRONG_PASSWORD, LoginRefused, hint_for, sqlstate_of
from runbook.errors import OpsError, Unreachable

Connection = psycopg.Connection[TupleRow]

CONNECT_SECONDS = 5
# Starting, stopping, recovering; or its end came between the greeting and the answer.
NOT_YET = ("FATAL:  the database system is ", "FATAL:  データベースシステムは", "terminating connection", "接続を終了")


class Session(psycopg.Connection[TupleRow]):
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
            hint = "look at its log, start it where it is down, and launch this again"
            raise Unreachable(f"{where} ended the session: {first_line(error)}", hint) from None
        if isinstance(error, psycopg.errors.SerializationFailure):  # a standby's recovery cancels who stands in its way
            hint = "launch it again; on a standby hot_standby_feedback = on prevents it"
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
    slot: str = Field(default="", description="the physical slot that it streams from on the primary, as a standby")

    def connect(
        self, database: str = "", *, as_application: bool = False, autocommit: bool = True, seconds: int = 0
    ) -> Connection:
        """Connect as administrator (or as the application's role), to the maintenance database by default, within
        `seconds` (0: `CONNECT_SECONDS`; libpq knows no less than 2).

        Raises:
            Unreachable: nobody answers there.
            LoginRefused: the server answers and refuses (password, role, database, connection limit).
        """
        user, password = self._login(as_application)
        name = database or self.maintenance_database
        try:
            return Session.connect(
                host=self.host,
                port=self.port,
                user=user,
                password=password.get_secret_value(),
                dbname=name,
                autocommit=autocommit,
                connect_timeout=seconds or CONNECT_SECONDS,
                application_name="interview-ops",
                # Of a database in SQL_ASCII (`initdb` under LC_ALL=C) psycopg would answer in bytes, names included.
                client_encoding="UTF8",
            )
        except psycopg.OperationalError as error:
            raise self._refused(error, user, name) from None

    def environment(self, *, as_application: bool = False) -> dict[str, str]:
        """What libpq's programs need to reach the server, the password included: for a child's environment only."""
        user, password = self._login(as_application)
        return {
            "PGHOST": self.host,
            "PGPORT": str(self.port),
            "PGUSER": user,
            "PGPASSWORD": password.get_secret_value(),
            "PGAPPNAME": "interview-ops",
            "PGCONNECT_TIMEOUT": "10",
            "LC_MESSAGES": "C",
        }

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
        said, code = text.split("FATAL:")[-1].strip(), sqlstate_of(text)
        if code == WRONG_PASSWORD:
            return LoginRefused(f"{where} refuses the password of role {user}", hint_for(text), code)
        if "FATAL" in text and not any(part in text for part in NOT_YET):
            return LoginRefused(f"{where} refuses {user} in database {database}: {said}", hint_for(text), code)
        why = text.rpartition(" failed: ")[2]
        if any(part in text for part in NOT_YET):
            return Unreachable(f"{where} does not answer: {why}", "it starts or stops: wait, then launch this again")
        return Unreachable(f"{where} does not answer: {why}", "start it, or look at its log")


def first_line(error: psycopg.Error) -> str:
    """What PostgreSQL or libpq said, without what it adds in lines of their own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].removeprefix("consuming input failed: ")


def psycopg_url(driver: str, user: str, password: str, host: str, port: int, database: str) -> str:
    """`driver://user:password@host:port/database`, each part quoted."""
    login = f"{quote(user, safe='')}:{quote(password, safe='')}"
    return f"{driver}://{login}@{host}:{port}/{quote(database, safe='')}"


def execute(connection: Connection, statement: LiteralString | sql.Composed, *parameters: object) -> list[TupleRow]:
    """Run one statement and return its rows (none for a command)."""
    cursor = connection.execute(statement, parameters or None)
    return cursor.fetchall() if cursor.description else []
