"""Pools of pre-trained classifiers on disk: writing them, importing anyone's, reading them back."""

from __future__ import annotations

import hashlib
import io
import math
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from cluster.record.storage import Place, write_atomically
from cluster.setup import code
from cluster.setup.catalog import MODELS
from cluster.setup.tables import from_table, named
from learners.base import Params
from learners.models.networks import ModelSpec
from learners.modules.functional import Functional, functional
from learners.purer.inversion import Teacher

INDEX = "teachers.toml"


@dataclass(frozen=True)
class TeacherPool:
    """Teachers that all take images of one shape, normalised alike, and know equally many classes."""

    teachers: tuple[Teacher, ...]
    specs: tuple[ModelSpec, ...]
    accuracy: tuple[float, ...]
    """Of each, on images held back; NaN where nobody measured it."""
    names: tuple[str, ...]
    """Of the classes of all teachers, one after the other; where nobody named them, ones that differ."""
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def ways(self) -> int:
        """Classes of each teacher."""
        return self.teachers[0].ways


def describes(name: str) -> bool:
    """Whether `name` is a TOML file that describes teachers, not a run."""
    path = Path(name)
    if path.suffix != ".toml" or not path.is_file():
        return False
    try:
        return "teacher" in tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError):
        return False


def imported(description: Path, folder: Path) -> list[str]:
    """Take over anyone's models, as a TOML file describes them, into a pool in `folder`; their names.

    The file has `shape`, `ways`, `mean`, `std` and for each [[teacher]] `file` (.safetensors, or a state dict saved by
    torch) and `architecture` (a table as for `model` in a run). Raises ValueError for whatever does not fit; nothing is
    unpickled but tensors.
    """
    table = _toml(description)
    shape, ways, mean, std = _header(table, description)
    entries = []
    folder.mkdir(parents=True, exist_ok=True)
    for i, entry in enumerate(table["teacher"]):
        spec, model = _model(entry, shape, ways, f"{description}: teacher {i}")
        path = description.parent / str(entry.get("file", ""))
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
        state = _fitting(tensors(path.read_bytes(), path), model, str(path))
        entries.append(written(folder, i, spec, state) | {k: entry[k] for k in ("accuracy", "classes") if k in entry})
    write_index(folder, shape, ways, mean, std, entries)
    return [e["architecture"]["name"] for e in entries]


def load(folder: Path) -> TeacherPool:
    """Read a pool. Raises FileNotFoundError where there is none, ValueError where a file is damaged or does not fit its
    description.
    """
    table = _toml(folder / INDEX)
    shape, ways, mean, std = _header(table, folder / INDEX)
    teachers, specs, accuracy, names = [], [], [], []
    for i, entry in enumerate(table["teacher"]):
        where = f"{folder / INDEX}: teacher {i}"
        spec, model = _model(entry, shape, ways, where)
        path = folder / str(entry.get("file", ""))
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
            raise ValueError(f"{where}: {path} is missing or not the file that was written (its checksum differs)")
        teachers.append(Teacher(model, _fitting(tensors(content, path), model, str(path)), ways))
        specs.append(spec)
        accuracy.append(float(entry.get("accuracy", "nan")))
        names += _class_names(entry, ways, where)
    return TeacherPool(tuple(teachers), tuple(specs), tuple(accuracy), tuple(names), shape, mean, std)


def beginning(pool: TeacherPool, spec: ModelSpec, params: Params, start: str) -> Params:
    """θ₀ of a run: `params`, or the mean or the best of the teachers of the run's architecture, the best with the run's
    own head.
    """
    if start == "random":
        return params
    alike = [i for i, s in enumerate(pool.specs) if s == spec]
    if not alike:
        raise ValueError(f"outer.start={start!r}: no teacher has the model's architecture {spec}")
    if start == "average":
        found = {k: torch.stack([pool.teachers[i].params[k] for i in alike]).mean(0) for k in params}
        return _same_shapes(found, params, start)
    measured = [i for i in alike if math.isfinite(pool.accuracy[i])]
    if not measured:
        raise ValueError("outer.start='best': nobody measured the accuracy of a teacher of the model's architecture")
    best = pool.teachers[max(measured, key=lambda i: pool.accuracy[i])].params
    return {k: v if k.startswith("head.") else best[k] for k, v in params.items()}


def _same_shapes(found: Params, wanted: Params, start: str) -> Params:
    for k, v in wanted.items():
        if found[k].shape != v.shape:
            raise ValueError(
                f"outer.start={start!r}: {k} is {tuple(found[k].shape)} in the teachers, {tuple(v.shape)} in the model"
            )
    return found


def _model(entry: dict[str, Any], shape: tuple[int, int, int], ways: int, where: str) -> tuple[ModelSpec, Functional]:
    architecture = entry.get("architecture")
    if not isinstance(architecture, dict) or architecture.get("name") not in MODELS:
        raise ValueError(f"{where}: architecture={architecture!r}: a table with a name of {', '.join(MODELS)} wanted")
    if code.foreign(architecture):  # a pool may come from others: whatever it names is not run
        raise ValueError(f"{where}: architecture={architecture!r}: one of our own wanted, not a name to import")
    spec: ModelSpec = from_table(
        MODELS[architecture["name"]], {k: v for k, v in architecture.items() if k != "name"}, f"{where}: "
    )
    model = functional(spec.build(shape, ways), torch.zeros(2, *shape))
    if not model.normalises:
        raise ValueError(f"{where}: {architecture['name']} has no BatchNorm layer, whose statistics inversion needs")
    return spec, model


