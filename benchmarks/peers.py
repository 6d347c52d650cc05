"""Who takes part: our engine, and each peer in a process of its own on the same weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compiled_sides import RUNTIMES, build_compiled
from benchmarks.encoder_decoder import compiled_sides as seq2seq_compiled
from benchmarks.encoder_decoder import sides as seq2seq
from benchmarks.encoder_decoder.work import EncoderDecoderShape
from benchmarks.ours import Promptplex
from benchmarks.peft_sides import PeftGrouped, PeftOneAtATime, PeftPrompts
from benchmarks.processes import RemoteSide, SideProcess
from benchmarks.shared_engine import SharedEngine
from benchmarks.sides import Side
from benchmarks.transformers_sides import ContinuousBatch, StaticBatch
from benchmarks.vllm_side import build_vllm
from benchmarks.work import Shape, Work, random_model, random_prompts
from benchmarks.worker import reason_to_skip

PEERS = ("vllm", "openvino", "ctranslate2", "ctranslate2-int8", "peft", "generate", "generate-batch")


@dataclass(frozen=True, slots=True)
class Pythons:
    """Of virtual environments that have the peers which this one hasn't, and where their logs go."""

    vllm: Path
    compiled: Path  # with openvino-genai, optimum-intel and ctranslate2
    logs: Path


class Field:
    """All sides on one shape: ours, and of the peers those that are named and can run."""

    def __init__(self, ours: Sequence[Work], peers: Mapping[str, Sequence[Work]], pythons: Pythons) -> None:
        """Start everything; `peers` maps names to the works that they take part in, all of one shape."""
        self.left_out: dict[str, str] = {}
        self.processes: list[SideProcess] = []
        self._pythons = pythons
        self._stack = ExitStack()
        build = _OURS[isinstance(ours[0].shape, EncoderDecoderShape)]
        self._add(SideProcess(build, ours))
        for name, works in peers.items():
            self._try_to_add(name, works)

    def sides_of(self, name: str, beside: Sequence[str]) -> list[RemoteSide]:
        """Those that do the named work, and our own on the works `beside` it; ours first."""
        ours, *others = self.processes
        mine = [side for other in (name, *beside) for side in ours.sides if side.work.name == other]
        return mine + [side for process in others for side in process.sides if side.work.name == name]

    def close(self) -> None:
        """End all processes."""
        self._stack.close()

    def _try_to_add(self, name: str, works: Sequence[Work]) -> None:
        try:
            self._add(start_peer(name, works, self._pythons))
        except RuntimeError as error:
            self.left_out[name] = str(error).strip().splitlines()[-1]

    def _add(self, process: SideProcess) -> None:
        self._stack.callback(process.close)
        self.processes.append(process)


def start_peer(name: str, works: Sequence[Work], pythons: Pythons) -> SideProcess:
    """Raise RuntimeError with the reason where it can't run here."""
    shape, log = works[0].shape, pythons.logs / f"{name}.log"
    if name == "vllm":
        _require(reason_to_skip(pythons.vllm, "vllm", "--vllm-python"))
        return SideProcess(build_vllm, works, pythons.vllm, log)
    if (runtime := _runtimes(shape).get(name)) is not None:
        _require(reason_to_skip(pythons.compiled, runtime.package, "--compiled-python"))
        is_seq2seq = isinstance(shape, EncoderDecoderShape)
        build: Callable[..., Any] = seq2seq_compiled.build_compiled if is_seq2seq else build_compiled
        return SideProcess(build, works, runtime, pythons.compiled, log)
    return SideProcess(_IN_THIS_PYTHON[isinstance(shape, EncoderDecoderShape)][name], works)


def _runtimes(shape: Shape) -> Mapping[str, Any]:
    return seq2seq_compiled.RUNTIMES if isinstance(shape, EncoderDecoderShape) else RUNTIMES


def _require(reason: str | None) -> None:
    if reason is not None:
        raise RuntimeError(reason)


# Each runs in the process of its sides. The same seed gives all of them the same weights.


def build_ours(works: Sequence[Work]) -> list[Side]:
    """One engine for all works."""
    model = random_model(works[0].shape)
    prompts = [random_prompts(model, work) for work in works]
    shared = SharedEngine(model, works)
    return [Promptplex(shared, work, rows) for work, rows in zip(works, prompts, strict=True)]


def build_peft(works: Sequence[Work]) -> list[Side]:
    """One PeftModel with all prompts."""
    model = random_model(works[0].shape)
    peft = PeftPrompts(model)
    for work in works:
        peft.add(work, random_prompts(model, work))
    return [kind(peft, work) for work in works for kind in (PeftOneAtATime, PeftGrouped)]


def build_static(works: Sequence[Work]) -> list[Side]:
    """The bare model."""
    model = random_model(works[0].shape)
    return [StaticBatch(model, work) for work in works]


def build_continuous(works: Sequence[Work]) -> list[Side]:
    """A model for each: its manager is made for one size of work."""
    return [ContinuousBatch(random_model(work.shape), work) for work in works]


# Whether the shape is an encoder-decoder's -> how its sides are built.
_OURS: dict[bool, Callable[..., Sequence[Side]]] = {False: build_ours, True: seq2seq.build_ours}
_IN_THIS_PYTHON: dict[bool, dict[str, Callable[..., Sequence[Side]]]] = {
    False: {"peft": build_peft, "generate": build_static, "generate-batch": build_continuous},
    True: {"peft": seq2seq.build_peft, "generate": seq2seq.build_padded},
}
