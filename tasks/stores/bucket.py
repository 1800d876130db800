"""A bucket of an S3 service as a store. A backup there is complete if it has a manifest, which is written last and
deleted first.

Backups are made in a spool on this host. One that could not be uploaded waits there; the next backup uploads it too.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blocks.s3 import Bucket
from runbook.errors import VerificationFailed
from runbook.failpoint import failpoint
from runbook.progress import WorkDone, progress
from runbook.units import size
from tasks.backups import manifest as manifests
from tasks.backups.encryption import Key
from tasks.backups.manifest import MANIFEST, SEAL, FileSum
from tasks.s3 import objects
from tasks.s3.download import download_file, verify_object
from tasks.s3.multipart import abort_unfinished
from tasks.s3.upload import upload_files
from tasks.stores.directory import PARTIAL, SENT, DirectoryStore, begun_by, is_claimed, told


@dataclass(frozen=True)
class BucketStore:
    """A prefix in a bucket, and its spool."""

    bucket: Bucket
    spool: Path
    key: Key

    @property
    def hands(self) -> Path:
        return self.spool

    @property
    def where(self) -> str:
        return self.bucket.where

    def names(self) -> list[str]:
        """One listing of the top level: a store may hold millions of objects. A marker shows an upload or a deletion:
        such a backup is listed only if its manifest exists."""
        there = objects.list_names(self.bucket)
        markers = [name for name in there if name.startswith(PARTIAL)]
        return [
            name
            for name in there
            if not name.startswith(".")
            and (
                not any(marker.endswith(f"-{name}") for marker in markers)
                or self.read(f"{name}/{MANIFEST}") is not None
            )
        ]

    def stamps(self, folder: str) -> dict[str, str]:
        return objects.list_stamps(self.bucket, folder)

    def read(self, path: str) -> str | None:
        try:
            content = objects.read_small(self.bucket, path)
        except VerificationFailed:  # its SHA-256 differs: treated as missing
            return None
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError:
            return None

    def identity(self, path: str) -> str | None:
        return objects.read_identity(self.bucket, path)

    def write(self, path: str, text: str) -> None:
        objects.write_small(self.bucket, path, text.encode(), lock=False)

    def claim(self, environment: str, name: str) -> bool:
        self.write(_marker(environment, name), "")
        if is_claimed(environment, name, self._markers()) or self.read(f"{name}/{MANIFEST}") is not None:
            self.forget(_marker(environment, name))
            return False
        return True

    def _markers(self) -> list[str]:
        return [key for key in objects.list_names(self.bucket) if key.startswith(PARTIAL)]

    def forget(self, path: str) -> None:
        objects.delete(self.bucket, [path])

    def offer(self, directory: Path, name: str, files: Mapping[str, FileSum]) -> None:
        waiting = self.spool / name
        if directory != waiting:
            DirectoryStore(self.spool).offer(directory, name, files)
        environment = manifests.read(waiting).environment
        self.receive(waiting, name, environment, files)
        self._give_name(waiting, name, environment)
        gone = self.spool / f"{SENT}{name}"
        with told(gone):
            waiting.rename(gone)  # its name goes first: half of it must not be taken for one that waits
            shutil.rmtree(gone)

    def receive(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> None:
        if self._has(source, name):
            return
        objects.require_small((source / MANIFEST).stat().st_size, f"the manifest of {name}")
        self.write(_marker(environment, name), "")
        failpoint("receive: begun")
        self._send(source, name, files)

    def accept(self, source: Path, name: str, environment: str, files: Mapping[str, FileSum]) -> list[str]:
        if not self._has(source, name) and (problems := self.damage(name, files)):
            self.clean(environment, name)
            return problems
        self._give_name(source, name, environment)
        return []

    def _has(self, source: Path, name: str) -> bool:
        """Whether the bucket already has this backup.

        Raises:
            VerificationFailed: another one of that name is.
        """
        there = self.read(f"{name}/{MANIFEST}")
        if there not in (None, manifests.text_in(source)):
            raise VerificationFailed(
                f"{self.where} has another backup of the name {name}", "give each environment its own prefix there"
            )
        return there is not None

    def _give_name(self, source: Path, name: str, environment: str) -> None:
        """Write the manifest, unless another environment has taken the name meanwhile."""
        if not self._has(source, name):
            for path in (SEAL, MANIFEST):
                objects.write_small(self.bucket, f"{name}/{path}", (source / path).read_bytes())
        failpoint("receive: offered")
        self.forget(_marker(environment, name))

    def _send(self, source: Path, name: str, files: Mapping[str, FileSum]) -> None:
        """What is there already and equal is passed over."""
        whole = sum(file.bytes for file in files.values())
        sent = [0]

        def tell() -> WorkDone:
            return WorkDone(f"{size(sent[0])} of {size(whole)} sent to {self.where}", sent[0] / max(whole, 1))

        def count(added: int) -> None:
            sent[0] += added

        with progress(tell):
            upload_files(
                self.bucket,
                [(source / path, f"{name}/{path}", file.sha256, file.bytes) for path, file in files.items()],
                tell=count,
            )
        failpoint("receive: files sent")

    def local(self, name: str) -> Path | None:
        return None

    def fetch(self, name: str, files: Mapping[str, FileSum], target: Path) -> None:
        whole, got = sum(file.bytes for file in files.values()), [0]

        def count(added: int) -> None:
            got[0] += added

        def tell() -> WorkDone:
            return WorkDone(f"{size(got[0])} of {size(whole)} fetched from {self.where}", got[0] / max(whole, 1))

        with progress(tell):
            for path, file in files.items():
                if (target / path).is_file() and manifests.sum_of(target / path) == file:
                    count(file.bytes)
                    continue
                with told(target):
                    (target / path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                download_file(self.bucket, f"{name}/{path}", target / path, file.sha256, file.bytes, tell=count)

    def damage(self, name: str, files: Mapping[str, FileSum]) -> list[str]:
        problems = []
        for path, file in files.items():
            try:
                verify_object(self.bucket, f"{name}/{path}", file.sha256, file.bytes)
            except VerificationFailed as error:
                problems.append(error.message)
        return problems

    def remove(self, environment: str, name: str) -> None:
        self.write(_marker(environment, name), "")
        objects.delete(self.bucket, [f"{name}/{MANIFEST}"])
        failpoint("prune: renamed")
        self.clean(environment, name)

    def keeps_deleted(self) -> bool | None:
        return objects.is_versioned(self.bucket)

    def unfinished(self, environment: str) -> list[str]:
        return sorted({*begun_by(environment, self._markers()), *DirectoryStore(self.spool).names()})

    def clean(self, environment: str, name: str) -> bool:
        offered = self.read(f"{name}/{MANIFEST}") is not None
        if not offered:
            abort_unfinished(self.bucket, name)  # their parts take space and stand in no listing
            objects.delete(self.bucket, list(objects.list_objects(self.bucket, name)))
        self.forget(_marker(environment, name))
        return not offered


def _marker(environment: str, name: str) -> str:
    return f"{PARTIAL}{environment}-{name}"
