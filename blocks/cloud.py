"""An account at a cloud provider, and what its resources cost."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from runbook.errors import OpsError

CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 10, 60, 3


class Cloud(Block):
    """AWS, or what speaks its protocol. Prices are of a month, from the provider's list: 0 where nobody wrote them."""

    _block_type_name = "Ops cloud"
    _block_type_slug = "ops-cloud"

    region: str = ""
    profile: str = Field(default="", description="of the AWS configuration")
    endpoint: str = Field(default="", description="empty: AWS")
    access_key: str = Field(default="", description="empty: AWS's own chain of credentials")
    secret_key: SecretStr = SecretStr("")
    disk_price: float = Field(default=0, ge=0, description="of a GB of disk, for a month")
    address_price: float = Field(default=0, ge=0, description="of a public address, for a month")
    currency: str = "USD"
    prices_from: str = Field(default="", description="where the prices are from, and of which day")

    def client(self, service: str) -> Any:
        """A boto3 client.

        Raises:
            OpsError: profile, region or endpoint are not usable.
        """
        import boto3.session  # type: ignore[import-untyped]  # slow to import, and few runs need it
        from botocore.config import Config  # type: ignore[import-untyped]
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

        try:
            session = boto3.session.Session(
                aws_access_key_id=self.access_key or None,
                aws_secret_access_key=self.secret_key.get_secret_value() or None,
                region_name=self.region or None,
                profile_name=self.profile or None,
            )
            retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
            config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
            return session.client(service, endpoint_url=self.endpoint or None, config=config)
        except (BotoCoreError, ValueError) as error:
            raise OpsError(f"no client for {service}: {error}", "correct [cloud] region, profile, endpoint") from None
