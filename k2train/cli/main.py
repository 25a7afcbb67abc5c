"""The `k2train` program: a word, then Hydra overrides.

Each command is a module of this package with `run(args) -> int`; it is imported only when it is
called, so that `plan` and `--help` start without torch. This file alone turns errors into messages
and exit statuses: 0 done, 1 the run failed, 2 a mistake in what the user wrote, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence

from k2train import __version__
from k2train.config.errors import ConfigError, nearest
from k2train.config.folders import user_folder

COMMANDS = {
    "train": "train a model; a run directory that holds a checkpoint is resumed",
    "plan": "predict memory, step time and exposed communication, without a GPU",
    "rehearse": "run one rank's step at real size without a GPU: memory, time, traffic, host waits",
    "evaluate": "score a run's checkpoint on held-out text",
    "report": "show a run again: its metrics, its loss curve",
    "data": "build and inspect corpora",
    "import-hf": "turn a Hugging Face model directory into a checkpoint",
    "export-hf": "turn a checkpoint into a Hugging Face model directory",
    "bench": "run a benchmark of the clone against its peer",
    "doctor": "say what this machine has and what is missing",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"k2train {__version__}")
        return 0
    return run_told(next((word for word in words if word in COMMANDS), words[0]), lambda: dispatch(words))


def dispatch(words: Sequence[str]) -> int:
    """Run the command that the words begin with, with the user's folder of configs found first.

    Raises ConfigError.
    """
    with user_folder(words) as rest:
        if not rest:
            raise ConfigError("command", "(missing)", "must be given", usage())
        return command(rest[0])(rest[1:])


def run_told(name: str, run: Callable[[], int]) -> int:
    """The exit status of `run`, which is command `name`; a mistake of the user's is told in a few
    lines.
    """
    try:
        return run()
    except ConfigError as error:
        # Under a launcher every rank finds a mistake in the words, and one telling is enough; what
        # is amiss on one machine each rank tells for itself.
        rank = os.environ.get("RANK", "0")
        if error.local or rank == "0":
            who = f"rank {rank}: " if error.local and "RANK" in os.environ else ""
            print(f"k2train {name}: {who}{error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"k2train {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) went away: not an error, and nobody is left to tell.
        sys.stderr.close()
        return 0


def command(word: str) -> Callable[[list[str]], int]:
    """The `run` function of command `word`. Raises ConfigError for an unknown one."""
    if word not in COMMANDS:
        raise ConfigError("command", word, "is not a command of k2train", nearest(word, COMMANDS))
    run: Callable[[list[str]], int] = importlib.import_module(f"k2train.cli.{word.replace('-', '_')}").run
    return run


def usage() -> str:
    """The text of `k2train --help`."""
    width = max(map(len, COMMANDS))
    lines = ["usage: k2train COMMAND [key=value ...]", ""]
    lines += [f"  {word:{width}}  {text}" for word, text in COMMANDS.items()]
    lines += [
        "",
        "`k2train COMMAND --help` explains every key. `--config-dir FOLDER` finds config files of your own.",
        "`k2train --version` names the version.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
