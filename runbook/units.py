"""Numbers as people read them, with their units."""

from __future__ import annotations

from collections.abc import Sequence


def size(number: float) -> str:
    """Bytes for people: `426.0 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number) < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: `14 d 6 h`, `4 h 00 min`, `2 min 05 s`, `12.3 s`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 72 else f"{hours // 24} d {hours % 24} h"


def counted(number: int, noun: str, plural: str = "") -> str:
    """`1 backup`, `1,250 backups`. `plural`: where it does not end in s."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def rounded(seconds: float) -> str:
    """Seconds as one number: `18 s`, `2 min`, `3 h`, `4 d`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def about(seconds: float) -> str:
    """An estimate: `about 18 s`, `less than 1 s`."""
    return f"about {rounded(seconds)}" if seconds >= 1 else "less than 1 s"


def number(value: float) -> str:
    """A number without a unit: `0.25`, `1,250,000`."""
    return f"{value:g}" if abs(value) < 100_000 else f"{value:,.0f}"


def first_of(names: Sequence[object], most: int = 3, *, between: str = ", ") -> str:
    """The first names of a list, and how many more there are: `a, b, c and 4 more`."""
    named = between.join(map(str, names[:most]))
    return f"{named} and {len(names) - most} more" if len(names) > most else named
