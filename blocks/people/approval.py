"""Four eyes: which runbooks need a second person's one-time code, and whose codes count."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from prefect.blocks.core import Block
from prefect.types import SecretDict
from pydantic import BaseModel, Field, SecretStr, model_validator

LEAST_SECRET_BYTES = 10


class Person(BaseModel, extra="forbid"):
    """`logins`: the person's accounts, so that nobody approves their own run."""

    logins: list[str] = []


@dataclass(frozen=True)
class ApproverBlock:
    """A person with an authenticator app."""

    secret: SecretStr
    logins: list[str]


class Approval(Block):
    """Runbooks that run only with a second person's code (TOTP, RFC 6238)."""

    _block_type_name = "Ops approval"
    _block_type_slug = "ops-approval"

    required: list[str] = Field(min_length=1, description="names of runbooks, e.g. full-restore")
    approvers: dict[str, Person] = Field(min_length=1, description="name → secret_env, and the person's logins")
    minutes: float = Field(default=30, gt=0, description="for so long a run waits for its approval; then it fails")
    secrets: SecretDict = Field(default=SecretDict({}), description="name → TOTP secret")

    @model_validator(mode="before")
    @classmethod
    def _secrets_apart(cls, given: Any) -> Any:
        """A secret inside of `approvers` would be shown by Prefect's API."""
        people = given.get("approvers") if isinstance(given, dict) else None
        if given.get("secrets") or not isinstance(people, dict):
            return given
        secrets = {name: one.get("secret") for name, one in people.items() if isinstance(one, dict)}
        if missing := sorted(name for name, secret in secrets.items() if not secret):
            raise ValueError(f"{missing[0]} has no secret_env, which names the variable of the TOTP secret")
        rest = {name: {key: value for key, value in one.items() if key != "secret"} for name, one in people.items()}
        return {**given, "approvers": rest, "secrets": {name: _checked(name, text) for name, text in secrets.items()}}

    def people(self) -> dict[str, ApproverBlock]:
        """Everybody whose code counts."""
        secrets = self.secrets.get_secret_value()
        return {name: ApproverBlock(SecretStr(secrets[name]), one.logins) for name, one in self.approvers.items()}


def _checked(name: str, secret: object) -> str:
    text = str(secret).replace(" ", "").upper()
    try:
        decoded = base64.b32decode(text + "=" * (-len(text) % 8))
    except binascii.Error:
        decoded = b""
    if len(decoded) < LEAST_SECRET_BYTES:
        raise ValueError(
            f"the variable of {name} must hold a TOTP secret: base32, at least 16 characters "
            "(python -c 'import pyotp; print(pyotp.random_base32())')"
        )
    return text
