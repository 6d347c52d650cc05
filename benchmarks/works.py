"""The named works: what is measured, and which peers take part in it.

Peers that are several times slower take part in a few works only.
"""

from dataclasses import dataclass, replace

from benchmarks.encoder_decoder.work import SHAPES as ENCODER_DECODERS
from benchmarks.encoder_decoder.work import SourceWork
from benchmarks.work import SHAPES, Shape, Work

FAST = ("vllm", "openvino")
ALL = (*FAST, "ctranslate2", "peft", "generate", "generate-batch")
_SEQ2SEQ = ("openvino", "ctranslate2", "ctranslate2-int8", "peft", "generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A work and those who do it."""

    work: Work
    peers: tuple[str, ...] = FAST
    beside: tuple[str, ...] = ()  # works that our engine does in the same rounds, to compare with


def _work(name: str, shape: str = "qwen2-0.4b", *, requests: int = 32, **more: object) -> Work:
    more = {"tasks": min(8, requests)} | more
    return Work(shape=SHAPES[shape], name=name, requests=requests, **more)  # type: ignore[arg-type]


def _sources(name: str, shape: str, num_beams: int = 1) -> Entry:
    work = SourceWork(
        shape=ENCODER_DECODERS[shape], name=name, requests=8, prompt_tokens=256, num_beams=num_beams
    )
    return Entry(work=work, peers=_SEQ2SEQ)


def _large(name: str, sampling: tuple[tuple[str, float], ...] = ()) -> Work:
    return _work(name, "qwen2-1.5b", prompt_tokens=32, new_tokens=16, sampling=sampling)


_ENTRIES = [
    Entry(work=_work("rows-1", requests=1), peers=(*FAST, "ctranslate2", "peft", "generate")),
    Entry(work=_work("rows-4", requests=4)),
    Entry(work=_work("rows-16", requests=16)),
    Entry(work=_work("rows-32"), peers=ALL, beside=("one-task",)),
    Entry(work=_work("rows-64", requests=64)),
    Entry(work=_work("rows-128", requests=128)),
    Entry(work=_work("p-0", virtual_tokens=0)),
    Entry(work=_work("p-100", virtual_tokens=100), peers=(*FAST, "peft")),
    Entry(work=_work("p-500", virtual_tokens=500)),
    Entry(work=_work("inputs-512", requests=8, prompt_tokens=512, new_tokens=64)),
    Entry(
        work=_work("prefill-2048", requests=1, virtual_tokens=0, prompt_tokens=2048, new_tokens=1),
        peers=(*FAST, "generate"),
    ),
    Entry(work=_work("top-p", sampling=(("top_p", 0.9),)), beside=("rows-32",)),
    Entry(work=_work("top-k", sampling=(("top_k", 50),)), peers=(), beside=("rows-32",)),
    Entry(work=_work("min-p", sampling=(("min_p", 0.05),)), peers=(), beside=("rows-32",)),
    Entry(work=_work("choices", new_tokens=1, num_labels=4), peers=(*FAST, "peft", "generate")),
    _sources("t5", "t5-base"),
    _sources("t5-beams", "t5-base", num_beams=4),
    _sources("bart", "bart-base"),
    _sources("bart-beams", "bart-base", num_beams=4),
    Entry(work=_large("1.5b")),
    Entry(work=_large("1.5b-top-p", sampling=(("top_p", 0.9),)), beside=("1.5b",)),
]

WORKS = {entry.work.name: entry for entry in _ENTRIES}
BESIDE = {"one-task": _work("one-task", tasks=1)}  # measured only beside others


def work_named(name: str) -> Work:
    """One of either table."""
    return BESIDE[name] if name in BESIDE else WORKS[name].work


def tiny(work: Work) -> Work:
    """The same work on a model that is small enough to try the command with."""
    if isinstance(work, SourceWork):
        return replace(work, shape=ENCODER_DECODERS[f"tiny-{work.shape.family}"])
    return replace(work, shape=SHAPES["tiny"])


def shape_name(shape: Shape) -> str:
    """What a shape is called."""
    return next(name for name, each in (SHAPES | ENCODER_DECODERS).items() if each == shape)
