"""The answers of made examples are right."""

import random
import re
from datetime import date

import pytest

from demo.recipes.arithmetic import OutOfRange, expression, solve
from demo.recipes.dates import written_date
from demo.recipes.lexicon import MONTHS
from demo.recipes.news import article
from demo.recipes.records import restaurant
from demo.recipes.reductions import nested, outputs, rewrites
from demo.recipes.reviews import SENTIMENTS, aspect_review, review
from demo.recipes.splits import Example
from demo.recipes.utterances import INTENTS, utterance
from demo.recipes.wordplay import pair, word_list


def made(maker, count=300):
    rng = random.Random(3)
    return [maker(rng) for _ in range(count)]


def test_every_step_of_an_expression_holds():
    for example in made(expression):
        *steps, answer = example.answers["steps"].split("; ")
        for step in steps:
            left, right = step.split(" = ")
            assert eval(left) == int(right)
        assert answer == f"answer: {eval(example.text)}"


def test_steps_follow_precedence_and_brackets():
    assert solve("3 * (4 + 5)") == "4 + 5 = 9; 3 * 9 = 27; answer: 27"
    assert solve("20 - 2 * 4") == "2 * 4 = 8; 20 - 8 = 12; answer: 12"


def test_each_step_of_a_chain_does_what_can_be_done_and_keeps_the_value():
    for example in made(nested):
        text, value = example.text, eval(example.text)
        for output in outputs(example.text):
            *operations, rest = output.split("; ")
            assert all(eval(operation.replace("=", "==")) for operation in operations)
            assert len(re.findall("[-+*]", text)) == len(re.findall("[-+*]", rest)) + len(operations)
            assert eval(rest.removeprefix("answer: ")) == value
            text = rest
        assert rest == f"answer: {value}"


def test_a_chain_of_rewrites_leads_to_the_answer():
    assert rewrites(Example("arithmetic", "3 * (2 + 5)", "", {})) == [
        ("3 * (2 + 5)", "2 + 5 = 7; 3 * 7"),
        ("2 + 5 = 7; 3 * 7", "3 * 7 = 21; answer: 21"),
    ]
    assert outputs("(1 + 2) * (3 + 4)")[0] == "1 + 2 = 3; 3 + 4 = 7; 3 * 7"


def test_a_rewrite_of_a_heldout_expression_is_not_trained_on():
    assert rewrites(Example("arithmetic", "3 * (4 + 5)", "", {})) == []  # neither is `3 * 9`


@pytest.mark.parametrize("text", ["3 - 5", "13 * 2", "12 * 9", "60 + 50"])
def test_numbers_that_the_demo_leaves_out(text):
    with pytest.raises(OutOfRange):
        solve(text)


def test_a_description_holds_every_value_of_its_record():
    for example in made(restaurant):
        assert example.slots[0] == example.key
        for style in ("describe", "advert"):
            assert all(value in example.answers[style] for value in example.slots)


def test_a_written_date_has_its_day_and_year():
    for example in made(written_date):
        day = date.fromisoformat(example.answers["iso"])
        assert example.answers["us"] == day.strftime("%m/%d/%Y")
        assert example.answers["dotted"] == day.strftime("%d.%m.%Y")
        assert {str(day.day), str(day.year)} <= {
            str(int(digits)) for digits in re.findall(r"\d+", example.text)
        }
        month = MONTHS[day.month - 1]
        assert month[:3] in example.text or f"/{day.month:02}/" in example.text


@pytest.mark.parametrize("maker", [review, aspect_review])
def test_both_sentiments_are_there_and_only_they(maker):
    assert {example.answers["sentiment"] for example in made(maker)} == set(SENTIMENTS)


def test_all_eight_intents_are_there():
    assert {example.answers["intent"] for example in made(utterance)} == set(INTENTS)
    assert not any("{" in example.text for example in made(utterance))


def test_word_operations():
    for example in made(word_list, 50):
        words = example.text.split(", ")
        assert example.answers["count"] == str(len(words))
        assert (example.answers["first"], example.answers["last"]) == (words[0], words[-1])
    for example in made(pair, 50):
        assert example.answers["swapped"].split(" and ")[::-1] == example.text.split(" and ")


def test_a_news_text_holds_the_answers_about_its_key_event():
    for example in made(article):
        answers = example.answers
        assert all(answers[variant] in example.text for variant in ("who", "where"))
        assert answers["when"].casefold() in example.text.casefold()
        assert answers["headline"].startswith(answers["who"])
        assert 4 <= example.text.count(". ") + 1 <= 8
        assert example.key == answers["headline"]


def test_the_articles_other_people_and_times_are_no_answers():
    """They are there: an answer can't be found by its kind alone."""
    texts = [example.text for example in made(article)]
    assert sum(text.count(" on ") + text.count(" in ") for text in texts) > 3 * len(texts)
