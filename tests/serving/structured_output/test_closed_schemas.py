"""Objects have the keys that their schema names, and no others unless it says so."""

import json
import random
import time
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.errors import InvalidRequest
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from app.serving.structured_output.grammars import Grammars
from app.serving.structured_output.json_schemas import schema_text
from tests.serving.structured_output.random_schemas import random_schema
from tests.serving.structured_output.test_constraints import grammars_of

INT = {"type": "integer"}
LONG = [f"{i}" * 3900 for i in range(8)]  # 60 kB of schema may name them in 50 MB
A: dict[str, Any] = {"type": "object", "properties": {"a": INT}, "required": ["a"]}
B: dict[str, Any] = {"type": "object", "properties": {"b": INT}, "required": ["b"]}
OPEN = {"type": "object", "properties": {"a": INT}, "additionalProperties": True}
NODE = {"type": "object", "properties": {"v": INT, "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}
A1, A1B2, B2, A1X = '{"a": 1}', '{"a": 1, "b": 2}', '{"b": 2}', '{"a": 1, "x": 3}'

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("plain", A, [A1], [A1X, "{}"]),
    ("true", OPEN, [A1, A1X], []),
    ("an empty schema", OPEN | {"additionalProperties": {}}, [A1, A1X], []),
    ("a schema", OPEN | {"additionalProperties": INT}, [A1, A1X], ['{"a": 1, "x": "y"}']),
    ("no properties", {"type": "object"}, ["{}", A1X], []),
    ("empty properties", {"type": "object", "properties": {}}, ["{}"], [A1]),
    (
        "required alone",
        A | {"required": ["a", "b"]},
        [A1B2, '{"a": 1, "b": "x"}'],
        [A1, '{"a": 1, "b": 2, "x": 3}'],
    ),
    ("patterns", {"type": "object", "patternProperties": {"^a$": INT}}, ["{}", A1], [B2, '{"a": "x"}']),
    (
        "patterns and required",
        {"type": "object", "patternProperties": {"^a": INT}, "required": ["a"]},
        [A1],
        ["{}", '{"a": "x"}', B2],
    ),
    ("nested", {"type": "object", "properties": {"o": A}}, ['{"o": {"a": 1}}'], ['{"o": {"a": 1, "x": 3}}']),
    ("in a list", {"type": "array", "items": A}, [f"[{A1}]"], [f"[{A1X}]"]),
    ("in a tuple", {"type": "array", "prefixItems": [A], "items": False}, [f"[{A1}]"], [f"[{A1X}]"]),
    (
        "as values",
        {"type": "object", "additionalProperties": A},
        ['{"k": {"a": 1}}'],
        ['{"k": {"a": 1, "x": 3}}'],
    ),
    ("a reference", {"$defs": {"A": A}, "$ref": "#/$defs/A"}, [A1], [A1X]),
    ("the old word", {"definitions": {"A": A}, "$ref": "#/definitions/A"}, [A1], [A1X]),
    ("anywhere", {"x-parts": {"A": A}, "$ref": "#/x-parts/A"}, [A1], [A1X]),
    (
        "recursion",
        {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
        ['{"v": 1, "next": {"v": 2}}'],
        ['{"v": 1, "next": {"v": 2, "x": 3}}', '{"v": 1, "x": 3}'],
    ),
    (
        "the root again",
        {"type": "object", "properties": {"v": INT, "next": {"$ref": "#"}}, "required": ["v"]},
        ['{"v": 1, "next": {"v": 2}}'],
        ['{"v": 1, "next": {"v": 2, "x": 3}}'],
    ),
    ("all of two", {"allOf": [A, B]}, [A1B2], [A1, B2, '{"a": 1, "b": 2, "x": 3}', '{"a": 1, "b": "x"}']),
    (
        "inheritance",
        {"$defs": {"A": A}, "allOf": [{"$ref": "#/$defs/A"}, B]},
        [A1B2],
        [A1, '{"a": 1, "b": 2, "x": 3}', '{"a": "x", "b": 2}'],
    ),
    (
        "a parent that is used alone too",
        {
            "$defs": {"A": A},
            "type": "object",
            "properties": {"own": {"$ref": "#/$defs/A"}, "both": {"allOf": [{"$ref": "#/$defs/A"}, B]}},
        },
        ['{"own": {"a": 1}, "both": {"a": 1, "b": 2}}'],
        ['{"own": {"a": 1, "b": 2}}', '{"both": {"a": 1}}', '{"both": {"a": 1, "b": 2, "x": 3}}'],
    ),
    ("beside a reference", {"$defs": {"A": A}, "$ref": "#/$defs/A", **B}, ['{"b": 2, "a": 1}'], [A1, A1X]),
    (
        "beside alternatives",
        {"type": "object", "properties": {"p": INT}, "anyOf": [A, B]},
        ['{"p": 0, "a": 1}', '{"p": 0, "b": 2}'],
        ['{"p": 0, "a": 1, "b": 2}', '{"p": 0}', '{"p": 0, "a": 1, "x": 3}'],
    ),
    ("alternatives beside all of", {"allOf": [A], "anyOf": [B, {"type": "object"}]}, [A1B2, A1], [B2, A1X]),
    ("alternatives", {"anyOf": [A, B, {"type": "null"}]}, [A1, B2, "null"], [A1B2, A1X]),
    ("one open part", {"allOf": [OPEN, B]}, [A1B2, '{"a": 1, "b": 2, "x": 3}'], [A1]),
    ("one open alternative", {"anyOf": [OPEN, B]}, [A1X, B2], ['{"a": "x"}']),
    ("false stays false", {"allOf": [A | {"additionalProperties": False}, OPEN]}, [A1], [A1X]),
    ("data", {"const": A}, [json.dumps(A)], [A1]),
]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return grammars_of()


def takes(grammars: Grammars, schema: Any, text: str) -> bool:
    """Whether an answer held to the schema may be this text, and end there."""
    row = grammars.start(grammars.compile(Constraint(ConstraintKind.JSON_SCHEMA, schema, "p")))
    tokenizer = grammars._tokenizer
    assert tokenizer is not None
    for id_ in [*tokenizer.tokenize_str(text), tokenizer.eos_token]:
        if not row.mask()[id_ // 32] >> (id_ % 32) & 1:
            return False
        row.accept(id_)
    return True


@pytest.mark.parametrize(
    ("schema", "taken", "refused"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
@pytest.mark.parametrize("as_text", [False, True])
def test_an_object_has_the_keys_that_are_named(
    grammars: Grammars, schema: dict[str, Any], taken: list[str], refused: list[str], as_text: bool
) -> None:
    given = json.dumps(schema) if as_text else schema
    assert {text: takes(grammars, given, text) for text in taken + refused} == {
        **dict.fromkeys(taken, True),
        **dict.fromkeys(refused, False),
    }
    valid = Draft202012Validator(schema).is_valid
    assert all(valid(json.loads(text)) for text in taken), "what is taken is what the schema describes"


def test_a_document_that_is_closed_already_means_the_same() -> None:
    """Random closed schemas: only where definitions stand may change."""
    rng = random.Random(5)
    for _ in range(300):
        schema = random_schema(rng)
        text = json.loads(schema_text(schema, "p"))
        if "$defs" not in schema:
            assert text == schema


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": {f"k{i}": INT}} for i in range(1500)]},
        {"$defs": {str(i): {"allOf": [{"$ref": f"#/$defs/{i + 1}"}] * 8} for i in range(40)} | {"40": A}}
        | {"$ref": "#/$defs/0"},
        {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}, A]}, "b": {"allOf": [{"$ref": "#/$defs/a"}, B]}}}
        | {"$ref": "#/$defs/a"},
    ],
    ids=["many names", "many paths", "a circle"],
)
def test_closing_is_bounded(grammars: Grammars, schema: dict[str, Any]) -> None:
    begin = time.process_time()
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(Constraint(ConstraintKind.JSON_SCHEMA, schema, "the_field"))
    assert caught.value.param == "the_field"
    assert time.process_time() - begin < 2


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [{"properties": dict.fromkeys(LONG, INT)}, *[{"properties": {}}] * 1500]},
        {"properties": {f"k{i}": {"properties": {f"x{i}": INT}, "$ref": "#/$defs/a"} for i in range(400)}}
        | {"$defs": {"a": {"properties": {"long": {"enum": LONG}}}}},
    ],
    ids=["names", "constants"],
)
def test_long_texts_are_not_repeated_without_end(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="simplify it"):
        schema_text(schema, "p")
