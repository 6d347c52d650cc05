"""Training runs: start one from a file of examples, watch it, end it. The operator turns them on."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from starlette.datastructures import FormData

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal, Principal
from app.api.routes.tasks import ERRORS
from app.api.schemas.answers import ErrorEnvelope
from app.api.state import Services, services
from app.api.uploads import file_part, json_part, upload_form
from app.errors import NotFound
from app.keys.key import Scope
from app.serving.training_runs.data_files import PARTS, check_parts, write_data
from app.serving.training_runs.data_summary import DataSummary
from app.serving.training_runs.records import RunRecord, new_run_id, now
from app.serving.training_runs.rows import (
    TrainingRun,
    TrainingRunList,
    run_detail,
    run_row,
)
from app.serving.training_runs.run_settings import PARAM as SETTINGS
from app.serving.training_runs.run_settings import RunSettings, parse_run_settings, step_tasks, task_part
from app.serving.training_runs.service import TrainingRuns

audit = logging.getLogger("promptplex.audit")

router = APIRouter(prefix="/tasks", tags=["training"])

_ADVICE = (
    "the parts data (JSON lines or CSV) and settings (JSON): "
    'curl -F data=@examples.jsonl -F \'settings={"method": "prefix"}\''
)
_BUSY: dict[int | str, dict[str, Any]] = {
    429: {"model": ErrorEnvelope, "description": "The key, or the server, has enough runs that haven't ended"}
}
_FILE = {"type": "string", "format": "binary"}
_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "data": _FILE | {"description": "Examples, JSON lines or CSV, to be split here"},
                        "train": _FILE | {"description": "Examples to train on, in place of data"},
                        "dev": _FILE | {"description": "Examples to choose the best step by"},
                        "test": _FILE | {"description": "Examples for the result"},
                        "settings": {
                            "type": "string",
                            "description": "JSON of method, steps, learning_rate, task, publish, ...",
                        },
                    },
                }
            }
        },
    }
}

Behind = Annotated[Services, Depends(services)]


async def training_runs(behind: Behind) -> TrainingRuns:
    """Return the runs. Raise NotFound where the operator hasn't turned them on."""
    if behind.training is None:
        raise NotFound(
            "Training runs are off on this server; its operator turns them on with --training true "
            "(PROMPTPLEX_TRAINING=true)."
        )
    return behind.training


Runs = Annotated[TrainingRuns, Depends(training_runs)]


@router.post(
    "/{task_id:path}/training-runs",
    status_code=202,
    response_model=TrainingRun,
    responses=ERRORS | _BUSY,
    openapi_extra=_MULTIPART,
    summary="Start a training run",
)
@needs(Scope.TRAIN)
async def start_run(
    task_id: str, request: Request, behind: Behind, runs: Runs, principal: CurrentPrincipal
) -> JSONResponse:
    """Train a prompt on the examples, in a process beside the server; the version it makes is `candidate`."""
    principal.require(task_id)
    behind.publishing.check_task_id(task_id)
    with runs.place(principal.tenant) as place:
        async with upload_form(request, (*PARTS, SETTINGS), _ADVICE) as form:
            record = await _read_record(task_id, form, behind, principal)
            await asyncio.to_thread(runs.submit, place, record, _filler(form))
    audit.info("%s started training run %s: task %s", principal.who, record.id, task_id)
    return JSONResponse(await asyncio.to_thread(run_detail, runs, record), 202)


@router.post(
    "/{task_id:path}/training-runs/check",
    response_model=DataSummary,
    responses=ERRORS | _BUSY,
    openapi_extra=_MULTIPART,
    summary="Check the data of a training run",
)
@needs(Scope.TRAIN)
async def check_data(task_id: str, request: Request, runs: Runs, principal: CurrentPrincipal) -> JSONResponse:
    """Return what a run with this body would read, or what is wrong with it; nothing is trained or kept."""
    principal.require(task_id)
    with runs.place(principal.tenant):
        async with upload_form(request, (*PARTS, SETTINGS), _ADVICE) as form:
            settings = await _settings(form)
            summary = await asyncio.to_thread(runs.summary, _filler(form), settings.splits)
    return JSONResponse(summary)


