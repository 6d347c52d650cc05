"""Restaurant records in the manner of the E2E data (Novikova et al. 2017), and records of people.

``name[The Eagle], food[Italian], area[riverside]`` becomes ``The Eagle is an Italian restaurant in the
riverside area.`` All of it is made here, nothing copied. Every value of the record appears literally in the
text, which makes slot coverage countable.
"""

from __future__ import annotations

import random

from demo.recipes import lexicon
from demo.recipes.names import invented_word, known_place_name, person_name, place_name
from demo.recipes.splits import Example

# field -> how often a record has it (``name`` always).
_FIELDS: dict[str, float] = {
    "type": 0.6,
    "food": 0.7,
    "price": 0.5,
    "area": 0.6,
    "near": 0.3,
    "rating": 0.35,
    "kids": 0.3,
}


def restaurant(rng: random.Random) -> Example:
    """Answers: ``describe``, ``advert``, and one per field that is there (``record_name`` ...)."""
    record = {"name": place_name(rng)}
    while len(record) < 2:
        record |= {key: _value(rng, key) for key, share in _FIELDS.items() if rng.random() < share}
    answers = {"describe": describe(record), "advert": advert(record)}
    answers |= {f"record_{key}": value for key, value in record.items()}
    return Example("record", _render(rng, record), record["name"], answers, tuple(record.values()))


def _value(rng: random.Random, key: str) -> str:
    if key == "near":
        return known_place_name(rng)
    if key in ("food", "area") and rng.random() < 0.15:
        return invented_word(rng) if rng.random() < 0.7 else rng.choice(lexicon.CITIES)
    return rng.choice(
        {
            "type": lexicon.TYPES,
            "food": lexicon.FOODS,
            "price": lexicon.PRICES,
            "area": lexicon.AREAS,
            "rating": lexicon.RATINGS,
            "kids": lexicon.KIDS,
        }[key]
    )


def _render(rng: random.Random, record: dict[str, str]) -> str:
    """Half of the records keep the usual order of fields; in the others only the name stays first."""
    keys = list(record)
    if rng.random() < 0.5:
        tail = keys[1:]
        rng.shuffle(tail)
        keys = ["name", *tail]
    return ", ".join(f"{key}[{record[key]}]" for key in keys)


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiouAEIOU" else f"a {phrase}"


def _kind(record: dict[str, str]) -> str:
    words = [record[key] for key in ("price", "food") if key in record]
    return " ".join([*words, record.get("type", "restaurant")])


def _where(record: dict[str, str]) -> str:
    area = f" in the {record['area']} area" if "area" in record else ""
    return area + (f" near {record['near']}" if "near" in record else "")


def describe(record: dict[str, str]) -> str:
    """The plain style: one sentence, then the rating and whether children are welcome."""
    text = f"{record['name']} is {_with_article(_kind(record))}{_where(record)}."
    if "rating" in record:
        text += f" Its rating is {record['rating']}."
    return text + (f" Children are {record['kids']}." if "kids" in record else "")


def advert(record: dict[str, str]) -> str:
    """The inviting style of the same facts."""
    text = f"Come to {record['name']}, your {_kind(record)}{_where(record)}!"
    if "rating" in record:
        text += f" Guests say: {record['rating']}."
    return text + (f" Children are {record['kids']}!" if "kids" in record else "")


def person(rng: random.Random) -> Example:
    """A record of a person; answers: ``describe`` and ``record_name``."""
    name, job, city = person_name(rng), rng.choice(lexicon.JOBS), rng.choice(lexicon.CITIES)
    record = {"name": name, "job": job, "city": city, "age": str(rng.randint(18, 89))}
    for key in ("city", "age"):
        if rng.random() < 0.4:
            del record[key]
    text = f"{name} is {_with_article(job)}"
    text += f" from {record['city']}." if "city" in record else "."
    text += f" {name} is {record['age']} years old." if "age" in record else ""
    answers = {"describe": text, "record_name": name, "record_job": job}
    return Example("record", _render(rng, record), name, answers, tuple(record.values()))
