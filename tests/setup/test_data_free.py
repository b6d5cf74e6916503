"""Data-free runs: pools of teachers, bits on any fleet, what is read and what is refused."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.fleet import wire
from cluster.fleet.messages import Assignment
from cluster.fleet.pool import LocalPool, Pool
from cluster.operations import gradient_guard, launch, school
from cluster.record.checkpoint import Checkpoints
from cluster.setup import assemble, config, teachers
from cluster.setup.data_free import teacher_pool
from cluster.setup.resolve import resolved
from cluster.setup.run import Run
from cluster.training.aggregate import is_finite
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from envs import store
from envs.base import TEACHER, HasFiles
from envs.images.data_free import DataFree
from envs.sources.glyphs import Glyphs
from learners.algorithms.maml import MAML
from learners.base import Meta, Sum, pack
from learners.models.networks import Conv4
from learners.models.resnet import ResNet
from learners.modules.functional import functional
from learners.objectives.robustness import Robustness
from learners.outer.descent import Descent
from learners.purer.calibration import Calibration, DataFreeMAML
from learners.purer.curriculum import Switch
from learners.purer.inversion import FROZEN
from learners.purer.objective import episode
from learners.purer.outer import Purer
from learners.purer.schooling import Schooling

pytestmark = pytest.mark.kernels

SMALL = Conv4(width=4, halving="pool", features="flat", norm_scale=True)


@pytest.fixture(scope="module")
def pool_folder(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Path:
    """Two teachers of two architectures, quickly taught."""
    run = replace(config.load("glyphs"), pool="local")
    run = replace(run, task=replace(run.task, source=Glyphs(characters=60, size=16)))
    folder = tmp_path_factory.mktemp("pool")
    plan = school.Plan(2, 3, architectures=(SMALL, ResNet(10, 4)), schooling=Schooling(epochs=15))
    found = school.train(run, plan, folder)
    assert [name for name, _ in found] == ["conv4", "resnet"]
    assert found[0][1] > 0.6
    return folder


def data_free(folder: Path, **changes) -> Run:
    run = config.load("data-free-glyphs")
    task = replace(
        run.task, source=Glyphs(characters=60, size=16), pools=(str(folder),), ways=3, queries=3, test_queries=3
    )
    outer = Purer(switch=Switch(warmup=1, patience=1))
    learner = DataFreeMAML(0.1, 2, calibration=Calibration(inversion_steps=2, steps=1))
    run = replace(
        run, task=task, model=SMALL, outer=outer, learner=learner, pool="local", meta_batch=2, shard=1, **changes
    )
    run.task.prepare()
    return resolved(run)[0]


def trained(run: Run, directory: Path, pool: Pool | None = None, iterations: int = 6, hook=lambda d: None) -> Driver:
    parts, params = assemble.recipe(run)
    holder: list[Driver] = []

    def look() -> bool:
        return bool(hook(holder[0]))

    driver = Driver(parts, params, pool or LocalPool(parts), directory, iterations=iterations, meta_batch=2, shard=1,
                    interrupted=look, evaluation=Evaluation(every=3, validation_tasks=2, tasks=2, steps=1,
                    pictures=0))  # fmt: skip
    holder.append(driver)
    driver.run()
    return driver


def bits(driver: Driver) -> tuple[str, str]:
    """Of θ and of D with its moments."""
    return digest(driver.meta), digest(Meta({k: v.double() for k, v in driver.state.items()}, {}))


def test_teachers_are_written_read_back_and_checked(pool_folder: Path, tmp_path: Path) -> None:
    pool = teachers.load(pool_folder)
    assert pool.ways == 3
    assert pool.shape == (1, 16, 16)
    assert pool.specs == (SMALL, ResNet(10, 4))
    lessons = school.Lessons(Glyphs(characters=60, size=16), 2, 3)
    assert isinstance(lessons, HasFiles)  # nodes without the images are sent them
    mean, std = lessons.statistics()
    lessons = replace(lessons, mean=mean, std=std)
    lesson = lessons.fixed("teachers", 0)
    x, y = torch.from_numpy(lesson["held_x"]), torch.from_numpy(lesson["held_y"])
    right = (pool.teachers[0].model(pool.teachers[0].params, x, FROZEN).argmax(1) == y).double().mean()
    assert right.item() == pytest.approx(pool.accuracy[0])
    both = np.concatenate([lessons.fixed("teachers", i)["x"] for i in range(2)])
    assert abs(both.mean()) < 1e-5
    assert both.std() == pytest.approx(1, abs=1e-4)
    first, second = lessons.classes()
    assert not set(first) & set(second)
    damaged = tmp_path / "pool"
    damaged.mkdir()
    for file in pool_folder.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    content = bytearray((damaged / "000.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "000.safetensors").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="its checksum differs"):
        teachers.load(damaged)


def test_anyones_models_are_imported_without_unpickling_anything(pool_folder: Path, tmp_path: Path) -> None:
    model = SMALL.build((1, 16, 16), 3)
    state = dict(model.state_dict())
    torch.save(state, tmp_path / "mine.pt")
    description = """shape = [1, 16, 16]
