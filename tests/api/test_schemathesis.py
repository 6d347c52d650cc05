"""The OpenAPI document against the server that wrote it, by schemathesis: positive and negative cases."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import hypothesis.strategies as st
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance

from app.api.app import create_app
from app.api.state import ServerState
from app.keys.key import Scope
from app.serving.training_runs.data_files import data_paths
from app.serving.training_runs.data_summary import DataSummary, summarise
from app.serving.training_runs.run_files import DATA
from app.training.readers import read_dataset
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import publish_text
from tests.api.test_keys import Keys
from tests.serving.stack import BASE_NAME, running_stack
from tests.serving.training_runs.runs import Runs
from tests.waiting import wait_until

TASK = "documented"
RUNS = f"/tasks/{TASK}/training-runs"
# What leads a case to what is there; `prepare` makes a run.
HOME = {"task_id": TASK, "model": TASK, "alias": "live", "run_id": "20260101-000000-00000000"}
TRAINING = {
    "data": "".join(f'{{"text": "film {number}", "label": "{number % 2}"}}\n' for number in range(20)),
    "settings": '{"publish": false}',
}
PARTS = {name: (None, text) for name, text in TRAINING.items()}
DOCUMENT = create_app(ServerState()).openapi()
ENDLESS = "/ops/stream"  # it has no last byte to wait for; tests/api/test_live.py reads it
OPERATIONS = [
    (path, method) for path, methods in DOCUMENT["paths"].items() for method in methods if path != ENDLESS
]

# A server may say so of itself. Everything else from 500 on is a defect.
HONEST_STATUSES = {503, 504, 507}
EXCLUDED = [
    not_a_server_error,  # the line above instead
    # What a schema allows may still not fit: which tasks there are, how many positions the base has, which
    # ids its vocabulary, which fields a template. 422 says so, and is documented.
    positive_data_acceptance,
]

THOROUGH = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server with keys, and headers of clients: the first one has a key for everything."""
    folder = tmp_path_factory.mktemp("keyed")
    keys = Keys(folder / "keys.json")
    headers = [
        keys.add("all", *Scope),
        keys.add("watcher", Scope.METRICS),
        keys.add("poor", *Scope, requests_per_minute=1),
        keys.add("bounded", *set(Scope) - {Scope.METRICS}, tasks=("nothing-*",)),
        {},
    ]
    with running_stack(folder / "store") as stack:
        state = ServerState(services=services_of(stack))
        with serving(state, keys=keys.ring) as address:
            yield address, headers


