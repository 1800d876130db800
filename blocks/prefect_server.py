"""Prefect's own server: its database, its API, and the services that make it up."""

from __future__ import annotations

from pydantic import Field, SecretStr

from blocks.postgres.server import Postgres
from blocks.services.service import DockerServices, Services


class PrefectServer(Postgres):
    """The server that runs these runbooks. Its database is one like others, and holds the key to every secret in it."""

    _block_type_name = "Ops Prefect server"
    _block_type_slug = "ops-prefect-server"
    _description = "Prefect's own database, API and services."

    database: str = Field(default="prefect", description="Prefect's own database")
    user: str = Field(default="prefect", description="the role that Prefect logs in as")
    api_url: str = Field(default="http://127.0.0.1:4200/api")
    auth: SecretStr = Field(default=SecretStr(""), description="PREFECT_SERVER_API_AUTH_STRING, user:password")
    roles: list[str] = Field(
        default=["prefect-api", "prefect-services"],
        description="what is stopped for a restore; in the order of a start",
    )
    containers: dict[str, str] = Field(
        default={}, description="role → container, where Prefect runs in containers; empty: the roles of [services]"
    )
    keep_days: int = Field(
        default=0, ge=0, description="flow runs that ended longer ago are deleted, with their logs; 0: all are kept"
    )
    docker_host: str = Field(default="", description="the engine of those; empty: this host's own")

    def manager(self, services: Services) -> Services:
        """What starts and stops Prefect's services: the environment's, or an engine of their own."""
        return DockerServices(host=self.docker_host, names=self.containers) if self.containers else services

    def login(self) -> tuple[str, str] | None:
        """User and password of the API, None where it asks for none."""
        user, _, password = self.auth.get_secret_value().partition(":")
        return (user, password) if user else None
