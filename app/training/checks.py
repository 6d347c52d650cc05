"""What examples say of each other: repeated and contradicting lines, splits that overlap, odd labels."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from app.strict_json import excerpt
from app.training.data_files import refused
from app.training.examples import Example
from app.training.splits import Splits, by_input, plain_text

MAX_LABELS = 256  # as many choices as a task may have
MAX_LABEL_CHARS = 1024
FEW = 16  # examples, among which a difference says little


def disjoint(splits: Splits) -> tuple[Splits, tuple[str, ...]]:
    """Return the splits without inputs that test, or dev, has too, and a line for each kind.

    What is held out stays as it is, so that scores of several runs mean the same.
    """
    held_out = {plain_text(each): each for each in splits.test}
    dev, moved_dev = _without(splits.dev, held_out)
    held_out |= {plain_text(each): each for each in dev}
    train, moved_train = _without(splits.train, held_out)
    moved = (("train", moved_train), ("dev", moved_dev))
    lines = tuple(
        f"lines left out of {name}, since their inputs are held out too: {len(found)}, such as "
        f"{found[0].place} ({held_out[plain_text(found[0])].place})"
        for name, found in moved
        if found
    )
    return Splits(train, dev, splits.test), lines


def _without(
    examples: Sequence[Example], held_out: dict[str, Example]
) -> tuple[tuple[Example, ...], list[Example]]:
    kept, moved = list[Example](), list[Example]()
    for example in examples:
        (moved if plain_text(example) in held_out else kept).append(example)
    return tuple(kept), moved


def check_labels(splits: Splits) -> tuple[str, ...]:
    """Return the labels, in an order that doesn't depend on that of the lines.

    Raise InvalidRequest: there is one only, there are too many or too long ones, or train lacks one.
    """
    examples = [*splits.train, *splits.dev, *splits.test]
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.output, example)
        if len(example.output) > MAX_LABEL_CHARS:
            raise refused(
                example.place,
                f"label has {len(example.output)} characters; expected at most {MAX_LABEL_CHARS}. Where "
                "answers are free texts, name the fields inputs and output",
            )
    if len(first) < 2:
        raise refused(
            examples[0].file,
            f"every label is {excerpt(examples[0].output)}; expected at least two different ones",
        )
    if len(first) > MAX_LABELS:
        raise refused(
            examples[0].file,
            f"it has {len(first)} different labels; a task has at most {MAX_LABELS} choices. Where answers "
            "are free texts, name the fields inputs and output",
        )
    unseen = first.keys() - {example.output for example in splits.train}
    if unseen:
        example = first[min(unseen)]
        raise refused(
            example.place,
            f"label {excerpt(example.output)} is on no line of train; add some, or leave it out",
        )
    return tuple(sorted(first, key=lambda label: (len(label), label) if label.isdecimal() else (0, label)))


def warnings_of(splits: Splits, choices: Sequence[str]) -> Iterator[str]:
    """Yield a line for each kind of oddity that doesn't keep from training."""
    yield from _contradictions([*splits.train, *splits.dev, *splits.test])
    yield from _repetitions(splits.train)
    yield from _twins(choices)
    if not choices and len({example.output for example in splits.train}) == 1:
        yield f"every answer of train is {excerpt(splits.train[0].output)}, so inputs make no difference"
    for name, examples in (("dev", splits.dev), ("test", splits.test)):
        if 0 < len(examples) < FEW:
            yield f"{name} has {len(examples)} examples only, so its scores are rough"


def _contradictions(examples: Iterable[Example]) -> Iterator[str]:
    groups = [
        found for found in by_input(examples).values() if len({each.output.strip() for each in found}) > 1
    ]
    if groups:
        one = groups[0][0]
        other = next(each for each in groups[0] if each.output.strip() != one.output.strip())
        yield (
            f"inputs with several answers: {len(groups)}, such as {excerpt(one.output, 40)} ({one.place}) "
            f"and {excerpt(other.output, 40)} ({other.place})"
        )


def _repetitions(examples: Sequence[Example]) -> Iterator[str]:
    first: dict[tuple[str, str], Example] = {}
    repeated = []
    for example in examples:
        if first.setdefault((plain_text(example), example.output.strip()), example) is not example:
            repeated.append(example)
    if repeated:
        earlier = first[plain_text(repeated[0]), repeated[0].output.strip()]
        yield (
            f"lines of train that repeat another one: {len(repeated)}, such as {repeated[0].place} "
            f"({earlier.place})"
        )


def _twins(choices: Sequence[str]) -> Iterator[str]:
    counts = Counter(label.strip().casefold() for label in choices)
    twins = [label for label in choices if counts[label.strip().casefold()] > 1]
    if twins:
        shown = " and ".join(map(excerpt, twins[:2]))
        yield f"the labels {shown} differ in case or white space only, and count as different"
