"""deploy/helm: the chart, rendered by helm, makes manifests that Kubernetes takes, for both engines."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import Manifest, check, configuration, of_kind, read, workload
from tests.deploy.units import PROJECT

CHART = PROJECT / "deploy" / "helm" / "quiclb"
HELM = shutil.which("helm", path=f"{Path(sys.executable).parent}") or shutil.which("helm")
XDP = {"engine": "xdp", "config": {"interface": "eth0", "forward": "ipip", "metrics": "127.0.0.1:9100"}}

pytestmark = pytest.mark.skipif(HELM is None, reason="no helm: .ci/setup builds it where there is a Go 1.24")


def helm(directory: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    assert HELM is not None
    environment = {"HOME": str(directory), "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [HELM, *arguments], capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=directory
    )


def render(directory: Path, values: dict[str, Any] | None = None, name: str = "quiclb") -> list[Manifest]:
    done = template(directory, values, name)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def template(
    directory: Path, values: dict[str, Any] | None = None, name: str = "quiclb"
) -> subprocess.CompletedProcess[str]:
    file = directory / "values.yaml"
    file.write_text(yaml.safe_dump(values or {}))
    return helm(directory, "template", "--kube-version", "1.30.0", "--values", file, name, CHART)


def test_helm_has_nothing_against_it(tmp_path: Path) -> None:
    done = helm(tmp_path, "lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout


def test_as_it_is_it_makes_a_deployment(tmp_path: Path) -> None:
    found = render(tmp_path)
    check(found, tmp_path, "udp")
    assert {manifest["kind"] for manifest in found} == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}


def test_with_xdp_it_makes_a_daemonset_on_the_nodes_network(tmp_path: Path) -> None:
    found = render(tmp_path, XDP | {"nodeSelector": {"quiclb/xdp": "true"}})
    check(found, tmp_path, "xdp")
    assert {manifest["kind"] for manifest in found} == {"ConfigMap", "DaemonSet"}
    (container,) = workload(found)["spec"]["template"]["spec"]["containers"]
    assert container["livenessProbe"]["httpGet"]["host"] == "127.0.0.1"
    assert container["image"] == "quiclb:xdp"


def test_every_value_can_be_set(tmp_path: Path) -> None:
    values = {
        "image": {"repository": "registry.example/quiclb", "tag": "1.0", "pullPolicy": "Always"},
        "imagePullSecrets": [{"name": "registry"}],
        "replicas": 5,
        "service": {"type": "NodePort", "annotations": {"example.net/pool": "a"}},
        "podDisruptionBudget": {"enabled": False},
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-node-critical",
        "podAnnotations": {"example.net/team": "edge"},
        "podMonitor": {"enabled": True, "interval": "5s"},
    }
    found = render(tmp_path, values, name="edge")
    deployment = of_kind(found, "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    check(
        [*found, {"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "spec": _budget(deployment)}],
        tmp_path,
        "udp",
    )
    assert deployment["metadata"]["name"] == "edge-quiclb"
    assert deployment["spec"]["replicas"] == 5
    assert container["image"] == "registry.example/quiclb:1.0"
    assert (pod["nodeSelector"], pod["tolerations"]) == (values["nodeSelector"], values["tolerations"])
    assert deployment["spec"]["template"]["metadata"]["annotations"] == values["podAnnotations"]
    monitor = of_kind(found, "PodMonitor")["spec"]
    assert monitor["podMetricsEndpoints"] == [{"port": "metrics", "interval": "5s"}]
    # The rules ask for job="quiclb": the label's value.
    assert deployment["spec"]["template"]["metadata"]["labels"][monitor["jobLabel"]] == "quiclb"


def _budget(deployment: Manifest) -> Manifest:
    return {"selector": deployment["spec"]["selector"]}


def services(**changes: object) -> list[dict[str, Any]]:
    """Those of the chart's values, with changes to the one that there is."""
    (found,) = yaml.safe_load((CHART / "values.yaml").read_text())["config"]["services"]
    return [found | changes]


def test_a_configuration_is_passed_on_as_it_is(tmp_path: Path) -> None:
    """Large numbers, too, which JSON's are not."""
    config = {"limits": {"table-entries": 2097152, "flows": 1000000}, "log": {"flows": "1%"}}
    loaded = configuration(render(tmp_path, {"config": config}), tmp_path)

    assert (loaded.limits.table_entries, loaded.limits.flows, loaded.log.flows) == (2097152, 1000000, 0.01)


def test_all_ports_that_are_listened_on_are_the_services(tmp_path: Path) -> None:
    listen = ["0.0.0.0:443", "[::]:443", "0.0.0.0:8443"]
    found = render(tmp_path, {"config": {"services": services(listen=listen)}})

    check(found, tmp_path, "udp")
    assert [port["port"] for port in of_kind(found, "Service")["spec"]["ports"]] == [443, 8443]


def test_all_files_below_secrets_are_in_the_volume(tmp_path: Path) -> None:
    (slot,) = services()[0]["cid-configs"]
    slots = [slot, {"config-id": 1, "key-file": "secrets/cid-1.key", "reset-key-file": "/elsewhere/reset.key"}]
    admin = {"listen": ["0.0.0.0:9101"], "write-token-file": "secrets/token"}
    found = render(tmp_path, {"config": {"admin": admin, "services": services(**{"cid-configs": slots})}})
    (config, _) = workload(found)["spec"]["template"]["spec"]["volumes"]

    (items,) = (source["secret"]["items"] for source in config["projected"]["sources"] if "secret" in source)
    assert items == [
        {"key": name, "path": f"secrets/{name}"} for name in ("cid-0.key", "cid-1.key", "reset-0.key", "token")
    ]


def test_pods_are_replaced_for_another_configuration_only_if_that_is_wanted(tmp_path: Path) -> None:
    def pod(seed: str, *, restart: bool) -> Manifest:
        values = {"restartOnChange": restart, "config": {"services": services(seed=seed)}}
        found: Manifest = workload(render(tmp_path, values))["spec"]["template"]
        return found

    assert pod("one", restart=False) == pod("two", restart=False)
    assert pod("one", restart=True) != pod("two", restart=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"engine": "dpdk"}, "engine"),
        ({"engine": "xdp"}, "interface"),
        ({"replica": 2}, "replica"),
        ({"service": {"type": "ExternalName"}}, "service"),
        ({"config": {"engine": "xdp"}}, "config"),
        (XDP | {"podMonitor": {"enabled": True}}, "podMonitor"),
    ],
)
def test_a_wrong_value_is_refused_by_its_name(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    done = template(tmp_path, values)
    assert done.returncode != 0
    assert said in done.stderr
