"""Kubernetes manifests: read, checked against the schemas of Kubernetes, and what their configuration says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import yaml

from lb.config import LbConfig, load_config
from tests.files import CID_KEY, RESET_KEY, write_key

Manifest: TypeAlias = dict[str, Any]

# The oldest that the manifests and the chart are for, and the newest that the checker knows.
VERSIONS = ("1.25", str(kubernetes_validate.latest_version()))

SECRETS = {"cid-0.key": CID_KEY, "reset-0.key": RESET_KEY}


def read(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def of_kind(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def mistakes(manifest: Manifest, version: str) -> list[str]:
    """What the schema of a Kubernetes version has against it; fields that it does not know, too."""
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as error:
        return [str(error)]
    return []


def configuration(manifests: list[Manifest], directory: Path) -> LbConfig:
    """What the pod makes of its ConfigMap and of a Secret that has everything, in the places of its volume."""
    pod = workload(manifests)["spec"]["template"]["spec"]
    (config,) = (volume for volume in pod["volumes"] if volume["name"] == "config")
    for source in config["projected"]["sources"]:
        if "secret" in source:
            for item in source["secret"]["items"]:
                write_key(directory / item["path"], SECRETS[item["key"]], config["projected"]["defaultMode"])
        else:
            found = of_kind(manifests, "ConfigMap")
            assert source["configMap"]["name"] == found["metadata"]["name"]
            for name, text in found["data"].items():
                (directory / name).write_text(text)
    (container,) = pod["containers"]
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "config")
    file = Path(container["args"][container["args"].index("--config") + 1])
    return load_config(directory / file.relative_to(mount["mountPath"]))


def workload(manifests: list[Manifest]) -> Manifest:
    (found,) = (manifest for manifest in manifests if manifest["kind"] in ("Deployment", "DaemonSet"))
    return found


def has_secrets(manifests: list[Manifest]) -> bool:
    """Whether something in them looks like a key."""
    return re.search(r"\b(?:[0-9a-fA-F]{32}|[0-9a-fA-F]{64})\b", json.dumps(manifests)) is not None


def check(manifests: list[Manifest], directory: Path, engine: str) -> None:
    """What holds of the plain manifests and of the chart's alike."""
    for manifest in manifests:
        if "monitoring.coreos.com" not in manifest["apiVersion"]:
            for version in VERSIONS:
                assert mistakes(manifest, version) == []
    assert not has_secrets(manifests)

    config = configuration(manifests, directory)
    assert config.engine == engine
    assert config.metrics is not None

    found = workload(manifests)
    template = found["spec"]["template"]
    selector = found["spec"]["selector"]["matchLabels"].items()
    assert selector <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    assert container["args"][:2] == ["run", "--watch"]
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    for probe, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
        asked = container[probe]["httpGet"]
        assert asked["path"] == path
        assert ports.get(asked["port"], asked["port"]) == config.metrics.port
    context = container["securityContext"]
    assert context["readOnlyRootFilesystem"]
    assert context["capabilities"]["drop"] == ["ALL"]

    listened = {address.port for section in config.services for address in section.service.listen}
    if engine == "udp":
        _check_udp(manifests, template["spec"], context, ports, listened)
    else:
        _check_xdp(template["spec"], context)


def _check_udp(
    manifests: list[Manifest], pod: Manifest, context: Manifest, ports: dict[str, int], listened: set[int]
) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert not context["allowPrivilegeEscalation"]
    assert "add" not in context["capabilities"]
    labels = of_kind(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"].items()
    service = of_kind(manifests, "Service")["spec"]
    assert service["selector"].items() <= labels
    assert {port["protocol"] for port in service["ports"]} == {"UDP"}
    assert {ports[port["targetPort"]] for port in service["ports"]} == listened
    budget = of_kind(manifests, "PodDisruptionBudget")["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels
    stops_after = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert stops_after < pod["terminationGracePeriodSeconds"]


def _check_xdp(pod: Manifest, context: Manifest) -> None:
    assert pod["hostNetwork"]
    assert set(context["capabilities"]["add"]) == {"BPF", "NET_ADMIN", "SYS_ADMIN", "NET_BIND_SERVICE"}
    assert context["allowPrivilegeEscalation"]  # or Kubernetes refuses SYS_ADMIN
    assert "privileged" not in context
    mounts = {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    assert {"/sys/fs/bpf", "/run/quiclb"} <= mounts
    paths = {volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert paths == {"/sys/fs/bpf", "/run/quiclb"}
