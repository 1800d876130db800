"""An `archive_command` that fsyncs and never writes over: `python -m tasks.wal.put %p %f DIRECTORY`.

    archive_command = 'cd /opt/ops && .venv/bin/python -m tasks.wal.put "$PGDATA/%p" %f /var/lib/postgresql/wal'

PostgreSQL calls it again until it exits with 0. https://www.postgresql.org/docs/current/continuous-archiving.html
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def put(source: Path, name: str, directory: Path) -> str:
    """Make a finished segment a file of `directory`, on disk when this returns; "" or why it was refused."""
    target, beside = directory / name, directory / f".writing-{os.getpid()}-{name}"
    if target.exists():
        return "" if target.read_bytes() == source.read_bytes() else f"{target} is there with another content"
    try:
        shutil.copyfile(source, beside)
        for path in (beside, directory):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.link(beside, target)  # not a rename: that would write over what came meanwhile
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except FileExistsError:
        return f"{target} came from somebody else meanwhile"
    except OSError as error:
        return f"{target} cannot be written: {error.strerror}"
    finally:
        beside.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    if why := put(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])):
        print(why, file=sys.stderr)
        sys.exit(1)