ways = 3
mean = [0.5]
std = [0.2]
[[teacher]]
file = "mine.pt"
architecture = { name = "conv4", width = 4, halving = "pool", features = "flat", norm_scale = true }
"""
    (tmp_path / "mine.toml").write_text(description)
    assert teachers.imported(tmp_path / "mine.toml", tmp_path / "pool") == ["conv4"]
    x = torch.randn(4, 1, 16, 16)
    (teacher,) = teachers.load(tmp_path / "pool").teachers
    torch.testing.assert_close(teacher.model(teacher.params, x, FROZEN), functional(model)(dict(state), x, FROZEN))
    # The same network as most people write it: convolutions with biases, which running means contain.
    biased = {f"block{i}.conv.bias": torch.randn(4) for i in range(4)}
    moved = {k.replace("conv.bias", "norm.running_mean"): v for k, v in biased.items()}
    torch.save({k: v + moved.get(k, 0) for k, v in state.items()} | biased, tmp_path / "mine.pt")
    teachers.imported(tmp_path / "mine.toml", tmp_path / "biased")
    (same,) = teachers.load(tmp_path / "biased").teachers
    torch.testing.assert_close(same.model(same.params, x, FROZEN), functional(model)(dict(state), x, FROZEN))
    torch.save(
        state | {"block1.extra": torch.zeros(3), "block1.norm.num_batches_tracked": torch.tensor(7)},
        tmp_path / "mine.pt",
    )
    with pytest.raises(
        ValueError, match=r"has block1\.extra, for which the architecture, as it is described, has no place"
    ):
        teachers.imported(tmp_path / "mine.toml", tmp_path / "other")
    with pytest.raises(ValueError, match="do not mix"):
        teachers.together([teachers.load(pool_folder), replace(teachers.load(tmp_path / "pool"), shape=(1, 28, 28))])

    torch.save({"model": print}, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        teachers.imported(tmp_path / "mine.toml", tmp_path / "other")
    torch.save({k: v for k, v in state.items() if "running_var" not in k}, tmp_path / "mine.pt")
    with pytest.raises(ValueError, match="has no block0.norm.running_var"):
        teachers.imported(tmp_path / "mine.toml", tmp_path / "other")
    (tmp_path / "mine.toml").write_text(
        description.replace('"conv4", width = 4, halving = "pool", features = "flat", norm_scale = true', '"mlp"')
    )
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        teachers.imported(tmp_path / "mine.toml", tmp_path / "other")


def test_beginnings(pool_folder: Path, tmp_path: Path) -> None:
    pool = teachers.load(pool_folder)
    own = functional(SMALL.build((1, 16, 16), 3)).params()
    first = pool.teachers[0]
    thrice = replace(first, params={k: 3 * v for k, v in first.params.items()})
    two = replace(pool, teachers=(first, thrice), specs=(SMALL, SMALL), accuracy=(0.9, 0.5))
    average = teachers.beginning(two, SMALL, own, "average")
    torch.testing.assert_close(average["head.weight"], 2 * pool.teachers[0].params["head.weight"])
    best = teachers.beginning(two, SMALL, own, "best")
    assert torch.equal(best["block0.conv.weight"], pool.teachers[0].params["block0.conv.weight"])
    assert torch.equal(best["head.weight"], own["head.weight"])
    unmeasured = replace(two, accuracy=(math.nan, 0.5))
    chosen = teachers.beginning(unmeasured, SMALL, own, "best")
    assert torch.equal(chosen["block0.conv.weight"], thrice.params["block0.conv.weight"])
    other = replace(pool, mean=(0.1,), std=(0.4,))
    moved = teachers.together([replace(pool, mean=(0.3,), std=(0.2,)), other]).teachers[2]
    assert (moved.scale[0] * 1.5 + moved.offset[0]) == pytest.approx((1.5 * 0.2 + 0.3 - 0.1) / 0.4)
    with pytest.raises(ValueError, match="no teacher has the model's architecture"):
        teachers.beginning(pool, Conv4(), own, "average")


# --- runs
# ---------------------------------------------------------------------------------------------------------------


class Reducing:
    """A `reduce` over a recipe's tasks, here and now, that remembers what it returned."""

    def __init__(self, run: Run, meta: Meta) -> None:
        self.parts, self.meta, self.seen = assemble.recipe(run)[0], meta, {}
        self.verbs = run.outer.verbs(run.learner, self.parts.objective)

    def __call__(self, verb, operand, *, over=None) -> Sum:
        split, n = over or ("train", 2)
        shares = []
        for i in range(n):
            data = self.parts.tensors(self.parts.task(split, i, self.verbs[verb]))
            shares.append(self.verbs[verb].run(pack(*self.meta), operand or {}, data))
        total = {k: sum(s.total[k] for s in shares) for k in shares[0].total}
        self.seen[verb] = {k: torch.stack([s.row[k] for s in shares]) for k in shares[0].row}
        return Sum(total, sum(float(s.weight) for s in shares), dict(self.seen[verb]))


