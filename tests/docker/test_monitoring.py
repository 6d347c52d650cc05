"""Prometheus and Grafana as configured: against the metrics of a real server, and a real Prometheus."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from app.keys.key import Key, Scope, hash_of, new_key_text
from app.keys.key_file import change_keys
from tests.api.server import hosted
from tests.docker.clean_root import settled
from tests.store.redis_server import RedisServer, free_port
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "docker" / "prometheus"
GRAFANA = ROOT / "docker" / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "promptplex.json").read_text())
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]

# What a scrape adds by itself.
TARGET_LABELS = {"job", "instance", "le"}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool isn't installed")


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def dashboard_queries() -> list[str]:
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    return [target["expr"] for panel in panels() for target in panel["targets"]] + variables


def used(query: str) -> Iterator[tuple[str, set[str]]]:
    """Each of our metrics in a query, with the labels that its selector names."""
    for name, selector in re.findall(r"(promptplex_[a-z0-9_]+)(?:\{([^}]*)\})?", query):
        yield name, set(re.findall(r"([a-z_]+)\s*(?:=~|!=|=|!~)", selector))


def grouped(query: str) -> set[str]:
    """The labels that a query groups by."""
    return {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}


class Running:
    """A server with keys, Redis and one answered request."""

    def __init__(self, url: str, key_file: Path) -> None:
        self.url, self.key_file = url, key_file
        headers = {"authorization": f"Bearer {key_file.read_text().strip()}"}
        self.text = httpx2.get(f"{url}/metrics", headers=headers, trust_env=False).text

    def samples(self) -> dict[str, set[str]]:
        """Every sample's name with its labels."""
        found: dict[str, set[str]] = {}
        for name, labels in re.findall(r"^([a-z0-9_]+)(?:\{(.*)\})? ", self.text, re.MULTILINE):
            found.setdefault(name, set()).update(re.findall(r'([a-z_]+)="', labels))
        return found


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("watched")
    redis = RedisServer(place)
    shutil.copytree(ROOT / "prompts_store", place / "store")
    scopes = {"prometheus": {Scope.METRICS}, "writer": {Scope.GENERATE, Scope.UPLOAD}}
    keys = {name: place / f"{name}.key" for name in scopes}
    for name, file in keys.items():
        file.write_text(f"{new_key_text()}\n")
        key = Key(name=name, sha256=hash_of(file.read_text().strip()), scopes=frozenset(scopes[name]))
        change_keys(place / "keys.json", lambda others, key=key: [*others, key])
    settings = {"dtype": "float32", "redis_url": redis.url, "keys_file": place / "keys.json"}
    try:
        with hosted(model=str(ROOT / "demo" / "demo-causal"), store=place / "store", **settings) as url:
            ask = {"task_id": "date-iso", "inputs": "the 22nd of November 1963"}
            headers = {"authorization": f"Bearer {keys['writer'].read_text().strip()}"}
            answer = httpx2.post(
                f"{url}/generate", json=ask, headers=headers, trust_env=False, timeout=PATIENCE
            )
            assert answer.status_code == 200
            assert httpx2.get(f"{url}/tasks", trust_env=False).status_code == 401
            yield Running(url, keys["prometheus"])
    finally:
        redis.kill()


