"""Right on a GPU, seen without one: every verb on devices that hold no numbers, so that nothing can look at one.

`meta` tensors have shapes and dtypes only: `float()`, `bool()`, `.item()` of one raises, and so does an operation on
tensors of two devices. (Fake CUDA tensors would be the same under the name of a GPU; but where torch is built without
CUDA, autograd ends the process at the first derivative of one.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cluster.fleet.machine import set_up_torch
from cluster.setup import assemble, config
from envs.base import ADVERSARY, HOST, TEACHERS
from learners.base import Data, Params, Share, Verb, pack
from learners.engine.derivative import transforms
from learners.engine.tree import leaves
from learners.objectives.control import Control
from learners.objectives.robustness import Robustness
from learners.outer.promp import ProMP
from learners.outer.trust_region import TrustRegion
from tests import gpu
from tests.learners.test_conformance import LEARNERS, World, world
from tests.setup.test_data_free import data_free, pool_folder

__all__ = ["pool_folder", "world"]


class OneDevice(TorchDispatchMode):
    """Inside, no operation mixes devices; products of `meta` and CPU tensors would not complain by themselves."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mixed = {v.device.type for v in leaves((args, kwargs)) if v.ndim}
        if len(mixed) > 1 and "copy" not in func.name():
            raise RuntimeError(f"{func.name()} on {' and '.join(sorted(mixed))}")
        return func(*args, **(kwargs or {}))


def shapes(share: Share) -> dict[str, tuple[Any, ...]]:
    named = {f"total/{k}": v for k, v in share.total.items()} | {f"row/{k}": v for k, v in share.row.items()}
    return {k: (tuple(v.shape), v.dtype) for k, v in (named | {"weight": share.weight}).items()}


def elsewhere(values: Params, device: str) -> Params:
    return {k: v if k.startswith(HOST) else v.to(device) for k, v in values.items()}


def on_meta(verb: Verb, at: Params, operand: Params, task: Data, stacked: bool) -> Share:
    at, operand, task = (elsewhere(part, "meta") for part in (at, operand, task))
    if not stacked:
        with OneDevice():
            return verb.run(at, operand, task)
    with transforms(), OneDevice():
        both = torch.vmap(lambda data: verb.run(at, operand, data))({k: torch.stack([v, v]) for k, v in task.items()})
    return Share(*(({k: v[0] for k, v in part.items()} if isinstance(part, dict) else part[0]) for part in both))


def check(share: Share, wanted: Share) -> None:
    assert shapes(share) == shapes(wanted)
    tensors = [*share.total.values(), *share.row.values(), share.weight]
    assert all(v.device.type != "cpu" for v in tensors)


@pytest.mark.parametrize("stacked", [False, True], ids=["loop", "vmap"])
@pytest.mark.parametrize("name", LEARNERS)
def test_every_verb_of_every_learner_is_of_tensors_only(world: World, name: str, stacked: bool) -> None:
    learner = LEARNERS[name]
    how = Robustness(0.1, steps=2, low=-torch.inf, high=torch.inf)
    recipe = replace(world.recipe(learner), robustness=how)
    here, there = recipe.verbs(world.objective), recipe.verbs(world.objective.to("meta"))
    at = pack(*world.meta(learner))
    for verb in ("gradient", "evaluate", "robustness"):
        task = recipe.tensors(recipe.task("train", 0, here[verb]))
        check(on_meta(there[verb], at, {}, task, stacked), here[verb].run(at, {}, task))