def tensors(content: bytes, path: Place) -> Params:
    """The tensors of a file, .safetensors or a state dict saved by torch. Raises ValueError for anything else."""
    try:
        if path.suffix == ".safetensors":
            return load_tensors(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]})") from error
    except Exception as error:  # torch's unpickler: whatever it refuses
        why = f"({type(error).__name__}); a state dict or safetensors wanted"
        raise ValueError(f"{path} holds more than tensors, or is damaged {why}") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} holds {type(state).__name__}: a state dict (names to tensors) wanted")
    return state


def _fitting(state: Params, model: Functional, where: str) -> Params:
    """What `model` wants of `state`. The bias of a convolution, which ours have not, goes into the running mean
    subtracted behind it.
    """
    wanted = model.params() | model.running()
    for name, like in wanted.items():
        if name not in state:
            raise ValueError(f"{where} has no {name}; it has {', '.join(list(state)[:6])} …")
        if state[name].shape != like.shape:
            raise ValueError(f"{where}: {name} has shape {tuple(state[name].shape)}, wanted {tuple(like.shape)}")
    found = {name: state[name].to(torch.float32) for name in wanted}
    for name in sorted(state.keys() - wanted.keys()):
        mean = re.sub(r"\bconv(\d*)\.bias$", r"norm\1.running_mean", name)
        if mean in found and found[mean].shape == state[name].shape:
            found[mean] = found[mean] - state[name].to(torch.float32)
        elif not name.endswith("num_batches_tracked"):
            raise ValueError(f"{where} has {name}, for which the architecture, as it is described, has no place")
    for name, value in found.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"{where}: {name} is not finite")
    return found


def _class_names(entry: dict[str, Any], ways: int, where: str) -> list[str]:
    names = entry.get("classes", [f"class {c} of {where}" for c in range(ways)])
    if not isinstance(names, list) or len(names) != ways:
        raise ValueError(f"{where}: classes={names!r}: a list of {ways} names wanted")
    return [str(name) for name in names]


def written(folder: Path, number: int, spec: ModelSpec, state: Params) -> dict[str, Any]:
    """Write a teacher's tensors; its entry in the index."""
    name = f"{number:03d}.safetensors"
    content = save_tensors({k: v.contiguous() for k, v in state.items()})
    write_atomically(folder / name, content)
    return {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "architecture": named(MODELS, spec)}


def write_index(folder: Path, shape: tuple[int, ...], ways: int, mean: tuple[float, ...], std: tuple[float, ...],
                 entries: list[dict[str, Any]]) -> None:  # fmt: skip
    """Write what describes a pool: last, so that a folder with an index is complete."""
    table = {"shape": list(shape), "ways": ways, "mean": list(mean), "std": list(std), "teacher": entries}
    write_atomically(folder / INDEX, tomli_w.dumps(table).encode())


def _toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: a pool of teachers is made by `metafleet teachers`")
    try:
        table = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from error
    if (
        not isinstance(table.get("teacher"), list)
        or not table["teacher"]
        or not all(isinstance(t, dict) for t in table["teacher"])
    ):
        raise ValueError(f"{path} describes no teachers: tables [[teacher]] wanted")
    return table


def _header(
    table: dict[str, Any], path: Path
) -> tuple[tuple[int, int, int], int, tuple[float, ...], tuple[float, ...]]:
    def numbers(key: str, kind: type, length: int) -> Iterator[Any]:
        value = table.get(key)
        if not isinstance(value, list) or len(value) != length or not all(isinstance(v, int | kind) for v in value):
            raise ValueError(f"{path}: {key}={value!r}: {length} numbers wanted")
        return (kind(v) for v in value)

    channels, height, width = numbers("shape", int, 3)
    ways = table.get("ways")
    if not isinstance(ways, int) or ways < 2:
        raise ValueError(f"{path}: ways={ways!r}: at least 2 wanted")
    mean, std = (tuple(numbers(key, float, channels)) for key in ("mean", "std"))
    if min(std) <= 0:
        raise ValueError(f"{path}: std={list(std)}: positive numbers wanted")
    return (channels, height, width), ways, mean, std


def together(pools: list[TeacherPool]) -> TeacherPool:
    """Several pools as one, in the first one's units. Raises ValueError where shapes or numbers of classes differ."""
    first = pools[0]
    for other in pools[1:]:
        if (other.shape, other.ways) != (first.shape, first.ways):
            raise ValueError(
                f"pools of {first.ways} classes of {first.shape} and of {other.ways} classes of {other.shape} do not "
                "mix"
            )
    return replace(
        first, teachers=tuple(t for pool in pools for t in _in_units_of(first, pool)),
        specs=tuple(s for pool in pools for s in pool.specs),
        accuracy=tuple(a for pool in pools for a in pool.accuracy),
        names=tuple(n for pool in pools for n in pool.names),
    )  # fmt: skip


def _in_units_of(first: TeacherPool, pool: TeacherPool) -> tuple[Teacher, ...]:
    """(x·std₁ + mean₁ − mean)/std is what a teacher of another pool expects of an image x in the first one's units."""
    if (pool.mean, pool.std) == (first.mean, first.std):
        return pool.teachers
    scale = tuple(a / b for a, b in zip(first.std, pool.std, strict=True))
    offset = tuple((a - b) / c for a, b, c in zip(first.mean, pool.mean, pool.std, strict=True))
    return tuple(replace(t, scale=scale, offset=offset) for t in pool.teachers)
