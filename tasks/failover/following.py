"""The files that make a stopped server a standby: connection string, slot, signal file.

https://www.postgresql.org/docs/current/warm-standby.html#STANDBY-SERVER-SETUP
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from blocks.postgres.server import Postgres, execute
from runbook.files import inside
from tasks.cluster.configuration import AUTO
from tasks.failover.fencing import SIGNAL, give_like
from tasks.stores.directory import told

_OWN = re.compile(r"\s*(primary_conninfo|primary_slot_name|synchronous_standby_names)\b", re.IGNORECASE)
# These belong to the server that the string was written for.
_DROPPED = ("hostaddr", "target_session_attrs", "load_balance_hosts", "dbname", "replication")


def upstream_of(primary: Postgres, standby: Postgres) -> str:
    """The connection string of `standby` to `primary`: the one that `primary` used as a standby itself. If it never was
    one, or its passfile is unreadable, the administrator's. It may contain a password, which `follow` moves into a
    passfile.

    Raises:
        Unreachable: the primary is down.
    """
    with primary.connect() as connection:
        conninfo = str(execute(connection, "SELECT current_setting('primary_conninfo')")[0][0])
    known = {key: value for key, value in conninfo_to_dict(conninfo).items() if key not in _DROPPED} if conninfo else {}
    if not known:
        known = {"user": primary.admin_user, "password": primary.admin_password.get_secret_value()}
    if (passfile := str(known.get("passfile") or "")) and "password" not in known:
        own = primary.admin_password.get_secret_value() if known.get("user") == primary.admin_user else ""
        if password := _password_in(passfile) or own:
            known = {**known, "password": password}
            del known["passfile"]
    known |= {"host": primary.host, "port": str(primary.port)}
    known |= {"application_name": standby.name} if standby.name else {}
    return make_conninfo("", **known)


def follow(standby: Postgres, upstream: str, data: Path | None = None, before: str = "") -> None:
    """Make a stopped server (or the copy in `data`) start as a standby of `upstream`. `before`: the former content of
    its postgresql.auto.conf, if that was overwritten.

    The password goes into a passfile next to the data directory: postgresql.auto.conf is in every base backup, and
    `SHOW primary_conninfo` shows it. https://www.postgresql.org/docs/current/libpq-pgpass.html
    """
    directory = data or Path(standby.data_directory)
    auto = directory / AUTO
    text = before or _text_of(auto)
    lines = [line for line in text.splitlines() if not _OWN.match(line)]
    lines.append(f"primary_conninfo = {_quoted(_with_passfile(standby, directory, upstream))}")
    lines += [f"primary_slot_name = {_quoted(standby.slot)}"] if standby.slot else []
    give_like(directory, auto, "\n".join((*lines, "")))
    give_like(directory, directory / SIGNAL, "")


def _text_of(auto: Path) -> str:
    with told(auto), contextlib.suppress(FileNotFoundError):
        return inside.read_text(auto)
    return ""


def _with_passfile(standby: Postgres, directory: Path, upstream: str) -> str:
    known = conninfo_to_dict(upstream)
    if not (password := str(known.pop("password", "") or "")):
        return upstream
    path = passfile_of(standby)
    fields = (*(str(known.get(name) or "*") for name in ("host", "port")), "*", str(known.get("user") or "*"), password)
    give_like(directory, path, ":".join(re.sub(r"([\\:])", r"\\\1", field) for field in fields) + "\n")
    return make_conninfo("", **{**known, "passfile": str(path)})


def passfile_of(standby: Postgres) -> Path:
    """The passfile of a standby's log-in to the primary: outside of what a base backup copies."""
    data = Path(standby.data_directory).resolve()
    return data.with_name(f"{data.name}.pgpass")


def _password_in(passfile: str) -> str:
    """The password in a passfile that `follow` wrote; "" for another file, or one that is not on this host."""
    try:
        (line,) = inside.read_text(Path(passfile)).splitlines()
    except (OSError, ValueError):
        return ""
    fields = re.findall(r"((?:\\.|[^\\:])*)(?::|$)", line)[:5]
    return re.sub(r"\\(.)", r"\1", fields[4]) if len(fields) == 5 else ""


def _quoted(value: str) -> str:
    doubled = value.replace("'", "''")
    return f"'{doubled}'"
