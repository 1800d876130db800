"""Where PostgreSQL prints one definition in two ways: what it was told, and what it made of its own first text.

`status IN ('new', 'old')` on a varchar column is kept as `(ARRAY['new'::character varying, …])::text[]`. When that text
is read back, the parser applies the cast to each element: `ARRAY[('new'::character varying)::text, …]`. So a restored
database prints the second where its source prints the first (measured on 15, 17 and 18 for each kind of object), and
from then on it stays. In the same way a constant without a name in a subquery, `'x'::text`, gets the name of its type:
`'x'::text AS text`. https://www.postgresql.org/docs/current/sql-expressions.html (4.2.9, 4.2.12)

`canonical` writes each first form as the second (the name: not at all) and changes nothing else: no cast is dropped,
parentheses go only where they stand around a single value in an array right before `::`, and what is quoted is one
token. Blanks between tokens do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

_TOKEN = re.compile(
    r"(?P<blank>[ \t\r\n\f\v]+)|--[^\n]*"
    r"|\$(?P<tag>[^\W\d]\w*|)\$.*?\$(?P=tag)\$"
    r"|[eE]'(?:[^'\\]|''|\\.)*'|(?:[uU]&|[bBxXnN])?'(?:[^']|'')*'"
    r'|(?:[uU]&)?"(?:[^"]|"")*"'
    r"|\w[\w$]*|::|[-+*/<>=~!@#%^&|`?]+|.",
    re.DOTALL,
)
_CLOSING = {")": "(", "]": "["}
# Types' names of several words, and names that the parser knows otherwise: by these it names a column without a name.
# https://www.postgresql.org/docs/current/datatype.html
_TYPE_WORD = re.compile("varying|precision|with|without|time|zone|year|month|day|hour|minute|second|to")
_INTERNAL_NAMES = {
    **{"integer": ("int4",), "bigint": ("int8",), "smallint": ("int2",), "real": ("float4",), "double": ("float8",)},
    **{"boolean": ("bool",), "character": ("varchar", "bpchar"), "bit": ("bit", "varbit")},
    **{"timestamp": ("timestamp", "timestamptz"), "time": ("time", "timetz")},
}
_SEPARATOR = "\0"  # PostgreSQL's texts cannot hold it


@dataclass(frozen=True, eq=False)
class _Group:
    """What stands in a pair of parentheses or brackets."""

    opening: str
    items: Items


_Node: TypeAlias = "str | _Group"
Items: TypeAlias = "tuple[_Node, ...]"


def canonical(definition: str) -> str:
    """A definition's tokens, with each cast of an `ARRAY[…]` moved to its elements; for comparison only.

    Where columns that are arrays stand in a cast `ARRAY[…]`, a text cannot tell: those two forms stay unequal.
    """
    opened: list[tuple[str, list[_Node]]] = [("", [])]
    for match in _TOKEN.finditer(definition):
        token = match[0]
        if match["blank"]:
            continue
        if token in _CLOSING.values():
            opened.append((token, []))
        elif token in _CLOSING:
            opening, items = opened.pop()
            if opening != _CLOSING[token]:
                return definition  # brackets that do not match: nothing that PostgreSQL prints
            opened[-1][1].append(_group(opening, _settled(items)))
        else:
            opened[-1][1].append(token)
    return _text(_settled(opened[0][1])) if len(opened) == 1 else definition


def _settled(items: Sequence[_Node]) -> Items:
    done: list[_Node] = []
    at = 0
    while at < len(items):
        array, after = _array_at(items, at)
        end = _type_end(items, after)
        if array and end and _is_brackets(items[end - 1]):
            done += ("ARRAY", _cast_elements(array, tuple(items[after + 1 : end - 1])))
            at = end
        elif named := _named_by_its_cast(items, at):
            done += items[at:named]
            at = named + 2
        else:
            done.append(items[at])
            at += 1
    return tuple(done)


def _named_by_its_cast(items: Sequence[_Node], at: int) -> int:
    """Where `AS text` begins in `'x'::text AS text`; 0 where a constant has another name, or none."""
    constant, end = items[at], _type_end(items, at + 1)
    if not end or items[end : end + 1] != ["AS"] or not isinstance(constant, str):
        return 0
    kind, name = items[at + 2], items[end + 1]
    if not isinstance(kind, str) or not isinstance(name, str) or not (constant[0] == "'" or constant == "NULL"):
        return 0
    return end if name.strip('"') in _INTERNAL_NAMES.get(kind, (kind.strip('"'),)) else 0


def _array_at(items: Sequence[_Node], at: int) -> tuple[_Group | None, int]:
    """The brackets of `ARRAY[…]` or `(ARRAY[…])` there, and where the text goes on after it."""
    node = items[at]
    inner, after = (node.items, at + 1) if isinstance(node, _Group) else (tuple(items[at : at + 2]), at + 2)
    found = inner[1] if len(inner) == 2 and inner[0] == "ARRAY" else None
    return (found if isinstance(found, _Group) and found.opening == "[" else None), after


def _type_end(items: Sequence[_Node], at: int) -> int:
    """Where the cast that begins there ends (`::numeric(5,2)[]`); 0 where none begins."""
    if at + 1 >= len(items) or items[at] != "::":
        return 0
    end = at + 2
    while end < len(items):
        node = items[end]
        named = "." in (node, items[end - 1]) or (isinstance(node, str) and _TYPE_WORD.fullmatch(node))
        modified = isinstance(node, _Group) and all(str(item) == "," or _is_number(item) for item in node.items)
        if not named and not modified:
            break
        end += 1
        if isinstance(node, _Group) and node.opening == "[":
            break
    return end


def _is_number(node: _Node) -> bool:
    return isinstance(node, str) and node.isdecimal()


def _is_brackets(node: _Node) -> bool:
    return isinstance(node, _Group) and node.opening == "[" and not node.items


def _cast_elements(array: _Group, kind: Items) -> _Group:
    """Each element with the cast; inner arrays hand it on, and what stands beside them is an array itself."""
    elements = list(_elements(array.items))
    inner = [_array_at(element, 0)[0] if len(element) == 2 else None for element in elements]
    beside = (*kind, _group("[", ())) if any(inner) else kind
    casted: list[Items] = []
    for element, deeper in zip(elements, inner, strict=True):
        casted.append(("ARRAY", _cast_elements(deeper, kind)) if deeper else _cast(element, beside))
    return _group("[", [node for element in casted for node in (",", *element)][1:])


def _cast(element: Items, kind: Items) -> Items:
    if len(element) == 1 and isinstance(element[0], _Group) and "COLLATE" in element[0].items:
        items = element[0].items  # the cast goes below the collation
        at = items.index("COLLATE")
        return (_group("(", [_group("(", items[:at]), "::", *kind, *items[at:]]),)
    return (_group("(", element), "::", *kind)


def _elements(items: Iterable[_Node]) -> Iterator[Items]:
    element: list[_Node] = []
    for node in items:
        if node == ",":
            yield tuple(element)
            element = []
        else:
            element.append(node)
    if element:
        yield tuple(element)


def _group(opening: str, items: Sequence[_Node]) -> _Group:
    if opening == "[":
        elements = [_without_parentheses(element) for element in _elements(items)]
        items = [node for element in elements for node in (",", *element)][1:]
    return _Group(opening, tuple(items))


def _text(items: Items) -> str:
    """All tokens. Without recursion: an expression may be as deep as PostgreSQL's stack allows."""
    tokens: list[str] = []
    left: list[_Node] = list(reversed(items))
    while left:
        node = left.pop()
        if isinstance(node, str):
            tokens.append(node)
        else:
            tokens.append(node.opening)
            left += (")" if node.opening == "(" else "]", *reversed(node.items))
    return _SEPARATOR.join(tokens)


def _without_parentheses(element: Items) -> Items:
    """`(v)::text` as `v::text`, which statistics objects print; `(a + b)::text` stays: the cast would be b's alone."""
    while len(element) > 1 and isinstance(element[0], _Group) and element[1] == "::" and _is_value(element[0].items):
        element = (*element[0].items, *element[1:])
    return element


def _is_value(items: Items) -> bool:
    """Whether `::` after it casts the whole of it: a name, a literal, a call, a CASE, parentheses, a cast of these."""
    if not items or (isinstance(items[0], str) and not _begins_value(items[0])):
        return False
    at = _case_end(items) if items[0] == "CASE" else 1
    while 0 < at < len(items):
        if isinstance(items[at], _Group):
            at += 1
        elif items[at] == ".":
            at += 2
        else:
            at = _type_end(items, at)
    return at == len(items)


def _begins_value(token: str) -> bool:
    return (token[0].isalnum() or token[0] in "_'\"$") and token not in ("NOT", "SELECT", "VALUES", "WITH")


def _case_end(items: Items) -> int:
    depth = 0
    for at, item in enumerate(items):
        depth += (item == "CASE") - (item == "END")
        if depth == 0:
            return at + 1
    return 0
