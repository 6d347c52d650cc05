"""OpenVINO GenAI's continuous batching, inside a virtual environment that has it: JSON lines in and out.

    {"prompts": [[3, 4], ...], "new_tokens": 32, "sampling": {"top_p": 0.9}} -> {"answers": [[5, 6], ...]}

It has no soft prompts, so it does the work without them. OpenVINO writes to stdout as it pleases, so answers
go elsewhere.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

_CACHE_GIB = 2  # for K and V: all works fit
_STEP_TOKENS = 2048


def export(model: Path, target: Path) -> None:
    """Convert a saved model to OpenVINO's format, its weights in bf16 as they are."""
    from optimum.intel import OVModelForCausalLM  # type: ignore[import-not-found]

    exported = OVModelForCausalLM.from_pretrained(
        model, export=True, compile=False, load_in_8bit=False, torch_dtype="auto"
    )
    exported.save_pretrained(target)
    _export_tokenizer(target)


def _export_tokenizer(target: Path) -> None:
    """The pipeline insists on a tokenizer; here it is never used."""
    import openvino  # type: ignore[import-not-found]
    from openvino_tokenizers import convert_tokenizer  # type: ignore[import-not-found]
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    forth, back = convert_tokenizer(wrapped, with_detokenizer=True)
    openvino.save_model(forth, target / "openvino_tokenizer.xml")
    openvino.save_model(back, target / "openvino_detokenizer.xml")


def start(model: Path, threads: int, max_requests: int) -> Any:
    """Compile the exported model; prefix caching is off."""
    import openvino_genai  # type: ignore[import-not-found]

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = _CACHE_GIB
    scheduler.max_num_seqs = max_requests
    scheduler.max_num_batched_tokens = _STEP_TOKENS
    scheduler.enable_prefix_caching = False
    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": threads}
    return openvino_genai.ContinuousBatchingPipeline(str(model), scheduler, "CPU", settings)


def answer(
    pipeline: Any, prompts: list[list[int]], new_tokens: int, sampling: dict[str, float]
) -> list[list[int]]:
    """Generate for all requests at once; greedily without `sampling`."""
    import numpy as np
    import openvino
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = new_tokens
    config.ignore_eos = True
    config.do_sample = bool(sampling)
    for name, value in sampling.items():
        setattr(config, name, value)
    ids = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
    results = pipeline.generate(ids, [config] * len(ids))
    return [list(result.m_generation_ids[0]) for result in results]


def main() -> None:
    """Serve requests until stdin ends: `openvino_worker.py MODEL THREADS MAX_REQUESTS`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, threads, max_requests = sys.argv[1:]
    exported = Path(model) / "openvino"
    if not (exported / "openvino_detokenizer.xml").is_file():
        export(Path(model), exported)
    pipeline = start(exported, int(threads), int(max_requests))
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps({"answers": answer(pipeline, **json.loads(line))}), file=channel, flush=True)


if __name__ == "__main__":
    main()
