"""CTranslate2 on a decoder, inside a virtual environment that has it: JSON lines in, JSON lines out.

    {"prompts": [[3, 4], ...], "new_tokens": 32, "sampling": {"top_p": 0.9}} -> {"answers": [[5, 6], ...]}

It has no soft prompts, so it does the work without them.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

_OPTIONS = {"top_p": "sampling_topp", "top_k": "sampling_topk"}


def start(model: Path, threads: int) -> Any:
    """Convert the saved model to bf16, unless that has been done, and load it."""
    import ctranslate2  # type: ignore[import-not-found]  # installed only where this file runs
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

    converted = model / "ctranslate2-bfloat16"
    if not converted.is_dir():
        TransformersConverter(str(model)).convert(str(converted), quantization="bfloat16")
    return ctranslate2.Generator(
        str(converted), device="cpu", compute_type="bfloat16", inter_threads=1, intra_threads=threads
    )


def answer(
    generator: Any, prompts: list[list[int]], new_tokens: int, sampling: dict[str, float]
) -> list[list[int]]:
    """Generate for all requests as one batch; greedily without `sampling`."""
    results = generator.generate_batch(
        [[f"t{number}" for number in prompt] for prompt in prompts],
        min_length=new_tokens,
        max_length=new_tokens,
        include_prompt_in_result=False,
        end_token=[],
        **{_OPTIONS[name]: value for name, value in ({"top_k": 0} | sampling if sampling else {}).items()},
    )
    return [result.sequences_ids[0] for result in results]


def main() -> None:
    """Serve requests until stdin ends: `ctranslate2_worker.py MODEL THREADS MAX_REQUESTS`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    model, threads, _ = sys.argv[1:]
    generator = start(Path(model), int(threads))
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        print(json.dumps({"answers": answer(generator, **json.loads(line))}), file=channel, flush=True)


if __name__ == "__main__":
    main()
