"""Where the user gives no template, the data and the base decide, and say so where they can't."""

import re
from dataclasses import dataclass, replace

import pytest

from app.errors import InvalidRequest
from app.prompt import ModelGeometry
from app.text.message import Message
from app.text.prompt_encoder import PromptEncoder
from app.training.encoding import encode_examples
from app.training.examples import Dataset, Example, Form
from app.training.templates import ChosenTemplate, choose_template
from tests.seq2seq import source_tokenizer
from tests.text.chat_templates import tokenizer_for
from tests.text.tokenizer_zoo import tokenizer_of

_GEOMETRY = ModelGeometry(
    architecture="tiny",
    hidden_size=8,
    vocab_size=1000,
    max_positions=64,
    layers={},
    dtype="float32",
    fingerprint="tiny",
)


@dataclass(frozen=True)
class Base:
    encoder: PromptEncoder
    geometry: ModelGeometry = _GEOMETRY
    eos_ids: frozenset[int] = frozenset({1})
    eos_id: int | None = 1
    forced_bos_id: int | None = None
    truncate: int | None = None


def base_of(kind: str) -> Base:
    kinds = {
        "causal": lambda: tokenizer_of("byte_level"),
        "chat": lambda: tokenizer_for("llama3"),
        "seq2seq": lambda: source_tokenizer("t5"),
    }
    tokenizer = kinds[kind]() if kind in kinds else tokenizer_of(kind)
    geometry = replace(_GEOMETRY, max_source_positions=64) if kind == "seq2seq" else _GEOMETRY
    return Base(PromptEncoder(tokenizer, max_positions=64, vocab_size=1000), geometry)


HI, ANSWER = Message("user", "hi"), Message("assistant", "hello")
TEXT = Example(inputs="hi ", output="yes", line=1, file="x.jsonl")
RECORD = Example(inputs={"name": "Blue Door", "food": "Thai"}, output="yes", line=1, file="x.jsonl")
NAMED = Example(inputs={"review": "hi"}, output="yes", line=1, file="x.jsonl")
CHAT = Example(messages=(HI,), output="yes", line=1, file="x.jsonl")
LONGER = Example(
    messages=(Message("system", "be brief"), HI, ANSWER, HI), output="yes", line=1, file="x.jsonl"
)
# Form and example, then the template of a causal base, of one with a chat template, of an encoder-decoder.
CASES = [
    (Form.INPUTS, TEXT, "{text}\n", "{text}\n", None),
    (Form.LABEL, TEXT, "{text}\n", "{text}\n", None),
    (Form.PROMPT, TEXT, None, None, None),
    (Form.INPUTS, NAMED, "{review}\n", "{review}\n", "{review}"),
    (Form.MESSAGES, CHAT, "{text}\n", None, None),
]


def data(form: Form, *examples: Example) -> Dataset:
    return Dataset(train=examples, dev=(), test=(), digest="", form=form)


@pytest.mark.parametrize("kind", ["causal", "chat", "seq2seq"])
@pytest.mark.parametrize("case", CASES)
def test_each_form_has_its_template(
    case: tuple[Form, Example, str | None, str | None, str | None], kind: str
) -> None:
    form, example, *templates = case
    base = base_of(kind)
    chosen = choose_template(data(form, example), base)
    assert chosen == ChosenTemplate(dict(zip(("causal", "chat", "seq2seq"), templates, strict=True))[kind])
    [pair] = encode_examples([example], base, chosen.source)
    assert pair.source


def test_several_fields_get_a_line_each_and_that_is_said() -> None:
    chosen = choose_template(data(Form.INPUTS, RECORD), base_of("causal"))
    assert chosen == ChosenTemplate(
        "name: {name}\nfood: {food}\n",
        (
            r"no template was given, so each field has a line of its own: 'name: {name}\nfood: {food}\n'; "
            "--template changes that",
        ),
    )
    assert (
        choose_template(data(Form.INPUTS, RECORD), base_of("seq2seq")).source == "name: {name}\nfood: {food}"
    )
    given = choose_template(data(Form.INPUTS, RECORD), base_of("causal"), "{name} is {food}\n")
    assert given == ChosenTemplate("{name} is {food}\n")


def test_turns_that_no_template_reads_are_said() -> None:
    longer = data(Form.MESSAGES, CHAT, LONGER)
    with pytest.raises(
        InvalidRequest, match=r"^x\.jsonl, line 1: the base has no chat template, so a task reads"
    ):
        choose_template(longer, base_of("causal"))
    assert choose_template(longer, base_of("chat")) == ChosenTemplate(None)
    chosen = choose_template(longer, base_of("chat"), "Say: {text}\n")
    assert chosen.warnings == (
        "a task with a template reads the user's last message alone; chats with others: 1, such as x.jsonl, "
        "line 1",
    )


def test_a_wrong_template_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="it has no field"):
        choose_template(data(Form.INPUTS, TEXT), base_of("causal"), "Review:")


@pytest.mark.parametrize(
    ("kind", "template", "text", "answer", "said"),
    [
        (
            "byte_level",
            "Review: {text}\nSentiment:",
            "Fine.",
            "good",
            "without a space: 1 of 1, such as .*Sentiment:good'",
        ),
        (
            "byte_level",
            None,
            "It is",
            "good",
            r"'It isgood' \(x\.jsonl, line 3\); end the template with a line br",
        ),
        ("byte_level", None, "It is", " good", None),
        ("byte_level", "{text}\n", "It is", "good", None),
        ("byte_level", None, "答", "是", None),
        ("word_piece", "{text}:", "It is", "good", None),
        ("metaspace", "{text}:", "It is", "good", None),
        (
            "legacy_llama",
            "{text}:",
            "It is",
            " good",
            "begin with a space: 1 of 1, such as x.jsonl, line 3; leave",
        ),
        ("seq2seq", None, "It is", " good", None),
    ],
)
def test_how_an_answer_follows_the_text_is_said(
    kind: str, template: str | None, text: str, answer: str, said: str | None
) -> None:
    dataset = data(Form.PROMPT, Example(inputs=text, output=answer, line=3, file="x.jsonl"))
    warnings = choose_template(dataset, base_of(kind), template).warnings
    assert (len(warnings) == 1 and re.search(said, warnings[0])) if said else not warnings


def test_a_line_with_other_fields_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"^x\.jsonl, line 1: inputs must have exactly the fields"):
        choose_template(data(Form.INPUTS, NAMED, RECORD), base_of("causal"))


@pytest.mark.parametrize(
    ("kind", "answer", "shown"),
    [
        ("unigram", "the film was {cold}", "1 of 1, such as 'the film was {cold}', which becomes"),
        ("word_piece", "The film", "1 of 1, such as 'The film', which becomes 'the film' (x.jsonl, line 3)"),
        ("unigram", "the film was cold", None),
        ("byte_level", "\ta {b}\n\U0001f642", None),
        ("legacy_llama", "\ta {b}\n\U0001f642", None),
    ],
)
def test_answers_that_tokens_cannot_spell_are_said(kind: str, answer: str, shown: str | None) -> None:
    dataset = data(Form.INPUTS, Example(inputs="It is", output=answer, line=3, file="x.jsonl"))
    warnings = choose_template(dataset, base_of(kind)).warnings
    assert any(shown in line for line in warnings) if shown else not warnings