@pytest.mark.parametrize("outer", [TrustRegion(), ProMP()])
@pytest.mark.parametrize("inner_loss", ["log_likelihood", "likelihood_ratio", "dice"])
def test_verbs_of_recorded_episodes_are_of_tensors_only(outer: Any, inner_loss: Any) -> None:
    run = config.load("navigation")
    run = replace(
        run, task=replace(run.task, rollouts=2, horizon=6, test_steps=12), outer=outer, execution="loop",
        control=replace(run.control, inner_loss=inner_loss), model=replace(run.model, hidden=(6,)),
    )  # fmt: skip
    parts, params = assemble.recipe(run)
    assert isinstance(parts.objective, Control)
    here, there = parts.verbs(parts.objective), parts.verbs(parts.objective.to("meta"))
    at = pack(params, {})
    for name, verb in here.items():
        assert verb.record
        one = parts.tensors(parts.task("train", 0, verb))
        data = verb.record(at, {k: v.unsqueeze(0) for k, v in one.items()})
        task = {k: v[0] for k, v in data.items()}
        operand = {} if name in ("gradient", "evaluate") else params
        check(on_meta(there[name], at, operand, task, False), verb.run(at, operand, task))


def test_verbs_of_invented_images_are_of_tensors_only(pool_folder: Path) -> None:
    parts, params = assemble.recipe(data_free(pool_folder))
    here, there = parts.verbs(parts.objective), parts.verbs(parts.objective.to("meta"))
    at, images = pack(params, parts.objective.slots()), {"images": torch.randn(2, 3, 4, 1, 16, 16)}
    for name, split in (("invert", TEACHERS), ("episodes", "train"), ("adversary", ADVERSARY)):
        task = parts.tensors(parts.task(split, 0, here[name]))
        check(on_meta(there[name], at, images, task, False), here[name].run(at, images, task))


def test_this_device_refuses_to_be_looked_at_and_to_be_mixed() -> None:
    x = torch.ones(3, 3, device="meta")
    for look in (float, bool, Tensor.item, Tensor.tolist, lambda v: v.numpy()):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            look(x.sum())  # type: ignore[operator]
    for mix in (torch.add, torch.matmul, lambda a, b: torch.cat([a, b]), lambda a, b: torch.stack([a, b])):
        with pytest.raises(RuntimeError), OneDevice():
            mix(x, torch.ones(3, 3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", LEARNERS)
def test_a_gpu_gives_the_cpus_numbers_and_the_same_bits_twice(world: World, name: str) -> None:
    set_up_torch(1, "cuda")
    learner = LEARNERS[name]
    recipe = world.recipe(learner)
    here, there = recipe.verbs(world.objective), recipe.verbs(world.objective.to("cuda"))
    at = pack(*world.meta(learner))
    for verb in ("gradient", "evaluate"):
        task = recipe.tensors(recipe.task("train", 0, here[verb]))
        wanted = here[verb].run(at, {}, task)
        found = [there[verb].run(elsewhere(at, "cuda"), {}, elsewhere(task, "cuda")) for _ in range(2)]
        for part in ("total", "row"):
            first, second = ({k: v.cpu() for k, v in getattr(share, part).items()} for share in found)
            assert all(torch.equal(v, second[k]) for k, v in first.items())
            torch.testing.assert_close(first, dict(getattr(wanted, part)), rtol=1e-8, atol=1e-10)


def test_the_report_of_a_gpu_takes_the_place_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "RESULTS.md")
    (tmp_path / "RESULTS.md").write_text("# Results\n\n## Before\n\na\n")
    gpu.written(f"{gpu.HEADING}\n\none\n")
    with (tmp_path / "RESULTS.md").open("a") as f:
        f.write("\n## Behind\n\nb\n")
    gpu.written(f"{gpu.HEADING}\n\ntwo\n\n")
    text = (tmp_path / "RESULTS.md").read_text()
    assert text == f"# Results\n\n## Before\n\na\n\n{gpu.HEADING}\n\ntwo\n\n## Behind\n\nb\n"


@pytest.mark.parametrize(
    ("how", "enabled", "warns"), [("on", True, False), ("warn", True, True), ("off", False, False)]
)
def test_operations_without_a_deterministic_kernel_are_refused_said_or_taken(
    how: Any, enabled: bool, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cudnn.benchmark
    try:
        set_up_torch(1, "cuda", how)
        assert torch.are_deterministic_algorithms_enabled() == enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warns
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = before
