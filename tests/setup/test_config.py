"""Presets, keys and their errors; defaults are the published settings."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.setup import assemble, catalog, config, equal_budget, resolve
from cluster.setup.run import ObjectiveKeys
from cluster.setup.tables import flat, to_table
from envs.images.data_free import DataFree
from learners.algorithms.maml import MAML
from learners.algorithms.reptile import Reptile
from learners.engine.optimisers import Adam
from learners.outer.descent import Descent, Group
from learners.purer.calibration import DataFreeMAML

COMPARISONS = [name for name in config.presets() if config.VARIANTS in config.read(name)]


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_run_of_a_comparison_takes_the_same_budget(name: str) -> None:
    table = config.read(name)
    what, budget = next((k, table[k]) for k in ("passes", "env_steps") if k in table)
    runs = equal_budget.comparison(name)
    if any(isinstance(run.task, DataFree) for run in runs.values()):  # trained equally long, or not at all
        assert {run.iterations for run in runs.values()} == {1, 3000}
        assert all(3000 * run.meta_batch * run.learner.passes() == budget for run in runs.values())
        assert set(equal_budget.beginnings(name).values()) <= set(runs)
        return
    for variant, run in runs.items():
        each = run.meta_batch * run.learner.passes()
        if what == "env_steps":  # once with θ, and once more after the one inner step that MAML trains
            each = run.meta_batch * run.task.rollouts * run.task.horizon * (2 if variant in ("maml", "random") else 1)
        assert budget - each < run.iterations * each <= budget or variant == "random"
        assemble.recipe(replace(run, execution="loop"))
    if what == "passes":
        assert {type(run.learner) for run in runs.values()} == set(catalog.LEARNERS.values()) - {DataFreeMAML}


@pytest.mark.parametrize("name", [name for name in config.presets() if name not in COMPARISONS])
def test_every_preset_loads_says_its_source_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    run = config.load(name)
    table = tomllib.loads(config.find(name).read_text())
    assert table.get("description")
    assert table.get("reference") or "extends" in table
    (tmp_path / "run.toml").write_text(config.to_toml(run, {"environment": {"torch": "x"}}))
    assert config.load(str(tmp_path / "run.toml")) == run
    run.network()  # it can be built
    if not isinstance(run.task, DataFree):  # which wants teachers first
        assemble.recipe(replace(run, execution="loop"))


def test_defaults_are_the_papers() -> None:
    assert MAML() == MAML(inner_lr=0.01, inner_steps=1, order=2, adapts=("*",))
    assert Reptile() == Reptile(inner_lr=1e-3, inner_steps=5, inner_optimizer="adam", batch=10, test_batch=5)
    assert Adam() == Adam(0.9, 0.999, 1e-8)
    assert (Descent().optimizer, Descent().lr) == ("adam", 1e-3)


# Finn et al. 2017, Appendix A, and cbfinn/maml; Nichol et al. 2018 and openai/supervised-reptile.
PUBLISHED = {
    "sinusoid-maml": {"inner_lr": 0.01, "inner_steps": 1, "meta_batch": 25, "iterations": 70_000, "test_steps": 10},
    "sinusoid-maml-code": {"inner_lr": 0.001},
    "omniglot-5way-1shot": {
        "inner_lr": 0.4,
        "inner_steps": 1,
        "meta_batch": 32,
        "iterations": 60_000,
        "queries": 1,
        "test_steps": 3,
    },
    "omniglot-5way-5shot": {"inner_lr": 0.4, "inner_steps": 1, "meta_batch": 32, "queries": 5},
    "omniglot-5way-1shot-code": {"train": 1100, "validation": 100, "test_steps": 10},
    "omniglot-20way-1shot": {"inner_lr": 0.1, "inner_steps": 5, "meta_batch": 16, "queries": 1, "test_steps": 5},
    "omniglot-20way-5shot": {"inner_lr": 0.1, "inner_steps": 5, "meta_batch": 16, "queries": 5, "test_steps": 5},
    "miniimagenet-5way-1shot": {
        "inner_lr": 0.01,
        "inner_steps": 5,
        "meta_batch": 4,
        "queries": 15,
        "test_steps": 10,
        "clip": 10.0,
        "width": 32,
    },
    "miniimagenet-5way-5shot": {"meta_batch": 2, "queries": 15},
    "miniimagenet-5way-5shot-code": {"meta_batch": 4},
    "omniglot-5way-1shot-reptile": {
        "inner_lr": 1e-3,
        "inner_steps": 5,
        "meta_batch": 5,
        "iterations": 100_000,
        "batch": 10,
        "test_batch": 5,
        "train_shots": 10,
    },
    "omniglot-20way-5shot-reptile": {
        "inner_lr": 5e-4,
        "inner_steps": 10,
        "meta_batch": 5,
        "iterations": 200_000,
        "batch": 20,
        "test_batch": 10,
    },
    "miniimagenet-5way-1shot-reptile": {
        "inner_lr": 1e-3,
        "inner_steps": 8,
        "batch": 10,
        "test_batch": 5,
        "train_shots": 15,
        "test_steps": 50,
    },
    "sinusoid-meta-sgd": {"inner_steps": 1, "lowest_rate": 0.005, "highest_rate": 0.1},
    "omniglot-5way-1shot-meta-sgd": {"inner_steps": 1, "meta_batch": 4, "iterations": 60_000, "test_steps": 1},
    "miniimagenet-5way-1shot-meta-sgd": {"inner_steps": 1, "meta_batch": 4, "iterations": 60_000, "test_steps": 1},
    "miniimagenet-5way-1shot-anil": {"inner_lr": 0.1, "inner_steps": 5, "meta_batch": 32},
    "miniimagenet-5way-1shot-maml-plus-plus": {
        "inner_lr": 0.1,
        "inner_steps": 5,
        "multi_step_epochs": 15,
        "epoch": 500,
        "width": 48,
    },
    "omniglot-20way-1shot-maml-plus-plus": {"inner_lr": 0.1, "inner_steps": 5, "multi_step_epochs": 10},
    "miniimagenet-5way-5shot-adml-goldblum": {
        "inner_lr": 0.01,
        "inner_steps": 5,
        "meta_batch": 4,
        "queries": 15,
        "eps": 8 / 255,
    },
    "miniimagenet-5way-5shot-adversarial-querying": {
        "inner_steps": 5,
        "eps": 8 / 255,
        "attack_steps": 7,
        "attack_step": 2 / 255,
    },
    "omniglot-5way-1shot-reptile-serial": {"meta_batch": 1, "moments": "carry", "inner_steps": 5},
    "miniimagenet-5way-5shot-reptile": {"inner_steps": 8, "batch": 10, "test_batch": 15, "train_shots": 15},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_numbers(name: str) -> None:
    run = config.load(name)
    leaves = flat(to_table(run))
    where = {
        "inner_lr": "learner.inner_lr", "inner_steps": "learner.inner_steps", "queries": "task.queries",
        "clip": "outer.clip_value", "test_steps": "evaluation.steps", "train": "task.source.train",
        "validation": "task.source.validation", "width": "model.width", "lowest_rate": "learner.lowest_rate",
        "highest_rate": "learner.highest_rate", "epoch": "learner.epoch",
        "multi_step_epochs": "learner.multi_step_epochs", "moments": "learner.moments", "eps": "learner.attack.eps",
        "attack_steps": "learner.attack.steps", "attack_step": "learner.attack.step_size", "batch": "learner.batch",
        "test_batch": "learner.test_batch", "train_shots": "task.train_shots",
    }  # fmt: skip
    assert {k: leaves[where.get(k, k)] for k in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in PUBLISHED
        if n.startswith("omniglot") and not n.endswith(("reptile", "serial", "meta-sgd", "plus-plus"))
    ],
)
def test_mamls_published_rates_come_with_the_loss_scale_they_are_for(name: str) -> None:
    assert config.load(name).objective.scale == "sum_over_shots"


def file(tmp_path: Path, text: str) -> str:
    (tmp_path / "run.toml").write_text(text)
    return str(tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterashuns = 3", "unknown key iterashuns; did you mean iterations?"),
        ('[learner]\nname = "maml"\ninner_lrr = 0.1', "unknown key learner.inner_lrr; did you mean learner.inner_lr?"),
        ('[learner]\nname = "mamal"', "data_free_maml; did you mean maml?"),
        ("[learner]\ninner_lr = 0.1", "learner.name=None is not one of maml, "),
        ('iterations = "many"', "iterations='many': should be a valid integer"),
        ('[learner]\nname = "maml"\norder = 3', r"learner.order=3: should be 2 or 1"),
        ("meta_batch = 7\nshard = 2", "meta_batch=7 is not a multiple of shard=2"),
        ("seed = -1", "seed=-1: a number from 0 on wanted"),
        ('[task]\nname = "episodes"\nways = 1\n[task.source]\nname = "glyphs"', "task.ways=1: at least 2 wanted"),
        ("task = 3", "task=3: a table wanted"),
        ('extends = "sinusid"', "RUN='sinusid' is neither a preset nor a .toml file; did you mean sinusoid?"),
        ("iterations = ", "is not valid TOML"),
        ("extends = 3", "extends=3: a preset's name or a path wanted"),
        ('extends = "run.toml"', "run.toml extends itself"),
        ('[task]\nname = "episodes"', "task.source is missing"),
        ('[learner]\nname = "maml"\ninner_steps = -3', "learner.inner_steps=-3: 0 or more wanted"),
        ('[task]\nname = "sinusoid"\ntrain_shots = -3', "task.train_shots=-3: at least 0 wanted"),
        ("[evaluation]\ntasks = 0", "evaluation.tasks=0: at least 1 wanted"),
        ('[evaluation]\nnorms = ["transductve"]', "evaluation.norms=['transductve']: should be 'transductive'"),
        ("[checkpoint]\nkeep = 0", "checkpoint.keep=0: at least 1 wanted"),
        ('device = "gpu"', "device='gpu': cpu or cuda wanted"),
        ('device = "cuda"', "device='cuda' with gpus_per_worker=0"),
    ],
)
def test_a_wrong_key_or_value_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        config.load(file(tmp_path, text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_extends_merges_keys_and_a_new_choice_starts_afresh(tmp_path: Path) -> None:
    run = config.load(
        file(tmp_path, 'extends = "omniglot-5way-1shot"\n[learner]\nname = "reptile"\nbatch = 3\n[task]\nways = 7')
    )
    assert run.learner == Reptile(batch=3)
    assert (run.task.ways, run.task.shots, run.task.source.train) == (7, 1, 1200)


def test_a_group_cannot_change_on_resume() -> None:
    run = config.load("sinusoid")
    before, same, after = (replace(run, outer=Descent(groups=(Group("head.*", lr=lr),))) for lr in (0.5, 0.5, 0.25))
    resolve.check_resumable(before, same)
    with pytest.raises(ValueError, match=r"outer.groups was .*'lr': 0.5.* when this run began and is .*'lr': 0.25"):
        resolve.check_resumable(before, after)


def test_groups_of_parameters_are_tables_that_survive_a_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(
        'extends = "sinusoid"\n[outer]\noptimizer = "adamw"\n[[outer.groups]]\nmatch = "head.*"\nlr = 0.1\n'
        '[[outer.groups]]\nmatch = "*.bias"\nweight_decay = 0.0\n'
    )
    run = config.load(str(path))
    assert run.outer.groups == (Group("head.*", lr=0.1), Group("*.bias", weight_decay=0.0))
    path.write_text(config.to_toml(run))
    assert config.load(str(path)) == run
    for text, message in (("[[outer.groups]]\nlr = 0.1\n", r"outer.groups\[0\].match is missing"),
                          ("[[outer.groups]]\nmatch = 'a'\nrate = 1\n", r"unknown key outer.groups\[0\].rate"),
                          ("[outer]\ngroups = 3\n", r"outer.groups=3: tables wanted")):  # fmt: skip
        path.write_text(f'extends = "sinusoid"\n{text}')
        with pytest.raises(ValueError, match=message):
            config.load(str(path))


def test_only_what_the_numbers_do_not_depend_on_may_change_on_resume() -> None:
    run = config.load("sinusoid")
    resolve.check_resumable(
        run, replace(run, iterations=9, workers=5, pool="local", evaluation=replace(run.evaluation, tasks=3))
    )
    with pytest.raises(ValueError, match=r"learner.inner_lr was 0.01 when this run began and is 0.5 now"):
        resolve.check_resumable(run, replace(run, learner=MAML(inner_lr=0.5)))
    with pytest.raises(ValueError, match=r"learner.name was 'maml' when this run began and is 'reptile' now"):
        resolve.check_resumable(run, replace(run, learner=Reptile()))


@pytest.mark.parametrize("loss", ["l1", "huber", "gaussian_nll"])
def test_a_run_may_descend_another_loss(loss: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(f'extends = "sinusoid"\npool = "local"\n[objective]\nloss = "{loss}"\n')
    parts, params = assemble.recipe(replace(config.load(str(path)), execution="vmap"))
    assert f", {loss} (mean)" in parts.summary()
    verb = parts.verbs(parts.objective)["gradient"]
    task = parts.tensors(parts.task("train", 0, verb))
    assert verb.run({f"params/{k}": v for k, v in params.items()}, {}, task).row["query_loss"].isfinite()


def test_keys_of_the_cross_entropy_are_its_own() -> None:
    glyphs, sinusoid = config.load("glyphs"), config.load("sinusoid")
    smooth = ObjectiveKeys(label_smoothing=0.1, class_weights=(1, 1, 1, 1, 2))
    parts, _ = assemble.recipe(replace(glyphs, objective=smooth, execution="loop"))
    assert "label_smoothing=0.1" in parts.summary()
    with pytest.raises(ValueError, match="of the cross-entropy, and tasks have numbers"):
        assemble.recipe(replace(sinusoid, objective=smooth, execution="loop"))
    with pytest.raises(ValueError, match="not of loss='mse'"):
        ObjectiveKeys(loss="mse", label_smoothing=0.1)
