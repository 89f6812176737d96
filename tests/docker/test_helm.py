"""The chart. Rendering it needs Helm, and 350 MB of packages that aren't in the lock: skipped without."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
import yaml

from tests.docker.dockerfiles import CPU, ROOT, Dockerfile

CHART = ROOT / "docker/helm/fraqtl-serve"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
KUBERNETES = "1.33"
WARNING = 2  # of helm lint
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "cpu": {"gpu": {"count": 0}, "image": {"tag": "cpu"}},
    "everything": {
        "gpu": {"count": 4},
        "model": "a/model",
        "args": ["--kv-format", "k8v8"],
        "apiKeySecret": "key",
        "env": [{"name": "HF_TOKEN", "value": "x"}],
        "cache": {"persistent": True, "storageClassName": "fast"},
        "runtimeClassName": "nvidia",
        "podMonitor": True,
        "imagePullSecrets": [{"name": "pull"}],
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"operator": "Exists"}],
        "podAnnotations": {"a": "b"},
        "resources": {"limits": {"memory": "64Gi"}},
    },
    "openshift": {"podSecurityContext": {"runAsUser": None, "fsGroup": None}},
}


def test_versions_are_those_of_the_package() -> None:
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert version and chart["version"] == chart["appVersion"] == version[1]


def test_values_keep_to_their_schema() -> None:
    jsonschema.validate(VALUES, SCHEMA)
    assert set(VALUES) | {"global"} == set(SCHEMA["properties"])


@pytest.mark.parametrize(
    "wrong", [{"replica": 2}, {"gpu": {"count": -1}}, {"cache": {"size": 5}}, {"args": "--kv-format k8v8"}]
)
def test_schema_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(VALUES | wrong, SCHEMA)


def test_templates_use_all_values_and_no_other() -> None:
    used = set()
    for template in (CHART / "templates").iterdir():
        used |= set(re.findall(r"\.Values\.([\w.]+)", template.read_text()))
    for path in used - {"resources.limits"}:  # none by default
        value: Any = VALUES
        for key in path.split("."):
            assert key in value, path
            value = value[key]
    assert {path.split(".")[0] for path in used} == set(VALUES)


def rendered(case: dict[str, Any]) -> list[dict[str, Any]]:
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk, development only")
    with helm.Chart.load(str(CHART)) as chart:
        files = chart.render(case, name="demo", namespace="prod")
    texts = [text for name, text in files.items() if not name.endswith(".txt")]
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@pytest.mark.parametrize("name", CASES)
def test_helm_finds_nothing_to_warn_of(name: str) -> None:
    helm = pytest.importorskip("helm_python", reason="needs helm-python-sdk, development only")
    found = helm.lint(str(CHART), CASES[name], strict=True, kube_version=f"v{KUBERNETES}.0")
    assert found["errors"] == [] and all(message["severity"] < WARNING for message in found["messages"])


@pytest.mark.parametrize("name", CASES)
def test_kubernetes_takes_it(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate, development only")
    documents = [d for d in rendered(CASES[name]) if d["kind"] != "PodMonitor"]  # not of Kubernetes' own
    assert {d["kind"] for d in documents} >= {"Deployment", "Service"}
    for document in documents:
        validate.validate(document, KUBERNETES, strict=True)


def deployment(case: str) -> Any:
    [found] = [d for d in rendered(CASES[case]) if d["kind"] == "Deployment"]
    return found["spec"]["template"]["spec"]


def test_probes_ask_for_the_health_of_the_port_that_is_served() -> None:
    [container] = deployment("defaults")["containers"]
    assert container["ports"] == [
        {"name": "http", "containerPort": int(Dockerfile(CPU.read_text()).last("EXPOSE") or 0)}
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    first = container["startupProbe"]
    assert first["periodSeconds"] * first["failureThreshold"] >= 1800


def test_there_is_time_to_drain() -> None:
    pod = deployment("defaults")
    [drain] = [a for a in pod["containers"][0]["args"] if a.startswith("--shutdown-timeout=")]
    hook = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert int(drain.split("=")[1]) + hook + 10 <= pod["terminationGracePeriodSeconds"]


def test_gpus_are_asked_for_and_used() -> None:
    [container] = deployment("everything")["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert "--tensor-parallel-size=4" in container["args"]
    [container] = deployment("cpu")["containers"]
    assert "limits" not in container["resources"] or not container["resources"]["limits"]
    assert not any(a.startswith("--tensor-parallel-size") for a in container["args"])


def test_nobody_is_root() -> None:
    for case in ("defaults", "openshift"):
        pod = deployment(case)
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"].get("runAsUser", 1) != 0
        assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert "runAsUser" not in deployment("openshift")["securityContext"]
