"""What a run trains for, completed from its data."""

import pytest

from app.cli.training.task_part import as_served, with_limit
from app.text.template import PLAIN
from app.training.encoding import encode_examples
from app.training.examples import Example
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
