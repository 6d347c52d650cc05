"""Uploads, aliases, retiring, over HTTP."""

import json
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from app.api.state import ServerState
from tests.api.server import client_of, services_of, serving
from tests.api.test_generate import error_of, publish_text
from tests.oracle import cartridge_config, greedy, p_tuning_config, prefix_config, soft_config
from tests.serving.stack import BASE_NAME, Stack, running_stack
from tests.store.builders import entry, file_bytes, many_tensors, soft_adapter_config

HIDDEN, LAYERS = 48, 3
ROWS = np.random.default_rng(0).standard_normal((3, HIDDEN)).astype("<f4")
CONFIG = soft_adapter_config(HIDDEN, LAYERS)


def weights(rows: np.ndarray = ROWS) -> bytes:
    return file_bytes({"prompt_embeddings": entry(list(rows.shape), 0, rows.nbytes)}, rows.tobytes())


def config(**changes: Any) -> bytes:
    return json.dumps(CONFIG | changes).encode()


def spoiled(value: float) -> bytes:
    rows = ROWS.copy()
    rows[1, 2] = value
    return weights(rows)


def parts(prompt: bytes | None, settings: bytes | None, task: bytes | None = None) -> dict[str, Any]:
    given = {"prompt": prompt, "config": settings, "task": task}
    return {name: (f"{name}.bin", data) for name, data in given.items() if data is not None}


@pytest.mark.parametrize("make", [soft_config, p_tuning_config, prefix_config, cartridge_config])
def test_what_peft_saved_is_served_at_once(
    client: httpx.Client, stack: Stack, tmp_path: Path, make: Any
) -> None:
    model, prompt, settings = stack.adapter(make(6), tmp_path)
    task_id = make.__name__.replace("_", "-")
    response = client.post(f"/tasks/{task_id}/versions", files=parts(prompt, settings))
    assert response.status_code == 201, response.text
    body = response.json()
    assert (body["task_id"], body["version"], body["virtual_tokens"], body["release"]) == (task_id, 1, 6, 1)
    assert body["kind"] == ("soft" if make in (soft_config, p_tuning_config) else "prefix")
    expected = greedy(model, stack.tokenizer("the film")["input_ids"], 6)
    answer = client.post(
        "/generate", json={"task_id": task_id, "inputs": "the film", "parameters": {"max_new_tokens": 6}}
    ).json()
    assert [token["id"] for token in answer["details"]["tokens"]] == expected.tokens
    assert answer["version_digest"] == body["version_digest"]
    assert answer["details"]["virtual_tokens"] == 6


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "wrong width": (
        parts(weights(ROWS[:, :40].copy()), config(token_dim=40)),
        422,
        "tensor: dec.embeds; expected: [p, 48]; found: [3, 40]",
    ),
    "wrong layer count": (
        parts(
            weights(np.ones((3, 2 * 5 * 24), dtype="<f4")),
            config(peft_type="PREFIX_TUNING", token_dim=24, num_attention_heads=2, num_layers=5),
        ),
        422,
        "expected: layers 0 to 2; found: 5 layers",
    ),
    "NaN": (parts(spoiled(np.nan), config()), 422, "found: nan at [1, 2]"),
    "truncated file": (parts(weights()[:-1], config()), 415, "truncated"),
    "trailing bytes": (parts(weights() + b"\0", config()), 415, "trailing bytes"),
    "duplicate key in the header": (
        parts(
            file_bytes(
                b'{"prompt_embeddings":%s,"prompt_embeddings":%s}'
                % ((json.dumps(entry([3, HIDDEN], 0, ROWS.nbytes)).encode(),) * 2),
                ROWS.tobytes(),
            ),
            config(),
        ),
        415,
        "appears twice",
    ),
    "300k-tensor header": (parts(many_tensors(), config()), 415, "at most 65536 bytes"),
    "pickle": (parts(b"\x80\x02}q\x00X\x04\x00\x00\x00rows", config()), 415, "safe_serialization=True"),
    "config without file": (parts(None, config()), 422, "adapter_model.safetensors"),
    "file without config": (parts(weights(), None), 422, "send its adapter_config.json"),
    "unknown kind": (parts(weights(), config(peft_type="MAGIC")), 422, "PROMPT_TUNING"),
    "2 GB declared shape": (
        parts(
            file_bytes({"prompt_embeddings": entry([1 << 20, 512], 0, 1 << 31)}, ROWS.tobytes()),
            config(num_virtual_tokens=1 << 20, token_dim=512),
        ),
        415,
        "truncated",
    ),
}


