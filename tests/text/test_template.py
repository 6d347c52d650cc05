import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.text.template import (
    MAX_FIELDS,
    MAX_PLACES,
    MAX_TEMPLATE_CHARS,
    PLAIN,
    bind_inputs,
    joined,
    parse_template,
)


def rendered(source: str, **values: str) -> str:
    return joined(parse_template(source).render(values))


def test_fields_are_filled_and_braces_escaped() -> None:
    template = parse_template("{{{name}}} eats {food}; {name}!")
    assert template.fields == ("name", "food")
    assert template.leading == "{"
    assert joined(template.render({"name": "Ann", "food": "rice"})) == "{Ann} eats rice; Ann!"


def test_without_a_template_the_text_is_all() -> None:
    assert PLAIN.fields == ("inputs",)
    assert PLAIN.leading == ""
    assert joined(PLAIN.render({"inputs": "{x}"})) == "{x}"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{a.b}", "no plain name"),
        ("{a[0]}", "no plain name"),
        ("{a!r}", "no plain name"),
        ("{a:>9}", "no plain name"),
        ("{}", "no plain name"),
        ("{0}", "no plain name"),
        ("{ a }", "no plain name"),
        ("{a", "a lone {"),
        ("a} {b}", "a lone }"),
        ("{a{b}}", "a lone {"),
        ("no field", "it has no field"),
        ("{{a}}", "it has no field"),
        ("", "it has no field"),
        ("{é}", "no plain name"),
        ("{" + "a" * 65 + "}", "no plain name"),
        ("x" * MAX_TEMPLATE_CHARS + "{a}", "more than"),
        ("".join(f"{{f{i}}}" for i in range(MAX_FIELDS + 1)), "fields, more than"),
        ("{a} " * (MAX_PLACES + 1), "places"),
    ],
)
def test_anything_but_plain_fields_is_refused(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match="The template can't be used") as refused:
        parse_template(source)
    assert reason in refused.value.message
    assert refused.value.param == "template"


@given(st.text(), st.text())
def test_values_are_never_expanded_again(left: str, right: str) -> None:
    assert rendered("<{a}|{b}>", a=left, b=right) == f"<{left}|{right}>"


@given(st.text())
def test_an_escaped_text_is_itself(text: str) -> None:
    escaped = text.replace("{", "{{").replace("}", "}}")
    assert rendered(escaped + "{a}", a="") == text


@given(st.text(alphabet="{}ab.[0!:", max_size=12))
def test_parsing_agrees_with_python_where_it_accepts(source: str) -> None:
    try:
        template = parse_template(source)
    except InvalidRequest:
        return
    values = dict.fromkeys(template.fields, "{v}")
    assert joined(template.render(values)) == source.format_map(values)
    assert template.num_chars(values) == len(source.format_map(values))


def test_a_string_fills_the_only_field() -> None:
    assert bind_inputs(parse_template("Review: {text}"), "good") == {"text": "good"}
    assert bind_inputs(parse_template("Review: {text}"), {"text": "good"}) == {"text": "good"}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("text", "must be an object with exactly: a, b"),
        ({"a": "1"}, "missing: b"),
        ({"a": "1", "b": "2", "c": "3"}, "unknown: c"),
        ({"a": "1", "b": "\ud800"}, "surrogate"),
        ({"a": "1", "b": 2}, "inputs.b must be a string"),
    ],
)
def test_inputs_that_are_not_the_fields_are_refused(inputs: object, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        bind_inputs(parse_template("{a}{b}"), inputs)
    assert reason in refused.value.message
    assert (refused.value.param or "").startswith("inputs")
