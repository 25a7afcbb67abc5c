"""Hydra to frozen dataclasses. The only file that knows OmegaConf; nothing of it leaves this module.

`configs/` stands at the top of a clone and is packed beside this package in a wheel; both are looked for from this
file's own place, never from the working directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError, nearest
from k2train.config.schema import Config

T = TypeVar("T")


def config_dir() -> Path:
    """The directory of YAML files: `configs/` of the clone, or the copy inside the installed package."""
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no configs/ beside {package}: the installation is incomplete")


def load_config(overrides: Sequence[str] = (), root: type[T] = Config, config_name: str = "config") -> T:  # type: ignore[assignment]
    """Compose `config_name` with Hydra `overrides` and convert it into `root`.

    Raises ConfigError for every mistake in the overrides or in a YAML file.
    """
    return from_dict(root, compose_dict(overrides, config_name))


def load_run(overrides: Sequence[str]) -> Config:
    """The config that the run in the words' `run_dir` was started with, changed by the overrides. Raises ConfigError."""
    groups = group_options(config_dir())
    parsed = parse_overrides(overrides)
    chosen = [word for word in parsed if word.key_or_group in groups]
    (run_dir,) = [str(word.value()) for word in parsed if word.key_or_group == "run_dir"]
    try:
        with initialize_config_dir(str(Path(run_dir).absolute()), version_base="1.3"):
            lines = [permit(word) for word in parsed if word not in chosen]
            plain = OmegaConf.to_container(hydra_compose("config", overrides=lines), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("run_dir", run_dir, _first_line(error)) from error
    assert isinstance(plain, dict)
    for word in chosen:
        plain[word.key_or_group] = compose_dict([word.input_line or ""])[word.key_or_group]
    return from_dict(Config, plain)


def compose_dict(overrides: Sequence[str], config_name: str = "config") -> dict[str, Any]:
    """The composed config as plain dicts, interpolations resolved."""
    parsed = parse_overrides(overrides)
    check_no_sweep(parsed)
    check_groups(parsed, config_dir())
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose(config_name, overrides=[permit(override) for override in parsed])
        plain = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError("config", " ".join(overrides) or config_name, _first_line(error)) from error
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def parse_overrides(overrides: Sequence[str]) -> list[Override]:
    """Hydra's own parse of `key=value` words."""
    parser = OverridesParser.create()
    parsed = []
    for word in overrides:
        try:
            parsed.extend(parser.parse_overrides([word]))
        except HydraException as error:
            rule = (
                "is not of the form key=value" if "=" not in word else f"cannot be read: {_first_line(error)}"
            )
            raise ConfigError(
                "override", word, rule, "for example train.steps=100; quote values that hold spaces"
            ) from error
    return parsed


def check_no_sweep(parsed: Sequence[Override]) -> None:
    """A value with a bare comma is a sweep over several values, which one run cannot have."""
    for override in parsed:
        if override.is_sweep_override():
            word = override.input_line or ""
            key, _, value = word.partition("=")
            raise ConfigError(key, value, "several values make a sweep, and this is one run",
                              f"add -m to run each, or quote a text that holds commas: {key}=\\'{value}\\'")  # fmt: skip


def check_groups(parsed: Sequence[Override], directory: Path) -> None:
    """A config group must be given one of its files; Hydra's own message lists search paths, ours the nearest name."""
    groups = {path.name: path for path in directory.iterdir() if path.is_dir()}
    for override in parsed:
        key = override.key_or_group
        value = override.value() if not override.is_sweep_override() else None
        if key not in groups or not isinstance(value, (str, int)):
            continue
        options = {path.stem for path in groups[key].glob("*.yaml")}
        if str(value) not in options:
            raise ConfigError(
                key, value, f"there is no configs/{key}/{value}.yaml", nearest(str(value), options)
            )


def group_options(directory: Path) -> dict[str, list[str]]:
    """Every config group with the names of its files."""
    return {
        path.name: sorted(file.stem for file in path.glob("*.yaml"))
        for path in sorted(directory.iterdir())
        if path.is_dir()
    }


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The cartesian product of the sweep overrides (`a=1,2 b=x`), each as a list of plain overrides, in order."""
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


def permit(override: Override) -> str:
    """The override in a form that passes Hydra's struct check; from_dict rejects unknown keys with a better message."""
    line = override.input_line or ""
    key = override.key_or_group
    if key in group_options(config_dir()) or key.startswith("hydra") or line.startswith(("+", "~")):
        return line
    return "++" + line


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
