"""Routes for operators and orchestrators: health, information, metrics."""

import asyncio
import logging
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from app import __version__
from app.api.auth.authenticator import any_key, needs, public
from app.api.auth.principal import CurrentPrincipal, Principal
from app.api.schemas.answers import ErrorEnvelope, Health, Info, Status, Version
from app.api.state import ApiConfig, Phase, ServerState, Services, api_config, server_state, services
from app.errors import PromptplexError
from app.keys.key import Scope
from app.metrics import CONTENT_TYPE
from app.serving import parameters as bounds
from app.sites import Site
from app.text.template import MAX_RENDERED_CHARS

log = logging.getLogger("promptplex.api")

router = APIRouter(tags=["operations"])

State = Annotated[ServerState, Depends(server_state)]
Behind = Annotated[Services, Depends(services)]
_NOT_READY: dict[int | str, dict[str, Any]] = {
    503: {"model": Status, "description": "The server is loading, draining or dead"}
}
_ERRORS: dict[int | str, dict[str, Any]] = {503: {"model": ErrorEnvelope}}


@router.get("/health", response_model=Health, summary="Get the health of the server")
@any_key
async def health(state: State, principal: CurrentPrincipal) -> JSONResponse:
    """Return status, model, device, tasks, queue, store, Redis and prompt cache."""
    answer: Health = {"status": state.phase.value, "version": __version__}
    behind = state.services
    if behind is None:
        answer["progress"] = state.progress
        return JSONResponse(answer)
    answer["model"] = behind.generation.base_name
    answer["device"] = behind.device
    answer["tasks"] = await asyncio.to_thread(_count_tasks, behind, principal)
    answer["store"] = _store_state(behind, answer["tasks"])
    answer["redis"] = behind.redis()
    if not principal.is_bound:  # the load is that of all keys
        engine = behind.engine.stats()
        answer["queue"] = {"running": engine.num_running, "waiting": engine.num_waiting}
        answer["prompt_cache"] = _cache_health(behind)
    return JSONResponse(answer)


def _count_tasks(behind: Services, principal: Principal) -> int | None:
    """Count the tasks that the caller may use; None: the store can't be read."""
    try:
        return behind.catalog.count(principal.may_use)
    except (OSError, PromptplexError) as error:
        log.warning("the store can't be read: %s", error)
        return None


def _store_state(behind: Services, num_tasks: int | None) -> Literal["up", "down", "damaged"]:
    if num_tasks is None:
        return "down"
    return "damaged" if behind.maintenance.num_damaged else "up"


def _cache_health(behind: Services) -> dict[str, Any]:
    """Return figures of all tiers, from the nearest on; a miss in one is a look-up in the next."""
    prompts, engine = behind.source.stats(), behind.engine.stats()
    tiers = {
        tier: {
            "hits": prompts.hits.get(tier, 0),
            "misses": prompts.misses.get(tier, 0),
            "bytes_read": prompts.tier_bytes.get(tier, 0),
            "seconds": round(prompts.tier_seconds.get(tier, 0.0), 3),
        }
        for tier in ("host", "redis", "store")
    }
    return {
        "device": {"prefixes": engine.resident_prefixes, "bytes": engine.resident_prefix_bytes},
        **tiers,
        "host_bytes": prompts.host_bytes,
        "failed_loads": prompts.load_failures,
        "redis_failures": prompts.remote_failures,
        "heals": prompts.heals,
    }


@router.get("/health/live", response_model=Status, summary="Check liveness")
@public
async def live() -> JSONResponse:
    """Answer 200 as long as the process responds."""
    return JSONResponse({"status": "alive"})


@router.get("/health/ready", response_model=Status, responses=_NOT_READY, summary="Check readiness")
@public
async def ready(state: State) -> JSONResponse:
    """Answer 200 if the server takes requests, 503 while it is loading, draining or dead."""
    phase = state.phase
    if phase is Phase.READY:
        return JSONResponse({"status": str(phase)})
    return JSONResponse({"status": str(phase)}, 503, {"retry-after": "5"})


@router.get("/info", response_model=Info, responses=_ERRORS, summary="Get the base model and limits")
@any_key
async def info(
    behind: Behind, state: State, config: Annotated[ApiConfig, Depends(api_config)]
) -> JSONResponse:
    """Return the base model, and the limits of requests."""
    geometry, defaults = behind.engine.geometry, behind.generation.defaults
    answer: Info = {
        "version": __version__,
        "model_id": behind.generation.base_name,
        "model_architecture": geometry.architecture,
        "model_dtype": geometry.dtype,
        "model_device": behind.device,
        "model_fingerprint": geometry.fingerprint,
        "probe": behind.probe,
        "num_layers": len(geometry.layers[Site.DECODER_SELF]),
        "num_encoder_layers": len(geometry.layers.get(Site.ENCODER_SELF, ())),
        "hidden_size": geometry.hidden_size,
        "vocab_size": geometry.vocab_size,
        "max_total_tokens": geometry.max_positions,
        "max_source_tokens": geometry.max_source_positions or None,
        "decoder_start_token_id": behind.generation.decoder_start_id,
        "default_max_new_tokens": defaults.parameters.get("max_new_tokens", bounds.DEFAULT_MAX_NEW_TOKENS),
        "generation_defaults": dict(defaults.shown),
        "generation_not_honoured": list(defaults.not_honoured),
        "max_stop_sequences": bounds.MAX_STOPS,
        "max_body_bytes": config.max_body_bytes,
        "max_text_characters": MAX_RENDERED_CHARS,
        "max_upload_bytes": state.max_upload_bytes(config.max_upload_bytes),
    }
    return JSONResponse(answer)


@router.get("/version", response_model=Version, summary="Get the version")
@any_key
async def version() -> JSONResponse:
    """Return the version of the server."""
    return JSONResponse({"version": __version__})


@router.get("/metrics", response_class=PlainTextResponse, responses=_ERRORS, summary="Get metrics")
@needs(Scope.METRICS)
async def metrics(state: State) -> Response:
    """Return metrics in the Prometheus text format 0.0.4, also while the server drains."""
    behind = state.services or state.ready_services()
    return Response(await asyncio.to_thread(behind.metrics.render), media_type=CONTENT_TYPE)
