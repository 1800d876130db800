"""A release unpacked beside what runs and put into its place, with the way back.

`<directory>.release-next` is what was unpacked. `<directory>.release-before` is a copy of what ran: it is whole before
anything is replaced, and goes, by rename (`.gone`), when its successor, or what it was put back as, has proven itself.
Its `PARTS` says of each part whether there was one.
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
from runbook.guard.permit import Permit
from runbook.kinds import action
from tasks.releases.release import RELEASE, UNPACK, Release, before_of, extract, told

VENV = "VENV"
PARTS = "PARTS"


@action(idempotent=True)
def unpack_release(permit: Permit, release: Release) -> Path:
    """Unpack it beside the live directory; returns where.

    Raises:
        OpsError: there is no room, or the archive has what leads out of it.
    """
    permit.require(UNPACK, release.act.target)
    return _unpack(release)


@action(idempotent=True)
def keep_before(permit: Permit, application: Application, release: Release) -> None:
    """Copy what runs aside, whole; what a run that was killed had kept stays the way back.

    Raises:
        OpsError: there is no room, or that one had kept other parts.
    """
    permit.require(UNPACK, release.act.target)
    before, live = before_of(release.directory), release.directory
    if before.is_dir():
        if strange := set(release.parts) - _kept(before).keys():
            raise OpsError(
                f"the copy of what ran before, {before}, is without {', '.join(sorted(strange))}",
                "set [application] release as it was then, and deploy that version first",
            )
        return
    fresh = before.with_name(f"{before.name}.new")
    with told(fresh):
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


@action(idempotent=True)
def swap_release(permit: Permit, release: Release) -> None:
    """Put what was unpacked into its place, part by part. Whoever runs from there must be stopped."""
    permit.require(UNPACK, release.act.target)
    _swap(release)


def put_in_place(release: Release) -> None:
    """Its files over the live ones, with nothing kept and nobody stopped: only a fault does that.

    Raises:
        OpsError: they cannot be written.
    """
    _unpack(release)
    _swap(release)


@action(idempotent=True)
def put_before_back(permit: Permit, release: Release) -> None:
    """What ran before is live again, part by part; the copy stays until that has proven itself.

    Raises:
        OpsError: it cannot be written, or the copy is not whole: then nothing was changed.
    """
    permit.require(UNPACK, release.act.target)
    before = before_of(release.directory)
    kept = _kept(before)
    if lost := [part for part, there in kept.items() if there and not os.path.lexists(before / part)]:
        raise OpsError(
            f"the copy of what ran before, {before}, has lost {', '.join(lost)}",
            "deploy a version that is known to be well",
        )
    with told(release.directory):
        for part, there in kept.items():
            live = release.directory / part
            if not there:
                _remove(live)
                continue
            fresh = live.with_name(f".{live.name}.back")
            _remove(fresh)
            _copy(before / part, fresh)
            _replace(fresh, live)


@action(idempotent=True)
def drop_before(permit: Permit, release: Release) -> None:
    """The deployment has ended: what runs has proven itself. By rename: a copy with that name is whole."""
    permit.require(UNPACK, release.act.target)
    before = before_of(release.directory)
    with told(before):
        _sweep(before)
        if before.is_dir():
            before.rename(_gone(before))
            durable.sync(before.parent)
            failpoint("release: copy of before renamed")
    for path in (_gone(before), _next(release.directory)):
        shutil.rmtree(path, ignore_errors=True)


def _unpack(release: Release) -> Path:
    place = _next(release.directory)
    extract(release, place)
    with told(place):
        (place / RELEASE).write_text(f"{release.version} {release.commit}\n", encoding="utf-8")
    return place


def _swap(release: Release) -> None:
    place = _next(release.directory)
    with told(release.directory):
        for part in (*release.parts, RELEASE):
            if os.path.lexists(place / part):
                live = release.directory / part
                _own(place / part, live if os.path.lexists(live) else release.directory)
                _replace(place / part, live)
            failpoint(f"release: {Path(part).name} replaced")
        shutil.rmtree(place, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """A part, where there is one, with its owners where this user may say so."""
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
    """Its owner is that of another one, where this user may say so."""
    if os.geteuid() == 0:
        was = like.lstat()
        for path in (fresh, *(() if fresh.is_symlink() else fresh.rglob("*"))):
            os.chown(path, was.st_uid, was.st_gid, follow_symlinks=False)


def _replace(fresh: Path, live: Path) -> None:
    """By rename: a part is the old one or the new one."""
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
    """Of each part, whether there was one.

    Raises:
        OpsError: it does not say.
    """
    try:
        return dict(json.loads((before / PARTS).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        raise OpsError(
            f"{before} does not say what it has", "move it away, and deploy a version that is known to be well"
        ) from None


def _sweep(before: Path) -> None:
    """What a run that was killed while it removed it had left of an older copy."""
    if _gone(before).exists():
        shutil.rmtree(_gone(before))


def _gone(before: Path) -> Path:
    return before.with_name(f"{before.name}.gone")


def _next(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.release-next")
