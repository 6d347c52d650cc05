"""Statistics of engine, requests and prompt caches as Prometheus metrics, in a registry of their own.

Gauges and the counters of caches are read at a scrape.
"""

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from app.engine.client import EngineStats
from app.engine.memory.device import DeviceMemory
from app.engine.statistics import StepStats
from app.request import FinishReason, Outcome, ProgramKind, ProgramOutcome
from app.store.cache.prompt_cache import PromptCacheStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TASK_LABELS = 200
RECENT_SECONDS = 30.0  # that the live percentiles look back
_MAX_RECENT = 4096
OTHER = "_other"
FAILURES = ("cancelled", "constraint", "deadline", "error", "refused")

# "Created" series would stand beside every other one; no dashboard or alert reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class RedisHealth(Protocol):
    """The health of the Redis tier."""

    @property
    def is_up(self) -> bool:
        """Return whether Redis is asked; called from any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCounts:
    """Counts of the steps so far, for a live view."""

    generated_tokens: int
    device_hits: int
    device_misses: int
    first_token_p50: float | None  # seconds, of the last RECENT_SECONDS; None: no first token in them
    first_token_p95: float | None


@dataclass(frozen=True, slots=True)
class _Watched:
    """What is read at each scrape."""

    engine: Callable[[], EngineStats]
    prompts: Callable[[], PromptCacheStats]
    redis: RedisHealth | None
    memory: Callable[[], DeviceMemory] | None


class BulkHistogram(Collector):
    """A histogram that takes all values of a step at once: one by one they would cost as much as the step."""

    def __init__(self, name: str, documentation: str, bounds: tuple[float, ...]) -> None:
        self._name, self._documentation, self._bounds = name, documentation, bounds
        self._counts = [0] * (len(bounds) + 1)  # the last one is beyond all bounds
        self._sum = 0.0
        self._lock = threading.Lock()

    def observe_all(self, values: Collection[float]) -> None:
        """Count values."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += sum(values)

    def collect(self) -> Iterator[Metric]:
        """Return the buckets; the registry calls it at a scrape."""
        with self._lock:
            counts, total = accumulate(self._counts), self._sum
            bounds = map(floatToGoString, (*self._bounds, math.inf))
            buckets = list(zip(bounds, counts, strict=True))
        yield HistogramMetricFamily(self._name, self._documentation, buckets, total)


