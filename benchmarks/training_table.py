"""What a prompt's method, length and start are worth on the demo's bases: accuracies of three seeds.

    python -m benchmarks.training_table build/training-table.jsonl
    python -m benchmarks.training_table_report build/training-table.jsonl

Each run trains on 200 lines and answers 150 held-out inputs through the engine. Its result becomes a line of
the file at once, so that a stopped table goes on where it was. `--share 1/2` and `--share 2/2` are for two
processes that work on one file.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from app.cli.training.answerer import LocalServer, TaskAnswerer
from app.training.base import load_training_base
from app.training.dev_set import DevSet
from app.training.encoding import encode_examples
from app.training.examples import Example
from app.training.loop import Trainer
from app.training.prompts import new_prompt
from app.training.run import DevRecord, History, StepRecord
from app.training.settings import Init, Method, TrainingSettings
from demo.recipes.corpus import Maker
from demo.recipes.dates import written_date
from demo.recipes.splits import Split, distinct
from demo.recipes.tasks import BASE_NAME, T5_NAME, TEMPLATE
from demo.recipes.utterances import INTENTS, utterance

SEEDS = (0, 1, 2)
LENGTHS = (1, 5, 16, 50)
NUM_TRAIN, NUM_DEV, NUM_TEST = 200, 50, 150
_DATA_SEED = 11
_MAX_NEW_TOKENS = 16
Network = Literal["none", "mlp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTask:
    """One task: a variant of what `make` draws. Prompts start from `text` or from `choices`."""

    base: str
    make: Maker
    variant: str
    text: str
    choices: tuple[str, ...]
    steps: int
    rewrite: Callable[[str], str] = str  # the variant's answer, into what is to be written

    def examples(self, split: Split, count: int) -> list[Example]:
        """Draw distinct examples, the same ones for every run."""
        drawn = distinct(self.make, split, count, _DATA_SEED)
        return [
            Example(inputs={"text": each.text}, output=self.rewrite(each.answers[self.variant]))
            for each in drawn
        ]


@dataclass(frozen=True, slots=True)
class Run:
    """One cell of the table, for one seed."""

    task: str
    method: Method
    network: Network
    init: Init
    length: int
    learning_rate: float
    seed: int

    def settings(self, task: TableTask) -> TrainingSettings:
        """Everything else is the default of the method."""
        return TrainingSettings(
            method=self.method,
            network=self.network,
            init=self.init,
            init_text=task.text,
            num_virtual_tokens=self.length,
            learning_rate=self.learning_rate,
            seed=self.seed,
            steps=task.steps,
            patience=task.steps,
            num_eval=NUM_DEV,
        )


TASKS = {
    # A form of dates that the base was pretrained on, and that few of its instructions ask for.
    "known": TableTask(
        base=BASE_NAME,
        make=written_date,
        variant="dotted",
        text="Write the date in German format.",
        choices=(".", "day", "month", "year"),
        steps=30,
    ),
    # A form that it has never written: a prompt has to teach it, not only to ask for it.
    "new": TableTask(
        base=BASE_NAME,
        make=written_date,
        variant="iso",
        text="Write the date in ISO format.",
        choices=("/", "year", "month", "day"),
        steps=80,
        rewrite=lambda answer: answer.replace("-", "/"),
    ),
    "T5": TableTask(
        base=T5_NAME,
        make=utterance,
        variant="intent",
        text="What is the intent of the request?",
        choices=INTENTS,
        steps=20,
    ),
}
_Kind = tuple[Method, Network, Init]
_INITS: tuple[_Kind, ...] = (
    (Method.PROMPT, "none", Init.RANDOM),
    (Method.PROMPT, "none", Init.VOCABULARY),
    (Method.PROMPT, "none", Init.TEXT),
    (Method.PROMPT, "none", Init.LABELS),
    (Method.P_TUNING, "mlp", Init.RANDOM),
    (Method.PREFIX, "none", Init.ZERO),
    (Method.PREFIX, "none", Init.RANDOM),
    (Method.PREFIX, "none", Init.TEXT),
    (Method.PREFIX, "mlp", Init.RANDOM),
)
# At another learning rate than the method's default, and with 16 tokens.
_RATES: tuple[tuple[_Kind, float], ...] = (
    ((Method.PREFIX, "none", Init.TEXT), 0.005),
    ((Method.PREFIX, "none", Init.TEXT), 0.05),
    ((Method.PREFIX, "none", Init.ZERO), 0.05),
    ((Method.PREFIX, "mlp", Init.RANDOM), 1e-3),
    ((Method.PREFIX, "mlp", Init.RANDOM), 0.01),
    ((Method.PROMPT, "none", Init.TEXT), 0.1),
)


def runs() -> list[Run]:
    """All runs, in the order of what they tell most: a table that is stopped has whole parts."""
    return [
        *(run for seed in SEEDS for run in _lengths("new", LENGTHS, seed)),
        *(Run("new", *kind, 16, rate, seed) for seed in SEEDS for kind, rate in _RATES),
        *(run for seed in SEEDS for run in _lengths("known", (1, 16), seed)),
        *(run for seed in SEEDS for run in _lengths("T5", (1, 16), seed)),
    ]


def _lengths(task: str, lengths: Sequence[int], seed: int) -> list[Run]:
    return [Run(task, *kind, length, default_rate(*kind), seed) for length in lengths for kind in _INITS]


def default_rate(method: Method, network: Network, init: Init) -> float:
    """Return what the method has by itself, so that runs of another default are others."""
    settings = TrainingSettings(method=method, network=network, init=init)
    rate = settings.resolved(is_encoder_decoder=False).learning_rate
    assert rate is not None
    return rate


class _Silent:
    """A listener that keeps the looks."""

    def on_start(self, history: History) -> None:
        """Nothing to take up."""

    def on_step(self, record: StepRecord) -> None:
        """Steps aren't kept."""

    def on_dev(self, record: DevRecord) -> None:
        """Looks are in the result's history."""

    def on_advice(self, line: str) -> None:
        """Advice is for people."""


