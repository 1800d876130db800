"""Four eyes: which runbooks need a second person's one-time code, and whose codes count."""

from __future__ import annotations

import base64
import binascii

from prefect.blocks.core import Block
from pydantic import BaseModel, Field, SecretStr, field_validator

LEAST_SECRET_BYTES = 10


class Approver(BaseModel, extra="forbid"):
    """A person with an authenticator app. `logins`: the person's accounts, so that nobody approves their own run."""

    secret: SecretStr
    logins: list[str] = []

    @field_validator("secret")
    @classmethod
    def _is_base32(cls, secret: SecretStr) -> SecretStr:
        text = secret.get_secret_value().replace(" ", "").upper()
        try:
            decoded = base64.b32decode(text + "=" * (-len(text) % 8))
        except binascii.Error:
            decoded = b""
        if len(decoded) < LEAST_SECRET_BYTES:
            raise ValueError(
                "the variable must hold a TOTP secret: base32, at least 16 characters "
                "(python -c 'import pyotp; print(pyotp.random_base32())')"
            )
        return SecretStr(text)


class Approval(Block):
    """Runbooks that run only with a second person's code (TOTP, RFC 6238)."""

    _block_type_name = "Ops approval"
    _block_type_slug = "ops-approval"

    required: list[str] = Field(min_length=1, description="names of runbooks, e.g. full-restore")
    approvers: dict[str, Approver] = Field(min_length=1, description="name → secret_env, and the person's logins")
    minutes: float = Field(default=30, gt=0, description="for so long a run waits for its approval; then it fails")