@pytest.mark.parametrize("attack", REFUSED)
def test_refused_uploads_leave_nothing_behind(client: httpx.Client, stack: Stack, attack: str) -> None:
    files, status, reason = REFUSED[attack]
    before = stack.files()
    error = error_of(client.post("/tasks/attacked/versions", files=files), status)
    assert reason in error["message"]
    assert stack.files() == before
    assert client.get("/tasks/attacked").status_code == 404


@pytest.mark.parametrize(
    "path", ["/tasks/..%2Fevil/versions", "/tasks/%2e%2e/versions", "/tasks/a%2F..%2Fb/versions"]
)
def test_an_id_with_dots_and_slashes(client: httpx.Client, stack: Stack, path: str) -> None:
    before = stack.files()
    error = error_of(client.post(path, files=parts(weights(), config())), 422)
    assert error["param"] == "task_id"
    assert "A task id is lower-case letters and digits" in error["message"]
    assert stack.files() == before
    assert not (stack.root.parent / "evil").exists()


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, httpx.Client]]:
    with (
        running_stack(tmp_path_factory.mktemp("bf16"), dtype=torch.bfloat16) as stack,
        serving(ServerState(services=services_of(stack))) as url,
        client_of(url) as client,
    ):
        yield stack, client


def test_overflow_on_cast(bf16: tuple[Stack, httpx.Client]) -> None:
    stack, client = bf16
    before = stack.files()
    error = error_of(client.post("/tasks/attacked/versions", files=parts(spoiled(3.4e38), config())), 422)
    assert "overflows in the base model's bfloat16" in error["message"]
    assert stack.files() == before
    fine = client.post("/tasks/fine/versions", files=parts(weights(), config()))
    assert fine.status_code == 201, fine.text


@pytest.mark.parametrize(
    ("task", "param", "reason"),
    [
        (b'{"template": "{x}", "template": "{y}"}', "task", "appears twice"),
        (b'{"template": "{x}", "defaults": {"top_p": NaN}}', "task", "NaN"),
        (b"[1]", "task", "must be a JSON object"),
        (b"{", "task", "not JSON"),
        (b'{"template": "{x.y}"}', "task.template", "no plain name"),
        (b'{"template": "{x}", "defaults": {"top_k": -1}}', "task.defaults.top_k", "whole number"),
        (b'{"tmplate": "{x}"}', "task.tmplate", "it knows template"),
    ],
)
def test_bad_task_parts(client: httpx.Client, stack: Stack, task: bytes, param: str, reason: str) -> None:
    before = stack.files()
    error = error_of(client.post("/tasks/attacked/versions", files=parts(None, None, task)), 422)
    assert error["param"] == param
    assert reason in error["message"]
    assert stack.files() == before


def test_bodies_that_are_no_upload(client: httpx.Client) -> None:
    error = error_of(client.post("/tasks/a/versions", json={"template": "{x}"}), 415)
    assert "multipart/form-data" in error["message"]
    broken = client.post("/tasks/a/versions", content=b"x", headers={"content-type": "multipart/form-data"})
    error_of(broken, 400)
    unknown = client.post("/tasks/a/versions", files={"weights": b"x"})
    assert "There is no part weights" in error_of(unknown, 422)["message"]
    twice = [("task", ("t", b'{"template": "{x}"}'))] * 2
    assert "twice" in error_of(client.post("/tasks/a/versions", files=twice), 422)["message"]
    many = [(f"p{n}", ("p", b"")) for n in range(20)]
    error_of(client.post("/tasks/a/versions", files=many), 400)
    error_of(client.post("/tasks/a/versions", files={"task": ("t", b" " * (1 << 20) + b"{}")}), 413)
    nothing = client.post("/tasks/a/versions", files={"task": ("t", b"{}")})
    assert "nothing to publish" in error_of(nothing, 422)["message"]


