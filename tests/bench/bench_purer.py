"""Where a meta-iteration of PURER goes (inversion, episodes, adversary, transport), beside the passes that it needs at
least.

A pass is one forward evaluation by torch's own layers. Inversion needs a forward pass and the derivative with respect
to the images (one pass more, weights being constant). An inner step needs a gradient (3 passes) and, on the way back, a
Hessian-vector product (6).

python tests/bench/bench_purer.py      (teachers are untrained: time does not depend on what they know)
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from cluster.fleet import wire
from cluster.fleet.messages import Assignment
from cluster.fleet.recipe import Recipe
from cluster.fleet.worker import Worker
from cluster.setup import config
from envs.images.data_free import DataFree
from learners.base import pack
from learners.engine.optimisers import Adam
from learners.models.networks import Conv4
from learners.models.resnet import ResNet
from learners.modules import normalisation
from learners.modules.functional import functional
from learners.purer.inversion import Teacher
from learners.purer.objective import DataFree as Objective
from tests.bench.timing import machine, medians, quiet

TEACHERS, WAYS, EPISODES = 8, 5, 4


def plain(module: nn.Module) -> nn.Module:
    """The same network of torch's own layers."""
    found = copy.deepcopy(module)
    for name, child in list(found.named_modules()):
        for key, layer in list(child.named_children()):
            if isinstance(layer, normalisation.BatchNorm):
                setattr(found.get_submodule(name), key, nn.BatchNorm2d(layer.running_mean.numel()))
    return found.requires_grad_(False).to(memory_format=torch.channels_last)


def bare_inversion(network: nn.Module, images: Tensor) -> None:
    x = images.detach().requires_grad_()
    torch.autograd.grad(network(x).square().sum(), x)


def run(shape: tuple[int, int, int], shots: int) -> None:
    conv4, resnet = Conv4(width=32, halving="pool", features="flat", norm_scale=True), ResNet(width=16)
    built = [(conv4, resnet)[i % 2].build(shape, WAYS) for i in range(TEACHERS)]
    teachers = []
    for network in built:
        model = functional(network)
        teachers.append(Teacher(model, model.params() | model.running(), WAYS))
    given = config.load("data-free-omniglot")
    task = replace(given.task, shots=shots, teachers=TEACHERS, teacher_ways=WAYS)  # type: ignore[type-var]
    assert isinstance(task, DataFree)
    model = functional(conv4.build(shape, WAYS))
    objective = Objective(model, "cross_entropy", teachers=tuple(teachers), per_class=task.per_class, shape=shape)
    recipe = Recipe(task, given.learner, objective, replace(given.outer, teachers=TEACHERS), seed=0, execution="loop")
    verbs, at = recipe.verbs(objective), pack(model.params(), {})
    images = torch.randn(TEACHERS, WAYS, task.per_class, *shape)
    work = {"invert": ("teachers", TEACHERS), "episodes": ("train", EPISODES), "adversary": ("adversary", 1)}
    data = {
        verb: [recipe.tensors(recipe.task(split, i, verbs[verb])) for i in range(n)]
        for verb, (split, n) in work.items()
    }
    worker = Worker(recipe, "here")
    theta, d = wire.broadcast(at), wire.broadcast({"images": images})

    def remote(verb: str) -> None:
        """What a worker and the driver do for it, messages included."""
        split, n = work[verb]
        for i in range(n):
            message = wire.encode_assignment(Assignment(i, 0, verb, 1, 2, split, i, i + 1, 1))
            wire.decode_sum(*worker.run(message, theta, d))

    def both(verb: str) -> None:
        for one in data[verb]:
            verbs[verb].run(at, {"images": images}, one)

    flat = images.flatten(0, 2)
    per_teacher = flat[: WAYS * task.per_class].to(memory_format=torch.channels_last)
    support, query = flat[: WAYS * shots], flat[: WAYS * task.queries]
    eager = [plain(network).eval() for network in built]
    trains = plain(built[0]).train()
    adam, moments = Adam(), Adam().init({"images": images})
    with torch.no_grad():
        seconds = medians({
            "inversion": lambda: both("invert"), "episodes": lambda: both("episodes"),
            "adversary": lambda: both("adversary"), "inversion, with messages": lambda: remote("invert"),
            "episodes, with messages": lambda: remote("episodes"),
            "adversary, with messages": lambda: remote("adversary"),
            "Adam on D": lambda: adam.update({"images": images}, {"images": images}, moments, 0.1),
            "broadcast of D": lambda: wire.received(wire.broadcast({"images": images}), "cpu"),
            "forward, support": lambda: trains(support), "forward, query": lambda: trains(query),
            "bare inversion": lambda: inverted(eager, per_teacher),
        }, 5)  # fmt: skip
    steps = given.learner.inner_steps  # type: ignore[attr-defined]
    episode = 9 * steps * seconds["forward, support"] + 3 * seconds["forward, query"]
    floors = {"inversion": seconds["bare inversion"], "episodes": EPISODES * episode, "adversary": episode}
    transport = sum(seconds[f"{k}, with messages"] - seconds[k] for k in floors) + seconds["broadcast of D"]
    whole = sum(seconds[f"{k}, with messages"] for k in floors) + seconds["Adam on D"] + seconds["broadcast of D"]
    print(
        f"\n{TEACHERS} teachers (Conv4-32, ResNet-10 of width 16), {WAYS}-way {shots}-shot, images {shape}, {EPISODES} "
        "episodes"
    )
    for name, floor in floors.items():
        t = seconds[name]
        print(f"  {name:12s} {1e3 * t:7.1f} ms  {t / whole:4.0%}   its passes {1e3 * floor:7.1f} ms: x {t / floor:.2f}")
    messages = f"messages of {TEACHERS + EPISODES + 1} shards, D of {images.nbytes / 2**20:.1f} MiB"
    for name, t, note in (
        ("transport", transport, messages),
        ("Adam on D", seconds["Adam on D"], ""),
        ("in all", whole, ""),
    ):
        print(f"  {name:12s} {1e3 * t:7.1f} ms  {t / whole:4.0%}   {note}")


def inverted(networks: list[nn.Module], images: Tensor) -> None:
    with torch.enable_grad():
        for network in networks:
            bare_inversion(network, images)


def main() -> None:
    quiet()
    torch.manual_seed(0)
    print(machine())
    for shape in ((1, 28, 28), (3, 32, 32)):
        for shots in (1, 5):
            run(shape, shots)


if __name__ == "__main__":
    main()
