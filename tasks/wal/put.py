"""An `archive_command` that fsyncs and never overwrites: `python -m tasks.wal.put %p %f DIRECTORY`.

    archive_command = 'cd /opt/ops && .venv/bin/python -m tasks.wal.put "$PGDATA/%p" %f /var/lib/postgresql/wal'

PostgreSQL calls it again until it exits with 0. https://www.postgresql.org/docs/current/continuous-archiving.html
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def put(source: Path, name: str, directory: Path) -> str:
    """Store a finished segment in `directory`, on disk when this returns. Returns "" or the reason of a refusal."""
    target, unfinished = directory / name, directory / f".writing-{os.getpid()}-{name}"
    if target.exists():
        return "" if target.read_bytes() == source.read_bytes() else f"{target} exists with other content"
    try:
        shutil.copyfile(source, unfinished)
        for path in (unfinished, directory):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        os.link(unfinished, target)  # not a rename, which would overwrite a newer file
        descriptor = os.open(directory, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    except FileExistsError:
        return f"{target} was written by another process meanwhile"
    except OSError as error:
        return f"{target} cannot be written: {error.strerror}"
    finally:
        unfinished.unlink(missing_ok=True)
    return ""


if __name__ == "__main__":
    if why := put(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])):
        print(why, file=sys.stderr)
        sys.exit(1)
