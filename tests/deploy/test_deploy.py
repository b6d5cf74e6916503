"""Manifests and cluster YAMLs are what Kubernetes, KubeRay and Ray's launcher take, and keep to our own rules of
safety.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.commands import flags, tools
from cluster.fleet.pool import LocalPool
from cluster.results.prometheus import Exporter
from cluster.setup import config
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.ledger import COUNTS
from cluster.training.synchronous import Synchronous
from tests.commands import PATIENCE
from tests.deploy import kuberay
from tests.fakes import quadratic_recipe, start

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = sorted(p.name for p in (DEPLOY / "kubernetes" / "overlays").iterdir())
KUBERNETES = "1.32"
RAY_KINDS = ("RayJob", "RayCluster")


def rendered(overlay: str) -> list[dict[str, Any]]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / "overlays" / overlay)], capture_output=True, text=True
    )
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
        core = (
            list(as_pods(manifest))
            if manifest["kind"] in RAY_KINDS
            else [manifest]
            if manifest["kind"] != "PodMonitor"
            else []
        )
        for one in core:
            validate.validate(one, KUBERNETES, strict=True)
    assert {"Deployment", "Service", "NetworkPolicy"} < seen
    assert ("PersistentVolumeClaim" in seen) != (overlay == "object-store")
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
            # An autoscaler asks the API server for pods, a scaling experiment for another number of workers; nobody
            # else asks.
            asks = manifest["kind"] == "Job" or (".headGroupSpec" in path and overlay == "autoscaling")
            assert spec["automountServiceAccountToken"] is asks, where
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
            assert flags[flags.index("--dir") + 1].startswith("s3://BUCKET/" if overlay == "object-store" else "/runs/")


def test_a_cluster_to_work_on_is_that_of_the_job() -> None:
    job = yaml.safe_load((DEPLOY / "kubernetes" / "base" / "rayjob.yaml").read_text())
    cluster = yaml.safe_load((DEPLOY / "kubernetes" / "overlays" / "interactive" / "raycluster.yaml").read_text())
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]


def test_the_scaling_jobs_command_is_one_that_we_take() -> None:
    job = next(m for m in rendered("scale") if m["kind"] == "Job")
    (script,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    line = next(line for line in script.replace("\\\n", " ").splitlines() if line.startswith("exec metafleet scale"))
    sizes, words = flags.taken(shlex.split(line)[3:], "--workers", "")
    policies, words = flags.taken(words, "--policy", "")
    _, options, run = flags.configured("scale", words, tools.ScaleOptions, "")
    cluster = next(m for m in rendered("scale") if m["kind"] == "RayCluster")["spec"]["workerGroupSpecs"][0]
    assert (
        cluster["minReplicas"]
        <= min(flags.numbers("workers", sizes))
        <= max(flags.numbers("workers", sizes))
        <= cluster["maxReplicas"]
    )
    assert (policies, run.address, options.independent) == ("sync,async", "auto", False)
    role = next(m for m in rendered("scale") if m["kind"] == "Role")
    assert role["rules"] == [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayclusters"],
            "resourceNames": ["metafleet"],
            "verbs": ["get", "patch"],
        }
    ]
    assert (
        options.resize.split()[2] == next(m for m in rendered("scale") if m["kind"] == "RayCluster")["metadata"]["name"]
    )


def test_replicas_follow_the_experiment(tmp_path: Path) -> None:
    """resize.py against an API server that grants what is asked for a little later."""
    asked: list[tuple[str, str, Any]] = []

    class Server(BaseHTTPRequestHandler):
        looks = 0

        def do_PATCH(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            self._answer({})

        def do_GET(self) -> None:
            type(self).looks += 1
            self._answer({"status": {"desiredWorkerReplicas": 4, "readyWorkerReplicas": 4 if self.looks > 1 else 2}})

        def _answer(self, content: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, *args: object) -> None:
            pass

    (tmp_path / "namespace").write_text("research")
    (tmp_path / "token").write_text("secret")
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = {"KUBERNETES_URL": f"http://127.0.0.1:{server.server_port}", "SERVICE_ACCOUNT": str(tmp_path)}
        words = [sys.executable, str(DEPLOY / "kubernetes" / "overlays" / "scale" / "resize.py"), "metafleet", "4"]
        done = subprocess.run(words, env=os.environ | here, capture_output=True, text=True, timeout=PATIENCE)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    path = "/apis/ray.io/v1/namespaces/research/rayclusters/metafleet"
    assert asked == [
        (path, "Bearer secret", [{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": 4}])
    ]
    assert Server.looks == 2


def test_every_metric_of_the_dashboard_is_exported(tmp_path: Path) -> None:
    recipe, tags = quadratic_recipe(), {}
    for policy in (Synchronous(), Asynchronous(buffer=2)):
        directory = tmp_path / type(policy).__name__
        Driver(recipe, start(), LocalPool(recipe), directory, iterations=2, meta_batch=4, shard=2, policy=policy,
               evaluation=Evaluation(validation_tasks=2, tasks=2, steps=1, pictures=0)).run()  # fmt: skip
        for line in (directory / "metrics.jsonl").read_text().splitlines():
            tags |= {k: 1.0 for k in json.loads(line) if "/" in k}
    exported = {sample.name for metric in Exporter(tags, COUNTS).collect() for sample in metric.samples}
    board = json.loads((DEPLOY / "kubernetes" / "components" / "prometheus" / "dashboard.json").read_text())
    wanted = {
        name for panel in board["panels"] for t in panel["targets"] for name in re.findall(r"metafleet_\w+", t["expr"])
    }
    assert len(wanted) > 15
    assert wanted - {"metafleet_validation_"} <= exported, wanted - exported
    assert any(name.startswith("metafleet_validation_") for name in exported)


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
