"""The same bits on any fleet: Ray workers in any number, killed, frozen; the driver killed and resumed elsewhere."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cluster.fleet.deadlines import Deadlines
from cluster.fleet.pool import LocalPool
from cluster.operations.replay import replay, steps
from cluster.record import journal
from cluster.record.checkpoint import Checkpoints
from cluster.setup import assemble, config
from cluster.setup.run import Run
from cluster.training.asynchronous import Asynchronous
from cluster.training.driver import Driver
from cluster.training.evaluation import Evaluation
from cluster.training.identity import digest
from cluster.training.ledger import ENDS
from learners.base import Meta
from learners.outer.descent import Descent
from tests.commands import PATIENCE
from tests.fakes import Newton, Noisy, quadratic_recipe, start

ray = pytest.importorskip("ray")
from cluster.fleet.ray_pool import RayPool, _Actor  # noqa: E402 - only where Ray is installed

pytestmark = pytest.mark.ray
FEW = Evaluation(every=10, validation_tasks=8, tasks=8, steps=2, pictures=0)


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
    from cluster.fleet import ray_fleet

    owned = ray_fleet.join("local", 3, 0)
    yield
    if owned:
        ray.shutdown()


def sinusoid(tmp_path: Path) -> Run:
    run = config.load("sinusoid")
    return replace(run, iterations=30, meta_batch=16, shard=4, execution="vmap")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """θ of thirty meta-iterations in one process."""
    folder = tmp_path_factory.mktemp("reference")
    run = sinusoid(folder)
    parts, params = assemble.recipe(run)
    return digest(train(parts, params, LocalPool(parts), folder))


def train(parts, params, pool, directory: Path, hook: Callable[[Driver], None] = lambda d: None, **options) -> Meta:
    holder: list[Driver] = []

    def look() -> bool:
        hook(holder[0])
        return False

    driver = Driver(
        parts,
        params,
        pool,
        directory,
        iterations=30,
        meta_batch=16,
        shard=4,
        evaluation=FEW,
        interrupted=look,
        **options,
    )
    holder.append(driver)
    try:
        return driver.run()
    finally:
        pool.close()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_bits_of_one_process(tmp_path: Path, reference: str, workers: int) -> None:
    parts, params = assemble.recipe(sinusoid(tmp_path))
    assert digest(train(parts, params, RayPool(parts, workers), tmp_path)) == reference


def joined(directory: Path) -> list[int]:
    """Process ids of workers in the order they joined."""
    events = [r["event"] for r in journal.read(directory / "journal") if r["kind"] == "fleet"]
    return [int(e["where"].rpartition(":")[2]) for e in events if e["kind"] == "joined"]


def striking(directory: Path, number: int) -> tuple[list[int], Callable[[Driver], None]]:
    """(who was struck, a hook that sends this signal to the first worker, once, from iteration 5 on)."""
    struck: list[int] = []

    def strike(driver: Driver) -> None:
        if not struck and driver.iteration >= 5:
            struck.append(joined(directory)[0])
            os.kill(struck[0], number)

    return struck, strike


def test_killing_workers_twice_changes_nothing(tmp_path: Path, reference: str) -> None:
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        alive = [p for p in joined(tmp_path) if p not in killed]
        if len(killed) < 2 and driver.iteration >= 5 + 10 * len(killed) and alive:
            killed.append(alive[0])
            os.kill(alive[0], signal.SIGKILL)

    parts, params = assemble.recipe(sinusoid(tmp_path))
    assert digest(train(parts, params, RayPool(parts, 2), tmp_path, kill)) == reference
    assert len(killed) == 2
    assert len(joined(tmp_path)) >= 3


class Sick(_Actor):
    """Cannot start where the third worker does."""

    def hello(self):
        if self._name == "worker-3":
            raise OSError(28, "No space left on device")
        return super().hello()


class SickPool(RayPool):
    actor = Sick


def test_a_newcomer_that_cannot_start_costs_the_run_nothing(
    tmp_path: Path, reference: str, caplog: pytest.LogCaptureFixture
) -> None:
    parts, params = assemble.recipe(sinusoid(tmp_path))
    _, kill = striking(tmp_path, signal.SIGKILL)
    assert digest(train(parts, params, SickPool(parts, 2, least=2), tmp_path, kill)) == reference
    assert "could not start" in caplog.text
    assert "No space left on device" in caplog.text


def test_a_frozen_worker_is_replaced_after_its_deadline(tmp_path: Path, reference: str) -> None:
    frozen, freeze = striking(tmp_path, signal.SIGSTOP)
    parts, params = assemble.recipe(sinusoid(tmp_path))
    limits = Deadlines(floor=1.0, factor=5.0, first=30.0)
    began = time.monotonic()
    assert digest(train(parts, params, RayPool(parts, 2, limits=limits), tmp_path, freeze)) == reference
    assert frozen
    assert time.monotonic() - began < 40
    assert Checkpoints(tmp_path / "checkpoints").newest().counts["retried"] >= 1
    assert gone(frozen[0], 15), "the frozen process is still there"


def navigation() -> Run:
    run = config.load("navigation")
    task = replace(run.task, rollouts=3, horizon=15, test_steps=30)
    return replace(run, task=task, execution="loop", meta_batch=6, shard=2, model=replace(run.model, hidden=(8,)))


def train_control(pool_of: Callable, directory: Path, hook: Callable[[Driver], None] = lambda d: None) -> str:
    """Three iterations of TRPO on navigation: gradient, curvature products, line search, on the same recorded
    episodes.
    """
    run, holder = navigation(), []
    parts, params = assemble.recipe(run)
    pool = pool_of(parts)

    def look() -> bool:
        hook(holder[0])
        return False

    driver = Driver(parts, params, pool, directory, iterations=3, meta_batch=6, shard=2, interrupted=look,
                    evaluation=Evaluation(validation_tasks=0, tasks=2, steps=1, pictures=0))  # fmt: skip
    holder.append(driver)
    try:
        return digest(driver.run())
    finally:
        pool.close()


def test_a_worker_lost_inside_conjugate_gradient_costs_its_episodes_and_no_bit(tmp_path: Path) -> None:
    wanted = train_control(LocalPool, tmp_path / "local")
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        solving = any(a.verb == "curvature" for a in driver.ledger.open.values())
        if not killed and driver.iteration >= 1 and solving:
            killed.append(joined(tmp_path / "killed")[0])
            os.kill(killed[0], signal.SIGKILL)

    assert train_control(lambda parts: RayPool(parts, 1), tmp_path / "one") == wanted
    assert train_control(lambda parts: RayPool(parts, 3), tmp_path / "killed", kill) == wanted
    assert killed


def test_asynchronous_with_one_batch_in_flight_is_the_synchronous_run(tmp_path: Path, reference: str) -> None:
    parts, params = assemble.recipe(sinusoid(tmp_path))
    policy = Asynchronous(buffer=4, in_flight=4)
    assert digest(train(parts, params, RayPool(parts, 3), tmp_path, policy=policy)) == reference


def test_an_asynchronous_run_with_a_worker_killed_is_balanced_and_replays_to_the_same_bits(tmp_path: Path) -> None:
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        if not killed and driver.iteration >= 8 and len(joined(tmp_path)) == 3:
            killed.append(joined(tmp_path)[1])
            os.kill(killed[0], signal.SIGKILL)

    parts, params = assemble.recipe(sinusoid(tmp_path))
    policy = Asynchronous(buffer=2, compensation=0.05)
    meta = train(parts, params, RayPool(parts, 3), tmp_path, kill, policy=policy)
    assert killed
    found = steps(tmp_path / "journal")
    assert any(s for step in found for s in step.staleness)
    *_, (version, again) = replay(parts, params, policy, found)
    assert version == 30
    assert digest(again) == digest(meta)
    counts = Checkpoints(tmp_path / "checkpoints").newest().counts
    assert counts["dispatched"] == sum(counts[k] for k in ENDS)
    assert counts["retried"] >= 1
    shards = [first for step in found for _, first, _ in step.shards]
    assert len(shards) == len(set(shards)) == 60


def gone(pid: int, seconds: float) -> bool:
    """Whether a process ends (or is a zombie) within some time."""
    for _ in range(int(seconds * 10)):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_several_rounds_with_operands_give_the_same_bits_on_ray(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Newton(rounds=2), learner=Noisy())
    bits = []
    for name, pool in (("local", LocalPool(recipe)), ("ray", RayPool(recipe, 2))):
        try:
            driver = Driver(recipe, start(), pool, tmp_path / name, iterations=4, meta_batch=8, shard=2, evaluation=FEW)
            bits.append(digest(driver.run()))
        finally:
            pool.close()
    assert bits[0] == bits[1]


def test_a_killed_driver_resumes_on_another_number_of_workers(tmp_path: Path) -> None:
    few = "--iterations 120 --meta-batch 16 --shard 4 --evaluation.pictures 0 "
    few += "--evaluation.tasks 8 --evaluation.validation-tasks 8"
    whole = [sys.executable, "-m", "cluster.cli", "train", "sinusoid", *few.split(), "--checkpoint.seconds", "0"]
    subprocess.run(
        [*whole, "--pool", "local", "--dir", str(tmp_path / "whole")], check=True, capture_output=True, timeout=PATIENCE
    )
    directory = tmp_path / "killed"
    with subprocess.Popen(
        [*whole, "--workers", "1", "--dir", str(directory)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as driver:
        waited = 0.0
        while not list((directory / "checkpoints").glob("00000000[2-9]*.ckpt")) and waited < 60:
            time.sleep(0.02)
            waited += 0.02
            assert driver.poll() is None, "the driver ended before it could be killed"
        workers = joined(directory)
        driver.send_signal(signal.SIGKILL)
    assert all(gone(pid, 20) for pid in workers), "workers outlived their driver"
    stopped = Checkpoints(directory / "checkpoints").newest().iteration
    assert 20 <= stopped < 120
    subprocess.run(
        [sys.executable, "-m", "cluster.cli", "resume", str(directory), "--workers", "3"],
        check=True,
        capture_output=True,
        timeout=PATIENCE,
    )
    ends = [Checkpoints(tmp_path / name / "checkpoints").newest() for name in ("whole", "killed")]
    assert ends[1].attempt == 2
    assert digest(ends[0].meta) == digest(ends[1].meta)


def test_a_node_without_the_data_gets_it_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from envs import store
    from envs.images.episodes import Episodes
    from envs.images.glyphs import Glyphs

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    monkeypatch.setenv("METAFLEET_DATA", str(mine))
    tasks = Episodes(Glyphs(characters=30, drawings=8), queries=2, test_queries=2)
    tasks.prepare()
    run = replace(config.load("glyphs"), task=tasks, execution="loop")
    parts, params = assemble.recipe(run)
    pool = RayPool(parts, 1, variables={"METAFLEET_DATA": str(theirs)})
    try:
        driver = Driver(parts, params, pool, tmp_path / "run", iterations=2, meta_batch=4, shard=2, evaluation=FEW)
        remote = digest(driver.run())
    finally:
        pool.close()
    for file in tasks.files():
        assert (theirs / file).read_bytes() == (store.data_folder() / file).read_bytes()
    local = Driver(
        parts, params, LocalPool(parts), tmp_path / "local", iterations=2, meta_batch=4, shard=2, evaluation=FEW
    )
    assert digest(local.run()) == remote


def test_a_worker_whose_code_raises_says_what(tmp_path: Path) -> None:
    recipe = quadratic_recipe(outer=Descent(), learner=Noisy())
    pool = RayPool(recipe, 1)
    try:
        driver = Driver(
            recipe, {"wrong": torch.zeros(3)}, pool, tmp_path, iterations=1, meta_batch=2, shard=2, evaluation=FEW
        )
        with pytest.raises(RuntimeError, match=r"failed 5 times.*KeyError: 'theta'"):
            driver.run()
    finally:
        pool.close()


def test_losing_every_worker_late_in_a_run_only_costs_time(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cluster.fleet import ray_pool

    monkeypatch.setattr(ray_pool, "START_SECONDS", 15.0)  # shorter than the run, longer than a start
    killed: list[int] = []

    def kill(driver: Driver) -> None:
        if not killed and driver.iteration >= 5:
            time.sleep(15.0)  # as if much time had passed since the pool began
            killed.append(joined(tmp_path)[0])
            os.kill(killed[0], signal.SIGKILL)

    parts, params = assemble.recipe(sinusoid(tmp_path))
    assert digest(train(parts, params, RayPool(parts, 1), tmp_path, kill)) == reference


@dataclass(frozen=True)
class Picky(Noisy):
    """Raises in the first process that a file names: one broken worker among good ones."""

    marker: str = ""

    def gradient(self, meta, objective, data):
        try:
            with open(self.marker, "x") as f:
                f.write(str(os.getpid()))
        except FileExistsError:
            pass
        if Path(self.marker).read_text() == str(os.getpid()):
            raise OSError("a broken disk")
        return super().gradient(meta, objective, data)


def test_a_shard_that_fails_on_one_worker_is_given_to_another(tmp_path: Path) -> None:
    bits = []
    for learner, local in ((Picky(marker=str(tmp_path / "marker")), False), (Noisy(), True)):
        recipe = quadratic_recipe(learner=learner)
        pool = LocalPool(recipe) if local else RayPool(recipe, 2)
        try:
            driver = Driver(
                recipe, start(), pool, tmp_path / str(local), iterations=3, meta_batch=8, shard=2, evaluation=FEW
            )
            bits.append(digest(driver.run()))
        finally:
            pool.close()
    assert bits[0] == bits[1]


def test_a_dead_address_is_one_clear_sentence(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", "sinusoid", "--address", "127.0.0.1:1", "--dir",
        str(tmp_path / "x")], capture_output=True, text=True, timeout=PATIENCE,
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
    )  # fmt: skip
    assert result.returncode == 1
    assert "no Ray cluster answers at address='127.0.0.1:1'" in result.stderr
    assert "Traceback" not in result.stderr