class QuickRuns(Runs):
    """Reads data in this process: a process for each case would take most of the time."""

    def summary(self, fill: Callable[[Path], None], options: dict[str, Any]) -> DataSummary:
        with self.directory.scratch(fill) as scratch:
            return summarise(read_dataset(data_paths(scratch / DATA), **options))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own: these cases publish, move, retire, train."""
    folder = tmp_path_factory.mktemp("served")
    with running_stack(folder / "store") as stack:
        runs = QuickRuns(stack, folder / "runs")
        with serving(ServerState(services=services_of(stack, runs))) as address:
            yield address
        runs.close()


def test_every_reference_leads_somewhere() -> None:
    places = set(re.findall(r'"\$ref": "([^"]*)"', json.dumps(DOCUMENT)))
    assert places == {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_is_as_documented(url: str, path: str, method: str) -> None:
    check_operation(url, path, method, cases=20)


@pytest.mark.soak
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_is_as_documented_in_depth(url: str, path: str, method: str) -> None:
    check_operation(url, path, method, cases=300)


def check_operation(url: str, path: str, method: str, cases: int) -> None:
    """So many cases of each mode."""
    prepare(url, path)
    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operation = document[path][method.upper()]
    statuses: Counter[int] = Counter()

    @settings(THOROUGH, max_examples=cases)
    @given(
        case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE), steer=st.sampled_from(Steering)
    )
    def accept(case: Case, steer: Steering) -> None:
        steer_home(case, steer)
        statuses[check(case)] += 1

    @settings(THOROUGH, max_examples=cases)
    @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def refuse(case: Case) -> None:
        refusals[check(case)] += 1

    refusals: Counter[int] = Counter()
    accept()
    assert any(status < 300 for status in statuses), f"nothing was ever accepted: {statuses}"
    try:
        refuse()
    except Unsatisfiable:  # any string is a path, and some operations take nothing at all
        assert "requestBody" not in DOCUMENT["paths"][path][method]
    assert not any(status < 300 for status in refusals) or method == "get", refusals


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_is_as_documented_where_keys_are_needed(
    keyed: tuple[str, list[dict[str, str]]], path: str, method: str
) -> None:
    """With every scope, with none that fits, beyond the quota, without a key."""
    url, keys = keyed
    document = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=keys[0])
    operation = document[path][method.upper()]
    statuses: Counter[int] = Counter()

    @settings(THOROUGH, max_examples=4)
    @given(case=operation.as_strategy())
    def ask(case: Case) -> None:
        steer_home(case, Steering.NAMES)
        for key in keys:
            statuses[check(case, headers=key)] += 1

    ask()
    assert statuses[401] or path in ("/health/live", "/health/ready")


def check(case: Case, headers: dict[str, str] | None = None) -> int:
    """Send it; the answer is a documented one. Its status."""
    response = case.call(headers=headers)
    status: int = response.status_code
    assert status < 500 or status in HONEST_STATUSES, response.text
    case.validate_response(response, excluded_checks=EXCLUDED, headers=headers)
    return status


def prepare(url: str, path: str) -> None:
    """There is a task, which can be rolled back, or restored, and where it is asked for a run."""
    with client_of(url) as client:
        client.post(f"/tasks/{TASK}/restore")
        publish_text(client, TASK, "S: {x}")
        client.put(f"/tasks/{TASK}/aliases/live", json={"version": 1})
        publish_text(client, TASK, f"{path} {{x}}")
        if "training-runs" in path:
            make_room(client)
        if "{run_id}" in path:
            HOME["run_id"] = client.post(RUNS, files=PARTS).json()["id"]
        if path.endswith("restore"):
            assert client.delete(f"/tasks/{TASK}").status_code == 200


def make_room(client: httpx.Client) -> None:
    """End the runs of the operations before, which may take long on a busy machine."""
    for run in client.get(RUNS).json()["runs"]:
        client.delete(f"{RUNS}/{run['id']}")
    wait_until(lambda: client.post(f"{RUNS}/check", files=PARTS).status_code == 200)


class Steering(Enum):
    """How far a case is led to what is there and fits, so that answers are seen too and not only refusals."""

    NONE = 0
    NAMES = 1
    ALL = 2


def steer_home(case: Case, steering: Steering) -> None:
    if steering is Steering.NONE:
        return
    for name in case.path_parameters:
        case.path_parameters[name] = HOME[name]
    case.query.clear()
    case.headers.clear()
    if isinstance(case.body, dict):
        given = case.body if steering is Steering.NAMES else {}
        case.body = given | home_of(given, case.path)


def home_of(given: dict[str, Any], path: str) -> dict[str, Any]:
    if path == "/v1/responses":
        return {"model": TASK, "max_output_tokens": 3, "input": "a"}
    if path == "/v1/decisions":
        asked = {"type": "predicate", "instructions": "Is it?"}
        return {"model": BASE_NAME, "input": "a", "questions": [asked]}
    if path.startswith("/v1/"):
        words = {"messages": [{"role": "user", "content": "a"}]} if "chat" in path else {"prompt": ["a", "b"]}
        return {"model": TASK, "max_tokens": 3} | words
    if path.endswith("/versions"):
        return {"task": '{"template": "S: {x}"}'}
    if "training-runs" in path:
        return TRAINING
    if path.endswith(("rollback", "restore")):
        return {"why": ""}
    if "aliases" in path:
        return {"version": 1}
    if path == "/detokenize":
        return {"ids": [5, 6]}
    task = {"task_id": TASK, "inputs": "the film"}
    small = (given.get("parameters") or {}) | {"max_new_tokens": 3}
    return task if path == "/tokenize" else task | {"parameters": small}
