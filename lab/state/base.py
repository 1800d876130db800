"""The base directory of a checkout's labs: where it lies, and that its servers' user can reach it."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path

from runbook.errors import OpsError

CHECKOUT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.prefix) / "bin" / "python"
"""Not sys.executable, which is one of several links: configurations must not change with the one that was called."""
SECOND = "-dr"
"""What the name of a lab's second region ends with."""
_NAME = re.compile(r"[a-z][a-z0-9-]{0,27}")
_RESERVED = frozenset({"bin", "control"})


def checked_name(name: str) -> str:
    """The environment's name, unchanged.

    Raises:
        OpsError: it cannot name an environment, a directory and a work pool.
    """
    if not _NAME.fullmatch(name.removesuffix(SECOND)):
        raise OpsError(
            f"{name!r} cannot name a lab: a lower-case letter first, then at most 27 letters, digits or hyphens"
        )
    if name in _RESERVED:
        raise OpsError(f"{name!r} cannot name a lab: the base directory uses that name itself")
    return name


def base_directory() -> Path:
    """`.lab` in the checkout, or what `OPS_LAB_BASE` says; a directory under /var/tmp where root's servers need one.

    Started by root, the servers run as an unprivileged user, who must be able to traverse to their data.
    """
    wanted = Path(os.environ.get("OPS_LAB_BASE") or CHECKOUT / ".lab").absolute()
    if os.geteuid() != 0 or _open_to_all(wanted.parent):
        return wanted
    digest = hashlib.sha256(str(wanted.parent if wanted.name == ".lab" else wanted).encode()).hexdigest()
    return Path("/var/tmp") / f"ops-lab-{digest[:12]}"  # noqa: S108 (a name nobody else computes, owner checked)


def create_base() -> Path:
    """The base directory, created, with the link from the checkout where it lies elsewhere.

    Raises:
        OpsError: it cannot be created here, or belongs to somebody else.
    """
    base = base_directory()
    try:
        base.mkdir(parents=True, exist_ok=True)
        if base.stat().st_uid != os.geteuid():
            raise OpsError(f"{base} belongs to another user", "run the lab as that user, or set OPS_LAB_BASE")
        base.chmod(0o755)
        _link(Path(os.environ.get("OPS_LAB_BASE") or CHECKOUT / ".lab").absolute(), base)
    except OSError as error:
        raise OpsError(f"the lab's directory {base} cannot be created: {error.strerror}", "set OPS_LAB_BASE") from error
    return base


def _open_to_all(directory: Path) -> bool:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    return all(path.stat().st_mode & 0o001 for path in (existing.resolve(), *existing.resolve().parents))


def _link(wanted: Path, base: Path) -> None:
    if wanted == base:
        return
    wanted.parent.mkdir(parents=True, exist_ok=True)
    if wanted.is_symlink():  # a copied checkout brings the link of the one it was copied from
        wanted.unlink()
    if wanted.exists():
        raise OpsError(
            f"{wanted} is a directory that the servers' user cannot reach",
            "remove it: the lab is rebuilt under /var/tmp",
        )
    wanted.symlink_to(base)
