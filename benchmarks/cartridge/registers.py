"""Made documents: registers of who is what in which town, questions about them, and a tokenizer."""

import random
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

POSITIONS = 4096
TEMPLATE = "Q: {question}\nA:"
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"  # ids 0, 1 and 2
WORDINGS = (
    "Who is the {role} of {town}?",
    "What is the name of the {role} of {town}?",
    "Do you know the {role} of {town}?",
    "Which person is {role} of {town}?",
)
_ROLES = (
    "mayor",
    "baker",
    "doctor",
    "judge",
    "teacher",
    "smith",
    "miller",
    "sailor",
    "weaver",
    "tailor",
    "painter",
    "gardener",
)
_TOWNS = tuple(
    start + end
    for start in ("Zor", "Bel", "Kam", "Dru", "Fen", "Gal", "Hos", "Lor")
    for end in ("vek", "dar", "mont", "wick", "burg")
)
_PEOPLE = tuple(
    start + end
    for start in ("An", "Be", "Cla", "El", "Fri", "Gre", "Jo", "Lu")
    for end in ("na", "rik", "ta", "ben", "lia", "mar", "vin", "da")
)
_OTHER = (
    "The| of| is|.\n|?\n|Q:|A:| Who| the| What| name| Do| you| know| Which| person|.|?|\n| |Who|What|Do|Which"
)


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a register: seven tokens."""

    role: str
    town: str
    person: str

    @property
    def sentence(self) -> str:
        """Return the line."""
        return f"The {self.role} of {self.town} is {self.person}.\n"

    def question(self, wording: str) -> str:
        """Return the question that it answers."""
        return wording.format(role=self.role, town=self.town)


def make_register(rng: random.Random, num_facts: int) -> list[Fact]:
    """Return facts about different pairs of role and town; towns may have one line or one of each role."""
    fewest = -(-num_facts // len(_ROLES))
    towns = rng.sample(_TOWNS, rng.randint(min(len(_TOWNS), fewest + 1), len(_TOWNS)))
    pairs = rng.sample([(role, town) for role in _ROLES for town in towns], num_facts)
    return [Fact(role, town, rng.choice(_PEOPLE)) for role, town in pairs]


def document_of(facts: list[Fact]) -> str:
    """Return the register as a text."""
    return "".join(fact.sentence for fact in facts)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, each with the space before it."""
    words = {space + word for word in (*_ROLES, *_TOWNS, *_PEOPLE) for space in ("", " ")}
    pieces = [piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in sorted(words | set(_OTHER.split("|")))]
    vocabulary = {piece: number for number, piece in enumerate([EOS, PAD, UNKNOWN, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[QA]:| ?[A-Za-z]+|[.?]\n|[^A-Za-z]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )
