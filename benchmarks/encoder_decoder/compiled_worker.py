"""CTranslate2 or OpenVINO, inside a virtual environment that has it: JSON lines in, JSON lines out.

    {"sources": [[3, 4], ...], "new_tokens": 32, "num_beams": 4} -> {"answers": [[5, 6], ...]}

Both write to stdout as they please, so answers go elsewhere.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Answer = Callable[[list[list[int]], int, int], list[list[int]]]


def start_ctranslate2(model: Path, precision: str, threads: int) -> Answer:
    """Convert the saved model to `precision` and load it."""
    import ctranslate2  # type: ignore[import-not-found]  # installed only where this file runs
    from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

    converted = model / f"ctranslate2-{precision}"
    if not converted.is_dir():
        TransformersConverter(str(model)).convert(str(converted), quantization=precision)
    translator = ctranslate2.Translator(
        str(converted), device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
    )

    def answer(sources: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        results = translator.translate_batch(
            [[f"t{number}" for number in source] for source in sources],
            beam_size=num_beams,
            min_decoding_length=new_tokens,
            max_decoding_length=new_tokens,
        )
        return [[int(token[1:]) for token in result.hypotheses[0]] for result in results]

    return answer


def export_openvino(model: Path, target: Path) -> None:
    """Convert the saved model, its weights as they are."""
    from optimum.intel import OVModelForSeq2SeqLM  # type: ignore[import-not-found]

    try:
        exported = OVModelForSeq2SeqLM.from_pretrained(model, export=True, compile=False)
    except RuntimeError:  # some versions can't keep the cache of a T5 inside the model
        exported = OVModelForSeq2SeqLM.from_pretrained(model, export=True, compile=False, stateful=False)
    exported.save_pretrained(target)


def start_openvino(model: Path, precision: str, threads: int) -> Answer:
    """Export the saved model, unless that has been done, and compile it; it computes in `precision`."""
    import torch
    from optimum.intel import OVModelForSeq2SeqLM

    exported = model / "openvino"
    if not exported.is_dir():
        export_openvino(model, exported)
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": str(threads)}
    compiled = OVModelForSeq2SeqLM.from_pretrained(exported, ov_config=settings)

    def answer(sources: list[list[int]], new_tokens: int, num_beams: int) -> list[list[int]]:
        ids = torch.tensor(sources)
        output = compiled.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=num_beams,
            eos_token_id=None,
        )
        rows: list[list[int]] = output[:, 1:].tolist()
        return rows

    return answer


START: dict[str, Callable[[Path, str, int], Answer]] = {
    "ctranslate2": start_ctranslate2,
    "openvino": start_openvino,
}


def main() -> None:
    """Serve requests until stdin ends: `compiled_worker.py PACKAGE PRECISION MODEL THREADS`."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    package, precision, model, threads = sys.argv[1:]
    answer = START[package](Path(model), precision, int(threads))
    print(json.dumps({"ready": True}), file=channel, flush=True)
    for line in sys.stdin:
        given: dict[str, Any] = json.loads(line)
        answers = answer(given["sources"], given["new_tokens"], given["num_beams"])
        print(json.dumps({"answers": answers}), file=channel, flush=True)


if __name__ == "__main__":
    main()
