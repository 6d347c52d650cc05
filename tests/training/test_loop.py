import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import get_scheduler

from app.errors import Conflict, NonFiniteLogits
from app.prompt import Prompt
from app.training.advice import on_end, on_frozen
from app.training.dev_set import DevSet, DevTask, history_of_task
from app.training.examples import EncodedExample, Example
from app.training.prompted_model import PromptedModel
from app.training.prompts import as_prompt, new_prompt
from app.training.run import DevRecord, History
from app.training.settings import TrainingSettings
from tests.training.bases import causal_base, examples, padded
from tests.training.runs import SETTINGS, Heard, dev_set, timeless, trainer

RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"weight_decay": 0.1},
    "adafactor": {"optimizer": "adafactor"},
    "accumulation": {"accumulation": 3, "warmup_steps": 2},
    "p-tuning": {"method": "p-tuning", "init": "random", "network": "lstm"},
    "prefix": {"method": "prefix"},
    "bfloat16": {"precision": "bfloat16"},
}


def _state(made: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.learned.state_dict().items()}


def _assert_equal_states(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], expected[name]) for name in expected)


def test_a_run_is_what_a_plain_peft_loop_does() -> None:
    """The same batches, schedule, clipping and accumulation."""
    base = causal_base("llama")
    settings = {"steps": 20, "accumulation": 2, "warmup_steps": 3, "max_grad_norm": 0.5, "schedule": "cosine"}
    made = trainer(base, settings, dev=DevSet(encoded=()), answerer=None)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(copy.deepcopy(base.model), config)
    start = as_prompt(made.learned)
    rows = model.get_parameter("prompt_encoder.default.embedding.weight")
    name = next(iter(start.tensors))
    with torch.no_grad():
        rows.copy_(torch.frombuffer(bytearray(start.tensor_bytes(name)), dtype=torch.float32).view_as(rows))
    optimizer = torch.optim.AdamW([rows], lr=0.05, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(1, 21):
        batches = made._batches(step)
        num_targets = sum(len(each.target) for batch in batches for each in batch)
        for batch in batches:
            ids = torch.tensor(padded([[*each.source, *each.target] for each in batch], 1))
            labels = torch.tensor(
                padded([[*[-100] * len(each.source), *each.target] for each in batch], -100)
            )
            mask = torch.tensor(padded([[1] * (len(each.source) + len(each.target)) for each in batch], 0))
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
            (loss * sum(len(each.target) for each in batch) / num_targets).backward()
        torch.nn.utils.clip_grad_norm_([rows], 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    made.run()
    torch.testing.assert_close(made.learned.state_dict()["rows"], rows.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_stops_anywhere_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    more = {} if name == "adamw" else {"answerer": None}
    whole = trainer(settings=RUNS[name], **more)
    expected = timeless(whole.run())
    assert [look.step for look in expected.history.looks] == [0, 4, 8, 12]
    for stop in (1, 4, 7):
        directory = tmp_path / str(stop)
        trainer(settings=RUNS[name], checkpoint_dir=directory, **more).run(until=stop)
        heard = Heard()
        made = trainer(settings=RUNS[name], checkpoint_dir=directory, listener=heard, **more)
        torch.rand(7)  # whatever else drew numbers in this process
        assert timeless(made.run()) == expected, stop
        _assert_equal_states(_state(made), _state(whole))
        assert [record.step for record in heard.starts[0].steps] == list(range(1, stop + 1))
        assert [record.step for record in heard.steps] == list(range(stop + 1, 13))


def test_the_seed_decides() -> None:
    first, second = (timeless(trainer().run()) for _ in range(2))
    assert first == second
    other = trainer(settings={"seed": 1}).run()
    assert other.prompt.digest != first.prompt.digest


def test_a_finished_run_is_looked_up(tmp_path: Path) -> None:
    heard = Heard()
    done = trainer(checkpoint_dir=tmp_path).run()
    assert trainer(checkpoint_dir=tmp_path, listener=heard).run() == done
    assert (heard.starts, heard.steps) == ([done.history], [])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"settings": {"learning_rate": 0.01}}, "learning_rate was 0.05 and is now 0.01"),
        ({"train": examples(causal_base("llama"), 19)}, "training data was"),
        ({"dev": DevSet(encoded=())}, "dev data was"),
        ({"base": replace(causal_base("llama"), name="other")}, r"base was tiny \(tiny\) and is now other"),
        ({"origin": {"start": "mood@3"}}, "start was not given and is now mood@3"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], name: str
) -> None:
    trainer(checkpoint_dir=tmp_path).run(until=2)
    with pytest.raises(Conflict, match=name):
        trainer(checkpoint_dir=tmp_path, **change).run()


