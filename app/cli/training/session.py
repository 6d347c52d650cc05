"""One run from data to files: the base is loaded, a prompt trained, measured and written into a directory."""

import contextlib
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.cli.training.answerer import LocalServer, TaskAnswerer
from app.cli.training.interruption import Interruption
from app.cli.training.options import (
    METRICS_FILE,
    PROMPT_FILE,
    REPORT_FILE,
    TASK_FILE,
    TEST_FILE,
    TrainOptions,
    as_held_out,
    instruction_template,
    task_settings,
)
from app.cli.training.outcome import (
    BARE,
    INSTRUCTION,
    TRAINED,
    Measured,
    as_json,
    code_versions,
    flat_metrics,
    measured,
    short_settings,
    shown_examples,
    sizes,
    training_record,
)
from app.cli.training.progress import AnyProgress, Listeners, progress_for
from app.cli.training.served_base import ServedBase, check_same_base
from app.cli.training.sharing import share_weights
from app.cli.training.starting import prompt_to_start_from
from app.prompt import Prompt
from app.training.base import TrainingBase, load_training_base
from app.training.checkpoint import has_checkpoint
from app.training.dev_set import DevSet
from app.training.encoding import Learned, encode_examples
from app.training.examples import Dataset, EncodedExample, Example
from app.training.loop import Trainer
from app.training.prompts import as_prompt, new_prompt
from app.training.report.contents import Report, TrialRow, metrics_json
from app.training.report.page import report_page
from app.training.run import TrainingResult
from app.training.run_directory import RunDirectory, RunState, RunStatus, held
from app.training.settings import Init, TrainingSettings
from app.training.sweep import Trial, grid, run_sweep
from app.training.templates import choose_template

_SCRATCH = ".serving"  # the store of the engine that answers meanwhile
_SWEEP = "sweep"  # checkpoints of a sweep's candidates
_SPARE = 1.25  # times the longest answer of the data may be generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """The winner of a run, or of a sweep."""

    settings: TrainingSettings
    result: TrainingResult
    trials: Sequence[Trial] = ()


