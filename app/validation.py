"""What all checks by pydantic share: strict types, whole sentences, bounded work for bad values."""

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, with_config
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_Shape = TypeVar("_Shape")

PLAIN = "plain"  # the type of errors whose message follows the field's name, with nothing of pydantic's


def wrong(message: str) -> PydanticCustomError:
    """Return an error of a validator; the message goes on after the field's name: `must be ...`."""
    return PydanticCustomError(PLAIN, "{message}", {"message": message})


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


def closed(shape: type[_Shape]) -> type[_Shape]:
    """Decorate a TypedDict whose documents say that it has no other fields; rows of answers are such."""
    return with_config(ConfigDict(extra="forbid"))(shape)
