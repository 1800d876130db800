"""Files that are made from the sources and kept in the repository: written, or compared with what is there."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENDS = "<!-- Made until here. -->"


def with_table(path: Path, begins: str, made: str) -> str:
    """A page with the table after its line `begins` made anew, the rest as it is."""
    before, _, rest = path.read_text(encoding="utf-8").partition(begins)
    return f"{before}{begins}\n\n{made}\n\n{ENDS}{rest.partition(ENDS)[2]}"


def outdated(made: Mapping[Path, str]) -> list[Path]:
    """The files that are missing or have another text."""
    return [path for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text]


def write_or_check(files: Callable[[], Mapping[Path, str]], description: str, command: str) -> int:
    """The command line of `command` (`make catalogue`): 0 when the files are current. `--check` writes nothing."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is not current")
    chosen = parser.parse_args()
    made = files()
    old = outdated(made)
    for path in old:
        if not chosen.check:
            path.write_text(made[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {f'is not current: {command}' if chosen.check else 'written'}")
    return 1 if chosen.check and old else 0
