"""Uploads to encoder-decoders over HTTP: refused without a trace, or served exactly."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from app.cli.converters import convert_prompt
from app.errors import PromptRejected
from app.prompt import Prompt, PromptKind, TaskType
from app.sites import Embedding, Site
from app.store.prompt_file import make_prompt
from app.store.safetensors_file import RawTensor
from tests.api.test_seq2seq import ask, server_of
from tests.bart_oracle import HandmadeBart
from tests.cli.test_convert import LAYERS, PrefixTuning, config, saved
from tests.oracle import saved as saved_adapter
from tests.oracle import tuned
from tests.seq2seq import POSITIONS, greedy_seq2seq, peft_configs, source_tokenizer, tiny_seq2seq
from tests.serving.stack import Stack, run, running_stack, upload_of
from tests.store.builders import peft_files, raw, tree

WIDTH, HEADS, HEAD_DIM = 32, 4, 8
Served = tuple[Stack, httpx.Client]
Files = dict[str, bytes]


def prefix(
    *sites: Site, layers: int = LAYERS, p: int = 3, offset: int = 0, bad: float | None = None
) -> Files:
    tensors = {
        site.tensor(layer, side): raw((HEADS, p, HEAD_DIM), seed=layer + len(side))
        for site in sites
        for layer in range(layers)
        for side in "kv"
    }
    if bad is not None:
        values = np.full((HEADS, p, HEAD_DIM), bad, dtype="<f4")
        tensors[max(tensors)] = RawTensor("F32", values.shape, values.tobytes())
    return canonical(PromptKind.PREFIX, tensors, offset)


def soft(place: Embedding, p: int, width: int = WIDTH, task_type: TaskType = TaskType.SEQ_2_SEQ_LM) -> Files:
    return canonical(PromptKind.SOFT, {place: raw((p, width))}, None, task_type)


def canonical(
    kind: PromptKind,
    tensors: dict[str, RawTensor],
    offset: int | None,
    task_type: TaskType = TaskType.SEQ_2_SEQ_LM,
) -> Files:
    return {"prompt": make_prompt(kind, tensors, task_type=task_type, position_offset=offset).data}


def adapter(shape: tuple[int, ...] = (6, WIDTH), **changes: Any) -> Files:
    """Of PEFT's layout, made by hand."""
    fields = {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2, "token_dim": WIDTH}
    weights, settings = peft_files(np.ones(shape, dtype="<f4"), **(fields | changes))
    return {"prompt": weights, "config": settings}


def peft_prefix(num_layers: int, **changes: Any) -> Files:
    shape = (3, 2 * num_layers * WIDTH)
    return adapter(
        shape, peft_type="PREFIX_TUNING", num_layers=num_layers, num_attention_heads=HEADS, **changes
    )


def post(client: httpx.Client, files: Files, task: str = "refused") -> httpx.Response:
    return client.post(f"/tasks/{task}/versions", files={name: (name, data) for name, data in files.items()})


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tiny_seq2seq("bart", encoder_layers=LAYERS, decoder_layers=LAYERS)
    with server_of("bart", tmp_path_factory.mktemp("bart"), base, token_budget=256) as served:
        yield served


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """An encoder of one layer, a decoder of two."""
    base = tiny_seq2seq("bart", encoder_layers=1, decoder_layers=2)
    with server_of("bart", tmp_path_factory.mktemp("short"), base) as served:
        yield served


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    base = tiny_seq2seq("t5", num_layers=LAYERS, num_decoder_layers=LAYERS)
    with server_of("t5", tmp_path_factory.mktemp("t5"), base) as served:
        yield served


