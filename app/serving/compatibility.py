"""Whether a stored version fits the loaded base: checked once per prompt, then remembered."""

from typing import Any

from app.caching import SingleFlightCache
from app.errors import CorruptData, NotFound, PromptRejected
from app.prompt import ModelGeometry, Prompt, TaskVersion
from app.store.prompt_file import read_prompt
from app.store.prompt_store import PromptStore
from app.store.validation import validate_prompt

_MAX_REMEMBERED = 65_536


def vouched_base(geometry: ModelGeometry) -> dict[str, Any]:
    """Return what the provenance of an upload records of the base that it was validated against."""
    return {"base_fingerprint": geometry.fingerprint, "base_dtype": geometry.dtype}


class Compatibility:
    """Remembers, by prompt digest, why a prompt doesn't fit (None: it does). Thread-safe."""

    def __init__(self, store: PromptStore, geometry: ModelGeometry) -> None:
        self._store = store
        self._geometry = geometry
        self._reasons: SingleFlightCache[str, str | None] = SingleFlightCache(_MAX_REMEMBERED)

    def why_not(self, version: TaskVersion) -> str | None:
        """Return why the version can't be served; None: it can. May read the prompt's bytes."""
        digest = version.prompt_digest
        if digest is None or self._was_validated(version):
            return None
        try:
            return self._reasons.get(digest, lambda: self._find_out(digest))
        except (CorruptData, NotFound):  # not remembered: it may be healed the next time
            return "its prompt's bytes are missing or damaged; publish it again"

    def validate(self, prompt: Prompt) -> None:
        """Raise PromptRejected where the prompt doesn't fit."""
        validate_prompt(prompt, self._geometry)
        self._reasons.put(prompt.digest, None)

    def _was_validated(self, version: TaskVersion) -> bool:
        vouched = vouched_base(self._geometry)
        return all(version.provenance.get(name) == value for name, value in vouched.items())

    def _find_out(self, digest: str) -> str | None:
        try:
            validate_prompt(read_prompt(self._store.read_blob(digest), digest), self._geometry)
        except PromptRejected as error:
            return error.message
        return None
