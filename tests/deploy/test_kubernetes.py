"""deploy/kubernetes: manifests that Kubernetes takes, and configurations that quiclb takes."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import VERSIONS, Manifest, check, configuration, mistakes, read, workload
from tests.deploy.units import FOR_XDP, PROJECT, UNIT, words

KUBERNETES = PROJECT / "deploy" / "kubernetes"
ENGINES = ("udp", "xdp")


def manifests(engine: str) -> list[Manifest]:
    """Of all files that the kustomization names."""
    directory = KUBERNETES / engine
    resources = yaml.safe_load((directory / "kustomization.yaml").read_text())["resources"]
    assert {directory / name for name in resources} == set(directory.glob("*.yaml")) - {
        directory / "kustomization.yaml"
    }
    return [manifest for name in resources for manifest in read((directory / name).read_text())]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_manifests_are_valid_and_fit_together(engine: str, tmp_path: Path) -> None:
    check(manifests(engine), tmp_path, engine)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_field_that_kubernetes_does_not_know_would_be_noticed(version: str) -> None:
    found = copy.deepcopy(workload(manifests("udp")))
    found["spec"]["template"]["spec"]["containers"][0]["redinessProbe"] = {}

    assert mistakes(found, version)


def test_the_daemonsets_capabilities_are_the_units() -> None:
    (container,) = workload(manifests("xdp"))["spec"]["template"]["spec"]["containers"]
    added = {f"CAP_{name}" for name in container["securityContext"]["capabilities"]["add"]}
    assert added == set(words(UNIT, FOR_XDP, of="CapabilityBoundingSet"))


def test_the_configuration_and_its_keys_change_at_the_same_moment(tmp_path: Path) -> None:
    """One volume holds both: the kubelet replaces a volume as a whole. A subPath would never be updated."""
    for engine in ENGINES:
        found = manifests(engine)
        for path in configuration(found, tmp_path).services[0].key_files.values():
            assert path.is_relative_to(tmp_path)
        (container,) = workload(found)["spec"]["template"]["spec"]["containers"]
        assert not any("subPath" in mount for mount in container["volumeMounts"])


if shutil.which("kubectl") is not None:
    # No set-up installs it: where it is not there, neither is the test.
    @pytest.mark.parametrize("engine", ENGINES)
    def test_kustomize_makes_the_same_of_them(engine: str, tmp_path: Path) -> None:
        done = subprocess.run(
            ["kubectl", "kustomize", KUBERNETES / engine],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={"HOME": str(tmp_path), "PATH": "/usr/local/bin:/usr/bin:/bin"},
        )

        def named(every: list[Manifest]) -> dict[tuple[str, str], Manifest]:
            return {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in every}

        assert named(read(done.stdout)) == named(manifests(engine))
