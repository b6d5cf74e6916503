"""Give a RayCluster so many workers and wait until they are ready:  python resize.py CLUSTER WORKERS

Runs in a pod whose service account may get and patch that RayCluster; elsewhere $KUBERNETES_URL is the address of a
`kubectl proxy` and $SERVICE_ACCOUNT a folder with the files namespace and token.
"""

import os
import sys
import time
from pathlib import Path

import requests

ACCOUNT = Path(os.environ.get("SERVICE_ACCOUNT", "/var/run/secrets/kubernetes.io/serviceaccount"))
PATIENCE = 1800  # seconds: a node of a cloud takes minutes


def main(cluster: str, workers: int) -> None:
    inside = "https://{KUBERNETES_SERVICE_HOST}:{KUBERNETES_SERVICE_PORT}"
    server = os.environ.get("KUBERNETES_URL") or inside.format_map(os.environ)
    url = f"{server}/apis/ray.io/v1/namespaces/{(ACCOUNT / 'namespace').read_text()}/rayclusters/{cluster}"
    session = requests.Session()
    session.verify = str(ACCOUNT / "ca.crt")
    session.headers["Authorization"] = f"Bearer {(ACCOUNT / 'token').read_text()}"
    change = [{"op": "replace", "path": "/spec/workerGroupSpecs/0/replicas", "value": workers}]
    patch = {"Content-Type": "application/json-patch+json"}
    session.patch(url, json=change, headers=patch, timeout=30).raise_for_status()
    give_up = time.monotonic() + PATIENCE
    while time.monotonic() < give_up:
        answer = session.get(url, timeout=30)
        answer.raise_for_status()
        status = answer.json().get("status", {})
        if status.get("readyWorkerReplicas", 0) == status.get("desiredWorkerReplicas") == workers:
            return
        time.sleep(2)
    sys.exit(f"{cluster} has {status.get('readyWorkerReplicas', 0)} of {workers} workers ready after {PATIENCE} s")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
