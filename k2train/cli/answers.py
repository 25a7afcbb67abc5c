"""What every command with a whole config answers before it does anything: `--help` and
`--print-config`.

    k2train train --help                       every key, with the value that this run would take
    k2train train --help optim steps           the keys of a section, and those with a word in their
                                               name
    k2train train --help experiment=k2 optim   the values of that experiment
    k2train train --print-config experiment=k2 the composed config as YAML
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import yaml

from k2train.config.convert import to_dict
from k2train.config.folders import group_options
from k2train.config.help import Selection, render_help
from k2train.config.schema import Config

HELP = ("-h", "--help")
PRINT_CONFIG = "--print-config"
NOTE = f"""
`--help WORD ...` shows the keys of a section, or with a word in their name. `{PRINT_CONFIG}` prints the composed config.
`--config-dir FOLDER` searches a folder of your own for files of the groups first."""


def answered(
    args: Sequence[str],
    title: str,
    usage: str,
    load: Callable[[Sequence[str]], Config],
    without: Sequence[str] = (),
) -> bool:
    """Print what was asked for and return True; False where nothing was.

    load: composes the command's config. without: sections and keys that the command does not read.
    Raises ConfigError for a mistake in the words.
    """
    if PRINT_CONFIG in args:
        config = load([word for word in args if word != PRINT_CONFIG])
        print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")
        return True
    if not any(word in HELP for word in args):
        return False
    rest = [word for word in args if not word.startswith("-")]
    values = to_dict(load([word for word in rest if "=" in word]))
    selection = Selection([word for word in rest if "=" not in word], without, values)
    print(render_help(Config, title, usage + NOTE, group_options(), selection=selection))
    return True
