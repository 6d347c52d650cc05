"""OpenTelemetry spans, one for each request but probes, and below it one for each part; off unless asked for.

Parts are samples, ballots, steps, versions: what the model ran for one request, where that was more than one.

On where the extra `otel` is installed and OpenTelemetry's own variable names a collector. The SDK reads
the other `OTEL_*` variables itself (service name, sampler, headers). Spans never hold prompts or outputs.
"""

import logging
import os
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware.access_log import RequestRecord, current_record, is_probe
from app.request import Outcome

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

log = logging.getLogger("promptplex.api")

_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def tracer_from_environment() -> "Tracer | None":
    """A tracer whose spans go to the collector that the environment names; None: there is none."""
    named = next((name for name in _VARIABLES if os.environ.get(name)), None)
    if named is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("%s is set, but spans need more packages: pip install 'promptplex[otel]'", named)
        return None
    named_by_operator = OTELResourceDetector().detect()
    provider = TracerProvider(resource=Resource({SERVICE_NAME: "promptplex"}).merge(named_by_operator))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))  # flushed at the process's end
    return provider.get_tracer("promptplex")


class Tracing:
    """A span around a request, under its client's own (W3C `traceparent`); right below the access log."""

    def __init__(self, app: ASGIApp, tracer: "Tracer") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._tracer = tracer
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        record = current_record()
        if record is None or is_probe(scope):
            await self._app(scope, receive, send)
            return
        from opentelemetry.trace import SpanKind

        carrier = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        parent = self._propagator.extract(carrier)
        record.parts = []
        with self._tracer.start_as_current_span(scope["method"], parent, SpanKind.SERVER) as span:
            try:
                await self._app(scope, receive, send)
            finally:
                _describe(span, scope, record)
                if len(record.parts) > 1:
                    self._add_parts(span, record)

    def _add_parts(self, span: "Span", record: RequestRecord) -> None:
        """Add what came of each part; its times are known when it has ended."""
        from opentelemetry.trace import set_span_in_context

        parent = set_span_in_context(span)
        for end, outcome in record.parts or ():
            begin = end - int(outcome.seconds * 1e9)
            part = self._tracer.start_span("part", parent, attributes=_of_part(outcome), start_time=begin)
            part.end(end)


def _describe(span: Any, scope: Scope, record: RequestRecord) -> None:
    """By the semantic conventions of HTTP and generative AI, where they have a name."""
    from opentelemetry.trace import StatusCode

    route = getattr(scope.get("route"), "path", None)
    if route is not None:
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)
    span.set_attribute("http.request.method", scope["method"])
    span.set_attribute("http.response.status_code", record.status)
    span.set_attribute("promptplex.request_id", record.request_id)
    if record.status >= 500:
        span.set_status(StatusCode.ERROR)
    if record.num_outcomes > 1:
        span.set_attribute("promptplex.parts", record.num_outcomes)
    if record.num_outcomes:
        base = scope["app"].state.server.services.generation.base_name
        span.set_attribute("gen_ai.request.model", record.task or base)
        span.set_attribute("gen_ai.response.model", base)
        span.set_attribute("gen_ai.usage.input_tokens", record.prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", record.generated_tokens)
        if record.task:
            span.set_attribute("promptplex.task", record.task)
            span.set_attribute("promptplex.task.version", record.version)


def _of_part(outcome: Outcome) -> dict[str, Any]:
    return {
        "promptplex.task": outcome.task,
        "promptplex.task.version": outcome.version,
        "promptplex.sample": outcome.sample,
        "promptplex.step": outcome.step,
        "gen_ai.response.finish_reasons": (outcome.reason,),
        "gen_ai.usage.input_tokens": outcome.prompt_tokens,
        "gen_ai.usage.output_tokens": outcome.generated_tokens,
    }