def test_the_base_models_name_is_reserved(client: httpx.Client) -> None:
    response = client.post(f"/tasks/{BASE_NAME}/versions", files=parts(None, None, b'{"template": "{x}"}'))
    assert "name of the base model" in error_of(response, 422)["message"]


def test_the_life_of_a_task(client: httpx.Client) -> None:
    one = publish_text(client, "life", "1 {x}", notes="first", examples=[{"inputs": "a", "expected": "?"}])
    assert one["examples"][0]["matches"] is False
    two = publish_text(client, "life", "2 {x}")
    again = client.post("/tasks/life/versions", files=parts(None, None, b'{"template": "2 {x}"}'))
    assert again.status_code == 200
    assert again.json()["version_digest"] == two["version_digest"]
    assert again.json()["release"] is None

    def live() -> int:
        return int(client.post("/generate", json={"task_id": "life", "inputs": "a"}).json()["task_version"])

    assert live() == 2
    back = client.post("/tasks/life/rollback", json={"why": "worse"})
    assert back.json() == {"task_id": "life", "alias": "live", "version": 1, "release": 3}
    assert live() == 1
    error_of(client.post("/tasks/life/rollback"), 409)
    hidden = client.post("/tasks/life/versions?alias=none", files=parts(None, None, b'{"template": "3 {x}"}'))
    assert (hidden.status_code, hidden.json()["release"]) == (201, None)
    canary = client.post(
        "/tasks/life/versions?alias=canary", files=parts(None, None, b'{"template": "3 {x}"}')
    )
    assert (canary.status_code, canary.json()["release"]) == (200, 4)
    error_of(client.post("/tasks/life/rollback?alias=canary"), 409)
    error_of(client.post("/tasks/life/rollback?alias=canary", json={"alias": "live"}), 422)
    error_of(client.post("/tasks/life/rollback", json={"version": 1}), 422)
    error_of(client.post("/tasks/nobody/rollback"), 404)

    shown = client.get("/tasks/life").json()
    assert shown["aliases"] == {"live": 1, "canary": 3}
    assert [version["template"] for version in shown["versions"]] == ["1 {x}", "2 {x}", "3 {x}"]
    assert shown["versions"][0]["notes"] == "first"
    assert shown["versions"][0]["servable"] is True
    assert [release["why"] for release in shown["releases"]] == ["upload", "upload", "worse", "upload"]
    assert shown["requests_served"] == 2


def test_an_alias_is_moved_by_compare_and_set(client: httpx.Client) -> None:
    for number in (1, 2):
        publish_text(client, "cas", f"{number} {{x}}")

    def move(body: dict[str, Any], alias: str = "live") -> httpx.Response:
        return client.put(f"/tasks/cas/aliases/{alias}", json=body)

    moved = move({"version": 1, "expected_release": 2, "why": "two is worse"})
    assert (moved.status_code, moved.json()) == (
        200,
        {"task_id": "cas", "alias": "live", "version": 1, "release": 3},
    )
    error = error_of(move({"version": 2, "expected_release": 2}), 409)
    assert "last release is 3" in error["message"]
    assert client.get("/tasks/cas").json()["releases"][-1]["why"] == "two is worse"
    assert move({"version": 2}, "canary").json()["release"] == 4
    error_of(move({"version": 9}), 404)
    error_of(client.put("/tasks/nobody/aliases/live", json={"version": 1}), 404)
    for body in (
        {},
        {"version": 1, "weights": {"1": 1}},
        {"weights": {"1": -1}},
        {"weights": {"x": 1}},
        {"weights": {}},
        {"version": 0},
        {"version": 1, "expected_releases": 4},
    ):
        error_of(move(body), 422)
    error_of(move({"version": 1}, "7"), 422)