@dataclass(kw_only=True)
class Session:
    """What is loaded for a run."""

    options: TrainOptions
    settings: TrainingSettings
    dataset: Dataset
    base: TrainingBase
    server: LocalServer
    task: dict[str, Any]  # the task part that is trained for
    start: Prompt | None
    interruption: Interruption
    began: float = field(default_factory=time.monotonic)

    @property
    def template(self) -> str | None:
        """Return the task's template."""
        return self.task.get("template")

    @property
    def choices(self) -> tuple[str, ...]:
        """Return the task's labels."""
        given = [each if isinstance(each, str) else each["value"] for each in self.task.get("choices", ())]
        return tuple(given) or self.dataset.choices

    def answerer(self, template: str | None = None) -> TaskAnswerer:
        """Return what answers with the task's settings, or with another template."""
        return TaskAnswerer(
            self.server, self.task if template is None else {**self.task, "template": template}
        )

    def train(self, directory: RunDirectory, progress: AnyProgress) -> Trained:
        """Train one candidate, or a grid of them. Raise PromptplexError."""
        listener = Listeners(directory, progress)
        if self.options.sweep is None:
            trainer = self._trainer(self.settings, listener, directory.path)
            return Trained(settings=trainer.settings, result=trainer.run())
        candidates = grid(self.settings, self.options.sweep)

        def trainer_of(number: int, settings: TrainingSettings) -> Trainer:
            changes = ", ".join(f"{name} {value}" for name, value in candidates[number][1].items())
            progress.say(f"candidate {number + 1} of {len(candidates)}: {changes}")
            return self._trainer(settings, listener, directory.path / _SWEEP / str(number))

        swept = run_sweep(candidates, trainer_of)
        return Trained(settings=swept.settings, result=swept.result, trials=swept.trials)

    def _trainer(self, settings: TrainingSettings, listener: Listeners, checkpoints: Path) -> Trainer:
        learned = new_prompt(settings, self.base, choices=self.choices, start=self.start)
        positions = Learned.of(as_prompt(learned))

        def encoded(examples: Sequence[Example]) -> list[EncodedExample]:
            return encode_examples(examples, self.base, self.template, positions)

        encoded(self.dataset.test)  # they are measured when the prompt is trained, and must fit too
        dev = DevSet(encoded=encoded(self.dataset.dev), examples=self.dataset.dev, choices=self.choices)
        return Trainer(
            base=self.base,
            learned=learned,
            settings=settings,
            train=encoded(self.dataset.train),
            dev=dev,
            answerer=self.answerer(),
            listener=listener,
            checkpoint_dir=checkpoints,
            origin={"template": repr(self.template)},
            is_interrupted=lambda: self.interruption.is_wanted,
        )

    def measure(self, prompt: Prompt) -> list[Measured]:
        """Measure the trained prompt, an instruction and the bare base on the same held-out examples."""
        test = self.dataset.test or self.dataset.dev or self.dataset.train

        def of(name: str, prompt: Prompt | None, template: str | None = None) -> Measured:
            answerer = self.answerer(template)
            return measured(name, answerer, prompt, test, choices=self.choices, template=template)

        found = [of(TRAINED, prompt)]
        if self.options.instruction is not None:
            found.append(of(INSTRUCTION, None, instruction_template(self.options.instruction, self.template)))
        return [*found, of(BARE, None)]

    def report(self, trained: Trained, found: Sequence[Measured]) -> Report:
        """Return the report of a run that was measured."""
        prompt, dataset = trained.result.prompt, self.dataset
        return Report(
            task=self.options.task,
            base=self.base.name,
            base_fingerprint=self.base.geometry.fingerprint,
            main_metric=found[0].main,
            candidates=[each.candidate for each in found],
            answered=found[0].answered,
            settings=short_settings(trained.settings),
            template=self.template,
            data=", ".join(path.name for path in self.options.data),
            data_sha256=dataset.digest,
            num_examples=sizes(dataset),
            history=trained.result.history,
            best_step=trained.result.best_step,
            seconds=time.monotonic() - self.began,
            warnings=dataset.warnings,
            trials=_trial_rows(trained),
            notes=found[0].notes,
            prompt_bytes=len(prompt.data),
            code=code_versions(),
        )

    def write(self, directory: RunDirectory, trained: Trained, report: Report) -> None:
        """Write the results; what push takes comes last. Raise StoreFull."""
        held_out = "".join(f"{as_held_out(example)}\n" for example in self.dataset.test)
        if held_out:
            directory.write(TEST_FILE, held_out.encode())
        directory.write(METRICS_FILE, as_json(metrics_json(report)))
        directory.write(REPORT_FILE, report_page(report).encode())
        directory.write(TASK_FILE, as_json(self._task_part(trained, report)))
        directory.write(PROMPT_FILE, trained.result.prompt.data)

    def _task_part(self, trained: Trained, report: Report) -> dict[str, Any]:
        record = training_record(
            trained.settings,
            self.dataset,
            trained.result,
            fingerprint=report.base_fingerprint,
            seconds=report.seconds,
        )
        given = {"examples": shown_examples(report.answered), "base": {"name": self.base.name}}
        measures = {"metrics": flat_metrics(report.candidates), "training": record}
        return {
            name: value for name, value in {**given, **self.task, **measures}.items() if value is not None
        }


def _trial_rows(trained: Trained) -> list[TrialRow]:
    last = trained.trials[-1] if trained.trials else None
    return [
        TrialRow(
            settings=trial.changes,
            steps=trial.step,
            score=next(iter(trial.look.scores.values()), 0.0),
            is_chosen=trial is last,
        )
        for trial in trained.trials
    ]


