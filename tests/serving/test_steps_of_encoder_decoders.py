"""Steps of encoder-decoders: a marker goes behind the decoder's start, a chain's step is another source."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from app.models.geometry import model_geometry
from app.request import FinishReason
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from tests.api.test_seq2seq import backbone_of, packed_copy, source_tokenizer, tiny_seq2seq
from tests.serving.stack import Stack, run, stack_of
from tests.serving.test_reasoning import ask, check_stream, generate, ids, publish

LENGTH = 24
MARKER = "zz"
INPUT = "the film was great"


@pytest.fixture(scope="module", params=["t5_gated", "bart"])
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    base = tiny_seq2seq(request.param)
    base.generation_config.update(forced_bos_token_id=7 if request.param == "bart" else None)
    packed = packed_copy(base)
    backbone, start = (
        backbone_of(packed, model_geometry(packed, "tiny")),
        base.generation_config.decoder_start_token_id,
    )
    tokenizer = source_tokenizer(request.param)
    with stack_of(base, backbone, tokenizer, tmp_path_factory.mktemp("s"), decoder_start_id=start) as running:
        yield running


@torch.no_grad()
def going_on(stack: Stack, text: str, after: list[int], count: int) -> list[int]:
    """What the whole decoder says after these ids, behind its start, one token at a time."""
    source = torch.tensor([stack.tokenizer(text)["input_ids"]])
    given = [stack.base.generation_config.decoder_start_token_id, *after]
    found = list[int]()
    for _ in range(count):
        logits = stack.base(input_ids=source, decoder_input_ids=torch.tensor([given + found])).logits
        found.append(int(logits[0, -1].argmax()))
        if found[-1] == stack.tokenizer.eos_token_id:
            break
    return found


def test_a_marker_is_put_in_behind_what_the_decoder_begins_with(stack: Stack) -> None:
    task = publish(stack, reasoning={"answer_after": MARKER})
    plain = ids(generate(stack, INPUT, max_new_tokens=LENGTH))
    forced = stack.base.generation_config.forced_bos_token_id
    tokenizer = stack.generation.request_builder.prompts.tokenizer
    for budget in (0, 3):
        request = ask(INPUT, task, max_new_tokens=LENGTH, thinking_token_budget=budget)
        result = run(stack.generation.generate(request))
        kept, found = ids(result)[:budget], ids(result)[budget:]
        assert kept == plain[:budget]
        text = stack.tokenizer.decode(kept, skip_special_tokens=True)
        before = kept or ([] if forced is None else [forced])
        put_in = tokenizer.ids_after(text, f" {MARKER}" if text else MARKER)
        expected = going_on(stack, INPUT, [*before, *put_in], LENGTH - budget)
        last = len(expected) - (result.finish is FinishReason.EOS)  # BART's last one is forced to be EOS
        assert found[:last] == expected[:last]
        check_stream(stack, request, result)


def test_the_same_tokens_are_read_as_steps_and_answer(stack: Stack) -> None:
    plain = generate(stack, INPUT, max_new_tokens=LENGTH)
    marker = plain.text[8:11]
    task = publish(stack, reasoning={"answer_after": marker})
    request = ask(INPUT, task, max_new_tokens=LENGTH, decoder_input_details=True)
    result = run(stack.generation.generate(request))
    assert ids(result) == ids(plain)
    assert result.reasoning is not None
    assert (result.reasoning.text, marker) == plain.text.partition(marker)[:2]
    assert result.prompt_scores
    check_stream(stack, request, result)
    constraint = Constraint(ConstraintKind.REGEX, "[a-e]{4}", "grammar")
    held = ask(INPUT, task, max_new_tokens=LENGTH, of={"constraint": constraint})
    answer = run(stack.generation.generate(held))
    assert len(answer.text) == 4
    assert {*answer.text} <= {*"abcde"}


def test_a_chains_steps_are_sources(stack: Stack) -> None:
    template = "{x} and {so_far}"
    said = generate(stack, template.replace("{x}", INPUT).replace("{so_far}", ""), max_new_tokens=60).text
    for end in dict.fromkeys(each for each in said[4:] if each.isprintable()):
        task = publish(stack, chain={"template": template, "step_ends": end, "max_steps": 3})
        so_far, tokens, given = "", list[int](), dict[str, Any]()
        for _ in range(3):
            given = {"stop": [end], "max_new_tokens": 60 - len(tokens)}
            step = generate(stack, template.replace("{x}", INPUT).replace("{so_far}", so_far), **given)
            tokens += ids(step)
            so_far += step.text + end
            if step.finish is not FinishReason.STOP:
                break
        request = ask(INPUT, task, max_new_tokens=60)
        result = run(stack.generation.generate(request))
        if result.finish in (FinishReason.STOP, FinishReason.EOS):
            assert ids(result) == tokens
            assert result.reasoning is not None
            check_stream(stack, request, result)
            if len(result.reasoning.steps) > 1:
                return
    raise AssertionError("no chain has several steps")
