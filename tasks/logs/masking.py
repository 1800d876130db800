"""Masking of log lines in reports: secrets, and the addresses, telephone and card numbers of people."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote, urlsplit

from runbook.logins import mask_logins

SHORT, LONG = 4, 8
MASK = "‹masked›"
_NUMERIC = "password|passwd|secret|api[_-]?key|credential"
_NAMES = rf"(?:{_NUMERIC}|token|authorization|cookie)"
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_-]){_NAMES}$|^{_NAMES}|apikey$")
# Lines of its configuration that Redis quotes in errors.
_DIRECTIVE = re.compile(r"(?i)(\b(?:requirepass|masterauth|auth-pass\s+\S+)\s+)\S+(?:\s+[^\s'].*)?|(?<=\s)>[^\s'>]{4,}")
# A secret's name and its value: in JSON (also inside JSON, or cut off), in a URL's query, in a connection string of
# keywords, in a header, in Python's repr; percent-encoded too. The match begins at the name, not at its word: to search
# a long word from each of its places takes quadratic time. A token's number is a count.
_NAMED = re.compile(
    rf"""(?ix) ((?:(?P<header>(?:proxy-)?authorization|(?:set-)?cookie) | (?P<token>token) | {_NUMERIC})
          (?:\\{{0,8}}["']|%22|%27)? \s*(?:[:=]|%3a|%3d)\s*)
        ( "(?:[^"\\]|\\.)*" | '(?:[^'\\]|\\.)*' | \\{{1,8}}"[^"\n]*"? | ["'][^\n]+
        | (?(header)[^\n"']+ | (?(token)(?!\d+\b)) (?:\\.|[^\s,;&}}"'\\])+ (?:["'](?:\\.|[^\s,;&}}"'\\])+)*) )"""
)
_KNOWN = re.compile(
    r"""(?x) (?i:bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}
      | (?<![A-Za-z0-9_-]) eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*
      | \b (?:sk|pk|rk)-[A-Za-z0-9_-]{16,} | \b (?:AKIA|ASIA)[A-Z0-9]{16} \b | \b gh[pousr]_[A-Za-z0-9]{20,}
      | -----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)""",
    re.DOTALL,
)
_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")
_CARD = re.compile(r"\b(?:\d{4}[ -]?){3}\d{1,4}\b|\b3\d{3}[ -]?\d{6}[ -]?\d{5}\b")
_PHONE = re.compile(r"(?<![\d.-])0\d{1,4}-\d{1,4}-\d{3,4}(?![\d-])")


def masked(text: str) -> str:
    """The text without secrets, and without mail addresses, telephone and card numbers. Its time is proportional to the
    text's length, whatever the text is."""
    text = _KNOWN.sub(MASK, mask_logins(text, MASK))
    text = _DIRECTIVE.sub(lambda found: f"{found[1] or ''}{MASK}", _NAMED.sub(_unnamed, text))
    return _CARD.sub(_uncarded, _PHONE.sub(MASK, _MAIL.sub(MASK, text)))


def secret_parts(variables: Mapping[str, str]) -> set[str]:
    """The parts of variables' values that no report may contain: long values and those with a secret's name, their
    lines, and the password of a URL. Paths and short words are no secrets."""
    found = set[str]()
    for name, value in variables.items():
        least = SHORT if _SECRET_NAME.search(name) else LONG
        found |= {part for part in (value, *value.splitlines()) if len(part) >= least and not part.startswith("/")}
        with contextlib.suppress(ValueError):  # not a URL
            password = urlsplit(value).password or ""
            found |= {part for part in (password, unquote(password)) if len(part) >= SHORT}
    return found


def without(text: str, secrets: Iterable[str]) -> str:
    """The text without these secrets, also as Python, JSON and URLs write them."""
    forms = {form for one in secrets for form in (one, repr(one)[1:-1], json.dumps(one)[1:-1], quote(one, safe=""))}
    for form in sorted(forms, key=len, reverse=True):
        text = text.replace(form, MASK)
    return text


def masked_value(value: object, name: str = "") -> object:
    """`masked` for any JSON value; `name`: its field."""
    match value:
        case dict():
            return {inner: masked_value(content, str(inner)) for inner, content in value.items()}
        case list():
            return [masked_value(content, name) for content in value]
        case str():
            return MASK if value and _SECRET_NAME.search(name) else masked(value)
    return value


def kinds_in(text: str) -> tuple[str, ...]:
    """The kinds of secrets and personal data in a text."""
    found = {
        "secret": bool(_KNOWN.search(text) or mask_logins(text, MASK) != text or _NAMED.sub(_unnamed, text) != text),
        "mail address": bool(_MAIL.search(text)),
        "card number": any(_is_card(match[0]) for match in _CARD.finditer(text)),
        "telephone number": bool(_PHONE.search(text)),
    }
    return tuple(kind for kind, there in found.items() if there)


def _unnamed(match: re.Match[str]) -> str:
    value = match[4]
    if value.strip("\"'") in ("", "null", "None", "true", "false", MASK):
        return match[0]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{match[1]}{quote}{MASK}{quote}"


def _uncarded(match: re.Match[str]) -> str:
    return MASK if _is_card(match[0]) else match[0]


def _is_card(text: str) -> bool:
    """Whether the check digit (Luhn) is right: other long numbers are ids."""
    digits = [int(character) for character in text if character.isdigit()][::-1]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2]) % 10
