"""What `promptplex train` takes beside the settings of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import Conflict, InvalidRequest
from app.serving.publishing.task_settings import parse_task
from app.store.references import check_task_id
from app.strict_json import JsonError, parse_json
from app.text.template import parse_template
from app.training.examples import Example
from app.training.readers import named_paths
from app.training.settings import Init, Method, SelfStudySettings, TrainingSettings

PROMPT_FILE, TASK_FILE, TEST_FILE = "prompt.safetensors", "task.json", "test.jsonl"
METRICS_FILE, REPORT_FILE = "metrics.json", "report.html"
CANDIDATE = "candidate"  # the alias that --push moves


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Data, base, outputs; all but how the prompt is learned."""

    data: Mapping[str, Sequence[Path]]  # of each task, by its id
    document: Path | None = None  # of a cartridge, in place of data
    questions: Path | None = None  # about the document; None: the base makes them
    self_study: SelfStudySettings = field(default_factory=SelfStudySettings)
    model: str | None = None
    out: Path
    resume: bool = False
    template: str | None = None
    instruction: str | None = None
    task_file: Path | None = None
    init_from: str | None = None
    store: Path
    split_seed: int = 0
    dev_share: float | None = None
    test_share: float | None = None
    sweep: str | None = None
    push: bool = False
    server: str
    key: str | None = None
    quiet: bool = False
    dtype: str = "auto"
    device: str = "auto"
    max_context: int | None = None
    generation_config: str = "auto"

    @property
    def serving(self) -> dict[str, Any]:
        """Return how the base is served, under the names of a server's settings."""
        names = ("dtype", "device", "max_context", "generation_config")
        return {name: getattr(self, name) for name in names}

    def files(self, task: str) -> Sequence[Path]:
        """Return what a task's prompt is made of."""
        return self.data[task] if self.document is None else (self.document,)

    def folder(self, task: str) -> Path:
        """Return where in the run's directory a task's results are: in it, or in one of their own."""
        return Path() if len(self.data) == 1 else Path("tasks", task)


def data_of_tasks(task: str | None, data: Sequence[Path]) -> dict[str, tuple[Path, ...]]:
    """Return the paths of each task's data: those of --task, or one of each NAME=PATH.

    Raise InvalidRequest, ValueError.
    """
    named = named_paths([str(path) for path in data])
    if named is None:
        if task is None:
            raise ValueError("name the task with --task; or several tasks, each with its data, as NAME=PATH")
        return {task: tuple(data)}
    if task is not None:
        raise ValueError(f"each NAME=PATH names a task, so leave out --task {task}, or the names")
    if len(named) == 1:
        [(name, path)] = named.items()
        raise ValueError(f"there is one NAME=PATH only; for one task write --task {name} {path}")
    return {name: (path,) for name, path in named.items()}


def check_options(options: TrainOptions, settings: TrainingSettings) -> None:
    """Check what needs neither data nor base. Raise InvalidRequest, Conflict, ValueError."""
    for name in options.data:
        check_task_id(name)
    _check_number(options, settings)
    if settings.method is Method.CARTRIDGE:
        _check_cartridge(options, settings)
    elif options.document or options.questions or options.self_study != SelfStudySettings():
        raise ValueError("a document, and questions about it, are for --method cartridge")
    elif not all(options.data.values()):
        raise ValueError("there is no data to train on; give a file of examples, see --help")
    task_settings(options)
    if options.template is not None:
        parse_template(options.template)
    if options.resume and not options.out.is_dir():
        raise ValueError(
            f"there is no run in {options.out} to resume; leave out --resume, or name it with --out"
        )
    if not options.resume and options.out.exists() and any(options.out.iterdir()):
        raise Conflict(
            f"{options.out} isn't empty; go on with its run with --resume, or choose another --out"
        )


def _check_number(options: TrainOptions, settings: TrainingSettings) -> None:
    """Check that the method goes with so many tasks."""
    several = len(options.data) > 1
    if several is not (settings.method is Method.MULTITASK):
        raise ValueError(
            f"--method {settings.method} trains for one task, and there are {len(options.data)}; take "
            "--method multitask, or train for one after the other"
            if several
            else "--method multitask needs the data of two or more tasks, as NAME=PATH NAME=PATH"
        )
    if several and options.task_file is not None:
        raise ValueError(
            "--task-file has the settings of one task; leave it out where several learn together"
        )


def _check_cartridge(options: TrainOptions, settings: TrainingSettings) -> None:
    if options.document is None or any(options.data.values()):
        raise ValueError("a cartridge is made of a document alone: --document FILE in place of data")
    starts = (options.init_from, options.instruction, settings.init_text)
    if settings.init not in (None, Init.TEXT) or any(start is not None for start in starts):
        raise ValueError(
            "a cartridge starts from its document; leave out --init, --init-text, --init-from, --instruction"
        )


def task_settings(options: TrainOptions) -> dict[str, Any]:
    """Return the `task` part that the user gave, checked; the template of a flag counts before the file's.

    Raise ValueError, InvalidRequest.
    """
    given: dict[str, Any] = {}
    if options.task_file is not None:
        try:
            found = parse_json(options.task_file.read_bytes())
        except JsonError as error:
            raise ValueError(f"{options.task_file} is refused: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{options.task_file} must hold a JSON object")
        parse_task(found)
        given = {name: value for name, value in found.items() if name not in ("metrics", "training")}
    return given if options.template is None else given | {"template": options.template}


def instruction_template(instruction: str, template: str | None) -> str:
    """Return the template of a text-only task: the instruction, then the task's own template.

    An instruction with fields is a template itself. Raise InvalidRequest.
    """
    try:
        parse_template(instruction)
    except InvalidRequest:
        whole = f"{instruction}\n{template or '{text}'}"
        parse_template(whole)
        return whole
    return instruction


def as_held_out(example: Example) -> str:
    """Return an example as a line of a held-out file."""
    if example.messages:
        turns = [{"role": turn.role, "content": turn.content, **turn.others} for turn in example.messages]
        answer = {"role": "assistant", "content": example.output}
        return json.dumps({"messages": [*turns, answer]}, ensure_ascii=False)
    more = {"answer": example.answer, "slots": example.slots}
    given = {name: value for name, value in more.items() if value is not None}
    return json.dumps({"inputs": example.inputs, "expected": example.output, **given}, ensure_ascii=False)
