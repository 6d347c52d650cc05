"""From what a caller asks to a grammar that rows can follow, or a refusal that says why."""

import contextlib
import json
import re
import resource
import socket
import threading
from typing import Any

import numpy as np
import pytest

from app.errors import ConstraintFailed, InvalidRequest
from app.serving.structured_output.constraints import MAX_REGEX_CHARS, Constraint, ConstraintKind
from app.serving.structured_output.grammars import Grammars
from app.serving.structured_output.json_schemas import MAX_SCHEMA_CHARS
from tests.text.tokenizer_zoo import ALL, tokenizer_of

JSON, REGEX, CHOICE = ConstraintKind.JSON_SCHEMA, ConstraintKind.REGEX, ConstraintKind.CHOICE
FOLLOWED = ("byte_level", "byte_level_bos", "metaspace", "legacy_llama")
PADDING = 37  # ids of the model beyond the tokenizer


def grammars_of(kind: str = "byte_level_bos", eos: tuple[str, ...] = ()) -> Grammars:
    tokenizer = tokenizer_of(kind)
    names = eos or (tokenizer.eos_token or tokenizer.sep_token,)
    ids = frozenset(tokenizer.convert_tokens_to_ids(name) for name in names)
    return Grammars(tokenizer, eos_ids=ids, vocab_size=len(tokenizer) + PADDING)


