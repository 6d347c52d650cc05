"""Every text architecture of transformers, small and with random weights: exact, refused, or wrong.

`python -m tests.models.sweep` runs all (twelve minutes on two cores) and writes the tables in
docs/models.md; `python -m tests.models.sweep NAME ...` prints what it finds of these, and writes nothing.
Encoder-decoders are called `seq2seq/NAME`. Each base goes the way that a user's goes: saved, loaded by
`load_base`, served by an engine in one mixed batch. What each request should give comes from transformers'
`generate` by token ids, and from PEFT, one at a time.
"""

import logging
import multiprocessing
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from app.engine.engine import Engine, EngineConfig
from app.errors import UnsupportedModel
from app.models.loading import LoadedBase, load_base
from app.models.twin import twin_config
from app.prompt import ModelGeometry, Prompt, VersionDraft
from app.request import Request
from app.sites import Site
from app.store.cache.prompt_cache import PromptCache
from app.store.importers import import_prompt
from app.store.prompt_store import open_store
from app.store.source_files import CONFIG, PROMPT
from app.store.validation import validate_prompt
from benchmarks.completions import submit
from tests import oracle
from tests.engine.seq2seq import Task, generated
from tests.models.conftest import save
from tests.tiny_models import VOCABULARY, make_random

_SEQ2SEQ = "seq2seq/"  # before the name of an architecture that is run with its encoder
ARCHITECTURES = (
    *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    *(
        f"{_SEQ2SEQ}{name}"
        for name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        if CONFIG_MAPPING[name].is_encoder_decoder  # others of this mapping listen to audio
    ),
)
SECONDS = 240.0  # for one architecture, loaded machine included
_NEW_TOKENS = 12
_LENGTHS = (1, 2, 5, 17, 30, 9)
_PROMPTS = {"soft prompt": oracle.soft_config, "prefix": oracle.prefix_config}
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "word_embed_proj_dim": 64,
    "embedding_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "n_inner": 96,
    "shared_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "sliding_window": 8,
    "max_position_embeddings": 512,
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "encoder_layers": 4,
    "encoder_ffn_dim": 96,
    "decoder_vocab_size": VOCABULARY,
    "num_heads": 4,
    "num_decoder_layers": 3,
    "d_ff": 96,
    "d_kv": 24,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
}
_OF_HEADS = ("head_dim", "num_key_value_heads", "rotary_dim")  # which some tie to other fields
_WEIGHTS_AT_MOST = 400_000_000  # beyond that the configuration has sizes that aren't known here


@dataclass(frozen=True)
class Verdict:
    """What became of an architecture: `exact`, `refused`, `wrong` or `not built`, and why or how."""

    name: str
    kind: str
    detail: str


def _small_configs(name: str) -> Iterator[Callable[[], PreTrainedConfig]]:
    """Its default configuration made small, in ways of which one should give a model that runs."""
    plain = {key: value for key, value in _SIZES.items() if key not in _OF_HEADS}
    depth = {"vocab_size": VOCABULARY, "num_hidden_layers": 4, "num_experts_per_tok": 2}
    for sizes in (_SIZES, plain, depth):
        yield lambda sizes=sizes: _sized(name, sizes)
    yield lambda: twin_config(_sized(name, {"num_experts_per_tok": 2}))


def _sized(name: str, sizes: dict[str, Any]) -> PreTrainedConfig:
    default = CONFIG_MAPPING[name]()
    text = default.get_text_config()
    given = {key: value for key, value in sizes.items() if _is_field(text, key)}
    for key, value in vars(text).items():  # one entry of each layer
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers:
            given[key] = list(value[: sizes.get("num_hidden_layers", len(value))])
    if text is default:
        small = CONFIG_MAPPING[name](**given)
    else:
        part = next(key for key in default.sub_configs if getattr(default, key) is text)
        small = CONFIG_MAPPING[name](**{part: type(text)(**given).to_dict()})
    for config in {id(each): each for each in (small, small.get_text_config())}.values():
        for key in [key for key in vars(config) if key.endswith("_token_id")]:
            if isinstance(getattr(config, key), int):
                setattr(config, key, min(getattr(config, key), VOCABULARY - 1))
        with suppress(Exception):  # some insist on one; generation then ends early, on both sides
            config.eos_token_id = None
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = 0
        if hasattr(config, "scale_embedding"):
            config.tie_word_embeddings = False  # else random decoders only repeat their own last token
        if getattr(config, "forced_eos_token_id", None) is not None:
            config.forced_eos_token_id = None
    return small


