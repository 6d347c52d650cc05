"""`promptplex train`: from a file of examples to a prompt, measured, and ready to go live."""

import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from app.cli.server import DEFAULT_SERVER, KeyOption, ServerOption
from app.cli.training.flags import SELF_STUDY, parse_settings, setting_flags
from app.cli.training.options import TrainOptions, check_options, data_of_tasks
from app.settings import Settings
from app.training.settings import SelfStudySettings, TrainingSettings

_NEEDED = ("matplotlib", "rich")
_RUNS, _SEVERAL = Path("runs"), "multitask"
_INTERRUPTED = 130  # exit status, as shells have it
_DATA, _OUTPUT, _BASE = "Data and task", "Output", "Base and server"  # panels of the help


def train(
    data: Annotated[
        list[Path] | None,
        typer.Argument(
            help="JSONL or CSV with inputs and output, prompt and completion, text and label, or messages; "
            "or a directory with train, dev and test. For --method multitask the NAME=PATH of each task",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task id; several tasks have it before their data", rich_help_panel=_DATA),
    ] = None,
    document: Annotated[
        Path | None,
        typer.Option(
            help="Text file that a cartridge is made of, in place of data; with --method cartridge",
            rich_help_panel=SELF_STUDY,
        ),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            help="Questions about the document: a .txt file with one a line, or JSONL of inputs or messages; "
            "default: the base makes them",
            rich_help_panel=SELF_STUDY,
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            help="Input template, such as $'Review: {text}\\nSentiment:'; default: the text and a line break",
            rich_help_panel=_DATA,
        ),
    ] = None,
    task_file: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with template, defaults, choices, examples, notes, as for push",
            rich_help_panel=_DATA,
        ),
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Instruction in words: the prompt starts from it, and is compared with it",
            rich_help_panel=_DATA,
        ),
    ] = None,
    dev_share: Annotated[
        float | None,
        typer.Option(
            help="Share of one file that is held out to choose the best step; default: by its size",
            min=0,
            max=0.5,
            rich_help_panel=_DATA,
        ),
    ] = None,
    test_share: Annotated[
        float | None,
        typer.Option(
            help="Share of one file that is held out to measure the result; default: by its size",
            min=0,
            max=0.5,
            rich_help_panel=_DATA,
        ),
    ] = None,
    split_seed: Annotated[
        int, typer.Option(help="Another seed holds out other lines", min=0, rich_help_panel=_DATA)
    ] = 0,
    init_from: Annotated[
        str | None,
        typer.Option(
            help="Prompt to start from: task@version of --store, or a directory or file as for push",
            rich_help_panel=_DATA,
        ),
    ] = None,
    store: Annotated[
        Path, typer.Option(help="Store in which --init-from looks for a task", rich_help_panel=_DATA)
    ] = Settings.model_fields["store"].default,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: a directory or hub id; default: the server's, else the demo's",
            envvar="PROMPTPLEX_MODEL",
            rich_help_panel=_BASE,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype in which answers are generated, as served: float32, bfloat16, float16 or auto",
            rich_help_panel=_BASE,
        ),
    ] = "auto",
    device: Annotated[
        str, typer.Option(help="Device: auto, cpu, cuda or cuda:N", rich_help_panel=_BASE)
    ] = "auto",
    max_context: Annotated[
        int | None,
        typer.Option(
            help="Maximum virtual, prompt and new tokens of a request, as served; default: the model's limit",
            min=2,
            rich_help_panel=_BASE,
        ),
    ] = None,
    generation_config: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="auto: answer with the defaults of the base's generation config, as served; none: without",
            rich_help_panel=_BASE,
        ),
    ] = "auto",
    push: Annotated[
        bool,
        typer.Option("--push", help="Publish the result as alias candidate", rich_help_panel=_BASE),
    ] = False,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the run; default: runs/TASK, of several tasks runs/multitask",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in the directory", rich_help_panel=_OUTPUT),
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(
            help="Settings to try by successive halving: 'lr=1e-3,1e-2 length=5,16'", rich_help_panel=_OUTPUT
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress", rich_help_panel=_OUTPUT)] = False,
    **settings: Any,
) -> None:
    """Train a prompt on the frozen base, measure it on held-out examples, and push it.

    Without further options the data is split, a prefix of 16 tokens is trained, and its accuracy is compared
    with the bare base. The directory of the run has a report.
    """
    _check_extra()
    tasks = data_of_tasks(task, data or ())
    options = TrainOptions(
        data=tasks,
        document=document,
        questions=questions,
        self_study=parse_settings(SelfStudySettings, settings),
        model=model,
        out=out or _RUNS / (task or _SEVERAL),
        resume=resume,
        template=template,
        instruction=instruction,
        task_file=task_file,
        init_from=init_from,
        store=store,
        split_seed=split_seed,
        dev_share=dev_share,
        test_share=test_share,
        sweep=sweep,
        push=push,
        server=server,
        key=key,
        quiet=quiet,
        dtype=dtype,
        device=device,
        max_context=max_context,
        generation_config=generation_config,
    )
    run_settings = parse_settings(TrainingSettings, settings)
    check_options(options, run_settings)
    from app.cli.training.running import train_and_tell  # brings torch, which takes seconds

    try:
        train_and_tell(options, run_settings)
    except KeyboardInterrupt:
        raise typer.Exit(_INTERRUPTED) from None


def _check_extra() -> None:
    """Raise ValueError where the packages of the extra are missing."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"training needs {' and '.join(missing)}; run: pip install 'promptplex[train]'")


def register(cli: typer.Typer) -> None:
    """Add the command; its settings' flags are made from the settings."""
    command: Any = train
    own = [each for each in inspect.signature(train).parameters.values() if each.name != "settings"]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own] + setting_flags()
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    cli.command("train")(command)
