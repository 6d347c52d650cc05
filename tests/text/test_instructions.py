"""Worked examples, options and steps are text around the inputs, and nothing else."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.text.instructions import LAST, SO_FAR, Rendering, Shot, with_options
from app.text.template import Template, joined, parse_template

TEXTS = st.text(st.sampled_from("ab{} \n-é"), max_size=6)
PIECES = st.lists(
    st.one_of(
        TEXTS.map(lambda text: text.replace("{", "{{").replace("}", "}}")), st.just("{x}"), st.just("{y}")
    ),
    max_size=6,
).map(lambda pieces: "".join([*pieces, "{x}"]))


def plain(source: str) -> Rendering:
    template = parse_template(source)
    return Rendering(template, template)


def chain(source: str, asked: str, fed: str, end: str | None = "\n") -> Rendering:
    return Rendering(parse_template(source), parse_template(asked), fed, end)


@given(source=PIECES)
def test_a_templates_source_makes_it_again(source: str) -> None:
    template = parse_template(source)
    assert parse_template(template.source) == template


@given(source=PIECES, shots=st.lists(st.tuples(TEXTS, TEXTS, TEXTS), max_size=4), x=TEXTS, y=TEXTS)
def test_examples_are_the_text_of_their_inputs_and_their_outputs(
    source: str, shots: list[tuple[str, str, str]], x: str, y: str
) -> None:
    names = parse_template(source).fields

    def inputs(*values: str) -> dict[str, str]:
        return {name: value for name, value in zip(("x", "y"), values, strict=True) if name in names}

    rendering = plain(source)
    several = rendering.with_shots([Shot(inputs(*values), output) for *values, output in shots])
    by_hand = "".join(rendering.text(inputs(*values)) + output + "\n\n" for *values, output in shots)
    assert several.text(inputs(x, y)) == by_hand + rendering.text(inputs(x, y))
    assert parse_template(several.template.source) == several.template


def test_options_are_lines() -> None:
    template = with_options(parse_template("{text}\nOPTIONS:\n{options}\nAnswer:"), [" good", "bad {1}"])
    assert template.fields == ("text",)
    assert joined(template.render({"text": "x"})) == "x\nOPTIONS:\n- good\n- bad {1}\nAnswer:"
    assert template == parse_template("{text}\nOPTIONS:\n- good\n- bad {{1}}\nAnswer:")


def test_options_are_a_field_like_others_where_there_are_no_choices() -> None:
    template = parse_template("{text} {options}")
    assert with_options(template, []) is template


def test_all_steps_so_far_stand_as_they_are() -> None:
    rendering = chain("{question}\n{so_far}", "{question}", SO_FAR)
    assert rendering.text("3 * (4 + 5)") == "3 * (4 + 5)\n"
    assert rendering.text({"question": "q"}, ("a\n", "b {c}\n")) == "q\na\nb {c}\n"


def test_the_last_step_stands_for_the_input() -> None:
    rendering = chain("Expression: {last}\n", "{expression}", LAST)
    assert rendering.text("3 * (4 + 5)") == "Expression: 3 * (4 + 5)\n"
    assert rendering.text("3 * (4 + 5)", ("1\n", "3 * 9\n")) == "Expression: 3 * 9\n"
    assert rendering.text("3 * (4 + 5)", ("3 * 9",)) == "Expression: 3 * 9\n"  # the model ended it
    both = chain("{question} -> {last}\n", "{question}", LAST, end=None)
    assert both.text("q", ("s\n",)) == "q -> s\n\n"


def test_fields_of_those_names_are_ordinary_without_a_chain() -> None:
    names = plain("{first} {last}, {so_far}\n")
    inputs = {"first": "Ada", "last": "Lovelace", "so_far": "x"}
    assert names.with_shots([Shot(inputs, "y")]).text(inputs) == "Ada Lovelace, x\ny\n\nAda Lovelace, x\n"


def test_an_example_of_a_chain_has_its_steps_as_its_output() -> None:
    rendering = chain("{q}\n{so_far}", "{q}", SO_FAR).with_shots([Shot("1", "a\nb")])
    assert rendering.text("2", ("c\n",)) == "1\na\nb\n\n2\nc\n"


@pytest.mark.parametrize(
    ("shots", "param"),
    [
        ([Shot("a", "b"), Shot({"x": "a", "z": "c"}, "b")], "few_shot[1].inputs"),
        ([Shot({"x": 1}, "b")], "few_shot[0].inputs"),  # type: ignore[dict-item]
        ([Shot("a", "b"), Shot("a" * 40_000, "b" * 30_000)], "few_shot[1]"),
    ],
)
def test_the_example_at_fault_is_named(shots: list[Shot], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plain("{x}").with_shots(shots)
    assert caught.value.param == param


def test_examples_are_bounded_before_they_are_rendered() -> None:
    class Unrendered(Template):
        def render(self, values: Any) -> Any:
            assert self.num_chars(values) < 70_000
            return super().render(values)

    template = parse_template("{x}" + "y" * 30_000)
    watched = Unrendered(template.pieces, template.fields)
    with pytest.raises(InvalidRequest, match="more than 65536"):
        Rendering(watched, watched).with_shots([Shot("a", "b")] * 64)
