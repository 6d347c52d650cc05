"""What a client may set of a run, checked before anything begins."""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator, model_validator

from app.errors import Conflict, InvalidRequest, NotFound
from app.serving.parameters import check
from app.serving.program_settings import ProgramSettings
from app.serving.publishing.task_settings import parse_task
from app.store.prompt_store import PromptStore
from app.store.references import DEFAULT_ALIAS
from app.training.settings import Method, TrainingSettings
from app.validation import wrong

PARAM = "settings"
MAX_STEPS = 20_000  # each of which is a line that every look at the run reads
MAX_TEXT_BYTES = 100_000  # of a text that the command is given; the system takes 131,071
METHODS = (Method.PROMPT, Method.P_TUNING, Method.PREFIX)


class RunSettings(TrainingSettings, frozen=True):
    """The settings of a run: of the training, of the data's splits, and of the version that it makes."""

    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    task: dict[str, Any] | None = None  # as in an upload; what it leaves out is as it is live
    instruction: str | None = Field(None, max_length=65_536)  # to start from, and to compare with
    init_from: str | None = Field(None, max_length=512)  # a version of a task, whose prompt it starts from
    split_seed: int = Field(0, ge=0, lt=2**31)
    dev_share: float | None = Field(None, ge=0, le=0.5)  # None: by the size of the data
    test_share: float | None = Field(None, ge=0, le=0.5)
    publish: bool = True  # as the alias `candidate`

    @field_validator("init_text", "instruction")
    @classmethod
    def _can_be_given_to_a_command(cls, text: str | None) -> str | None:
        if text is not None and "\0" in text:
            raise wrong("must not have the character NUL")
        if text is not None and len(text.encode()) > MAX_TEXT_BYTES:
            raise wrong(f"must have at most {MAX_TEXT_BYTES} bytes as UTF-8")
        return text

    @model_validator(mode="after")
    def _one_task_alone(self) -> "RunSettings":
        """Refuse what needs more than one task's data."""
        if self.method not in METHODS:
            raise wrong(f"method must be {', '.join(METHODS)}; `promptplex train` has the others")
        return self

    @property
    def splits(self) -> dict[str, Any]:
        """Return how the data is to be split."""
        return self.model_dump(include={"split_seed", "dev_share", "test_share"})

    def for_command(self) -> dict[str, Any]:
        """Return what the command has flags for, where it differs from the defaults, as JSON has it."""
        own = {"task", "init_from", "publish"}
        return self.model_dump(mode="json", exclude=own, exclude_defaults=True, exclude_none=True)


def parse_run_settings(given: Mapping[str, Any]) -> RunSettings:
    """Check settings as they were sent. Raise InvalidRequest, which names the first field at fault."""
    return check(RunSettings, given, PARAM)


def task_part(store: PromptStore, task_id: str, settings: RunSettings) -> dict[str, Any]:
    """Return the `task` part of the version to be; what it leaves out of its settings is as it is live.

    Raise InvalidRequest, which names the first field at fault; Conflict where the task is retired;
    CorruptData, Unavailable.
    """
    part = _live_part(store, task_id) | (settings.task or {})
    try:
        parse_task(part)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param=f"{PARAM}.{error.param}") from None
    return part


def step_tasks(part: Mapping[str, Any]) -> list[str]:
    """Return references of the tasks that steps of such a version name."""
    return ProgramSettings.of(parse_task(part).program).step_tasks


def _live_part(store: PromptStore, task_id: str) -> dict[str, Any]:
    try:
        history = store.history(task_id)
        if history.retired:
            raise Conflict(f"Task {task_id!r} is retired; restore it before you train for it.")
        live = store.alias_versions(task_id, DEFAULT_ALIAS)[0]
    except NotFound:
        return {}
    part = {"template": live.template, "defaults": dict(live.defaults), "choices": list(live.choices)}
    return {name: value for name, value in (part | {**live.program}).items() if value}
