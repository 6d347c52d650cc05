"""Trained tensors equal those of a plain PEFT loop: same start, same data, same settings, float32."""

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    CartridgeConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

from app.models.packed_model import tensor_of
from app.prompt import Prompt
from app.store.importers import import_prompt
from app.store.source_files import CONFIG, PROMPT
from app.training.base import TrainingBase
from app.training.examples import EncodedExample
from app.training.prompted_model import PromptedModel
from app.training.prompts import LearnedPrompt, as_prompt, new_prompt
from app.training.settings import TrainingSettings
from tests import oracle
from tests.seq2seq import peft_configs
from tests.training.bases import causal_base, examples, padded, seq2seq_base

STEPS, BATCH, P, HIDDEN = 20, 4, 5, 16
TOLERANCE = 1e-5
_CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
# A method's settings, PEFT's, and PEFT's names of parameters (the beginnings) by ours.
METHODS: dict[str, tuple[dict[str, Any], Callable[[], PeftConfig], dict[str, str]]] = {
    "prompt": ({"method": "prompt"}, lambda: PromptTuningConfig(**_CAUSAL), {"rows": "embedding.weight"}),
    "p-tuning": (
        {"method": "p-tuning"},
        lambda: PromptEncoderConfig(encoder_hidden_size=HIDDEN, **_CAUSAL),
        {"rows": "embedding.weight", "network.": "mlp_head."},
    ),
    "p-tuning-lstm": (
        {"method": "p-tuning", "network": "lstm"},
        lambda: PromptEncoderConfig(
            encoder_hidden_size=HIDDEN, encoder_reparameterization_type="LSTM", **_CAUSAL
        ),
        {"rows": "embedding.weight", "network.lstm.": "lstm_head.", "network.head.": "mlp_head."},
    ),
    "prefix": (
        {"method": "prefix"},
        lambda: PrefixTuningConfig(**_CAUSAL),
        {"learned_decoder_self": "embedding.weight"},
    ),
    "prefix-mlp": (
        {"method": "prefix", "network": "mlp"},
        lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=HIDDEN, **_CAUSAL),
        {"_inputs.DECODER_SELF": "embedding.weight", "_networks.DECODER_SELF.": "transform."},
    ),
    "multitask": (
        {"method": "multitask"},
        lambda: MultitaskPromptTuningConfig(num_tasks=2, **_CAUSAL),
        {"shared": "embedding.weight", "columns": "prefix_task_cols", "rows": "prefix_task_rows"},
    ),
    "cartridge": (
        {"method": "cartridge", "frozen_tokens": 2},
        lambda: CartridgeConfig(num_frozen_tokens=2, **_CAUSAL),
        {"learned_decoder_self": "trainable_embedding", "frozen_decoder_self": "frozen_embedding"},
    ),
}


def batches(base: TrainingBase, num_tasks: int) -> list[list[EncodedExample]]:
    return [
        [
            example
            for task in range(num_tasks)
            for example in examples(base, BATCH // num_tasks, seed=10 * step + task, task=task)
        ]
        for step in range(STEPS)
    ]


def train(parameters: Iterable[Tensor], losses: Callable[[list[EncodedExample]], Tensor], data: Any) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=0.01)
    for batch in data:
        optimizer.zero_grad()
        losses(batch).backward()
        optimizer.step()


def peft_loss(model: Any, batch: list[EncodedExample]) -> Tensor:
    """The mean over labels, as the usual loop with a padded batch has it."""
    ids = padded([[*each.source, *each.target] for each in batch], 0)
    mask = padded([[1] * len(each.source + each.target) for each in batch], 0)
    labels = padded([[*[-100] * len(each.source), *each.target] for each in batch], -100)
    loss: Tensor = model(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        labels=torch.tensor(labels),
        task_ids=torch.tensor([each.task for each in batch]),
    ).loss
    return loss


def our_loss(model: PromptedModel, batch: list[EncodedExample]) -> Tensor:
    loss, count = model.loss(batch)
    return loss / count


def copied(learned: LearnedPrompt, encoder: Any, names: dict[str, str]) -> dict[str, str]:
    """Start where PEFT's encoder does; return PEFT's name of each of our tensors."""
    found = {}
    for name in learned.state_dict():
        ours, theirs = next((o, t) for o, t in names.items() if name.startswith(o))
        found[name] = theirs + name.removeprefix(ours)
    state = encoder.state_dict()
    learned.load_state_dict({name: state[other] for name, other in found.items()})
    return found


