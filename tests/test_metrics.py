import threading
from dataclasses import fields
from typing import Any

import pytest

from app.engine.client import EngineStats
from app.engine.memory.device import DeviceMemory
from app.engine.statistics import StepStats
from app.metrics import FAILURES, MAX_TASK_LABELS, Metrics
from app.request import FinishReason, Outcome, ProgramKind, ProgramOutcome, RequestTimings
from app.store.cache.prompt_cache import PromptCacheStats


def step(**changes: Any) -> StepStats:
    tuples = {"finished", "first_token_latencies", "inter_token_latencies"}
    nothing = {field.name: () if field.name in tuples else 0 for field in fields(StepStats)}
    return StepStats(**{**nothing, **changes})


def outcome(task: str = "t", version: int = 1, reason: str = "length") -> Outcome:
    return Outcome(
        task=task,
        version=version,
        reason=reason,
        prompt_tokens=3,
        generated_tokens=2,
        seconds=0.2,
        timings=RequestTimings(queue=0.001, prefill=0.01, decode=0.1),
    )


def lines(metrics: Metrics) -> list[str]:
    return metrics.render().decode().splitlines()


def test_histograms_count_like_prometheus() -> None:
    metrics = Metrics()
    metrics.on_step(step(num_decode_rows=3, first_token_latencies=(0.004, 0.005, 500.0), new_tokens=3))
    text = lines(metrics)
    name = "promptplex_time_to_first_token_seconds"
    assert f'{name}_bucket{{le="0.0025"}} 0.0' in text
    assert f'{name}_bucket{{le="0.005"}} 2.0' in text  # a bound belongs to its bucket
    assert f'{name}_bucket{{le="120.0"}} 2.0' in text
    assert f'{name}_bucket{{le="+Inf"}} 3.0' in text
    assert f"{name}_count 3.0" in text
    assert f"{name}_sum 500.009" in text
    assert "promptplex_generation_tokens_total 3.0" in text


def test_the_encoder_has_metrics_of_its_own() -> None:
    metrics = Metrics()
    metrics.watch(lambda: EngineStats(num_sources=3), source_stats)
    for sources, tokens in ((2, 40), (0, 0), (1, 7)):
        metrics.on_step(step(num_sources=sources, num_encoder_tokens=tokens))
    text = lines(metrics)
    assert "promptplex_encoder_tokens_total 47.0" in text
    assert "promptplex_encoded_sources_count 2.0" in text
    assert "promptplex_encoded_sources_sum 3.0" in text
    assert "promptplex_resident_sources 3.0" in text


def test_guesses_are_counted() -> None:
    metrics = Metrics()
    for guessed, accepted in ((4, 3), (0, 0), (2, 0)):
        metrics.on_step(step(num_speculated_tokens=guessed, num_accepted_tokens=accepted))
    text = lines(metrics)
    assert "promptplex_speculated_tokens_total 6.0" in text
    assert "promptplex_accepted_tokens_total 3.0" in text


def test_no_series_tells_when_others_were_created() -> None:
    assert not any("_created" in line for line in lines(Metrics()))


def test_labels_are_capped() -> None:
    metrics = Metrics()
    for number in range(MAX_TASK_LABELS + 50):
        metrics.on_outcome(outcome(task=f"task-{number}"))
    metrics.on_outcome(outcome(task="task-0"))
    text = lines(metrics)
    assert sum(line.startswith("promptplex_requests_total{") for line in text) == MAX_TASK_LABELS + 1
    assert 'promptplex_requests_total{task="_other",version=""} 50.0' in text
    assert 'promptplex_requests_total{task="task-0",version="1"} 2.0' in text


def test_failures_are_apart_from_successes() -> None:
    metrics = Metrics()
    metrics.on_outcome(outcome(reason="stop_sequence"))
    metrics.on_outcome(outcome(task="", version=0, reason="eos_token"))
    metrics.on_outcome(outcome(reason="deadline"))
    text = lines(metrics)
    assert 'promptplex_request_success_total{finish_reason="stop_sequence"} 1.0' in text
    assert 'promptplex_request_failure_total{reason="deadline"} 1.0' in text
    assert 'promptplex_requests_total{task="_base",version=""} 1.0' in text
    assert "promptplex_prompt_tokens_total 6.0" in text
    assert "promptplex_e2e_request_latency_seconds_count 2.0" in text


def test_failures_are_counted_from_nought() -> None:
    text = lines(Metrics())
    for reason in FAILURES:
        assert f'promptplex_request_failure_total{{reason="{reason}"}} 0.0' in text
    for reason in FinishReason:
        assert f'promptplex_request_success_total{{finish_reason="{reason}"}} 0.0' in text


