"""How a prompt was trained, as its uploader states it: provenance, no part of a version's identity."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from app.validation import Must, StrictModel, wrong

MAX_NAME_CHARS = 128
MAX_SETTINGS = 64
MAX_SETTING_CHARS = 1024
MAX_CURVES = 16
MAX_POINTS = 200  # of one curve

_SHA256 = r"^[0-9a-f]{64}$"
_Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
_Count = Annotated[int, Field(ge=0, lt=2**53)]
_Setting = Annotated[
    str | int | float | bool | None,
    Must(f"must be a string of at most {MAX_SETTING_CHARS} characters, a number, true, false or null"),
]
_Digest = Annotated[str, Field(pattern=_SHA256), Must("must be a sha256 as 64 hex digits in lower case")]


class Curve(StrictModel):
    """Values over the steps of a run."""

    steps: list[_Count] = Field(max_length=MAX_POINTS)
    values: list[float] = Field(max_length=MAX_POINTS)

    @model_validator(mode="after")
    def _is_a_function(self) -> Self:
        if len(self.steps) != len(self.values):
            raise wrong("must have as many values as steps")
        if any(one >= other for one, other in zip(self.steps, self.steps[1:], strict=False)):
            raise wrong("must have steps in rising order")
        return self


class TrainingRecord(StrictModel):
    """The `training` object of a `task` part: enough to do the run again, and to plot it."""

    method: _Name
    settings: dict[_Name, _Setting] = Field({}, max_length=MAX_SETTINGS)
    data_sha256: _Digest | None = None
    num_examples: dict[_Name, _Count] = Field({}, max_length=8)  # by split
    seed: _Count | None = None
    steps: _Count | None = None
    best_step: _Count | None = None
    seconds: float | None = Field(None, ge=0)
    code: dict[_Name, _Name] = Field({}, max_length=8)  # versions of what trained it; `git`: the commit
    base_fingerprint: _Digest | None = None
    curves: dict[_Name, Curve] = Field({}, max_length=MAX_CURVES)

    @model_validator(mode="after")
    def _settings_are_short(self) -> Self:
        if any(len(value) > MAX_SETTING_CHARS for value in self.settings.values() if isinstance(value, str)):
            raise wrong(f"has a setting of more than {MAX_SETTING_CHARS} characters")
        return self

    def as_json(self) -> dict[str, Any]:
        """Return what was given."""
        return self.model_dump(exclude_unset=True)