def allowed(row: Any) -> set[int]:
    bits = np.unpackbits(row.mask().view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def accepts(
    grammars: Grammars,
    constraint: Constraint,
    text: str,
    kind: str = "byte_level_bos",
    *,
    goes_on: bool = False,
) -> bool:
    """Whether the whole text may be generated, and may end there; token by token, any of those that fit."""
    tokenizer = tokenizer_of(kind)
    row = grammars.start(grammars.compile(constraint, goes_on=goes_on))
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    for id_ in ids:
        if id_ not in allowed(row):
            return False
        row.accept(id_)
    eos = tokenizer.eos_token_id
    return eos in allowed(row)


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return grammars_of()


AFTER_A_MARKER = {
    "27": Constraint(REGEX, "[0-9]+", "p"),
    "yes": Constraint(CHOICE, ["yes", " no"], "p"),
    '{"a": 1}': Constraint(JSON, {"properties": {"a": {"type": "integer"}}, "required": ["a"]}, "p"),
}


@pytest.mark.parametrize("text", AFTER_A_MARKER)
def test_white_space_may_stand_between_a_marker_and_what_is_constrained(
    grammars: Grammars, text: str
) -> None:
    constraint = AFTER_A_MARKER[text]
    for space, fits in (("", True), (" ", True), ("\n", True), ("\n\n", True), ("   ", False), ("x", False)):
        assert accepts(grammars, constraint, space + text, goes_on=True) is fits, space
    assert not accepts(grammars, constraint, " " + text)
    assert accepts(grammars, AFTER_A_MARKER["yes"], " no", goes_on=True)


def refusal(grammars: Grammars, kind: ConstraintKind, value: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        grammars.compile(Constraint(kind, value, "the_field"))
    assert caught.value.param == "the_field"
    assert "the_field" in caught.value.message or "can't be constrained" in caught.value.message
    return caught.value


def test_a_regex_holds_for_the_whole_text(grammars: Grammars) -> None:
    for pattern in ("(cold|great) food", "^(cold|great) food$"):
        constraint = Constraint(REGEX, pattern, "p")
        assert accepts(grammars, constraint, "cold food")
        for text in ("cold", "cold food.", " cold food", "hot food", ""):
            assert not accepts(grammars, constraint, text), text


CHOICES = [
    "a\nb",
    'q"q',
    "b\\s",
    "sl/ash",
    "🙂漢",
    "\x00z",
    "\x7f",
    "\u2028",
    "tab\t",
    "{a}",
    "'",
    "  lead",
    "a",
]


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos"])
def test_a_choice_is_taken_as_it_is(kind: str) -> None:
    grammars = grammars_of(kind)
    constraint = Constraint(CHOICE, CHOICES, "p")
    for text in CHOICES:
        assert accepts(grammars, constraint, text, kind), text
    for text in ("a\n", "a\\nb", "b\\", "lead", "aa", "\\u0000z"):
        assert not accepts(grammars, constraint, text, kind), text


def test_json_is_written_as_python_writes_it(grammars: Grammars) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "b": {"type": "string"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    value = {"a": [1, 2, 3], "b": "漢 🙂 é"}
    for given in (schema, json.dumps(schema)):
        constraint = Constraint(JSON, given, "p")
        assert accepts(grammars, constraint, json.dumps(value, ensure_ascii=False))
        assert not accepts(grammars, constraint, json.dumps(value, ensure_ascii=False, indent=1))
        assert not accepts(grammars, constraint, json.dumps(value, separators=(",", ":")))


@pytest.mark.parametrize("kind", FOLLOWED)
def test_no_special_token_and_no_padding_in_free_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    special = {id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    grammars = grammars_of(kind)
    row = grammars.start(grammars.compile(Constraint(REGEX, r"(?s:.)*", "p")))
    for _ in range(3):
        free = allowed(row)
        assert free & special == {tokenizer.eos_token_id}
        assert max(free) < len(tokenizer)
        assert len(free) > 250
        row.accept(max(free - special))


def test_every_eos_id_ends_a_complete_answer_and_nothing_else_does() -> None:
    grammars = grammars_of("byte_level_bos", ("</s>", "<turn>"))
    tokenizer = tokenizer_of("byte_level_bos")
    row = grammars.start(grammars.compile(Constraint(CHOICE, ["a"], "p")))
    assert allowed(row) == {tokenizer.convert_tokens_to_ids("a")}
    row.accept(tokenizer.convert_tokens_to_ids("a"))
    assert allowed(row) == set(tokenizer.convert_tokens_to_ids(["</s>", "<turn>"]))


@pytest.mark.parametrize("kind", ALL)
def test_every_kind_of_tokenizer_is_followed_or_refused(kind: str) -> None:
    grammars, constraint = grammars_of(kind), Constraint(CHOICE, ["the film", "food"], "p")
    if kind in FOLLOWED:
        assert len(allowed(grammars.start(grammars.compile(constraint)))) > 1
        return
    with pytest.raises(InvalidRequest, match="can't be constrained: its tokens can't be read"):
        grammars.compile(constraint)


def test_a_base_without_an_end_is_refused() -> None:
    tokenizer = tokenizer_of("byte_level")
    grammars = Grammars(tokenizer, eos_ids=frozenset(), vocab_size=len(tokenizer))
    with pytest.raises(InvalidRequest, match="no token that ends"):
        grammars.compile(Constraint(CHOICE, ["a"], "p"))


REFUSED: list[tuple[ConstraintKind, Any, str]] = [
    (REGEX, "(a", "unclosed group"),
    (REGEX, "(?=a)b", "look-ahead"),
    (REGEX, r"(a)\1", "backreferences are not supported"),
    (REGEX, r"a[^\s\S]", "no text matches"),
    (REGEX, "", "1 to"),
    (REGEX, "a" * (MAX_REGEX_CHARS + 1), "1 to"),
    (REGEX, "\ud800", "surrogate"),
    (CHOICE, [], "list of 1 to"),
    (CHOICE, ["a", ""], "list of 1 to"),
    (CHOICE, ["a"] * 257, "list of 1 to"),
    (CHOICE, ["x" * 1025], "list of 1 to"),
    (CHOICE, ["\ud800"], "surrogate"),
    (JSON, [1], "an object"),
    (JSON, "{", "must be a JSON schema"),
    (JSON, "[" * 100_000, "at most"),
    (JSON, "[" * 60_000, "must be a JSON schema"),
    (JSON, {"type": "foo"}, "Invalid type: foo"),
    (JSON, {"type": "array", "contains": {"type": "string"}}, "contains"),
    (JSON, {"not": {"type": "string"}}, "not"),
    (JSON, {"if": {"type": "integer"}, "then": {"minimum": 3}}, "Unimplemented keys"),
    (JSON, {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    (JSON, {"type": "integer", "minimum": 5, "maximum": 2}, "minimum"),
    (JSON, {"type": "number", "minimum": float("nan")}, "NaN"),
    (JSON, {"type": "integer", "minimum": -(10**400)}, "out of range"),
    (JSON, {"$ref": "#"}, "no text matches"),
    (JSON, {"const": "\ud800"}, "surrogate"),
    (JSON, {"x-guidance": {"lenient": True}, "type": "string"}, "x-guidance"),
    (JSON, {"description": "x" * MAX_SCHEMA_CHARS}, "at most"),
]


@pytest.mark.parametrize(("kind", "value", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_cant_be_followed_is_refused_with_a_reason(
    grammars: Grammars, kind: ConstraintKind, value: Any, reason: str
) -> None:
    message = refusal(grammars, kind, value).message
    assert reason in message
    assert len(message) < 500
    assert not re.search(r"verbose|\^|\n|/tmp|\.rs", message)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


def crossed(width: int, depth: int) -> dict[str, Any]:
    """allOf over anyOf: alternatives multiply."""
    return {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}_{j}": {"type": "integer"}}} for j in range(width)]}
            for i in range(depth)
        ]
    }


HOSTILE: dict[str, tuple[ConstraintKind, Any]] = {
    "parentheses": (REGEX, "(" * 5000 + "a" + ")" * 5000),
    "deep schema": (JSON, nested(100)),
    "deeper than Python": (JSON, nested(5000)),
    "crossed alternatives": (JSON, crossed(10, 8)),
    "one large multiple": (JSON, {"type": "integer", "multipleOf": 1000003}),
    "two multiples": (JSON, {"allOf": [{"type": "integer", "multipleOf": 997}, {"multipleOf": 991}]}),
    "many patterns at once": (
        JSON,
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.{{{3 + i}}}x"} for i in range(12)]},
    ),
    "one repetition": (REGEX, "a{4000000000}"),
    "a long constant": (JSON, {"const": "x" * 60_000}),
    "many optional fields": (
        JSON,
        {
            "type": "object",
            "properties": {f"k{i}": {"type": "string"} for i in range(1500)},
            "additionalProperties": False,
        },
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_take_for_ever_is_refused(grammars: Grammars, name: str) -> None:
    kind, value = HOSTILE[name]
    refusal(grammars, kind, value)


BLOWN_UP: dict[str, tuple[ConstraintKind, Any]] = {
    "a late repetition": (REGEX, "[b-f]{30}a{4000000000}"),
    "nested repetitions": (REGEX, "(a{1,1000}){1,1000}"),
    "thrice nested": (REGEX, "((a{1,1000}){1,1000}){1,1000}"),
    "exponential automaton": (REGEX, "[ab]*a[ab]{200}c"),
    "five of them": (REGEX, "(.*a.{20}b.*){5}"),
    "references that double": (
        JSON,
        {
            "$defs": {
                **{f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(25)},
                "d25": {"type": "integer"},
            },
            "$ref": "#/$defs/d0",
        },
    ),
}


@pytest.mark.parametrize("name", BLOWN_UP)
def test_what_could_blow_up_is_followed_within_bounds(grammars: Grammars, name: str) -> None:
    """Many tokens, whatever they are; what exceeds a bound is one row's typed error."""
    kind, value = BLOWN_UP[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row = grammars.start(grammars.compile(Constraint(kind, value, "p")))
    draw = np.random.default_rng(0)
    eos = tokenizer_of("byte_level_bos").eos_token_id
    with contextlib.suppress(ConstraintFailed):
        for _ in range(120):
            choices = sorted(allowed(row) - {eos})
            if not choices:
                break
            row.accept(int(draw.choice(choices)))
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < 512 * 1024, "KiB of memory"


def test_remote_references_are_never_fetched(grammars: Grammars) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema.json"
        for schema in (
            {"$ref": url},
            {"$ref": "other.json", "$id": url},
            {"$schema": url, "$ref": "file:///etc/passwd"},
        ):
            refusal(grammars, JSON, schema)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_rows_of_one_grammar_dont_disturb_each_other() -> None:
    """Many threads begin and follow the same grammar at once."""
    grammars = grammars_of()
    tokenizer = tokenizer_of("byte_level_bos")
    grammar = grammars.compile(Constraint(JSON, {"type": "array", "items": {"type": "integer"}}, "p"))
    ids = tokenizer.backend_tokenizer.encode("[1, 23, 456]", add_special_tokens=False).ids
    failures: list[str] = []

    def follow() -> None:
        for _ in range(20):
            row = grammars.start(grammar)
            for id_ in ids:
                if id_ not in allowed(row):
                    failures.append("a token was missing")
                row.accept(id_)
            if allowed(row) != {tokenizer.eos_token_id}:
                failures.append("it didn't end")

    threads = [threading.Thread(target=follow) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_largest_choices_can_be_followed_to_their_ends(grammars: Grammars) -> None:
    texts = [f"{number:03d}" + "the film was great" * 56 for number in range(256)]
    assert accepts(grammars, Constraint(CHOICE, texts, "p"), texts[200])
    assert not accepts(grammars, Constraint(CHOICE, texts, "p"), texts[200][:-1])
