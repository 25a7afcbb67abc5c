"""From `optim.name` to its rules: every file of `rules/` is asked for the word it answers to.

So a new file there is a new optimizer, and no table has to be kept in step.
"""

from __future__ import annotations

import importlib
import pkgutil

from k2train.config.errors import ConfigError, nearest
from k2train.config.optim import OptimConfig
from k2train.update_rules import rules as folder
from k2train.update_rules.rule import NamedRules, Rules


def chosen_rules(optim: OptimConfig) -> Rules:
    """The rules that `optim.name` stands for.

    Raises ConfigError for a word that no file answers to.
    """
    known = {named.name: named for named in all_rules()}
    if optim.name not in known:
        rule = "must be one of " + ", ".join(known)
        raise ConfigError("optim.name", optim.name, rule, nearest(optim.name, known))
    return known[optim.name].build(optim)


def all_rules() -> list[NamedRules]:
    """What every file of `rules/` offers, in order of the files' names."""
    found: list[NamedRules] = []
    for module in sorted(module.name for module in pkgutil.iter_modules(folder.__path__)):
        found.append(importlib.import_module(f"{folder.__name__}.{module}").OPTIMIZER)
    return found
