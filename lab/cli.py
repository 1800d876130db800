"""`python -m lab`: a system of our own to break."""

from __future__ import annotations

import argparse
import json
import sys

from lab import lifecycle
from lab.control import LabControl
from lab.processes import heed_interrupts
from lab.progress import progress
from lab.start import fill
from lab.state.base import CHECKOUT, base_directory, checked_name
from lab.state.environment import as_exports, auth_string, ui_url
from lab.state.status import as_table, read_status
from runbook.errors import OpsError


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 when what was asked for holds, 1 otherwise."""
    heed_interrupts()
    chosen = _parser().parse_args(arguments)
    try:
        checked_name(chosen.name)
        return int(_COMMANDS[chosen.command](chosen))
    except OpsError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {
        "up": "bring the lab and the Prefect server up",
        "down": "stop the lab; its data stays",
        "status": "say what runs where; exit 1 when the lab is down",
        "env": 'print variables for the shell: eval "$(python -m lab env)"',
        "seed": "add data",
    }
    parsers = {command: commands.add_parser(command, help=text, description=text) for command, text in texts.items()}
    for one in parsers.values():
        one.add_argument("--name", default="lab", help="the environment's name (default: lab)")
    parsers["up"].add_argument("--megabytes", type=_size, help=f"data of a new lab (default: {lifecycle.MEGABYTES})")
    parsers["up"].add_argument(
        "--postgres-bin",
        metavar="DIR",
        default="",
        help="run the PostgreSQL whose programs are there, not the wheel's (new labs: also OPS_LAB_POSTGRES_BIN)",
    )
    parsers["up"].add_argument(
        "--dr", action="store_true", help="with a worker and deployments of the second region too (NAME-dr)"
    )
    parsers["down"].add_argument("--all", action="store_true", help="every lab, and the Prefect server")
    parsers["down"].add_argument("--remove", action="store_true", help="remove the data as well")
    parsers["status"].add_argument("--json", action="store_true", help="one JSON object, with passwords")
    parsers["seed"].add_argument("--megabytes", type=_size, required=True)
    return parser


def _size(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of megabytes between 1 and 100000")
    return int(text)


def _up(chosen: argparse.Namespace) -> int:
    is_new = LabControl.find(base_directory()) is None
    lifecycle.up(chosen.name, progress(), chosen.megabytes, chosen.postgres_bin, dr=chosen.dr)
    option = "" if chosen.name == "lab" else f" --name {chosen.name}"
    control = LabControl.find(base_directory())
    address, login = (ui_url(control.state), auth_string(control.state)) if control else ("", "")
    shown = login if is_new else f"prefect_auth in: python -m lab status{option} --json"
    print(f"\nPrefect UI: {address}\nLog in with: {shown}")
    print(f'For a shell: eval "$({CHECKOUT}/.venv/bin/python -m lab env{option})"')
    return 0


def _down(chosen: argparse.Namespace) -> int:
    tell = progress()
    if chosen.all:
        lifecycle.down_all(tell, remove=chosen.remove)
    else:
        lifecycle.down(chosen.name, tell, remove=chosen.remove)
    return 0


def _status(chosen: argparse.Namespace) -> int:
    status = read_status(chosen.name)
    print(json.dumps(status, indent=2) if chosen.json else as_table(status), end="\n" if chosen.json else "")
    return 0 if status["running"] else 1


def _env(chosen: argparse.Namespace) -> int:
    services, control = lifecycle.existing(chosen.name)
    print(as_exports(lifecycle.variables(services, control)), end="")
    return 0


def _seed(chosen: argparse.Namespace) -> int:
    services, _ = lifecycle.existing(chosen.name)
    fill(services, chosen.megabytes, progress())
    return 0


_COMMANDS = {"up": _up, "down": _down, "status": _status, "env": _env, "seed": _seed}
