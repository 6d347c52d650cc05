import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.text.stop_strings import StopStringMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[list[str], str | None]:
    watch = StopStringMatcher(stops)
    shown = []
    for piece in pieces:
        shown.append(watch.push(piece))
        if watch.stopped is not None:
            return shown, watch.stopped
    return [*shown, watch.flush()], None


def first_stop(stops: list[str], text: str) -> tuple[str, str | None]:
    """The same, said plainly: at each character, does a stop string end here?"""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        (["\n"], ["a", "b\nc"], "ab", "\n"),
        (["END"], ["xE", "N", "D y"], "x", "END"),
        (["END"], ["xE", "N", "E", "ND"], "xEN", "END"),
        (["aab"], ["a", "a", "a", "b"], "a", "aab"),
        (["abcX", "b"], ["a", "b"], "a", "b"),
        (["bc", "abc"], ["ab", "c"], "", "abc"),
        ([], ["a", "b"], "ab", None),
        (["zz"], ["a", "z"], "az", None),
    ],
)
def test_stop_strings_across_pieces(
    stops: list[str], pieces: list[str], shown: str, stopped: str | None
) -> None:
    parts, found = run(stops, pieces)
    assert ("".join(parts), found) == (shown, stopped)


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4),
    st.lists(st.text(alphabet="abc", max_size=4), max_size=12),
)
def test_nothing_of_a_stop_string_leaks(stops: list[str], pieces: list[str]) -> None:
    parts, stopped = run(stops, pieces)
    assert ("".join(parts), stopped) == first_stop(stops, "".join(pieces))


@given(
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text(alphabet="abc")
)
def test_no_more_than_needed_is_held_back(stops: list[str], text: str) -> None:
    watch = StopStringMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += watch.push(character)
        if watch.stopped:
            return
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)