def test_a_step_moves_images_by_adam_and_against_the_learner_where_the_switch_fired(pool_folder: Path) -> None:
    """D′ = Adam(D, g − λ·scatter(∇ L_outer)), written down again; the first step's noise is standard normal."""
    run = data_free(pool_folder)
    outer, (_, params) = run.outer, assemble.recipe(run)
    assert isinstance(outer, Purer)
    meta = Meta(params, {})
    reduce = Reducing(run, meta)
    _, state, metrics = outer.step(meta, outer.init(meta), reduce)
    noise, gradient = reduce.seen["noise"]["carry/images"], reduce.seen["invert"]["carry/gradient"]
    assert state["images"].shape == (2, 3, 4, 1, 16, 16)
    torch.testing.assert_close(state["images"], noise - 0.25 * gradient / (gradient.abs() + 1e-8), rtol=1e-5, atol=1e-5)
    assert abs(noise.mean()) < 0.1
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert metrics["purer/fired"] == 0
    assert set(outer.shown(state)) == {"teacher_0", "teacher_1"}

    state["on"] = torch.ones((), dtype=torch.float64)
    _, after, metrics = outer.step(meta, state, reduce)
    assert metrics["purer/fired"] == 1
    second, hard = reduce.seen["invert"]["carry/gradient"], reduce.seen["adversary"]
    assert torch.equal(hard["carry/which"][0].sort().values, hard["carry/which"][0].unique())
    assert len(hard["carry/which"][0]) == 3 * 4
    for row, g in zip(hard["carry/which"][0], hard["carry/gradient"][0], strict=True):
        second.view(-1, 1, 16, 16)[row] -= 10.0 * g
    m = (0.9 * 0.1 * gradient + 0.1 * second) / (1 - 0.9**2)
    v = (0.999 * 0.001 * gradient**2 + 0.001 * second**2) / (1 - 0.999**2)
    torch.testing.assert_close(after["images"], state["images"] - 0.25 * m / (v.sqrt() + 1e-8), rtol=1e-4, atol=1e-4)


