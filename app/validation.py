"""What all checks by pydantic share: strict types, whole sentences, bounded work for bad values."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, model_validator, with_config
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_Shape = TypeVar("_Shape")
_MOST_UNKNOWN = 8  # unknown fields that are reported

EXPECTED = "Input should be "  # begins most of pydantic's messages
_JSON = {"True": "true", "False": "false", "None": "null"}
_PYTHON = re.compile(r"\b(?:True|False|None)\b")
PLAIN = "plain"  # the type of errors with a message of ours that follows the field's name


def wrong(message: str) -> PydanticCustomError:
    """Return an error of a validator; the message goes on after the field's name: `must be ...`."""
    return PydanticCustomError(PLAIN, "{message}", {"message": message})


def message_of(problem: Mapping[str, Any]) -> str:
    """Return the message in terms of JSON instead of Python."""
    kind = problem["type"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return f"{EXPECTED}an object"
    if kind == "union_tag_invalid":
        tags = problem["ctx"]["expected_tags"].replace(", ", " or ")
        return f"{problem['ctx']['discriminator']} should be {tags}"
    if kind == "string_pattern_mismatch":
        return f"{EXPECTED}a whole number in decimal digits"
    if kind == "union_tag_not_found":
        return f"the field {problem['ctx']['discriminator']} is required"
    message = str(problem.get("msg", "is not valid")).removeprefix("Value error, ").rstrip(".")
    message = message.replace(" after validation", "")
    return _PYTHON.sub(lambda name: _JSON[name[0]], message) if kind == "literal_error" else message


@dataclass(frozen=True, slots=True)
class Must:
    """Annotate a type with the message for all values that don't fit, such as `must be true or false`."""

    message: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), PLAIN, custom_error_message=self.message)


def _fail_fast(schema: Any) -> None:
    """Set pydantic's own option on every list and object within a schema."""
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        schema = list(schema.values())
    for part in schema if isinstance(schema, list | tuple) else ():
        _fail_fast(part)


class StrictModel(BaseModel):
    """No unknown fields, no NaN, no "5" for 5 or "yes" for true; a whole number may stand for a float.

    The first item at fault ends the validation of its list or object, however many follow.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _fail_fast(handler.resolve_ref_schema(schema))
        return schema

    @model_validator(mode="before")
    @classmethod
    def _few_unknown(cls, data: Any) -> Any:
        """Drop unknown fields beyond the first few, which are enough to refuse all."""
        if not isinstance(data, dict) or len(data) <= len(cls.model_fields) + _MOST_UNKNOWN:
            return data
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = [name for name in data if name not in known]
        return {name: data[name] for name in (*(known & data.keys()), *unknown[:_MOST_UNKNOWN])}


def closed(shape: type[_Shape]) -> type[_Shape]:
    """Decorate a TypedDict so that its documents allow no other fields."""
    return with_config(ConfigDict(extra="forbid"))(shape)
