"""`--key value` flags for a run: typed, with help, for exactly the classes that the run chooses."""

from __future__ import annotations

import dataclasses
import re
import tomllib
import typing
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import tomli_w
import tyro

from cluster.record import storage
from cluster.setup import config, tables
from cluster.setup.run import Run

T = TypeVar("T")


def configured(
    command: str, words: list[str], options: type[T], description: str, shown: str = "RUN",
    load: Callable[[str, dict[str, str]], Run] = config.load, hidden: Collection[str] = (),
) -> tuple[str, T, Any]:  # fmt: skip
    """(RUN, options, run) of `RUN --key value …`. The flags are those of the classes that RUN and --x.name choose.

    `load`: how RUN and these choices become a run. `hidden`: keys that are no flags of this command.
    """
    name, rest = leading(words)
    overrides, rest = _choices(rest)
    run = load(name, overrides) if name else config.load("sinusoid", overrides)
    if not name and not any(w in ("-h", "--help") for w in rest):
        raise ValueError(
            f"metafleet {command} wants a {shown} first, for example: metafleet {command} "
            f"{'sinusoid' if shown == 'RUN' else 'runs/mine'}"
        )
    if not name:
        description += (
            " The keys below are those of the preset sinusoid: name a RUN to see its own; --learner.name and the like "
            "choose others."
        )
    narrow = _narrowed(run, hidden=hidden)
    flags: Any = dataclass(frozen=True)(type("Flags", (options, type(narrow)), {"__annotations__": {}}))
    default = flags(**_values(options()), **_values(narrow))
    parsed = tyro.cli(
        flags, args=rest, default=default, prog=f"metafleet {command} {name or shown}", description=description
    )
    values = _values(parsed)
    own = {k: values.pop(k) for k in _values(options())}
    return name, options(**own), Run(**{k: _plain(v, f"{k}.") for k, v in values.items()})


def of_directory(words: list[str], changes: tables.Table | None = None) -> Callable[[str, dict[str, str]], Run]:
    """How `configured` comes from a run directory to its run, with `changes`; `words` say whether it is --trust-ed."""
    from cluster.operations import existing_run

    return lambda name, overrides: existing_run.run_of(
        storage.place(name), trust="--trust" in words, overrides=overrides, changes=changes
    )


def _narrowed(value: Any, key: str = "", hidden: Collection[str] = ()) -> Any:
    """An equal dataclass whose fields are declared as the classes that stand in them, not as interfaces.

    tyro makes flags of the types that fields are declared with, and knows only that much of them. Of

        Run(learner: Learner = MAML(inner_lr=0.1), outer: Outer = Descent(lr=0.01))

    whose fields are declared as Protocols it could make no flag at all; the result here is

        Run'(Run)(learner: MAML = MAML(inner_lr=0.1), outer: Descent = Descent(lr=0.01))

    an equal value of a subclass made on the spot, of which it makes --learner.inner-lr and --outer.lr. An array of
    tables becomes a text, in TOML: tyro has flags for as many elements as there are, none for another one. What tyro
    returns is a Run' too; `_plain` leads back by way of `of`, which holds the class that was narrowed. A subclass of
    one with others inside checks nothing itself: its `__post_init__` would run before all flags are there.
    """
    cls, values, hints = type(value), _values(value), typing.get_type_hints(type(value))
    keyed = {k for k, v in values.items() if dataclasses.is_dataclass(v) and k not in hidden}
    still = {k: v for k, v in values.items() if k in hidden or (tables.choices_of(hints[k]) and k not in keyed)}
    inside = {k: _narrowed(v, f"{key}{k}.") for k, v in values.items() if k in keyed}
    inner = inside | {name: _toml(getattr(value, name)) for name in _arrays(cls)} | still
    if not inner:
        return value
    declared: dict[str, Any] = {name: type(child) for name, child in inner.items()}
    declared |= dict.fromkeys(still, Annotated[Any, tyro.conf.Fixed, tyro.conf.Suppress])

    def check(self: Any) -> None:
        if not inside:
            _plain(self, key)

    body = {"__annotations__": declared, "__doc__": cls.__doc__, "__post_init__": check, "of": cls}
    narrow: Any = dataclass(frozen=True)(type(cls.__name__, (cls,), body | inner))
    return narrow(**(_values(value) | inner))


def _values(value: Any) -> dict[str, Any]:
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}


def _plain(value: Any, key: str) -> Any:
    """Back from narrowed classes to the real ones; `key` stands before the names of fields."""
    cls: Any = vars(type(value)).get("of")
    if cls is None:
        return value
    plain = {name: _plain(child, f"{key}{name}.") for name, child in _values(value).items()}
    for name, hint in _arrays(cls).items():
        plain[name] = tables.from_rows(hint, _parsed(plain[name], f"{key}{name}"), f"{key}{name}")
    return cls(**plain)


def _arrays(cls: Any) -> dict[str, Any]:
    """Fields that hold arrays of tables, with their types."""
    return {name: hint for name, hint in typing.get_type_hints(cls).items() if tables.rows_of(hint)}


def _toml(elements: tuple[Any, ...]) -> str:
    """An array of tables in one line, [{match = "head.*", lr = 0.001}]; their values are scalars."""
    inline = [tomli_w.dumps(tables.to_table(e)).strip().replace("\n", ", ") for e in elements]
    return f"[{', '.join(f'{{{text}}}' for text in inline)}]"


def _parsed(text: str, key: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{key}={text!r} is not valid TOML, like [{{key = 1}}, {{key = 2}}]: {error}") from error


def _choices(words: list[str]) -> tuple[dict[str, str], list[str]]:
    """Take `--learner.name reptile` and the like out of the words: they decide which flags there are."""
    overrides: dict[str, str] = {}
    rest = []
    waiting = iter(words)
    for word in waiting:
        match = re.fullmatch(r"--((?:\w+\.)+name)(?:=(.*))?", word)
        if match:
            overrides[match[1]] = match[2] if match[2] is not None else next(waiting, "")
        else:
            rest.append(word)
    return overrides, rest


def taken(words: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """(the value of `flag`, the other words): for a flag that means something else here than for a run. Underscores in
    it are hyphens, as in every flag.
    """
    value, rest = default, []
    waiting = iter(words)
    for word in waiting:
        name, equals, given = word.partition("=")
        if name.replace("_", "-") == flag:
            value = given if equals else next(waiting, "")
        else:
            rest.append(word)
    return value, rest


def numbers(name: str, text: str) -> tuple[int, ...]:
    """1,2,4 as numbers. Raises ValueError for anything else."""
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise ValueError(f"{name}={text!r}: numbers like 1,2,4 wanted")
    return tuple(map(int, text.split(",")))


def among(name: str, text: str, choices: tuple[str, ...]) -> tuple[Any, ...]:
    """Words of a list like a,b. Raises ValueError for one that is not among `choices`."""
    for part in text.split(","):
        if part not in choices:
            raise ValueError(f"{name}={text!r}: {' or '.join(choices)}, or several of them with commas, wanted")
    return tuple(text.split(","))


def leading(words: list[str]) -> tuple[str, list[str]]:
    """(the first word, the others), or "" and all of them where the first is a flag."""
    return (words[0], words[1:]) if words and not words[0].startswith("-") else ("", words)
