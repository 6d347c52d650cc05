"""A flag for each setting of training, made from its field, so that none can be missing."""

import inspect
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from app.cli.training.options import SELF_STUDY, TrainOptions
from app.training.settings import SelfStudySettings, TrainingSettings
from app.validation import message_of

PROMPT, OPTIMIZER, LOOKS = "Prompt", "Optimization", "Dev set"  # panels of the help
_FIRST_OF_PANEL = {
    "method": PROMPT,
    "optimizer": OPTIMIZER,
    "eval_every": LOOKS,
    "num_questions": SELF_STUDY,
}
_Settings = TypeVar("_Settings", bound=BaseModel)


def option_flags() -> list[inspect.Parameter]:
    """Return the parameters of a command for the annotated fields of its options, in their order."""
    hints = typing.get_type_hints(TrainOptions, include_extras=True)
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(TrainOptions)
        if typing.get_origin(hints[field.name]) is Annotated
    ]


def setting_flags() -> list[inspect.Parameter]:
    """Return the parameters of a command, in the order of the fields; None where a flag isn't given."""
    flags, panel = [], PROMPT
    for name, field in (TrainingSettings.model_fields | SelfStudySettings.model_fields).items():
        panel = _FIRST_OF_PANEL.get(name, panel)
        flags.append(_flag(name, field, panel))
    return flags


def parse_settings(kind: type[_Settings], given: Mapping[str, Any]) -> _Settings:
    """Check the flags that were given, of one kind. Raise ValueError that names each flag at fault."""
    try:
        return kind.model_validate(
            {
                name: value
                for name, value in given.items()
                if name in kind.model_fields and value is not None and value != []
            }
        )
    except ValidationError as error:
        raise ValueError("; ".join(map(_in_words, error.errors(include_url=False)))) from None


def _in_words(problem: Any) -> str:
    flag = f"--{str(problem['loc'][0]).replace('_', '-')}: " if problem["loc"] else ""
    return f"{flag}{message_of(problem)}"


def _flag(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    option = typer.Option(f"--{name.replace('_', '-')}", help=_help(field), rich_help_panel=panel)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_type_of(field) | None, option],
    )


def _help(field: FieldInfo) -> str:
    default = field.default.value if isinstance(field.default, Enum) else field.default
    return f"{field.description} (default {default})" if default is not None else f"{field.description}"


def _type_of(field: FieldInfo) -> Any:
    """Return the type as typer knows it: without None, and a list for a tuple."""
    if typing.get_origin(field.annotation) is typing.Literal:
        return field.annotation
    arguments = typing.get_args(field.annotation)
    found = arguments[0] if arguments else field.annotation
    if typing.get_origin(found) is not tuple:
        return found
    item = typing.get_args(found)[0]
    return types.GenericAlias(
        list, typing.get_args(item)[0] if typing.get_origin(item) is Annotated else item
    )
