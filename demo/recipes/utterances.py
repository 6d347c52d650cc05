"""What people say to a household assistant: eight intents."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

from demo.recipes import lexicon
from demo.recipes.splits import Example

_TEMPLATES: dict[str, str] = {
    "alarm": """
        wake me up at {time} | set an alarm for {time} | set an alarm for {time} {day} | I need to get
        up at {time} {day} | cancel my alarm | turn off the alarm at {time} | can you wake me at {time}
        | please set my alarm to {time} | make sure I am awake by {time} | snooze the alarm | change my
        alarm to {time} | ring at {time} | delete all alarms | don't let me oversleep {day} | is my
        alarm set for {time}
    """,
    "weather": """
        what is the weather in {city} | will it rain {day} | is it cold in {city} | do I need an
        umbrella {day} | what is the forecast for {city} {day} | how hot will it get {day} | is it
        snowing in {city} | will the sun shine {day} | how windy is it in {city} | what is the
        temperature outside | what's the weather like {day} | will there be a storm {day} | should I
        wear a coat {day} | tell me the weather for {city} | is it going to be sunny in {city} {day}
    """,
    "music": """
        play {song} | I want to listen to {song} | put on {song} | can you play {song} in the {room} |
        skip this song | turn up the volume | pause the music | play {song} please | next track | stop
        the music | shuffle {song} | add this song to my playlist | who sings this song | let's hear
        {song} | play that song again | music please
    """,
    "lights": """
        turn on the lights in the {room} | switch off the {room} lights | dim the lights in the {room} |
        make the {room} brighter | turn the lamp off | it is too dark in the {room} | lights off please
        | lights on in the {room} | set the {room} lights to blue | can you turn off all the lights |
        it's too bright in the {room} | switch on the lamp | turn down the {room} lights | I need more
        light in the {room}
    """,
    "shopping": """
        add {item} to my shopping list | buy {item} | I need to buy {item} | order {item} for me | put
        {item} on the list | we are out of {item} | order {item} and {item2} | remove {item} from my
        shopping list | what is on my shopping list | can you get {item} | please order more {item} | I
        want to buy {item} {day} | we need {item} and {item2} | don't forget the {item} at the shop |
        how much is {item}
    """,
    "travel": """
        book a flight to {city} | find me a hotel in {city} | I want to fly from {city} to {city2} {day}
        | when does the train to {city} leave | how do I get to {city} | book a taxi to the airport |
        reserve a room in {city} {day} | are there buses to {city} {day} | show me flights to {city} | I
        need a ticket to {city} | what time is my flight to {city} | plan a trip to {city} | how far is
        it to {city} | rent a car in {city} | cancel my train to {city}
    """,
    "banking": """
        what is my account balance | send {sum} to {name} | transfer {sum} to my savings | how much
        money do I have | pay my credit card bill | I lost my credit card | did {name} pay me back {sum}
        | deposit {sum} | block my card | what did I spend {day} | pay {name} {sum} | withdraw {sum} |
        move {sum} to my other account | show my last payments | has my salary arrived | I want to open
        a savings account | what is my credit limit
    """,
    "calendar": """
        add {event} to my calendar {day} | when is my {event} | cancel the {event} {day} | move the
        {event} to {time} | what do I have planned {day} | schedule a {event} {day} at {time} | remind
        me of the {event} {day} | am I free {day} | invite {name} to the {event} | do I have a meeting
        {day} | put the {event} in my calendar | am I busy {day} at {time} | what is on my calendar
        {day} | reschedule the {event} | book a {event} {day}
    """,
}
INTENTS = tuple(_TEMPLATES)
_PATTERNS = {
    intent: tuple(" ".join(t.split()) for t in text.split("|")) for intent, text in _TEMPLATES.items()
}
_OPENINGS = ("please ", "hey, ", "could you help, ", "ok ", "hello, ", "I wonder, ", "quick question: ")
_SLOTS: dict[str, tuple[str, ...]] = {
    "time": lexicon.TIMES,
    "day": lexicon.DAYS,
    "city": lexicon.CITIES,
    "city2": lexicon.CITIES,
    "song": lexicon.SONG_ARTISTS,
    "room": lexicon.ROOMS,
    "item": lexicon.ITEMS,
    "item2": lexicon.ITEMS,
    "sum": lexicon.SUMS,
    "name": lexicon.FIRST_NAMES,
    "event": lexicon.EVENTS,
}


def utterance(rng: random.Random) -> Example:
    """Answer: ``intent``."""
    intent = rng.choice(INTENTS)
    text = re.sub(r"\{(\w+)\}", _filler(rng), rng.choice(_PATTERNS[intent]))
    if rng.random() < 0.25:
        text = rng.choice(_OPENINGS) + text
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    text += rng.choice(("", "", "", ".", "?", " please", " now", " for me"))
    return Example("utterance", text, text.lower(), {"intent": intent})


def _filler(rng: random.Random) -> Callable[[re.Match[str]], str]:
    return lambda match: rng.choice(_SLOTS[match.group(1)])
