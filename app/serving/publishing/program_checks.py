"""Checks of what a `task` part says beyond one completion: contradictions, and what would do nothing."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from app.errors import InvalidRequest
from app.prompt import VersionDraft
from app.serving.program_settings import ChainSettings, ProgramSettings, ReasoningSettings
from app.serving.renderings import rendering_of
from app.store.references import parse_reference
from app.text.instructions import Rendering
from app.text.template import MAX_TEMPLATE_CHARS, bind_inputs

if TYPE_CHECKING:  # small commands check task files too, and this brings transformers
    from app.text.tokenization import PromptTokenizer

MAX_INSTRUCTION_CHARS = 4 * MAX_TEMPLATE_CHARS  # of all a version's templates, each with its examples
_OF_REASONING = ("reasoning_effort", "thinking_token_budget")
_MARKERS = {"reasoning": ("answer_after", "steps_end"), "chain": ("step_ends", "done")}

Fault = tuple[str, str]  # field, and what is wrong with it


def check_program(draft: VersionDraft, program: ProgramSettings) -> Rendering:
    """Return how the draft renders inputs. Raise InvalidRequest, which names the first field at fault."""
    for param, message in _faults(draft, program):
        raise InvalidRequest(message, param=param)
    first = rendering_of(draft, program)
    size = len(first.template.source)
    for index in range(len(program.paraphrases)):
        size += len(rendering_of(draft, program, index).template.source)
        if size > MAX_INSTRUCTION_CHARS:
            raise InvalidRequest(
                f"the templates up to here, each with the examples, have more than {MAX_INSTRUCTION_CHARS} "
                "characters; send fewer or shorter ones",
                param=f"paraphrases[{index}]",
            )
    return first


def check_examples(rendering: Rendering, examples: Mapping[str, Any], most: int) -> None:
    """Raise InvalidRequest where inputs don't fit the fields, or have more than `most` characters."""
    for param, inputs in examples.items():
        try:
            values = bind_inputs(rendering.asked, inputs)
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param=param) from None
        if sum(map(len, values.values())) > most:
            raise InvalidRequest(f"must have at most {most} characters", param=param)


def check_markers(program: ProgramSettings, tokenizer: "PromptTokenizer") -> None:
    """Raise InvalidRequest, which names the first marker that no answer of the base could hold."""
    for param, marker in _markers(program):
        if tokenizer.eos_id is not None and tokenizer.special_id(marker.strip()) == tokenizer.eos_id:
            raise InvalidRequest(
                f"{param}: {marker.strip()!r} is the token that ends an answer, so that nothing could follow "
                "it; choose another marker.",
                param=param,
            )
        text = f"a{marker}b"
        written = tokenizer.text_of(tokenizer.plain_ids(text))
        if marker not in written:
            raise InvalidRequest(
                f"{param}: no answer could hold {marker!r}, since the base's tokenizer makes {written!r} of "
                f"{text!r}; choose another marker.",
                param=param,
            )


def _markers(program: ProgramSettings) -> Iterator[tuple[str, str]]:
    for part, names in _MARKERS.items():
        settings = getattr(program, part)
        for name in names if settings is not None else ():
            if (marker := getattr(settings, name)) is not None:
                yield f"task.{part}.{name}", marker


def _faults(draft: VersionDraft, program: ProgramSettings) -> Iterator[Fault]:
    if program.reasoning is not None:
        yield from _of_reasoning(program.reasoning)
    if program.chain is not None:
        yield from _of_chain(program.chain)
        yield from _beside_a_chain(program)
    yield from _of_defaults(draft.defaults, program)


def _of_reasoning(reasoning: ReasoningSettings) -> Iterator[Fault]:
    yield from _invisible("reasoning.answer_after", reasoning.answer_after)
    if reasoning.steps_end is not None and reasoning.answer_after in reasoning.steps_end:
        yield "reasoning.steps_end", "holds answer_after, so that no step could end with it"
    if reasoning.effort.get("none"):
        yield "reasoning.effort.none", "must be 0: this effort is none at all; call the budget minimal"


def _of_chain(chain: ChainSettings) -> Iterator[Fault]:
    if chain.done is not None:
        yield from _invisible("chain.done", chain.done)
        if chain.step_ends is not None and (chain.step_ends in chain.done or chain.done in chain.step_ends):
            yield (
                "chain.done",
                "must not hold step_ends, nor be part of it: a step would end before it is found",
            )
    if len(chain.steps) > chain.max_steps:
        yield "chain.steps", f"names {len(chain.steps)} steps, but max_steps is {chain.max_steps}"
    for index, step in enumerate(chain.steps):
        try:
            parse_reference(step.task)
        except InvalidRequest as error:
            yield f"chain.steps[{index}].task", error.message


def _beside_a_chain(program: ProgramSettings) -> Iterator[Fault]:
    if program.reasoning is not None:
        yield "chain", "doesn't go with reasoning, since both say where the answer is; send one of them"
    if program.paraphrases:
        yield "paraphrases", "would do nothing, since the chain's template is read; leave them out"


def _of_defaults(defaults: Mapping[str, Any], program: ProgramSettings) -> Iterator[Fault]:
    has_steps = program.reasoning is not None or program.chain is not None
    if has_steps and (defaults.get("num_beams") or 1) > 1:
        yield (
            "defaults.num_beams",
            "doesn't go with reasoning or a chain: beams find whole answers, not steps",
        )
    if program.vote is not None and defaults.get("do_sample") is False:
        yield "defaults.do_sample", "must not be false beside vote: without sampling all ballots are the same"
    effort = defaults.get("reasoning_effort") or "none"
    if program.reasoning is not None and effort != "none" and not program.reasoning.has_budgets:
        yield "defaults.reasoning_effort", "would do nothing, since reasoning.effort has no budgets; add some"
    names = () if program.reasoning else _OF_REASONING if has_steps else (*_OF_REASONING, "include_reasoning")
    for name in names:
        if defaults.get(name) is not None:
            yield f"defaults.{name}", "would do nothing, since the task has no reasoning; leave it out"


def _invisible(param: str, marker: str) -> Iterator[Fault]:
    """Refuse a marker that every text holds, or none."""
    if not marker.strip() and "\n" not in marker:
        yield param, "must hold more than spaces"
