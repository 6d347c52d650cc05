"""What `promptplex train` takes beside the settings of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.cli.server import DEFAULT_SERVER, KeyOption, ServerOption
from app.errors import Conflict, InvalidRequest
from app.serving.publishing.task_settings import parse_task
from app.settings import Settings
from app.store.references import check_task_id
from app.strict_json import JsonError, parse_json
from app.text.template import parse_template
from app.training.examples import Example
from app.training.readers import named_paths
from app.training.settings import Init, Method, SelfStudySettings, TrainingSettings

PROMPT_FILE, TASK_FILE, TEST_FILE = "prompt.safetensors", "task.json", "test.jsonl"
METRICS_FILE, REPORT_FILE = "metrics.json", "report.html"
# Panels of the help.
DATA, OUTPUT, BASE, SELF_STUDY = "Data and task", "Output", "Base and server", "Cartridge"
CANDIDATE = "candidate"  # the alias that --push moves


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """Data, base, outputs; all but how the prompt is learned."""

    data: Mapping[str, Sequence[Path]]  # of each task, by its id
    out: Path
    self_study: SelfStudySettings = field(default_factory=SelfStudySettings)
    # What has a flag of its own is annotated with it (`option_flags`).
    document: Annotated[
        Path | None,
        typer.Option(
            help="Text file that a cartridge is made of, in place of data; with --method cartridge",
            rich_help_panel=SELF_STUDY,
        ),
    ] = None
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Questions about the document: a .txt file with one a line, or JSONL of inputs or messages; "
            "default: the base makes them",
            rich_help_panel=SELF_STUDY,
        ),
    ] = None
    template: Annotated[
        str | None,
        typer.Option(
            help="Input template, such as $'Review: {text}\\nSentiment:'; default: the text and a line break",
            rich_help_panel=DATA,
        ),
    ] = None
    task_file: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with template, defaults, choices, examples, notes, as for push",
            rich_help_panel=DATA,
        ),
    ] = None
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Instruction in words: the prompt starts from it, and is compared with it",
            rich_help_panel=DATA,
        ),
    ] = None
    dev_share: Annotated[
        float | None,
        typer.Option(
            help="Share of one file that is held out to choose the best step; default: by its size",
            min=0,
            max=0.5,
            rich_help_panel=DATA,
        ),
    ] = None
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of one file that is held out to measure the result; default: by its size",
            min=0,
            max=0.5,
            rich_help_panel=DATA,
        ),
    ] = None
    split_seed: Annotated[
        int, typer.Option(help="Another seed holds out other lines", min=0, rich_help_panel=DATA)
    ] = 0
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Prompt to start from: task@version of --store, or a directory or file as for push",
            rich_help_panel=DATA,
        ),
    ] = None
    store: Annotated[
        Path, typer.Option(help="Store in which --init-from looks for a task", rich_help_panel=DATA)
    ] = Settings.model_fields["store"].default
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a directory or hub id; default: the server's, else the demo's",
            envvar="PROMPTPLEX_MODEL",
            rich_help_panel=BASE,
        ),
    ] = None
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype in which answers are generated, as served: float32, bfloat16, float16 or auto",
            rich_help_panel=BASE,
        ),
    ] = "auto"
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:N", rich_help_panel=BASE)] = (
        "auto"
    )
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Maximum virtual, prompt and new tokens of a request, as served; default: the model's limit",
            min=2,
            rich_help_panel=BASE,
        ),
    ] = None
    generation_config: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="auto: answer with the defaults of the base's generation config, as served; none: without",
            rich_help_panel=BASE,
        ),
    ] = "auto"
    push: Annotated[
        bool,
        typer.Option("--push", help="Publish the result as alias candidate", rich_help_panel=BASE),
    ] = False
    server: ServerOption = DEFAULT_SERVER
    key: KeyOption = None
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in the directory", rich_help_panel=OUTPUT),
    ] = False
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Settings to try by successive halving: 'lr=1e-3,1e-2 length=5,16'", rich_help_panel=OUTPUT
        ),
    ] = None
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress", rich_help_panel=OUTPUT)] = False

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
        parse_task(found if options.template is None else found | {"template": options.template})
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
