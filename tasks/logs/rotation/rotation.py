"""logrotate's configuration of a log (§6.2), checked with logrotate itself if it is installed."""

from __future__ import annotations

import fnmatch
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runbook.errors import OpsError, excerpt
from runbook.kinds import probe
from runbook.shell import run

# The manual's block (§6.2); `create` has a mode, an owner and a group.
MANUAL = {
    "daily": "",
    "rotate": "30",
    "compress": "",
    "delaycompress": "",
    "notifempty": "",
    "missingok": "",
    "create": "",
}
_OFTEN = ("hourly", "daily", "weekly", "monthly", "yearly", "size", "maxsize")
_BLOCK = re.compile(r"([^{}]*)\{([^{}]*)\}", re.DOTALL)
_SCRIPT = re.compile(r"^\s*(?:pre|post|first|last)(?:rotate|action)\b.*?^\s*endscript\b", re.DOTALL | re.MULTILINE)
_READS = "reading config file"  # what -d says first
TIMEOUT_SECONDS = 20
PLACES = "/usr/sbin:/sbin:/usr/local/sbin:/usr/bin:/bin"  # a worker's PATH may lack the first


@dataclass(frozen=True)
class Rotation:
    """`blocks`: the directives of every block that covers the log (one is right). `said`: what logrotate complains
    about; `asked`: whether it could be asked."""

    blocks: tuple[dict[str, str], ...]
    said: str = ""
    asked: bool = True

    def differences(self) -> list[tuple[str, str, str]]:
        """Directives that differ from the manual: (directive, here, manual)."""
        here = self.blocks[0] if self.blocks else {}
        often = next((name for name in _OFTEN if name in here), "")
        found = [] if "daily" in here else [("how often", often or "not said", "daily")]
        for name, wanted in MANUAL.items():
            if name == "daily":
                continue
            if name not in here or (wanted and here[name] != wanted):
                found.append((name, here.get(name, "not set"), wanted or "set"))
        return found


@probe
def read_rotation(configuration: Path, log: Path) -> Rotation:
    """The configuration of a log, and logrotate's verdict (`logrotate -d` changes nothing).

    Raises:
        OpsError: the configuration cannot be read.
    """
    try:
        text = configuration.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return Rotation(())
    except OSError as error:
        raise OpsError(
            f"{configuration} cannot be read: {error.strerror}", "run the worker as root, or correct its rights"
        ) from None
    blocks = tuple(
        block for patterns, block in _blocks(text) if any(fnmatch.fnmatch(str(log), one) for one in patterns)
    )
    if not is_installed():
        return Rotation(blocks, asked=False)
    return Rotation(blocks, _complaints(configuration))


def is_installed() -> bool:
    """Whether logrotate is installed on this host."""
    return bool(shutil.which("logrotate", path=PLACES))


def program() -> str:
    """The path of logrotate.

    Raises:
        OpsError: it is not installed.
    """
    if found := shutil.which("logrotate", path=PLACES):
        return found
    raise OpsError("logrotate is not installed on this host", "run apt install logrotate, then run this again")


def _blocks(text: str) -> list[tuple[list[str], dict[str, str]]]:
    """Every block: its patterns and directives, with the global directives."""
    text = _SCRIPT.sub("", re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE))
    outside = _directives(_BLOCK.sub("", text))
    found = []
    for head, body in _BLOCK.findall(text):
        patterns = [word.strip("\"'") for word in head.split() if word.strip("\"'").startswith("/")]
        found.append((patterns, outside | _directives(body)))
    return found


def _directives(text: str) -> dict[str, str]:
    lines = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return {words[0]: words[1].strip() if len(words) > 1 else "" for words in lines if not words[0].startswith("/")}


def _complaints(configuration: Path) -> str:
    with tempfile.TemporaryDirectory(prefix="ops-logrotate-") as state:
        argv = [program(), "-d", "-s", f"{state}/state", str(configuration)]
        try:
            done = run(argv, timeout_seconds=TIMEOUT_SECONDS)
        except OpsError as error:
            return error.message
    text = done.stderr
    if _READS not in text:
        return f"logrotate did not say that it read {configuration}: {excerpt(text + done.stdout)}"
    return "; ".join(line for line in text.splitlines() if line.startswith("error:"))
