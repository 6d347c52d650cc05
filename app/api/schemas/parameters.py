"""Request bodies that hold generation parameters; their fields are derived from the declarations."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import create_model, model_validator

from app.serving.parameters import DECLARED, Declaration
from app.validation import StrictModel

_Model = TypeVar("_Model", bound="ParametersBody")
OTHER_NAMES = {each.also: name for name, each in DECLARED.items() if each.also is not None}
_SAME = {name: each.same for name, each in DECLARED.items() if each.same}


class ParametersBody(StrictModel):
    """A body with generation parameters; absent ones, or null, come from the task, else from the base."""

    @model_validator(mode="before")
    @classmethod
    def _by_one_name(cls, data: Any) -> Any:
        """Each parameter by our name, with our values."""
        if not isinstance(data, dict):
            return data
        for other, name in OTHER_NAMES.items():
            if data.get(other) is not None and data.get(name) is not None:
                raise ValueError(f"{other} and {name} mean the same; send one of them")
        renamed = {name: value for name, value in data.items() if name not in OTHER_NAMES}
        renamed |= {name: data[other] for other, name in OTHER_NAMES.items() if data.get(other) is not None}
        for name in _SAME.keys() & renamed.keys():
            for other, value in _SAME[name].items():
                if renamed[name] == other:
                    renamed[name] = value
        return renamed

    def given(self) -> dict[str, Any]:
        """Return the declared parameters that are set, by name."""
        fields = self.model_fields_set & DECLARED.keys()  # what is absent is None
        return {name: value for name in fields if (value := getattr(self, name)) is not None}


def with_parameters(
    wanted: Callable[[Declaration], bool] = lambda each: True, **changes: dict[str, Any]
) -> Callable[[type[_Model]], type[_Model]]:
    """Add a field to a model for each declared parameter that is `wanted` and that it doesn't have itself.

    `changes` are arguments of `pydantic.Field` that differ from the declaration, by parameter.
    """

    def add(model: type[_Model]) -> type[_Model]:
        fields: dict[str, Any] = {
            name: each.model_field(**changes.get(name, {}))
            for name, each in DECLARED.items()
            if wanted(each) and name not in model.model_fields
        }
        return create_model(
            model.__name__, __base__=model, __module__=model.__module__, __doc__=model.__doc__, **fields
        )

    return add