def _is_field(config: PreTrainedConfig, key: str) -> bool:
    if (
        isinstance(getattr(type(config), key, None), property)
        or key not in vars(config) | config.attribute_map
    ):
        return False
    with suppress(ValueError):  # fields that differ from layer to layer
        return getattr(config, key) is not None or key == "num_experts_per_tok"
    return False


def build(name: str) -> PreTrainedModel:
    """The model, float32, with weights large enough that outputs vary. Raises the first way's error."""
    errors: list[Exception] = []
    for make in _small_configs(name.removeprefix(_SEQ2SEQ)):
        try:
            return _random_model(make(), _class_of(name))
        except Exception as error:
            errors.append(error)
    raise errors[0]


def _class_of(name: str) -> Any:
    return AutoModelForSeq2SeqLM if name.startswith(_SEQ2SEQ) else AutoModelForCausalLM


@torch.no_grad()
def _random_model(config: PreTrainedConfig, kind: Any) -> PreTrainedModel:
    with torch.device("meta"), suppress(TypeError, NotImplementedError, RuntimeError):
        size = sum(each.numel() for each in kind.from_config(config).parameters())
        if size > _WEIGHTS_AT_MOST:
            raise ValueError(f"{size / 1e6:.0f} million weights")
    torch.manual_seed(0)
    model: PreTrainedModel = kind.from_config(config, dtype=torch.float32, attn_implementation="eager")
    make_random(model)
    if hasattr(config, "scale_embedding") and kind is AutoModelForSeq2SeqLM:
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.get_input_embeddings().weight.mul_(20)  # beside sinusoids, which all sources share
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        ids = torch.tensor([[5, 6, 7]])
        model(input_ids=ids, **({"decoder_input_ids": ids} if kind is AutoModelForSeq2SeqLM else {}))
    return model


def judge(name: str) -> Verdict:
    """Build, save, load and serve; the verdict."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            directory = save(build(name), Path(folder) / name.removeprefix(_SEQ2SEQ))
        except Exception as error:
            return Verdict(name, "not built", _short(error))
        try:
            base = load_base(str(directory), dtype="float32", device="cpu", progress=lambda _: None)
        except UnsupportedModel as error:
            return Verdict(name, "refused", error.message.replace(folder, ""))
        own = _class_of(name).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        return Verdict(name, *_compare(own.eval(), base, Path(folder)))


def _prompt_kinds(geometry: ModelGeometry) -> dict[str, Callable[[int], Any]]:
    if not geometry.has_encoder:
        return _PROMPTS
    first = geometry.layers[Site.ENCODER_SELF][0]
    shape = {"token_dim": first.kv_width // 2, "num_attention_heads": first.num_kv_heads}
    return {
        "soft prompt": lambda p: PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=p),
        "prefix": lambda p: PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=p, **shape),
    }


def _alone(own: Any, ids: list[int], num_tokens: int) -> list[int]:
    """What a model says by itself, from token ids."""
    if own.config.is_encoder_decoder:
        return generated(own, tuple(ids), num_tokens).tokens
    return oracle.greedy(own, ids, num_tokens).tokens


def _imported(tuned: Any, folder: Path, geometry: ModelGeometry) -> Prompt:
    weights, config = oracle.saved(tuned, folder)
    prompt = import_prompt({PROMPT: weights, CONFIG: config}, geometry).prompt
    validate_prompt(prompt, geometry)
    return prompt


def _compare(own: PreTrainedModel, base: LoadedBase, folder: Path) -> tuple[str, str]:
    """One batch of requests with every kind of prompt, against each of them alone."""
    store, backbone = open_store(folder / "store"), base.backbone
    tasks: dict[str, tuple[Any, Prompt | None]] = {"none": (own, None)}
    for kind, make in _prompt_kinds(backbone.geometry).items():
        with suppress(Exception):  # PEFT can't tune it
            tuned = oracle.tuned(own, make(6), seed=1)
            _alone(tuned, [5, 6, 7], 2)
            prompt = _imported(tuned, folder / kind, backbone.geometry)
            store.publish(kind.replace(" ", "-"), VersionDraft(prompt=prompt))
            tasks[kind] = (tuned, prompt)
    rng = random.Random(0)
    asked = [
        (kind, [rng.randrange(min(VOCABULARY, backbone.geometry.vocab_size)) for _ in range(length)])
        for length in _LENGTHS
        for kind in tasks
    ]
    source = PromptCache(store, host_bytes=1 << 20)
    engine = Engine(backbone, source, EngineConfig(max_rows=16, token_budget=32, kv_cache_bytes=64 << 20))
    engine.start()
    try:
        futures = [
            submit(engine, _request(i, kind, ids, tasks[kind][1], base.decoder_start_id))
            for i, (kind, ids) in enumerate(asked)
        ]
        found = [list(future.result(SECONDS).token_ids) for future in futures]
    finally:
        engine.stop()
        source.close()
    expected = [_alone(tasks[kind][0], ids, _NEW_TOKENS) for kind, ids in asked]
    wrong = [kind for (kind, _), ours, theirs in zip(asked, found, expected, strict=True) if ours != theirs]
    if wrong:
        return "wrong", f"{len(wrong)} of {len(asked)} rows: {', '.join(sorted(set(wrong)))}"
    if len({tuple(tokens) for tokens in expected}) < len(asked) / 2:
        return "wrong", "the rows hardly differ, which proves nothing"
    return "exact", ", ".join(kind for kind in tasks if kind != "none") or "no prompt that PEFT can tune"


def _request(number: int, kind: str, ids: list[int], prompt: Prompt | None, start: int | None) -> Request:
    if start is not None:
        settings: dict[str, Any] = {"token_ids": (start,), "max_new_tokens": _NEW_TOKENS}
        return Task(kind, prompt).request(str(number), tuple(ids), **settings)
    return Request(
        id=str(number),
        token_ids=tuple(ids),
        segments=oracle.segments(prompt),
        max_new_tokens=_NEW_TOKENS,
        task=kind,
    )


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def in_a_process(name: str) -> Verdict:
    """`judge`, in a process of its own, which ends after SECONDS at the latest."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(_judged(name)))
    process.start()
    try:
        return (
            ours.recv() if ours.poll(SECONDS) else Verdict(name, "wrong", f"not done in {SECONDS:g} seconds")
        )
    finally:
        process.kill()
        process.join()


