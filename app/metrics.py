"""Statistics of engine, requests and prompt caches as Prometheus metrics, in a registry of their own.

`on_step` runs on the engine's thread, so histograms here count in plain lists under one lock;
gauges and cache counters are read when somebody scrapes.
"""

import threading
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from app.engine.client import EngineStats
from app.engine.statistics import StepStats
from app.request import FinishReason, Outcome
from app.store.cache.prompt_cache import SourceStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_TASK_LABELS = 200
RECENT_SECONDS = 30.0  # that the live percentiles look back
_MAX_RECENT = 4096
OTHER = "_other"
FAILURES = ("cancelled", "constraint", "deadline", "error")

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0)


class RedisHealth(Protocol):
    """What the Redis tier says of itself, to any thread."""

    @property
    def breaker_open(self) -> bool:
        """Whether Redis is left alone because it failed, or has never answered yet."""

    def state(self) -> str:
        """Either "up" or "down"."""


class _Histogram:
    """Counts by bucket; the caller locks."""

    def __init__(self, name: str, documentation: str, bounds: tuple[float, ...]) -> None:
        self._name = name
        self._documentation = documentation
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, values: Iterable[float]) -> None:
        for value in values:
            self._counts[bisect_left(self._bounds, value)] += 1
            self._sum += value

    def family(self) -> Metric:
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip([*map(str, self._bounds), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        return HistogramMetricFamily(self._name, self._documentation, buckets=buckets, sum_value=self._sum)


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveCounts:
    """What a live view shows of the steps so far."""

    generated_tokens: int
    device_hits: int
    device_misses: int
    first_token_p50: float | None  # seconds, of the last RECENT_SECONDS; None: no first token in them
    first_token_p95: float | None


@dataclass(frozen=True, slots=True)
class _Sources:
    """What is read at a scrape."""

    engine: Callable[[], EngineStats]
    prompts: Callable[[], SourceStats]
    redis: RedisHealth | None


class Metrics(Collector):
    """All metrics of one server."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sources: _Sources | None = None
        self._labels: set[tuple[str, str]] = set()
        self._requests: Counter[tuple[str, str]] = Counter()
        # There from the start: a series that begins with its first failure had no rate then.
        self._reasons: Counter[str] = Counter({str(reason): 0 for reason in FinishReason})
        self._failures: Counter[str] = Counter(dict.fromkeys(FAILURES, 0))
        self._refusals: Counter[str] = Counter()
        self._totals: Counter[str] = Counter()
        self._recent: deque[tuple[float, float]] = deque(maxlen=_MAX_RECENT)  # when, time to first token
        self._step_seconds = _Histogram(
            "promptplex_step_duration_seconds", "Duration of an engine step", _SECONDS
        )
        self._batch_size = _Histogram("promptplex_batch_size", "Sequences that decode in a step", _SIZES)
        self._distinct_tasks = _Histogram("promptplex_distinct_tasks", "Distinct tasks in a step", _SIZES)
        self._first_token = _Histogram(
            "promptplex_time_to_first_token_seconds",
            "From arrival in the engine to the first token",
            _SECONDS,
        )
        self._inter_token = _Histogram(
            "promptplex_inter_token_latency_seconds", "Between tokens of a request", _SECONDS
        )
        self._end_to_end = _Histogram(
            "promptplex_e2e_request_latency_seconds", "From admission to the end of a request", _SECONDS
        )
        self._queue = _Histogram(
            "promptplex_request_queue_time_seconds", "Waiting for a place in the batch", _SECONDS
        )
        self._prefill = _Histogram(
            "promptplex_request_prefill_time_seconds", "From the batch to the first token", _SECONDS
        )
        self._decode = _Histogram(
            "promptplex_request_decode_time_seconds", "From the first token to the last", _SECONDS
        )
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def watch(
        self,
        engine: Callable[[], EngineStats],
        prompts: Callable[[], SourceStats],
        redis: RedisHealth | None = None,
    ) -> None:
        """Read `engine.stats`, `source.stats` and, where there is one, the Redis tier at every scrape."""
        self._sources = _Sources(engine, prompts, redis)

    def on_step(self, step: StepStats) -> None:
        """The engine's callback, on its thread."""
        with self._lock:
            self._step_seconds.observe((step.duration,))
            self._batch_size.observe((step.num_decode_rows,))
            self._distinct_tasks.observe((step.num_distinct_tasks,))
            self._first_token.observe(step.first_token_latencies)
            if step.first_token_latencies:
                now = time.monotonic()
                self._recent.extend((now, latency) for latency in step.first_token_latencies)
            self._inter_token.observe(step.inter_token_latencies)
            self._totals["generation_tokens"] += step.new_tokens
            self._totals["preemptions"] += step.num_preempted
            self._totals["prefix_tokens"] += step.num_prefix_tokens
            self._totals["device_hits"] += step.prefix_hits
            self._totals["device_misses"] += step.prefix_misses

    def on_outcome(self, outcome: Outcome) -> None:
        """The generation service's callback: a request that a task or the base was found for has ended."""
        with self._lock:
            if outcome.reason not in tuple(FinishReason):
                self._failures[outcome.reason] += 1
                return
            self._reasons[outcome.reason] += 1
            self._requests[self._label(outcome.task, outcome.version)] += 1
            self._totals["prompt_tokens"] += outcome.prompt_tokens
            self._end_to_end.observe((outcome.seconds,))
            if outcome.timings is not None:
                self._queue.observe((outcome.timings.queue,))
                self._prefill.observe((outcome.timings.prefill,))
                self._decode.observe((outcome.timings.decode,))

    def on_refusal(self, reason: str) -> None:
        """The edge's callback: a request was refused for its key, before its body was read."""
        with self._lock:
            self._refusals[reason] += 1

    def live(self) -> LiveCounts:
        """Totals, and percentiles of recent first tokens."""
        since = time.monotonic() - RECENT_SECONDS
        with self._lock:
            while self._recent and self._recent[0][0] < since:
                self._recent.popleft()
            latencies = [latency for _, latency in self._recent]
            totals = self._totals.copy()
        latencies.sort()
        return LiveCounts(
            generated_tokens=totals["generation_tokens"],
            device_hits=totals["device_hits"],
            device_misses=totals["device_misses"],
            first_token_p50=_percentile(latencies, 0.50),
            first_token_p95=_percentile(latencies, 0.95),
        )

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Prometheus' own entry; consistent within the lock."""
        with self._lock:
            families = [*self._histograms(), *self._counters()]
        yield from families
        if self._sources is not None:
            yield from _engine_gauges(self._sources.engine())
            prompts = self._sources.prompts()
            yield from self._caches(prompts)
            yield from _loads(prompts)
            yield from _redis_gauges(self._sources.redis)

    def _label(self, task: str, version: int) -> tuple[str, str]:
        label = (task or "_base", str(version) if version else "")
        if label in self._labels or len(self._labels) < MAX_TASK_LABELS:
            self._labels.add(label)
            return label
        return (OTHER, "")

    def _histograms(self) -> list[Metric]:
        return [
            histogram.family()
            for histogram in (
                self._step_seconds,
                self._batch_size,
                self._distinct_tasks,
                self._first_token,
                self._inter_token,
                self._end_to_end,
                self._queue,
                self._prefill,
                self._decode,
            )
        ]

    def _counters(self) -> Iterator[Metric]:
        totals = self._totals
        yield _counter("prompt_tokens", "Tokens of finished requests' prompts", totals["prompt_tokens"])
        yield _counter("generation_tokens", "Tokens generated", totals["generation_tokens"])
        yield _counter(
            "prefix_tokens", "Tokens run through the model to make prefixes", totals["prefix_tokens"]
        )
        yield _counter("num_preemptions", "Requests preempted", totals["preemptions"])
        yield _labelled("request_success", "Finished requests", ["finish_reason"], _by_one(self._reasons))
        yield _labelled(
            "request_failure", "Requests that ended otherwise", ["reason"], _by_one(self._failures)
        )
        yield _labelled(
            "request_refusals",
            "Requests refused before their body was read",
            ["reason"],
            _by_one(self._refusals),
        )
        yield _labelled("requests", "Finished requests by task", ["task", "version"], self._requests.items())

    def _caches(self, prompts: SourceStats) -> Iterator[Metric]:
        with self._lock:
            hits = {"device": self._totals["device_hits"], **prompts.hits}
            misses = {"device": self._totals["device_misses"], **prompts.misses}
        yield _labelled("prompt_cache_hits", "Prompts found, by tier", ["tier"], _by_one(hits))
        yield _labelled("prompt_cache_misses", "Prompts not found, by tier", ["tier"], _by_one(misses))
        yield _gauge("prompt_cache_host_prompts", "Prompts in host memory", prompts.host_prompts)
        yield _gauge("prompt_cache_host_bytes", "Bytes of prompts in host memory", prompts.host_bytes)


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None


def _loads(prompts: SourceStats) -> Iterator[Metric]:
    seconds, num_bytes = _by_one(prompts.tier_seconds), _by_one(prompts.tier_bytes)
    yield _counter("redis_failures", "Wrong bytes from Redis, reads that broke", prompts.remote_failures)
    yield _counter("prompt_load_failures", "Prompt loads that failed", prompts.load_failures)
    yield _counter("prompt_load_seconds", "Time spent on loading prompts", prompts.load_seconds)
    yield _labelled("prompt_tier_seconds", "Time until a tier has answered, summed", ["tier"], seconds)
    yield _labelled("prompt_tier_bytes", "Bytes of prompts read, by tier", ["tier"], num_bytes)
    yield _counter("prompt_store_heals", "Prompts given back to a store that had lost them", prompts.heals)
    yield _counter("prompt_hedged_reads", "Loads that asked the store while Redis was slow", prompts.hedged)


def _redis_gauges(redis: RedisHealth | None) -> Iterator[Metric]:
    if redis is not None:
        yield _gauge("redis_up", "Whether Redis is in use", redis.state() == "up")
        yield _gauge("redis_breaker_open", "Whether Redis is left alone after failures", redis.breaker_open)


def _engine_gauges(engine: EngineStats) -> Iterator[Metric]:
    yield _gauge("num_requests_running", "Requests in the batch", engine.num_running)
    yield _gauge("num_requests_waiting", "Requests in the queue", engine.num_waiting)
    yield _gauge("kv_cache_usage_ratio", "Share of K/V blocks in use", engine.kv_usage)
    yield _gauge("resident_prefixes", "Prefixes on the device", engine.resident_prefixes)
    yield _gauge("resident_prefix_bytes", "Their bytes", engine.resident_prefix_bytes)


def _by_one(counts: Mapping[str, float]) -> Iterator[tuple[tuple[str, ...], float]]:
    return (((name,), count) for name, count in counts.items())


def _counter(name: str, documentation: str, value: float) -> Metric:
    return CounterMetricFamily(f"promptplex_{name}", documentation, value=value)


def _gauge(name: str, documentation: str, value: float) -> Metric:
    return GaugeMetricFamily(f"promptplex_{name}", documentation, value=value)


def _labelled(
    name: str, documentation: str, labels: list[str], rows: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    family = CounterMetricFamily(f"promptplex_{name}", documentation, labels=labels)
    for values, count in rows:
        family.add_metric(list(values), count)
    return family
