"""`python -m tests.digests`: the final θ of every preset after a few iterations, hashed.

A change that must not move a number shows the same table before and after. Only the command line is used, so that one
file serves trees of any layout:

    python -m tests.digests --data DIR > before.txt      (and > after.txt on the changed tree)
    diff before.txt after.txt

Presets of MiniImagenet and PURER's natural images read `--data`/tiny_imagenet_fewshot.zip, Omniglot's the two archives
in `--data`/omniglot. Sizes are cut down by flags; learner, model, outer step, objective and loss are the preset's.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, TypeAlias

import tomli_w
from safetensors.numpy import load_file

from cluster import cli

Table: TypeAlias = dict[str, Any]

# One row a kind of preset: the first prefix of its name that matches says how it is cut down.
SIZES = {
    "data-free": "--iterations 2 --meta-batch 2 --outer.switch.warmup 1 --outer.switch.patience 1 "
    "--learner.calibration.inversion-steps 1 --learner.calibration.steps 1",
    "cifar-fs": "--iterations 2 --meta-batch 2 --shard 1 --model.widths 4 4 8 8",
    "miniimagenet": "--iterations 2 --meta-batch 2 --shard 1",
    "omniglot-20way": "--iterations 2 --meta-batch 2 --shard 1",
    "omniglot": "--iterations 2 --meta-batch 4 --shard 2",
    "robust-omniglot": "--iterations 2 --meta-batch 2 --shard 1",
    "navigation": "--iterations 2 --meta-batch 4 --shard 2 --task.test-steps 400",
    "half-cheetah": "--iterations 2 --meta-batch 2 --shard 1 --task.rollouts 2 --task.test-steps 200",
    "ant": "--iterations 2 --meta-batch 2 --shard 1 --task.rollouts 2 --task.test-steps 200",
    "hopper": "--iterations 2 --meta-batch 2 --shard 1 --task.rollouts 2 --task.test-steps 200",
    "walker2d": "--iterations 2 --meta-batch 2 --shard 1 --task.rollouts 2 --task.test-steps 200",
    "": "--iterations 3 --meta-batch 8 --shard 4",
}
# What no preset has: the other execution modes, policy, precision, norm and network.
VARIATIONS = {
    "sinusoid": (
        "--execution loop",
        "--execution vmap",
        "--execution compiled",
        "--policy.name asynchronous",
        "--precision float64",
    ),
    "glyphs": (
        "--execution loop",
        "--execution vmap",
        "--objective.norm frozen",
        "--policy.name asynchronous",
        "--model.name resnet",
        "--model.name resnet12 --model.widths 4 4 8 8 --model.block 1",
        "--model.name wide_resnet --model.depth 10 --model.widen 1",
        "--model.name vit --model.patch 7 --model.dim 12 --model.depth 2 --model.heads 2",
    ),
    "half-cheetah-direction": ("--control.inner-loss dice", "--task.backend exact"),
}
HELD_OUT = (
    "--evaluation.validation-tasks 0 --evaluation.tasks 1 --evaluation.steps 1 --evaluation.pictures 0 "
    "--evaluation.robustness.eps 0 --pool local"
)
TEACHERS = "--count 3 --epochs 1 --pool local"


def metafleet(words: list[str]) -> None:
    """Run a command in this process, its output to standard error; raises RuntimeError where it fails."""
    try:
        cli.main(words)
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"metafleet {' '.join(words)} ended with {stop.code}") from stop


def presets() -> dict[str, Table]:
    """Every preset's own table; comparisons as well."""
    folder = next(p.parent for p in sorted(Path(cli.__file__).parent.rglob("sinusoid.toml")))
    return {p.stem: tomllib.loads(p.read_text()) for p in sorted(folder.glob("*.toml"))}


def merged(base: Table, table: Table) -> Table:
    """`base` with the differences of `table`; a table with another `name` replaces the whole."""
    if "name" in table and table["name"] != base.get("name"):
        return table
    both = {k: merged(base[k], v) for k, v in table.items() if isinstance(v, dict) and isinstance(base.get(k), dict)}
    return base | table | both


def runs_of(name: str, tables: dict[str, Table], folder: Path) -> dict[str, str]:
    """What `train` takes for a preset; for a comparison, a file for each of its runs that says the same."""
    whole = tables[name]
    while "runs" not in whole and whole.get("extends") in tables and "COMPARISON" in str(whole["description"]):
        base = tables[str(whole["extends"])]
        whole = merged(base, whole) | {"extends": base["extends"]}
    if "runs" not in whole:
        return {name: name}
    common = {k: v for k, v in whole.items() if k not in ("runs", "passes", "env_steps")}
    files = {}
    for run, differences in whole["runs"].items():
        path = folder / f"{name}.{run}.toml"
        path.write_text(tomli_w.dumps(merged(common, {k: v for k, v in differences.items() if k != "init_from"})))
        files[f"{name}.{run}"] = str(path)
    return files


def sizes(name: str) -> list[str]:
    """Flags that make a preset small."""
    return next(flags for prefix, flags in SIZES.items() if name.startswith(prefix)).split()


def source(name: str, data: Path) -> list[str]:
    """Where a preset's images are."""
    if name.startswith(("cifar-fs", "miniimagenet")) or "tiny-imagenet" in name:
        return ["--task.source.folder", str(data / "tiny_imagenet_fewshot.zip")]
    return ["--task.source.folder", str(data / "omniglot")] if "omniglot" in name else []


def digest(path: Path) -> str:
    """Of every name, shape and bit of the tensors in a file."""
    whole = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        whole.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return whole.hexdigest()[:32]


def theta(name: str, run: str, data: Path, folder: Path, variation: str = "") -> str:
    """The digest of θ after a short run of a preset."""
    directory, extra = folder / f"{name} {variation}", variation.split()
    if name.startswith("data-free"):
        pool = folder / f"teachers-{name}"
        metafleet(["teachers", run, "--dir", str(pool), *TEACHERS.split(), *source(name, data)])
        extra += ["--task.pools", str(pool)]
    words = [*source(name, data), *extra, *sizes(name), *HELD_OUT.split(), "--dir", str(directory)]
    metafleet(["train", run, *words])
    metafleet(["export", str(directory), str(directory / "theta.safetensors")])
    return digest(directory / "theta.safetensors")


def main() -> None:
    """Print NAME DIGEST for each preset that begins with one of the given prefixes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="*", default=[""])
    parser.add_argument("--data", type=Path, default=Path("data"))
    options = parser.parse_args()
    failed = False
    table = os.fdopen(os.dup(sys.stdout.fileno()), "w")  # the table alone goes to standard output
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder:
        tables, home = presets(), Path(folder)
        runs = {n: r for preset in tables for n, r in runs_of(preset, tables, home).items()}
        for name, run in runs.items():
            for variation in ("", *VARIATIONS.get(name, ())):
                if name.startswith(tuple(options.prefix)):
                    try:
                        found = theta(name, run, options.data.absolute(), home, variation)
                    except RuntimeError as error:
                        found, failed = f"FAILED: {error}", True
                    print(f"{f'{name} {variation}':60} {found}", file=table, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