def adapted(place: Path, running: Running) -> Path:
    """The shipped configuration, with this machine's paths, target and patience and nothing else changed."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(running.key_file)
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [running.url.removeprefix("http://")]}]
    path = place / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    return path


@needs_promtool
def test_promtool_takes_the_configuration(running: Running, tmp_path: Path) -> None:
    command = ["promtool", "check", "config", str(adapted(tmp_path, running))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(RULES)} rules found" in done.stdout
    # As it is shipped, all but the key's file, which the entrypoint makes.
    command = ["promtool", "check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_promtool
@pytest.mark.parametrize("command", [("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")])
def test_promtool_takes_the_rules(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in RULES}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names
    assert len(names) == 6


def test_the_server_has_every_metric_and_label_that_is_asked_for(running: Running) -> None:
    samples = running.samples()
    queries = [*dashboard_queries(), *(rule["expr"] for rule in RULES)]
    asked = [(name, labels) for query in queries for name, labels in used(query)]
    assert len({name for name, _ in asked}) > 30
    assert sorted({name for name, _ in asked} - set(samples)) == []
    for name, labels in asked:
        assert labels <= samples[name] | TARGET_LABELS, name
    for query in queries:
        of_metrics = set().union(*(samples[name] for name, _ in used(query)))
        assert grouped(query) <= of_metrics | TARGET_LABELS, query


def test_every_metric_is_documented(running: Running) -> None:
    families = set(re.findall(r"^# TYPE (promptplex_[a-z0-9_]+) ", running.text, re.MULTILINE))
    text = (ROOT / "docs" / "operations.md").read_text().split("\n## Watch\n")[1]
    documented = {f"promptplex_{name}" for name in re.findall(r"^\| `([a-z0-9_]+)", text, re.MULTILINE)}
    assert documented == families


def test_the_dashboard_shows_what_it_should() -> None:
    text = json.dumps(DASHBOARD)
    for name in (
        *("requests_total", "batch_size", "distinct_tasks", "time_to_first_token_seconds"),
        *("inter_token_latency_seconds", "kv_cache_usage_ratio", "prompt_cache_hits_total"),
        *("request_failure_total", "redis_up"),
    ):
        assert f"promptplex_{name}" in text


def test_the_dashboard_is_well_formed() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) == 23
    for panel in panels():
        assert panel["title"]
        assert panel["description"]
        references = [target["refId"] for target in panel["targets"]]
        assert len(references) == len(set(references))


def test_the_dashboard_and_its_source_are_provisioned() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (uid,) = {source["uid"] for source in sources}
    named = re.findall(r'"datasource": \{"type": "prometheus", "uid": "([^"]*)"\}', json.dumps(DASHBOARD))
    assert set(named) == {uid}
    assert len(named) > len(panels())
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/promptplex.yml").read_text())[
        "providers"
    ]
    grafana = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["grafana"]
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (GRAFANA / "dashboards" / home.name).is_file()
    assert str(home.parent) == provider["options"]["path"]


def test_prometheus_looks_where_the_servers_are() -> None:
    (job,) = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    (search,) = job["dns_sd_configs"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert search["names"] == [name for name, service in services.items() if "build" in service]
    assert str(search["port"]) == settled("serve").environment["PROMPTPLEX_PORT"]


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus isn't installed")
def test_a_real_prometheus_scrapes_and_answers(running: Running, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    command = [
        "prometheus",
        f"--config.file={adapted(tmp_path, running)}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
    ]
    command.append(f"--web.listen-address={url.removeprefix('http://')}")
    with open(tmp_path / "log", "w") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            assert answer_of(url, 'up{job="promptplex"}')[0]["value"][1] == "1"
            assert answer_of(url, "promptplex_requests_total")[0]["metric"]["task"] == "date-iso"
            for query in dashboard_queries():
                if "label_values" not in query:
                    filled = query.replace("$__rate_interval", "1m").replace("$instance", ".*")
                    ask(url, "query", query=filled)
            rules = ask(url, "rules")["groups"][0]["rules"]
            assert [rule["name"] for rule in rules] == [rule["alert"] for rule in RULES]
            assert {rule["state"] for rule in rules} == {"inactive"}
        finally:
            process.terminate()


def ask(url: str, what: str, **parameters: str) -> dict[str, Any]:
    """Prometheus' own API; it must succeed."""
    answer = httpx2.get(f"{url}/api/v1/{what}", params=parameters, trust_env=False, timeout=PATIENCE).json()
    assert answer["status"] == "success", answer
    data: dict[str, Any] = answer["data"]
    return data


def answer_of(url: str, query: str) -> list[dict[str, Any]]:
    """As soon as there is an answer."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if result := ask(url, "query", query=query)["result"]:
                return list(result)
        except (httpx2.TransportError, json.JSONDecodeError):
            pass  # while it starts, nobody listens, or the answer is a line of text
        time.sleep(0.2)
    raise AssertionError(f"no answer to {query}")
