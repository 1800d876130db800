"""Logins in addresses: `scheme://user:password@host`, however the password is written. Linear in the text's length."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"(https?|[a-z0-9])://", re.IGNORECASE)
_PORT = re.compile(r"\d{1,5}(?![^/?#,;\s\"'<>)\]}|\\])")
_HOST = re.compile(r"@(?=[\w\[.%-])")
# The whole authority: an `@` in it that was not quoted belongs to the password, the last one ends it.
_AUTHORITY = re.compile(r"[^/\s\"?#]*")
_WORD = re.compile(r"[^\s\"'<>]*")
MOST_PASSWORD = 200
# Inside another URL's query, or in a log that quotes what it was sent.
_ENCODED = re.compile(r"(%3A%2F%2F(?:(?!%3A|%40|%2F)[^\s@])*%3A)(?:(?!%40|%2F)[^\s@])+(?=%40)", re.IGNORECASE)


def mask_logins(text: str, mask: str) -> str:
    """The text with `mask` for each password in an address; over HTTP for the user as well, who may be a token.

    A password that holds `@`, `/`, `?`, a quotation mark or a space ought to be quoted there, and often is not: it ends
    at the last `@` of its word, or at the first of its line.
    """
    starts = list(_SCHEME.finditer(text))
    ends = [*(one.start() for one in starts), len(text)][1:]
    parts, place = list[str](), 0
    for one, end in zip(starts, ends, strict=True):
        parts.append(text[place : one.end()])
        parts.append(_without_login(text[one.end() : end], mask, is_web=len(one[1]) > 1))
        place = end
    return _ENCODED.sub(rf"\1{mask}", "".join(parts) + text[place:])


def _without_login(rest: str, mask: str, *, is_web: bool) -> str:
    """`rest`: what follows `://`, up to the next address."""
    user, colon, _ = rest[: len(_AUTHORITY.match(rest)[0])].partition(":")  # type: ignore[index]
    if is_web and "@" in user:
        return f"{mask}{rest[rest.rindex('@', 0, len(user)) :]}"
    if not colon or "@" in user:
        return rest
    begin = len(user) + 1
    end = _end(rest, begin, is_web=is_web)
    return f"{'' if is_web else rest[:begin]}{mask}{rest[end:]}" if end else rest


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
