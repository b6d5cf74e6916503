"""The `metafleet` command: finds what is asked for, and turns errors into sentences."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.commands.console import console, errors
from cluster.commands.runs import compare, replay, resume, status, train
from cluster.commands.tools import check, doctor, list_, scale, show, teachers
from cluster.commands.using import adapt, evaluate, export

USAGE = """metafleet — distributed meta-training on Ray

  metafleet train RUN [--dir DIR] [--seeds N] [--key value ...]   meta-train; RUN is a preset or a TOML file
  metafleet resume DIR [--key value ...]                          go on from the last good checkpoint
  metafleet evaluate DIR [--tasks 600] [--steps 10]               adaptation curve on held-out tasks
  metafleet adapt DIR --support X --predict Y                     adapt to examples of one's own, predict others
  metafleet compare DIR [DIR ...] | RUN                           table and plot across runs; RUN: train its runs first
  metafleet export DIR OUT.safetensors                            θ for use with plain torch
  metafleet teachers RUN [--dir DIR] [--count 8]                  train (or import) a pool of classifiers
  for data-free runs
  metafleet list                                                  presets, tasks, models, learners
  metafleet show RUN [--key value ...]                            the whole configuration as TOML
  metafleet check RUN [--key value ...]                           is the meta-gradient what it claims to be?
  metafleet scale RUN --workers 1,2,4 [--policy sync,async]       throughput, efficiency, time-to-loss over fleet sizes
  metafleet doctor [RUN] [--key value ...]                        is this machine or cluster fit for it?
  metafleet status DIR [--follow]                                 what a run is doing
  metafleet replay DIR                                            a run again from its journal, to the same bits

`metafleet COMMAND --help` explains a command and lists every key; `--debug` shows tracebacks.
Try: metafleet train sinusoid"""


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train, "resume": resume, "evaluate": evaluate, "adapt": adapt, "compare": compare, "export": export,
    "list": list_, "show": show, "check": check, "status": status, "replay": replay, "teachers": teachers,
    "doctor": doctor, "scale": scale,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; errors of the user become one sentence, and exit code 1 (2 for wrong usage)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    if not words or words[0] in ("-h", "--help", "help") or words[0] not in COMMANDS:
        unknown = bool(words) and not words[0].endswith(("-h", "help"))
        (errors if unknown else console).print(
            f"no command {words[0]!r}\n\n{USAGE}" if unknown else USAGE, highlight=False, markup=False
        )
        sys.exit(2 if unknown else 0)
    try:
        _one_place()
        COMMANDS[words[0]](words[1:])
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    except Exception as error:
        if debug:
            raise
        errors.print(f"[bold red]error:[/] {_sentence(error)}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _one_place() -> None:
    """A user's own folder named `envs` or `learners` in front of ours would be imported instead."""
    import envs
    import learners

    homes = {str(Path(m.__path__[0]).parent) for m in (envs, learners)} | {str(Path(__file__).parents[1])}
    if len(homes) > 1:
        raise RuntimeError(
            f"the packages cluster, learners and envs come from different places ({', '.join(sorted(homes))}); start "
            "from another folder"
        )


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError | RuntimeError):  # nothing that we foresaw
        text = f"{type(error).__name__}: {text} (--debug shows where)"
    return text.replace("[", r"\[")


if __name__ == "__main__":
    main()
