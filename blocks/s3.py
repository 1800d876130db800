"""A bucket on an S3 server (AWS, or any that speaks its protocol), and a place in it."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from pydantic import SecretStr

from runbook.errors import OpsError

CONNECT_SECONDS, READ_SECONDS = 10, 60
ATTEMPTS = 3
CONNECTIONS = 32
SCHEME = "s3://"


@dataclass(frozen=True)
class Bucket:
    """Where backups are: a bucket, and a prefix in it (no slash at its ends; empty: the whole bucket).

    `endpoint` empty: AWS. `access_key` and `secret_key` empty: boto3's own chain (environment, profile, role of the
    host), which is where AWS's credentials belong. `lock_days` above 0 with a `lock_mode`: what is written as data
    cannot be deleted for that long (the bucket must have been created with object lock). `patience_seconds`: how
    long one request is tried again while the server does not answer, or answers 5xx.
    """

    bucket: str
    prefix: str = ""
    endpoint: str = ""
    region: str = ""
    profile: str = ""
    access_key: str = ""
    secret_key: SecretStr = field(default=SecretStr(""), repr=False)
    sse: Literal["", "AES256", "aws:kms"] = ""
    kms_key: str = ""
    lock_mode: Literal["", "GOVERNANCE", "COMPLIANCE"] = ""
    lock_days: int = 0
    patience_seconds: float = 120.0

    @property
    def where(self) -> str:
        """The place as a person reads it."""
        return f"{SCHEME}{'/'.join(part for part in (self.bucket, self.prefix) if part)} at {self.endpoint or 'AWS'}"

    @property
    def locks(self) -> bool:
        """Whether data is written with a retention."""
        return bool(self.lock_mode) and self.lock_days > 0

    def key(self, relative: str) -> str:
        """The key in the bucket of a key below the prefix."""
        return f"{self.prefix}/{relative}" if self.prefix else relative

    def client(self) -> Any:
        """A boto3 S3 client; one for each bucket and process, usable by several threads.

        Raises:
            OpsError: the profile, the region or the endpoint is not usable, or only one half of a key pair is given.
        """
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]  # slow to import

        if bool(self.access_key) != bool(self.secret_key.get_secret_value()):
            raise OpsError(f"{self.where} has one half of a key pair", "give access_key and secret_key, or neither")
        try:
            return _client(self)
        except (BotoCoreError, ValueError) as error:
            raise OpsError(
                f"no S3 client for {self.where}: {error}", "correct its endpoint, region or profile"
            ) from None


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """`s3://bucket/some/prefix` → `("bucket", "some/prefix")`.

    Raises:
        OpsError: it is no such URL.
    """
    name, _, prefix = url.removeprefix(SCHEME).partition("/")
    prefix = prefix.removesuffix("/")
    odd = {"", ".", ".."} & set(prefix.split("/")) if prefix else set()
    if not url.startswith(SCHEME) or not name or odd or any(sign in url for sign in "?#@ \\"):
        raise OpsError(f"{url.rpartition('@')[2]!r} is no place in S3", "write s3://BUCKET/PREFIX")
    return name, prefix


@lru_cache(maxsize=16)
def _client(bucket: Bucket) -> Any:
    import boto3.session  # type: ignore[import-untyped]  # slow to import, and not every store is a bucket
    from botocore.config import Config  # type: ignore[import-untyped]

    session = boto3.session.Session(
        aws_access_key_id=bucket.access_key or None,
        aws_secret_access_key=bucket.secret_key.get_secret_value() or None,
        region_name=bucket.region or None,
        profile_name=bucket.profile or None,
    )
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        # Over plain HTTP boto3 would sign each body's SHA-256 next to the MD5 that is sent and signed anyway.
        s3={"addressing_style": "path", "payload_signing_enabled": False} if bucket.endpoint else None,
        # CRC trailers are refused by many servers; MD5 going there and SHA-256 coming back are checked by tasks.s3
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    client = session.client("s3", endpoint_url=bucket.endpoint or None, config=config)
    for operation in ("DeleteObjects", "PutObjectRetention"):
        client.meta.events.register(f"before-sign.s3.{operation}", _add_md5)
    return client


def _add_md5(request: Any, **_: Any) -> None:
    """Some requests must have a checksum: boto3 sends a CRC, and MinIO and older servers insist on an MD5."""
    digest = hashlib.md5(request.body, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()
