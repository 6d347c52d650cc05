"""Another task's prompt to start from: of a version in a store, or of files."""

from pathlib import Path

from app.cli.training.options import TrainOptions
from app.prompt import ModelGeometry, Prompt
from app.serving.publishing.bundle import read_bundle
from app.store.importers import import_prompt
from app.store.prompt_file import read_prompt
from app.store.prompt_store import open_store
from app.training.settings import Init, TrainingSettings


def prompt_to_start_from(options: TrainOptions, geometry: ModelGeometry) -> Prompt | None:
    """Return the prompt that --init-from names; None: it isn't given.

    Raise ValueError: there is none, or a text-only task. Raise NotFound, PromptRejected.
    """
    if options.init_from is None:
        return None
    path = Path(options.init_from)
    if path.exists():
        files = read_bundle(path).files
        if not files:
            raise ValueError(
                f"--init-from: {path} holds a text-only task, so there is no prompt to start from"
            )
        return import_prompt(files, geometry).prompt
    store = open_store(options.store)
    version = store.resolve(options.init_from)
    if version.prompt_digest is None:
        raise ValueError(f"--init-from: {options.init_from} is a text-only task, so there is no prompt in it")
    return read_prompt(store.read_blob(version.prompt_digest))


def with_start(settings: TrainingSettings, options: TrainOptions, start: Prompt | None) -> TrainingSettings:
    """Return the settings with what the prompt starts from: another one, or the words of the instruction."""
    if start is not None:
        return settings.model_copy(update={"init": Init.TASK})
    if settings.init_text is None and settings.init in (None, Init.TEXT):
        return settings.model_copy(update={"init_text": options.instruction})
    return settings
