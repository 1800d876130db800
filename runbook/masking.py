"""The one set of rules for what stands in no report, log or message: secrets, logins in addresses, personal addresses
and numbers, texts in SQL. Each function's time is proportional to the text's length, whatever the text is.

- `without_logins`: addresses with a user and a password. Every error, finding and fact passes it.
- `masked`: what applications log; also secrets by their names and forms, mail addresses, telephone and card numbers.
- `without`: values that are known, for example a key that a provider repeats.
- `masked_statement`: SQL that clients send.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, unquote, urlsplit

MASK = "********"
TEXT = "'…'"
"""A text in SQL."""
_SCHEME = re.compile(r"(https?|[a-z0-9])://", re.IGNORECASE)
_PORT = re.compile(r"\d{1,5}(?![^/?#,;\s\"'<>)\]}|\\])")
_HOST = re.compile(r"@(?=[\w\[.%-])")
# The whole authority: an `@` in it that was not quoted belongs to the password, the last one ends it.
_AUTHORITY = re.compile(r"[^/\s\"?#]*")
_WORD = re.compile(r"[^\s\"'<>]*")
MOST_PASSWORD = 200
# Inside another URL's query, or in a log that quotes what it was sent.
_ENCODED = re.compile(r"(%3A%2F%2F(?:(?!%3A|%40|%2F)[^\s@])*%3A)(?:(?!%40|%2F)[^\s@])+(?=%40)", re.IGNORECASE)


def without_logins(text: str) -> str:
    """The text with the mask for each password in an address; over HTTP for the user as well, who may be a token.

    A password that holds `@`, `/`, `?`, a quotation mark or a space ought to be quoted there, and often is not: it ends
    at the last `@` of its word, or at the first of its line.
    """
    starts = list(_SCHEME.finditer(text))
    ends = [*(one.start() for one in starts), len(text)][1:]
    parts, place = list[str](), 0
    for one, end in zip(starts, ends, strict=True):
        parts.append(text[place : one.end()])
        parts.append(_without_login(text[one.end() : end], is_web=len(one[1]) > 1))
        place = end
    return _ENCODED.sub(rf"\1{MASK}", "".join(parts) + text[place:])


def _without_login(rest: str, *, is_web: bool) -> str:
    """`rest`: what follows `://`, up to the next address."""
    user, colon, _ = rest[: len(_AUTHORITY.match(rest)[0])].partition(":")  # type: ignore[index]
    if is_web and "@" in user:
        return f"{MASK}{rest[rest.rindex('@', 0, len(user)) :]}"
    if not colon or "@" in user:
        return rest
    begin = len(user) + 1
    end = _end(rest, begin, is_web=is_web)
    return f"{'' if is_web else rest[:begin]}{MASK}{rest[end:]}" if end else rest


def _end(rest: str, begin: int, *, is_web: bool) -> int:
    """Where the password ends, at its `@`; 0 where there is none."""
    authority = _AUTHORITY.match(rest, begin)
    if authority and "@" in authority[0]:
        return rest.rindex("@", begin, authority.end())
    if _PORT.match(rest, begin):  # host:port, no login
        return 0
    word = _WORD.match(rest, begin)
    hosts = [found.start() for found in _HOST.finditer(rest, begin, word.end() if word else begin)]
    if hosts:
        return hosts[-1]
    line = rest.find("\n", begin, begin + MOST_PASSWORD)
    later = None if is_web else _HOST.search(rest, begin, line if line > 0 else begin + MOST_PASSWORD)
    return later.start() if later else 0


SHORT, LONG = 4, 8
_NUMERIC = "password|passwd|secret|api[_-]?key|credential"
_NAMES = rf"(?:{_NUMERIC}|token|authorization|cookie)"
_SECRET_NAME = re.compile(rf"(?i)(?:^|[_-]){_NAMES}$|^{_NAMES}|apikey$")
_GIVEN_NAME = re.compile("PASS|SECRET|TOKEN|KEY|URL", re.IGNORECASE)
# What Redis quotes of its configuration where it is wrong.
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
    text = _KNOWN.sub(MASK, without_logins(text))
    text = _DIRECTIVE.sub(lambda found: f"{found[1] or ''}{MASK}", _NAMED.sub(_unnamed, text))
    return _CARD.sub(_uncarded, _PHONE.sub(MASK, _MAIL.sub(MASK, text)))


def secret_parts(variables: Mapping[str, str]) -> set[str]:
    """What of the values of an environment's variables stands in no report: each that is long or has a secret's name,
    its lines, and the password of a URL by itself. Paths and short words tell nothing."""
    found = set[str]()
    for name, value in variables.items():
        least = SHORT if _SECRET_NAME.search(name) else LONG
        found |= {part for part in (value, *value.splitlines()) if len(part) >= least and not part.startswith("/")}
        with contextlib.suppress(ValueError):  # it is no URL
            password = urlsplit(value).password or ""
            found |= {part for part in (password, unquote(password)) if len(part) >= SHORT}
    return found


def secrets_given(variables: Mapping[str, str]) -> set[str]:
    """The values of variables whose names are those of secrets and addresses."""
    return {value for name, value in variables.items() if value and _GIVEN_NAME.search(name)}


def without(text: str, secrets: Iterable[str]) -> str:
    """The text without these values, as they are and as Python, JSON and a URL write them. One of fewer than `SHORT`
    letters is masked only as a whole word: it may be a part of any other."""
    known = {one for one in secrets if one}
    forms = {
        form for one in known for form in (one, repr(one)[1:-1], json.dumps(one)[1:-1], quote(one, safe=""), quote(one))
    }
    for form in sorted(forms, key=len, reverse=True):
        if len(form) >= SHORT:
            text = text.replace(form, MASK)
        else:
            text = re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", MASK, text)
    return text


def masked_value(value: object, name: str = "") -> object:
    """The same of anything that JSON holds; `name`: the field whose value it is."""
    match value:
        case dict():
            return {inner: masked_value(content, str(inner)) for inner, content in value.items()}
        case list():
            return [masked_value(content, name) for content in value]
        case str():
            return MASK if value and _SECRET_NAME.search(name) else masked(value)
    return value


def kinds_in(text: str) -> tuple[str, ...]:
    """What of it a text holds."""
    found = {
        "secret": bool(_KNOWN.search(text) or without_logins(text) != text or _NAMED.sub(_unnamed, text) != text),
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
    """By its check digit (Luhn): other long numbers are ids."""
    digits = [int(character) for character in text if character.isdigit()][::-1]
    return sum(digits[::2]) % 10 == -sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2]) % 10


# Names stay; comments go; texts of every notation are masked, also where the end is cut off.
# https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-CONSTANTS
_SQL_PARTS = re.compile(
    r"""
    (?P<name> "(?:""|[^"])*" )
    | (?P<comment> --[^\n]* | /\*.*?(?:\*/|$) )
    | \b[eE]'(?:\\.|''|[^'\\])*(?:'|\\?$)
    | (?:\b(?:[bBxXnN]|[uU]&))?'(?:''|[^'])*(?:'|$)
    | (?<![\w$])\$(?P<tag>(?:[^\W\d]\w*)?)\$.*?(?:\$(?P=tag)\$|$)
    """,
    re.VERBOSE | re.DOTALL,
)


def masked_statement(statement: str) -> str:
    """A statement in one line, with `'…'` for every text in it: `ALTER ROLE x PASSWORD '…'`."""
    text = _SQL_PARTS.sub(lambda found: found["name"] or (" " if found["comment"] else TEXT), statement)
    return " ".join(text.split())
