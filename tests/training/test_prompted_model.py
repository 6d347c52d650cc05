"""What is trained is what is served: token log-probabilities of training equal those of our engine.

Every method, on a spread of architectures, goes from `new_prompt` through its canonical file into a running
engine, which generates. Training then reads the same text, and the tokens that the engine chose.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.models.backbones import backbone_of
from app.models.geometry import model_geometry
from app.serving.generation_request import GenerationRequest, GenerationResult
from app.text.template import PLAIN
from app.training import prompted_model
from app.training.base import TrainingBase
from app.training.examples import EncodedExample
from app.training.prompted_model import PromptedModel
from app.training.prompts import LearnedPrompt, as_prompt, new_prompt
from app.training.settings import TrainingSettings
from tests.seq2seq import BART_LIKE, packed_copy
from tests.serving.stack import Stack, run, stack_of, upload_of
from tests.tiny_models import packed_backbone
from tests.training.bases import CAUSAL, any_base, causal_base, examples, seq2seq_base

TOLERANCE = 1e-4
NEW_TOKENS = 10
TEXTS = ["food", "the film was great and the food was cold, name: Blue Door, area: riverside 1 2 3 4 55 617"]
METHODS: dict[str, dict[str, Any]] = {
    "prompt": {"method": "prompt"},
    "p-tuning": {"method": "p-tuning"},
    "p-tuning-lstm": {"method": "p-tuning", "network": "lstm"},
    "prefix": {"method": "prefix"},
    "prefix-mlp": {"method": "prefix", "network": "mlp"},
    "multitask": {"method": "multitask"},
    "cartridge": {"method": "cartridge"},
}
SITES = {
    "decoder-only": {"method": "prefix", "sites": ["dec.self"]},
    "cross-only": {"method": "prefix", "sites": ["dec.cross"]},
}
IN_ENCODER = {"in-encoder": {"method": "prefix", "sites": ["enc.self", "dec.cross"]}}


def learned_by(base: TrainingBase, settings: dict[str, Any], tokens: int = 5) -> LearnedPrompt:
    """A prompt that is far from its start."""
    given = TrainingSettings(num_virtual_tokens=tokens, hidden_size=12, **settings)
    learned = new_prompt(given, base, num_tasks=2 if settings["method"] == "multitask" else 1)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in learned.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    return learned


@contextmanager
def served(base: TrainingBase, root: Path) -> Iterator[Stack]:
    """The same weights behind the engine."""
    if base.is_encoder_decoder:
        packed = packed_copy(base.model)
        backbone: Any = backbone_of(packed, model_geometry(packed, "tiny"))
    else:
        backbone = packed_backbone(base.model)
    start = base.decoder_start_id
    with stack_of(base.model, backbone, base.tokenizer, root, decoder_start_id=start) as stack:
        yield stack


def publish(stack: Stack, task: str, learned: LearnedPrompt, number: int = 0) -> None:
    data = as_prompt(learned, number).data
    run(stack.publishing.upload(task, upload_of(bytes(data), task={})))


def answer(stack: Stack, task: str, text: str) -> GenerationResult:
    request = GenerationRequest(task=task, inputs=text, parameters={"max_new_tokens": NEW_TOKENS})
    return run(stack.generation.generate(request))


def logprobs(base: TrainingBase, learned: LearnedPrompt, given: Sequence[EncodedExample]) -> Tensor:
    with torch.no_grad():
        logits = PromptedModel(base, learned).logits(given)
    targets = torch.tensor([id_ for each in given for id_ in each.target])
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def as_served(base: TrainingBase, found: GenerationResult, text: str, task: int = 0) -> EncodedExample:
    return EncodedExample(
        base.encoder.encode(PLAIN, text).ids, tuple(token.id for token in found.tokens), task
    )


def rules(base: TrainingBase, given: EncodedExample) -> Tensor:
    """Where a rule of the base's generation config, not the model, chose the token."""
    settings = base.model.generation_config
    forced = [False] * len(given.target)
    forced[0] = base.forced_bos_id is not None
    forced[-1] = settings.forced_eos_token_id is not None and len(forced) == NEW_TOKENS
    return torch.tensor(forced)


ALIKE = ("qwen2", "gpt_neox", "mixtral", "t5", "umt5", "marian")  # to one that is tried in every run
CASES = [
    *((architecture, METHODS) for architecture in CAUSAL),
    # Not mT5: the tiny one is so sensitive that float32 itself is 2e-4 off.
    *((family, METHODS | SITES) for family in ("t5", "t5_gated", "umt5")),
    *((family, METHODS | SITES | IN_ENCODER) for family in BART_LIKE),
]


@pytest.mark.parametrize(
    ("name", "methods"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.soak] if case[0] in ALIKE else []) for case in CASES],
)
def test_training_reads_what_serving_serves(name: str, methods: Any, tmp_path: Path) -> None:
    base = any_base(name)
    with served(base, tmp_path) as stack:
        for method, settings in methods.items():
            learned = learned_by(base, settings)
            last = learned.num_tasks - 1
            publish(stack, method, learned, last)
            found = [answer(stack, method, text) for text in TEXTS]
            given = [as_served(base, each, text, last) for each, text in zip(found, TEXTS, strict=True)]
            expected = torch.tensor([token.logprob for each in found for token in each.tokens])
            chosen = ~torch.cat([rules(base, each) for each in given])
            error = (logprobs(base, learned, given) - expected)[chosen].abs().max()
            assert error < TOLERANCE, f"{method}: {error}"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "t5"])
