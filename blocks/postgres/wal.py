"""How WAL leaves the primary, continuously, and where it is kept until it is in the store of WAL."""

from __future__ import annotations

from typing import Literal

from prefect.blocks.core import Block
from pydantic import Field


class Wal(Block):
    """The way of every WAL segment to this host, and from there to `[backups] wal`.

    With `receivewal` a supervised pg_receivewal streams it into `directory` as it is written: what is not a whole
    segment yet is there as `.partial`. With `archive_command` the server puts finished segments there.
    """

    _block_type_name = "Ops WAL"
    _block_type_slug = "ops-wal"
    _description = "How PostgreSQL's WAL is received and archived."

    method: Literal["receivewal", "archive_command"] = "receivewal"
    directory: str = Field(default="/var/lib/postgresql/wal", description="of this host: where segments arrive")
    slot: str = Field(default="wal_archive", description="the receiver's physical slot on the primary")
    name: str = Field(default="receiver", description="its application_name, as in synchronous_standby_names")
    service: str = Field(default="receiver", description="its role in [services] names")
    archiver: str = Field(default="archiver", description="role of the program that ships what is there, as the above")
    tool: Literal["native", "pgbackrest"] = Field(default="native", description="what takes and restores base backups")
    program: str = Field(default="pgbackrest", description="pgBackRest's program, where that is the tool")
    stanza: str = Field(default="", description="pgBackRest's")
    config: str = Field(default="", description="pgbackrest.conf")