@router.get(
    "/{task_id:path}/training-runs",
    response_model=TrainingRunList,
    responses=ERRORS,
    summary="List a task's training runs",
)
@needs(Scope.TRAIN)
async def list_runs(task_id: str, runs: Runs, principal: CurrentPrincipal) -> JSONResponse:
    """Return the runs that are kept, the newest first."""
    principal.require(task_id)

    def rows() -> TrainingRunList:
        return {"runs": [run_row(runs, record) for record in runs.directory.records(task_id)]}

    return JSONResponse(await asyncio.to_thread(rows))


@router.get(
    "/{task_id:path}/training-runs/{run_id}",
    response_model=TrainingRun,
    responses=ERRORS,
    summary="Get a training run",
)
@needs(Scope.TRAIN)
async def show_run(task_id: str, run_id: str, runs: Runs, principal: CurrentPrincipal) -> JSONResponse:
    """Return a run's state, curves, advice and result."""
    principal.require(task_id)
    return JSONResponse(
        await asyncio.to_thread(lambda: run_detail(runs, runs.directory.record(task_id, run_id)))
    )


@router.delete(
    "/{task_id:path}/training-runs/{run_id}",
    response_model=TrainingRun,
    responses=ERRORS,
    summary="Cancel a training run",
)
@needs(Scope.TRAIN)
async def cancel_run(task_id: str, run_id: str, runs: Runs, principal: CurrentPrincipal) -> JSONResponse:
    """End a run that waits or goes on; it takes some seconds. One that has ended stays as it is."""
    principal.require(task_id)

    def cancel() -> TrainingRun:
        runs.cancel(runs.directory.record(task_id, run_id))
        return run_detail(runs, runs.directory.record(task_id, run_id))

    row = await asyncio.to_thread(cancel)
    audit.info("%s cancelled training run %s: task %s", principal.who, run_id, task_id)
    return JSONResponse(row)


async def _read_record(task_id: str, form: FormData, behind: Services, principal: Principal) -> RunRecord:
    """Return the run that is asked for. Raise InvalidRequest, PayloadTooLarge, Forbidden."""
    settings = await _settings(form)
    if settings.task is not None and settings.task.get("examples"):
        principal.require_generation("The examples of a task are answered by the model")
    task = await asyncio.to_thread(task_part, behind.store, task_id, settings)
    for step in step_tasks(task):
        principal.require(step)
    return RunRecord(
        id=new_run_id(),
        task_id=task_id,
        who=principal.who,
        tenant=principal.tenant,
        settings=settings.model_dump(mode="json", exclude_unset=True),
        task=task,
        init_from=await asyncio.to_thread(_start_version, behind, principal, settings.init_from),
        files={name: file_part(form, name).size or 0 for name in form if name != SETTINGS},
        created_at=now(),
        publish=settings.publish,
    )


async def _settings(form: FormData) -> RunSettings:
    """Return the settings of a form that has data. Raise InvalidRequest, PayloadTooLarge."""
    check_parts([name for name in form if name != SETTINGS])
    return parse_run_settings(await json_part(form, SETTINGS) or {})


def _start_version(behind: Services, principal: Principal, reference: str | None) -> str | None:
    """Return the version that a reference names now. Raise Forbidden, NotFound, InvalidRequest."""
    if reference is None:
        return None
    principal.require(reference)
    version = behind.store.resolve(reference)
    return f"{version.task_id}@{version.version}"


def _filler(form: FormData) -> Callable[[Path], None]:
    """Return what writes the data files."""
    parts = {name: file_part(form, name).file for name in form if name != SETTINGS}
    return lambda directory: write_data(directory, parts)