@pytest.mark.parametrize(
    ("architecture", "method"),
    [*(("llama", each) for each in METHODS), ("gpt2", "prefix"), ("gemma2", "prefix")],
)
def test_training_equals_pefts(method: str, architecture: str, tmp_path: Path) -> None:
    settings, config, names = METHODS[method]
    base, num_tasks = causal_base(architecture), 2 if method == "multitask" else 1
    learned = new_prompt(
        TrainingSettings(num_virtual_tokens=P, hidden_size=HIDDEN, **settings), base, num_tasks=num_tasks
    )
    torch.manual_seed(3)
    tuned = get_peft_model(copy.deepcopy(base.model), config()).eval()
    encoder = tuned.prompt_encoder["default"]
    pairs = copied(learned, encoder, names)
    before = copy.deepcopy(learned.state_dict())
    data = batches(base, num_tasks)
    train(learned.parameters(), lambda batch: our_loss(PromptedModel(base, learned), batch), data)
    train(
        [each for each in tuned.parameters() if each.requires_grad],
        lambda batch: peft_loss(tuned, batch),
        data,
    )
    after = encoder.state_dict()
    for name, other in pairs.items():
        torch.testing.assert_close(learned.state_dict()[name], after[other], rtol=0, atol=TOLERANCE)
        is_frozen = name.startswith("frozen")
        assert torch.equal(before[name], after[other]) == is_frozen, f"{name} is trained"
    if num_tasks == 1:
        theirs = oracle.as_prompt(tuned, tmp_path)
        ours = as_prompt(learned)
        assert (ours.kind, ours.position_offset) == (theirs.kind, theirs.position_offset)
        for name in theirs.tensors:
            torch.testing.assert_close(tensor_of(ours, name), tensor_of(theirs, name), rtol=0, atol=TOLERANCE)


def seq2seq_loss(model: Any, batch: list[EncodedExample], start: int) -> Tensor:
    sources = padded([each.source for each in batch], 0)
    labels = padded([each.target for each in batch], -100)
    decoder_ids = padded([[start, *each.target[:-1]] for each in batch], 0)  # some models shift otherwise
    loss: Tensor = model(
        input_ids=torch.tensor(sources),
        attention_mask=torch.tensor(padded([[1] * len(each.source) for each in batch], 0)),
        decoder_input_ids=torch.tensor(decoder_ids),
        labels=torch.tensor(labels),
    ).loss
    return loss


@pytest.mark.parametrize("family", ["t5", "t5_gated", "bart", "mbart"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_training_an_encoder_decoder_equals_pefts(method: str, family: str, tmp_path: Path) -> None:
    """PEFT's prefixes of encoder-decoders are in decoder self-attention; its positions count them."""
    base = seq2seq_base(family)
    tuned = oracle.tuned(
        copy.deepcopy(base.model), peft_configs(base.model)["soft" if method == "prompt" else method], seed=3
    )
    before = imported(base, tuned, tmp_path / "before")
    settings = {"method": method, "init": "task", "sites": ["dec.self"] if method == "prefix" else None}
    learned = new_prompt(TrainingSettings(**settings), base, start=before)
    assert as_prompt(learned).digest == before.digest
    data = batches(base, 1)
    train(learned.parameters(), lambda batch: our_loss(PromptedModel(base, learned), batch), data)
    train(
        [each for each in tuned.parameters() if each.requires_grad],
        lambda batch: seq2seq_loss(tuned, batch, base.decoder_start_id or 0),
        data,
    )
    theirs, ours = imported(base, tuned, tmp_path / "after"), as_prompt(learned)
    assert (ours.kind, ours.position_offset) == (theirs.kind, theirs.position_offset)
    for name in theirs.tensors:
        assert not torch.equal(tensor_of(before, name), tensor_of(theirs, name))
        torch.testing.assert_close(tensor_of(ours, name), tensor_of(theirs, name), rtol=0, atol=TOLERANCE)


def imported(base: TrainingBase, tuned: Any, directory: Path) -> Prompt:
    weights, config = oracle.saved(tuned, directory)
    return import_prompt({PROMPT: weights, CONFIG: config}, base=base.geometry).prompt
