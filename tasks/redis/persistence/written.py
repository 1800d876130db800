"""The persistence settings in a server's configuration file, which apply after a restart (§2.3)."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping
from pathlib import Path

from runbook.errors import OpsError
from runbook.files import inside
from runbook.kinds import probe
from tasks.redis.persistence.place import data_directory
from tasks.redis.persistence.state import Persistence
from tasks.redis.settings.file import read_configuration
from tasks.redis.settings.recommended import DEFAULTS, normal


@probe
def read_written(server: Persistence, defaults: Mapping[str, str] = DEFAULTS) -> tuple[dict[str, str], str]:
    """The settings in the configuration file, with the server's defaults for the others; or {} and why not."""
    return find_written(server, defaults)


def find_written(server: Persistence, defaults: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """See `read_written`."""
    if not server.config_file:
        return {}, "the server was started without a configuration file"
    if problem := data_directory(server)[1]:
        return {}, problem
    try:
        found = read_configuration(Path(server.config_file))
    except OpsError as error:
        return {}, error.message
    named = {name: normal(name, found.get(name, default)) for name, default in defaults.items()}
    return {**named, "save": _saves(found.files)}, ""


def _saves(files: tuple[Path, ...]) -> str:
    """All `save` lines together: each adds rules, `save ""` deletes the earlier ones."""
    rules: list[str] = []
    named = False
    for line in (line for path in files for line in inside.read_text(path, "replace").splitlines()):
        with contextlib.suppress(ValueError):
            words = shlex.split(line, comments=False)
            if words and words[0].lower() == "save":
                named, values = True, [word for word in words[1:] if word]
                rules = [*rules, *values] if values else []
    return " ".join(rules) if named else DEFAULTS["save"]
