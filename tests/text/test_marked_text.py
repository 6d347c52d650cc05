from hypothesis import given
from hypothesis import strategies as st

from app.text.marked_text import MarkedText, Piece

PIECES = st.lists(st.text(alphabet="ab; :\n", max_size=5), max_size=14)
MARKER = st.text(alphabet="ab:", min_size=1, max_size=3)
END = st.none() | st.text(alphabet=";a\n", min_size=1, max_size=2)


def read(marked: MarkedText, pieces: list[str]) -> list[list[Piece]]:
    """What is shown with each piece, and at the end."""
    shown = []
    for piece in pieces:
        if marked.is_stopped:
            return shown
        if marked.is_found:
            shown.append(marked.push_answer(piece))
        else:
            shown.append(marked.push(piece))
            shown[-1] += marked.push_answer(marked.rest) if marked.is_found else []
    return shown if marked.is_stopped else [*shown, marked.flush()]


def steps_of(text: str, end: str | None) -> tuple[str, ...]:
    parts = [text] if end is None else text.split(end)
    return tuple(part.strip() for part in parts if part.strip())


@given(PIECES, MARKER, END)
def test_text_is_split_at_the_marker_and_where_steps_end(
    pieces: list[str], marker: str, end: str | None
) -> None:
    marked, text = MarkedText(marker, end), "".join(pieces)
    shown = [piece for each in read(marked, pieces) for piece in each]
    before, found, after = text.partition(marker)
    assert marked.is_found == bool(found)
    assert (marked.reasoning, marked.answer) == (before, after.lstrip())
    assert marked.steps == steps_of(before, end)
    assert "".join(piece.text for piece in shown if piece.is_reasoning) == before
    assert "".join(piece.text for piece in shown if not piece.is_reasoning) == marked.answer
    assert all(piece.text or piece.step is not None for piece in shown)


@given(PIECES, MARKER, END)
def test_nothing_is_shown_that_may_become_the_marker_and_nothing_else_is_held_back(
    pieces: list[str], marker: str, end: str | None
) -> None:
    marked, text = MarkedText(marker, end), ""
    for piece in pieces:
        marked.push(piece)
        text += piece
        if marked.is_found:
            return
        held = max(size for size in range(len(marker)) if text.endswith(marker[:size]))
        assert marked.reasoning == text[: len(text) - held]


@given(PIECES, MARKER, END)
def test_a_marker_that_is_put_in_ends_the_steps_where_the_text_is(
    pieces: list[str], marker: str, end: str | None
) -> None:
    marked, text = MarkedText(marker, end), ""
    for piece in pieces:
        marked.push(piece)
        text += piece
        if marked.is_found:
            return
    marked.mark()
    assert (marked.reasoning, marked.steps) == (text, steps_of(text, end))
    marked.push_answer("\n 4")
    marked.push_answer(f" {marker}5")
    assert marked.answer == f"4 {marker}5"


def test_stop_strings_end_the_answer_only() -> None:
    marked = MarkedText(":", ";", ["\n", "xy"])
    shown = read(marked, ["a\nxy; b:", "\n \n4", "2x", "y5"])
    assert (marked.reasoning, marked.steps, marked.answer) == ("a\nxy; b", ("a\nxy", "b"), "42")
    assert shown[-1] == []
    shown_stop = MarkedText(":", None, ["\n"], shows_stop=True)
    read(shown_stop, [":", "4\n5"])
    assert shown_stop.answer == "4\n"


def test_without_a_marker_all_is_one_step() -> None:
    marked = MarkedText(None)
    assert read(marked, ["a", ": b"]) == [
        [Piece("a", True)],
        [Piece(": b", True)],
        [Piece("", True, "a: b")],
    ]
