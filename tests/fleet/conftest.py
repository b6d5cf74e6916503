"""A Ray for a file, and the run that others are held against."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cluster.fleet.pool import LocalPool
from cluster.setup import assemble
from cluster.training.identity import digest
from tests.fleet.runs import sinusoid, train


@pytest.fixture(scope="module")
def three_cpus() -> Iterator[None]:
    """A Ray of its own with room for three workers."""
    import ray

    from cluster.fleet import ray_fleet

    owned = ray_fleet.join("local", 3, 0)
    yield
    if owned:
        ray.shutdown()


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """θ of thirty meta-iterations in one process."""
    folder = tmp_path_factory.mktemp("reference")
    run = sinusoid(folder)
    parts, params = assemble.recipe(run)
    return digest(train(parts, params, LocalPool(parts), folder))