def test_weights_split_users_and_each_sticks(client: httpx.Client) -> None:
    for number in (1, 2):
        publish_text(client, "split", f"{number} {{x}}")
    answer = client.put("/tasks/split/aliases/live", json={"weights": {"1": 50, "2": 50}})
    assert answer.json() == {
        "task_id": "split",
        "alias": "live",
        "weights": {"1": 50, "2": 50},
        "release": 3,
    }

    def served(user: str) -> int:
        body = {"task_id": "split", "inputs": "a", "user": user, "parameters": {"max_new_tokens": 1}}
        return int(client.post("/generate", json=body).json()["task_version"])

    users = [f"user-{number}" for number in range(12)]
    before = {user: served(user) for user in users}
    assert set(before.values()) == {1, 2}
    assert {user: served(user) for user in users} == before
    client.put("/tasks/split/aliases/live", json={"weights": {"1": 50, "2": 5000}})
    assert all(served(user) == 2 for user in users if before[user] == 2), "nobody is moved away from 2"
    assert client.get("/tasks/split").json()["aliases"] == {"live": {"1": 50, "2": 5000}}
    assert client.post("/tasks/split/rollback").json()["weights"] == {"1": 50, "2": 50}
    assert {user: served(user) for user in users} == before


def test_an_ensemble_is_shown_moved_and_rolled_back(client: httpx.Client) -> None:
    for number in (1, 2):
        publish_text(client, "together", f"{number} {{x}}")
    both = {"weights": {"1": 1, "2": 3}, "ensemble": True}
    answer = client.put("/tasks/together/aliases/live", json={**both, "expected_release": 2})
    assert answer.json() == {"task_id": "together", "alias": "live", **both, "release": 3}
    conflict = client.put("/tasks/together/aliases/live", json={"version": 1, "expected_release": 2})
    error_of(conflict, 409)
    assert client.get("/tasks/together").json()["aliases"] == {"live": both}
    [row] = [row for row in client.get("/tasks").json()["tasks"] if row["id"] == "together"]
    assert (row["version"], row["servable"]) == (2, True)
    assert "together" in {card["id"] for card in client.get("/v1/models").json()["data"]}
    tokens = client.post("/tokenize", json={"task_id": "together", "inputs": "x"}).json()
    assert tokens == client.post("/tokenize", json={"task_id": "together@2", "inputs": "x"}).json()
    assert client.post("/tasks/together/rollback").json()["version"] == 2
    assert client.post("/tasks/together/rollback").json()["version"] == 1


