"""Runs inside vLLM's own virtual environment: JSON lines in, JSON lines out.

    {"embeds": "<file.safetensors>", "new_tokens": 32, "sampling": {"top_p": 0.9}}
    -> {"answers": [{"token_ids": [...], "first_token": 0.5, "last_token": 2.5}]}

The file holds a tensor per request, `0`, `1` ..., each `[p + tokens, d]`: what vLLM lets a client send where
it has a trained prompt. Compiled, not eager. vLLM writes to stdout as it pleases, so answers go elsewhere.
"""

import json
import os
import sys
import time
from typing import Any

from safetensors.torch import load_file

# All works fit. The same bounds whatever is measured: vLLM keeps what it has compiled for them.
_CACHE_BYTES = 2 << 30  # for K and V
_MAX_TOKENS = 4096
_MAX_REQUESTS = 128


def start(model: str) -> Any:
    """Start vLLM's engine on the saved random weights; the first call compiles."""
    from vllm import LLM  # type: ignore[import-not-found]  # installed only where this file runs

    return LLM(
        model=model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prompt_embeds=True,
        max_model_len=_MAX_TOKENS,
        max_num_seqs=_MAX_REQUESTS,
        kv_cache_memory_bytes=_CACHE_BYTES,
        enable_prefix_caching=False,  # prompts differ from round to round for a real server's clients too
        disable_log_stats=False,
    )


def answer(engine: Any, embeds: str, new_tokens: int, sampling: dict[str, float]) -> dict[str, Any]:
    """Generate for all requests at once; greedily without `sampling`."""
    from vllm import SamplingParams

    tensors = load_file(embeds)
    prompts = [{"prompt_embeds": tensors[str(number)]} for number in range(len(tensors))]
    params = SamplingParams(
        temperature=1.0 if sampling else 0.0,
        max_tokens=new_tokens,
        ignore_eos=True,
        detokenize=False,
        **sampling,
    )
    began = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    return {"answers": [_answer(output, began) for output in outputs]}


def _answer(output: Any, began: float) -> dict[str, Any]:
    metrics = output.metrics
    times = (getattr(metrics, "first_token_ts", None), getattr(metrics, "last_token_ts", None))
    first, last = (None if not at else at - began for at in times)  # both clocks are monotonic
    return {"token_ids": list(output.outputs[0].token_ids), "first_token": first, "last_token": last}


def main() -> None:
    """Serve requests until stdin ends."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = start(sys.argv[1])
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(engine, **json.loads(line))), file=channel, flush=True)


if __name__ == "__main__":
    main()
