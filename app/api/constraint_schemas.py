"""What an answer must be, in OpenAI's words (`response_format`), vLLM's and TGI's."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.serving.constraints import Constraint, ConstraintKind

_STRICT = ConfigDict(extra="forbid", strict=True)

Schema = Annotated[dict[str, Any], Field(description="A JSON schema, within what llguidance knows")]


class TextFormat(BaseModel):
    """Free text, as without a format."""

    model_config = _STRICT

    type: Literal["text"]

    def constraint(self) -> Constraint | None:
        """None."""
        return None


class JsonObjectFormat(BaseModel):
    """Any JSON object."""

    model_config = _STRICT

    type: Literal["json_object"]

    def constraint(self) -> Constraint | None:
        """An object of any fields."""
        return Constraint(ConstraintKind.JSON_SCHEMA, {"type": "object"}, "response_format")


class NamedSchema(BaseModel):
    """A schema, and what the client calls it."""

    model_config = _STRICT

    name: Annotated[str, Field(max_length=256)]
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = Field(None, description="Taken, and left alone: the schema always holds")


class JsonSchemaFormat(BaseModel):
    """JSON that a schema describes."""

    model_config = _STRICT

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def constraint(self) -> Constraint | None:
        """What the schema describes."""
        return Constraint(
            ConstraintKind.JSON_SCHEMA, self.json_schema.schema_, "response_format.json_schema.schema"
        )


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type", title="ResponseFormat")
]


class StructuredOutputs(BaseModel):
    """Exactly one of these."""

    model_config = _STRICT

    choice: list[str] | None = None
    regex: str | None = None
    json_: Schema | str | None = Field(None, alias="json")

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


class GrammarSchema(BaseModel):
    """TGI's named schema."""

    model_config = _STRICT

    name: Annotated[str, Field(max_length=256)] | None = None
    schema_: Schema = Field(alias="schema")


class JsonGrammar(BaseModel):
    """A JSON schema, as an object or as text."""

    model_config = _STRICT

    type: Literal["json"]
    value: Schema | str

    def constraint(self) -> Constraint:
        """What the schema describes."""
        return Constraint(ConstraintKind.JSON_SCHEMA, self.value, "parameters.grammar")


class JsonSchemaGrammar(BaseModel):
    """A JSON schema with a name."""

    model_config = _STRICT

    type: Literal["json_schema"]
    value: GrammarSchema

    def constraint(self) -> Constraint:
        """What the schema describes."""
        return Constraint(ConstraintKind.JSON_SCHEMA, self.value.schema_, "parameters.grammar")


class RegexGrammar(BaseModel):
    """A regex that the whole answer matches."""

    model_config = _STRICT

    type: Literal["regex"]
    value: str

    def constraint(self) -> Constraint:
        """What the regex describes."""
        return Constraint(ConstraintKind.REGEX, self.value, "parameters.grammar")


Grammar = Annotated[
    JsonGrammar | JsonSchemaGrammar | RegexGrammar, Field(discriminator="type", title="Grammar")
]
