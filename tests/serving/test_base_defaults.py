"""What the base's generation config says are defaults; greedy tokens are then those of `generate`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from app.prompt import VersionDraft
from app.request import FinishReason
from app.serving.base_defaults import _AS_IN_REQUESTS, _NOT_HONOURED, BaseDefaults, BaseRules, base_defaults
from app.serving.generation_request import GenerationRequest, GenerationResult
from tests.oracle import as_prompt, soft_config, tuned
from tests.serving.stack import Stack, run, running_stack

TEXT = "the film was great and the food was the film"
NEW = 24

# Fields that change no token of an answer by the model alone: outputs, caches, speculation, padding; and
# what is decided elsewhere: EOS ids by loading, do_sample by each route.
_WITHOUT_EFFECT = {
    "do_sample", "use_mtp", "use_cache", "cache_implementation",
    "cache_config", "max_cache_len", "renormalize_logits", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "eos_token_id", "decoder_start_token_id", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "prompt_lookup_num_tokens",
    "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
    "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size", "transformers_version",
}  # fmt: skip


def test_every_field_of_transformers_is_accounted_for() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert fields - _WITHOUT_EFFECT == {*_AS_IN_REQUESTS, *BaseRules.model_fields, *_NOT_HONOURED}


def ask_of(stack: Stack, task: str | None = None, **parameters: Any) -> GenerationResult:
    asked = GenerationRequest(inputs=TEXT, task=task, parameters=parameters)
    return run(stack.generation.generate(asked))


def ids_of(result: GenerationResult) -> list[int]:
    return [token.id for token in result.tokens]


def expected(stack: Stack, model: Any = None, text: str = TEXT, **settings: Any) -> list[int]:
    ids = stack.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        output = (model or stack.base).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            eos_token_id=stack.tokenizer.eos_token_id,
            **settings,
        )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


@pytest.fixture(scope="module", params=["penalties", "bans", "ends"])
def generation(request: pytest.FixtureRequest) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {
        "penalties": {
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 3,
            "encoder_repetition_penalty": 1.2,
            "encoder_no_repeat_ngram_size": 2,
            "do_sample": False,
        },
        "bans": {
            "suppress_tokens": [46, 239, 100_000],
            "begin_suppress_tokens": [88],
            "bad_words_ids": [[50], [51, 52], [0]],
            "sequence_bias": [[[60], 2.0], [[61, 62], -4.0]],
            "renormalize_logits": True,
        },
        "ends": {"min_length": 18, "exponential_decay_length_penalty": [3, 1.5], "max_length": 40},
    }
    return kinds[request.param]


@pytest.fixture(scope="module")
def stack(generation: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("store"), generation=generation) as running:
        yield running


def test_greedy_tokens_are_those_of_generate(
    stack: Stack, generation: dict[str, Any], tmp_path: Path
) -> None:
    length = {} if "max_length" in generation else {"max_new_tokens": NEW}
    wanted = expected(stack, do_sample=False, **length)
    assert ids_of(ask_of(stack, **length)) == wanted
    model = tuned(stack.base, soft_config(5), seed=3)
    draft = VersionDraft(prompt=as_prompt(model, tmp_path), template="the film {text}")
    stack.store.publish("soft", draft)
    wanted = expected(stack, model, f"the film {TEXT}", do_sample=False, **length)
    assert ids_of(ask_of(stack, "soft@1", **length)) == wanted


def test_the_values_bind_and_are_shown(stack: Stack, generation: dict[str, Any]) -> None:
    shown = stack.generation.defaults.shown
    assert set(shown) == set(generation) - {"do_sample", "renormalize_logits"}
    assert not stack.generation.defaults.not_honoured
    plain = stack.base.generation_config
    stack.base.generation_config = GenerationConfig()
    try:
        without = expected(stack, do_sample=False, max_new_tokens=60)
    finally:
        stack.base.generation_config = plain
    assert ids_of(ask_of(stack, max_new_tokens=60)) != without


def test_requests_and_manifests_stand_above_the_base(tmp_path: Path) -> None:
    generation = {"repetition_penalty": 1.8, "max_new_tokens": 7, "suppress_tokens": [33], "top_k": 1}
    with running_stack(tmp_path, generation=generation) as stack:
        assert len(ids_of(ask_of(stack))) == 7
        off: dict[str, Any] = {"repetition_penalty": 1.0, "suppress_tokens": (), "max_new_tokens": NEW}
        settings = {"repetition_penalty": 1.0, "suppress_tokens": [], "max_new_tokens": NEW}
        assert ids_of(ask_of(stack, **off)) == expected(stack, do_sample=False, **settings)
        defaults = {"repetition_penalty": 1.2, "max_new_tokens": 9}
        stack.store.publish("task", VersionDraft(prompt=None, template="{text}", defaults=defaults))
        wanted = expected(stack, do_sample=False, repetition_penalty=1.2, max_new_tokens=9)
        assert ids_of(ask_of(stack, "task@1")) == wanted
        # Filters count where sampling is asked for: of one token there is no choice.
        assert ids_of(ask_of(stack, do_sample=True)) == ids_of(ask_of(stack))
        assert ids_of(ask_of(stack, do_sample=True, top_k=0, seed=1)) != ids_of(ask_of(stack))


def test_stop_strings_and_lengths_end_answers(tmp_path: Path) -> None:
    with running_stack(tmp_path) as plain:
        words = ask_of(plain, max_new_tokens=NEW).text
    stop = words[5:8]
    with running_stack(tmp_path, generation={"stop_strings": stop, "max_new_tokens": NEW}) as stack:
        result = ask_of(stack)
        assert result.finish is FinishReason.STOP
        assert result.text == words[: words.index(stop)]
        assert ask_of(stack, stop=()).text == words


def test_what_cannot_be_had_is_named() -> None:
    values = GenerationConfig(
        num_beam_groups=2,
        num_beams=40,
        penalty_alpha=0.6,
        guidance_scale=1.5,
        dola_layers="high",
        max_time=3.0,
        top_k=9,
    ).to_dict()
    values |= {"repetition_penalty": -2.0, "bad_words_ids": [["a"]], "top_p": "high"}
    defaults = base_defaults(values, max_rows=64)
    named = {line.split(" = ")[0] for line in defaults.not_honoured}
    assert named == {
        "num_beam_groups", "num_beams", "penalty_alpha", "guidance_scale", "dola_layers", "max_time",
        "repetition_penalty", "bad_words_ids", "top_p",
    }  # fmt: skip
    assert defaults.shown == {"top_k": 9}
    assert defaults.parameters == {"top_k": 9}


def test_neutral_values_ask_for_nothing() -> None:
    values = GenerationConfig().to_dict() | GenerationConfig._get_default_generation_params() | {"top_k": 0}
    del values["max_length"]
    assert base_defaults(values, max_rows=1) == BaseDefaults()
    assert base_defaults({"sequence_bias": {(3, 4): float("-inf")}}, max_rows=1).shown == {
        "sequence_bias": [[[3, 4], "-inf"]]
    }
