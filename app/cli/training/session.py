"""One run: the base is loaded to answer and to be trained on, and a prompt learns from the data."""

import contextlib
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from app.cli.training.answerer import LocalServer
from app.cli.training.directory import SWEEP
from app.cli.training.interruption import Interruption
from app.cli.training.lessons import Lessons, lessons_of_examples, lessons_of_study, study_document
from app.cli.training.options import TrainOptions, task_settings
from app.cli.training.progress import AnyProgress, Listeners
from app.cli.training.served_base import ServedBase, check_same_base
from app.cli.training.sharing import share_weights
from app.cli.training.starting import prompt_to_start_from, with_start
from app.cli.training.task_part import as_served
from app.cli.training.tasks import TaskInTraining, task_of_study, tasks_of_data
from app.prompt import Prompt
from app.training.base import TrainingBase, load_training_base
from app.training.dev_set import DevSet, DevTask
from app.training.examples import Dataset
from app.training.loop import Trainer
from app.training.run import TrainingResult
from app.training.run_directory import RunDirectory
from app.training.self_study import Study
from app.training.settings import TrainingSettings
from app.training.sweep import Trial, grid, run_sweep

_DECIDING = ("defaults", "choices")  # of a task part
_SCRATCH = ".serving"  # the store of the engine that answers meanwhile


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
    base: TrainingBase
    tasks: Sequence[TaskInTraining]  # that learn together; but for method multitask one
    start: Prompt | None
    study: Study | None  # of a cartridge's document; the task's dataset is what came of it
    interruption: Interruption
    began: float = field(default_factory=time.monotonic)

    @property
    def digest(self) -> str:
        """Return the sha256 (hex) of the data; of several tasks, of their names and digests."""
        if len(self.tasks) == 1:
            return self.tasks[0].dataset.digest
        listed = "".join(f"{task.dataset.digest}  {task.name}\n" for task in self.tasks)
        return hashlib.sha256(listed.encode()).hexdigest()

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
            return self._trainer(settings, listener, directory.path / SWEEP / str(number))

        swept = run_sweep(candidates, trainer_of)
        return Trained(settings=swept.settings, result=swept.result, trials=swept.trials)

    def _trainer(self, settings: TrainingSettings, listener: Listeners, checkpoints: Path) -> Trainer:
        lessons = self._lessons(settings)
        return Trainer(
            base=self.base,
            learned=lessons.learned,
            settings=settings,
            train=lessons.train,
            dev=DevSet(
                encoded=lessons.dev,
                examples=[example for task in self.tasks for example in task.dataset.dev],
                tasks=[DevTask(task.answerer(), task.labels, task.name) for task in self.tasks],
            ),
            listener=listener,
            checkpoint_dir=checkpoints,
            objective=lessons.objective,
            origin=self._origin(),
            is_interrupted=lambda: self.interruption.is_wanted,
        )

    def _origin(self) -> dict[str, str]:
        """Return what a run depends on beside its settings, its examples and the base, by name."""
        found = {
            "the prompt to start from": "nothing" if self.start is None else self.start.digest[:16],
            "dtype": self.options.dtype,
        }
        if len(self.tasks) > 1:
            found["tasks"] = ", ".join(task.name for task in self.tasks)
        for task in self.tasks:
            of_task = "" if task.is_alone else f" of {task.name}"
            found[f"template{of_task}"] = repr(task.template)
            found |= {f"{name}{of_task}": repr(task.part.get(name)) for name in _DECIDING}
        return found

    def _lessons(self, settings: TrainingSettings) -> Lessons:
        if self.study is not None:
            return lessons_of_study(settings, self.base, self.study)
        return lessons_of_examples(settings, self.base, self.tasks, start=self.start)


@contextlib.contextmanager
def open_session(
    options: TrainOptions,
    settings: TrainingSettings,
    datasets: Mapping[str, Dataset],
    *,
    model: str,
    served: ServedBase | None,
    interruption: Interruption,
    say: Callable[[str], None],
) -> Iterator[Session]:
    """Load the base twice, to answer and to be trained on; tensors that are equal are in memory once.

    `datasets` are those of the tasks; none: it comes of the document that the options name.

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
            base = as_served(base, task_settings(options), generation_config=options.generation_config)
            studied = study_document(options, settings, base, say)
            wanted = settings.max_new_tokens
            if studied is None:
                tasks = tasks_of_data(options, datasets, base, server, wanted=wanted, say=say)
            else:
                tasks = (task_of_study(options, studied.dataset, server, wanted=wanted, say=say),)
            start = prompt_to_start_from(options, base.geometry)
            yield Session(
                options=options,
                settings=with_start(settings, options, start),
                base=base,
                tasks=tasks,
                start=start,
                study=studied,
                interruption=interruption,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
