"""Directories and addresses: backup stores, the application, its logs, its certificates."""

from __future__ import annotations

from prefect.blocks.core import Block
from pydantic import Field, SecretStr


class Backups(Block):
    """One store per kind of backup."""

    _block_type_name = "Ops backups"
    _block_type_slug = "ops-backups"

    postgres: str = Field(default="/var/backups/postgresql")
    redis: str = Field(default="/var/backups/redis")
    files: str = Field(default="/var/backups/app")


class Application(Block):
    """The interview application: where it answers, where its files are, and a login for smoke checks."""

    _block_type_name = "Ops application"
    _block_type_slug = "ops-application"

    url: str = Field(default="http://127.0.0.1:8000")
    frontend_url: str = Field(default="http://127.0.0.1:3000")
    directory: str = Field(default="", description="its files; empty: a full restore leaves them alone")
    backend_directory: str = Field(default="/opt/grc/backend", description="where alembic.ini is")
    python: str = Field(default="/opt/grc/backend/venv/bin/python")
    user: str = Field(default="monitor", description="the login of the smoke checks")
    password: SecretStr = SecretStr("")


class Logs(Block):
    """The application's JSON logs."""

    _block_type_name = "Ops logs"
    _block_type_slug = "ops-logs"

    app: str = Field(default="/var/log/grc/app.log")
    audit: str = Field(default="/var/log/grc/audit.log")
    backup: str = Field(default="/var/log/db_backup.log")


class Certificates(Block):
    """The certificates that the web server serves."""

    _block_type_name = "Ops certificates"
    _block_type_slug = "ops-certificates"

    domains: list[str] = Field(default=[])
    directory: str = Field(default="/etc/letsencrypt/live")
    web_server: str = Field(default="nginx", description="the unit to reload after a renewal")
