"""`promptplex convert`: other formats become canonical files, without running anything in them."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, DynamicCache, EncoderDecoderCache

from app.prompt import Prompt, PromptKind, TaskType
from app.sites import Embedding, Site
from app.store.importers import import_prompt
from app.store.prompt_file import make_prompt, read_prompt
from app.store.safetensors_file import RawTensor
from app.store.source_files import PROMPT
from tests.bart_oracle import HandmadeBart, Prefix
from tests.store.test_peft_importer import as_torch

Run = Callable[..., tuple[int, str, str]]
P, WIDTH, HEADS, LAYERS, MIDDLE = 3, 32, 4, 2, 8
SITES = {
    Site.DECODER_SELF: ("wte", "control_trans"),
    Site.DECODER_CROSS: ("wte2", "control_trans2"),
    Site.ENCODER_SELF: ("wte_enc", "control_trans_enc"),
}
SOURCE, START = [5, 6, 11, 30, 1], 2


class PrefixTuning(nn.Module):
    """The parameters of the paper's own model for BART, and the forward pass of its prefix."""

    def __init__(self, *, deep: bool = False, layers: int = LAYERS) -> None:
        super().__init__()
        for embedding, network in SITES.values():
            setattr(self, embedding, nn.Embedding(P, WIDTH))
            between = [nn.Linear(MIDDLE, MIDDLE), nn.Tanh()] if deep else []
            made = nn.Sequential(
                nn.Linear(WIDTH, MIDDLE), nn.Tanh(), *between, nn.Linear(MIDDLE, layers * 2 * WIDTH)
            )
            setattr(self, network, made)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    @torch.no_grad()
    def prefix(self, layers: int = LAYERS) -> Prefix:
        """Return keys and values [H, p, D] of each site and layer."""
        made = {}
        for site, (embedding, network) in SITES.items():
            whole = getattr(self, network)(getattr(self, embedding)(torch.arange(P).unsqueeze(0)))
            past = whole.view(1, P, layers * 2, HEADS, WIDTH // HEADS).permute([2, 0, 3, 1, 4]).split(2)
            for layer, (key, value) in enumerate(past):
                made[site, layer] = (key[0], value[0])
        return made


def config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "bart",
        "d_model": WIDTH,
        "decoder_layers": LAYERS,
        "encoder_layers": LAYERS,
        "decoder_attention_heads": HEADS,
        "preseqlen": P,
        "use_infix": False,
        "optim_prefix": True,
    } | changes


def saved(
    directory: Path, state: Mapping[str, Any], fields: Mapping[str, Any], name: str = "pytorch_model.bin"
) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(fields))
    torch.save(dict(state), directory / name)
    return directory


@pytest.fixture
def paper() -> PrefixTuning:
    torch.manual_seed(0)
    return PrefixTuning()


def converted(promptplex: Run, source: Path, *flags: str) -> Prompt:
    """What the command writes is what the server reads."""
    output = source.with_name("out.safetensors")
    status, out, err = promptplex("convert", str(source), str(output), *flags)
    assert (status, err) == (0, "")
    prompt = read_prompt(output.read_bytes())
    assert prompt.digest in out
    assert import_prompt({PROMPT: prompt.data}).prompt == prompt
    return prompt


def refusal(promptplex: Run, source: Path, *flags: str) -> str:
    """What the command says; it leaves no file."""
    output = source.with_name("out.safetensors")
    status, out, err = promptplex("convert", str(source), str(output), *flags)
    assert (status, out, output.exists()) == (1, "", False)
    assert err.startswith("error: ")
    assert "Traceback" not in err
    return err


def prefix_of(prompt: Prompt) -> Prefix:
    found: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
    for site in Site:
        for layer in range(LAYERS):
            if site.tensor(layer, "k") in prompt.tensors:
                key, value = (as_torch(prompt, site.tensor(layer, side)) for side in "kv")
                found[site, layer] = (key, value)
    return found


@pytest.mark.parametrize("deep", [False, True])
def test_the_papers_prefix_has_three_sites(promptplex: Run, tmp_path: Path, deep: bool) -> None:
    torch.manual_seed(0)
    paper = PrefixTuning(deep=deep)
    prompt = converted(promptplex, saved(tmp_path / "xsum", paper.state_dict(), config()))
    assert (prompt.kind, prompt.task_type, prompt.position_offset) == (
        PromptKind.PREFIX,
        TaskType.SEQ_2_SEQ_LM,
        0,
    )
    assert all(prompt.length(site) == P for site in Site)
    expected = paper.prefix()
    found = prefix_of(prompt)
    assert found.keys() == expected.keys()
    for place, sides in expected.items():
        for ours, theirs in zip(found[place], sides, strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-5), place