@contextlib.contextmanager
def open_session(
    options: TrainOptions,
    settings: TrainingSettings,
    dataset: Dataset,
    *,
    model: str,
    served: ServedBase | None,
    interruption: Interruption,
    say: Callable[[str], None],
) -> Iterator[Session]:
    """Load the base twice, to answer and to be trained on; tensors that are equal are in memory once.

    Raise UnsupportedModel, InvalidRequest, ValueError, CommandFailed.
    """
    scratch = options.out / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        with LocalServer(model, scratch, dtype=options.dtype, device=options.device, progress=say) as server:
            check_same_base(served, model, server.geometry.fingerprint)
            base = load_training_base(model, dtype="float32", device=options.device, progress=say)
            share_weights(server.model, base.model)
            task = task_settings(options)
            chosen = choose_template(dataset, base, task.get("template"))
            for warning in chosen.warnings:
                say(f"warning: {warning}")
            start = prompt_to_start_from(options, base.geometry)
            settings = _with_start(settings, options, start)
            yield Session(
                options=options,
                settings=settings,
                dataset=dataset,
                base=base,
                server=server,
                task=_task(task | {"template": chosen.source}, settings, dataset, base),
                start=start,
                interruption=interruption,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _with_start(settings: TrainingSettings, options: TrainOptions, start: Prompt | None) -> TrainingSettings:
    """Return the settings with what the prompt starts from: another one, or the words of the instruction."""
    if start is not None:
        return settings.model_copy(update={"init": Init.TASK})
    if settings.init_text is None and settings.init in (None, Init.TEXT):
        return settings.model_copy(update={"init_text": options.instruction})
    return settings


def _task(
    given: dict[str, Any], settings: TrainingSettings, dataset: Dataset, base: TrainingBase
) -> dict[str, Any]:
    """Return the task part, with labels and a number of new tokens from the data where none are given."""
    labels = {"choices": list(dataset.choices)} if dataset.choices else {}
    longest = _longest_answer(dataset, base, given["template"])
    limit = settings.max_new_tokens or math.ceil(longest * _SPARE)
    return labels | given | {"defaults": {"max_new_tokens": limit, **given.get("defaults", {})}}


def _longest_answer(dataset: Dataset, base: TrainingBase, template: str | None) -> int:
    """Return its tokens. Raise InvalidRequest: the template doesn't take a line, or the base has no room."""
    everything = [*dataset.train, *dataset.dev, *dataset.test]
    return max(len(each.target) for each in encode_examples(everything, base, template))


def run_session(session: Session) -> Report:
    """Train, measure and write. Raise PromptplexError; KeyboardInterrupt where the run was interrupted."""
    options, base = session.options, session.base
    resolved = session.settings.resolved(is_encoder_decoder=base.is_encoder_decoder)
    status = RunStatus(
        task=options.task,
        settings=resolved.model_dump(mode="json"),
        data_digest=session.dataset.digest,
        base=base.name,
        base_fingerprint=base.geometry.fingerprint,
    )
    assert resolved.steps is not None
    directory = RunDirectory(options.out, status)
    with _ending(directory), progress_for(resolved.steps, is_quiet=options.quiet) as progress:
        with session.interruption.deferred():
            trained = session.train(directory, progress)
        progress.say(f"measuring on {len(session.dataset.test)} held-out examples")
        report = session.report(trained, session.measure(trained.result.prompt))
        session.write(directory, trained, report)
    return report


@contextlib.contextmanager
def _ending(directory: RunDirectory) -> Iterator[None]:
    """Write into `run.json` what became of the run."""
    try:
        yield
    except KeyboardInterrupt:
        directory.end(RunState.CANCELLED)
        raise
    except BaseException as error:
        directory.end(RunState.FAILED, str(error) or type(error).__name__)
        raise
    directory.end(RunState.DONE)


@contextlib.contextmanager
def run_directory(out: Path) -> Iterator[None]:
    """Hold a run's directory; leave nothing of a failure behind, unless there is a checkpoint to go on from.

    Raise Conflict: another process trains into it, and keeps it as it is.
    """
    missing = [path for path in (out, *out.parents) if not path.exists()]
    with held(out):
        try:
            yield
        except BaseException:
            if missing and not is_resumable(out):
                shutil.rmtree(out, ignore_errors=True)
                with contextlib.suppress(OSError):  # another run may have begun beside it
                    for parent in missing[1:]:
                        parent.rmdir()
            raise


def is_resumable(out: Path) -> bool:
    """Return whether a run left a checkpoint."""
    return has_checkpoint(out) or (out / _SWEEP).exists()
