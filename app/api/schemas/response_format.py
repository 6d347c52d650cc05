"""What an answer must be, in OpenAI's words (`response_format`), vLLM's and TGI's."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from app.api.schemas.bodies import Body
from app.serving.structured_output.constraints import Constraint, ConstraintKind
from app.validation import PLAIN

Schema = Annotated[dict[str, Any], Field(description="A JSON schema, within what llguidance knows")]
# With plain alternatives, an error would be told of each.
SchemaOrText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Schema, Tag("<object>")],
    Discriminator(
        lambda value: {str: "<text>", dict: "<object>"}.get(type(value)),
        custom_error_type=PLAIN,
        custom_error_message="must be a JSON schema: an object, or its text",
    ),
]


class _Format(Body, ABC):
    """What an answer is to be; `where` is the field that holds it."""

    @abstractmethod
    def constraint(self, where: str) -> Constraint | None:
        """What binds the answer."""


class TextFormat(_Format):
    """Free text, as without a format."""

    type: Literal["text"]

    def constraint(self, where: str) -> None:
        """None."""


class JsonObjectFormat(_Format):
    """Any JSON object, or one that a schema describes: llama.cpp's field, or TGI's."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")
    value: SchemaOrText | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.schema_ is not None and self.value is not None:
            raise ValueError("schema and value mean the same; send one of them")
        return self

    def constraint(self, where: str) -> Constraint:
        """An object of any fields, where nothing describes it."""
        given = next((each for each in (self.schema_, self.value) if each is not None), {"type": "object"})
        return Constraint(ConstraintKind.JSON_SCHEMA, given, where)


class NamedSchema(Body):
    """A schema, and what the client calls it."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = Field(None, description="Taken, and left alone: the schema always holds")


class JsonSchemaFormat(_Format):
    """JSON that a schema describes: in OpenAI's field, or in TGI's."""

    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    value: NamedSchema | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.json_schema is None) == (self.value is None):
            raise ValueError('json_schema is required, as {"name": ..., "schema": ...}')
        return self

    def constraint(self, where: str) -> Constraint:
        """What the schema describes."""
        given, field = (self.json_schema, "json_schema") if self.json_schema else (self.value, "value")
        assert given is not None
        return Constraint(ConstraintKind.JSON_SCHEMA, given.schema_, f"{where}.{field}.schema")


class JsonFormat(_Format):
    """A JSON schema, as an object or as text; TGI's."""

    type: Literal["json"]
    value: SchemaOrText

    def constraint(self, where: str) -> Constraint:
        """What the schema describes."""
        return Constraint(ConstraintKind.JSON_SCHEMA, self.value, where)


class RegexFormat(_Format):
    """A regex that the whole answer matches; TGI's."""

    type: Literal["regex"]
    value: str

    def constraint(self, where: str) -> Constraint:
        """What the regex describes."""
        return Constraint(ConstraintKind.REGEX, self.value, where)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonFormat | RegexFormat,
    Field(discriminator="type", title="ResponseFormat"),
]
Grammar = Annotated[JsonFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type", title="Grammar")]


class StructuredOutputs(Body):
    """Exactly one of these."""

    choice: list[str] | None = None
    regex: str | None = None
    json_: SchemaOrText | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if [self.choice, self.regex, self.json_].count(None) != 2:
            raise ValueError("must hold exactly one of choice, regex and json")
        return self

    def constraint(self) -> Constraint:
        """The one that is given."""
        if self.choice is not None:
            return Constraint(ConstraintKind.CHOICE, self.choice, "structured_outputs.choice")
        if self.regex is not None:
            return Constraint(ConstraintKind.REGEX, self.regex, "structured_outputs.regex")
        return Constraint(ConstraintKind.JSON_SCHEMA, self.json_, "structured_outputs.json")
