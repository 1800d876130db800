"""The configuration in a server's data directory: what a copy from a backup, or from another server, must not replace.

That is postgresql.conf, postgresql.auto.conf, pg_hba.conf, pg_ident.conf, and every file in the data directory that the
server's configuration includes or names: certificates, keys, lists of users, scripts.
https://www.postgresql.org/docs/current/config-setting.html, https://www.postgresql.org/docs/current/auth-pg-hba-conf.html
"""

from __future__ import annotations

import base64
import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from blocks.postgres.server import Postgres
from runbook.files import durable, inside
from tasks.cluster.stopped import last_options
from tasks.stores.directory import told

MAIN, AUTO = "postgresql.conf", "postgresql.auto.conf"
OWN = (MAIN, AUTO, "pg_hba.conf", "pg_ident.conf")
OPTIONS = "postmaster.opts"
"""The command line of the last start: the recovered copy has another one."""
MOST_BYTES = 16 << 20
_LONGEST = 200
_BY_DEFAULT = ("server.crt", "server.key")  # ssl_cert_file, ssl_key_file
_NOT_READ = re.compile(r"\s*(external_pid_file|log_\w+|data_directory|stats_temp_directory)\b")
_DIRECTORY = re.compile(r"\s*(include_dir|ssl_crl_dir)\b")
_QUOTED, _WORD = re.compile(r"'([^'\n]*)'|\"([^\"\n]*)\""), re.compile(r"[^\s=,'\"#;&|<>()@]+")
_SYSTEM = re.compile(
    r"(base|global|PG_VERSION|postmaster\.\w+|current_logfiles|backup_\w+(\.old)?|tablespace_map|\w+\.signal)$"
)


@dataclass(frozen=True)
class ConfigurationFile:
    """A file's content in Base64 and its mode; or the target of a symbolic link, which stays one."""

    content: str = ""
    mode: int = 0o600
    link: str = ""


@dataclass(frozen=True)
class ServerConfiguration:
    """Files by their path in the data directory. `skipped`: those that are unreadable, or too large to carry over.
    `is_whole`: the main file was there, so no other file is named."""

    files: Mapping[str, ConfigurationFile] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    is_whole: bool = False

    @property
    def missing(self) -> tuple[str, ...]:
        """Those of the four that it lacks."""
        return tuple(name for name in OWN if name not in self.files)


def read_configuration(data: Path, config_file: str = "") -> ServerConfiguration:
    """Read it. `config_file`: the main file, where that is outside the data directory.

    Raises:
        OpsError: the directory cannot be read.
    """
    files, skipped = dict[str, ConfigurationFile](), list[str]()
    with told(data):
        for name in sorted(_named(data, config_file)):
            try:
                files[name] = _read(data / name)
            except OSError:
                skipped.append(name)
    return ServerConfiguration(files, tuple(skipped), (Path(config_file) if config_file else data / MAIN).is_file())


def place_configuration(configuration: ServerConfiguration, data: Path, live: Path, config_file: str = "") -> None:
    """Write it into a copy of the data directory `live`, and delete the files that only the copy's configuration named.

    Raises:
        OpsError: a file cannot be written.
    """
    there = data.stat()
    owner = (there.st_uid, there.st_gid)
    with told(data):
        for name, file in configuration.files.items():
            _make_parents(data, name, owner)
            if file.link:
                inside.symlink(data / name, file.link, owner)
            else:
                with durable.replacing(data / name, mode=file.mode, owner=owner) as written:
                    written.write(base64.b64decode(file.content))
        for name in _named(data, config_file, live) - {*configuration.files, *OWN} if configuration.is_whole else ():
            inside.remove(data / name)


def note_of(live: Path) -> Path:
    """The file that has the configuration of a data directory while it is renamed or rewound."""
    return live.with_name(f"{live.name}.configuration.json")


def save_configuration(note: Path, configuration: ServerConfiguration, *kept: Path) -> None:
    """Note it on disk before the data directory is renamed to one of `kept`; a run after a killed one reads it.

    Raises:
        OpsError: it cannot be written.
    """
    files = {name: asdict(file) for name, file in configuration.files.items()}
    text = {"kept": [str(one) for one in kept], "is_whole": configuration.is_whole, "files": files}
    with told(note):
        owner = note.parent.stat()
        durable.write(note, json.dumps(text), mode=0o600, owner=(owner.st_uid, owner.st_gid))


