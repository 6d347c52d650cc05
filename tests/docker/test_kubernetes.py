"""The manifests for Kubernetes: they belong together, and to the image."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.settings import Settings
from tests.docker.clean_root import settled

FOLDER = Path(__file__).parents[2] / "docker" / "k8s"
LABEL = {"app.kubernetes.io/name": "promptplex"}

Manifest = dict[str, Any]


def read(name: str) -> Manifest:
    manifest: Manifest = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return manifest


@pytest.fixture
def pod() -> Manifest:
    spec: Manifest = read("deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: Manifest) -> Manifest:
    (only,) = pod["containers"]
    found: Manifest = only
    return found


def test_kustomize_takes_them_all() -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl isn't installed")
    done = subprocess.run([kubectl, "kustomize", str(FOLDER)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == [
        "Deployment",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "Service",
    ]


def test_kubernetes_own_schema_takes_them() -> None:
    for name in ("deployment", "service", "networkpolicy", "persistentvolumeclaim", "poddisruptionbudget"):
        kubernetes_validate.validate(read(name), "1.33", strict=True)


def test_every_manifest_is_in_the_kustomization() -> None:
    text = (FOLDER / "kustomization.yaml").read_text()
    assert all(
        f"- {path.name}" in text for path in FOLDER.glob("*.yaml") if path.name != "kustomization.yaml"
    )


def test_labels_and_names_fit_together() -> None:
    deployment = read("deployment")
    assert deployment["spec"]["selector"]["matchLabels"] == LABEL
    assert deployment["spec"]["template"]["metadata"]["labels"] == LABEL
    assert read("service")["spec"]["selector"] == LABEL
    assert read("poddisruptionbudget")["spec"]["selector"]["matchLabels"] == LABEL
    assert read("scaledobject")["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]


def test_the_pod_can_do_nothing_but_serve(pod: Manifest, container: Manifest) -> None:
    user, group = map(int, settled("serve").user.split(":"))
    context = pod["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["automountServiceAccountToken"] is False


def test_only_who_is_named_may_talk_to_the_pods(container: Manifest) -> None:
    policy = read("networkpolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == LABEL
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    (ingress,) = policy["ingress"]
    assert [port["port"] for port in ingress["ports"]] == [container["ports"][0]["name"]]
    prometheus = read("scaledobject")["spec"]["triggers"][0]["metadata"]["serverAddress"]
    (expression,) = ingress["from"][1]["namespaceSelector"]["matchExpressions"]
    assert prometheus.split(".")[1] in expression["values"]
    assert all(rule["to"] and rule["ports"] for rule in policy["egress"])  # nothing is open to everywhere
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 6379}


def test_three_probes_ask_the_routes_that_need_no_key(container: Manifest) -> None:
    probes = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert probes == {
        "startupProbe": "/health/ready",
        "livenessProbe": "/health/live",
        "readinessProbe": "/health/ready",
    }


def test_everything_that_is_written_is_mounted(pod: Manifest, container: Manifest) -> None:
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert set(mounts) == {*settled("serve").volumes, "/tmp"} - {"/metrics-key"}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    assert mounts["/keys"] == {"name": "keys", "mountPath": "/keys", "readOnly": True}
    claim = next(volume for volume in pod["volumes"] if volume["name"] == "store")["persistentVolumeClaim"]
    assert claim["claimName"] == read("persistentvolumeclaim")["metadata"]["name"]
    assert read("persistentvolumeclaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_a_pod_gets_the_time_that_it_needs_to_drain(pod: Manifest, container: Manifest) -> None:
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    sleep = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= sleep + float(values["PROMPTPLEX_DRAIN_TIMEOUT"]) + 10
    assert set(values) <= {f"PROMPTPLEX_{name.upper()}" for name in Settings.model_fields}


def test_replicas_follow_what_waits() -> None:
    (trigger,) = read("scaledobject")["spec"]["triggers"]
    assert trigger["type"] == "prometheus"
    assert trigger["metadata"]["query"] == "sum(promptplex_num_requests_waiting)"
