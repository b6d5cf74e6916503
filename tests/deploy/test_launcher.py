"""deploy/ray/local.yaml as it is written: `ray up` over a real SSH server, `ray submit` of a real run, `ray down`.

All of it happens in namespaces of its own (processes, network, a home folder), so that neither `ray stop` nor the files
that the launcher writes can touch anything of the machine.
"""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.record.checkpoint import Checkpoints
from tests.commands import PATIENCE

pytest.importorskip("ray")
pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]

SCRIPT = """
set -euo pipefail
mount --make-rprivate / && mount --bind "$HOME/passwd" /etc/passwd && mount -t tmpfs none /run && mkdir -p /run/sshd
ip link set lo up
"$SSHD" -f "$HOME/sshd_config" -E "$HOME/sshd.log"
cd "$ROOT"
ray get-auth-token --generate > /dev/null
export RAY_AUTH_MODE=token
ray up -y --no-config-cache "$HOME/local.yaml"
ray submit --no-config-cache "$HOME/local.yaml" cluster/train.py -- sinusoid --address auto --workers 2 \\
  --iterations 20 --evaluation.tasks 8 --evaluation.validation-tasks 0 --execution vmap --dir runs/first
ray down -y "$HOME/local.yaml"
"""


def why_not() -> str:
    """Why there can be no SSH server of our own here; "" where there can."""
    if os.geteuid() != 0:
        return "an SSH server in namespaces of its own wants root"
    for program in ("sshd", "ssh", "ssh-keygen", "rsync", "unshare", "ip"):
        if not shutil.which(program):
            return f"{program} is not installed"
    tried = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--net", "true"], capture_output=True, text=True
    )
    return "" if tried.returncode == 0 else f"namespaces are not permitted ({tried.stderr.strip()})"


def test_a_cluster_goes_up_over_ssh_trains_a_run_and_goes_down(tmp_path: Path) -> None:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    home = tmp_path / "home"
    ssh = home / ".ssh"
    ssh.mkdir(parents=True, mode=0o700)
    for key in (ssh / "id_ed25519", ssh / "host"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
    shutil.copy(ssh / "id_ed25519.pub", ssh / "authorized_keys")
    user = pwd.getpwuid(0)
    (home / "passwd").write_text(
        f"{user.pw_name}:x:0:0::{home}:/bin/bash\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
    )
    (home / "sshd_config").write_text(
        f"Port 22\nListenAddress 127.0.0.1\nHostKey {ssh}/host\nPidFile none\nUsePAM no\nPermitRootLogin "
        "yes\nStrictModes no\n"
        "Subsystem sftp internal-sftp\n"
    )
    # What a user changes, and one thing more: the packages are there already, and ours is the copy that the launcher
    # ships.
    table = yaml.safe_load((ROOT / "deploy" / "ray" / "local.yaml").read_text())
    table["provider"] |= {"head_ip": "127.0.0.1", "worker_ips": []}
    table["auth"]["ssh_user"] = user.pw_name
    table["setup_commands"] = [c for c in table["setup_commands"] if "pip install" not in c]
    table["setup_commands"].append(
        "grep -q PYTHONPATH ~/.bashrc || sed -i '1i export PYTHONPATH=~/metafleet' ~/.bashrc"
    )
    assert len(table["setup_commands"]) == 3
    (home / "local.yaml").write_text(yaml.safe_dump(table))
    (home / ".bashrc").write_text("# a user's own\n")
    (home / "metafleet-env").symlink_to(sys.prefix)

    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHON"))}
    environment = clean | {"HOME": str(home), "ROOT": str(ROOT), "SSHD": str(shutil.which("sshd")),
                           "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # fmt: skip
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--net", "--kill-child", "bash", "-c", SCRIPT]
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
    )
    said = done.stdout + done.stderr
    log = (home / "sshd.log").read_text() if (home / "sshd.log").exists() else ""
    assert done.returncode == 0, f"{said[-6000:]}\n{log[-1000:]}"
    assert "Held-out test tasks" in said
    assert (home / "metafleet" / "cluster" / "driver.py").exists()
    state = Checkpoints(home / "runs" / "first" / "checkpoints").newest()
    assert state
    assert state.iteration == 20
    status = json.loads((home / "runs" / "first" / "status.json").read_text())
    assert (status["state"], len(status["workers"])) == ("finished", 2)
