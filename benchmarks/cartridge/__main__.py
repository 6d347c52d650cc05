"""The command line: ``python -m benchmarks.cartridge``."""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from app.cli.training.answerer import LocalServer
from app.prompt import Prompt
from app.training.base import load_training_base
from benchmarks.cartridge.reading_base import make_reading_base
from benchmarks.cartridge.trials import Questions, Trial, right

_FIRST_TOKEN_PAIRS = 21


def say(line: str) -> None:
    """Progress goes to stderr; stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def measure(options: argparse.Namespace, store: Path) -> dict[str, Any]:
    """Make the base where it isn't there, study a document, and measure a cartridge of each length."""
    if not (options.base / "config.json").is_file():
        say(f"training a base that reads long documents into {options.base}")
        make_reading_base(options.base, say)
    torch.set_num_threads(1)
    base = load_training_base(str(options.base), dtype="float32", device="cpu", progress=say)
    with LocalServer(str(options.base), store, dtype="float32", device="cpu", progress=say) as server:
        trial = Trial(base, server, options.seed, options.questions)
        held_out = trial.held_out(options.held_out, options.seed)
        say(f"answering {len(held_out.all)} held-out questions with the document in context")
        in_context, bare = trial.answers_in_context(held_out.all), trial.answers(None, held_out.all)
        return {
            "document_tokens": len(trial.document.ids),
            "training_questions": len(trial.study.train),
            "study_seconds": round(trial.study_seconds, 1),
            "share_of_lines_asked": held_out.share_asked,
            "held_out": {"asked": len(held_out.asked), "unasked": len(held_out.unasked)},
            "accuracy_in_context": held_out.shares(right(in_context, held_out.all)),
            "accuracy_without_document": held_out.shares(right(bare, held_out.all)),
            "cartridges": [
                cartridge(trial, held_out, in_context, length, options) for length in options.lengths
            ],
        }


def cartridge(
    trial: Trial, held_out: Questions, in_context: list[str], length: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Train and measure one length."""
    say(f"training a cartridge of {length} tokens")
    start, trained, seconds = trial.train(length, options.steps, options.learning_rate)
    before, answers = trial.answers(start, held_out.all), trial.answers(trained, held_out.all)
    accuracy = held_out.shares(right(answers, held_out.all))
    reference = held_out.shares(right(in_context, held_out.all))["of_lines"]
    found = {
        "virtual_tokens": length,
        "train_seconds": round(seconds, 1),
        "accuracy": accuracy,
        "share_of_in_context": round(accuracy["of_lines"] / reference, 4) if reference else None,
        "accuracy_before_training": held_out.shares(right(before, held_out.all)),
        "same_answer_as_in_context": held_out.shares(
            [a == b for a, b in zip(answers, in_context, strict=True)]
        ),
        "kv_bytes": _kv_bytes(trial, trained),
        "kv_ratio": round(length / len(trial.document.ids), 4),
        "first_token": trial.first_token(trained, held_out.all[:_FIRST_TOKEN_PAIRS]),
    }
    say(json.dumps(found))
    return found


def _kv_bytes(trial: Trial, prompt: Prompt) -> dict[str, int]:
    """Return the bytes of keys and values in float32, of the cartridge and of the whole document."""
    geometry = trial.geometry
    lengths = {"cartridge": prompt.num_virtual_tokens, "document": len(trial.document.ids)}
    return {name: geometry.prefix_bytes(length) for name, length in lengths.items()}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--base", type=Path, default=Path("build/reading-base"), help="made if it isn't there"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--questions", type=int, default=1600, help="that the base is to make")
    parser.add_argument("--held-out", type=int, default=80, help="of each kind")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, help="JSON file; default: standard output")
    options = parser.parse_args()
    with TemporaryDirectory() as store:
        text = json.dumps(measure(options, Path(store)), indent=2) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
