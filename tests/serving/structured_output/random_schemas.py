"""Random JSON schemas whose answers are bounded, so that any model ends them in time."""

import random
from typing import Any

Schema = dict[str, Any]

_TEXTS = ["cold", "great food", "漢字", "🙂", 'say "hi"', "back\\slash", "é", ""]
_PATTERNS = ["^[a-z]{2,6}$", "^(漢|字|🙂){1,3}$", "^[A-Z][0-9]{1,3}$", "^(yes|no)$", "^\\d{4}-\\d{2}$"]


def random_schema(rng: random.Random, depth: int = 3, room: int = 150) -> Schema:
    """A schema whose answers take about `room` bytes at most."""
    if depth == 3 and rng.random() < 0.1:
        return _with_definitions(rng)
    if depth == 0 or room < 40 or rng.random() < 0.3:
        return _leaf(rng, room)
    return rng.choice([_object, _array, _any_of])(rng, depth, room)


def _leaf(rng: random.Random, room: int) -> Schema:
    makers = [_integer, _string, _enum, _const, _pattern]
    if room > 60:
        makers.append(_number)
    simple = [{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}]
    return rng.choice(simple) if rng.random() < 0.2 else rng.choice(makers)(rng, room)


def _integer(rng: random.Random, room: int) -> Schema:
    low = rng.randint(-1000, 1000)
    bounds = {"minimum": low, "maximum": low + rng.randint(0, 5000)}
    if rng.random() < 0.3:
        bounds = {"exclusiveMinimum": low - 1, "exclusiveMaximum": low + 2 + rng.randint(0, 99)}
    return {"type": "integer", **bounds}


def _number(rng: random.Random, room: int) -> Schema:
    """Decimals have no bound of their own; steps give them one, such as binary fractions hold exactly."""
    low = rng.randint(-50, 50)
    step = rng.choice([0.5, 0.25, 0.125])
    return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 9), "multipleOf": step}


def _string(rng: random.Random, room: int) -> Schema:
    most = rng.randint(0, max(1, min(8, room // 8)))
    return {"type": "string", "minLength": rng.randint(0, most), "maxLength": most}


def _pattern(rng: random.Random, room: int) -> Schema:
    return {"type": "string", "pattern": rng.choice(_PATTERNS)}


def _enum(rng: random.Random, room: int) -> Schema:
    values = [*_TEXTS, 1, -2.5, True, None, [1, "a"], {"k": "v"}]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _const(rng: random.Random, room: int) -> Schema:
    return {"const": rng.choice([*_TEXTS, 17, -0.5, False, None, ["a", None], {"x": {"y": [1, 2]}}])}


def _object(rng: random.Random, depth: int, room: int) -> Schema:
    names = rng.sample(["name", "age", "価格", "ok", 'a "b"', "list", "🙂"], rng.randint(0, 4))
    share = room // max(len(names), 1) - 14
    properties = {name: random_schema(rng, depth - 1, share) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(rng: random.Random, depth: int, room: int) -> Schema:
    most = rng.randint(0, 4)
    item = random_schema(rng, depth - 1, room // max(most, 1) - 4)
    if rng.random() < 0.25:
        items = [random_schema(rng, 0, room // 3) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": rng.randint(0, 2)}
    return {"type": "array", "items": item, "minItems": rng.randint(0, most), "maxItems": most}


def _any_of(rng: random.Random, depth: int, room: int) -> Schema:
    return {"anyOf": [random_schema(rng, depth - 1, room) for _ in range(rng.randint(2, 3))]}


def _with_definitions(rng: random.Random) -> Schema:
    """A schema that refers to its own parts, also from within one."""
    leaf = _leaf(rng, 30)
    return {
        "$defs": {"leaf": leaf, "pair": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2}},
        "type": "object",
        "properties": {"first": {"$ref": "#/$defs/leaf"}, "pair": {"$ref": "#/$defs/pair"}},
        "required": ["first", "pair"],
        "additionalProperties": False,
    }
