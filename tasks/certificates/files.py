"""A certificate's files in certbot's layout: `<directory>/<domain>/fullchain.pem` and `privkey.pem`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from runbook.errors import OpsError
from runbook.kinds import probe
from tasks.certificates.certificate import Certificate
from tasks.certificates.chain import parse_chain

CHAIN, KEY = "fullchain.pem", "privkey.pem"
MOST_BYTES = 1 << 20
# Other users must not read a key: with it they can impersonate the server. A group may be intended.
FORBIDDEN_MODE = 0o027


@dataclass(frozen=True)
class Files:
    """One certificate's files: its chain, or the error (reason, next step); and the error of its key."""

    names: tuple[str, ...]
    directory: Path
    chain: tuple[Certificate, ...] = ()
    missing: bool = False
    trouble: tuple[str, str] = ("", "")
    key_trouble: tuple[str, str] = ("", "")

    @property
    def name(self) -> str:
        """The name of its directory, which is certbot's name for it."""
        return self.names[0]


@probe
def read_files(directory: Path, names: Sequence[str]) -> Files:
    """Read both files of a certificate; errors are in the result, with the next step."""
    place = directory / names[0]
    try:
        chain = parse_chain(_content(place / CHAIN))
    except FileNotFoundError:
        trouble = (f"{place / CHAIN} does not exist", "issue it with renew-certificates, or correct the name")
        return Files(tuple(names), place, missing=True, trouble=trouble)
    except OSError as error:
        return Files(tuple(names), place, trouble=_unreadable(place / CHAIN, error))
    except ValueError as error:
        what = f"{place / CHAIN} contains no readable certificate ({' '.join(str(error).split())[:100]})"
        hint = "restore the last good one from certbot's archive directory or a backup"
        return Files(tuple(names), place, trouble=(what, hint))
    return Files(tuple(names), place, chain, key_trouble=_key_error(place / KEY, chain[0]))


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise OSError(0, "is not a regular file")
    with path.open("rb") as file:
        return file.read(MOST_BYTES)


def _unreadable(path: Path, error: OSError) -> tuple[str, str]:
    hint = "let the worker's user read it (root owns certbot's directories), or correct [certificates] directory"
    return f"{path}: {error.strerror}", hint


def _key_error(path: Path, certificate: Certificate) -> tuple[str, str]:
    """The error of the key and the next step; "" if it matches the certificate and other users cannot read it."""
    try:
        key = load_pem_private_key(_content(path), None)
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        return _unreadable(path, error)
    except TypeError:
        return (
            f"{path} is encrypted: not compared",
            "use a key without a password: servers start unattended only with one",
        )
    except (ValueError, UnsupportedAlgorithm):
        return (
            f"{path} contains no readable key",
            "restore the key of this certificate, or run renew-certificates with force",
        )
    if key.public_key() != certificate.parsed.public_key():
        hint = "restore the matching key, or issue both again: a server does not start with this pair"
        return f"{path} is not this certificate's key", hint
    if mode & FORBIDDEN_MODE:
        return f"{path} has mode {mode:o}", f"run chmod 600 {path}: other users can read the key"
    return "", ""


def file_of(found: Sequence[Files], name: str) -> Files | None:
    """The files of the certificate for a server's name."""
    covering = [files for files in found if files.chain and files.chain[0].covers(name)]
    return next((files for files in covering if name.lower() in files.names), covering[0] if covering else None)


def require_chain(files: Files) -> Certificate:
    """The certificate.

    Raises:
        OpsError: it could not be read.
    """
    if not files.chain:
        raise OpsError(*files.trouble)
    return files.chain[0]
