"""redis.conf: the settings for a data directory, and a copy without secrets.

https://valkey.io/topics/valkey.conf/
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError
from runbook.files import durable, inside
from runbook.masking import MASK

QUOTES = "\"'"
_SECRET = re.compile(
    r"^(\s*(?:requirepass|masterauth|primaryauth|tls-key-file-pass|tls-client-key-file-pass|sentinel\s+auth-pass\s+\S+"
    r"|rename-command\s+\S+))\s+\S.*$",
    re.IGNORECASE,
)
_FOLLOWS = re.compile(r"^\s*(?:replicaof|slaveof)\s", re.IGNORECASE)
_USER = re.compile(r"^\s*user\s", re.IGNORECASE)
# ACL rules: >password, <password, #sha256, !sha256 (https://valkey.io/topics/acl/).
_USER_SECRET = re.compile(r"""(?<=\s)(?:"([><#!])[^"]*"|'([><#!])[^']*'|([><#!])\S+)""")


@dataclass(frozen=True)
class Configuration:
    """A configuration file with its included files: `lines` in the order in which they apply (the first word is the
    setting's name), and each setting's last value."""

    files: tuple[Path, ...]
    settings: dict[str, str]
    lines: tuple[str, ...] = ()

    def get(self, name: str, default: str = "") -> str:
        """The last value of a setting, as one string."""
        return self.settings.get(name, default)

    @property
    def rdb(self) -> str:
        """The RDB's name in the data directory."""
        return self.get("dbfilename", "dump.rdb")

    @property
    def appendonly(self) -> bool:
        """Whether the server starts from its AOF."""
        return self.get("appendonly", "no").lower() == "yes"

    @property
    def aof(self) -> tuple[str, str]:
        """The AOF's directory, and the beginning of its files' names."""
        return self.get("appenddirname", "appendonlydir"), self.get("appendfilename", "appendonly.aof")

    @property
    def maxmemory(self) -> int:
        """Bytes, 0 without a limit: `1g` is 1000³, `1gb` 1024³ (https://valkey.io/topics/valkey.conf/)."""
        found = re.fullmatch(r"(\d+)([kmg]?)(b?)", self.get("maxmemory", "0").lower())
        return int(found[1]) * (1024 if found[3] else 1000) ** " kmg".index(found[2] or " ") if found else 0

    @property
    def evicts(self) -> bool:
        """Whether keys are evicted at `maxmemory`."""
        return self.maxmemory > 0 and self.get("maxmemory-policy", "noeviction").lower() != "noeviction"

    @property
    def replica_of(self) -> str:
        """The master that it replicates, or ""."""
        return self.get("replicaof") or self.get("slaveof")


def read_configuration(path: Path) -> Configuration:
    """Read a configuration file as the server does: the last value applies, included files are inserted in place.

    Raises:
        OpsError: it does not exist or cannot be read.
    """
    files: list[Path] = []
    lines = tuple(_lines(path, files))
    settings = {words[0].lower(): " ".join(words[1:]) for words in map(_words, lines)}
    return Configuration(tuple(files), settings, lines)


def follow_nobody(path: Path) -> None:
    """Delete `replicaof` from a configuration file, as CONFIG REWRITE would. A failover writes it, and a server that
    starts with it replaces its data by its master's.

    Raises:
        OpsError: the file cannot be written, or an included one has that line.
    """
    if not read_configuration(path).replica_of:
        return
    text = _text(path)
    kept = "".join(line for line in text.splitlines(keepends=True) if not _FOLLOWS.match(line))
    try:
        durable.write(path, kept, errors="surrogateescape")
    except OSError as error:
        raise OpsError(f"{path} cannot be written: {error.strerror}", "delete the line replicaof from it") from None
    if still := read_configuration(path).replica_of:
        raise OpsError(f"a file that {path} includes says replicaof {still}", "delete that line")


def _lines(path: Path, files: list[Path]) -> Iterator[str]:
    files.append(path)
    for line in map(str.strip, _text(path).splitlines()):
        if not line or line.startswith("#"):
            continue
        words = _words(line)
        if words[0].lower() != "include" or not words[1:]:
            yield line
            continue
        target = Path(words[1])
        for included in sorted(target.parent.glob(target.name)):
            if included not in files:
                yield from _lines(included, files)


def _words(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:  # an unbalanced quote: the server itself would not start with it
        return line.split()


def masked(path: Path) -> str:
    """A configuration or ACL file's text without its secrets: passwords, their hashes, and renamed commands.

    Raises:
        OpsError: it cannot be read.
    """
    return "".join(_masked(line) + "\n" for line in _text(path).splitlines())


def _masked(line: str) -> str:
    if _USER.match(line):
        return _USER_SECRET.sub(lambda match: f"{match.group().strip(QUOTES)[0]}{MASK}", line)
    return _SECRET.sub(rf"\g<1> {MASK}", line)


def _text(path: Path) -> str:
    try:
        return inside.read_text(path, "surrogateescape")
    except OSError as error:
        raise OpsError(
            f"{path} cannot be read: {error.strerror}", "correct [redis] config_file, or restore the file"
        ) from None
