"""The typed configuration of one meta-training run."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from cluster.fleet.wire import Compression
from cluster.record.checkpoint import Checkpointing
from cluster.setup import families
from cluster.setup.families import Kind
from cluster.setup.tables import nearest
from cluster.training.evaluation import Evaluation
from cluster.training.policy import Policy
from cluster.training.synchronous import Synchronous
from envs.base import TaskFamily
from envs.sinusoid import Sinusoid
from learners.algorithms.maml import MAML
from learners.base import Learner, Outer
from learners.importing import imported, is_path
from learners.models.networks import MLP, ModelSpec
from learners.modules.functional import Functional, functional
from learners.objectives.losses import LOSSES, CrossEntropy
from learners.objectives.measures import Measure
from learners.objectives.policy_gradient import InnerLoss
from learners.objectives.supervised import NormMode
from learners.outer.descent import Descent


@dataclass(frozen=True)
class ObjectiveKeys:
    """The supervised objective."""

    loss: str = "auto"
    """What is descended: mse, l1, huber, gaussian_nll (the model has a log variance beside each output), cross_entropy,
    binary_cross_entropy, or package.module:function of (output, target); auto: the cross-entropy of classes, the
    squared error of numbers."""
    measures: tuple[str, ...] = ()
    """What evaluation reports beside the loss: each package.module:function of (output, target), the first of which
    chooses the best θ; (): what goes with the loss."""
    label_smoothing: float = 0.0
    """Of the cross-entropy: this much of every target is spread over all classes."""
    class_weights: tuple[float, ...] = ()
    """Of the cross-entropy: weights of the classes' examples; (): all 1."""
    norm: NormMode = "transductive"
    """What BatchNorm's statistics are taken from when the query is predicted."""
    scale: Literal["mean", "sum_over_shots"] = "mean"
    """Mean over examples, or cbfinn's sum over examples divided by shots: inner gradients N (ways) times larger."""
    momentum: float = 0.1
    """With norm = "frozen": rate at which the carried statistics follow the tasks'."""

    def __post_init__(self) -> None:
        if self.loss not in ("auto", *LOSSES) and not is_path(self.loss):
            known = ["auto", *LOSSES]
            raise ValueError(f"loss={self.loss!r} is not one of {', '.join(known)}{nearest(self.loss, known)}")
        for name in self.measures:
            if not is_path(name):
                raise ValueError(f"measures={name!r}: package.module:function wanted")
        if (self.label_smoothing or self.class_weights) and self.loss not in ("auto", "cross_entropy"):
            raise ValueError(f"label_smoothing and class_weights are of the cross-entropy, not of loss={self.loss!r}")
        CrossEntropy(self.label_smoothing, self.class_weights)

    def loss_for(self, kind: str) -> Measure | str:
        """The loss for tasks of a kind."""
        name = self.loss if self.loss != "auto" else "mse" if kind == "regression" else "cross_entropy"
        if self.label_smoothing or self.class_weights:
            if name != "cross_entropy":
                raise ValueError("label_smoothing and class_weights are of the cross-entropy, and tasks have numbers")
            return CrossEntropy(self.label_smoothing, self.class_weights)
        loss: Measure | str = imported(name, "objective.loss") if is_path(name) else name
        return loss

    def measured(self) -> dict[str, Measure] | None:
        """The measures by name, `accuracy` for metrics:accuracy; None for those that go with the loss."""
        found = {name.rpartition(":")[2]: imported(name, "objective.measures") for name in self.measures}
        return found or None


@dataclass(frozen=True)
class ControlKeys:
    """The policy-gradient objective of RL tasks."""

    inner_loss: InnerLoss = "log_likelihood"
    """What inner steps descend: the paper's REINFORCE form, or estimators whose curvature is better (likelihood_ratio,
    dice)."""
    discount: float = 0.99
    """γ."""
    gae: float = 1.0
    """λ of generalised advantage estimation."""
    exploration: float = 0.0
    """Weight of the exploration term: what θ samples is credited with the return after adaptation (E-MAML: 1)."""

    def __post_init__(self) -> None:
        if self.exploration < 0:
            raise ValueError(f"exploration={self.exploration}: 0 or more wanted")
        if not (0 <= self.discount <= 1 and 0 <= self.gae <= 1):
            raise ValueError(f"discount={self.discount}, gae={self.gae}: numbers from 0 to 1 wanted")


