"""Where prompts start from, and which settings go together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from app.errors import InvalidRequest, PromptRejected
from app.models.packed_model import tensor_of
from app.prompt import Prompt
from app.sites import Embedding, Site
from app.store.validation import validate_prompt
from app.text.template import PLAIN
from app.training.base import TrainingBase
from app.training.examples import EncodedExample
from app.training.prompted_model import PromptedModel
from app.training.prompts import as_prompt, new_prompt
from app.training.settings import TrainingSettings
from tests.training.bases import any_base, causal_base, examples, seq2seq_base

TEXT = "the film was great and the food was cold"


def started(base: TrainingBase, choices: tuple[str, ...] = (), **settings: Any) -> Prompt:
    prompt = as_prompt(new_prompt(TrainingSettings(**settings), base, choices=choices))
    validate_prompt(prompt, base.geometry)
    return prompt


def rows(base: TrainingBase, **settings: Any) -> Tensor:
    return tensor_of(started(base, **settings), Embedding.DECODER)


def embeddings(base: TrainingBase) -> Tensor:
    table: Tensor = base.model.get_input_embeddings().weight
    return table


def test_rows_of_a_text_are_its_tokens_repeated() -> None:
    base = causal_base("llama")
    ids = base.tokenizer(TEXT, add_special_tokens=False).input_ids
    found = rows(base, method="prompt", init_text=TEXT, num_virtual_tokens=2 * len(ids) + 1)
    assert torch.equal(found, embeddings(base)[[*ids, *ids, ids[0]]])
    assert torch.equal(rows(base, method="prompt", init_text=TEXT, num_virtual_tokens=3), found[:3])


def test_rows_are_as_the_base_embeds_them() -> None:
    base = causal_base("gemma2")
    ids = base.tokenizer(TEXT, add_special_tokens=False).input_ids[:4]
    expected = base.model.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(rows(base, method="prompt", init_text=TEXT, num_virtual_tokens=4), expected)


def test_rows_of_labels_are_means_of_their_tokens_then_words_of_the_vocabulary() -> None:
    base = causal_base("llama")
    labels = ("positive", "cold")
    found = rows(base, method="prompt", init="labels", choices=labels, num_virtual_tokens=5)
    for row, label in zip(found, labels, strict=False):
        ids = base.tokenizer(label, add_special_tokens=False).input_ids
        torch.testing.assert_close(row, embeddings(base)[ids].mean(0))
    table = {tuple(row.tolist()) for row in embeddings(base)}
    assert all(tuple(row.tolist()) in table for row in found[2:])


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    base = causal_base("llama")
    for method in ("prompt", "prefix", "multitask", "p-tuning"):
        init = "random" if method == "p-tuning" else "vocabulary"
        first, again, other = (
            started(base, method=method, init=init, seed=seed).digest for seed in (1, 1, 2)
        )
        assert first == again != other
        torch.rand(1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3_text", "opt", "gpt_oss"])
def test_a_prefix_of_a_text_is_the_text(architecture: str) -> None:
    """Before a step of training the base goes on as if the text stood there."""
    base = causal_base(architecture)
    ids = (0, *base.tokenizer(TEXT, add_special_tokens=False).input_ids)  # with BOS
    learned = new_prompt(TrainingSettings(method="prefix", init_text=TEXT, num_virtual_tokens=len(ids)), base)
    given = examples(base, 3)
    found = PromptedModel(base, learned).logits(given)
    assert_read_as(base, found, given, ids)


def assert_read_as(
    base: TrainingBase, found: Tensor, given: list[EncodedExample], before: tuple[int, ...]
) -> None:
    expected = []
    with torch.no_grad():
        for each in given:
            row = torch.tensor([[*before, *each.source, *each.target[:-1]]])
            expected.append(base.model(input_ids=row).logits[0, -len(each.target) :])
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoders_prefix_of_a_text_is_what_it_would_have_written(family: str) -> None:
    """Its source is the text too."""
    base = seq2seq_base(family)
    ids = base.tokenizer(TEXT, add_special_tokens=False).input_ids
    settings = TrainingSettings(
        method="prefix", sites=["dec.self"], init_text=TEXT, num_virtual_tokens=len(ids)
    )
    learned = new_prompt(settings, base)
    before = read_for_start(base, learned.position_offset)
    found = PromptedModel(base, learned).logits([EncodedExample(before, (5, 7, 1))])
    row = torch.tensor([[base.decoder_start_id, *before[: len(ids) - 1], base.decoder_start_id, 5, 7]])
    with torch.no_grad():
        expected = base.model(input_ids=torch.tensor([before]), decoder_input_ids=row).logits[0, -3:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def read_for_start(base: TrainingBase, number: int) -> tuple[int, ...]:
    """What the encoder reads for a prefix of `TEXT`: as many tokens as the prefix has."""
    before = base.encoder.tokenizer.leading_ids(PLAIN)
    return (*before, *base.encoder.tokenizer.plain_ids(TEXT))[:number]


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
@pytest.mark.parametrize("method", ["prompt", "prefix", "cartridge"])
def test_a_prompt_starts_from_another_tasks(name: str, method: str) -> None:
    base = any_base(name)
    other = started(base, method=method, init="random", num_virtual_tokens=6)
    again = new_prompt(TrainingSettings(method=method, init="task"), base, start=other)
    assert as_prompt(again).digest == other.digest
    fewer = TrainingSettings(method=method, init="task", num_virtual_tokens=4)
    assert as_prompt(new_prompt(fewer, base, start=other)).num_virtual_tokens == 4


def test_a_start_keeps_its_offset_and_its_sites() -> None:
    base = seq2seq_base("bart")
    learned = new_prompt(TrainingSettings(method="prefix", sites=["dec.self"]), base)
    learned.position_offset = 0  # as converters of other formats have it
    other = as_prompt(learned)
    again = as_prompt(new_prompt(TrainingSettings(method="prefix", init="task"), base, start=other))
    assert again.digest == other.digest
    elsewhere = TrainingSettings(method="prefix", init="task", sites=["enc.self"])
    with pytest.raises(InvalidRequest, match=r"is at dec\.self, not at enc\.self"):
        new_prompt(elsewhere, base, start=other)


def test_tasks_that_learn_together_start_near_the_shared_rows() -> None:
    base = causal_base("llama")
    learned = new_prompt(TrainingSettings(method="multitask", init_text=TEXT), base, num_tasks=3)
    shared = rows(base, method="prompt", init_text=TEXT)
    prompts = [as_prompt(learned, task) for task in range(3)]
    assert len({each.digest for each in prompts}) == 3
    for each in prompts:
        assert (tensor_of(each, Embedding.DECODER) - shared).norm() < 0.1 * shared.norm()


def test_zero_and_random_prefixes() -> None:
    base = seq2seq_base("bart")
    zero = started(base, method="prefix", init="zero", num_virtual_tokens=3)
    real = started(base, method="prefix", init="vocabulary", num_virtual_tokens=64)
    drawn = started(base, method="prefix", init="random", num_virtual_tokens=64)
    assert zero.tensors.keys() == real.tensors.keys() == drawn.tensors.keys()
    for name in zero.tensors:
        assert not tensor_of(zero, name).any()
        spread = tensor_of(drawn, name).square().mean() / tensor_of(real, name).square().mean()
        assert 0.8 < spread < 1.25
    written = started(base, method="prefix", network="mlp", init="zero", num_virtual_tokens=3)
    assert written.digest == zero.digest


def test_sites_of_a_prefix_follow_the_base() -> None:
    everywhere = started(seq2seq_base("bart"), method="prefix")
    assert all(everywhere.length(site) == 16 for site in Site)
    assert everywhere.position_offset == 0
    biased = started(seq2seq_base("t5"), method="prefix")
    assert [biased.length(site) for site in Site] == [0, 16, 16]
    assert biased.position_offset == 16
    assert started(seq2seq_base("bart"), method="prefix", sites=["dec.self"]).position_offset == 16
    assert started(seq2seq_base("t5"), method="prefix", sites=["dec.cross"]).position_offset == 0


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"method": "prompt", "init": "labels"}, "init"),
    ("llama", {"method": "prompt", "init": "task"}, "init"),
    ("llama", {"method": "prompt", "network": "mlp"}, "network"),
    ("llama", {"method": "prefix", "network": "lstm"}, "network"),
    ("llama", {"method": "prefix", "network": "mlp", "init": "text"}, "init"),
    ("llama", {"method": "prefix", "network": "mlp", "frozen_tokens": 1}, "frozen_tokens"),
    ("llama", {"method": "prefix", "frozen_tokens": 17}, "frozen_tokens"),
    ("llama", {"method": "prompt", "frozen_tokens": 1}, "frozen_tokens"),
    ("bart", {"method": "p-tuning", "sites": ["dec.cross"]}, "sites"),
    ("llama", {"method": "p-tuning", "init": "text"}, "init"),
    ("llama", {"method": "p-tuning", "network": "none"}, "network"),
    ("llama", {"method": "prefix", "sites": ["dec.cross"]}, "sites"),
    ("t5", {"method": "prefix", "sites": ["enc.self"]}, "sites"),
    ("llama", {"method": "prompt", "init_text": "", "init": "text"}, "init_text"),
    ("llama", {"method": "prefix", "num_virtual_tokens": 319}, "num_virtual_tokens"),
    ("bart", {"method": "prompt", "num_virtual_tokens": 191}, "num_virtual_tokens"),
]


@pytest.mark.parametrize(("name", "settings", "param"), REFUSED)
def test_settings_that_do_not_go_together_are_refused(
    name: str, settings: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        new_prompt(TrainingSettings(**settings), any_base(name))
    assert refusal.value.param == param


def test_prompts_that_cannot_be_a_start_are_refused() -> None:
    base = causal_base("llama")
    soft = started(base, method="prompt")
    with pytest.raises(InvalidRequest, match="kind soft"):
        new_prompt(TrainingSettings(method="prefix", init="task"), base, start=soft)
    longer = TrainingSettings(method="prompt", init="task", num_virtual_tokens=17)
    with pytest.raises(InvalidRequest, match="has 16 virtual tokens"):
        new_prompt(longer, base, start=soft)
    with pytest.raises(PromptRejected):
        new_prompt(TrainingSettings(method="prompt", init="task"), seq2seq_base("t5"), start=soft)
    with pytest.raises(InvalidRequest, match="belong together"):
        new_prompt(TrainingSettings(method="prompt"), base, start=soft)
    with pytest.raises(InvalidRequest, match="multitask"):
        new_prompt(TrainingSettings(method="prompt"), base, num_tasks=2)


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix", "multitask", "cartridge"])
@pytest.mark.parametrize("network", [None, "mlp"])
def test_defaults_of_every_method_are_whole_and_stay(method: str, network: Any) -> None:
    settings = TrainingSettings(method=method, network=network).resolved(is_encoder_decoder=False)
    unset = {name for name, value in settings if value is None}
    assert unset <= {"init_text", "sites", "frozen_tokens", "max_new_tokens"}
    assert settings.resolved(is_encoder_decoder=False) == settings
    own = TrainingSettings(method=method, learning_rate=0.5, steps=7, eval_every=2)
    assert own.resolved(is_encoder_decoder=True).learning_rate == 0.5
