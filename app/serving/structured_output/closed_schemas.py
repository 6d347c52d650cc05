"""Close the objects of JSON schemas: no keys but those that are named, unless a schema says so.

What several schemas say of one object (`allOf`, the target of a `$ref`, an alternative of `anyOf`) counts
together: each of them takes the keys that the others name, so that all can be closed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_WORK = 100_000  # schemas and names of a document, each counted wherever it is looked at or written

_SAYS_SO = ("additionalProperties", "unevaluatedProperties")
_ALTERNATIVES = ("anyOf", "oneOf")
_MAPS = ("properties", "patternProperties")
_ELEMENTS = ("items", "prefixItems", "additionalItems", "additionalProperties")
_REPLACED = ("$defs", "definitions", "$ref", "allOf", *_ALTERNATIVES)

Target = Callable[[Any], Any]  # where a `$ref` leads


class TooMuchToClose(ValueError):
    """Closing would take more than MAX_WORK."""


@dataclass(frozen=True, slots=True)
class _Names:
    """Keys that are named for one object, and patterns of keys, in order."""

    keys: dict[str, None] = field(default_factory=dict)
    patterns: dict[str, None] = field(default_factory=dict)
    is_open: bool = False  # any other key was asked for

    def __or__(self, other: "_Names") -> "_Names":
        return _Names(self.keys | other.keys, self.patterns | other.patterns, self.is_open or other.is_open)

    def __len__(self) -> int:
        return len(self.keys) + len(self.patterns)


_NO_NAMES = _Names()


def closed(root: Mapping[str, Any], target: Target) -> dict[str, Any]:
    """Return the schema with its objects closed; `target` finds what a `$ref` leads to.

    An object that names no properties stays open, and so does one of which a schema has
    `additionalProperties` other than false.

    Raise TooMuchToClose where the document refers to its parts too often, and RecursionError where it is
    nested too deeply.
    """
    return _Closing(target).document(root)


class _Closing:
    """Copies a document; its references lead to definitions of its own, one for each set of names beside."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._work = 0
        self._definitions: dict[str, Any] = {}
        self._known: dict[tuple[Any, ...], str] = {}

    def document(self, root: Mapping[str, Any]) -> dict[str, Any]:
        """Return the copy."""
        written: dict[str, Any] = self._copy(root)
        return written | {"$defs": self._definitions} if self._definitions else written

    def _copy(self, schema: Any, around: _Names = _NO_NAMES) -> Any:
        """Return the copy of one schema; `around` are the names that others of the same object give."""
        if not isinstance(schema, Mapping):
            return schema
        always = around | self._own(schema) | self._names_of(_conjuncts(schema, self._target))
        choices = {word: self._names_of(_list(schema, word)) for word in _ALTERNATIVES}
        every = always | choices["anyOf"] | choices["oneOf"]
        written = {word: self._part(word, value) for word, value in schema.items() if word not in _REPLACED}
        if "$ref" in schema:
            written["$ref"] = self._reference(self._target(schema["$ref"]), every)
        if "allOf" in schema:
            written["allOf"] = self._copies(schema["allOf"], every)
        for word, other in (("anyOf", "oneOf"), ("oneOf", "anyOf")):
            if word in schema:
                written[word] = self._copies(schema[word], always | choices[other])
        return self._close(written, every) if _is_to_close(schema, every) else written

    def _copies(self, schemas: Any, around: _Names) -> Any:
        return [self._copy(each, around) for each in schemas] if isinstance(schemas, list) else schemas

    def _part(self, word: str, value: Any) -> Any:
        """Return the copy of a keyword's value, in which each schema is of an object of its own."""
        if word in _MAPS and isinstance(value, Mapping):
            return {name: self._copy(each) for name, each in value.items()}
        if word in _ELEMENTS:
            return self._copies(value, _NO_NAMES) if isinstance(value, list) else self._copy(value)
        return value

    def _reference(self, target: Any, around: _Names) -> str:
        self._spend(len(around))
        key = (id(target), around.is_open, *around.keys, None, *around.patterns)
        if key not in self._known:
            name = self._known[key] = str(len(self._known))
            self._definitions[name] = self._copy(target, around)
        return f"#/$defs/{self._known[key]}"

    def _close(self, written: dict[str, Any], names: _Names) -> dict[str, Any]:
        """Add every name, with any value: what it may be is said where it is named."""
        self._spend(len(names))
        for word, every in zip(_MAPS, (names.keys, names.patterns), strict=True):
            own = written.get(word, {})
            if isinstance(own, Mapping) and every:
                written[word] = {**own, **dict.fromkeys((name for name in every if name not in own), True)}
        return written | {"additionalProperties": False}

    def _names_of(self, schemas: Iterable[Any]) -> _Names:
        """Return all names that these schemas, and those they are made of, give for their object."""
        names, waiting, seen = _NO_NAMES, [*schemas], set[int]()
        while waiting:
            schema = waiting.pop()
            if isinstance(schema, Mapping) and id(schema) not in seen:
                seen.add(id(schema))
                waiting += _conjuncts(schema, self._target)
                waiting += [*_list(schema, "anyOf"), *_list(schema, "oneOf")]
                names = self._own(schema) | names
                self._spend(len(names))
        return names

    def _own(self, schema: Mapping[str, Any]) -> _Names:
        self._spend(1)
        required = [name for name in _list(schema, "required") if isinstance(name, str)]
        keys, patterns = (schema.get(word) for word in _MAPS)
        return _Names(
            dict.fromkeys([*(keys if isinstance(keys, Mapping) else ()), *required]),
            dict.fromkeys(patterns if isinstance(patterns, Mapping) else ()),
            any(schema.get(word, False) is not False for word in _SAYS_SO),
        )

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MAX_WORK:
            raise TooMuchToClose


def _is_to_close(schema: Mapping[str, Any], names: _Names) -> bool:
    names_some = any(word in schema for word in _MAPS)
    return names_some and not names.is_open and not any(word in schema for word in _SAYS_SO)


def _conjuncts(schema: Mapping[str, Any], target: Target) -> list[Any]:
    """Return the schemas that hold for the same object in any case."""
    referred = [target(schema["$ref"])] if "$ref" in schema else []
    return [*_list(schema, "allOf"), *referred]


def _list(schema: Mapping[str, Any], word: str) -> list[Any]:
    value = schema.get(word)
    return value if isinstance(value, list) else []