@dataclass(frozen=True)
class Run:
    """One meta-training run.

    From Python `task` may be anything with `sample`, `model` a torch module (or `functional(module)`), and `objective`
    a `Supervised` of one's own.
    """

    task: TaskFamily = field(default_factory=Sinusoid)
    """What there is to learn."""
    model: ModelSpec = field(default_factory=MLP)
    """What adapts."""
    learner: Learner = field(default_factory=MAML)
    """How it adapts, and what it gives back."""
    outer: Outer = field(default_factory=Descent)
    """How θ moves."""
    objective: ObjectiveKeys = field(default_factory=ObjectiveKeys)
    """Normalisation mode and loss scale."""
    control: ControlKeys = field(default_factory=ControlKeys)
    """For RL tasks: what takes the objective's place."""
    policy: Policy = field(default_factory=Synchronous)
    """When to step, and what counts as late."""
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    """When the run saves itself."""
    evaluation: Evaluation = field(default_factory=Evaluation)
    """When and how much it evaluates."""
    seed: int = 0
    """Seed of the initial θ and of the training tasks."""
    init_from: str = ""
    """Begin with the θ of the run in this directory (or URL), or of a file .safetensors or .pt; empty: with the model's
    initialisation."""
    iterations: int = 1000
    """Meta-iterations (outer steps); 0: only evaluate."""
    meta_batch: int = 4
    """Tasks per meta-iteration; a multiple of `shard`."""
    shard: int = 1
    """Tasks that a worker takes at a time."""
    pool: Literal["ray", "local"] = "ray"
    """Where tasks run: on Ray actors, or in this process."""
    workers: int = 2
    """Ray actors, at most: those that the cluster has no room for start when it grows."""
    min_workers: int = 1
    """With fewer of them the run waits."""
    cpus_per_worker: float = 1.0
    """CPUs that each actor reserves."""
    gpus_per_worker: float = 0.0
    """GPUs that each actor reserves; fractions allowed."""
    address: str = "local"
    """Ray cluster: "local" starts one of its own (inside a Ray job: joins it), "auto" finds one, or host:port."""
    device: str = "cpu"
    """Device of the workers: cpu or cuda."""
    threads: int = 1
    """Threads per worker, torch's and numpy's."""
    execution: Literal["auto", "loop", "vmap", "compiled"] = "auto"
    """How a shard's tasks run; auto decides by rule, never by timing."""
    chunk: int = 0
    """Tasks at a time under vmap; 0: all of a shard."""
    precision: Literal["float32", "float64", "bfloat16-mixed", "bfloat16"] = "float32"
    """Of θ and data, or of what a model computes in between: products and convolutions of bfloat16 numbers, or all of
    it; θ, losses and sums are float32 then."""
    gradient_checkpointing: bool = False
    """Compute inner steps again when they are differentiated through, rather than keep them: memory of one step instead
    of all, for about half as much time again; in a loop over tasks only."""
    deterministic: Literal["on", "warn", "off"] = "on"
    """On a GPU: refuse operations whose bits differ from call to call, warn of them, or take the fastest."""
    sums: Literal["driver", "fleet"] = "driver"
    """Who adds contributions up: the driver, or the nodes, by the same tree, so that about one sum per node travels to
    it."""
    compression: Compression = "none"
    """Contributions on the wire: as computed, or rounded to bfloat16, half the bytes."""
    straggler: float = 1.0
    """How many times as long as it needs the first worker takes (it sleeps): for scaling experiments."""
    prometheus_port: int = 0
    """Serve the metrics of the driver here; 0: nowhere."""
    allow_mixed_fleet: bool = False
    """Accept workers whose versions or processors differ: results then depend on who computed what."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations={self.iterations}: 0 or more wanted")
        for name in ("meta_batch", "shard", "workers", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 wanted")
        self.policy.check(self.outer)
        if not 1 <= self.min_workers <= self.workers:
            raise ValueError(f"min_workers={self.min_workers}: a number from 1 to workers={self.workers} wanted")
        if self.meta_batch % self.shard:
            raise ValueError(f"meta_batch={self.meta_batch} is not a multiple of shard={self.shard}")
        if not 0 <= self.prometheus_port < 65536:
            raise ValueError(f"prometheus_port={self.prometheus_port}: a port from 1 to 65535, or 0, wanted")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: a number from 0 on wanted")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r}: cpu or cuda wanted")
        if self.gradient_checkpointing and self.execution not in ("auto", "loop"):
            raise ValueError(f"gradient_checkpointing with execution={self.execution!r}: it is for a loop over tasks")
        if self.device != "cpu" and self.pool == "ray" and not self.gpus_per_worker:
            raise ValueError(
                f"device={self.device!r} with gpus_per_worker=0: on Ray a worker sees the GPUs that it reserves; a "
                "share like 0.5 will do"
            )

    @property
    def kind(self) -> Kind:
        """What the tasks' targets are."""
        return families.kind(self.task)

    def build(self) -> nn.Module:
        """The model as a torch module, initialised from the run's seed; a module of Python's as it is."""
        if isinstance(self.model, Functional):
            return copy.deepcopy(self.model.module)
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            twice = isinstance(self.objective, ObjectiveKeys) and self.objective.loss == "gaussian_nll"
            return self.model.build(families.inputs(self.task), families.outputs(self.task) * (2 if twice else 1))

    def network(self) -> Functional:
        """The same as a function of its parameters."""
        if isinstance(self.model, Functional):
            return self.model
        half = self.precision if self.precision == "bfloat16" or self.precision == "bfloat16-mixed" else "full"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return functional(self.build(), torch.zeros(2, *families.inputs(self.task)), precision=half)

    @property
    def dtype(self) -> Literal["float32", "float64"]:
        """Of θ and data."""
        return "float64" if self.precision == "float64" else "float32"
