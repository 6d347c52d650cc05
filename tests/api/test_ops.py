from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app import __version__
from app.api.app import create_app
from app.api.state import ServerState
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import error_of, publish_text
from tests.serving.stack import BASE_NAME, POSITIONS, Stack, running_stack


def test_health_of_a_ready_server(client: httpx.Client) -> None:
    body = client.get("/health").json()
    assert body["status"] == "ready"
    assert (body["model"], body["device"], body["store"], body["redis"]) == (BASE_NAME, "cpu", "up", "off")
    assert body["queue"].keys() == {"running", "waiting"}
    assert isinstance(body["tasks"], int)
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("draining", [False, True])
def test_before_and_after_only_health_answers(draining: bool) -> None:
    state = ServerState(draining=draining, progress="loading weights")
    with serving(state) as url, client_of(url) as client:
        phase = "draining" if draining else "loading"
        assert client.get("/health").json() == {
            "status": phase,
            "version": __version__,
            "progress": "loading weights",
        }
        assert client.get("/health/live").status_code == 200
        ready = client.get("/health/ready")
        assert (ready.status_code, ready.json()) == (503, {"status": phase})
        for response in (
            client.post("/generate", json={"inputs": "a"}),
            client.get("/tasks"),
            client.get("/info"),
            client.get("/metrics"),
            client.get("/ops/stream"),
        ):
            assert error_of(response, 503)["code"] == "not_ready"
            assert int(response.headers["retry-after"]) >= 1
        assert client.get("/version").json() == {"version": __version__}


def test_metrics_last_until_the_end(stack: Stack) -> None:
    with serving(ServerState(services=services_of(stack), draining=True)) as url, client_of(url) as client:
        assert client.get("/metrics").status_code == 200
        assert client.get("/health").json()["status"] == "draining"
        error_of(client.post("/generate", json={"inputs": "a"}), 503)


def test_a_store_that_cannot_be_read_is_down_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        running_stack(tmp_path / "store") as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / "tasks").symlink_to("tasks")  # a loop: it can't be opened, by root neither
        body = client.get("/health").json()
        assert (body["status"], body["store"], body["tasks"]) == ("ready", "down", None)
        assert "the store can't be read" in caplog.text
        stack.store.histories.task_ids = None  # a bug of ours must not be reported as a fault of the disk
        error_of(client.get("/health"), 500)


def test_a_dead_engine_is_not_ready(tmp_path: Path) -> None:
    with (
        running_stack(tmp_path / "store") as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        stack.engine.stop()
        assert client.get("/health/ready").json() == {"status": "dead"}
        error_of(client.post("/generate", json={"inputs": "a"}), 503)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    with running_stack(tmp_path / "store", max_rows=1, max_queue=1) as stack:
        text = stack.talkative()
        with (
            serving(ServerState(services=services_of(stack))) as url,
            client_of(url) as client,
            ThreadPoolExecutor(8) as pool,
        ):
            answers = list(pool.map(lambda _: client.post("/generate", json={"inputs": text}), range(8)))
    assert {answer.status_code for answer in answers} == {200, 503}
    full = next(answer for answer in answers if answer.status_code == 503)
    assert error_of(full, 503)["code"] == "overloaded"
    assert int(full.headers["retry-after"]) >= 1


def test_info(client: httpx.Client) -> None:
    body = client.get("/info").json()
    assert body["model_id"] == BASE_NAME
    assert body["max_total_tokens"] == POSITIONS
    assert body["model_architecture"] == "llama"


def test_metrics(client: httpx.Client) -> None:
    publish_text(client, "measured", "M: {x}")
    for _ in range(2):
        client.post(
            "/generate", json={"task_id": "measured", "inputs": "a", "parameters": {"max_new_tokens": 2}}
        )
    client.post("/generate", json={"task_id": "unheard-of", "inputs": "a"})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = response.text.splitlines()
    assert 'promptplex_requests_total{task="measured",version="1"} 2.0' in lines
    assert "unheard-of" not in response.text
    families = {line.split()[2] for line in lines if line.startswith("# TYPE")}
    stems = """
        num_requests_running num_requests_waiting time_to_first_token_seconds inter_token_latency_seconds
        e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds
        request_decode_time_seconds prompt_tokens_total generation_tokens_total request_success_total
        kv_cache_usage_ratio batch_size distinct_tasks prompt_load_seconds_total prompt_load_failures_total
        prompt_cache_hits_total prompt_cache_misses_total kv_cache_bytes kv_bytes_per_token
        resident_prefixes resident_prefix_bytes
    """
    assert {f"promptplex_{name}" for name in stems.split()} <= families


def test_every_route_is_documented(stack: Stack) -> None:
    document = create_app(ServerState(services=services_of(stack))).openapi()
    assert set(document["paths"]) == {
        "/",
        "/generate",
        "/generate_stream",
        "/tokenize",
        "/detokenize",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/decisions",
        "/v1/models",
        "/v1/models/{model}",
        "/tasks",
        "/tasks/{task_id}",
        "/tasks/{task_id}/versions",
        "/tasks/{task_id}/rollback",
        "/tasks/{task_id}/aliases/{alias}",
        "/tasks/{task_id}/restore",
        "/tasks/{task_id}/training-runs",
        "/tasks/{task_id}/training-runs/check",
        "/tasks/{task_id}/training-runs/{run_id}",
        "/health",
        "/health/live",
        "/health/ready",
        "/info",
        "/version",
        "/metrics",
        "/ops/stream",
    }
