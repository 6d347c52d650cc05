"""What a schema may hold: nothing that an answer isn't held to passes in silence."""

import contextlib
import json
import tracemalloc
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from app.serving.structured_output.grammars import Grammars
from app.serving.structured_output.json_schemas import MAX_LITERAL_CHARS, MAX_MULTIPLE, schema_text
from tests.serving.structured_output.test_constraints import grammars_of

STRING = {"type": "string"}
HIDDEN = {"multipleOf": MAX_MULTIPLE + 1}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return grammars_of()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"type": "integer", "minimun": 3}, "'minimun' is no keyword .* did you mean 'minimum'"),
    ({"foo": 1}, "'foo' is no keyword .* leave it out"),
    ({"properties": {"a": {"maxLenght": 3}}}, "did you mean 'maxLength'"),
    ({"items": {"anyOf": [STRING, {"nullable": True}]}}, "'nullable'"),
    ({"$defs": {"a": {"foo": 1}}}, "'foo'"),
    ({"additionalProperties": {"foo": 1}}, "'foo'"),
    ({"prefixItems": [{"foo": 1}]}, "'foo'"),
    ({"patternProperties": {"^a": {"foo": 1}}}, "'foo'"),
    ({"x-parts": {"a": {"foo": 1}}, "$ref": "#/x-parts/a"}, "'foo'"),
    ({"type": "string", "contentEncoding": "base64"}, "'contentEncoding'"),
    ({"properties": {"a": {"x-guidance": {}}}}, "x-guidance"),
    ({"type": "object", "minProperties": 2}, "minProperties above 1"),
    ({"$ref": "other.json"}, "leads within the document"),
    ({"$ref": "#name", "$defs": {"a": {"$anchor": "name"}}}, "leads within the document"),
    ({"$ref": 7}, "leads within the document"),
    ({"$ref": "#/a%2Fb", "a/b": STRING}, "no keyword|leads within"),
    ({"$ref": "#/$defs/b", "$defs": {"a": STRING}}, "leads nowhere"),
    ({"$ref": "#/anyOf/3", "anyOf": [STRING]}, "leads nowhere"),
    ({"$defs": {"a": {"$id": "http://b/", "type": "string"}}}, r"\$id may stand at the top"),
    ({"const": "x" * MAX_LITERAL_CHARS}, "more than 4096 characters"),
    ({"enum": ["a", {"b": "x" * MAX_LITERAL_CHARS}]}, "more than 4096 characters"),
    ({"properties": {"x" * (MAX_LITERAL_CHARS + 1): STRING}}, "more than 4096 characters"),
    ({"required": ["x" * (MAX_LITERAL_CHARS + 1)]}, "more than 4096 characters"),
    ({"pattern": "x" * (MAX_LITERAL_CHARS + 1)}, "more than 4096 characters"),
    ({"$defs": {"a": HIDDEN}}, "least common multiple"),
    ({"const": HIDDEN, "$ref": "#/const"}, "least common multiple"),
    ({"default": [HIDDEN], "anyOf": [{"$ref": "#/default/0"}]}, "least common multiple"),
]


@pytest.mark.parametrize(("schema", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
@pytest.mark.parametrize("as_text", [False, True])
def test_what_an_answer_cant_be_held_to_is_refused_by_name(
    schema: dict[str, Any], reason: str, as_text: bool
) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        schema_text(json.dumps(schema) if as_text else schema, "the_field")
    assert caught.value.param == "the_field"


TAKEN: list[dict[str, Any]] = [
    {"const": {"multipleOf": True, "foo": 1, "$ref": "x"}},
    {"enum": [{"multipleOf": True}, {"minimun": 3}], "default": {"foo": 1}},
    {"type": "string", "examples": [{"multipleOf": 1000003}], "x-order": 3, "title": "t", "deprecated": True},
    {"type": "object", "properties": {"minimun": STRING, "default": STRING, "$ref": STRING}},
    {"$defs": {"a b": {"type": "array", "items": {"$ref": "#/$defs/a%20b"}}}, "$ref": "#/$defs/a%20b"},
    {"$defs": {"a/b~c": STRING}, "$ref": "#/$defs/a~1b~0c"},
    {"$id": "http://localhost/x", "$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"},
    {"const": "x" * (MAX_LITERAL_CHARS - 2)},
    {"type": "object", "minProperties": 1, "additionalProperties": False, "patternProperties": {"^a$": True}},
]


@pytest.mark.parametrize("schema", TAKEN, ids=range(len(TAKEN)))
def test_data_and_notes_are_left_alone(grammars: Grammars, schema: dict[str, Any]) -> None:
    assert grammars.compile(Constraint(ConstraintKind.JSON_SCHEMA, schema, "p"))


@pytest.mark.parametrize("multiple", [True, False, "3", None, [1], {}, 0, -7, float("inf")])
@pytest.mark.parametrize("place", ["schema", "const", "default"])
def test_a_multiple_that_is_none_is_no_error_of_the_servers(
    grammars: Grammars, multiple: Any, place: str
) -> None:
    """Where it is data, it is nobody's business; else it may be refused."""
    schema = {"multipleOf": multiple}
    text = json.dumps(schema if place == "schema" else {place: schema})
    constraint = Constraint(ConstraintKind.JSON_SCHEMA, text, "p")
    if place == "schema" or multiple == float("inf"):
        with contextlib.suppress(InvalidRequest):
            grammars.compile(constraint)
    else:
        assert grammars.compile(constraint)


@pytest.mark.parametrize(
    "schema",
    [
        {"enum": [f"v{number}" for number in range(100_000)]},
        {"properties": {f"p{number}": {"type": "string", "enum": ["a", "b"]} for number in range(20_000)}},
    ],
    ids=["a list", "properties"],
)
def test_what_is_far_too_long_is_refused_before_it_is_written(schema: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="json_schema is too long: at most"):
            schema_text(schema, "json_schema")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
