"""Why PostgreSQL refuses a log-in, by SQLSTATE, and what to do about it.

libpq gives no SQLSTATE for a refused connection, only the server's text in the server's language. English and Japanese
are known here (and PgBouncer's); any other text is shown word for word, and no cause is guessed.

https://www.postgresql.org/docs/current/errcodes-appendix.html
"""

from __future__ import annotations

import re

from runbook.errors import OpsError, Unreachable

TOO_MANY, WRONG_PASSWORD, NOT_ADMITTED, NO_DATABASE = "53300", "28P01", "28000", "3D000"
DISK_FULL, NO_MEMORY, CLOSED, NO_RIGHT, UNKNOWN = "53100", "53200", "55000", "42501", ""

# Of one text the first that fits: names of roles and databases are quoted in it, and may hold any word.
_TEXTS = (
    (DISK_FULL, r"No space left on device|空き領域がありません"),
    (
        TOO_MANY,
        r"too many (?:clients already|connections for (?:role|database))|connection slots are reserved|"
        r"requested standby connections exceeds|no more connections allowed|"
        r"クライアント数が多すぎます|接続が多すぎます|のために予約されています",
    ),
    (WRONG_PASSWORD, r"password authentication failed|no password supplied|パスワード認証"),
    (
        NOT_ADMITTED,
        r"pg_hba\.conf|is not permitted to log in|authentication failed for user|"
        r"valid client certificate|ログインが許可されていません|認証に失敗しました|role \"[^\"]*\" does not exist|"
        r"ロール\"[^\"]*\"は存在しません",
    ),
    (NO_DATABASE, r"database \"[^\"]*\" does not exist|データベース\"[^\"]*\"は存在しません"),
    (CLOSED, r"is not currently accepting connections|cannot connect to invalid database|接続を受け付けて"),
    (
        NO_RIGHT,
        r"to start (?:WAL sender|walsender)|permission denied for database|"
        r"データベース\"[^\"]*\".*(?:権限|アクセスが拒否)",
    ),
    (NO_MEMORY, r"out of (?:shared )?memory|メモリ不足"),
)
_HINTS = {
    DISK_FULL: "launch free-disk-emergency: it shows what uses the disk and what can be deleted",
    TOO_MANY: "close idle sessions (close-idle-connections); check-connections shows who holds the connections",
    WRONG_PASSWORD: "correct the secret in the environment's variables and register the blocks again",
    NOT_ADMITTED: "compare the role, its LOGIN right and pg_hba.conf on the server with the environment's TOML",
    NO_DATABASE: "correct the database's name in the environment's TOML; show-recovery-options where it was dropped",
    CLOSED: "somebody closed it: SELECT datallowconn, datconnlimit FROM pg_database shows how",
    NO_RIGHT: "GRANT CONNECT ON DATABASE to that role",
    NO_MEMORY: "read the server's log: lower max_connections or shared_buffers, or give its host more memory",
}
_LIMITS = (
    (
        r"connections for role|ロール.*接続が多すぎます",
        "raise that role's limit (ALTER ROLE … CONNECTION LIMIT), or close its idle sessions: close-idle-connections",
    ),
    (
        r"connections for database|データベース.*接続が多すぎます",
        "raise that database's own limit (ALTER DATABASE … CONNECTION LIMIT) or close idle sessions in it",
    ),
    (r"standby connections", "raise max_wal_senders (needs a restart), or end a replication connection"),
    (r"no more connections allowed", "PgBouncer is full, not PostgreSQL: raise max_client_conn in its configuration"),
)


class Starting(Unreachable):
    """PostgreSQL answers that it starts, recovers or stops: its process lives."""


class LoginRefused(OpsError):
    """PostgreSQL answers and refuses the log-in. `sqlstate` is "" where its text is in no known language."""

    def __init__(self, message: str, hint: str, sqlstate: str) -> None:
        self.sqlstate = sqlstate
        super().__init__(message, hint)

    def __reduce__(self) -> tuple[type[LoginRefused], tuple[str, str, str]]:
        """Prefect stores what a run raised."""
        return LoginRefused, (self.message, self.hint, self.sqlstate)


def sqlstate_of(said: str) -> str:
    """The SQLSTATE of a refused log-in by its text; `UNKNOWN` where the text is not known."""
    return next((code for code, pattern in _TEXTS if re.search(pattern, said)), UNKNOWN)


def is_own_limit(said: str) -> bool:
    """Whether a role's, a database's, a WAL sender's or PgBouncer's limit refuses it, not max_connections."""
    return any(re.search(pattern, said) for pattern, _ in _LIMITS)


def hint_for(said: str) -> str:
    """The next step after a refused log-in; where the text is not known it names what can refuse one."""
    code = sqlstate_of(said)
    own = (hint for pattern, hint in _LIMITS if code == TOO_MANY and re.search(pattern, said))
    unknown = "the server's own words and its log say which: password, pg_hba.conf, database, or a connection limit"
    return next(own, _HINTS.get(code, unknown))