SELF, CROSS, ENCODER = Site.DECODER_SELF, Site.DECODER_CROSS, Site.ENCODER_SELF
NOT_ON_BART: dict[str, tuple[Files, list[str]]] = {
    "causal adapter": (
        adapter((3, WIDTH), task_type="CAUSAL_LM", num_transformer_submodules=1),
        ["the base model has an encoder", "expected: task_type SEQ_2_SEQ_LM; found: CAUSAL_LM"],
    ),
    "causal file": (
        soft(Embedding.DECODER, 3, task_type=TaskType.CAUSAL_LM),
        ["the base model has an encoder"],
    ),
    "multitask": (adapter(peft_type="MULTITASK_PROMPT_TUNING"), ["its forward and generate disagree"]),
    "modules_to_save": (adapter(modules_to_save=["lm_head"]), ["its forward and generate disagree"]),
    "one submodule": (peft_prefix(LAYERS, num_transformer_submodules=1), ["cross-attention too"]),
    "other encoder": (peft_prefix(4), ["num_layers is wrong", "2, the layers of the base model's encoder"]),
    "rows": (adapter((5, WIDTH)), ["[2 * num_virtual_tokens, token_dim] = [6, 32]", "found: [5, 32]"]),
    "width": (soft(Embedding.ENCODER, 3, 16), ["tensor: enc.embeds", "[p, 32]", "[3, 16]"]),
    "encoder layers": (
        prefix(ENCODER, layers=3),
        ["encoder self-attention", "tensor: enc.self.2.k", "layers 0 to 1"],
    ),
    "cross layers": (
        prefix(SELF, CROSS, layers=1),
        ["tensor: dec.", ".1.k", "layers 0 to 1; found: 1 layers"],
    ),
    "cross shape": (
        canonical(
            PromptKind.PREFIX,
            {CROSS.tensor(layer, side): raw((2, 3, 8)) for layer in (0, 1) for side in "kv"},
            0,
        ),
        ["decoder cross-attention in layer 0", "tensor: dec.cross.0.k", "[4, 3, 8]", "[2, 3, 8]"],
    ),
    "NaN": (prefix(ENCODER, SELF, CROSS, bad=np.nan), ["tensor: enc.self.1.v", "nan at [0, 0, 0]"]),
    "no room in the encoder": (soft(Embedding.ENCODER, POSITIONS - 1), ["no room for a source"]),
    "no room in the decoder": (soft(Embedding.DECODER, POSITIONS - 1), ["no room for a request"]),
    "a pickle": ({"prompt": b"\x80\x02}q." + bytes(80)}, ["pickle", "promptplex convert"]),
    "an array": ({"prompt": b"\x93NUMPY\x01\x00" + bytes(80)}, ["NumPy", "promptplex convert"]),
}


@pytest.mark.parametrize("name", NOT_ON_BART)
def test_bart_refuses_and_keeps_nothing(bart: Served, name: str) -> None:
    check_refusal(bart, *NOT_ON_BART[name])


def check_refusal(served: Served, files: Files, reasons: list[str]) -> None:
    stack, client = served
    before = stack.files()
    answer = post(client, files)
    assert answer.status_code in (415, 422), answer.text
    message = answer.json()["error"]["message"]
    for reason in reasons:
        assert reason in message
    assert stack.files() == before
    assert client.get("/tasks/refused").status_code == 404


NO_BIAS = ["has no defined relative bias"]
NOT_ON_T5: dict[str, tuple[Files, list[str]]] = {
    "encoder self": (prefix(ENCODER), [*NO_BIAS, "encoder self-attention", "tensor: enc.self.0.k"]),
    "three sites": (prefix(ENCODER, SELF, CROSS), [*NO_BIAS, "tensor: enc.self.0.k"]),
    "offset 0": (prefix(SELF), [*NO_BIAS, "tensor: dec.self.0.k", "position_offset.dec 3"]),
}


@pytest.mark.parametrize("name", NOT_ON_T5)
def test_t5_refuses_keys_at_no_position(t5: Served, name: str) -> None:
    check_refusal(t5, *NOT_ON_T5[name])


def test_t5_takes_keys_at_positions_and_in_cross_attention(t5: Served) -> None:
    answer = post(t5[1], prefix(SELF, CROSS, offset=3), "both")
    assert answer.status_code == 201, answer.text
    assert answer.json()["virtual_tokens"] == 3


def test_an_encoder_shorter_than_the_decoder(short: Served) -> None:
    check_refusal(short, peft_prefix(1), ["encoder has 1 layers and its decoder 2", "num_layers=2"])


def test_a_decoder_alone_refuses_an_encoder_decoders_prompts(tmp_path: Path) -> None:
    """Also where names and shapes fit."""
    with running_stack(tmp_path) as stack:
        width = stack.engine.geometry.hidden_size
        for files in (
            adapter((6, width), token_dim=width),
            soft(Embedding.DECODER, 3, width),
            prefix(SELF, offset=3),
        ):
            before = stack.files()
            with pytest.raises(PromptRejected, match=r"the base model is a decoder alone"):
                run(stack.publishing.upload("refused", upload_of(**files)))
            assert stack.files() == before == tree(tmp_path)