class Bench:
    """A base in float32, which trains prompts of one task and answers with them."""

    def __init__(self, task: TableTask, server: LocalServer) -> None:
        self._task = task
        self._base = load_training_base(task.base, dtype="float32", device="cpu", progress=_silent)
        settings = {"template": TEMPLATE, "defaults": {"max_new_tokens": _MAX_NEW_TOKENS}}
        self._answerer = TaskAnswerer(server, settings)
        encoded = encode_examples(task.examples(Split.PROMPT, NUM_TRAIN + NUM_DEV), self._base, TEMPLATE)
        self._train, self._dev = encoded[:NUM_TRAIN], DevSet(encoded=encoded[NUM_TRAIN:])
        self._test = task.examples(Split.HELDOUT, NUM_TEST)

    def result(self, run: Run) -> dict[str, Any]:
        """Train, then answer the test examples with the prompt of the lowest dev loss."""
        settings = run.settings(self._task)
        trained = Trainer(
            base=self._base,
            learned=new_prompt(settings, self._base, choices=self._task.choices),
            settings=settings,
            train=self._train,
            dev=self._dev,
            listener=_Silent(),
        ).run()
        answers = self._answerer.answers(trained.prompt, self._test)
        right = [answer == each.output for answer, each in zip(answers, self._test, strict=True)]
        looks = {look.step: round(look.loss, 4) for look in trained.history.looks}
        return {"accuracy": sum(right) / len(right), "best_step": trained.best_step, "dev_losses": looks}


def _silent(line: str) -> None:
    """Loading isn't shown."""


@contextmanager
def bench(task: TableTask) -> Iterator[Bench]:
    """Start the task's server; it ends with the block."""
    with TemporaryDirectory() as folder:
        store = Path(folder)
        with LocalServer(task.base, store, dtype="float32", device="cpu", progress=_silent) as server:
            yield Bench(task, server)


def finished(path: Path) -> set[Run]:
    """Return the runs that the file has."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {read_run(json.loads(line)) for line in lines}


def read_run(line: dict[str, Any]) -> Run:
    """Return which run a line of the file is of."""
    fields = line["run"]
    return Run(**fields | {"method": Method(fields["method"]), "init": Init(fields["init"])})


def fill(path: Path, share: tuple[int, int]) -> None:
    """Do what is missing of a share `(number, of)` of the runs, and add a line for each."""
    done = finished(path)
    number, of = share
    todo = [run for run in runs()[number - 1 :: of] if run not in done]
    with ExitStack() as stack:
        benches: dict[str, Bench] = {}
        for run in todo:
            if run.task not in benches:
                benches[run.task] = stack.enter_context(bench(TASKS[run.task]))
            began = time.perf_counter()
            line = {"run": asdict(run), **benches[run.task].result(run)}
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{run}: {line['accuracy']:.1%}, {time.perf_counter() - began:.0f} s", flush=True)


def _share(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    return int(number), int(of)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("results", type=Path, help="a line of JSON for each finished run")
    parser.add_argument(
        "--share", type=_share, default=(1, 1), metavar="N/OF", help="which runs; default: all"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.results.parent.mkdir(parents=True, exist_ok=True)
    fill(options.results, options.share)


if __name__ == "__main__":
    main()