def test_images_belong_to_the_run_and_not_to_its_evaluation(pool_folder: Path) -> None:
    run = data_free(pool_folder)

    def noise(changed: Run) -> torch.Tensor:
        return Reducing(changed, Meta(assemble.recipe(changed)[1], {}))("noise", None, over=("teachers", 2)).rows[
            "carry/images"
        ]

    same = replace(run, evaluation=replace(run.evaluation, seed=7))
    assert torch.equal(noise(run), noise(same))
    assert not torch.equal(noise(run), noise(replace(run, seed=1)))


def test_gradients_of_images_that_are_not_finite_are_seen() -> None:
    a = Assignment(0, 0, "invert", 0, None, "teachers", 0, 1, 0)
    for value, wanted in ((1.0, True), (float("nan"), False)):
        rows = {"carry/gradient": torch.full((1, 2), value), "inversion_loss": torch.full((1,), float("nan"))}
        assert is_finite(wire.decode_sum(*wire.encode_sum(a, "w", 0.0, Sum({}, 1.0, rows)))) is wanted


@pytest.mark.ray
def test_theta_and_images_are_the_same_on_any_fleet_and_after_a_kill(pool_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from cluster.fleet.ray_pool import RayPool

    run = data_free(pool_folder)
    wanted = bits(trained(run, tmp_path / "local"))
    # the adversary's round too, after the kill
    assert any(line["purer/fired"] for line in _train(tmp_path / "local")[3:])
    killed: list[int] = []

    def kill(driver: Driver) -> bool:
        if not killed and driver.iteration == 3 and driver.roster.workers:
            killed.append(int(next(iter(driver.roster.workers.values())).rpartition(":")[2]))
            os.kill(killed[0], signal.SIGKILL)
        return False

    parts, _ = assemble.recipe(run)
    for workers, hook in ((1, lambda d: False), (3, kill)):
        pool = RayPool(parts, workers)
        assert bits(trained(run, tmp_path / f"ray-{workers}", pool, hook=hook)) == wanted
        pool.close()
    assert killed


def test_a_stopped_run_goes_on_to_the_same_bits(pool_folder: Path, tmp_path: Path) -> None:
    run = data_free(pool_folder)
    wanted = bits(trained(run, tmp_path / "whole"))
    assert any(line["purer/fired"] for line in _train(tmp_path / "whole")[4:])
    with pytest.raises(KeyboardInterrupt):
        trained(run, tmp_path / "halves", hook=lambda d: d.iteration == 4)
    resumed = Checkpoints(tmp_path / "halves" / "checkpoints").newest()
    assert resumed
    assert "images" in resumed.outer
    assert bits(trained(run, tmp_path / "halves")) == wanted


def test_the_command_that_began_a_run_goes_on_with_it(pool_folder: Path, tmp_path: Path) -> None:
    run = data_free(pool_folder)
    # as a preset has it: what the teachers say is not known yet
    asked = replace(run.task, teachers=0, teacher_ways=0, mean=(), std=())
    few = Evaluation(every=3, validation_tasks=2, tasks=2, steps=1, pictures=0)
    run = replace(run, task=asked, outer=replace(run.outer, teachers=0), evaluation=few, execution="auto")
    for iterations in (2, 3):
        launch.train(replace(run, iterations=iterations), tmp_path / "r")
        assert Checkpoints(tmp_path / "r" / "checkpoints").newest().iteration == iterations


@dataclass(frozen=True)
class NoTraining(Glyphs):
    """Glyphs whose training characters are gone."""

    def load(self):
        images = super().load()
        hidden = {k: v for k, v in images.index.splits.items() if k != "train"}
        first = images.index.starts[min(hidden["validation"])]
        pixels = np.array(images.images)
        pixels[:first] = 0  # and no pixel of theirs is left
        return store.ImageSet(pixels, replace(images.index, splits=hidden))


def test_no_training_image_is_read(pool_folder: Path, tmp_path: Path) -> None:
    run = data_free(pool_folder)
    hidden = replace(run, task=replace(run.task, source=NoTraining(characters=60, size=16)))
    hidden.task.prepare()
    with pytest.raises(KeyError):
        hidden.task.source.load().classes("train")
    assert digest(trained(hidden, tmp_path / "hidden").meta) == digest(trained(run, tmp_path / "open").meta)


@dataclass(frozen=True)
class ValidatedOnTraining(Glyphs):
    """Glyphs without validation characters, as Omniglot's in MAML's protocol."""

    def load(self):
        images = super().load()
        return store.ImageSet(
            images.images, replace(images.index, splits=images.index.splits | {"validation": images.classes("train")})
        )


def test_validation_on_training_classes_is_refused(pool_folder: Path) -> None:
    task = data_free(pool_folder).task
    with pytest.raises(
        ValueError, match="36 held-out classes are training classes, of which a data-free run reads no image"
    ):
        replace(task, source=ValidatedOnTraining(characters=60, size=16)).prepare()


def test_omniglots_preset_sets_validation_characters_apart() -> None:
    source = config.load("data-free-omniglot").task.source
    splits = [set(characters) for characters in source._splits(1623).values()]
    assert [len(s) for s in splits] == [1200, 100, 323]
    assert len(set.union(*splits)) == 1623


def test_two_data_sets_and_two_architectures_in_one_pool_train(pool_folder: Path, tmp_path: Path) -> None:
    # Characters of another hand: another mean, another deviation.
    run = replace(config.load("glyphs"), pool="local")
    run = replace(run, task=replace(run.task, source=Glyphs(characters=40, size=16, seed=5, wobble=0.2)))
    school.train(
        run, school.Plan(2, 3, architectures=(ResNet(10, 4), SMALL), schooling=Schooling(epochs=5)), tmp_path / "other"
    )
    both = data_free(pool_folder)
    pools = (str(pool_folder), str(tmp_path / "other"))
    both = replace(both, task=replace(both.task, pools=pools, teachers=0, teacher_ways=0, mean=(), std=()))
    both = resolved(both)[0]
    pool = teacher_pool(both.task)  # type: ignore[arg-type]
    assert [type(s).__name__ for s in pool.specs] == ["Conv4", "ResNet", "ResNet", "Conv4"]
    assert [bool(t.scale) for t in pool.teachers] == [False, False, True, True]
    driver = trained(both, tmp_path / "run", iterations=12)
    images, lines = driver.state["images"], _train(tmp_path / "run")
    assert images.shape[:2] == (4, 3)
    assert torch.isfinite(images).all()
    assert lines[-1]["purer/inversion_loss"] < lines[0]["purer/inversion_loss"]
    assert {line["fleet/rejected"] for line in lines} == {0.0}


def _train(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_each_slice_of_d_is_inverted_from_its_teacher_towards_its_classes(pool_folder: Path) -> None:
    run = data_free(pool_folder)
    parts, params = assemble.recipe(run)
    images = torch.randn(2, 3, 4, 1, 16, 16)
    verb = parts.verbs(parts.objective)["invert"]
    for i, teacher in enumerate(teachers.load(pool_folder).teachers):
        share = verb.run(
            pack(params, {}), {"images": images}, {TEACHER: torch.tensor(i), "shift": torch.tensor([0, 0])}
        )
        logits = torch.stack([teacher.model(teacher.params, images[i, c], FROZEN) for c in range(3)])
        wanted = -torch.stack([logits[c].log_softmax(1)[:, c].mean() for c in range(3)]).mean()
        assert share.row["inversion_classification"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_a_label_of_a_pseudo_episode_is_one_class_of_one_teacher(pool_folder: Path) -> None:
    task = data_free(pool_folder).task
    marked = (
        torch.arange(6.0)[:, None, None, None, None]
        .expand(6, task.per_class, 1, 16, 16)
        .reshape(2, 3, task.per_class, 1, 16, 16)
    )
    for seed in range(10):
        rows = {k: torch.from_numpy(v) for k, v in task.sample("train", np.random.default_rng(seed)).items()}
        drawn = episode(marked, rows)
        seen = [
            {float(x.flatten()[0]) for p in ("support", "query") for x in drawn[f"{p}_x"][drawn[f"{p}_y"] == c]}
            for c in range(3)
        ]
        assert [len(s) for s in seen] == [1, 1, 1]
        assert len(set.union(*seen)) == 3
        assert len({int(r) for k in ("support_rows", "query_rows") for r in rows[k].flatten()}) == 3 * task.per_class


def test_a_class_that_two_teachers_know_is_once_in_an_episode(pool_folder: Path) -> None:
    twice = data_free(pool_folder)
    twice = replace(twice, task=replace(twice.task, pools=(str(pool_folder), str(pool_folder)), ways=6))
    task = resolved(twice)[0].task
    assert task.kinds == (0, 1, 2, 3, 4, 5) * 2
    met = set()
    for seed in range(20):
        classes = task.sample("train", np.random.default_rng(seed))["support_rows"][:, 0] // task.per_class
        assert sorted(classes % 6) == [0, 1, 2, 3, 4, 5]
        met |= set(classes.tolist())
    assert met == set(range(12))


def test_a_picture_of_normalised_images_shows_the_files_pixels(pool_folder: Path) -> None:
    task = data_free(pool_folder).task
    assert isinstance(task, DataFree)
    assert task.mean
    drawn = task.sample("test", np.random.default_rng(1))
    figure = task.picture([drawn], [lambda x: np.zeros((1, len(x), 3))], [0])
    first = np.asarray(figure.subfigs[0].axes[0].images[0].get_array())
    wanted = replace(task, mean=(), std=()).sample("test", np.random.default_rng(1))["support_x"][0, 0]
    np.testing.assert_allclose(first, wanted, atol=1e-6)
    assert not np.allclose(drawn["support_x"][0, 0], wanted, atol=0.1)


def test_impossible_data_free_runs_are_refused(pool_folder: Path) -> None:
    run = data_free(pool_folder)
    with pytest.raises(ValueError, match="task.pools is empty"):
        assemble.recipe(replace(run, task=replace(run.task, pools=())))
    with pytest.raises(FileNotFoundError, match="metafleet teachers"):
        assemble.recipe(replace(run, task=replace(run.task, pools=("nowhere",))))
    with pytest.raises(ValueError, match="run in a loop"):
        assemble.recipe(replace(run, execution="vmap"))
    with pytest.raises(ValueError, match=r"the teachers take images of shape \(1, 16, 16\)"):
        assemble.recipe(replace(run, task=replace(run.task, source=Glyphs(size=28))))
    with pytest.raises(ValueError, match="ways=7 exceeds the 6 classes that the teachers know"):
        assemble.recipe(replace(run, task=replace(run.task, ways=7)))
    with pytest.raises(ValueError, match=r"PURER \(--outer.name purer\), not Descent"):
        assemble.recipe(replace(run, outer=Descent()))
    attacked = replace(run.evaluation, robustness=Robustness(eps=0.1))
    with pytest.raises(ValueError, match="eps=0.1: attacks are in pixels"):
        assemble.recipe(replace(run, evaluation=attacked))
    with pytest.raises(ValueError, match="teachers are float32"):
        assemble.recipe(replace(run, precision="float64"))
    with pytest.raises(ValueError, match="check wants tasks with data"):
        gradient_guard.check(run)
    with pytest.raises(ValueError, match="wants a data-free task"):
        Purer().verbs(MAML(), assemble.recipe(replace(config.load("glyphs"), execution="loop"))[0].objective)
