"""The severity of a vulnerability, from an advisory's word or CVSS vector."""

from __future__ import annotations

import math
from enum import IntEnum


class Severity(IntEnum):
    """From unknown to critical. Unknown does not mean clean."""

    UNKNOWN = 0
    LOW = 1
    MODERATE = 2
    HIGH = 3
    CRITICAL = 4


_WORDS = {
    "none": Severity.LOW,
    "info": Severity.LOW,
    "negligible": Severity.LOW,
    "low": Severity.LOW,
    "medium": Severity.MODERATE,
    "moderate": Severity.MODERATE,
    "high": Severity.HIGH,
    "important": Severity.HIGH,
    "critical": Severity.CRITICAL,
}
_ATTACK = {"N": 0.85, "A": 0.62, "L": 0.55, "P": 0.2}
_COMPLEXITY = {"L": 0.77, "H": 0.44}
_PRIVILEGES = {"U": {"N": 0.85, "L": 0.62, "H": 0.27}, "C": {"N": 0.85, "L": 0.68, "H": 0.5}}
_INTERACTION = {"N": 0.85, "R": 0.62}
_IMPACT = {"H": 0.56, "L": 0.22, "N": 0.0}


def of_word(word: object) -> Severity:
    """The severity of a tool's word; unknown for any other word."""
    return _WORDS.get(str(word).strip().lower(), Severity.UNKNOWN)


def of_vector(vector: str) -> Severity:
    """The severity of a CVSS 3 vector (first.org/cvss/v3.1/specification-document, 5 and 7.1); others are unknown."""
    score = base_score(vector)
    if math.isnan(score):
        return Severity.UNKNOWN
    bounds = ((9.0, Severity.CRITICAL), (7.0, Severity.HIGH), (4.0, Severity.MODERATE))
    return next((severity for bound, severity in bounds if score >= bound), Severity.LOW)


def base_score(vector: str) -> float:
    """The base score, 0.0 to 10.0; NaN if it is no CVSS 3 vector."""
    head, *parts = vector.split("/")
    if head not in ("CVSS:3.0", "CVSS:3.1"):
        return math.nan
    metrics = dict(part.split(":", 1) for part in parts if ":" in part)
    try:
        changed = metrics["S"] == "C"
        lost = 1 - math.prod(1 - _IMPACT[metrics[name]] for name in "CIA")
        ease = (
            8.22
            * _ATTACK[metrics["AV"]]
            * _COMPLEXITY[metrics["AC"]]
            * _PRIVILEGES[metrics["S"]][metrics["PR"]]
            * _INTERACTION[metrics["UI"]]
        )
    except KeyError:
        return math.nan
    impact = 7.52 * (lost - 0.029) - 3.25 * (lost - 0.02) ** 15 if changed else 6.42 * lost
    if impact <= 0:
        return 0.0
    return math.ceil(round(min((impact + ease) * (1.08 if changed else 1.0), 10.0) * 10, 4)) / 10
