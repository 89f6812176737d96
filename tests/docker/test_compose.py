"""docker/compose.yaml and what it mounts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.docker.dockerfiles import CPU, GPU, ROOT, Dockerfile, names_a_registry
from tests.grafana import DASHBOARD

DOCKER = ROOT / "docker"
FILES = ["compose.yaml", "compose.gpu.yaml"]


def read(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text())


SERVICES: dict[str, Any] = read("compose.yaml")["services"]


@pytest.mark.parametrize("name", FILES)
def test_specification(name: str) -> None:
    program = shutil.which("check-jsonschema", path=str(Path(sys.executable).parent))
    assert program, "check-jsonschema of docker/lock/test.txt is not installed"
    command = [program, "--builtin-schema", "vendor.compose-spec", str(DOCKER / name)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", FILES)
def test_builds_what_is_there(name: str) -> None:
    build = read(name)["services"]["server"]["build"]
    assert (DOCKER / build["context"] / build["dockerfile"]).resolve() in (CPU, GPU)


def test_ports_are_published_on_the_loopback_only() -> None:
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert len(ports) == len(SERVICES) and all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.split(":")[1] for port in ports}) == len(ports)


def test_no_image_names_a_registry() -> None:
    for service in SERVICES.values():
        assert not names_a_registry(service["image"].partition(":-")[2].rstrip("}") or service["image"])


def test_mounts() -> None:
    named = read("compose.yaml")["volumes"]
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in named, volume


def targets(service: str) -> dict[Path, Path]:
    """Mounted files by their place in the container."""
    mounts = [v.split(":") for v in SERVICES[service]["volumes"] if v.startswith(".")]
    return {Path(m[1]): DOCKER / m[0] for m in mounts}


def test_the_server_may_write_its_cache_and_nothing_else() -> None:
    server = SERVICES["server"]
    assert server["read_only"] and server["cap_drop"] == ["ALL"]
    assert server["volumes"] == ["cache:/cache"]
    assert server["restart"] == "unless-stopped"  # it ends with 0 when its engine dies: on-failure would leave it
    assert int(server["stop_grace_period"].rstrip("s")) <= 15


def test_prometheus_asks_the_server() -> None:
    [job] = yaml.safe_load(targets("prometheus")[Path("/etc/prometheus/prometheus.yml")].read_text())["scrape_configs"]
    port = Dockerfile(CPU.read_text()).last("EXPOSE")
    assert job["static_configs"] == [{"targets": [f"server:{port}"]}]
    assert job.get("metrics_path", "/metrics") == "/metrics"


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    mounts = targets("grafana")
    folder = mounts[Path("/etc/grafana/provisioning")]
    [source] = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    address = urlsplit(source["url"])
    assert address.hostname in SERVICES and SERVICES[address.hostname]["ports"][0].endswith(f":{address.port}")
    assert source["isDefault"]
    [variable] = [v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource"]
    assert variable["query"] == source["type"]

    [provider] = yaml.safe_load((folder / "dashboards/fraqtl.yaml").read_text())["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert home.parent == Path(provider["options"]["path"])
    assert mounts[home] == DOCKER / "./grafana/kv-memory.json"


def test_the_chat_page_talks_to_the_server() -> None:
    chat = SERVICES["chat"]
    address = urlsplit(chat["environment"]["OPENAI_API_BASE_URL"])
    assert (address.hostname, address.port, address.path) == ("server", 8000, "/v1")
    assert chat["depends_on"]["server"]["condition"] == "service_healthy"
