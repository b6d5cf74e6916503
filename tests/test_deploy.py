"""Manifests and cluster YAMLs are what Kubernetes, KubeRay and Ray's launcher take, and keep to our own rules of safety."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import config
from tests import kuberay

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(p.name for p in (DEPLOY / "kubernetes" / "overlays").iterdir())
KUBERNETES = "1.32"
RAY_KINDS = ("RayJob", "RayCluster")


def rendered(overlay: str) -> list[dict[str, Any]]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(["kubectl", "kustomize", str(DEPLOY / "kubernetes" / "overlays" / overlay)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [m for m in yaml.safe_load_all(done.stdout) if m]


def templates(manifest: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if manifest["kind"] in RAY_KINDS:
        return list(kuberay.pods(manifest))
    return [("spec.template", manifest["spec"]["template"])] if "template" in manifest.get("spec", {}) else []


def as_pods(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pod templates of a Ray kind as pods, which the core schemas know."""
    for path, template in kuberay.pods(manifest):
        metadata = {"name": re.sub(r"\W+", "-", path.lower()), **template.get("metadata", {})}
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_core_kinds_pass_the_strict_schemas(overlay: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    seen = set()
    for manifest in rendered(overlay):
        seen.add(manifest["kind"])
        core = list(as_pods(manifest)) if manifest["kind"] in RAY_KINDS else [manifest] if manifest["kind"] != "PodMonitor" else []
        for one in core:
            validate.validate(one, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "NetworkPolicy", "PersistentVolumeClaim"} < seen
    assert seen & set(RAY_KINDS)
    broken = next(m for m in rendered(overlay) if m["kind"] == "NetworkPolicy")
    broken["spec"]["ingres"] = []
    with pytest.raises(validate.ValidationError):
        validate.validate(broken, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_kinds_have_known_fields_and_pass_the_operators_rules(overlay: str) -> None:
    for manifest in rendered(overlay):
        if manifest["kind"] in RAY_KINDS:
            assert kuberay.problems(manifest) == []


@pytest.mark.parametrize(("change", "complaint"), [
    ({"spec.entrypont": "x"}, "no such field"),
    ({"spec.backoffLimit": "3"}, "int wanted"),
    ({"spec.shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished without"),
    ({"spec.submissionMode": "SidecarMode"}, "SidecarMode with submitterPodTemplate"),
    ({"spec.rayClusterSpec.rayVersion": "2.40.0"}, "token authentication"),
    ({"spec.rayClusterSpec.workerGroupSpecs.0.minReplicas": 9}, "minReplicas 9"),
    ({"metadata.name": "x" * 48}, "at most 47"),
])  # fmt: skip
def test_the_checker_can_fail(change: dict[str, Any], complaint: str) -> None:
    manifest = copy.deepcopy(next(m for m in rendered("cpu") if m["kind"] == "RayJob"))
    for path, value in change.items():
        *way, last = path.split(".")
        place: Any = manifest
        for key in way:
            place = place[int(key)] if key.isdigit() else place[key]
        place[last] = value
    assert any(complaint in problem for problem in kuberay.problems(manifest))


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_ray_kinds_pass_the_official_schemas(overlay: str) -> None:
    folder = os.environ.get("KUBERAY_CRDS")
    if not folder:
        pytest.skip("$KUBERAY_CRDS does not point to KubeRay's CRDs")
    import jsonschema

    schemas = {}
    for file in Path(folder).glob("*.yaml"):
        crd = yaml.safe_load(file.read_text())
        schemas[crd["spec"]["names"]["kind"]] = crd["spec"]["versions"][-1]["schema"]["openAPIV3Schema"]
    for manifest in rendered(overlay):
        if manifest["kind"] in RAY_KINDS:
            jsonschema.validate(json.loads(json.dumps(manifest)), schemas[manifest["kind"]])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_pod_is_root_privileged_unlimited_or_of_a_floating_image(overlay: str) -> None:
    for manifest in rendered(overlay):
        text = yaml.safe_dump(manifest)
        assert manifest["kind"] != "Secret"
        assert not re.search(r"(?i)(password|secret_?key|auth_token)\s*:", text)
        for path, template in templates(manifest):
            spec, where = template["spec"], f"{overlay}: {manifest['kind']}.{path}"
            assert spec["securityContext"]["runAsNonRoot"], where
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            head = ".headGroupSpec" in path and overlay == "autoscaling"  # whose autoscaler asks the API server for pods
            assert spec["automountServiceAccountToken"] is head, where
            assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), where
            assert not any("hostPath" in volume for volume in spec.get("volumes", [])), where
            for container in spec["containers"] + spec.get("initContainers", []):
                safety, resources = container["securityContext"], container["resources"]
                assert safety["readOnlyRootFilesystem"], where
                assert safety["allowPrivilegeEscalation"] is False, where
                assert safety["capabilities"] == {"drop": ["ALL"]}, where
                assert not safety.get("privileged"), where
                assert re.search(r":(?!latest$)[\w.-]+$", container["image"]), where
                assert {"cpu", "memory"} <= set(resources["limits"]), where
                assert (
                    resources["limits"]["memory"] == resources["requests"]["memory"]
                    or "TensorBoard" in text
                    or manifest["kind"] == "Deployment"
                )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_has_longer_to_stop_than_a_checkpoint_takes_and_its_entrypoint_is_a_run(overlay: str) -> None:
    for manifest in rendered(overlay):
        for path, template in templates(manifest):
            if "headGroupSpec" in path:
                assert template["spec"]["terminationGracePeriodSeconds"] >= 60
        if manifest["kind"] == "RayJob":
            command, verb, run, *flags = manifest["spec"]["entrypoint"].split()
            assert (command, verb) == ("metafleet", "train")
            config.load(run)
            assert flags[flags.index("--dir") + 1].startswith("/runs/")


@pytest.mark.parametrize("name", sorted(p.name for p in (DEPLOY / "ray").glob("*.yaml")))
def test_cluster_files_pass_rays_own_validator(name: str) -> None:
    util = pytest.importorskip("ray.autoscaler._private.util")
    table = yaml.safe_load((DEPLOY / "ray" / name).read_text())
    util.validate_config(util.prepare_config(copy.deepcopy(table)))
    table["setup_comands"] = []
    with pytest.raises(Exception, match="setup_comands"):
        util.validate_config(util.prepare_config(table))


def test_the_image_pins_what_it_is_made_of() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base) for base in bases)
    assert "USER 1000:1000" in lines
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert f'"{torch}"' in (DEPLOY / "Dockerfile").read_text()
    ray = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert ray.removeprefix("ray==") in (DEPLOY / "kubernetes" / "base" / "rayjob.yaml").read_text()
