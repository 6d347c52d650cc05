"""What came of a session: each task's prompt is measured beside what it competes with, and written."""

import time
from collections.abc import Sequence
from typing import Any

from app.cli.training.directory import ending
from app.cli.training.in_context import InContext
from app.cli.training.options import (
    METRICS_FILE,
    PROMPT_FILE,
    REPORT_FILE,
    TASK_FILE,
    TEST_FILE,
    as_held_out,
    instruction_template,
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
    short,
    short_settings,
    shown_examples,
    sizes,
    training_record,
)
from app.cli.training.progress import progress_for
from app.cli.training.session import Session, Trained
from app.cli.training.task_part import shown_answers
from app.cli.training.tasks import TaskInTraining
from app.prompt import Prompt
from app.training.dev_set import history_of_task
from app.training.early_stopping import main_score
from app.training.examples import Example
from app.training.report.contents import Report, TrialRow, metrics_json
from app.training.report.page import report_page
from app.training.run import History
from app.training.run_directory import RunDirectory, RunStatus

_TIMED = 6  # questions, of which the first one isn't counted


def run_session(session: Session) -> list[Report]:
    """Train, measure and write; return the report of each task.

    Raise PromptplexError; KeyboardInterrupt where the run was interrupted.
    """
    options, base = session.options, session.base
    resolved = session.settings.resolved(is_encoder_decoder=base.is_encoder_decoder)
    status = RunStatus(
        task=", ".join(task.name for task in session.tasks),
        settings=resolved.model_dump(mode="json"),
        data_digest=session.digest,
        base=base.name,
        base_fingerprint=base.geometry.fingerprint,
    )
    assert resolved.steps is not None
    directory = RunDirectory(options.out, status)
    with ending(directory), progress_for(resolved.steps, is_quiet=options.quiet) as progress:
        with session.interruption.deferred():
            trained = session.train(directory, progress)
        for task in session.tasks:
            progress.say(f"measuring {task.name} on its {task.measured_on} examples")
        results = [Result(session, trained, number) for number in range(len(session.tasks))]
        reports = [result.report() for result in results]
        directory.write(REPORT_FILE, report_page(*reports).encode())
        for result, report in zip(results, reports, strict=True):
            result.write(directory, report)
    return reports


class Result:
    """What came of one task."""

    def __init__(self, session: Session, trained: Trained, number: int) -> None:
        """`number` is the task's, in the session."""
        self._session = session
        self._trained = trained
        self._task: TaskInTraining = session.tasks[number]
        self._prompt: Prompt = trained.result.prompts[number]
        self._history = trained.result.history
        self._settings = short_settings(trained.settings)
        if len(session.tasks) > 1:
            self._history = history_of_task(self._task.name, self._history)
            self._settings["tasks"] = short(", ".join(task.name for task in session.tasks))

    def report(self) -> Report:
        """Measure, and return all that is to be shown."""
        session, task, found = self._session, self._task, self._measured()
        return Report(
            task=task.name,
            base=session.base.name,
            base_fingerprint=session.base.geometry.fingerprint,
            measured_on=task.measured_on,
            main_metric=found[0].main,
            candidates=[each.candidate for each in found],
            answered=found[0].answered,
            settings=self._settings,
            template=task.template,
            data=", ".join(path.name for path in task.files),
            data_sha256=task.dataset.digest,
            num_examples=sizes(task.dataset),
            history=self._history,
            best_step=self._trained.result.best_step,
            seconds=max(time.monotonic() - session.began, _seconds(self._history)),
            warnings=task.dataset.warnings,
            trials=_trial_rows(self._trained),
            notes=[*self._notes(), *found[0].notes],
            prompt_bytes=len(self._prompt.data),
            code=code_versions(),
        )

    def write(self, directory: RunDirectory, report: Report) -> None:
        """Write the results; what push takes comes last. Raise StoreFull."""
        folder = self._task.folder
        held_out = "".join(f"{as_held_out(example)}\n" for example in self._task.dataset.test)
        if held_out:
            directory.write(folder / TEST_FILE, held_out.encode())
        directory.write(folder / METRICS_FILE, as_json(metrics_json(report)))
        directory.write(folder / TASK_FILE, as_json(self._task_part(report)))
        directory.write(folder / PROMPT_FILE, self._prompt.data)

    def _measured(self) -> list[Measured]:
        """Measure the trained prompt, an instruction and the bare base on the same held-out examples."""
        task, instruction, in_context = self._task, self._session.options.instruction, self._in_context()
        examples: Sequence[Example] = getattr(task.dataset, task.measured_on)

        def of(name: str, prompt: Prompt | None, template: str | None = None) -> Measured:
            answerer = task.answerer(template)
            return measured(name, answerer, prompt, examples, choices=task.choices, template=template)

        found = [of(TRAINED, self._prompt)]
        if instruction is not None:
            found.append(of(INSTRUCTION, None, instruction_template(instruction, task.template)))
        if in_context is not None and in_context.fits(examples):
            found.append(measured(IN_CONTEXT, in_context, None, examples, choices=()))
        return [*found, of(BARE, None)]

    def _in_context(self) -> InContext | None:
        session, task = self._session, self._task
        if session.study is None:
            return None
        return InContext(
            server=task.server,
            base=session.base,
            document=session.study.document,
            template=task.template,
            max_new_tokens=task.part["defaults"]["max_new_tokens"],
        )

    def _notes(self) -> list[str]:
        """Return what a cartridge takes, beside the document in context."""
        task, in_context = self._task, self._in_context()
        if in_context is None:
            return []
        test = task.dataset.test[:_TIMED]
        p, length = self._prompt.num_virtual_tokens, len(in_context.document.ids)
        notes = [f"keys and values of {p} tokens stand for those of {length}: {p / length:.1%} of the memory"]
        if len(test) > 1 and in_context.fits(test):
            found = in_context.first_token(task.server.publish(task.part, self._prompt), test)
            notes.append(
                f"first token after {found.cartridge:.3f} s, with the document in context after "
                f"{found.in_context:.3f} s: {found.ratio:.1%} of the time"
            )
        return notes

    def _task_part(self, report: Report) -> dict[str, Any]:
        examples = shown_answers(self._task.part, shown_examples(report.answered))
        given = {"examples": examples, "base": {"name": report.base}}
        measures = {"metrics": flat_metrics(report), "training": training_record(report)}
        return {
            name: value
            for name, value in {**given, **self._task.part, **measures}.items()
            if value is not None
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
            score=main_score(trial.look),
            is_chosen=trial is last,
        )
        for trial in trained.trials
    ]
