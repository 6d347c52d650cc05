"""JSON that we can trust to mean one thing: strict to read, canonical to write.

Python's parser accepts duplicate keys (the last wins), NaN, and lone surrogates; other parsers of
the same bytes do not agree. What is hashed, or decides where tensors lie, is read here.
"""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

MAX_DEPTH = 32


class JsonError(ValueError):
    """Not strict JSON; the message says why, in words for the user."""


def parse_json(data: bytes, *, max_depth: int = MAX_DEPTH, naturals_only: bool = False) -> Any:
    """Parse UTF-8 JSON without duplicate keys, NaN, lone surrogates or deep nesting.

    `naturals_only` also refuses every number but 0, 1, 2, ... (what a safetensors header may hold).
    """
    try:
        text = data.decode("utf-8")
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_int=_natural if naturals_only else int,
            parse_float=_refuse_float if naturals_only else _finite,
        )
    except JsonError:
        raise
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise JsonError(f"it nests deeper than {max_depth} levels") from None
    except json.JSONDecodeError as error:
        raise JsonError(f"it is not JSON: {error.msg.removesuffix(' at')} at character {error.pos}") from None
    except ValueError:  # an integer of more digits than Python converts
        raise JsonError("a number in it is too long") from None
    _check(value, max_depth)
    return value


def canonical_json(value: Any) -> bytes:
    """The one encoding of `value`: sorted keys, no spaces, UTF-8. Raises JsonError."""
    _check(value, MAX_DEPTH)
    return encode_parsed(value)


def encode_parsed(value: Any) -> bytes:
    """The same for what `parse_json` returned, which needs no second look."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=dict
    ).encode("utf-8")


def is_one_of(given: Any, values: Iterable[Any]) -> bool:
    """Whether `given` is among the values as JSON has them: in Python, True is 1 and False is 0."""
    return any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in values)


def excerpt(text: str, limit: int = 80) -> str:
    """A piece of foreign text, safe and short enough for a message."""
    shown = ascii(text)
    return shown if len(shown) <= limit else shown[:limit] + "...'"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise JsonError(f"the key {excerpt(key)} appears twice")
        result[sys.intern(key)] = value  # thousands of manifests have the same ones
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise JsonError(f"it holds {name}, which is not JSON")


def _refuse_float(text: str) -> NoReturn:
    raise JsonError(f"it holds {excerpt(text)} where only whole numbers may stand")


def _natural(text: str) -> int:
    if not text.isdigit() or len(text) > 18:
        raise JsonError(f"it holds {excerpt(text)} where a non-negative 64-bit integer must stand")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise JsonError(f"the number {excerpt(text)} is out of range")
    return value


def _check(value: Any, max_depth: int) -> None:
    """Walk without recursion: depth, key types, value types, text that UTF-8 can hold."""
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if depth > max_depth:
            raise JsonError(f"it nests deeper than {max_depth} levels")
        if isinstance(item, Mapping):
            for key in item:
                _check_text(key)
            pending.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, list | tuple):
            pending.extend((child, depth + 1) for child in item)
        else:
            _check_scalar(item)


def _check_scalar(item: Any) -> None:
    if isinstance(item, str):
        _check_text(item)
    elif isinstance(item, float):
        if not math.isfinite(item):
            raise JsonError("it holds a number that is not finite")
    elif isinstance(item, int):
        if abs(item) >= 2**63:
            raise JsonError("it holds a whole number of more than 63 bits")
    elif item is not None:
        raise JsonError(f"it holds a {type(item).__name__}, which JSON can't express")


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        raise JsonError(f"it has a key of type {type(text).__name__}; keys are text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise JsonError("it holds half of a surrogate pair") from None
