"""Several learned prompts and texts in front of one request equal transformers on all of them in a row."""

from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from app.engine.engine import Engine, EngineConfig
from app.engine.statistics import StepStats
from app.models.decoder_only import DecoderOnly
from app.models.packed_model import tensor_of
from app.prompt import Prompt, PromptKind, VersionDraft
from app.request import Request, Segment
from app.sites import SIDES, Site
from app.store.cache.prompt_cache import PromptCache
from app.store.prompt_store import open_store
from benchmarks.completions import submit
from tests import oracle
from tests.tiny_models import packed_backbone, tiny_model

Part = Prompt | tuple[int, ...]  # a learned prompt, or text
CONFIGS = {
    "soft": oracle.soft_config(8),
    "other soft": oracle.soft_config(5),
    "prefix": oracle.prefix_config(9),
    "other prefix": oracle.prefix_config(4),
}
TEXT, OWN = (11, 12, 13), (5, 6, 7, 8)
LINES = (
    ("soft", "other soft"),
    ("other soft", "soft"),
    ("soft", TEXT, "other soft"),
    ("soft", "soft", TEXT),
    ("prefix", TEXT),
    ("prefix", "soft", TEXT),
    ("prefix", "other prefix", TEXT, "soft"),
    (TEXT, TEXT),
)


def segment(part: Part) -> Segment:
    if isinstance(part, tuple):
        return Segment(token_ids=part)
    return Segment(prompt_digest=part.digest, num_virtual_tokens=part.num_virtual_tokens)


def expected(model: PreTrainedModel, backbone: DecoderOnly, parts: list[Part], num_tokens: int) -> list[int]:
    """Greedy tokens by the model's own cache: prefixes first as they are, then all else as embeddings."""
    cache = DynamicCache(config=model.config)
    rows = []
    embed = model.get_input_embeddings()
    for part in [*parts, OWN]:
        if isinstance(part, tuple):
            rows.append(embed(torch.tensor(part)))
        elif part.kind == PromptKind.SOFT:
            rows.append(backbone.prompt_embeddings(part))
        else:
            for layer in range(model.config.num_hidden_layers):
                keys, values = (tensor_of(part, Site.DECODER_SELF.tensor(layer, side)) for side in SIDES)
                cache.update(keys[None], values[None], layer)
    tokens: list[int] = []
    embeds = torch.cat(rows)[None]
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(inputs_embeds=embeds, past_key_values=cache, use_cache=True).logits[0, -1]
            tokens.append(int(logits.argmax()))
            embeds = embed(torch.tensor([[tokens[-1]]]))
    return tokens


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_lines_of_learned_prompts_and_texts_equal_transformers(architecture: str, tmp_path: Path) -> None:
    """All lines at once, twice, in small chunks; what begins equally is built once."""
    base = tiny_model(architecture)
    backbone = packed_backbone(base)
    store = open_store(tmp_path / "store")
    prompts: dict[str, Prompt] = {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        prompts[name] = oracle.as_prompt(oracle.tuned(base, config, seed=seed), tmp_path / name)
        store.publish(name.replace(" ", "-"), VersionDraft(prompt=prompts[name]))
    lines = [[part if isinstance(part, tuple) else prompts[part] for part in line] for line in LINES]
    steps: list[StepStats] = []
    source = PromptCache(store, host_bytes=1 << 20)
    engine = Engine(backbone, source, EngineConfig(max_rows=8, token_budget=11), on_step=steps.append)
    engine.start()
    try:
        for turn in range(2):
            requests = [
                Request(id=f"{turn}-{i}", token_ids=OWN, segments=tuple(map(segment, line)), max_new_tokens=9)
                for i, line in enumerate(lines)
            ]
            found = [submit(engine, request) for request in requests]
            for line, future in zip(lines, found, strict=True):
                assert list(future.result(60).token_ids) == expected(base, backbone, line, 9), line
    finally:
        engine.stop()
        source.close()
    nodes = {line[: end + 1] for line in LINES for end in range(len(line))}
    assert engine.stats().resident_prefixes == len(nodes)
    learned = {"soft": 8, "other soft": 5, "prefix": 0, "other prefix": 0}  # prefixes cost no forward pass
    built = sum(len(node[-1]) if isinstance(node[-1], tuple) else learned[node[-1]] for node in nodes)
    assert sum(step.num_prefix_tokens for step in steps) == built