class _Faulty:
    """The likelihood, until a step's loss or its gradient is spoilt."""

    def __init__(self, model: PromptedModel, spoil: Callable[[Tensor], Tensor], after: int) -> None:
        self._model = model
        self._spoil = spoil
        self._left = after

    def loss(self, batch: Sequence[EncodedExample]) -> tuple[Tensor, int]:
        loss, count = self._model.loss(batch)
        self._left -= 1
        return (self._spoil(loss) if self._left < 0 else loss), count


def _infinite_gradient(loss: Tensor) -> Tensor:
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "nan": (lambda loss: loss * math.nan, 9, "the loss of step 6"),
    "infinity": (lambda loss: loss + math.inf, 9, "the loss of step 6"),
    "gradient": (_infinite_gradient, 9, "the gradient of step 6"),
    "dev": (lambda loss: loss * math.nan, 6, "the dev loss of step 4"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loss_that_is_not_finite_ends_the_run_with_the_last_good_prompt(fault: str, tmp_path: Path) -> None:
    """A look at six examples takes two batches."""
    spoil, after, what = FAULTS[fault]

    def run(heard: Heard) -> Any:
        made = trainer(checkpoint_dir=tmp_path, listener=heard)
        made._objective = _Faulty(PromptedModel(made.base, made.learned), spoil, after)
        return made.run()

    heard = Heard()
    result = run(heard)
    good = trainer().run(until=4)
    expected = good.history.looks[: len(result.history.looks)]
    assert result.best_step == max(expected, key=lambda look: (look.scores["exact"], -look.loss)).step
    assert timeless(result).history.looks == timeless(good).history.looks[: len(expected)]
    assert len(result.history.advice) == 1
    assert what in result.history.advice[0]
    assert "--learning-rate 0.005" in result.history.advice[0]
    assert heard.advice == list(result.history.advice)
    assert run(Heard()) == result, "it isn't tried again"


def test_a_start_that_is_not_finite_is_refused() -> None:
    made = trainer()
    made._objective = _Faulty(PromptedModel(made.base, made.learned), lambda loss: loss * math.nan, 0)
    with pytest.raises(NonFiniteLogits, match="choose another init"):
        made.run()


def _learnable(count: int, seed: int = 0) -> list[EncodedExample]:
    """One answer to everything."""
    return [
        EncodedExample(each.source, (7, 9, 11, 1)) for each in examples(causal_base("llama"), count, seed)
    ]


def test_a_loss_that_does_not_move_is_said_with_a_higher_rate() -> None:
    base = causal_base("llama")
    data = {"train": _learnable(20), "dev": dev_set(base, _learnable(8, seed=1))}
    frozen = trainer(settings={"steps": 60, "eval_every": 20, "learning_rate": 1e-6}, **data).run()
    assert len(frozen.history.advice) == 1
    assert "has not moved in 20 steps" in frozen.history.advice[0]
    assert "--learning-rate 1e-05" in frozen.history.advice[0]
    moved = trainer(settings={"steps": 60, "eval_every": 20, "learning_rate": 0.1}, **data).run()
    assert not [line for line in moved.history.advice if "not moved" in line]
    assert moved.history.looks[-1].loss < 0.7 * moved.history.looks[0].loss


def test_a_loss_that_rises_is_not_said_to_stand_still() -> None:
    looks = [DevRecord(step=20 * n, loss=2.0 + n, scores={}, is_best=not n, seconds=1) for n in range(3)]
    settings = TrainingSettings(learning_rate=3.0, steps=40)
    assert on_frozen(looks, settings) is None
    assert "lower the learning rate" in (on_end(looks, looks[0], settings) or "")


class _Scripted:
    """Answers so many examples rightly at each look, and keeps what it was given."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = list(counts)
        self.prompts: list[Prompt] = []

    def answers(self, prompt: Prompt | None, given: Sequence[Example]) -> list[str]:
        assert prompt is not None
        count = self._counts[len(self.prompts)]
        self.prompts.append(prompt)
        return [each.output if number < count else "?" for number, each in enumerate(given)]


def test_patience_ends_a_run_and_the_best_prompt_is_kept() -> None:
    scripted = _Scripted([0, 3, 5, 4, 4, 4, 6])
    settings = {"steps": 40, "eval_every": 2, "patience": 3}
    result = trainer(settings=settings, answerer=scripted).run()
    assert [look.scores["exact"] * 6 for look in result.history.looks] == pytest.approx([0, 3, 5, 4, 4, 4])
    assert [look.is_best for look in result.history.looks] == [True, True, True, False, False, False]
    assert (result.best_step, len(result.history.steps)) == (4, 10)
    assert result.prompt == scripted.prompts[2]


def test_where_scores_are_equal_the_loss_decides() -> None:
    base, settings = causal_base("llama"), {"steps": 40, "eval_every": 2, "patience": 2, "learning_rate": 0.1}
    data = {"train": _learnable(20), "dev": dev_set(base, _learnable(8, seed=1))}
    result = trainer(settings=settings, answerer=_Scripted([0] * 30), **data).run()
    best = min(result.history.looks, key=lambda look: look.loss)
    assert result.best_step == best.step > 8, "looks with a score of 0 don't use up the patience"


def test_without_dev_examples_and_answers_a_sample_of_the_training_loss_is_looked_at() -> None:
    made = trainer(dev=DevSet(encoded=()), answerer=None)
    result = made.run()
    assert {look.scores == {} for look in result.history.looks} == {True}
    assert result.best_step == min(result.history.looks, key=lambda look: look.loss).step


def test_tasks_that_learn_together_have_a_prompt_each_and_count_the_same() -> None:
    """However many examples each has."""
    base = causal_base("llama")
    encoded = [
        replace(each, target=(7, 9, 1))
        for each in (*examples(base, 14, task=0), *examples(base, 6, seed=1, task=1))
    ]
    settings = TrainingSettings.model_validate(SETTINGS | {"method": "multitask", "num_eval": 10})
    scripted = _Scripted([0, 6, 5, 6, 10, 2, 10, 0])
    learned = new_prompt(settings, base, num_tasks=2)
    result = trainer(
        base, {"method": "multitask", "num_eval": 10},
        learned=learned, train=encoded, dev=dev_set(base, encoded),
        tasks=[DevTask(scripted, name="one"), DevTask(scripted, name="two")],
    ).run()  # fmt: skip
    third = pytest.approx(1 / 3)
    assert len(result.prompts) == 2
    assert result.prompts[0] != result.prompts[1]
    assert len(scripted.prompts) == 8, "each task's examples are answered with its own prompt"
    assert [look.scores for look in result.history.looks] == [
        {"mean score": mean, "one exact": one, "two exact": two}
        for one, two, mean in [(0, 1, 0.5), (0.5, 1, 0.75), (1, third, pytest.approx(2 / 3)), (1, 0, 0.5)]
    ]
    assert result.best_step == result.history.looks[1].step, "though more examples were right at the next"
    looks = history_of_task("two", result.history).looks
    assert [look.scores["exact"] for look in looks] == [1, 1, third, 0]


def test_a_listener_hears_everything_once_and_in_order() -> None:
    heard = Heard()
    result = trainer(listener=heard).run()
    assert heard.starts == [History()]
    assert (tuple(heard.steps), tuple(heard.looks)) == (result.history.steps, result.history.looks)
    assert tuple(heard.advice) == result.history.advice
    assert [step.step for step in heard.steps] == list(range(1, 13))
    assert sum(step.num_tokens for step in heard.steps[:5]) == sum(
        len(each.source) + len(each.target) for each in examples(causal_base("llama"), 20)
    ), "an epoch is five batches"
