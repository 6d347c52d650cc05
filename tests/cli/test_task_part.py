"""What a run trains for, completed from its data."""

from typing import Any

import pytest

from app.cli.training.task_part import as_served, shown_answers, with_choices, with_limit, with_template
from app.serving.publishing.task_settings import completion_part
from app.text.template import PLAIN
from app.training.encoding import encode_examples
from app.training.examples import Dataset, Example
from tests import seq2seq
from tests.training.bases import causal_base, seq2seq_base


def test_the_number_of_new_tokens_is_the_wanted_one_else_the_given_one_else_the_datas() -> None:
    said: list[str] = []

    def limit(given: dict[str, object], wanted: int | None = None) -> object:
        return with_limit(given, 8, spare=1.25, wanted=wanted, say=said.append)["defaults"]

    assert limit({}) == {"max_new_tokens": 10}
    assert limit({"defaults": {"max_new_tokens": 9, "stop": ["."]}}) == {"max_new_tokens": 9, "stop": ["."]}
    assert limit({"defaults": {"max_new_tokens": 9}}, 12) == {"max_new_tokens": 12}
    assert said == []
    assert limit({"defaults": {"max_new_tokens": 5}}) == {"max_new_tokens": 5}
    assert said == ["warning: max_new_tokens is 5, but answers have up to 8 tokens; longer are cut"]


@pytest.mark.parametrize(
    ("defaults", "generation_config", "first"),
    [
        ({}, "auto", (seq2seq.BOS,)),
        ({}, "none", ()),
        ({"forced_bos_token": "<turn>"}, "auto", None),
        ({"forced_bos_token": "<turn>"}, "none", None),
    ],
)
def test_answers_begin_as_the_tasks_defaults_and_the_server_let_them(
    defaults: dict[str, object], generation_config: str, first: tuple[int, ...] | None
) -> None:
    base = seq2seq_base("bart")
    if first is None:
        found = base.encoder.tokenizer.token_id("<turn>")
        assert found is not None
        first = (found,)
    served = as_served(base, {"defaults": defaults}, generation_config=generation_config)
    [pair] = encode_examples([Example(inputs="the film", output="great")], served, None)
    assert pair.target == (*first, *base.encoder.answer_ids("great", base.eos_id))


def test_inputs_are_cut_where_the_task_cuts_them() -> None:
    base, text = causal_base("llama"), "the film was great and the food was cold"
    served = as_served(base, {"defaults": {"truncate": 4}}, generation_config="auto")
    [pair] = encode_examples([Example(inputs=text, output="great")], served, None)
    assert pair.source == base.encoder.encode(PLAIN, text, 4).ids
    assert len(pair.source) < len(base.encoder.encode(PLAIN, text).ids)


SHOTS = [{"inputs": "cold", "output": "bad"}]
SHOWN = "cold\n- good\n- bad\n:bad\n\n"


@pytest.mark.parametrize(
    ("part", "template"),
    [
        ({}, None),
        ({"template": "{{x}} {x}"}, "{{x}} {x}"),
        ({"template": "{x}\n{options}\n:", "choices": ["good", " bad"]}, "{x}\n- good\n- bad\n:"),
        (
            {"template": "{x}\n{options}\n:", "choices": ["good", "bad"], "few_shot": SHOTS},
            SHOWN + "{x}\n- good\n- bad\n:",
        ),
        ({"few_shot": [{"inputs": "{a}", "output": "b"}]}, "{{a}}b\n\n{inputs}"),
        ({"template": "{x}", "chain": {"template": "Q {x}\n{so_far}"}}, "Q {x}\n"),
        ({"template": "{x}", "chain": {"template": "Of {last}:"}}, "Of {x}:"),
        ({"template": "{x}", "paraphrases": ["{x}?", "{x}!"], "defaults": {"paraphrase": 1}}, "{x}!"),
    ],
)
def test_a_prompt_is_trained_on_what_serving_reads(part: dict[str, Any], template: str | None) -> None:
    trained = completion_part({**part, "notes": "n", "vote": {"n": 3}})
    assert trained == {
        **{name: part[name] for name in ("choices",) if name in part},
        "notes": "n",
        "defaults": {},
        "template": template,
    }


def test_options_are_the_datas_choices() -> None:
    base, said = causal_base("llama"), list[str]()
    examples = [Example(inputs={"text": f"film {number}"}, output="good") for number in range(3)]
    dataset = Dataset(train=examples, dev=[], test=[], choices=("good", "bad"), digest="")
    given = with_choices({"template": "{text}\n{options}\n:\n"}, dataset)
    part = with_template(given, dataset, base, said.append)
    assert part["template"] == given["template"]
    [first, *_] = encode_examples(examples, base, completion_part(part)["template"])
    assert first.source == base.encoder.encode(PLAIN, "film 0\n- good\n- bad\n:\n").ids


def test_examples_of_steps_are_shown_by_their_answers() -> None:
    examples = [{"inputs": "a", "expected": "b; answer: c"}, {"inputs": "a", "expected": "b"}]
    assert shown_answers({}, examples) == examples
    reasoning = {"reasoning": {"answer_after": "answer:"}}
    assert shown_answers(reasoning, examples) == [{"inputs": "a", "expected": "c"}]
    assert shown_answers({"chain": {"template": "{last}"}}, examples) == []