def test_programs_are_counted_with_their_steps_and_ballots() -> None:
    metrics = Metrics()
    metrics.on_program(
        ProgramOutcome(
            kind=ProgramKind.VOTE, reason="eos_token", seconds=2.0, chain_steps=(2, 6), num_ballots=2
        )
    )
    metrics.on_program(ProgramOutcome(kind=ProgramKind.COMPLETE, reason="deadline", seconds=1.0))
    text = lines(metrics)
    assert 'promptplex_programs_total{kind="vote",reason="eos_token"} 1.0' in text
    assert 'promptplex_programs_total{kind="complete",reason="deadline"} 1.0' in text
    assert 'promptplex_programs_total{kind="chain",reason="loop"} 0.0' in text
    assert 'promptplex_program_duration_seconds_sum{kind="vote"} 2.0' in text
    assert "promptplex_chain_steps_sum 8.0" in text
    assert "promptplex_vote_ballots_count 1.0" in text


class DownRedis:
    is_up = False


def source_stats() -> PromptCacheStats:
    return PromptCacheStats(
        hits={"host": 2, "redis": 1},
        misses={"host": 3},
        tier_seconds={"redis": 0.25},
        tier_bytes={"redis": 1000},
        load_failures=1,
        remote_failures=0,
        heals=1,
        hedged=2,
        load_seconds=0.5,
        num_loading=0,
        host_prompts=1,
        host_bytes=10,
    )


def test_gauges_and_caches_are_read_at_the_scrape() -> None:
    metrics = Metrics()
    metrics.on_step(step(prefix_hits=4, prefix_misses=1))
    metrics.watch(lambda: EngineStats(num_running=5, kv_usage=0.25), source_stats)
    text = lines(metrics)
    assert "promptplex_num_requests_running 5.0" in text
    assert "promptplex_kv_cache_usage_ratio 0.25" in text
    assert 'promptplex_prompt_cache_hits_total{tier="device"} 4.0' in text
    assert 'promptplex_prompt_cache_hits_total{tier="redis"} 1.0' in text
    assert 'promptplex_prompt_cache_misses_total{tier="host"} 3.0' in text
    assert "promptplex_prompt_load_failures_total 1.0" in text
    assert "promptplex_prompt_cache_host_prompts 1.0" in text
    assert 'promptplex_prompt_tier_seconds_total{tier="redis"} 0.25' in text
    assert 'promptplex_prompt_tier_bytes_total{tier="redis"} 1000.0' in text
    assert "promptplex_prompt_store_heals_total 1.0" in text
    assert "promptplex_prompt_hedged_reads_total 2.0" in text
    assert not any("redis_up" in line or "breaker" in line for line in text), "no Redis is configured"


def test_redis_is_told_of_where_there_is_one() -> None:
    metrics = Metrics()
    metrics.watch(EngineStats, source_stats, DownRedis())
    text = lines(metrics)
    assert "promptplex_redis_up 0.0" in text
    assert "promptplex_redis_breaker_open 1.0" in text


def test_scrapes_beside_steps() -> None:
    metrics = Metrics()
    writers = [
        threading.Thread(target=lambda: [metrics.on_step(step(new_tokens=1)) for _ in range(500)])
        for _ in range(2)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        metrics.render()
    assert "promptplex_generation_tokens_total 1000.0" in lines(metrics)


def test_a_live_view_gets_totals_and_percentiles_of_recent_first_tokens() -> None:
    metrics = Metrics()
    assert (metrics.live().first_token_p50, metrics.live().first_token_p95) == (None, None)
    latencies = tuple(number / 100 for number in range(1, 101))
    metrics.on_step(step(new_tokens=100, first_token_latencies=latencies, prefix_hits=4, prefix_misses=1))
    live = metrics.live()
    assert (live.generated_tokens, live.device_hits, live.device_misses) == (100, 4, 1)
    assert live.first_token_p50 == pytest.approx(0.5, abs=0.011)
    assert live.first_token_p95 == pytest.approx(0.95, abs=0.011)


def test_memory_of_the_device_and_blocks_are_shown() -> None:
    metrics = Metrics()
    stats = EngineStats(
        kv_blocks=100,
        kv_free_blocks=40,
        kv_evictable_blocks=25,
        unfilled_prefix_slots=80,
        unfilled_request_slots=9,
    )
    memory = DeviceMemory(total=1 << 36, free=1 << 32, allocated=3 << 30, reserved=5 << 30)
    metrics.watch(lambda: stats, source_stats, memory=lambda: memory)
    text = lines(metrics)
    assert "promptplex_kv_blocks 100.0" in text
    assert "promptplex_kv_free_blocks 40.0" in text
    assert "promptplex_kv_evictable_blocks 25.0" in text
    assert 'promptplex_kv_unfilled_slots{holder="prefix"} 80.0' in text
    assert 'promptplex_kv_unfilled_slots{holder="request"} 9.0' in text
    shown = dict(line.rsplit(" ", 1) for line in text if line.startswith("promptplex_device_memory"))
    assert {name: float(value) for name, value in shown.items()} == {
        "promptplex_device_memory_bytes": 1 << 36,
        "promptplex_device_memory_free_bytes": 1 << 32,
        "promptplex_device_memory_allocated_bytes": 3 << 30,
        "promptplex_device_memory_unused_bytes": 2 << 30,
    }
