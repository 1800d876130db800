"""The fields of an answer and their types: those that the application reads, and those that changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# What the application reads, by the providers' references: learn.microsoft.com/azure/ai-services/openai/reference,
# docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html,
# cloud.google.com/vertex-ai/docs/reference/rest/v1/GenerateContentResponse
AZURE = {
    "choices.0.message.content": str,
    "choices.0.finish_reason": str,
    "model": str,
    "usage.prompt_tokens": int,
    "usage.completion_tokens": int,
    "usage.total_tokens": int,
}
BEDROCK = {
    "output.message.content.0.text": str,
    "stopReason": str,
    "usage.inputTokens": int,
    "usage.outputTokens": int,
    "usage.totalTokens": int,
}
VERTEX = {
    "candidates.0.content.parts.0.text": str,
    "candidates.0.finishReason": str,
    "usageMetadata.promptTokenCount": int,
    "usageMetadata.totalTokenCount": int,
}
_MISSING = object()


def lacks(body: Any, shape: Mapping[str, type]) -> list[str]:
    """Fields of a shape that are missing or have another type, as text."""
    found = []
    for path, kind in shape.items():
        value = _at(body, path)
        if value is _MISSING:
            found.append(f"{path} is missing")
        elif not isinstance(value, kind) or isinstance(value, bool):
            found.append(f"{path} is {type(value).__name__}, not {kind.__name__}")
    return found


def fields(body: Any) -> dict[str, str]:
    """The type of every value by its path; items of a list share one path: `choices[].message.content`."""
    return {path: " or ".join(sorted(kinds)) for path, kinds in sorted(_gathered(body).items())}


def differences(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """Fields that were removed, changed or added: (path, type before, type after), "" for none."""
    old, new = fields(before), fields(after)
    changed = [(path, old[path], new.get(path, "")) for path in old if old[path] != new.get(path, "")]
    return changed + [(path, "", new[path]) for path in new if path not in old]


def _at(body: Any, path: str) -> Any:
    for part in path.split("."):
        if isinstance(body, Mapping) and part in body:
            body = body[part]
        elif isinstance(body, list) and part.isdecimal() and int(part) < len(body):
            body = body[int(part)]
        else:
            return _MISSING
    return body


def _gathered(body: Any) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path, kind in _walk(body, ""):
        found.setdefault(path, set()).add(kind)
    return found


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    match value:
        case Mapping():
            for name, content in value.items():
                yield from _walk(content, f"{path}.{name}" if path else str(name))
        case list():
            for item in value:
                yield from _walk(item, f"{path}[]")
        case _:
            yield path, "null" if value is None else type(value).__name__
