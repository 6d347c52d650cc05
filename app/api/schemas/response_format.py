"""What an answer must match, in the forms of the OpenAI API (`response_format`), vLLM and TGI."""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, Tag, model_validator

from app.serving.structured_output.constraints import Constraint, ConstraintKind
from app.validation import PLAIN, StrictModel

Schema = Annotated[dict[str, Any], Field(description="JSON schema, of the keywords that llguidance supports")]
# With plain alternatives, an error would be reported for each.
SchemaOrText = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Schema, Tag("<object>")],
    Discriminator(
        lambda value: {str: "<text>", dict: "<object>"}.get(type(value)),
        custom_error_type=PLAIN,
        custom_error_message="must be a JSON schema: an object, or its text",
    ),
]


class Format(StrictModel, ABC):
    """What an answer must match; `where` is the field that holds it."""

    type: str

    @abstractmethod
    def constraint(self, where: str) -> Constraint | None:
        """Return the constraint; None: there is none."""


class TextFormat(Format):
    """Free text."""

    type: Literal["text"]

    def constraint(self, where: str) -> None:
        """Return None: the text is free."""


class JsonObjectFormat(Format):
    """Any JSON object, or one that matches a schema: llama.cpp's form (schema), or TGI's (value)."""

    type: Literal["json_object"]
    schema_: Schema | None = Field(None, alias="schema")
    value: SchemaOrText | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.schema_ is not None and self.value is not None:
            raise ValueError("schema and value mean the same; send one of them")
        return self

    def constraint(self, where: str) -> Constraint:
        """Return the schema's constraint; without one, that of an object of any fields."""
        given = next((each for each in (self.schema_, self.value) if each is not None), {"type": "object"})
        return Constraint(ConstraintKind.JSON_SCHEMA, given, where)


class NamedSchema(StrictModel):
    """A JSON schema with a name."""

    name: Annotated[str, Field(max_length=256)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = Field(None, description="Accepted and ignored: the schema is always enforced")


class JsonSchemaFormat(Format):
    """JSON that matches a schema: OpenAI's form (json_schema), or TGI's (value)."""

    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    value: NamedSchema | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.json_schema is None) == (self.value is None):
            raise ValueError('json_schema is required, as {"name": ..., "schema": ...}')
        return self

    def constraint(self, where: str) -> Constraint:
        """Return the schema's constraint."""
        given, field = (self.json_schema, "json_schema") if self.json_schema else (self.value, "value")
        assert given is not None
        return Constraint(ConstraintKind.JSON_SCHEMA, given.schema_, f"{where}.{field}.schema")


class JsonFormat(Format):
    """JSON that matches a schema, given as an object or as text: TGI's form."""

    type: Literal["json"]
    value: SchemaOrText

    def constraint(self, where: str) -> Constraint:
        """Return the schema's constraint."""
        return Constraint(ConstraintKind.JSON_SCHEMA, self.value, where)


class RegexFormat(Format):
    """Text that matches a regex as a whole: TGI's form."""

    type: Literal["regex"]
    value: str

    def constraint(self, where: str) -> Constraint:
        """Return the regex's constraint."""
        return Constraint(ConstraintKind.REGEX, self.value, where)


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat | JsonFormat | RegexFormat,
    Field(discriminator="type", title="ResponseFormat"),
]
Grammar = Annotated[JsonFormat | JsonSchemaFormat | RegexFormat, Field(discriminator="type", title="Grammar")]


class StructuredOutputs(StrictModel):
    """What the answer must match: exactly one of a choice of texts, a regex and a JSON schema."""

    choice: list[str] | None = None
    regex: str | None = None
    json_: SchemaOrText | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if [self.choice, self.regex, self.json_].count(None) != 2:
            raise ValueError("must hold exactly one of choice, regex and json")
        return self

    def constraint(self) -> Constraint:
        """Return the constraint of the one that is given."""
        if self.choice is not None:
            return Constraint(ConstraintKind.CHOICE, self.choice, "structured_outputs.choice")
        if self.regex is not None:
            return Constraint(ConstraintKind.REGEX, self.regex, "structured_outputs.regex")
        return Constraint(ConstraintKind.JSON_SCHEMA, self.json_, "structured_outputs.json")
