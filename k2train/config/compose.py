"""Hydra to frozen dataclasses. Nothing of OmegaConf leaves this file, sweep.py and
hydra_folders.py.

What the user writes wins. `group=name` makes the section of that group what the file says: neither
the experiment's keys of that section nor the default experiment's stay beside it.
`section.key=value` comes after both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError, nearest
from k2train.config.folders import FLAG, config_dir, group_files, search_path
from k2train.config.hydra_folders import hydra_compose
from k2train.config.phases import FROM_PHASES, steps_of
from k2train.config.schema import Config

T = TypeVar("T")
EXPERIMENT = "experiment"


@overload
def load_config(overrides: Sequence[str] = ()) -> Config: ...
@overload
def load_config(overrides: Sequence[str], root: type[T], config_name: str = "config") -> T: ...
def load_config(overrides: Sequence[str] = (), root: Any = Config, config_name: str = "config") -> Any:
    """Compose `config_name` with Hydra `overrides` and convert it into `root`.

    Raises ConfigError for every mistake in the overrides or in a YAML file.
    """
    return _converted(root, compose_dict(overrides, config_name))


def load_run(overrides: Sequence[str]) -> Config:
    """The config of `k2train train`: where `run_dir` holds a run, that run's own, changed by the
    overrides.

    An `experiment=` among them says everything anew, so it is composed as for a new run. Raises
    ConfigError.
    """
    parsed = parse_overrides(overrides)
    run_dirs = [word.value() for word in parsed if word.key_or_group == "run_dir"]
    again = any(word.key_or_group == EXPERIMENT for word in parsed)
    saved = Path(str(run_dirs[-1])) / "config.yaml" if run_dirs and run_dirs[-1] else None
    if again or saved is None or not saved.is_file():
        return load_config(overrides)
    return _converted(Config, _plain(parsed, "config", saved.parent.absolute()))


def compose_dict(overrides: Sequence[str], config_name: str = "config") -> dict[str, Any]:
    """The composed config as plain dicts, interpolations resolved. Raises ConfigError."""
    return _plain(parse_overrides(overrides), config_name)


def _plain(parsed: Sequence[Override], config_name: str, saved: Path | None = None) -> dict[str, Any]:
    """The composed config, from the folders that are searched, or from the folder of a run that was
    saved.
    """
    check_no_sweep(parsed)
    groups = group_files(search_path())
    check_groups(parsed, groups)
    chosen = {
        word.key_or_group: str(word.value())
        for word in parsed
        if word.key_or_group in groups and isinstance(word.value(), (str, int))
    }
    lines = [permit(word, groups) for word in parsed if saved is None or word.key_or_group not in groups]
    with told(parsed):
        composed = hydra_compose(saved or config_dir(), config_name, lines)
        for group, name in chosen.items():
            own = [permit(word, groups) for word in parsed if word.key_or_group.startswith(f"{group}.")]
            section = hydra_compose(config_dir(), f"{group}/{name}", own) if group != EXPERIMENT else {}
            if group in section:
                composed[group] = section[group]
        plain = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(plain, dict):
        raise ConfigError("config", config_name, "must be a section with keys")
    if "model" in chosen and not any(word.key_or_group == "name" for word in parsed):
        # A run is called after its experiment, which another model makes untrue.
        plain["name"] = chosen["model"].rsplit("/", 1)[-1]
    return {str(name): value for name, value in plain.items()}


def _converted(root: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclasses, with the number of steps taken from the phases where `train.steps` asks for
    that.
    """
    train = plain.get("train")
    if not isinstance(train, dict) or train.get("steps") != FROM_PHASES:
        return from_dict(root, plain)
    config = from_dict(root, {**plain, "train": {**train, "steps": 1}})
    assert isinstance(config, Config)
    steps = steps_of(config.optim.lr_phases, config.train.global_batch_tokens)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


@contextlib.contextmanager
def told(parsed: Sequence[Override]) -> Iterator[None]:
    """Within this context a failure of Hydra, OmegaConf or YAML is a ConfigError."""
    words = " ".join(word.input_line or "" for word in parsed) or "config"
    try:
        yield
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else words
        remedy = "mend that line; a text with a colon or a bracket needs quotes"
        raise ConfigError("config", place, f"is no YAML: {error.problem or error.context}", remedy) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("config", words, f"a YAML file cannot be read: {_first_line(error)}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError("config", words, _first_line(error)) from error


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own parse of `key=value` words.

    Raises ConfigError, also for a flag, which is no such word.
    """
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(
                "flag",
                word,
                "is no flag of this command",
                f"`--help` lists them, {FLAG} FOLDER works everywhere",
            )
        try:
            parsed.extend(parser.parse_overrides([word]))
        except (HydraException, OmegaConfBaseException) as error:
            raise unreadable(word, error) from error
    return parsed


def unreadable(word: str, error: Exception) -> ConfigError:
    """What is wrong with a word that Hydra cannot parse."""
    key, equals, value = word.partition("=")
    if not equals:
        return ConfigError("override", word, "is not of the form key=value", "for example train.steps=100")
    text = _first_line(error)
    # Hydra's lexer names its own exception and repeats the word, which says nothing to a user.
    rule = "cannot be read" if text.startswith("Lexer") or word in text else f"cannot be read: {text}"
    quoted = value.strip("\"'")
    remedy = f"a text with signs or spaces needs quotes that the shell leaves: {key}=\\'{quoted}\\'"
    return ConfigError("override", word, rule, remedy)


def check_no_sweep(parsed: Sequence[Override]) -> None:
    """A value with a bare comma is a sweep over several values, which one run cannot have."""
    for override in parsed:
        if override.is_sweep_override():
            word = override.input_line or ""
            key, _, value = word.partition("=")
            rule = "several values make a sweep, and this is one run"
            remedy = f"add -m to run each, or quote a text that holds commas: {key}=\\'{value}\\'"
            raise ConfigError(key, value, rule, remedy)


def check_groups(parsed: Sequence[Override], groups: Mapping[str, Mapping[str, Path]]) -> None:
    """A config group must be given one of its files.

    Hydra's own message lists search paths, ours the nearest name.
    """
    for override in parsed:
        key = override.key_or_group
        if key not in groups or override.is_sweep_override():
            continue
        value = override.value()
        if key == EXPERIMENT and override.is_delete():
            continue
        if override.is_delete() or not isinstance(value, (str, int)) or isinstance(value, bool):
            rule = "a group must be given the name of one of its files"
            remedy = f"for example {key}={next(iter(groups[key]))}"
            if key == EXPERIMENT:
                remedy += "; `~experiment` goes without one"
            raise ConfigError(key, value, rule, remedy)
        if str(value) not in groups[key]:
            rule = f"there is no configs/{key}/{value}.yaml"
            raise ConfigError(key, value, rule, nearest(str(value), groups[key]))


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The cartesian product of the sweep overrides (`a=1,2 b=x`), each as a list of plain
    overrides, in order.
    """
    choices: list[list[str]] = []
    for override in parse_overrides(overrides):
        if override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([override.input_line or ""])
    product: list[list[str]] = [[]]
    for words in choices:
        product = [[*head, word] for head in product for word in words]
    return product


def permit(override: Override, groups: Mapping[str, Any]) -> str:
    """The override in a form that passes Hydra's struct check.

    from_dict rejects unknown keys with a better message.
    """
    line = override.input_line or ""
    key = override.key_or_group
    if key in groups or key.startswith("hydra") or line.startswith(("+", "~")):
        return line
    return "++" + line


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