def load_configuration(note: Path) -> ServerConfiguration | None:
    """The noted configuration; None without a note, or where the renamed data directory was renamed back or deleted."""
    try:
        with told(note), contextlib.suppress(FileNotFoundError):
            text = json.loads(inside.read(note))
            if any(Path(one).exists() for one in text["kept"]) and all(map(_is_inside, text["files"])):
                files = {name: ConfigurationFile(**file) for name, file in text["files"].items()}
                return ServerConfiguration(files, (), bool(text["is_whole"]))
        return None
    except (ValueError, KeyError, TypeError):  # not of this version
        return None


def _is_inside(name: str) -> bool:
    """Return False for a path that leads out of the data directory: the server's account can write the note."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def live_configuration(postgres: Postgres) -> ServerConfiguration | None:
    """The configuration of the live data directory; where it is missing or empty, of the one that a killed swap
    renamed. None: there is neither.

    Raises:
        OpsError: a file cannot be read.
    """
    live = Path(postgres.data_directory).resolve()
    noted = None if (live / "PG_VERSION").is_file() else load_configuration(note_of(live))
    return noted or (read_configuration(live, main_file(postgres)) if live.is_dir() else None)


def main_file(postgres: Postgres) -> str:
    """The main file, where that is outside the data directory: by the block, otherwise by the server's last start."""
    live = Path(postgres.data_directory).resolve()
    file = postgres.config_file or last_options(live).get("config_file", "")
    return "" if not file or Path(file).is_relative_to(live) else file


def _make_parents(data: Path, name: str, owner: tuple[int, int]) -> None:
    for parent in reversed(list(Path(name).parents)[:-1]):
        if not (data / parent).is_dir():
            inside.make_directory(data / parent, owner=owner)


def _read(path: Path) -> ConfigurationFile:
    """Read a file.

    Raises:
        OSError: it is unreadable or too large.
    """
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return ConfigurationFile(link=str(path.readlink()))
    if found.st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return ConfigurationFile(base64.b64encode(inside.read(path)).decode(), stat.S_IMODE(found.st_mode))


def _named(data: Path, config_file: str, live: Path | None = None) -> set[str]:
    """The files in a data directory that belong to its configuration. `live`: the directory of which it is a copy."""
    found, seen = {OPTIONS} if (data / OPTIONS).is_file() else set[str](), set[Path]()
    left = [data / name for name in (*OWN, *_BY_DEFAULT)] + [Path(config_file)] * bool(config_file)
    while left:
        path = left.pop()
        if path in seen or not (place := _place(data, path)):
            continue
        seen.add(path)
        if place != ".":
            found.add(place)
        with contextlib.suppress(OSError):  # what cannot be read is not carried over
            readable = path.is_file() and path.stat().st_size <= MOST_BYTES
            lines = inside.read_text(path, "replace").splitlines() if readable else []
            left += [one for line in lines for one in _mentioned(line, data, path.parent, live or data)]
    return found


def _place(data: Path, path: Path) -> str:
    """Where a file of the configuration is: its path in the data directory, that of the link which leads to it, `.` for
    a configuration file elsewhere, "" for none."""
    if not path.is_relative_to(data):
        return "." if path.suffix == ".conf" and path.is_file() else ""
    parts = path.relative_to(data).parts
    if not parts or _SYSTEM.match(parts[0]) or (parts[0].startswith("pg_") and (data / parts[0]).is_dir()):
        return ""
    for depth in range(1, len(parts) + 1):
        if (data / Path(*parts[:depth])).is_symlink():
            return str(Path(*parts[:depth]))
    return str(path.relative_to(data)) if path.is_file() else ""


def _mentioned(line: str, data: Path, directory: Path, live: Path) -> Iterator[Path]:
    """Every path in a line of a configuration file, comments included: they show the defaults."""
    if _NOT_READ.match(line):
        return
    names = {one or other for one, other in _QUOTED.findall(line)} | set(_WORD.findall(line))
    for name in (one for one in names - {"", ".", "/"} if len(one) < _LONGEST):
        for base in (data, directory):
            path = Path(os.path.normpath(base / name))
            path = data / path.relative_to(live) if path.is_relative_to(live) else path
            if path.is_dir() and not path.is_symlink():
                if _DIRECTORY.match(line):
                    yield from (one for one in path.iterdir() if not one.is_dir())
            else:
                yield path
