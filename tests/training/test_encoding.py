"""Examples become the very ids that serving makes of the same inputs, template and answers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.errors import InvalidRequest
from app.models.encoder_decoder import EncoderDecoder
from app.models.geometry import model_geometry
from app.prompt import ModelGeometry, PromptKind, TaskVersion
from app.serving.admitted import Admitted
from app.serving.generation_request import ClassificationRequest, GenerationRequest
from app.serving.request_builder import RequestBuilder
from app.text.message import Message
from app.text.prompt_encoder import PromptEncoder
from app.training.encoding import Learned, encode_examples
from app.training.examples import EncodedExample, Example
from app.training.prompts import as_prompt, new_prompt
from app.training.settings import TrainingSettings
from tests.seq2seq import PAD, packed_copy, source_tokenizer, tiny_seq2seq
from tests.serving.stack import Stack, running_stack, stack_of
from tests.text.chat_templates import SOURCES
from tests.text.tokenizer_zoo import ALL, tokenizer_of
from tests.training.bases import any_base

TEMPLATES = (None, "{text}\n", "Review: {text}\nSentiment:", "<s>{text}</s>", " {text}<turn>", "{text}{text}")
SOME_WORDS = (
    "the film",
    " was",
    "<s>",
    "</s>",
    "<turn>",
    "<|im_end|>",
    "\n",
    "▁",
    "{x}",
    "漢字 🙂",
    "\t",
    "é",
)
TEXTS = st.lists(st.sampled_from(SOME_WORDS) | st.text(max_size=6), min_size=1, max_size=6).map("".join)
CHEAP = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class Base:
    """A server, as training knows the same base."""

    builder: RequestBuilder
    geometry: ModelGeometry
    eos_ids: frozenset[int]
    eos_id: int | None
    forced_bos_id: int | None = None
    truncate: int | None = None

    @property
    def encoder(self) -> PromptEncoder:
        return self.builder.prompts


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Base]]:
    """Servers by the kind of their tokenizer, or the family of an encoder-decoder."""
    bases: dict[str, Base] = {}
    with ExitStack() as running:

        def get(kind: str) -> Base:
            if kind not in bases:
                root = tmp_path_factory.mktemp("store")
                if kind in ALL or kind in SOURCES:
                    stack = running.enter_context(
                        running_stack(
                            root,
                            "byte_level_bos" if kind in SOURCES else kind,
                            positions=1024,
                            chat_template=SOURCES.get(kind),
                        )
                    )
                else:
                    stack = running.enter_context(_seq2seq(kind, root))
                bases[kind] = _base(stack)
            return bases[kind]

        yield get


def _seq2seq(family: str, root: Path) -> "stack_of":  # type: ignore[valid-type]
    model = tiny_seq2seq(family)
    packed = packed_copy(model)
    start = model.generation_config.decoder_start_token_id
    backbone = EncoderDecoder(packed, model_geometry(packed, "tiny"))
    return stack_of(model, backbone, source_tokenizer(family), root, decoder_start_id=start)


def _base(stack: Stack) -> Base:
    builder = stack.generation.request_builder
    return Base(
        builder,
        stack.engine.geometry,
        builder.eos_ids,
        builder.prompts.end_id(builder.eos_ids),
        stack.base.generation_config.forced_bos_token_id,
    )


def served(base: Base, template: str | None, **request: object) -> Admitted:
    """The request as serving builds it for a task with this template."""
    version = TaskVersion(
        task_id="t",
        version=1,
        digest=f"digest of {template}",
        kind=PromptKind.TEXT,
        prompt_digest=None,
        num_virtual_tokens=0,
        position_offset=0,
        template=template,
        defaults={},
        choices=(),
        examples=(),
        notes="",
        base={},
        provenance={},
    )
    return base.builder.build(GenerationRequest(task="t", **request), version)  # type: ignore[arg-type]


def outcome(make: Callable[[], object]) -> object:
    try:
        return make()
    except InvalidRequest:
        return "refused"


def encoded(base: Base, template: str | None, example: Example) -> EncodedExample:
    [pair] = encode_examples([example], base, template)
    return pair


@pytest.mark.parametrize("kind", [*ALL, "t5", "bart"])
@CHEAP
@given(text=TEXTS, template=st.sampled_from(TEMPLATES))
def test_sources_are_those_of_serving(
    base_of: Callable[[str], Base], kind: str, text: str, template: str | None
) -> None:
    base, example = base_of(kind), Example(inputs=text, output="great")
    ours = outcome(lambda: encoded(base, template, example).source)
    assert ours == outcome(lambda: served(base, template, inputs=text).prompt_ids)


@pytest.mark.parametrize("kind", ["legacy_llama", "byte_level_bos", "bart"])
def test_fields_go_where_serving_puts_them(base_of: Callable[[str], Base], kind: str) -> None:
    base, template, inputs = base_of(kind), "{name}: {food}\n", {"food": "Thai <s>", "name": "Blue Door"}
    ids = encoded(base, template, Example(inputs=inputs, output="x")).source
    assert ids == served(base, template, inputs=inputs).prompt_ids


@pytest.mark.parametrize("kind", ["llama3", "chatml", "byte_level"])
@pytest.mark.parametrize("template", [None, "Say: {text}\n"])
@CHEAP
@given(texts=st.lists(TEXTS, min_size=1, max_size=3))
def test_chats_are_those_of_serving(
    base_of: Callable[[str], Base], kind: str, template: str | None, texts: list[str]
) -> None:
    base = base_of(kind)
    roles = ["system", "user", "assistant", "user"] if len(texts) > 1 else ["user"]
    messages = tuple(Message(roles[number], text) for number, text in enumerate(texts))
    ours = outcome(lambda: encoded(base, template, Example(messages=messages, output="great")).source)
    assert ours == outcome(lambda: served(base, template, messages=messages).prompt_ids)


@pytest.mark.parametrize("kind", [*ALL, "t5", "bart"])
@CHEAP
@given(answer=TEXTS)
def test_answers_are_scored_by_serving_as_they_are_trained(
    base_of: Callable[[str], Base], kind: str, answer: str
) -> None:
    base = base_of(kind)
    admitted = served(base, None, inputs="the film", classification=ClassificationRequest(choices=("a", "b")))
    first, label = admitted.decoder_ids[1:], base.builder.label_ids(answer, with_eos=True)
    target = outcome(lambda: encoded(base, None, Example(inputs="the film", output=answer)).target)
    if label in ((), (base.eos_id,)):
        assert target == "refused"
    else:
        assert target == ((*first, *label) if base.geometry.has_encoder else label)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_bos", "t5", "bart"])
@CHEAP
@given(answer=TEXTS.filter(bool))
def test_answers_read_as_they_were_written(base_of: Callable[[str], Base], kind: str, answer: str) -> None:
    base = base_of(kind)
    target = encoded(base, None, Example(inputs="the film", output=answer)).target
    assert base.encoder.tokenizer.text_of(target) == answer
    assert base.eos_id is not None
    assert target[-1] == base.eos_id


def test_a_forced_first_token_is_the_answers_own(base_of: Callable[[str], Base]) -> None:
    target = encoded(base_of("bart"), None, Example(inputs="the film", output="great")).target
    assert target[0] == tokenizer_of("byte_level_bos").bos_token_id
    assert PAD not in target


def test_what_is_too_long_is_counted_and_named(base_of: Callable[[str], Base]) -> None:
    base = base_of("byte_level")
    limit = base.geometry.max_positions
    fits = Example(inputs="a" * 100, output="b", line=1, file="x.jsonl")
    source, target = (
        len(ids) for ids in (encoded(base, None, fits).source, encoded(base, None, fits).target)
    )
    learned = Learned(num_virtual_tokens=limit - source - target)
    assert len(encode_examples([fits] * 3, base, None, learned)) == 3
    longer = Learned(num_virtual_tokens=limit - source - target + 1)
    with pytest.raises(InvalidRequest) as refused:
        encode_examples([fits] * 3, base, None, longer)
    assert str(refused.value) == (
        f"x.jsonl, line 1: {longer.num_virtual_tokens} learned + {source} of the input + {target} of the "
        f"answer tokens are {limit + 1}, but the base has {limit} positions. 3 of 3 examples are too long. "
        "Shorten them, or leave them out"
    )
    huge = Example(inputs="film " * 100_000, output="b", line=7, file="x.jsonl")
    with pytest.raises(InvalidRequest, match=r"line 7: the input alone has more tokens than the base's"):
        encode_examples([huge], base, None)
    long_label = Example(inputs="film", output="good " * 3000, line=2, file="x.jsonl")
    with pytest.raises(
        InvalidRequest, match=r"line 2: 0 learned \+ \d+ of the input \+ \d{4,} of the answer"
    ):
        encode_examples([long_label], base, None)


def test_an_encoder_decoder_has_two_limits(base_of: Callable[[str], Base]) -> None:
    base = base_of("bart")
    source, answer = base.geometry.max_source_positions, base.geometry.max_positions
    example = Example(inputs="a" * 40, output="b" * 40, line=3, file="x.tsv")
    pair = encoded(base, None, example)
    fits = Learned(
        num_source_tokens=source - len(pair.source), num_virtual_tokens=answer - 1 - len(pair.target)
    )
    assert encode_examples([example], base, None, fits) == [pair]
    for more, limited in (
        (Learned(num_source_tokens=fits.num_source_tokens + 1), "encoder"),
        (Learned(num_virtual_tokens=fits.num_virtual_tokens + 1), "decoder"),
    ):
        with pytest.raises(InvalidRequest, match=f"x.tsv, line 3: .* but the {limited} has"):
            encode_examples([example], base, None, more)


def test_what_the_template_does_not_take_is_named_by_its_line(base_of: Callable[[str], Base]) -> None:
    example = Example(inputs={"a": "x"}, output="y", line=4, file="x.csv")
    with pytest.raises(InvalidRequest, match=r"x\.csv, line 4: inputs must have exactly the fields b"):
        encode_examples([example], base_of("byte_level"), "{b}")
    with pytest.raises(InvalidRequest, match=r"x\.csv, line 5: inputs is empty"):
        encode_examples([Example(output="y", line=5, file="x.csv")], base_of("byte_level"), None)


@pytest.mark.parametrize(
    ("base", "method", "sites", "counted"),
    [
        ("llama", "prompt", None, Learned(num_virtual_tokens=3)),
        ("llama", "prefix", None, Learned(num_virtual_tokens=3)),
        ("t5", "prompt", None, Learned(num_source_tokens=3)),
        ("bart", "prefix", ["dec.self"], Learned(num_virtual_tokens=3)),
        ("bart", "prefix", ["enc.self", "dec.cross"], Learned()),
    ],
)
def test_positions_are_counted_as_serving_counts_them(
    base: str, method: str, sites: list[str] | None, counted: Learned
) -> None:
    settings = TrainingSettings(method=method, num_virtual_tokens=3, init="random", sites=sites)
    prompt = as_prompt(new_prompt(settings, any_base(base)))
    assert Learned.of(prompt) == counted