def test_paraphrases_are_spread_and_shown(client: httpx.Client) -> None:
    paraphrases = ["one {x}", "two {x}"]
    publish_text(
        client, "phrased", "own {x}", paraphrases=paraphrases, few_shot=[{"inputs": "a", "output": "b"}]
    )
    spread = {"version": 1, "spread_paraphrases": True}
    answer = client.put("/tasks/phrased/aliases/live", json=spread)
    assert answer.json() == {"task_id": "phrased", "alias": "live", **spread, "release": 2}
    shown = client.get("/tasks/phrased").json()
    assert shown["aliases"] == {"live": spread}
    [version] = shown["versions"]
    assert (version["paraphrases"], version["few_shot"]) == (paraphrases, [{"inputs": "a", "output": "b"}])
    assert (version["reasoning"], version["chain"], version["vote"], version["calibration"]) == (None,) * 4

    def read(user: str, **parameters: object) -> str:
        parameters |= {"max_new_tokens": 1, "return_full_text": True}
        body = {"task_id": "phrased", "inputs": "x", "user": user, "parameters": parameters}
        return str(client.post("/generate", json=body).json()["generated_text"]).split("b\n\n")[1]

    seen = {user: read(user)[:3] for user in ("a", "b", "c", "d", "e", "f")}
    assert {*seen.values()} == {"one", "two"}
    assert {user: read(user)[:3] for user in seen} == seen
    assert read("a", paraphrase=0).startswith("one x")
    body = {"task_id": "phrased", "inputs": "x", "parameters": {"paraphrase": 2}}
    error = error_of(client.post("/generate", json=body), 422)
    assert "2 paraphrases" in error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"version": 1, "ensemble": True}, "ensemble goes with weights"),
        ({"weights": {"1": 1}, "ensemble": True}, "between 2 and 16"),
        ({"weights": {"1": 1, "2": 1}, "spread_paraphrases": True}, "goes with version"),
        ({"version": 1, "spread_paraphrases": True}, "no paraphrases"),
        ({"weights": {"1": 1, "2": 1}, "ensemble": 1}, "ensemble"),
    ],
)
def test_targets_that_make_no_sense(client: httpx.Client, body: dict[str, Any], says: str) -> None:
    if client.get("/tasks/odd").status_code == 404:
        publish_text(client, "odd", "1 {x}")
        publish_text(client, "odd", "2 {x}")
    assert says in error_of(client.put("/tasks/odd/aliases/live", json=body), 422)["message"]


def test_a_task_is_retired_and_restored(client: httpx.Client) -> None:
    publish_text(client, "old", "{x}")
    ask = {"task_id": "old", "inputs": "a"}
    assert client.post("/generate", json=ask).status_code == 200
    gone = client.delete("/tasks/old", params={"why": "nobody uses it"})
    assert gone.json() == {"task_id": "old", "retired": True, "release": 2}
    assert client.delete("/tasks/old").json()["release"] == 2
    for reference in ("old", "old@live", "old@1"):
        error = error_of(client.post("/generate", json=ask | {"task_id": reference}), 404)
        assert "retired" in error["message"]
    again = {"task": (None, json.dumps({"template": "new {x}"}))}
    error_of(client.post("/tasks/old/versions", files=again), 409)
    shown = client.get("/tasks/old").json()
    assert (shown["retired"], shown["releases"][-1]["why"]) == (True, "nobody uses it")
    row = next(row for row in client.get("/tasks?limit=1000").json()["tasks"] if row["id"] == "old")
    assert not row["servable"]
    assert "retired" in row["not_servable_because"]
    assert client.post("/tasks/old/restore").json() == {"task_id": "old", "retired": False, "release": 3}
    assert client.post("/generate", json=ask).status_code == 200
    error_of(client.delete("/tasks/nobody"), 404)
    publish_text(client, "young", "{x}")
    error_of(client.post("/tasks/young/restore"), 409)


def test_null_is_the_same_as_none_in_a_task_part(client: httpx.Client) -> None:
    task = {"template": "{x}", "notes": None, "tokenizer": None}  # no task has the last one
    published = client.post("/tasks/nulls/versions", files={"task": (None, json.dumps(task))})
    assert published.status_code == 201


def test_another_base_that_was_trained_on_is_pointed_out(client: httpx.Client) -> None:
    for name, stated in (("elsewhere", {"base_fingerprint": "0" * 64}), ("unstated", {})):
        task = {"template": "{x}", "training": {"method": "prefix", **stated}}
        answer = client.post(f"/tasks/{name}/versions", files={"task": (None, json.dumps(task))})
        assert answer.status_code == 201, answer.text
        warnings = answer.json()["warnings"]
        assert len(warnings) == len(stated)
        assert all("another base (000000000000)" in warning for warning in warnings)


