"""Tasks: list, show, publish a version, move and roll back aliases, retire and restore."""

import asyncio
import logging
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse

from app.api.auth.authenticator import needs
from app.api.auth.principal import CurrentPrincipal, Principal
from app.api.schemas.answers import (
    ErrorEnvelope,
    Published,
    TaskPage,
    TaskRecord,
    TaskRow,
    VersionRecord,
)
from app.api.schemas.bodies import JsonRoute
from app.api.schemas.generate import AliasRequest, ReasonRequest, RollbackRequest
from app.api.state import Services, services
from app.api.uploads import read_upload, upload_form
from app.errors import InvalidRequest
from app.keys.key import Scope
from app.serving.catalog import TaskDetail, TaskSummary, VersionState
from app.serving.publishing.publisher import UploadResult
from app.serving.task_rows import (
    Moved,
    Retirement,
    history_row,
    moved_row,
    published_row,
    retirement_row,
    task_row,
    version_row,
)
from app.store.references import DEFAULT_ALIAS
from app.store.releases import Release

audit = logging.getLogger("promptplex.audit")

router = APIRouter(prefix="/tasks", tags=["tasks"], route_class=JsonRoute)

MAX_PAGE = 1000
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorEnvelope} for status in (400, 403, 404, 408, 409, 413, 415, 422, 500, 503, 507)
}
_SAME: dict[int | str, dict[str, Any]] = {
    200: {"model": Published, "description": "The same prompt and settings are a version already"}
}
_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "prompt": {
                            "type": "string",
                            "format": "binary",
                            "description": "Learned prompt: a safetensors file",
                        },
                        "config": {
                            "type": "string",
                            "format": "binary",
                            "description": "adapter_config.json of a PEFT prompt",
                        },
                        "task": {
                            "type": "string",
                            "description": "JSON of template, defaults, choices, examples, notes, reasoning, "
                            "chain, vote, calibration, paraphrases, few_shot, ...",
                        },
                    },
                }
            }
        },
    }
}

Behind = Annotated[Services, Depends(services)]


@router.get("", response_model=TaskPage, responses=ERRORS, summary="List tasks")
@needs(Scope.GENERATE, Scope.UPLOAD, Scope.ADMIN, Scope.TRAIN)
async def list_tasks(
    behind: Behind,
    principal: CurrentPrincipal,
    after: Annotated[
        str | None, Query(max_length=128, description="`next` of the page before. Default: the first page")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="Tasks in a page, at most")] = 100,
) -> JSONResponse:
    """Return a page of tasks, in order of their ids."""
    rows, following = await asyncio.to_thread(behind.catalog.page, principal.may_use, after, limit)
    page: TaskPage = {"tasks": [_summary(row) for row in rows], "next": following}
    return JSONResponse(page)


@router.post(
    "/{task_id:path}/versions",
    status_code=201,
    response_model=Published,
    responses=ERRORS | _SAME,
    openapi_extra=_MULTIPART,
    summary="Publish a version",
)
@needs(Scope.UPLOAD)
async def publish(
    task_id: str,
    request: Request,
    behind: Behind,
    principal: CurrentPrincipal,
    alias: Annotated[
        str | None,
        Query(max_length=64, description="Alias to move to the new version, or none. Default: live"),
    ] = None,
) -> JSONResponse:
    """Validate, store and try a new version of a task, then point an alias at it."""
    principal.require(task_id)
    with behind.publishing.place():
        async with upload_form(request) as form, behind.publishing.slot:
            upload = await read_upload(form, alias=alias, who=principal.who)
            if upload.task is not None and upload.task.get("examples"):
                principal.require_generation("The examples of an upload are answered by the model")
            result = await behind.publishing.upload(
                task_id, upload, tenant=principal.tenant, require=principal.require
            )
    _record(principal, f"uploaded version {result.version.version}", task_id, result.release)
    return JSONResponse(_uploaded(result), 201 if result.created else 200)


