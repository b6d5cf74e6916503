"""The typed configuration of a run: TOML presets with `extends`, then `--key value`; unknown keys are errors."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tomli_w

from cluster.checkpoint import Checkpointing
from cluster.evaluate import Evaluation
from cluster.policies import Policy, Synchronous
from cluster.storage import Place, place
from cluster.tables import Table, choose, flat, from_table, merged, nearest, to_table
from cluster.wire import Compression
from envs.base import TaskFamily
from envs.sinusoid import Sinusoid
from learners.base import Learner, Outer
from learners.maml import MAML
from learners.models import MLP, ModelSpec
from learners.objectives import NormMode
from learners.outer import Descent
from learners.policy_gradient import InnerLoss
from learners.verbs import training_steps

PRESETS = Path(__file__).parent / "presets"
VARIANTS = "runs"
BUDGETS = ("passes", "env_steps")
"""Keys of a TOML file that make it a comparison of several runs, and say what each may spend."""

BEGINNING = "init_from"
"""Key of a run; in a run of a comparison it names another of its runs."""

NOTES = ("description", "reference", "extends", "environment")
"""Keys of a TOML file that say something about the run, and are not configuration."""

RESUMABLE = (
    "iterations", "workers", "min_workers", "pool", "address", "cpus_per_worker", "gpus_per_worker", "allow_mixed_fleet", "checkpoint",
    "evaluation", "sums", "prometheus_port", "policy.deadlines", "policy.max_attempts",
)  # fmt: skip
"""Keys, and tables of keys, that may change when a run goes on: the fleet, and what looks at θ without moving it."""


@dataclass(frozen=True)
class ObjectiveKeys:
    """The supervised objective; the loss follows from the task."""

    norm: NormMode = "transductive"
    """What BatchNorm's statistics are taken from when the query is predicted."""
    scale: Literal["mean", "sum_over_shots"] = "mean"
    """Mean over examples, or cbfinn's sum over examples divided by shots: inner gradients N (ways) times larger."""
    momentum: float = 0.1
    """With norm = "frozen": rate at which the carried statistics follow the tasks'."""


