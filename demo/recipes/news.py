"""Short news: four to eight sentences around one key event, answered by headline, lead, who, when, where.

The key event is what somebody *did* in a city; the other sentences give background, other people and other
times, so that no answer is found by the kind of its words alone. The reader can tell: only the key
event is in one of the verbs of ``_EVENTS``.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from demo.recipes import lexicon
from demo.recipes.names import invented_word
from demo.recipes.splits import Example

# (what happened, the same in a headline) -> to or with what.
_EVENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("opened", "opens"): lexicon.phrases(
        "a new library | a small museum | a school for cooks | a bakery | a swimming pool | a bicycle shop"
        " | a theatre for children | a free clinic | an animal shelter"
    ),
    ("won", "wins"): lexicon.phrases(
        "the chess final | the city marathon | a prize for poetry | the baking contest | the swimming cup"
        " | a medal for bravery | the piano contest | the boat race | a golden trophy"
    ),
    ("bought", "buys"): lexicon.phrases(
        "the old theatre | a hotel by the lake | a football club | an empty factory | a famous painting"
        " | the last cinema | a small island | a castle"
    ),
    ("found", "finds"): lexicon.phrases(
        "a lost painting | a box of gold coins | a Roman ring | a rare frog | an old map | a hidden tunnel"
        " | a stolen violin | the bones of a whale"
    ),
    ("rescued", "rescues"): lexicon.phrases(
        "two hikers | a family of ducks | a lost dog | three sailors | a horse | a young climber"
        " | five students | an old fisherman"
    ),
    ("designed", "designs"): lexicon.phrases(
        "a glass bridge | a solar car | a tower of wood | a silent train | a house for birds | a paper boat"
    ),
    ("sold", "sells"): lexicon.phrases(
        "a rare stamp | a collection of clocks | the family farm | a silver guitar | a painted van"
        " | an old lighthouse"
    ),
    ("broke", "breaks"): lexicon.phrases(
        "the record for juggling | the record for long swims | the national rowing record"
        " | the record for the tallest cake"
    ),
    ("built", "builds"): lexicon.phrases(
        "a boat from bottles | a wooden tower | a garden on a roof | a robot that paints | a house of straw"
        " | a tiny railway"
    ),
    ("planted", "plants"): lexicon.phrases(
        "500 trees | a rose garden | a field of sunflowers | 90 apple trees | a small forest"
    ),
    ("published", "publishes"): lexicon.phrases(
        "a book about bees | a map of the stars | a history of tea | a guide to old trains"
        " | 100 letters from soldiers"
    ),
    ("repaired", "repairs"): lexicon.phrases(
        "the town clock | a broken bell | the old harbour | a church organ | a stone bridge"
    ),
}
_MOODS = lexicon.words("happy surprised proud calm glad silent")
_JUDGEMENTS = lexicon.phrases("a great day | long awaited | worth the wait | a lot of work | good news")
_PARTS_OF_DAY = lexicon.words("morning afternoon evening night")
_BACKGROUND: tuple[Callable[[random.Random], str], ...] = (
    lambda rng: f"{person(rng)} said that it was {rng.choice(_JUDGEMENTS)}.",
    lambda rng: f"{person(rng)} will visit {_city(rng)} {time(rng)}.",
    lambda rng: f"{person(rng)}, {_job(rng)}, was there {time(rng)}.",
    lambda rng: f"The mayor of {_city(rng)} was {rng.choice(_MOODS)}.",
    lambda rng: f"Many people in {_city(rng)} talked about it {time(rng)}.",
    lambda rng: f"Tickets cost {rng.randint(2, 90)} dollars.",
    lambda rng: f"Neighbours had waited for {rng.randint(2, 40)} years.",
    lambda rng: f"Rain is expected {time(rng)}.",
    lambda rng: f"A party is planned {time(rng)}.",
    lambda rng: f"The work took {rng.randint(2, 30)} months.",
    lambda rng: f"Nobody was hurt, said {person(rng)}.",
    lambda rng: f"{person(rng)} hopes to come back {time(rng)}.",
    lambda rng: f"A crowd of {rng.randint(20, 900)} watched.",
    lambda rng: f"The story began in {_city(rng)}.",
)


def article(rng: random.Random) -> Example:
    """Answers: ``headline``, ``lead``, ``who``, ``when``, ``where``. The headline is the key of its split."""
    who, when, where = person(rng), time(rng), _city(rng)
    (past, present), things = rng.choice(list(_EVENTS.items()))
    thing = rng.choice(things)
    headline = f"{who} {present} {_without_article(thing)} in {where}"
    sentences = [write(rng) for write in rng.sample(_BACKGROUND, rng.randint(3, 7))]
    key = _key_sentence(rng, who, f"{past} {thing}", where, when)
    sentences.insert(rng.choice((0, 0, 1, rng.randint(0, len(sentences)))), key)
    answers = {
        "headline": headline,
        "lead": f"{who} {past} {thing} in {where} {when}.",
        "who": who,
        "when": when,
        "where": where,
    }
    return Example("news", " ".join(sentences), headline, answers, (who, present, thing, where))


def person(rng: random.Random) -> str:
    """A first name and a surname, a quarter of the surnames invented."""
    surname = invented_word(rng) if rng.random() < 0.25 else rng.choice(lexicon.SURNAMES)
    return f"{rng.choice(lexicon.FIRST_NAMES)} {surname}"


def time(rng: random.Random) -> str:
    """When something happens, as it stands inside a sentence."""
    day = rng.choice(lexicon.WEEKDAYS)
    return rng.choice(
        (
            f"on {day}",
            f"on {day} {rng.choice(_PARTS_OF_DAY)}",
            f"on {rng.choice(lexicon.MONTHS)} {rng.randint(1, 28)}",
            f"on {rng.randint(1, 28)} {rng.choice(lexicon.MONTHS)}",
            f"in {rng.choice(lexicon.MONTHS)}",
            f"at {rng.randint(1, 12)} {rng.choice(('am', 'pm'))} on {day}",
        )
    )


def _key_sentence(rng: random.Random, who: str, event: str, where: str, when: str) -> str:
    job = _job(rng)
    sentence = rng.choice(
        (
            f"{who} {event} in {where} {when}.",
            f"{when}, {who} {event} in {where}.",
            f"in {where}, {who} {event} {when}.",
            f"{who}, {job}, {event} in {where} {when}.",
            f"{when}, {who}, {job}, {event} in {where}.",
        )
    )
    return sentence[0].upper() + sentence[1:]


def _job(rng: random.Random) -> str:
    job = rng.choice(lexicon.JOBS)
    return f"{'an' if job[0] in 'aeiou' else 'a'} {job} from {_city(rng)}"


def _city(rng: random.Random) -> str:
    return rng.choice(lexicon.CITIES)


def _without_article(thing: str) -> str:
    head, _, tail = thing.partition(" ")
    return tail if head in ("a", "an", "the") else thing