def test_safetensors_and_an_encoder_of_fewer_layers(
    promptplex: Run, paper: PrefixTuning, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    directory = saved(tmp_path / "xsum", {}, config(encoder_layers=1))
    (directory / "pytorch_model.bin").unlink()
    save_file(paper.state_dict(), directory / "model.safetensors")
    prompt = converted(promptplex, directory)
    assert {place for place in prefix_of(prompt) if place[0] is Site.ENCODER_SELF} == {(Site.ENCODER_SELF, 0)}


def tiny_bart() -> BartForConditionalGeneration:
    torch.manual_seed(1)
    return BartForConditionalGeneration(
        BartConfig(
            d_model=WIDTH,
            encoder_layers=LAYERS,
            decoder_layers=LAYERS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=64,
            max_position_embeddings=64,
            decoder_start_token_id=START,
            init_std=0.25,
        )
    ).eval()


@torch.no_grad()
def theirs(model: BartForConditionalGeneration, ids: list[int], cache: Any = None) -> Tensor:
    made = model(
        input_ids=torch.tensor([SOURCE]), decoder_input_ids=torch.tensor([ids]), past_key_values=cache
    )
    return made.logits[0]


def test_the_oracle_is_bart() -> None:
    """Without a prefix, and with one in decoder self-attention, which transformers can be given."""
    model, ids = tiny_bart(), [START, 7, 9, 13]
    assert torch.allclose(HandmadeBart(model).logits(SOURCE, ids), theirs(model, ids), atol=1e-5)
    made = PrefixTuning().prefix()
    own = {place: sides for place, sides in made.items() if place[0] is Site.DECODER_SELF}
    cache = DynamicCache()
    for (_, layer), (key, value) in own.items():
        cache.update(key[None], value[None], layer)
    expected = theirs(model, ids, EncoderDecoderCache(cache, DynamicCache()))
    found = HandmadeBart(model, own, offset=P).logits(SOURCE, ids)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_converted_prefix_steers_bart_as_the_papers_own(
    promptplex: Run, paper: PrefixTuning, tmp_path: Path
) -> None:
    prompt = converted(promptplex, saved(tmp_path / "xsum", paper.state_dict(), config()))
    model, ids = tiny_bart(), [START, 7, 9, 13]
    expected = HandmadeBart(model, paper.prefix())
    found = HandmadeBart(model, prefix_of(prompt), prompt.position_offset)
    assert torch.allclose(found.logits(SOURCE, ids), expected.logits(SOURCE, ids), atol=1e-4)
    assert (
        found.greedy(SOURCE, 8)[0]
        == expected.greedy(SOURCE, 8)[0]
        != HandmadeBart(model).greedy(SOURCE, 8)[0]
    )
    whole = found.logits(SOURCE, ids)
    for site in Site:  # each site counts, and so does the offset
        without = {place: sides for place, sides in found.prefix.items() if place[0] is not site}
        assert (HandmadeBart(model, without).logits(SOURCE, ids) - whole).abs().max() > 0.1
    shifted = HandmadeBart(model, found.prefix, offset=P).logits(SOURCE, ids)
    assert (shifted - whole).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_infix": True}, "an infix depends on the input"),
        ({"use_infix": "yes"}, "an infix depends on the input"),
        ({"preseqlen": 5}, "depends on the input"),
        ({"decoder_attention_heads": None}, "decoder_attention_heads is wrong"),
        ({"decoder_layers": True}, "decoder_layers is wrong"),
        ({"decoder_attention_heads": 5}, "expected: a multiple of"),
        ({"encoder_layers": 3}, "the encoder has 3"),
    ],
)
def test_refuses_a_config(
    promptplex: Run, paper: PrefixTuning, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    source = saved(tmp_path / "xsum", paper.state_dict(), config(**changes))
    assert reason in refusal(promptplex, source)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"control_trans.0.weight": None}, "holds no control_trans.0.weight"),
        ({"wte.weight": None}, "holds no wte.weight"),
        ({"control_trans2.2.bias": None}, "control_trans2 is not Linear-Tanh-Linear"),
        ({"control_trans_enc.1.weight": torch.ones(2, 2)}, "control_trans_enc is not Linear-Tanh-Linear"),
        ({"control_trans.2.weight": torch.ones(128, 9)}, "shapes of the network"),
        ({"wte.weight": "text"}, "holds no state dict"),
    ],
)
def test_refuses_a_state_dict(
    promptplex: Run, paper: PrefixTuning, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    state = {name: value for name, value in (paper.state_dict() | changes).items() if value is not None}
    assert reason in refusal(promptplex, saved(tmp_path / "xsum", state, config()))


def test_a_causal_base_has_no_three_sites(promptplex: Run, paper: PrefixTuning, tmp_path: Path) -> None:
    source = saved(tmp_path / "xsum", paper.state_dict(), config())
    assert "expected: SEQ_2_SEQ_LM" in refusal(promptplex, source, "--task-type", "CAUSAL_LM")


ROWS = {place: torch.randn(p, WIDTH) for place, p in ((Embedding.ENCODER, 3), (Embedding.DECODER, 2))}


def test_tgis_prompts_of_encoder_and_decoder(promptplex: Run, tmp_path: Path) -> None:
    directory = tmp_path / "tgis"
    directory.mkdir()
    torch.save(ROWS[Embedding.ENCODER], directory / "encoder.pt")
    torch.save(ROWS[Embedding.DECODER].bfloat16(), tmp_path / "decoder.pt")
    alone = converted(promptplex, directory)
    assert alone.task_type is TaskType.SEQ_2_SEQ_LM
    assert torch.equal(as_torch(alone, "enc.embeds"), ROWS[Embedding.ENCODER])
    (tmp_path / "out.safetensors").unlink()
    torch.save(ROWS[Embedding.DECODER], directory / "decoder.pt")
    both = converted(promptplex, directory)
    assert {place: both.length(place) for place in Embedding} == {"enc.embeds": 3, "dec.embeds": 2}
    assert both.position_offset == 2
    (tmp_path / "out.safetensors").unlink()
    causal = converted(promptplex, tmp_path / "decoder.pt")
    assert (causal.task_type, causal.tensors["dec.embeds"].dtype) == (TaskType.CAUSAL_LM, "BF16")
    (tmp_path / "out.safetensors").unlink()
    decoder = converted(promptplex, tmp_path / "decoder.pt", "--task-type", "SEQ_2_SEQ_LM")
    assert decoder.task_type is TaskType.SEQ_2_SEQ_LM
    assert decoder.digest != causal.digest


def test_an_array_of_numpy_is_for_t5s_encoder(promptplex: Run, tmp_path: Path) -> None:
    rows = ROWS[Embedding.ENCODER].numpy()
    np.save(tmp_path / "prompt.npy", rows)
    prompt = converted(promptplex, tmp_path / "prompt.npy")
    raw = RawTensor("F32", rows.shape, rows.tobytes())
    assert prompt == make_prompt(PromptKind.SOFT, {"enc.embeds": raw}, task_type=TaskType.SEQ_2_SEQ_LM)
    (tmp_path / "out.safetensors").unlink()
    causal = converted(promptplex, tmp_path / "prompt.npy", "--task-type", "CAUSAL_LM")
    assert causal == make_prompt(PromptKind.SOFT, {"dec.embeds": raw})


@pytest.mark.parametrize("name", ["encoder.pt", "prompt.npy"])
def test_nothing_in_a_file_is_run(promptplex: Run, tmp_path: Path, name: str) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / name

    class Touch:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (marker,))

    if name.endswith(".npy"):
        np.save(path, np.array([Touch()], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Touch()))
    refusal(promptplex, path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (torch.ones(3, 4, dtype=torch.float64), "float64; expected float32"),
        (torch.ones(3, 4, dtype=torch.int8), "int8; expected float32"),
        (torch.ones(12), "[p, hidden]"),
        (torch.ones(0, 4), "empty"),
        ({"a": torch.ones(3, 4)}, "no bare tensor"),
    ],
)
def test_refuses_embeddings(promptplex: Run, tmp_path: Path, rows: Any, reason: str) -> None:
    torch.save(rows, tmp_path / "encoder.pt")
    assert reason in refusal(promptplex, tmp_path / "encoder.pt")


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"text", b"PK\x03\x04"])
@pytest.mark.parametrize("name", ["encoder.pt", "prompt.npy"])
def test_refuses_what_is_no_such_file(promptplex: Run, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    refusal(promptplex, tmp_path / name)


def test_refuses_other_sources_and_outputs(promptplex: Run, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"")
    assert "Expected: " in refusal(promptplex, tmp_path / "x.bin")
    assert "no such file" in refusal(promptplex, tmp_path / "nowhere")
    np.save(tmp_path / "prompt.npy", np.ones((2, 4), dtype="<f4"))
    status, _, err = promptplex("convert", str(tmp_path / "prompt.npy"), str(tmp_path / "out"))
    assert (status, "must be named .safetensors" in err) == (1, True)
    converted(promptplex, tmp_path / "prompt.npy")
    output = str(tmp_path / "out.safetensors")
    status, _, err = promptplex("convert", str(tmp_path / "prompt.npy"), output)
    assert (status, err) == (1, f"error: File exists: {output}\n")
