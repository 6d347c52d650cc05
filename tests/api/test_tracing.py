"""Spans: one for each request, under the client's own; sent to a collector that the environment names."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from app.api.middleware.tracing import tracer_from_environment
from app.api.state import ServerState
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import publish_text
from tests.bases import save_tiny_llama
from tests.cli.conftest import INTERPRETER, Server
from tests.serving.stack import BASE_NAME, Stack
from tests.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


@pytest.fixture
def traced(stack: Stack) -> Iterator[tuple[httpx.Client, InMemorySpanExporter]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with (
        serving(ServerState(services=services_of(stack)), tracer=provider.get_tracer("test")) as url,
        client_of(url) as client,
    ):
        yield client, exporter


def finished(exporter: InMemorySpanExporter, count: int) -> tuple[ReadableSpan, ...]:
    """A span ends shortly after its answer."""
    wait_until(lambda: len(exporter.get_finished_spans()) >= count)
    return exporter.get_finished_spans()


def test_a_request_is_a_span(traced: tuple[httpx.Client, InMemorySpanExporter]) -> None:
    client, exporter = traced
    version = publish_text(client, "spanned", "S: {x}")["version"]
    finished(exporter, 1)
    exporter.clear()
    body = {"task_id": "spanned", "inputs": "private", "parameters": {"max_new_tokens": 3}}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    details = client.post("/generate", json=body, headers=headers).json()["details"]
    (span,) = finished(exporter, 1)
    assert (span.name, span.kind.name) == ("POST /generate", "SERVER")
    assert span.context.trace_id == int(TRACE, 16)
    assert span.parent is not None
    assert span.parent.span_id == int(PARENT, 16)
    assert dict(span.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/generate",
        "http.response.status_code": 200,
        "promptplex.request_id": "mine",
        "gen_ai.request.model": "spanned",
        "gen_ai.response.model": BASE_NAME,
        "gen_ai.usage.input_tokens": details["prompt_tokens"],
        "gen_ai.usage.output_tokens": details["generated_tokens"],
        "promptplex.task": "spanned",
        "promptplex.task.version": version,
    }


def test_the_parts_of_a_request_are_spans_below_its_own(
    traced: tuple[httpx.Client, InMemorySpanExporter],
) -> None:
    client, exporter = traced
    body = {"inputs": "private", "parameters": {"max_new_tokens": 3, "vote": {"n": 4}, "temperature": 3.0}}
    ballots = client.post("/generate", json=body).json()["vote"]["ballots"]
    *parts, whole = sorted(finished(exporter, 5), key=lambda span: span.name, reverse=True)
    assert whole.attributes is not None
    assert (whole.name, whole.attributes["promptplex.parts"]) == ("POST /generate", 4)
    found = {}
    for part in parts:
        assert part.parent is not None
        assert part.parent.span_id == whole.context.span_id
        assert part.context.trace_id == whole.context.trace_id
        assert whole.start_time is not None
        assert part.start_time is not None
        assert part.end_time is not None
        assert whole.start_time <= part.start_time <= part.end_time <= (whole.end_time or 0)
        assert "private" not in part.to_json()
        attributes = dict(part.attributes or {})
        found[attributes["promptplex.sample"]] = attributes
    assert [found[number]["gen_ai.usage.output_tokens"] for number in range(4)] == [
        ballot["generated_tokens"] for ballot in ballots
    ]
    assert found[0]["gen_ai.response.finish_reasons"] == (ballots[0]["finish_reason"],)
    assert {each["promptplex.step"] for each in found.values()} == {0}


def test_the_steps_of_a_chain_are_spans(traced: tuple[httpx.Client, InMemorySpanExporter]) -> None:
    client, exporter = traced
    publish_text(
        client, "stepped", "{x}", chain={"template": "{x}\n{so_far}", "step_ends": "i", "max_steps": 3}
    )
    finished(exporter, 1)
    exporter.clear()
    answer = client.post("/generate", json={"task_id": "stepped", "inputs": "name"}).json()
    count = len(answer["reasoning"]["steps"])
    assert count > 1
    parts = [each for each in finished(exporter, count + 1) if each.name == "part"]
    assert [(each.attributes or {})["promptplex.step"] for each in parts] == [*range(count)]


def test_spans_of_other_requests(traced: tuple[httpx.Client, InMemorySpanExporter]) -> None:
    client, exporter = traced
    for path in ("/health", "/health/live", "/metrics"):
        client.get(path)
    assert not exporter.get_finished_spans()
    client.post("/generate_stream", json={"inputs": "a", "parameters": {"max_new_tokens": 2}})
    client.get("/tasks/nobody", headers={"traceparent": "nonsense"})
    client.get("/nothing")
    spans = finished(exporter, 3)
    assert [span.name for span in spans] == ["POST /generate_stream", "GET /tasks/{task_id:path}", "GET"]
    stream, missing, _ = (dict(span.attributes or {}) for span in spans)
    assert 0 < stream["gen_ai.usage.output_tokens"] <= 2
    assert stream["gen_ai.request.model"] == BASE_NAME
    assert missing["http.response.status_code"] == 404
    assert not [name for name in missing if name.startswith("gen_ai")]


def test_without_a_collector_there_is_no_tracer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert tracer_from_environment() is None


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """A receiver of OTLP over HTTP: its URL, and what it was sent."""
    received: list[bytes] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Silent."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_the_standard_variable_turns_them_on(
    collector: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received = collector
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "prompts")
    base = save_tiny_llama(tmp_path / "tiny")
    flags = ("--model", str(base), "--store", str(tmp_path / "store"), "--dtype", "float32")
    with Server.running(*flags, through=INTERPRETER) as server:
        url = server.wait_until_ready()
        body = {"inputs": "private words", "parameters": {"max_new_tokens": 2}}
        assert httpx2.post(f"{url}/generate", json=body, trust_env=False, timeout=60).status_code == 200
        assert server.end() == 0  # the end sends what is left
    sent = [ExportTraceServiceRequest.FromString(data) for data in received]
    (resource,) = [each for request in sent for each in request.resource_spans]
    services = [
        each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
    ]
    assert services == ["prompts"]
    (span,) = resource.scope_spans[0].spans
    assert span.name == "POST /generate"
    assert b"private" not in b"".join(received)
