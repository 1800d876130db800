"""Create a user, or set the password of an existing one: ``python -m grc_backend.create_user NAME``.

The password comes by the environment variable ``OPS_APPLICATION_PASSWORD``: arguments are seen by everybody (ps).
"""

from __future__ import annotations

import argparse
import os
import sys

import psycopg

from .passwords import hash_password
from .settings import read_environment


def create_user(database_url: str, username: str, password: str) -> int:
    """Create `username` or reset the password; return the user's id. Raises `psycopg.Error`."""
    with psycopg.connect(database_url, connect_timeout=10) as connection:
        row = connection.execute(
            """
            INSERT INTO public.users (username, display_name, password_hash) VALUES (%s, %s, %s)
            ON CONFLICT (username) DO UPDATE SET password_hash = EXCLUDED.password_hash, is_active = true
            RETURNING id
            """,
            (username, username, hash_password(password)),
        ).fetchone()
    assert row is not None, "INSERT … RETURNING returns a row"
    return int(row[0])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m grc_backend.create_user", description=__doc__)
    parser.add_argument("name")
    name: str = parser.parse_args().name
    password = os.environ.get("OPS_APPLICATION_PASSWORD", "")
    database_url = read_environment().get("DATABASE_URL", "")
    if not password or not database_url:
        print("OPS_APPLICATION_PASSWORD and DATABASE_URL (.env) are needed", file=sys.stderr)
        return 2
    try:
        print(f"{name}: user id {create_user(database_url, name, password)}")
    except psycopg.Error as error:
        print(f"cannot create {name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
