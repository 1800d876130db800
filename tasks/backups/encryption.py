"""Backups encrypted on this host with age (https://age-encryption.org), before they are stored anywhere.

Every file is encrypted to all recipients: the key that operations hold, and one that is escrowed elsewhere, so that a
lost key does not lose the backups. The environment holds public keys; only what restores needs the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pyrage
from pyrage import x25519

from runbook.errors import OpsError
from tasks.backups.manifest import FileSum, sum_of

ENDING = ".age"


@dataclass(frozen=True)
class Key:
    """Public keys (`age1…`) to which backups are encrypted, none: not at all; and the secret key that reads them."""

    recipients: tuple[str, ...] = ()
    identity: str = field(default="", repr=False)

    @classmethod
    def of(cls, recipients: Sequence[str], identity: str) -> Key:
        """Checked.

        Raises:
            OpsError: one of them is no key; the secret is not shown.
        """
        for recipient in recipients:
            _recipient(recipient)
        if identity:
            _identity(identity)
        return cls(tuple(recipients), identity)

    @property
    def readable(self) -> bool:
        """Whether the identity here is that of one of the recipients."""
        return bool(self.identity) and str(_identity(self.identity).to_public()) in self.recipients


NO_KEY = Key()


def encrypt_files(directory: Path, files: Mapping[str, FileSum], key: Key) -> dict[str, FileSum]:
    """Replace each file by its encrypted one (`<name>.age`); returns the sums of those.

    Raises:
        OpsError: the disk is full.
    """
    recipients = [_recipient(text) for text in key.recipients]

    def encrypt(name: str) -> tuple[str, FileSum]:
        path = directory / name
        target = path.with_name(path.name + ENDING)
        try:
            pyrage.encrypt_file(str(path), str(target), recipients)
        except OSError as error:
            raise OpsError(
                f"{path.name} cannot be encrypted: {error.strerror or error}",
                "free disk space there, then run it again",
            ) from None
        path.unlink()
        return name + ENDING, sum_of(target)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(encrypt, files))


def decrypt_files(source: Path, target: Path, files: Mapping[str, FileSum], key: Key) -> list[str]:
    """Write each file in clear below `target`; returns how they differ from the manifest's sums, as sentences.

    Raises:
        OpsError: there is no key here, or it is another one.
    """
    if not key.identity:
        raise OpsError("the backup is encrypted and this environment has no key", "set identity_env in [backups]")
    identity, problems = _identity(key.identity), []
    for name, expected in files.items():
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            pyrage.decrypt_file(str(source / (name + ENDING)), str(path), [identity])
        except pyrage.DecryptError as error:
            if "No matching keys" in str(error):
                raise OpsError(
                    "the backup was encrypted to other keys than this environment's", "use the escrowed key"
                ) from None
            problems.append(f"{name}{ENDING} cannot be decrypted: {error}")
            continue
        except OSError as error:
            if error.errno:
                raise OpsError(f"{path} cannot be written: {error.strerror}", f"free disk space at {target}") from None
            problems.append(f"{name}{ENDING} cannot be decrypted: it was altered")  # age's own seal of a chunk
            continue
        found = sum_of(path)
        if found != expected:
            problems.append(f"{name} differs from its manifest once it is decrypted")
    return problems


def encrypted(content: bytes, key: Key) -> bytes:
    """A small content, encrypted to all recipients."""
    return bytes(pyrage.encrypt(content, [_recipient(text) for text in key.recipients]))


def decrypted(content: bytes, key: Key) -> bytes:
    """A small content in clear.

    Raises:
        OpsError: there is no key here, or it is another one.
        pyrage.DecryptError: it was altered.
    """
    if not key.identity:
        raise OpsError("the WAL is encrypted and this environment has no key", "set identity_env in [backups]")
    try:
        return bytes(pyrage.decrypt(content, [_identity(key.identity)]))
    except pyrage.DecryptError as error:
        if "No matching keys" in str(error):
            raise OpsError("the WAL was encrypted to other keys than this one", "use the escrowed key") from None
        raise


def _recipient(text: str) -> x25519.Recipient:
    try:
        return x25519.Recipient.from_str(text)
    except pyrage.RecipientError:
        raise OpsError(
            f"“{text[:20]}…” is no public key of age", "set recipients to keys that begin with age1"
        ) from None


def _identity(text: str) -> x25519.Identity:
    try:
        return x25519.Identity.from_str(text.strip())
    except pyrage.IdentityError:
        raise OpsError(
            "the identity is no secret key of age", "set it to a text that begins with AGE-SECRET-KEY-1"
        ) from None