def test_metrics_of_the_training_are_kept(client: httpx.Client) -> None:
    task = {"template": "{x}", "metrics": {"accuracy": 0.94, "steps": 300}}
    files = {"task": (None, json.dumps(task))}
    assert client.post("/tasks/trained/versions", files=files).status_code == 201
    provenance = client.get("/tasks/trained").json()["versions"][0]["provenance"]
    assert provenance["metrics"] == {"accuracy": 0.94, "steps": 300}
    assert provenance["uploader"] == "http"
    for metrics in ({"a": "b"}, [1], {"a": True}, {"x" * 200: 1}):
        refused = {"task": (None, json.dumps({"template": "{x}", "metrics": metrics}))}
        error_of(client.post("/tasks/trained/versions", files=refused), 422)


def test_the_list_is_paged(client: httpx.Client) -> None:
    for number in range(5):
        publish_text(client, f"page-{number}", "{x}")
    ids, following = [], None
    while True:
        page = client.get("/tasks", params={"limit": 2} | ({"after": following} if following else {})).json()
        assert len(page["tasks"]) <= 2
        ids += [row["id"] for row in page["tasks"]]
        following = page["next"]
        if following is None:
            break
    assert ids == sorted(ids)
    assert {f"page-{number}" for number in range(5)} <= set(ids)
    row = next(row for row in client.get("/tasks?limit=1000").json()["tasks"] if row["id"] == "page-0")
    assert row | {"version_digest": ""} == {
        "id": "page-0",
        "version": 1,
        "version_digest": "",
        "kind": "text",
        "virtual_tokens": 0,
        "servable": True,
        "not_servable_because": None,
        "resident": False,
        "requests_served": 0,
    }
    error_of(client.get("/tasks?limit=0"), 422)
    error_of(client.get("/tasks/nobody"), 404)
    error_of(client.get("/tasks/UP"), 422)


def test_a_resident_task_says_so(client: httpx.Client) -> None:
    assert client.post("/tasks/warm/versions", files=parts(weights(), config())).status_code == 201
    client.post("/generate", json={"task_id": "warm", "inputs": "a"})
    assert client.get("/tasks/warm").json()["versions"][0]["resident"] is True


def test_a_mistyped_query_parameter_moves_nothing(client: httpx.Client) -> None:
    publish_text(client, "mistyped", "one {x}")
    second = {"task": (None, json.dumps({"template": "two {x}"}))}
    error = error_of(client.post("/tasks/mistyped/versions?alais=none", files=second), 422)
    assert error["message"] == "There is no query parameter alais; there is alias."
    assert error["param"] == "alais"
    detail = client.get("/tasks/mistyped").json()
    assert (detail["aliases"], len(detail["versions"])) == ({"live": 1}, 1)
    assert client.post("/tasks/mistyped/versions?alias=none", files=second).status_code == 201
    error = error_of(client.get("/tasks?page=2"), 422)
    assert error["message"] == "There is no query parameter page; there is after, limit."
    error = error_of(client.get("/tasks/mistyped?verbose="), 422)
    assert error["message"] == "There is no query parameter verbose; this route takes none."
    for path in ("/version", "/health", "/health/live", "/info", "/metrics"):  # for probes and scrapers
        assert client.get(f"{path}?verbose=").status_code == 200
    error_of(client.post("/tasks/mistyped/rollback?alais=live"), 422)
    error_of(client.post("/generate?stream=1", json={"inputs": "a"}), 422)


@pytest.fixture(params=["its files may not grow", "it is gone"])
def full_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Temporary files can't be written."""
    if request.param == "it is gone":
        monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_an_uploads_bytes(client: httpx.Client, full_disk: None) -> None:
    """Larger than what is kept in memory, so that it must go to a temporary file."""
    answer = client.post("/tasks/roomy/versions", files={"prompt": bytes(5 << 20)})
    assert answer.status_code == 507, answer.text
    assert answer.json()["error"]["code"] == "store_full"
    assert client.get("/health/live").status_code == 200
    small = client.post("/tasks/roomy/versions", files={"task": json.dumps({"template": "roomy {x}"})})
    assert small.is_success, small.text
