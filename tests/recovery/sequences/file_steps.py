"""The steps of the application's files: accidents, their restore and the undo of it."""

from __future__ import annotations

import random
import shutil
import time

from tests.recovery.sequences.confirmation import carry_out
from tests.recovery.sequences.promises import FILES
from tests.recovery.sequences.settlement import newest_kept, settle
from tests.recovery.sequences.steps import NOT_POSSIBLE, step
from tests.recovery.sequences.world import World


@step("delete-files", "accident", 1)
def delete_files(world: World, chance: random.Random) -> str:
    """Somebody deletes every upload."""
    if not world.uploads.is_dir():
        return NOT_POSSIBLE
    accident = world.ledgers[FILES].note(None)
    paths = list(world.uploads.glob("*.txt"))
    for path in paths:
        path.unlink()
    accident.outcome, accident.answered = "acknowledged", time.time()
    return str(len(paths))


@step("remove-files", "accident", 0.7)
def remove_files(world: World, chance: random.Random) -> str:
    """The application's directory is missing."""
    if not world.files.exists():
        return NOT_POSSIBLE
    shutil.rmtree(world.files)
    return ""


@step("restore-files", "recovery", 0.6)
def restore_files(world: World, chance: random.Random) -> str:
    """The files alone, from their newest backup."""
    kept, before = newest_kept(world.files), world.ledgers[FILES].copy() if world.files.exists() else None
    carried = carry_out(world, chance, "restore-files")
    settle(world, carried)
    if newest_kept(world.files) != kept:
        world.tokens["kept files"] = None if carried.kept_is_unknown else before
    return carried.ran.status


@step("undo-restore-files", "recovery", 0.8)
def undo_restore_files(world: World, chance: random.Random) -> str:
    """The files that the last restore replaced."""
    kept = world.tokens.get("kept files")
    if not kept or not world.files.exists():
        return NOT_POSSIBLE
    now = world.ledgers[FILES].copy()
    carried = carry_out(world, chance, "undo-restore-files")
    settle(world, carried, back_to={FILES: kept})
    world.tokens["kept files"] = now
    return carried.ran.status
