"""A certificate's files, as certbot keeps them: `<directory>/<domain>/fullchain.pem` and `privkey.pem`."""

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
# Whoever else can read a key can be the server; a group that reads it may be meant.
FORBIDDEN_MODE = 0o027


@dataclass(frozen=True)
class Files:
    """What was found of one certificate: its chain, or why it cannot be read; what is wrong with its key."""

    names: tuple[str, ...]
    directory: Path
    chain: tuple[Certificate, ...] = ()
    missing: bool = False
    trouble: tuple[str, str] = ("", "")
    key_trouble: tuple[str, str] = ("", "")

    @property
    def name(self) -> str:
        """Its directory's name, and certbot's."""
        return self.names[0]


@probe
def read_files(directory: Path, names: Sequence[str]) -> Files:
    """Read both files of a certificate; whatever is wrong with them is in the answer, with what to do about it."""
    place = directory / names[0]
    try:
        chain = parse_chain(_content(place / CHAIN))
    except FileNotFoundError:
        trouble = (f"{place / CHAIN} is not there", "launch renew-certificates, which asks for it; or correct the name")
        return Files(tuple(names), place, missing=True, trouble=trouble)
    except OSError as error:
        return Files(tuple(names), place, trouble=_unreadable(place / CHAIN, error))
    except ValueError as error:
        what = f"{place / CHAIN} holds no certificate that can be read ({' '.join(str(error).split())[:100]})"
        hint = "put the last good one back, from certbot's archive directory or a backup"
        return Files(tuple(names), place, trouble=(what, hint))
    return Files(tuple(names), place, chain, key_trouble=_look_at_key(place / KEY, chain[0]))


def _content(path: Path) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise OSError(0, "is no file")
    with path.open("rb") as file:
        return file.read(MOST_BYTES)


def _unreadable(path: Path, error: OSError) -> tuple[str, str]:
    hint = "let the worker's user read it (certbot's directories are root's), or correct [certificates] directory"
    return f"{path}: {error.strerror}", hint


def _look_at_key(path: Path, certificate: Certificate) -> tuple[str, str]:
    """What is wrong with the key, and what to do; nothing: it is the certificate's, and nobody else can read it."""
    try:
        key = load_pem_private_key(_content(path), None)
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        return _unreadable(path, error)
    except TypeError:
        return f"{path} is encrypted: it was not compared", "servers start unattended only with a key without password"
    except (ValueError, UnsupportedAlgorithm):
        return (
            f"{path} holds no key that can be read",
            "put the one of this certificate back, or launch renew-certificates with force",
        )
    if key.public_key() != certificate.parsed.public_key():
        hint = "the server will not start with these two: put the certificate's own key there, or issue both anew"
        return f"{path} is not this certificate's key", hint
    if mode & FORBIDDEN_MODE:
        return f"{path} has mode {mode:o}", f"chmod 600 {path}: who reads it can pose as the server"
    return "", ""


def file_of(found: Sequence[Files], name: str) -> Files | None:
    """Whose files a server of that name would serve."""
    covering = [files for files in found if files.chain and files.chain[0].covers(name)]
    return next((files for files in covering if name.lower() in files.names), covering[0] if covering else None)


def require_chain(files: Files) -> Certificate:
    """The certificate itself.

    Raises:
        OpsError: it could not be read.
    """
    if not files.chain:
        raise OpsError(*files.trouble)
    return files.chain[0]
