"""What KubeRay 1.7 makes of a RayJob or RayCluster: the fields that we use, and rules that its operator checks beyond
the schema.

Written from its documentation and sources; official CRDs are checked where $KUBERAY_CRDS points to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

Fields = dict[str, Any]
"""Names with a type, a tuple of allowed values, nested Fields, a list of one of these, or POD or RESOURCES for core
kinds' schemas."""
POD, RESOURCES, SECURITY = "pod template", "resources", "security context"
CLUSTER: Fields = {
    "rayVersion": str, "enableInTreeAutoscaling": bool, "authOptions": {"mode": ("token", "disabled"),
    "secretName": str}, "autoscalerOptions": {
        "version": ("v1", "v2"), "idleTimeoutSeconds": int, "upscalingMode": ("Default", "Conservative", "Aggressive"),
        "image": str, "resources": RESOURCES, "securityContext": SECURITY,
    },
    "headGroupSpec": {"rayStartParams": dict, "template": POD, "serviceType": str},
    "workerGroupSpecs": [{
        "groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int, "rayStartParams": dict,
        "template": POD, "idleTimeoutSeconds": int,
    }],
}  # fmt: skip
JOB: Fields = {
    "entrypoint": str, "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "backoffLimit": int, "submitterConfig": {"backoffLimit": int}, "activeDeadlineSeconds": int,
    "preRunningDeadlineSeconds": int, "shutdownAfterJobFinishes": bool, "ttlSecondsAfterFinished": int, "suspend": bool,
    "runtimeEnvYAML": str, "submitterPodTemplate": POD, "rayClusterSpec": CLUSTER, "clusterSelector": dict,
}  # fmt: skip


def problems(manifest: dict[str, Any]) -> list[str]:
    """Everything that the API server or the operator would refuse, each with its path."""
    spec, kind = manifest.get("spec", {}), manifest["kind"]
    found = list(_fields(spec, JOB if kind == "RayJob" else CLUSTER, "spec"))
    name, longest = manifest["metadata"]["name"], 47 if kind == "RayJob" else 53
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"metadata.name={name!r}: at most {longest} characters, a DNS-1035 label")
    if found:
        return found
    cluster = spec.get("rayClusterSpec", {}) if kind == "RayJob" else spec
    return found + list(_job_rules(spec) if kind == "RayJob" else ()) + list(_cluster_rules(cluster))


def pods(manifest: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, pod template) of everything that becomes a pod."""
    for path, fields in (
        ("spec", manifest["spec"]),
        ("spec.rayClusterSpec", manifest["spec"].get("rayClusterSpec", {})),
    ):
        if "submitterPodTemplate" in fields:
            yield f"{path}.submitterPodTemplate", fields["submitterPodTemplate"]
        if "headGroupSpec" in fields:
            yield f"{path}.headGroupSpec.template", fields["headGroupSpec"]["template"]
        for i, group in enumerate(fields.get("workerGroupSpecs", [])):
            yield f"{path}.workerGroupSpecs[{i}].template", group["template"]


def _fields(value: Any, wanted: Any, path: str) -> Iterator[str]:
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            yield f"{path}={value!r}: a table wanted"
            return
        for key, inner in value.items():
            if key in wanted:
                yield from _fields(inner, wanted[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}: no such field"
    elif isinstance(wanted, list):
        for i, inner in enumerate(value):
            yield from _fields(inner, wanted[0], f"{path}[{i}]")
    elif isinstance(wanted, tuple):
        if value not in wanted:
            yield f"{path}={value!r}: one of {', '.join(wanted)} wanted"
    elif isinstance(wanted, type) and (not isinstance(value, wanted) or (wanted is int and isinstance(value, bool))):
        yield f"{path}={value!r}: {wanted.__name__} wanted"


def _job_rules(spec: dict[str, Any]) -> Iterator[str]:
    stops, mode = spec.get("shutdownAfterJobFinishes", False), spec.get("submissionMode", "K8sJobMode")
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not stops:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    if spec.get("suspend") and not stops:
        yield "suspend without shutdownAfterJobFinishes"
    if ("rayClusterSpec" in spec) == ("clusterSelector" in spec):
        yield "either rayClusterSpec or clusterSelector"
    if spec.get("backoffLimit", 0) > 0 and ("clusterSelector" in spec or mode == "InteractiveMode"):
        yield "backoffLimit with clusterSelector or InteractiveMode"
    if mode == "SidecarMode" and ("submitterPodTemplate" in spec or "submitterConfig" in spec):
        yield "SidecarMode with submitterPodTemplate or submitterConfig"
    if "submitterPodTemplate" in spec and spec["submitterPodTemplate"]["spec"].get("restartPolicy") not in (
        "Never",
        "OnFailure",
    ):
        yield "a submitter's restartPolicy is Never or OnFailure"


def _cluster_rules(spec: dict[str, Any]) -> Iterator[str]:
    version = tuple(int(n) for n in spec.get("rayVersion", "0").split("."))
    if spec.get("authOptions", {}).get("mode") == "token" and version < (2, 52):
        yield "token authentication with rayVersion unset or below 2.52"
    scales = spec.get("enableInTreeAutoscaling", False)
    for group in spec.get("workerGroupSpecs", []):
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if least is None or most is None or least > most:
            yield f"{group['groupName']}: minReplicas {least} ≤ maxReplicas {most} wanted"
        elif not least <= group.get("replicas", least) <= most:
            yield f"{group['groupName']}: replicas {group['replicas']} outside {least} … {most}"
    if scales and spec.get("autoscalerOptions", {}).get("version") == "v2":
        for path, template in pods({"spec": spec}):
            if template["spec"].get("restartPolicy", "Never") != "Never":
                yield f"{path}: autoscaler v2 wants restartPolicy Never or unset"
    if "autoscalerOptions" in spec and not scales:
        yield "autoscalerOptions without enableInTreeAutoscaling"
