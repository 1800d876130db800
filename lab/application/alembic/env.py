"""Run the migrations on the database that ``DATABASE_URL`` names: the environment first, else ``.env``.

Manual §8.4 keeps the address in ``backend/.env`` as ``postgresql://user:pass@host:5432/grc_db``.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from alembic import context
from dotenv import dotenv_values
from sqlalchemy import create_engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool


def database_url() -> URL:
    """Return the address, with the psycopg driver. Ends the program with a clear line when there is none."""
    file = Path(context.config.config_file_name or "alembic.ini").with_name(".env")
    written = dotenv_values(file, interpolate=False, encoding="utf-8") if file.is_file() else {}
    url = os.environ.get("DATABASE_URL") or written.get("DATABASE_URL")
    if not url:
        sys.exit(f"DATABASE_URL is missing in the environment and in {file}")
    return make_url(url).set(drivername="postgresql+psycopg")


def run_migrations_online() -> None:
    engine = create_engine(
        database_url(), poolclass=NullPool, connect_args={"connect_timeout": 10, "application_name": "alembic"}
    )
    with engine.connect() as connection:
        # One transaction for all: a failing upgrade leaves the schema at the revision where it was.
        context.configure(connection=connection, transaction_per_migration=False)
        with context.begin_transaction():
            context.run_migrations()


def run_migrations_offline() -> None:
    context.configure(url=database_url(), literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()


logging.basicConfig(format="%(levelname)s %(name)s %(message)s", stream=sys.stderr)
logging.getLogger("alembic").setLevel(logging.INFO)
if context.is_offline_mode():
    run_migrations_offline()
else:
    run_migrations_online()
