"""Inputs written by hand, in words and turns that the grammars do not make: the demo outside its corpus.

The held-out sets come from the same generators as the training sets. These do not, and the figures are lower.
"""

from __future__ import annotations

from demo.recipes.records import describe
from demo.recipes.splits import Example

_REVIEWS: tuple[tuple[str, str], ...] = (
    ("An absolute gem, I was smiling from start to finish.", "positive"),
    ("Two hours of my life that I will never get back.", "negative"),
    ("The chef clearly knows what he is doing; every dish was wonderful.", "positive"),
    ("We waited an hour for cold soup and nobody said sorry.", "negative"),
    ("Sturdy, well made and easy to set up. Happy with it.", "positive"),
    ("It stopped working after a week and support never answered.", "negative"),
    ("Great location and the bed was super comfortable.", "positive"),
    ("The walls are thin and the neighbours were noisy all night.", "negative"),
    ("I laughed, I cried, I loved every minute.", "positive"),
    ("The jokes fell flat and the ending made no sense.", "negative"),
    ("Best tacos in town, and the owner is lovely.", "positive"),
    ("Overpriced tourist trap with terrible food.", "negative"),
    ("My kids adore this game.", "positive"),
    ("The app crashes every time I open it, very frustrating.", "negative"),
    ("A beautiful, moving novel that I could not put down.", "positive"),
    ("I gave up after fifty pages, so boring.", "negative"),
    ("The camera takes stunning pictures even at night.", "positive"),
    ("The screen arrived scratched and dirty.", "negative"),
    ("Friendly people, fair prices, delicious cake.", "positive"),
    ("Rude waiter, dirty table, awful wine.", "negative"),
    ("I can honestly say this was the nicest stay we have had in years.", "positive"),
    ("Don't bother, it is a complete waste of money.", "negative"),
    ("what an amazing concert, the band was on fire", "positive"),
    ("not what i expected, pretty disappointing to be honest", "negative"),
    ("The plot is clever and the cast is brilliant.", "positive"),
    ("I was bored within ten minutes.", "negative"),
    ("Works like a charm, I recommend it to all my friends.", "positive"),
    ("Cheap plastic that feels like a toy. Horrible.", "negative"),
    ("The room was spotless and the breakfast was excellent.", "positive"),
    ("The sequel is dull, lazy and far too long.", "negative"),
)

_RECORDS: tuple[dict[str, str], ...] = (
    {"name": "Café Rouge", "food": "French", "area": "riverside"},
    {"name": "Burger Queen", "type": "diner", "price": "cheap"},
    {"name": "Strada", "type": "pub", "food": "Italian", "near": "Rainbow Vegetarian"},
    {"name": "Loch Fyne", "food": "Scottish", "rating": "5 out of 5"},
    {"name": "The Punter", "type": "coffee shop", "price": "expensive", "kids": "welcome"},
    {"name": "Wildwood", "food": "Indian", "area": "city centre", "price": "moderate"},
    {"name": "Taste of Cambridge", "type": "restaurant", "rating": "low", "kids": "not welcome"},
    {"name": "Giraffe", "type": "bar", "area": "harbour", "near": "The Bakers"},
    {"name": "Fitzbillies", "food": "English", "rating": "average"},
    {"name": "Zizzi", "type": "wine bar", "price": "high-end"},
    {"name": "Alimentum", "food": "vegan", "area": "market", "kids": "welcome"},
    {"name": "Midsummer House", "type": "bistro", "food": "Japanese", "price": "pricey"},
    {"name": "Noodle Bar", "food": "Chinese", "near": "Trinity College"},
    {"name": "Pho Saigon", "food": "Vietnamese", "price": "affordable", "rating": "good"},
    {"name": "Kingsley's Tea Room", "area": "village", "rating": "excellent"},
    {"name": "El Camino", "type": "bar", "food": "Mexican", "area": "old town"},
    {"name": "Nandini Palace", "food": "Indian", "near": "Victoria Station", "price": "low-cost"},
    {"name": "Greenhouse 21", "food": "vegetarian", "area": "university"},
    {"name": "McAllister & Sons", "type": "pub", "food": "Irish"},
    {"name": "Trattoria Bellini", "food": "Italian", "area": "castle", "kids": "not welcome"},
)


def reviews() -> list[Example]:
    """Thirty reviews, half of them positive."""
    return [Example("handwritten", text, text, {"sentiment": label}) for text, label in _REVIEWS]


def records() -> list[Example]:
    """Twenty records, most of them with real restaurants' names."""
    return [
        Example(
            "handwritten",
            ", ".join(f"{key}[{value}]" for key, value in record.items()),
            record["name"],
            {"describe": describe(record)},
            tuple(record.values()),
        )
        for record in _RECORDS
    ]


BY_VARIANT = {"sentiment": reviews, "describe": records}
