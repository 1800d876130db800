"""Unpack a release alongside the live one, swap them, and roll back.

`<directory>.release-next` is the unpacked release. `<directory>.release-before` is a copy of the live one: it is
complete before anything is replaced. It is deleted (first renamed to `.deleted`) after the new release, or the
rollback, is proven. Its file `PARTS` states for each part whether it existed.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from blocks.places import Application
from runbook.errors import OpsError
from runbook.failpoint import failpoint
from runbook.files import durable
from runbook.guard.permit import Act
from runbook.kinds import action
from tasks.releases.release import RELEASE, Release, extract, previous_of, write_errors

UNPACK = "unpack"
VENV = "VENV"
PARTS = "PARTS"


def _act(release: Release) -> Act:
    return Act(UNPACK, release.text)


@action(of=_act, idempotent=True, staged=True)
def unpack_release(release: Release) -> Path:
    """Unpack it alongside the live directory; returns its path.

    Raises:
        OpsError: the disk is full, or the archive has a path outside the directory.
    """
    return _unpack(release)


@action(of=_act, idempotent=True, staged=True)
def keep_previous(application: Application, release: Release) -> None:
    """Copy the live release completely. A copy that a killed run left is kept: it is the one to roll back to.

    Raises:
        OpsError: the disk is full, or that copy has other parts.
    """
    before, live = previous_of(release.directory), release.directory
    if before.is_dir():
        if strange := set(release.parts) - _kept(before).keys():
            raise OpsError(
                f"the copy of the previous release, {before}, lacks {', '.join(sorted(strange))}",
                "set [application] release to its value of that deployment, and deploy that version first",
            )
        return
    fresh = before.with_name(f"{before.name}.new")
    with write_errors(fresh):
        _sweep(before)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        parts = (*release.parts, RELEASE)
        for part in parts:
            _copy(live / part, fresh / part)
        (fresh / VENV).write_text(str(Path(application.need("python")).parent.parent.resolve()), encoding="utf-8")
        (fresh / PARTS).write_text(
            json.dumps({part: os.path.lexists(fresh / part) for part in parts}), encoding="utf-8"
        )
        durable.sync_tree(fresh)
        fresh.rename(before)
        durable.sync(before.parent)


@action(of=_act, idempotent=True)
def swap_release(release: Release) -> None:
    """Replace the live parts with the unpacked ones, one by one. The services must be stopped."""
    _swap(release)


def overwrite_live(release: Release) -> None:
    """Overwrite the live files without a copy and with running services: for fault injection only.

    Raises:
        OpsError: they cannot be written.
    """
    _unpack(release)
    _swap(release)


@action(of=_act, idempotent=True)
def restore_previous(release: Release) -> None:
    """Restore the previous release, part by part; its copy is kept until it is proven.

    Raises:
        OpsError: it cannot be written, or the copy is incomplete: then nothing was changed.
    """
    before = previous_of(release.directory)
    kept = _kept(before)
    if lost := [part for part, there in kept.items() if there and not os.path.lexists(before / part)]:
        raise OpsError(
            f"the copy of the previous release, {before}, has lost {', '.join(lost)}",
            "deploy a version that is known to work",
        )
    with write_errors(release.directory):
        for part, there in kept.items():
            live = release.directory / part
            if not there:
                _remove(live)
                continue
            fresh = live.with_name(f".{live.name}.back")
            _remove(fresh)
            _copy(before / part, fresh)
            _replace(fresh, live)


@action(of=_act, idempotent=True)
def delete_previous(release: Release) -> None:
    """Delete the copy: the live release is proven. It is renamed first: a copy with the original name is complete."""
    before = previous_of(release.directory)
    with write_errors(before):
        _sweep(before)
        if before.is_dir():
            before.rename(_doomed(before))
            durable.sync(before.parent)
            failpoint("release: copy of before renamed")
    for path in (_doomed(before), _next(release.directory)):
        shutil.rmtree(path, ignore_errors=True)


def _unpack(release: Release) -> Path:
    place = _next(release.directory)
    extract(release, place)
    with write_errors(place):
        (place / RELEASE).write_text(f"{release.version} {release.commit}\n", encoding="utf-8")
    return place


def _swap(release: Release) -> None:
    place = _next(release.directory)
    with write_errors(release.directory):
        for part in (*release.parts, RELEASE):
            if os.path.lexists(place / part):
                live = release.directory / part
                _own(place / part, live if os.path.lexists(live) else release.directory)
                _replace(place / part, live)
            failpoint(f"release: {Path(part).name} replaced")
        shutil.rmtree(place, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a part, if it exists; as root also its owners."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    elif os.path.lexists(source):
        shutil.copy2(source, target, follow_symlinks=False)
    if os.geteuid() == 0 and os.path.lexists(target):
        for path in (target, *(() if target.is_symlink() else target.rglob("*"))):
            was = (source / path.relative_to(target)).lstat()
            os.chown(path, was.st_uid, was.st_gid, follow_symlinks=False)


def _own(fresh: Path, like: Path) -> None:
    """As root, give it the owner of another path."""
    if os.geteuid() == 0:
        was = like.lstat()
        for path in (fresh, *(() if fresh.is_symlink() else fresh.rglob("*"))):
            os.chown(path, was.st_uid, was.st_gid, follow_symlinks=False)


def _replace(fresh: Path, live: Path) -> None:
    """Swap by rename: a part is the old one or the new one, never a mix."""
    old = live.with_name(f".{live.name}.old")
    _remove(old)
    live.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(live):
        live.rename(old)
    fresh.rename(live)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _kept(before: Path) -> dict[str, bool]:
    """Whether each part existed.

    Raises:
        OpsError: the copy has no readable `PARTS`.
    """
    try:
        return dict(json.loads((before / PARTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise OpsError(
            f"{before} has no readable file {PARTS}", "move it away, and deploy a version that is known to work"
        ) from None


def _sweep(before: Path) -> None:
    """Delete the rest of an older copy, which a killed run left."""
    if _doomed(before).exists():
        shutil.rmtree(_doomed(before))


def _doomed(before: Path) -> Path:
    return before.with_name(f"{before.name}.deleted")


def _next(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.release-next")