def test_a_wrong_offset_is_seen(name: str) -> None:
    base = any_base(name)
    learned = learned_by(base, {"method": "prefix", "sites": ["dec.self"]})
    given = examples(base, 3)
    right = logprobs(base, learned, given)
    learned.position_offset = 0
    assert (logprobs(base, learned, given) - right).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "gpt_oss", "t5", "bart", "pegasus"])
@pytest.mark.parametrize("method", ["prefix", "multitask"])
def test_a_batch_computes_what_each_example_gives_alone(name: str, method: str) -> None:
    base = any_base(name)
    learned = learned_by(base, METHODS[method])
    given = [replace(each, task=n % learned.num_tasks) for n, each in enumerate(examples(base, 5))]
    alone = torch.cat([logprobs(base, learned, [each]) for each in given])
    torch.testing.assert_close(logprobs(base, learned, given), alone, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_base_without_keys_and_values_of_heads_reads_a_prompt_with_each_example(name: str) -> None:
    base = any_base(name)
    learned = learned_by(base, METHODS["multitask"])
    given = [replace(each, task=n % 2) for n, each in enumerate(examples(base, 5))]
    without = replace(base, geometry=replace(base.geometry, takes_prefixes=False))
    found = logprobs(without, learned, given)
    torch.testing.assert_close(found, logprobs(base, learned, given), rtol=0, atol=2e-5)


def test_padding_that_is_attended_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = seq2seq_base("bart")
    learned = learned_by(base, METHODS["prefix"])
    given = examples(base, 5)
    right = logprobs(base, learned, given)
    forward = base.model.forward

    def attending(**inputs: Any) -> Any:
        return forward(**inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])})

    monkeypatch.setattr(base.model, "forward", attending)
    assert (logprobs(base, learned, given) - right).abs().max() > 100 * TOLERANCE


def test_labels_that_are_a_token_late_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = causal_base("llama")
    learned = learned_by(base, METHODS["prefix"])
    given = examples(base, 5)
    right = logprobs(base, learned, given)
    head_at = prompted_model._head_at
    monkeypatch.setattr(
        prompted_model,
        "_head_at",
        lambda model, firsts, counts: head_at(model, [first - 1 for first in firsts], counts),
    )
    assert (logprobs(base, learned, given) - right).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", ["bart", "mbart", "t5", "llama"])
def test_gradients_equal_finite_differences(name: str) -> None:
    """In float64, with padding in sources and targets."""
    base = in_float64(any_base(name))
    learned = learned_by(base, METHODS["prefix"], tokens=3).double()
    assert len({name.split(".")[1] for name in learned.tensors()}) == (1 if name == "llama" else 2)
    given, model = examples(base, 3), PromptedModel(base, learned)
    names = [name for name, _ in learned.named_parameters()]

    def loss(*values: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(learned, dict(zip(names, values, strict=True))):
            return model.loss(given)[0]

    parameters = [each.detach().clone().requires_grad_() for each in learned.parameters()]
    assert torch.autograd.gradcheck(loss, parameters, fast_mode=True, raise_exception=False)
    assert all(each.abs().max() > 1e-3 for each in torch.autograd.grad(loss(*parameters), parameters))


def in_float64(base: TrainingBase) -> TrainingBase:
    """What computes in float32 whatever it gets is replaced: norms, and the softmax of eager attention."""
    model = copy.deepcopy(base.model).double()
    if not base.is_encoder_decoder:
        model.set_attn_implementation("sdpa")
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(rms_norm, module)  # type: ignore[method-assign]
    return replace(base, model=model)


def rms_norm(module: Any, rows: Tensor) -> Tensor:
    scaled: Tensor = (
        module.weight * rows * (rows.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
    )
    return scaled


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5", "bart"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_every_method_learns_in_bfloat16(name: str, method: str, how: str) -> None:
    base = any_base(name)
    learned = learned_by(base, METHODS[method])
    given = examples(base, 4)
    exact = PromptedModel(base, learned).loss(given)[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        rounded = PromptedModel(base if how == "autocast" else in_bfloat16(base), learned).loss(given)[0]
    rounded.backward()
    assert rounded.dtype == torch.float32
    assert abs(rounded - exact) < 0.05 * exact
    assert all(each.grad is not None and each.grad.isfinite().all() for each in learned.parameters())


def in_bfloat16(base: TrainingBase) -> TrainingBase:
    return replace(base, model=copy.deepcopy(base.model).bfloat16())


def test_gradients_reach_the_prompt_alone_and_the_head_runs_at_labels_alone() -> None:
    base = causal_base("llama")
    learned = learned_by(base, METHODS["prefix"])
    given = examples(base, 4)
    rows: list[int] = []
    head = base.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[:-1].numel()))
    loss, count = PromptedModel(base, learned).loss(given)
    hook.remove()
    loss.backward()
    assert rows == [count] == [sum(len(each.target) for each in given)]
    assert all(each.grad is None for each in base.model.parameters())
    assert not head._forward_pre_hooks, "nothing stays at the base"
