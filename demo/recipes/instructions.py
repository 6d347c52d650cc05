"""Phrasings of every task. ``[a|b]`` is an alternation; a twelfth of the phrasings is never pretrained on."""

from __future__ import annotations

import itertools
import re
from functools import cache
from hashlib import sha256

_ALTERNATION = re.compile(r"\[([^\]]*)\]")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "sentiment": (
        (
            "[Is|Decide whether|Say whether|Tell me whether] [this|the|the following] [review|opinion|text] "
            "[is |]positive or negative[?|.|:]"
        ),
        (
            "[What is|Give|Name|Classify] the [sentiment|mood|tone] of [this|the] "
            "[review|text|opinion][?|.|:| as positive or negative.]"
        ),
        "[Sentiment|Sentiment analysis|Review sentiment|Positive or negative][:|?|.]",
    ),
    "quality": (
        "[Is|Decide whether|Say whether] [this|the] [review|opinion|text] [is |]good or bad[?|.|:]",
        "[Good or bad|Good or bad review][:|?]",
    ),
    "liked": (
        "[Did|Does] the [writer|author|reviewer|customer] like it[?|? Yes or no.| (yes or no)?]",
        "[Is the|Was the] [customer|writer|reviewer] [happy|satisfied|pleased][?|? Yes or no.]",
    ),
    "aspect": (
        (
            "[Which|What] [aspect|part|feature] [does the review talk about|is the review about|is "
            "reviewed][?|.|:]"
        ),
        (
            "[Name|Give|Find|Tell me] the [aspect|feature] [of the review|that is reviewed|of this "
            "opinion][.|:|]"
        ),
    ),
    "intent": (
        "[What does the user want|What is the intent|What is the user's intent|Which intent is this][?|.|:]",
        (
            "[Classify|Name|Give|Find] the [intent|purpose|topic] of [this|the] "
            "[request|message|sentence|command][.|:|]"
        ),
        "[Intent|User intent|Topic of the request][:|?|.]",
    ),
    "describe": (
        (
            "[Describe|Write about|Present] [the|this] [record|data|entry] [in plain words|in a sentence|as "
            "text|in words][.|:|]"
        ),
        "[Turn|Convert|Change] [the|this] [record|data|table] into [text|a sentence|plain text|words][.|:|]",
        (
            "[Write|Give|Make] a [description|summary|sentence] [of|from|for] [the|this] "
            "[record|data|entry][.|:]"
        ),
    ),
    "advert": (
        (
            "[Write|Make|Give] an [advert|advertisement|invitation] [for|from] [this|the] "
            "[record|data|place][.|:|]"
        ),
        "[Advertise|Promote] [the|this] [place|restaurant|record][.|:|]",
    ),
    "record_field": (
        "[What is|Give|Find|Tell me] the {field} [in|of] [the|this] [record|data|entry][?|.|:]",
        "[Extract|Copy|Write] the {field}[.|:| only.]",
    ),
    "iso": (
        (
            "[Write|Give|Convert|Change|Put] [the|this] date [in ISO format|to ISO|as year-month-day|in the "
            "form YYYY-MM-DD][.|:|]"
        ),
        "[ISO date|Date in ISO format|Normalise the date|Normalize this date][:|.|]",
        "[What is|Find] the [ISO|normal] form of [the|this] date[?|.]",
    ),
    "us": (
        "[Write|Give|Convert|Put] [the|this] date [in US format|in American style|as month/day/year][.|:|]",
        "[US date|American date|Date in US format][:|.]",
    ),
    "dotted": (
        "[Write|Give|Convert|Put] [the|this] date [with dots|in German format|as day.month.year][.|:|]",
        "[Dotted date|German date][:|.]",
    ),
    "month": (
        "[Which month|What month] is [it|this|in the date][?|.]",
        "[Give|Name|Find|Write] the month[.|:| of the date.]",
    ),
    "year": (
        "[Which year|What year] is [it|this|in the date][?|.]",
        "[Give|Name|Find|Write] the year[.|:| of the date.]",
    ),
    "steps": (
        (
            "[Solve|Calculate|Compute|Work out] [this|the expression|it|the sum] [step by step|in steps|in "
            "small steps|showing the steps][.|:|]"
        ),
        "[Show|Write|Give] the steps [and the answer|and the result|of the calculation][.|:|]",
        "[Step by step|Calculation|Calculation in steps][:|.]",
    ),
    "headline": (
        "[Write|Give|Find|Make] a [headline|title] for [this|the] [article|story|news|text][.|:|]",
        "[Headline|Title|Headline of the article][:|.]",
    ),
    "lead": (
        "[Write|Give] [the lead|the main event|the key event] of [this|the] [article|story|news][.|:|]",
        "[Sum up|Summarize|Shorten] [this|the] [article|story|news|text] in [one|a] sentence[.|:|]",
    ),
    "who": (
        "[Who did it|Who is it about|Who is the story about|Who is the article about][?|.]",
        "[Name|Find|Give] the [person|main person|hero] of [this|the] [article|story|news|text][.|:|]",
    ),
    "when": (
        "[When did it happen|When was it|When was that|When did the event happen][?|.]",
        "[Name|Find|Give] the [time|day] of the [event|main event|key event|news][.|:|]",
    ),
    "where": (
        "[Where did it happen|Where was it|Where was that|Where did the event happen][?|.]",
        "[Name|Find|Give] the [place|city] of the [event|main event|key event|news][.|:|]",
    ),
    "first": (
        "[Give|Write|Name|Find] the first [word|item|thing][.|:| of the text.]",
        "[What|Which word] comes first?",
    ),
    "last": (
        "[Give|Write|Name|Find] the last [word|item|thing][.|:| of the text.]",
        "[What|Which word] comes last?",
    ),
    "count": (
        "[How many|Count the|Give the number of] [items|words|things] [are there|in the list][?|.]",
        "[Count|Number of items][:|.]",
    ),
    "repeat": (
        "[Repeat|Copy|Say again|Echo] [the text|this|the line|it][.|:|]",
        "[Write|Give] the same [text|line|words] [again|once more][.|:]",
    ),
    "joined": ("[Join|Connect|Combine] the [items|words|list] [with and|into a phrase|as a phrase][.|:|]",),
    "swapped": (
        "[Swap|Exchange|Switch|Reverse] the [two words|words|two items|items][.|:|]",
        "[Write|Give] the pair the other way round[.|:]",
    ),
    "quoted": (
        "[Put|Write] [the title|it|this] in [quotes|quotation marks][.|:|]",
        "[Quote|Add quotes to] [the title|the text|this][.|:]",
    ),
    "polite": (
        "[Greet|Say hello to|Welcome] [this name|the name|them][.|:|]",
        "[Write|Give] a [greeting|hello] [for|to] [this name|it][.|:]",
    ),
}


def _expand(template: str) -> list[str]:
    pieces = _ALTERNATION.split(template)
    choices = [piece.split("|") if index % 2 else [piece] for index, piece in enumerate(pieces)]
    return [" ".join("".join(combination).split()) for combination in itertools.product(*choices)]


def is_heldout(phrasing: str) -> bool:
    """One phrasing in twelve is kept for measuring how text instructions generalise."""
    return sha256(phrasing.encode()).digest()[0] % 12 == 0


@cache
def phrasings(variant: str, heldout: bool = False) -> tuple[str, ...]:
    """All phrasings of a task; ``record_<field>`` shares one set of templates."""
    if variant.startswith("record_"):
        name = variant.removeprefix("record_")
        filled = [template.replace("{field}", name) for template in TEMPLATES["record_field"]]
    else:
        filled = list(TEMPLATES[variant])
    every = dict.fromkeys(text for template in filled for text in _expand(template))
    return tuple(text for text in every if is_heldout(text) is heldout)
