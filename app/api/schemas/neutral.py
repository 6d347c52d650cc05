"""Fields that clients send though they are not supported: taken at the values that change nothing."""

from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from app.strict_json import is_one_of
from app.validation import wrong


class Neutral:
    """Of an annotated `Any`: null, or one of these values; all else is refused with what to do instead."""

    def __init__(self, *values: Any, instead: str = "leave it out") -> None:
        self._values = [None, *values]
        self._instead = instead

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"enum": self._values}

    def _check(self, given: Any) -> Any:
        if not is_one_of(given, self._values):
            raise wrong(f"is not supported; {self._instead}")
        return given
