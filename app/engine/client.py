"""The engine as serving and the API see it: a protocol, so that an engine may live elsewhere."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from app.engine.memory.device import DeviceMemory
from app.prompt import ModelGeometry
from app.request import Request, TokenDelta


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's state after its last step."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # share of K/V blocks that are held
    resident_prefixes: int = 0
    resident_prefix_bytes: int = 0
    kv_cache_bytes: int = 0  # of all K/V blocks
    kv_blocks: int = 0
    kv_free_blocks: int = 0
    kv_evictable_blocks: int = 0  # of prefixes that no running sequence stands on
    unfilled_prefix_slots: int = 0  # at the ends of prefixes' last blocks: nothing else can take them
    unfilled_request_slots: int = 0  # at the ends of running sequences' last blocks: for their next tokens
    kv_bytes_per_token: int = 0  # of the decoder's self-attention, in all layers
    resident_digests: frozenset[str] = frozenset()  # prompts that are ready on the device
    num_sources: int = 0  # whose keys and values for cross-attention are on the device
    num_held: int = 0  # ended sequences with keys and values that stay for those that continue them
    steps: int = 0


@dataclass(frozen=True, slots=True)
class LiveRow:
    """A sequence of the batch, as of one step."""

    request_id: str
    task: str  # "" is the base model
    version: int
    is_prefill: bool  # the step took its prompt, or a part of it
    num_generated: int
    source_length: int = 0  # encoder rows and tokens of its source; 0: there is no encoder
    is_encoding: bool = False  # the step encoded its source


class EngineClient(Protocol):
    """Continuous batching over one base model. All methods may be called from any thread."""

    @property
    def geometry(self) -> ModelGeometry:
        """The base model's shapes and bounds."""
        ...

    @property
    def max_rows(self) -> int:
        """Sequences that run at once, at most."""
        ...

    @property
    def max_open(self) -> int:
        """Requests that run or wait, at most."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs: started, and neither stopped nor failed."""
        ...

    def check_admissible(self, request: Request) -> None:
        """Refuse what could never run.

        Raises:
            RequestTooLong: beyond the position limit of the decoder or the encoder, or larger than the K/V
                memory even when alone.
            InvalidRequest: no tokens, ids outside the vocabulary, a negative number of new tokens, more
                beams than `max_rows`, a prompt without virtual tokens or the other way round, a deadline
                that is not finite, a grammar that this engine can't follow, a source where the base has no
                encoder or none where it has one, or a kept segment that depends on the source.
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[TokenDelta, None]:
        """Yield the request's deltas; the last one carries `finish`.

        Closing the generator early cancels the request.

        Raises:
            RequestTooLong, InvalidRequest, Overloaded, EngineStopped: before anything is queued.
            PromptplexError: any other error of `app/errors.py` that ended the request.
        """
        ...

    async def collect(self, request: Request, into: list[TokenDelta]) -> None:
        """Add the request's deltas to `into`, all at once at its end, which costs less than `generate`.

        Those that were there by then are added as well when the request ends with an error, or this is
        cancelled, which cancels the request. Raises as `generate`.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """End a request, which raises Cancelled; all that it holds is free within two steps.

        What an `is_held` request has computed until then stays, until `release` is called.
        """
        ...

    def release(self, request_id: str) -> None:
        """Give back what stayed of an `is_held` request, or will: it is free within two steps.

        May be called at any time, and for requests of which nothing is held.
        """
        ...

    def stats(self) -> EngineStats:
        """Return a snapshot."""
        ...

    def device_memory(self) -> DeviceMemory:
        """Return the memory of the engine's device; a call to its driver, not for every request."""
        ...

    def take_rows(self) -> tuple[LiveRow, ...] | None:
        """Return the rows of one step since the last call, None where there was none; for one watcher.

        Rows are recorded once per call, so watching costs a step nothing measurable.
        """
        ...

    def own_tensor(self, name: str) -> Tensor | None:
        """Return the base's own embedding `[V, ...]` that a checkpoint calls `name`; None: it has none."""
        ...

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the open ones; return whether all ended in `timeout` seconds."""
        ...

    def stop(self) -> None:
        """End the engine; requests that still run raise EngineStopped."""
        ...