@dataclass(frozen=True)
class ControlKeys:
    """The policy-gradient objective of RL tasks."""

    inner_loss: InnerLoss = "log_likelihood"
    """What inner steps descend: the paper's REINFORCE form, or estimators whose curvature is better (likelihood_ratio, dice)."""
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
    """One meta-training run."""

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
    """Begin with the θ of the run in this directory (or URL); empty: with the model's initialisation."""
    iterations: int = 1000
    """Meta-iterations (outer steps)."""
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
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of parameters and data."""
    sums: Literal["driver", "fleet"] = "driver"
    """Who adds contributions up: the driver, or the nodes, by the same tree, so that about one sum per node travels to it."""
    compression: Compression = "none"
    """Contributions on the wire: as computed, or rounded to bfloat16, half the bytes."""
    straggler: float = 1.0
    """How many times as long as it needs the first worker takes (it sleeps): for scaling experiments."""
    prometheus_port: int = 0
    """Serve the metrics of the driver here; 0: nowhere."""
    allow_mixed_fleet: bool = False
    """Accept workers whose versions or processors differ: results then depend on who computed what."""

    def __post_init__(self) -> None:
        for name in ("iterations", "meta_batch", "shard", "workers", "threads"):
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
        if self.device != "cpu" and self.pool == "ray" and not self.gpus_per_worker:
            raise ValueError(
                f"device={self.device!r} with gpus_per_worker=0: on Ray a worker sees the GPUs that it reserves; a share like 0.5 will do"
            )


def load(name: str, overrides: dict[str, str] | None = None) -> Run:
    """The run of a preset's name or a TOML file's path; `overrides` are "learner.name": "reptile" and the like.

    Raises ValueError for unknown names and keys, naming the nearest known one.
    """
    table = read(name)
    if VARIANTS in table:
        raise ValueError(f"RUN={name!r} is a comparison of {len(table[VARIANTS])} runs: metafleet compare {name}")
    for path, choice in (overrides or {}).items():
        choose(table, path.split("."), choice)
    run: Run = from_table(Run, table)
    return run


def read(name: str, extending: tuple[Place, ...] = ()) -> Table:
    """The raw table of a preset or file, with what it extends merged in; a path in `extends` is relative to its file."""
    path = find(name, extending[-1].parent if extending else Path())
    if path in extending:
        raise ValueError(f"{path} extends itself, by way of {', '.join(p.name for p in extending)}")
    try:
        table = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    base = table.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{path}: extends={base!r}: a preset's name or a path wanted")
    table = merged(read(base, (*extending, path)), table) if base else table
    for note in NOTES:
        table.pop(note, None)
    return table


def comparison(name: str, overrides: Table | None = None) -> dict[str, Run]:
    """The runs of a comparison: a base with a table `[runs.NAME]` of differences for each, all at the same budget.

    `passes` is how many backward passes over a support or query set each may take in all, `env_steps` how many time steps
    of RL tasks; iterations follow, unless a run says its own. `overrides` are top-level keys for every run. Raises
    ValueError for a RUN that is no comparison.
    """
    table = read(name)
    variants, budget = table.pop(VARIANTS, None), {k: table.pop(k) for k in BUDGETS if k in table}
    allowed = next(iter(budget.values()), None)
    tables = isinstance(variants, dict) and variants and all(isinstance(v, dict) for v in variants.values())
    if not tables or len(budget) != 1 or type(allowed) is not int or allowed < 1:
        raise ValueError(f"RUN={name!r} is not a comparison: tables [{VARIANTS}.NAME] and {' or '.join(BUDGETS)} = a whole number wanted")
    runs = {}
    for variant, differences in variants.items():
        differences = {k: v for k, v in differences.items() if k != BEGINNING}
        run: Run = from_table(Run, merged(table, differences) | (overrides or {}), f"{VARIANTS}.{variant}.")
        if "iterations" not in differences:
            run = dataclasses.replace(run, iterations=max(1, allowed // spent(run, *budget)))
        runs[variant] = run
    return runs


def beginnings(name: str) -> dict[str, str]:
    """Runs of a comparison that begin from the θ of another one (`init_from` in their table), which must stand before them."""
    found: dict[str, str] = {}
    before: list[str] = []
    for variant, differences in read(name).get(VARIANTS, {}).items():
        if BEGINNING in differences:
            found[variant] = differences[BEGINNING]
            if found[variant] not in before:
                raise ValueError(f"{VARIANTS}.{variant}.{BEGINNING}={found[variant]!r}: a run that stands before it wanted")
        before.append(variant)
    return found


def spent(run: Run, what: str) -> int:
    """Passes over a support or query set ("passes"), or time steps of tasks ("env_steps"), of one meta-iteration."""
    if what == "passes":
        return run.meta_batch * run.learner.passes()
    if run.task.kind != "control":
        raise ValueError(f"env_steps: {type(run.task).__name__} has none; passes wanted")
    steps: int = run.meta_batch * (training_steps(run.learner) + 1) * run.task.rollouts * run.task.horizon  # type: ignore[attr-defined]
    return steps


def find(name: str, folder: Place = Path()) -> Place:
    """The file of a preset's name, or of a path (relative to `folder`) or URL."""
    if name.endswith(".toml"):
        path = place(name) if "://" in name else folder / name
        if not path.exists():
            raise ValueError(f"RUN={path}: no such file")
        return path
    path = PRESETS / f"{name}.toml"
    if not path.exists():
        raise ValueError(
            f"RUN={name!r} is neither a preset nor a .toml file{nearest(name, presets()) or '; `metafleet list` shows the presets'}"
        )
    return path


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(p.stem for p in PRESETS.glob("*.toml"))


def to_toml(run: Run, notes: Table | None = None) -> str:
    """The resolved run as TOML; scalars first, then tables."""
    table = to_table(run)
    scalars = {k: v for k, v in table.items() if not isinstance(v, dict)}
    return tomli_w.dumps(scalars | {k: v for k, v in table.items() if isinstance(v, dict)} | (notes or {}))


def within(key: str, tables: Iterable[str]) -> bool:
    """Whether a dotted key is one of these, or in a table that is."""
    return f"{key}.".startswith(tuple(f"{t}." for t in tables))


def check_resumable(old: Run, new: Run) -> None:
    """Raise ValueError where `new` differs from `old` in a key that the numbers depend on."""
    before, after = flat(to_table(old)), flat(to_table(new))
    for key in before | after:
        if before.get(key) != after.get(key) and not within(key, RESUMABLE):
            raise ValueError(
                f"{key} was {before.get(key)!r} when this run began and is {after.get(key)!r} now: it cannot change on resume "
                f"(only {', '.join(RESUMABLE)} can); use another directory for another run"
            )
