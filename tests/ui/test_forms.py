"""The form that the Prefect UI makes of each deployed flow's parameters: usable without reading the source."""

from __future__ import annotations

import re
import typing
from typing import Any

from prefect.utilities.callables import parameter_schema

from deployments import forms
from tests.test_deployments import EACH_FLOW, JAPANESE, Found

REQUIRED = {"acknowledge-incident": {"by": "佐藤"}}
TIMES = {"since", "until", "due", "drill_date", "target", "month"}
TYPES = {"string", "integer", "number", "boolean", "array"}


def properties(found: Found) -> dict[str, dict[str, Any]]:
    """As they are published."""
    return dict(forms.schema_in(parameter_schema(found.flow.fn).model_dump(), "en")["properties"])


@EACH_FLOW
def test_only_the_environment_must_be_filled_in(found: Found) -> None:
    """And the deployment fills that in: every runbook starts, as a plan or a look, by two clicks. Who takes an incident
    says who that is."""
    schema, told = parameter_schema(found.flow.fn), {"environment": "lab", **REQUIRED.get(found.flow.name, {})}
    assert schema.required == list(told)
    defaults = {name: one["default"] for name, one in schema.properties.items() if name not in told}
    assert found.flow.validate_parameters({**told, **defaults})


@EACH_FLOW
def test_every_field_is_of_one_kind(found: Found) -> None:
    """Alternatives would be tabs, of which the first is None."""
    for name, one in properties(found).items():
        assert one.get("type") in TYPES, name
        assert not {"anyOf", "oneOf"} & (set(one) | set(one.get("items", {}))), name


@EACH_FLOW
def test_choices_are_drop_downs(found: Found) -> None:
    for name, hint in found.hints.items():
        choices = set(literals(hint))
        if name == "return" or not choices:
            continue
        shown = properties(found)[name]
        offered = shown.get("items", shown)
        assert set(offered.get("enum") or [offered.get("const")]) == choices, name
        default = shown.get("default")
        assert set(default if isinstance(default, list | tuple) else [default]) <= choices, name


@EACH_FLOW
def test_every_field_has_help_in_both_languages(found: Found) -> None:
    """On one line, as runbook/language/ja/forms.po has it: `make messages`."""
    japanese = forms.schema_in({"properties": properties(found)}, "ja")["properties"]
    for name, one in properties(found).items():
        assert one["description"], name
        assert not JAPANESE.search(one["description"]), name
        assert JAPANESE.search(japanese[name]["description"]), name
        assert {**japanese[name], "description": one["description"]} == one, "nothing else differs"


@EACH_FLOW
def test_an_empty_field_says_what_it_means(found: Found) -> None:
    """Or that it must be filled in: for the form, every field but the environment is optional."""
    for name, one in properties(found).items():
        if one["type"] in ("string", "array") and not one.get("default", True):
            assert re.search("[Ee]mpty|[Rr]equired", one["description"]), (
                f"{name}: what happens where it is left empty?"
            )


@EACH_FLOW
def test_a_time_has_an_example_and_a_zone(found: Found) -> None:
    for name, one in properties(found).items():
        if name in TIMES or ("enum" not in one and re.search(r"a time \(", one["description"])):
            assert re.search(r"e\.g\. 2\d{3}-\d{2}", one["description"]), name
            assert re.search("zone", one["description"]), name


@EACH_FLOW
def test_numbers_are_bounded(found: Found) -> None:
    """The browser refuses what is out of bounds, before anything runs."""
    for name, one in properties(found).items():
        if one["type"] in ("integer", "number"):
            assert {"minimum", "exclusiveMinimum"} & set(one), name


@EACH_FLOW
def test_no_choice_is_left_to_be_typed(found: Found) -> None:
    """Words joined by “|” in the help are choices."""
    for name, one in properties(found).items():
        if one["type"] == "string" and "enum" not in one:
            assert not re.search(r"\w+ ?\| ?\w+", one["description"]), name


def literals(hint: Any) -> list[Any]:
    """What a hint's literals allow, be they in a list or annotated."""
    if typing.get_origin(hint) is typing.Literal:
        return list(typing.get_args(hint))
    return [value for inner in typing.get_args(hint) for value in literals(inner)]