TEXTS = ["what a film, the food was cold", "Blue Door", "the " * 30]
NUM_TOKENS = 12


def check_against(served: Served, prompt: Prompt, oracle: HandmadeBart) -> None:
    """Push a prompt, and compare tokens and log-probabilities with BART by hand, without a cache."""
    stack, client = served
    answer = post(client, {"prompt": prompt.data}, task := f"t-{prompt.digest[:8]}")
    assert answer.status_code == 201, answer.text
    rules = stack.base.generation_config
    for text in TEXTS:
        source = source_tokenizer("bart")(text)["input_ids"]
        found = ask(client, task, text)["details"]["tokens"]
        ids = [token["id"] for token in found]
        logprobs = oracle.logits(source, [rules.decoder_start_token_id, *ids[:-1]]).log_softmax(-1)
        assert [token["logprob"] for token in found] == pytest.approx(
            logprobs[range(len(ids)), ids].tolist(), abs=1e-4
        )
        free = slice(1, NUM_TOKENS - 1)  # the first and the last are forced
        assert ids[free] == logprobs.argmax(-1).tolist()[free]


@pytest.fixture
def paper(tmp_path: Path) -> tuple[Prompt, PrefixTuning]:
    torch.manual_seed(3)
    made = PrefixTuning()
    return convert_prompt(saved(tmp_path / "xsum", made.state_dict(), config())), made


def test_the_papers_three_site_prefix_is_served_exactly(
    bart: Served, paper: tuple[Prompt, PrefixTuning]
) -> None:
    prompt, made = paper
    check_against(bart, prompt, HandmadeBart(bart[0].base, made.prefix()))


def test_positions_are_unshifted_beside_the_papers_prefix_and_shifted_beside_pefts(
    bart: Served, paper: tuple[Prompt, PrefixTuning]
) -> None:
    """The same keys and values in decoder self-attention, once at offset 0 and once at p."""
    _, made = paper
    own = {place: sides for place, sides in made.prefix().items() if place[0] is SELF}
    tensors = {
        SELF.tensor(layer, side): RawTensor("F32", tuple(each.shape), each.contiguous().numpy().tobytes())
        for (_, layer), sides in own.items()
        for side, each in zip("kv", sides, strict=True)
    }
    source, ids = source_tokenizer("bart")(TEXTS[0])["input_ids"], [1, 5, 9]
    at_0, at_p = (HandmadeBart(bart[0].base, own, offset) for offset in (0, 3))
    assert (at_0.logits(source, ids) - at_p.logits(source, ids)).abs().max() > 0.1
    for oracle in (at_0, at_p):
        prompt = make_prompt(
            PromptKind.PREFIX, tensors, task_type=TaskType.SEQ_2_SEQ_LM, position_offset=oracle.offset
        )
        check_against(bart, prompt, oracle)


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_pefts_own_files_are_served_as_peft_serves_them(bart: Served, tmp_path: Path, kind: str) -> None:
    stack, client = bart
    base = tiny_seq2seq("bart", encoder_layers=LAYERS, decoder_layers=LAYERS)
    model = tuned(base, peft_configs(base)[kind], seed=5)
    weights, settings = saved_adapter(model, tmp_path)
    answer = post(client, {"prompt": weights, "config": settings}, f"peft-{kind}")
    assert answer.status_code == 201, answer.text
    version = stack.store.resolve(f"peft-{kind}")
    assert version.provenance["source_kind"] == json.loads(settings)["peft_type"]
    place = {"soft": Embedding.ENCODER, "prefix": SELF}[kind]
    assert version.length(place) == version.num_virtual_tokens == answer.json()["virtual_tokens"]
    for text in TEXTS:
        expected = greedy_seq2seq(model, source_tokenizer("bart")(text)["input_ids"], NUM_TOKENS)
        found = ask(client, f"peft-{kind}", text)["details"]["tokens"]
        assert [token["id"] for token in found] == expected.tokens
        assert [token["logprob"] for token in found] == pytest.approx(expected.logprobs, abs=1e-4)