class Metrics(Collector):
    """All metrics of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        histogram, counter = self._histogram, self._counter
        self._step_seconds = histogram("step_duration_seconds", "Duration of an engine step")
        self._batch_size = histogram("batch_size", "Sequences that decode in a step", _SIZES)
        self._distinct_tasks = histogram("distinct_tasks", "Distinct tasks in a step", _SIZES)
        self._sources = histogram("encoded_sources", "Sources encoded in a step that encodes any", _SIZES)
        self._first_token = histogram(
            "time_to_first_token_seconds", "From arrival in the engine to the first token"
        )
        self._inter_token = BulkHistogram(
            "promptplex_inter_token_latency_seconds", "Between tokens of a request", _SECONDS
        )
        self._registry.register(self._inter_token)
        self._end_to_end = histogram("e2e_request_latency_seconds", "From admission to the end of a request")
        self._queue = histogram("request_queue_time_seconds", "Waiting for a place in the batch")
        self._prefill = histogram("request_prefill_time_seconds", "From the batch to the first token")
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last")
        self._prompt_tokens = counter("prompt_tokens", "Tokens of finished requests' prompts")
        self._generation_tokens = counter("generation_tokens", "Tokens generated")
        self._prefix_tokens = counter("prefix_tokens", "Tokens run through the model to make prefixes")
        self._encoder_tokens = counter("encoder_tokens", "Rows and tokens run through the encoder")
        self._beam_rows = counter("beam_rows", "Rows of beam search that decoded, of all steps")
        self._block_copies = counter("block_copies", "K/V blocks copied because sequences had shared them")
        self._reused_tokens = counter("reused_tokens", "Tokens of prompts that an earlier step had computed")
        self._speculated_tokens = counter("speculated_tokens", "Tokens guessed and run")
        self._accepted_tokens = counter("accepted_tokens", "Tokens that came since guesses were right")
        self._preemptions = counter("num_preemptions", "Requests preempted")
        self._successes = counter("request_success", "Finished requests", "finish_reason")
        self._failures = counter("request_failure", "Requests that ended otherwise", "reason")
        self._refusals = counter("request_refusals", "Requests refused before their body was read", "reason")
        self._requests = counter("requests", "Finished requests by task", "task", "version")
        self._programs = counter(
            "programs", "Requests that have ended, by what they did with the model", "kind", "reason"
        )
        self._program_seconds = histogram(
            "program_duration_seconds", "The same, from admission to the end", _SECONDS, ("kind",)
        )
        self._chain_steps = histogram("chain_steps", "Steps of a chain", _SIZES)
        self._vote_ballots = histogram("vote_ballots", "Ballots of a vote or an ensemble", _SIZES)
        self._begin_series()
        self._device_hits = self._device_misses = 0  # shown as a tier of the prompt caches
        self._labels: set[tuple[str, str]] = set()
        self._watched: _Watched | None = None  # read at each scrape
        self._recent: deque[tuple[float, float]] = deque(maxlen=_MAX_RECENT)  # when, time to first token
        self._lock = threading.Lock()  # of the recent ones, and of hits and misses
        self._registry.register(self)

    def _begin_series(self) -> None:
        """Let them be there from the start: one that begins with its first failure had no rate then."""
        for reason in FinishReason:
            self._successes.labels(reason)
        for failure in FAILURES:
            self._failures.labels(failure)
        for kind, reason in product(ProgramKind, (*FinishReason, *FAILURES)):
            self._programs.labels(kind, reason)

    def _histogram(
        self,
        name: str,
        documentation: str,
        bounds: tuple[float, ...] = _SECONDS,
        labels: tuple[str, ...] = (),
    ) -> Histogram:
        return Histogram(f"promptplex_{name}", documentation, labels, registry=self._registry, buckets=bounds)

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"promptplex_{name}", documentation, labels, registry=self._registry)

    def watch(
        self,
        engine: Callable[[], EngineStats],
        prompts: Callable[[], PromptCacheStats],
        redis: RedisHealth | None = None,
        memory: Callable[[], DeviceMemory] | None = None,
    ) -> None:
        """Read the engine and the prompt cache, and if given Redis and a device, at each scrape."""
        self._watched = _Watched(engine, prompts, redis, memory)

    def on_step(self, step: StepStats) -> None:
        """Count what an engine's step did; called on the engine's thread."""
        self._step_seconds.observe(step.duration)
        self._batch_size.observe(step.num_decode_rows)
        self._distinct_tasks.observe(step.num_distinct_tasks)
        self._inter_token.observe_all(step.inter_token_latencies)
        for latency in step.first_token_latencies:
            self._first_token.observe(latency)
        with self._lock:
            now = time.monotonic()
            self._recent.extend((now, latency) for latency in step.first_token_latencies)
            self._device_hits += step.prefix_hits
            self._device_misses += step.prefix_misses
        for counter, number in (
            (self._generation_tokens, step.new_tokens),
            (self._speculated_tokens, step.num_speculated_tokens),
            (self._accepted_tokens, step.num_accepted_tokens),
            (self._preemptions, step.num_preempted),
            (self._beam_rows, step.num_beam_rows),
            (self._block_copies, step.num_copied_blocks),
            (self._reused_tokens, step.num_reused_tokens),
            (self._prefix_tokens, step.num_prefix_tokens),
            (self._encoder_tokens, step.num_encoder_tokens),
        ):
            if number:
                counter.inc(number)
        if step.num_sources:
            self._sources.observe(step.num_sources)

    def on_outcome(self, outcome: Outcome) -> None:
        """Count a request that has ended, for which a task or the base was found."""
        if outcome.reason not in tuple(FinishReason):
            self._failures.labels(outcome.reason).inc()
            return
        self._successes.labels(outcome.reason).inc()
        self._requests.labels(*self._label(outcome.task, outcome.version)).inc()
        self._prompt_tokens.inc(outcome.prompt_tokens)
        self._end_to_end.observe(outcome.seconds)
        if outcome.timings is not None:
            self._queue.observe(outcome.timings.queue)
            self._prefill.observe(outcome.timings.prefill)
            self._decode.observe(outcome.timings.decode)

    def on_program(self, outcome: ProgramOutcome) -> None:
        """Count all that one request did."""
        self._programs.labels(outcome.kind, outcome.reason).inc()
        self._program_seconds.labels(outcome.kind).observe(outcome.seconds)
        for steps in outcome.chain_steps:
            self._chain_steps.observe(steps)
        if outcome.num_ballots:
            self._vote_ballots.observe(outcome.num_ballots)

    def on_refusal(self, reason: str) -> None:
        """Count a request that was refused for its key, before its body was read."""
        self._refusals.labels(reason).inc()

    def live(self) -> LiveCounts:
        """Return totals, and percentiles of recent first tokens."""
        since = time.monotonic() - RECENT_SECONDS
        with self._lock:
            while self._recent and self._recent[0][0] < since:
                self._recent.popleft()
            latencies = sorted(latency for _, latency in self._recent)
        return LiveCounts(
            generated_tokens=_total(self._generation_tokens),
            device_hits=self._device_hits,
            device_misses=self._device_misses,
            first_token_p50=_percentile(latencies, 0.50),
            first_token_p95=_percentile(latencies, 0.95),
        )

    def render(self) -> bytes:
        """Return the exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read the engine's gauges and the caches' counters; the registry calls it at a scrape."""
        if self._watched is None:
            return
        redis, memory = self._watched.redis, self._watched.memory
        yield from _engine_gauges(self._watched.engine())
        if memory is not None:
            yield from _memory_gauges(memory())
        stats = self._watched.prompts()
        yield from self._caches(stats)
        yield from _loads(stats)
        if redis is not None:
            yield _gauge("redis_up", "Whether Redis is in use", redis.is_up)
            yield _gauge("redis_breaker_open", "Whether Redis is left alone after failures", not redis.is_up)

    def _label(self, task: str, version: int) -> tuple[str, str]:
        label = (task or "_base", str(version) if version else "")
        if label in self._labels or len(self._labels) < MAX_TASK_LABELS:
            self._labels.add(label)
            return label
        return (OTHER, "")

    def _caches(self, prompts: PromptCacheStats) -> Iterator[Metric]:
        hits = {"device": self._device_hits, **prompts.hits}
        misses = {"device": self._device_misses, **prompts.misses}
        yield _by_tier("prompt_cache_hits", "Prompts found, by tier", hits)
        yield _by_tier("prompt_cache_misses", "Prompts not found, by tier", misses)
        yield _gauge("prompt_cache_host_prompts", "Prompts in host memory", prompts.host_prompts)
        yield _gauge("prompt_cache_host_bytes", "Bytes of prompts in host memory", prompts.host_bytes)


def _total(counter: Counter) -> int:
    (family,) = counter.collect()
    return int(family.samples[0].value)


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _loads(prompts: PromptCacheStats) -> Iterator[Metric]:
    yield _counter("redis_failures", "Wrong bytes from Redis, reads that broke", prompts.remote_failures)
    yield _counter("prompt_load_failures", "Prompt loads that failed", prompts.load_failures)
    yield _counter("prompt_load_seconds", "Time spent on loading prompts", prompts.load_seconds)
    yield _by_tier("prompt_tier_seconds", "Time until a tier has answered, summed", prompts.tier_seconds)
    yield _by_tier("prompt_tier_bytes", "Bytes of prompts read, by tier", prompts.tier_bytes)
    yield _counter("prompt_store_heals", "Prompts given back to a store that had lost them", prompts.heals)
    yield _counter("prompt_hedged_reads", "Loads that asked the store while Redis was slow", prompts.hedged)


def _engine_gauges(engine: EngineStats) -> Iterator[Metric]:
    yield _gauge("num_requests_running", "Requests in the batch", engine.num_running)
    yield _gauge("num_requests_waiting", "Requests in the queue", engine.num_waiting)
    yield _gauge("kv_cache_usage_ratio", "Share of K/V blocks in use", engine.kv_usage)
    yield _gauge("kv_cache_bytes", "Bytes of all K/V blocks", engine.kv_cache_bytes)
    yield _gauge("kv_bytes_per_token", "Bytes of K/V that a token takes", engine.kv_bytes_per_token)
    yield _gauge("kv_blocks", "K/V blocks", engine.kv_blocks)
    yield _gauge("kv_free_blocks", "Those that nothing holds", engine.kv_free_blocks)
    yield _gauge("kv_evictable_blocks", "Those of prefixes that no request uses", engine.kv_evictable_blocks)
    unfilled = GaugeMetricFamily(
        "promptplex_kv_unfilled_slots", "Slots at the ends of holders' last blocks", labels=["holder"]
    )
    unfilled.add_metric(["prefix"], engine.unfilled_prefix_slots)
    unfilled.add_metric(["request"], engine.unfilled_request_slots)
    yield unfilled
    yield _gauge("resident_prefixes", "Prefixes on the device", engine.resident_prefixes)
    yield _gauge("resident_prefix_bytes", "Their bytes", engine.resident_prefix_bytes)
    yield _gauge("held_sequences", "Ended sequences that may be continued", engine.num_held)
    yield _gauge("resident_sources", "Encoded sources on the device", engine.num_sources)


def _memory_gauges(memory: DeviceMemory) -> Iterator[Metric]:
    yield _gauge("device_memory_bytes", "Memory of the engine's device", memory.total)
    yield _gauge("device_memory_free_bytes", "What of it any process could have", memory.free)
    yield _gauge("device_memory_allocated_bytes", "What this server uses", memory.allocated)
    yield _gauge("device_memory_unused_bytes", "What its allocator keeps without use", memory.unused)


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(f"promptplex_{name}", documentation, value=value)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"promptplex_{name}", documentation, value=value)


def _by_tier(name: str, documentation: str, counts: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"promptplex_{name}", documentation, labels=["tier"])
    for tier, count in counts.items():
        family.add_metric([tier], count)
    return family
