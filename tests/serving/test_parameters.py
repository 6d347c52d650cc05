from typing import Any

import pytest

from app.errors import InvalidRequest
from app.request import SamplingParams
from app.serving.parameters import GenerationParameters, parse_parameters

VALID: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": True,
    "temperature": 0.7,
    "top_k": 0,
    "top_p": 1,
    "min_p": 0,
    "repetition_penalty": 1.1,
    "frequency_penalty": -2,
    "presence_penalty": 2,
    "seed": 0,
    "stop": ["a", "b", "a"],
    "truncate": 3,
    "return_full_text": False,
    "top_n_tokens": 4,
    "decoder_input_details": True,
    "typical_p": 0.95,
    "top_h": 0.5,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0,
    "no_repeat_ngram_size": 3,
    "bad_words": ["x"],
    "suppress_tokens": [3, 3, 4],
    "begin_suppress_tokens": [],
    "min_new_tokens": 0,
    "forced_bos_token": "fr_XX",
    "ignore_eos": False,
    "stop_token_ids": [5],
    "include_stop_str_in_output": True,
    "skip_special_tokens": True,
    "num_beams": 4,
    "length_penalty": -2,
    "early_stopping": "never",
    "reasoning_effort": "low",
    "thinking_token_budget": -1,
    "include_reasoning": False,
    "paraphrase": 0,
}


def test_all_names_at_valid_values() -> None:
    parsed = GenerationParameters.of(parse_parameters(VALID))
    assert parsed.stop == ("a", "b")
    assert parsed.suppress_tokens == (3, 4)
    assert parsed.sampling(9) == SamplingParams(
        do_sample=True,
        temperature=0.7,
        top_p=1.0,
        typical_p=0.95,
        top_h=0.5,
        epsilon_cutoff=0.001,
        repetition_penalty=1.1,
        frequency_penalty=-2.0,
        presence_penalty=2.0,
        num_beams=4,
        length_penalty=-2.0,
        early_stopping="never",
        seed=0,
    )
    assert set(VALID) == set(GenerationParameters.__dataclass_fields__)


def test_null_is_not_given() -> None:
    assert parse_parameters(dict.fromkeys(VALID)) == {}
    assert GenerationParameters().sampling(9).seed == 9


def test_a_request_wins_over_the_task() -> None:
    task = {"top_k": 5, "seed": 1, "do_sample": True}
    assert GenerationParameters.of(task, {"seed": 0, "do_sample": False}) == GenerationParameters(
        top_k=5, seed=0, do_sample=False
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1_000_001),
        ("max_new_tokens", True),
        ("max_new_tokens", 2.0),
        ("max_new_tokens", "2"),
        ("temperature", 0),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("temperature", True),
        ("top_k", -1),
        ("typical_p", 0),
        ("typical_p", 1.1),
        ("eta_cutoff", -0.1),
        ("no_repeat_ngram_size", -1),
        ("min_new_tokens", 1.5),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [-1]),
        ("suppress_tokens", "5"),
        ("suppress_tokens", [5] * 1025),
        ("bad_words", [""]),
        ("ignore_eos", 0),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("seed", -1),
        ("seed", 2**63),
        ("truncate", 0),
        ("do_sample", 1),
        ("return_full_text", "yes"),
        ("stop", "a"),
        ("stop", ["a"] * 17),
        ("stop", [""]),
        ("stop", ["a" * 257]),
        ("stop", [1]),
        ("max_tokens", 3),
    ],
)
def test_anything_else_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_parameters({name: value}, where="task.defaults")
    assert (refused.value.param or "").partition("[")[0] == f"task.defaults.{name}"
