"""Try the application's own operations: log in with its connection string, and write."""

from __future__ import annotations

import re
from dataclasses import dataclass

import psycopg
from psycopg import errors

from blocks.places import Application
from blocks.postgres.refusals import DISK_FULL, TOO_MANY, WRONG_PASSWORD, hint_for, is_own_limit, sqlstate_of
from blocks.postgres.server import Postgres, execute, first_line
from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.application.env_file import read_variable

OWN_SECONDS = 10
_KINDS = {WRONG_PASSWORD: "password", TOO_MANY: "full", DISK_FULL: "disk"}


@dataclass(frozen=True)
class LoginTrial:
    """The refusal: its kind, the server's message, and the next step if one is known; all empty if it succeeded."""

    kind: str
    said: str
    hint: str = ""

    @property
    def ok(self) -> bool:
        """Whether it succeeded."""
        return not self.kind


@probe
def try_own_login(application: Application) -> LoginTrial:
    """Connect as the application will at its next start: with the connection string in its own file.

    Raises:
        OpsError: the file is unreadable, or the value is not a PostgreSQL URL.
    """
    value = read_variable.work(application, application.dsn_variable, "dsn_variable")
    url, found = re.subn(r"^postgres(?:ql)?(?:\+\w+)?://", "postgresql://", value)
    if not found:
        where = f"{application.dsn_variable} in {application.env_file}"
        raise OpsError(f"{where} is not a postgresql:// URL", "correct it")
    try:
        with psycopg.connect(url, connect_timeout=OWN_SECONDS, application_name="interview-ops", autocommit=True):
            return LoginTrial("", "")
    except psycopg.ProgrammingError:  # a driver's own parameters; the message may quote the URL
        raise OpsError(
            f"libpq does not understand {application.dsn_variable}", "log in by hand as the application"
        ) from None
    except psycopg.OperationalError as error:
        said = str(error).strip().splitlines()[-1].strip()
        code = sqlstate_of(said)
        kind = "limit" if code == TOO_MANY and is_own_limit(said) else _KINDS.get(code, "other")
        if "FATAL" not in said and code != WRONG_PASSWORD:
            kind = "no answer"
        return LoginTrial(kind, said.rpartition(" failed: ")[2], hint_for(said))


@probe
def try_to_extend(postgres: Postgres, *, as_application: bool) -> LoginTrial:
    """Write some hundred kilobytes to a temporary table, to test write permission and free disk space.

    Raises:
        OpsError, Unreachable: it could not log in, or cannot create temporary tables.
    """
    with postgres.connect(postgres.database, as_application=as_application, autocommit=False) as connection:
        try:
            execute(connection, _FILL)
        except errors.ReadOnlySqlTransaction as error:
            return LoginTrial("read only", first_line(error))
        except (errors.DiskFull, errors.IoError) as error:
            return LoginTrial("disk", first_line(error))
        except errors.InsufficientPrivilege as error:
            message = f"the role cannot create temporary tables: {first_line(error)}"
            raise OpsError(message, "GRANT TEMPORARY ON DATABASE … TO it") from None
        except psycopg.OperationalError as error:
            if connection.broken:
                raise
            return LoginTrial("other", first_line(error))
        except psycopg.Error as error:
            return LoginTrial("other", first_line(error))
        finally:
            if not connection.closed and not connection.broken:
                connection.rollback()
    return LoginTrial("", "")


_FILL = "CREATE TEMPORARY TABLE ops_diagnose AS SELECT n FROM generate_series(1, 20000) AS n"
