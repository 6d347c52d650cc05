"""One checkout's engine, driven by lines: the other end of `benchmarks.two_checkouts`.

This file runs by its path, with the checkout first on the module path, so it uses only what benchmarks of
older checkouts have as well.
"""

import hashlib
import json
import sys
import time
from typing import Any

import torch

from benchmarks.ours import Promptplex
from benchmarks.shared_engine import SharedEngine
from benchmarks.work import SHAPES, Work, make_asks, random_model, random_prompts


def build(options: dict[str, Any]) -> Promptplex:
    """The engine on random weights: the same ones in every checkout."""
    torch.manual_seed(0)
    work = Work(**{**options["work"], "shape": SHAPES[options["work"]["shape"]]})
    model = random_model(work.shape)
    prompts = random_prompts(model, work)
    return Promptplex(SharedEngine(model, [work]), work, prompts)


def run(side: Promptplex) -> dict[str, Any]:
    """One run of the work: seconds, what came out, and the median full decode step."""
    asks = make_asks(side.work)
    began = time.perf_counter()
    answers = side.run(asks)
    seconds = time.perf_counter() - began
    steps = sorted(side.decode_steps())
    tokens = json.dumps([answer.token_ids for answer in answers]).encode()
    return {
        "seconds": seconds,
        "tokens": hashlib.sha256(tokens).hexdigest(),
        "decode_step": steps[len(steps) // 2] if steps else None,
    }


def main() -> None:
    """Build once, then obey: `run` or `first_token`, a line of JSON back for each."""
    side = build(json.loads(sys.argv[1]))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        result = run(side) if line.strip() == "run" else side.measure_first_token(3)["seconds"]
        print(json.dumps(result), flush=True)
    side.close()


if __name__ == "__main__":
    main()
