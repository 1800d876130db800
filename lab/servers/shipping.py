"""The program that ships the WAL of a region, whole segments and what is not one yet, to both its archives.

It is a service as the others are: it dies with its region, and needs no Prefect server.
"""

from __future__ import annotations

from lab.processes import OsAccount
from lab.servers.binaries import Binaries
from lab.servers.supervision import Program
from lab.state.base import CHECKOUT, PYTHON
from lab.state.environment import system_variables
from lab.state.layout import ControlLayout, Layout
from lab.state.state import LabState, load_state

ARCHIVER_PROGRAM = "wal-archiver"
# It packs segments while the servers work: they come first.
_NICE = ("nice", "-n", "10")


def program(layout: Layout, state: LabState, binaries: Binaries, account: OsAccount) -> Program:
    """`python -m tasks.wal.archiver` for the environment of this region, as the user who owns the stores."""
    first, second = (load_state(region.state) or state for region in (layout.first, layout.second))
    told = {
        **system_variables(layout, first, second, binaries, account),
        "PREFECT_HOME": str(ControlLayout(layout.base).home),
        "DO_NOT_TRACK": "1",
    }
    argv = (*_NICE, PYTHON, "-m", "tasks.wal.archiver", "--environment", layout.name)
    return Program(ARCHIVER_PROGRAM, argv, CHECKOUT, told)