@router.post("/{task_id:path}/rollback", response_model=Moved, responses=ERRORS, summary="Roll back an alias")
@needs(Scope.ADMIN)
async def rollback(
    task_id: str,
    behind: Behind,
    principal: CurrentPrincipal,
    body: RollbackRequest | None = None,
    alias: Annotated[str | None, Query(max_length=64, description="As in the body. Default: live")] = None,
) -> JSONResponse:
    """Point an alias at what it pointed at before; another rollback goes one step further back."""
    principal.require(task_id)
    named = (body.alias if body else None) or alias or DEFAULT_ALIAS
    if body and body.alias and alias not in (None, body.alias):
        raise InvalidRequest(
            "The query and the body name different aliases; send one of them.", param="alias"
        )
    why = body.why if body else ""
    release = await behind.publishing.change(
        lambda store: store.rollback(task_id, named, who=principal.who, why=why)
    )
    _record(principal, f"rolled {named} back", task_id, release)
    return JSONResponse(moved_row(release, named))


@router.put(
    "/{task_id:path}/aliases/{alias}", response_model=Moved, responses=ERRORS, summary="Move an alias"
)
@needs(Scope.ADMIN)
async def move_alias(
    task_id: str, alias: str, behind: Behind, principal: CurrentPrincipal, body: AliasRequest
) -> JSONResponse:
    """Point an alias at a version, or at several by weight or together.

    `expected_release` makes it a compare-and-set.
    """
    principal.require(task_id)
    release = await behind.publishing.change(
        lambda store: store.move_alias(
            task_id,
            alias,
            body.target,
            expected_release=body.expected_release,
            who=principal.who,
            why=body.why,
        )
    )
    _record(principal, f"moved {alias}", task_id, release)
    return JSONResponse(moved_row(release, alias))


@router.post(
    "/{task_id:path}/restore",
    response_model=Retirement,
    responses=ERRORS,
    summary="Restore a retired task",
)
@needs(Scope.ADMIN)
async def restore(
    task_id: str, behind: Behind, principal: CurrentPrincipal, body: ReasonRequest | None = None
) -> JSONResponse:
    """Serve a retired task again, with its aliases as they were."""
    principal.require(task_id)
    why = body.why if body else ""
    release = await behind.publishing.change(lambda store: store.restore(task_id, who=principal.who, why=why))
    _record(principal, "restored", task_id, release)
    return JSONResponse(retirement_row(release))


@router.delete("/{task_id:path}", response_model=Retirement, responses=ERRORS, summary="Retire a task")
@needs(Scope.ADMIN)
async def retire(
    task_id: str,
    behind: Behind,
    principal: CurrentPrincipal,
    why: Annotated[str, Query(max_length=1000, description="Reason, kept in the task's history")] = "",
) -> JSONResponse:
    """Take a task out of service. Running requests finish, and nothing is deleted."""
    principal.require(task_id)
    release = await behind.publishing.change(lambda store: store.retire(task_id, who=principal.who, why=why))
    _record(principal, "retired", task_id, release)
    return JSONResponse(retirement_row(release))


@router.get("/{task_id:path}", response_model=TaskRecord, responses=ERRORS, summary="Get a task")
@needs(Scope.GENERATE, Scope.UPLOAD, Scope.ADMIN, Scope.TRAIN)
async def show_task(task_id: str, behind: Behind, principal: CurrentPrincipal) -> JSONResponse:
    """Return a task's aliases, versions and releases."""
    principal.require(task_id)
    return JSONResponse(_detail(await asyncio.to_thread(behind.catalog.detail, task_id)))


def _record(principal: Principal, act: str, task_id: str, release: Release | None) -> None:
    """Log a change, beside the store's own records, which have the reason and the time."""
    number = "none" if release is None else release.number
    audit.info("%s %s: task %s, release %s", principal.who, act, task_id, number)


def _summary(row: TaskSummary) -> TaskRow:
    return {
        **task_row(row.task_id, None if row.live is None else row.live.version),
        "servable": row.why_not is None,
        "not_servable_because": row.why_not,
        "resident": row.live is not None and row.live.resident,
        "requests_served": row.requests_served,
    }


def _detail(detail: TaskDetail) -> TaskRecord:
    return {
        **history_row(detail.history),
        "versions": [_version(state) for state in detail.versions],
        "requests_served": detail.requests_served,
    }


def _version(state: VersionState) -> VersionRecord:
    return {
        **version_row(state.version),
        "servable": state.why_not is None,
        "not_servable_because": state.why_not,
        "resident": state.resident,
    }


def _uploaded(result: UploadResult) -> Published:
    return {
        **published_row(result.version, result.release),
        "warnings": list(result.warnings),
        "examples": [
            {
                "inputs": report.inputs,
                "expected": report.expected,
                "generated": report.generated,
                "matches": report.matches,
            }
            for report in result.examples
        ],
    }
