"""Examples to token ids: the source as serving encodes it, and the answer as serving scores and writes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from app.errors import InvalidRequest, RequestTooLong
from app.prompt import ModelGeometry, Prompt
from app.sites import Embedding, Site
from app.text.prompt_encoder import PromptEncoder
from app.text.template import Template, parse_template
from app.text.tokenization import Tokenized, check_no_padding, check_not_empty
from app.training.data_files import refused
from app.training.examples import EncodedExample, Example


class Base(Protocol):
    """What encoding needs to know of a base."""

    @property
    def encoder(self) -> PromptEncoder:
        """Return what serving encodes with."""
        ...

    @property
    def geometry(self) -> ModelGeometry:
        """Return the shape, for its positions."""
        ...

    @property
    def eos_ids(self) -> frozenset[int]:
        """Return the ids that end an answer."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Return the one of them that ends an answer in training; None: the base has none."""
        ...

    @property
    def forced_bos_id(self) -> int | None:
        """Return the id that each answer of an encoder-decoder begins with, if it has one."""
        ...

    @property
    def truncate(self) -> int | None:
        """Return the number of tokens to which the task cuts longer inputs, if it does."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Learned:
    """Positions that a prompt takes: before the text, or in an encoder-decoder before the answer.

    All choices are scored after each text, so an answer needs as many positions as the longest of them.
    """

    num_virtual_tokens: int = 0
    num_source_tokens: int = 0  # before the text of an encoder-decoder: a soft prompt's, not a prefix's
    num_answer_tokens: int = 0  # after the text, at least: where choices are scored, the longest one's

    @classmethod
    def of(cls, prompt: Prompt, num_answer_tokens: int = 0) -> "Learned":
        """Return what serving counts of a prompt."""
        return cls(
            num_answer_tokens=num_answer_tokens,
            num_virtual_tokens=prompt.length(Site.DECODER_SELF) + prompt.length(Embedding.DECODER),
            num_source_tokens=prompt.length(Embedding.ENCODER),
        )


def encode_examples(
    examples: Sequence[Example], base: Base, template: str | None, learned: Learned = Learned()
) -> list[EncodedExample]:
    """Return each example's ids; `template` is that of the task part of an upload, where None is none.

    Raise InvalidRequest, which names the first line that the template doesn't take, or that is too long for
    the base with the learned tokens: nothing is truncated but what the task truncates when it is served.
    """
    parsed = parse_template(template)
    encoded, too_long = [], list[tuple[Example, str]]()
    for example in examples:
        try:
            pair = _encode(example, base, parsed)
        except RequestTooLong:
            limit = base.geometry.max_source_positions or base.geometry.max_positions
            too_long.append((example, f"the input alone has more tokens than the base's {limit} positions"))
            continue
        except InvalidRequest as error:
            raise refused(example.place, error.message) from None
        encoded.append(pair)
        reason = _why_too_long(pair, base, learned)
        if reason:
            too_long.append((example, reason))
    if too_long:
        example, reason = too_long[0]
        others = f" {len(too_long)} of {len(examples)} examples are too long." if len(too_long) > 1 else ""
        raise refused(example.place, f"{reason}.{others} Shorten them, or leave them out")
    return encoded


def source_of(example: Example, base: Base, template: Template) -> tuple[int, ...]:
    """Return the ids of what is asked. Raise InvalidRequest, which names the line."""
    try:
        source = _source(example, base, template)
        check_not_empty(source)
    except InvalidRequest as error:
        raise refused(example.place, error.message) from None
    return source.ids


def _encode(example: Example, base: Base, template: Template) -> EncodedExample:
    source = _source(example, base, template)
    check_not_empty(source)
    if base.geometry.has_encoder:
        check_no_padding(source.ids, base.encoder.tokenizer.pad_id, base.eos_ids)
    answer = base.encoder.answer_ids(example.output, base.eos_id)
    if answer in ((), (base.eos_id,)):
        raise InvalidRequest("the answer has no tokens: the tokenizer drops all its characters", param="data")
    first = base.forced_bos_id if base.geometry.has_encoder else None
    forced = () if first is None else (first,)
    return EncodedExample(source.ids, (*forced, *answer))


def _source(example: Example, base: Base, template: Template) -> Tokenized:
    if example.messages:
        return base.encoder.encode_task_chat(template, example.messages, base.truncate)
    return base.encoder.encode(template, example.inputs, base.truncate)


def _why_too_long(pair: EncodedExample, base: Base, learned: Learned) -> str | None:
    """Return what is longer than the base's positions, with the numbers."""
    geometry, source = base.geometry, len(pair.source)
    target = max(len(pair.target), learned.num_answer_tokens)
    rows, virtual = learned.num_source_tokens, learned.num_virtual_tokens
    if not geometry.has_encoder:
        total = virtual + source + target
        parts = f"{virtual} learned + {source} of the input + {target} of the answer"
        return _beyond(parts, total, geometry.max_positions, "base")
    return _beyond(
        f"{rows} learned + {source} of the input", rows + source, geometry.max_source_positions, "encoder"
    ) or _beyond(
        f"{virtual} learned + 1 to start with + {target} of the answer",
        virtual + 1 + target,
        geometry.max_positions,
        "decoder",
    )


def _beyond(parts: str, total: int, limit: int, what: str) -> str | None:
    if total <= limit:
        return None
    return f"{parts} tokens are {total}, but the {what} has {limit} positions"
