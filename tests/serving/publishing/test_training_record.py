"""The `training` object of an upload: kept as it is, bounded, and no part of a version's identity."""

from copy import deepcopy
from typing import Any

import pytest

from app.errors import InvalidRequest
from app.serving.publishing.task_settings import parse_task
from app.serving.publishing.training_record import MAX_CURVES, MAX_POINTS, MAX_SETTINGS
from app.store.manifests import encode_version, settings_of, version_of

RECORD: dict[str, Any] = {
    "method": "prefix",
    "settings": {"learning_rate": 0.005, "init": "text", "init_text": None, "num_virtual_tokens": 16},
    "data_sha256": "ab" * 32,
    "num_examples": {"train": 160, "dev": 20, "test": 20},
    "seed": 0,
    "steps": 300,
    "best_step": 250,
    "seconds": 61.5,
    "code": {"version": "0.9", "git": "0123abcd"},
    "base_fingerprint": "0f" * 32,
    "curves": {"loss": {"steps": [1, 2, 3], "values": [3.25, 2.5, 1.125]}},
}


def changed(**fields: Any) -> dict[str, Any]:
    return {"template": "{x}", "training": deepcopy(RECORD) | fields}


def curve(length: int) -> dict[str, Any]:
    return {"steps": list(range(length)), "values": [0.5] * length}


def test_it_is_kept_as_it_is_beside_the_metrics() -> None:
    draft = parse_task(changed() | {"metrics": {"exact": 0.5}})
    assert draft.provenance == {"metrics": {"exact": 0.5}, "training": RECORD}


def test_a_task_without_it_has_none() -> None:
    assert parse_task({"template": "{x}"}).provenance == {"metrics": {}}


def test_versions_that_differ_in_it_alone_are_the_same() -> None:
    one, other = (version_of("t", 1, parse_task(changed(seed=seed))) for seed in (1, 2))
    assert settings_of(one) == settings_of(other)
    assert one.provenance != other.provenance


def test_the_largest_one_fits_a_manifest() -> None:
    largest = changed(
        settings={f"{number:0128d}": "x" * 1024 for number in range(MAX_SETTINGS)},
        curves={f"{number:0128d}": curve(MAX_POINTS) for number in range(MAX_CURVES)},
    )
    assert len(encode_version(version_of("t", 1, parse_task(largest)))) < 1 << 18


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": ""}, "task.training.method"),
        ({"method": 3}, "task.training.method"),
        ({"settings": {"lr": [1]}}, "task.training.settings.lr"),
        ({"settings": {"text": "x" * 1025}}, "task.training"),
        ({"settings": {str(number): 1 for number in range(MAX_SETTINGS + 1)}}, "task.training.settings"),
        ({"data_sha256": "AB" * 32}, "task.training.data_sha256"),
        ({"data_sha256": "ab" * 32 + "\n"}, "task.training.data_sha256"),
        ({"num_examples": {"train": -1}}, "task.training.num_examples.train"),
        ({"seed": True}, "task.training.seed"),
        ({"seconds": "60"}, "task.training.seconds"),
        ({"seconds": float("nan")}, "task.training.seconds"),
        ({"steps": 2**53}, "task.training.steps"),
        ({"curves": {"loss": curve(MAX_POINTS + 1)}}, "task.training.curves.loss.steps"),
        ({"curves": {str(number): curve(1) for number in range(MAX_CURVES + 1)}}, "task.training.curves"),
        ({"curves": {"loss": {"steps": [1, 2], "values": [0.5]}}}, "task.training.curves.loss"),
        ({"curves": {"loss": {"steps": [2, 1], "values": [0.5, 0.5]}}}, "task.training.curves.loss"),
        (
            {"curves": {"loss": {"steps": [1], "values": [float("inf")]}}},
            "task.training.curves.loss.values[0]",
        ),
        ({"script": "x"}, "task.training"),
    ],
)
def test_what_is_too_much_or_of_another_type_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_task(changed(**fields))
    assert refused.value.param == param
    assert param in refused.value.message
