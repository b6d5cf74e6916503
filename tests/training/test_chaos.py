"""Every kind of fault once upon one run (`make chaos`: hundreds); θ is that of a calm run, the ledger balanced, no
process left behind.
"""

from __future__ import annotations

import pytest

pytest.importorskip("ray")
from tests import chaos, hosts

pytestmark = pytest.mark.ray


def test_every_fault_once_changes_no_bit() -> None:
    with chaos.visited("synchronous", seed=1) as run:
        for kind in run.faults():
            run.strike(kind)
        run.end()
        print(run.check(), dict(run.done))
        assert run.done["driver killed"] == 1
    if not run.disk:
        pytest.skip("all but a full disk: mounting a small file system is not permitted")
    if not run.cluster.can_cut:
        pytest.skip(f"all but a node cut off: {hosts.why_not()}")