def _judged(name: str) -> Verdict:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        return judge(name)
    except Exception as error:  # no refusal of ours: something that this ought to show
        return Verdict(name, "wrong", f"{type(error).__name__}: {_short(error)}")


def table(verdicts: list[Verdict]) -> str:
    """In Markdown: architectures by what became of them, and refusals by their reason."""
    groups: dict[str, list[str]] = {}
    for verdict in sorted(verdicts, key=lambda each: (_ORDER.index(each.kind), each.name)):
        groups.setdefault(_group(verdict), []).append(f"`{verdict.name.removeprefix(_SEQ2SEQ)}`")
    lines = ["| what the sweep finds | `model_type` |", "|---|---|"]
    lines += [f"| {group} | {len(names)}: {', '.join(names)} |" for group, names in groups.items()]
    return "\n".join(lines)


def _by_kind(verdicts: list[Verdict]) -> Iterator[list[Verdict]]:
    """Decoders, then encoder-decoders."""
    for is_seq2seq in (False, True):
        yield [each for each in verdicts if each.name.startswith(_SEQ2SEQ) is is_seq2seq]


_ORDER = ("wrong", "exact", "refused", "not built")
_BEGIN, _END = "<!-- sweep -->", "<!-- end of the sweep -->"


def _group(verdict: Verdict) -> str:
    if verdict.kind == "exact":
        return f"exact, with {verdict.detail}"
    if verdict.kind == "not built":
        return "not tried: it can't be built small with random weights here"
    reason = re.sub(r"^the architecture '[^']*' (can't be served exactly: )?", "", verdict.detail)
    reason = re.split(r" \(|;", reason)[0]
    reason = re.sub(r"\d+ of its \d+", "not all of its", reason)
    reason = re.sub(r"\d\S*e[+-]\d+ in", "more than rounding in", reason)
    reason = re.sub("has layers of kind .*", "has layers that are no attention, or sparse", reason)
    return f"{verdict.kind}: {reason}"


def main(names: list[str]) -> None:
    """Print the verdicts; of all architectures, write the table too."""
    with ThreadPoolExecutor(2) as pool:
        verdicts = []
        for verdict in pool.map(in_a_process, names or ARCHITECTURES):
            sys.stdout.write(f"{verdict.kind:<10} {verdict.name}: {verdict.detail}\n")
            sys.stdout.flush()
            verdicts.append(verdict)
    if not names:
        document = Path(__file__).parents[2] / "docs" / "models.md"
        before, _, rest = document.read_text().partition(_BEGIN)
        after = rest.partition(_END)[2]
        tables = "\n\n".join(table(each) for each in _by_kind(verdicts))
        document.write_text(f"{before}{_BEGIN}\n\n{tables}\n\n{_END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
