"""Other schedules of `certbot renew` on this host: Debian's cron file, a systemd timer, a line in a crontab."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from runbook.kinds import probe

ROOT = Path("/")
CRONTABS = ("etc/crontab", "etc/cron.d/*", "etc/cron.daily/*", "var/spool/cron/crontabs/*", "var/spool/cron/*")
TIMERS = "etc/systemd/system/timers.target.wants/*certbot*.timer"
_RENEWS = re.compile(r"^\s*[^#\s].*\bcertbot\b.*\brenew\b|^\s*[^#\s].*\bcertbot\b.*-q\b")


@dataclass(frozen=True)
class Schedules:
    """Files that schedule a renewal, and files that could not be read."""

    found: tuple[str, ...]
    unread: tuple[str, ...]


@probe
def find_schedules() -> Schedules:
    """Read this host's crontabs and enabled timers."""
    systemd = (ROOT / "run/systemd/system").exists()
    found = [str(path) for path in ROOT.glob(TIMERS)] if systemd else []
    unread = []
    for path in (path for pattern in CRONTABS for path in sorted(ROOT.glob(pattern))):
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        except OSError:
            unread.append(str(path))
            continue
        # With systemd, Debian's own cron line does nothing: its timer renews.
        if any(_RENEWS.match(line) and not (systemd and "run/systemd/system" in line) for line in lines):
            found.append(str(path))
    return Schedules(tuple(found), tuple(unread))
