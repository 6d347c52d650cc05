"""Stop strings: found wherever they span tokens, and never shown, not even in part."""

from collections.abc import Sequence


class _Matcher:
    """Knuth-Morris-Pratt over one stop string: how many of its characters the text so far ends with."""

    def __init__(self, word: str) -> None:
        self.word = word
        self.matched = 0
        self._fallback = _borders(word)

    def push(self, character: str) -> bool:
        """Take one character; return whether the word is complete."""
        while self.matched and self.word[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        if self.word[self.matched] == character:
            self.matched += 1
        return self.matched == len(self.word)

    def go_on(self) -> None:
        """Let the complete word not count; its end may begin another one."""
        self.matched = self._fallback[-1]


def _borders(word: str) -> list[int]:
    """Return for each prefix of the word the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(word)
    length = 0
    for index in range(1, len(word)):
        while length and word[index] != word[length]:
            length = borders[length - 1]
        if word[index] == word[length]:
            length += 1
        borders[index] = length
    return borders


class StopStringMatcher:
    """Passes text on, but holds back what may be the beginning of a stop string.

    The first stop string to be complete ends the text right before it, or after it where it `is_shown`; of
    several that end at the same character, the longest.
    """

    def __init__(self, stops: Sequence[str], *, is_shown: bool = False) -> None:
        self._is_shown = is_shown
        self._matchers = [_Matcher(stop) for stop in stops]
        self._held = ""
        self.stopped: str | None = None  # the stop string that was found
        self.rest = ""  # what came with its last character and stands behind it

    @property
    def is_any(self) -> bool:
        """Return whether there are stop strings; without any, all text is shown as it comes."""
        return bool(self._matchers)

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """Take more text; return what can be shown. After `stopped` is set, nothing more comes.

        Stop strings that are complete while it may not stop are text like any other.
        """
        if self.stopped is not None or not self._matchers:
            return "" if self.stopped is not None else text
        for index, character in enumerate(text):
            complete = [matcher for matcher in self._matchers if matcher.push(character)]
            if complete and may_stop:
                self.rest = text[index + 1 :]
                return self._stop(text[: index + 1], max((matcher.word for matcher in complete), key=len))
            for matcher in complete:
                matcher.go_on()
        return self._hold(self._held + text)

    def _stop(self, text: str, word: str) -> str:
        self.stopped = word
        shown, self._held = self._held + text, ""
        return shown if self._is_shown else shown[: -len(word)]

    def _hold(self, text: str) -> str:
        held = max(matcher.matched for matcher in self._matchers)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """End the text without a stop string; return what was held back."""
        held, self._held = self._held, ""
        return held
