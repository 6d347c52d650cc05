"""One run from data to files: the base is loaded, a prompt trained, measured and written into a directory."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.cli.training.answerer import LocalServer, TaskAnswerer
from app.cli.training.in_context import InContext
from app.cli.training.interruption import Interruption
from app.cli.training.lessons import Lessons, lessons_of_examples, lessons_of_study, study_document
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
    IN_CONTEXT,
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
from app.cli.training.starting import prompt_to_start_from, with_start
from app.cli.training.task_part import (
    as_served,
    longest_answer,
    scored_choices,
    template_for,
    with_choices,
    with_limit,
)
from app.prompt import Prompt
from app.serving.publishing.task_settings import LabelledChoice
from app.training.base import TrainingBase, load_training_base
from app.training.checkpoint import has_checkpoint
from app.training.dev_set import DevSet
from app.training.examples import Dataset, Example
from app.training.loop import Trainer
from app.training.report.contents import Report, Split, TrialRow, metrics_json
from app.training.report.page import report_page
from app.training.run import History, TrainingResult
from app.training.run_directory import RunDirectory, RunState, RunStatus, held
from app.training.self_study import Study
from app.training.settings import TrainingSettings
from app.training.sweep import Trial, grid, run_sweep

_SCRATCH = ".serving"  # the store of the engine that answers meanwhile
_SWEEP = "sweep"  # checkpoints of a sweep's candidates
_TIMED = 6  # questions, of which the first one isn't counted
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
    choices: Sequence[LabelledChoice]  # the task's, if every line expects one of them
    study: Study | None  # of a cartridge's document; the dataset is what came of it
    interruption: Interruption
    began: float = field(default_factory=time.monotonic)

    @property
    def template(self) -> str | None:
        """Return the task's template."""
        return self.task.get("template")

    @property
    def labels(self) -> list[str]:
        """Return the names of the choices."""
        return [choice.value for choice in self.choices]

    @property
    def measured_on(self) -> Split:
        """Return the split on which the result is measured: test, or what is there in its place."""
        return "test" if self.dataset.test else "dev" if self.dataset.dev else "train"

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
        lessons = self._lessons(settings)
        return Trainer(
            base=self.base,
            learned=lessons.learned,
            settings=settings,
            train=lessons.train,
            dev=DevSet(encoded=lessons.dev, examples=self.dataset.dev, choices=self.labels),
            answerer=self.answerer(),
            listener=listener,
            checkpoint_dir=checkpoints,
            objective=lessons.objective,
            origin=self._origin(),
            is_interrupted=lambda: self.interruption.is_wanted,
        )

    def _origin(self) -> dict[str, str]:
        """Return what a run depends on beside its settings, its examples and the base, by name."""
        start = "nothing" if self.start is None else self.start.digest[:16]
        task = {name: repr(self.task.get(name)) for name in ("template", "defaults", "choices")}
        return task | {"the prompt to start from": start, "dtype": self.options.dtype}

    def _lessons(self, settings: TrainingSettings) -> Lessons:
        if self.study is not None:
            return lessons_of_study(settings, self.base, self.study)
        return lessons_of_examples(
            settings,
            self.base,
            self.dataset,
            template=self.template,
            choices=self.choices,
            start=self.start,
        )

    def measure(self, prompt: Prompt) -> list[Measured]:
        """Measure the trained prompt, an instruction and the bare base on the same held-out examples."""
        test: Sequence[Example] = getattr(self.dataset, self.measured_on)

        def of(name: str, prompt: Prompt | None, template: str | None = None) -> Measured:
            answerer = self.answerer(template)
            return measured(name, answerer, prompt, test, choices=self.choices, template=template)

        found = [of(TRAINED, prompt)]
        if self.options.instruction is not None:
            found.append(of(INSTRUCTION, None, instruction_template(self.options.instruction, self.template)))
        in_context = self._in_context()
        if in_context is not None and in_context.fits(test):
            found.append(measured(IN_CONTEXT, in_context, None, test, choices=()))
        return [*found, of(BARE, None)]

    def _in_context(self) -> InContext | None:
        if self.study is None:
            return None
        return InContext(
            server=self.server,
            base=self.base,
            document=self.study.document,
            template=self.template,
            max_new_tokens=self.task["defaults"]["max_new_tokens"],
        )

    def _notes(self, prompt: Prompt) -> list[str]:
        """Return what a cartridge takes, beside the document in context."""
        test, in_context = self.dataset.test[:_TIMED], self._in_context()
        if in_context is None:
            return []
        p, length = prompt.num_virtual_tokens, len(in_context.document.ids)
        notes = [f"keys and values of {p} tokens stand for those of {length}: {p / length:.1%} of the memory"]
        if len(test) > 1 and in_context.fits(test):
            found = in_context.first_token(self.server.publish(self.task, prompt), test)
            notes.append(
                f"first token after {found.cartridge:.3f} s, with the document in context after "
                f"{found.in_context:.3f} s: {found.ratio:.1%} of the time"
            )
        return notes

    def report(self, trained: Trained, found: Sequence[Measured]) -> Report:
        """Return the report of a run that was measured."""
        prompt, dataset = trained.result.prompt, self.dataset
        return Report(
            task=self.options.task,
            base=self.base.name,
            base_fingerprint=self.base.geometry.fingerprint,
            measured_on=self.measured_on,
            main_metric=found[0].main,
            candidates=[each.candidate for each in found],
            answered=found[0].answered,
            settings=short_settings(trained.settings),
            template=self.template,
            data=", ".join(path.name for path in self.options.files),
            data_sha256=dataset.digest,
            num_examples=sizes(dataset),
            history=trained.result.history,
            best_step=trained.result.best_step,
            seconds=max(time.monotonic() - self.began, _seconds(trained.result.history)),
            warnings=dataset.warnings,
            trials=_trial_rows(trained),
            notes=[*self._notes(prompt), *found[0].notes],
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
        measures = {"metrics": flat_metrics(report), "training": record}
        return {
            name: value for name, value in {**given, **self.task, **measures}.items() if value is not None
        }


def _seconds(history: History) -> float:
    """Return the seconds of all steps and looks, also those of a run that was resumed."""
    return sum(step.seconds for step in history.steps) + sum(look.seconds for look in history.looks)


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
    dataset: Dataset | None,
    *,
    model: str,
    served: ServedBase | None,
    interruption: Interruption,
    say: Callable[[str], None],
) -> Iterator[Session]:
    """Load the base twice, to answer and to be trained on; tensors that are equal are in memory once.

    `dataset` None: it comes of the document that the options name.

    Raise UnsupportedModel, InvalidRequest, ValueError, CommandFailed.
    """
    scratch = options.out / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        with LocalServer(model, scratch, progress=say, **options.serving) as server:
            check_same_base(served, model, server.geometry.fingerprint)
            base = load_training_base(
                model,
                dtype="float32",
                device=options.device,
                max_context=options.max_context,
                progress=say,
            )
            share_weights(server.model, base.model)
            task = task_settings(options)
            base = as_served(base, task, generation_config=options.generation_config)
            studied = study_document(options, settings, base, task.get("template"), say)
            if studied is None:
                assert dataset is not None
                task["template"] = template_for(dataset, base, task.get("template"), say)
                longest, spare = longest_answer(dataset, base, task["template"]), _SPARE
            else:
                dataset, longest, spare = studied.dataset, options.self_study.max_answer_tokens, 1.0
            start = prompt_to_start_from(options, base.geometry)
            task = with_choices(task, dataset)
            task = with_limit(task, longest, spare=spare, wanted=settings.max_new_tokens, say=say)
            yield Session(
                options=options,
                settings=with_start(settings, options, start),
                dataset=dataset,
                base=base,
                server=server,
                task=task,
                start=start,
                choices=scored_choices(task, dataset, say),
                study=studied,
                interruption=interruption,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
        progress.say(f"measuring on the {session.measured_on} examples")
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
