"""From a configuration to the parts of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.fleet.pool import LocalPool, Pool
from cluster.fleet.recipe import Recipe
from cluster.setup import data_free
from cluster.setup.run import ObjectiveKeys, Run
from envs.images.data_free import DataFree
from learners.algorithms.linear_probe import LinearProbe
from learners.algorithms.proto_maml import ProtoMAML
from learners.algorithms.proto_net import ProtoNet
from learners.base import Objective, Params
from learners.inner import single_loss
from learners.models.networks import Gaussian
from learners.modules.functional import Functional
from learners.objectives.control import Control
from learners.objectives.recording import Rollouts
from learners.objectives.supervised import Supervised
from learners.purer.calibration import DataFreeMAML


def recipe(run: Run) -> tuple[Recipe, Params]:
    """What workers are made from, and the model's initial parameters. Execution must be resolved."""
    if run.execution == "auto":
        raise ValueError("execution='auto' must be resolved first")
    _check_attacks(run)
    network = run.network()
    if isinstance(run.task, DataFree):
        objective, params = data_free.assembled(run, run.task, network)
    else:
        objective, params = _objective(run, network), network.params()
    parts = Recipe(
        tasks=run.task, learner=run.learner, objective=objective, outer=run.outer, seed=run.seed,
        evaluation_seed=run.evaluation.seed, evaluation_steps=run.evaluation.steps,
        robustness=run.evaluation.robustness if run.evaluation.robustness.eps else None, execution=run.execution,
        chunk=run.chunk, dtype=run.dtype, device=run.device, threads=run.threads, compression=run.compression,
        gradient_checkpointing=run.gradient_checkpointing, deterministic=run.deterministic,
    )  # fmt: skip
    return parts, params


def _objective(run: Run, network: Functional) -> Objective:
    if not isinstance(run.objective, ObjectiveKeys):
        return run.objective
    if run.kind == "control":
        if not isinstance(run.task, Rollouts):
            raise TypeError(f"{type(run.task).__name__} is of kind control, but has no method rollout")
        if not isinstance(network.module, Gaussian):
            raise ValueError("RL tasks want a policy: --model.name gaussian_mlp")
        keys = run.control
        if keys.exploration and not single_loss(run.learner):
            raise ValueError(
                f"control.exploration={keys.exploration}: the outer loss of {type(run.learner).__name__} has no place "
                "for it"
            )
        return Control(network, run.task, keys.inner_loss, keys.discount, keys.gae, keys.exploration)
    return Supervised(
        network,
        loss=run.objective.loss_for(run.kind),
        measures=run.objective.measured(),
        norm=run.objective.norm,
        scale=run.objective.scale,
        report=run.evaluation.norms,
        momentum=run.objective.momentum,
    )


def _check_attacks(run: Run) -> None:
    """Raise ValueError for attacks that the tasks do not admit, and for learners that want labels where there are
    none.
    """
    eps, name = run.evaluation.robustness.eps, type(run.learner).__name__
    own = getattr(run.learner, "attack", None)
    if eps and isinstance(run.task, DataFree):
        raise ValueError(f"eps={eps}: attacks are in pixels, and the images of data-free runs are normalised")
    if run.kind == "control":
        if eps:
            raise ValueError(
                f"evaluation.robustness.eps={eps}: attacks are on the inputs of examples, and RL tasks have none"
            )
        if own is not None or isinstance(run.learner, DataFreeMAML | ProtoNet | ProtoMAML | LinearProbe):
            raise ValueError(f"{name} wants labelled examples, and RL tasks have none")
    elif run.kind == "regression":
        for key, attack in (
            ("learner.attack", own),
            ("evaluation.robustness", run.evaluation.robustness if eps else None),
        ):
            if attack and (math.isfinite(attack.low) or math.isfinite(attack.high)):
                raise ValueError(
                    f"{key} keeps inputs within [{attack.low:g}, {attack.high:g}], as pixels are; for "
                    f"{type(run.task).__name__} "
                    f"--{key}.low=-inf --{key}.high=inf wanted"
                )


@contextmanager
def pool(run: Run, parts: Recipe) -> Iterator[Pool]:
    """The pool that the run asks for, closed at the end."""
    if run.pool == "local":
        fleet: Pool = LocalPool(parts)
    else:
        from cluster.fleet.ray_pool import RayPool  # importing Ray takes its time; local runs do without

        fleet = RayPool(parts, run.workers, least=run.min_workers, cpus_per_worker=run.cpus_per_worker,
                        gpus_per_worker=run.gpus_per_worker, address=run.address, sums=run.sums,
                        limits=run.policy.deadlines, straggler=run.straggler)  # fmt: skip
    try:
        yield fleet
    finally:
        fleet.close()
