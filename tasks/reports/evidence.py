"""An archive of evidence: files, and a manifest with the SHA-256 of each, in one tar.gz that nobody else can change."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prefect.blocks.core import Block
from pydantic import BaseModel, SecretStr

from runbook.errors import OpsError
from runbook.files import durable
from runbook.kinds import action, probe

MANIFEST = "manifest.json"
MODE = 0o640
SHORTEST = 6


@dataclass(frozen=True)
class Sealed:
    """An archive that was written: its own SHA-256 is what an auditor compares."""

    path: Path
    sha256: str
    bytes: int
    files: int


@action(idempotent=True)
def seal(path: Path, files: Mapping[str, bytes], about: Mapping[str, object], at: datetime) -> Sealed:
    """Write the files and their manifest; an archive that is there is replaced whole.

    Raises:
        OpsError: it cannot be written.
    """
    listed = [_listed(name, data) for name, data in sorted(files.items())]
    manifest = json.dumps({**about, "files": listed}, ensure_ascii=False, indent=1).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        with durable.replacing(path, mode=MODE) as out, tarfile.open(fileobj=out, mode="w:gz") as tar:
            for name, data in ((MANIFEST, manifest), *sorted(files.items())):
                member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/{name}")
                member.size, member.mtime, member.mode = len(data), int(at.timestamp()), MODE
                tar.addfile(member, io.BytesIO(data))
        content = path.read_bytes()
    except OSError as error:
        raise OpsError(
            f"{path} cannot be written: {error.strerror}", "free disk space there, or correct its owner"
        ) from None
    return Sealed(path, hashlib.sha256(content).hexdigest(), len(content), len(files))


def _listed(name: str, data: bytes) -> dict[str, object]:
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@probe
def verify_sealed(path: Path) -> tuple[str, ...]:
    """What of an archive is not as its manifest says; empty where all is.

    Raises:
        OpsError: it cannot be read.
    """
    try:
        with tarfile.open(path) as tar:
            found = {member.name.partition("/")[2]: _read(tar, member) for member in tar if member.isfile()}
        listed = {one["name"]: str(one["sha256"]) for one in json.loads(found.pop(MANIFEST))["files"]}
    except (OSError, tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise OpsError(f"{path} cannot be read: {type(error).__name__}", "collect the evidence again") from None
    changed = [
        f"{name} was changed"
        for name, data in found.items()
        if name in listed and hashlib.sha256(data).hexdigest() != listed[name]
    ]
    missing = [f"{name} is missing" for name in listed if name not in found]
    return (*changed, *missing, *(f"{name} is not in the manifest" for name in found if name not in listed))


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file else b""


def secrets_of(blocks: Iterable[Block]) -> list[str]:
    """What blocks keep secret. What is shorter than six characters is found in any text, and proves nothing."""
    found = {secret for block in blocks for secret in _secrets(block)}
    return sorted(secret for secret in found if len(secret) >= SHORTEST)


def _secrets(value: object) -> Iterator[str]:
    """Of a model, and of whatever is in its fields."""
    match value:
        case SecretStr():
            yield value.get_secret_value()
        case BaseModel():
            for name in type(value).model_fields:
                yield from _secrets(getattr(value, name))
        case dict():
            for inner in value.values():
                yield from _secrets(inner)
        case list() | tuple():
            for inner in value:
                yield from _secrets(inner)


def holding(files: Mapping[str, bytes], secrets: Sequence[str]) -> list[str]:
    """The names of files that hold one of the secrets, as it is or as JSON writes it."""
    wanted = {form.encode() for secret in secrets for form in (secret, json.dumps(secret, ensure_ascii=False)[1:-1])}
    return [name for name, data in files.items() if any(secret in data for secret in wanted)]
