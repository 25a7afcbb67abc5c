"""Where YAML files are looked for: a user's own folder first, then the package's `configs/`.

A user's folder has the same groups as the package's (`model/mine.yaml` for `model=mine`). It is, in
this order, the folder of `--config-dir`, the one of K2TRAIN_CONFIG_DIR, or `./configs` of the
working directory. The last is taken only where it looks like one of ours, because many projects
keep another program's files under that name.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from k2train.config.errors import ConfigError

VARIABLE = "K2TRAIN_CONFIG_DIR"
FLAG = "--config-dir"


def config_dir() -> Path:
    """The package's own directory of YAML files: `configs/` of the clone, or the copy inside the
    installed package.
    """
    package = Path(__file__).resolve().parent.parent
    for candidate in (package / "configs", package.parent / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no configs/ beside {package}: the installation is incomplete")


def search_path(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """The folders that are searched, the first to hold a file wins. The package's own is the last.

    Raises ConfigError where K2TRAIN_CONFIG_DIR names no folder. Set to nothing, it switches
    `./configs` off.
    """
    own = config_dir()
    if VARIABLE in environment:
        named = environment[VARIABLE]
        mine = [existing_folder(VARIABLE, named)] if named else []
    else:
        mine = [folder for folder in (Path("configs").absolute(),) if _is_ours(folder, own)]
    return [*(folder for folder in mine if not folder.samefile(own)), own]


def existing_folder(field: str, value: str) -> Path:
    """The absolute path of a folder that the user named. Raises ConfigError where there is none."""
    path = Path(value).expanduser().absolute()
    if not path.is_dir():
        rule = "is not a folder" if path.exists() else "there is no such folder"
        raise ConfigError(field, value, rule, "give a folder that holds groups, such as model/mine.yaml")
    return path


def _is_ours(folder: Path, own: Path) -> bool:
    """Whether a folder called `configs` is one of ours: it has a group of ours, and no other
    program's root file.
    """
    try:
        groups = {path.name for path in own.iterdir() if path.is_dir()}
        if not any((folder / group).is_dir() for group in groups):
            return False
        root = folder / "config.yaml"
        if not root.is_file():
            return True
        keys = yaml.safe_load(root.read_text(encoding="utf-8"))
        known = yaml.safe_load((own / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(keys, dict) and keys.keys() <= known.keys()


def group_files(folders: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Every config group with the file of each of its names, the winning one."""
    groups: dict[str, dict[str, Path]] = {}
    for folder in reversed(folders):
        for path in sorted(folder.glob("*/**/*.yaml")):
            group, *name = path.relative_to(folder).with_suffix("").parts
            groups.setdefault(group, {})["/".join(name)] = path
    return groups


def group_options() -> dict[str, list[str]]:
    """Every config group with the names of its files."""
    return {group: sorted(files) for group, files in sorted(group_files(search_path()).items())}


@contextlib.contextmanager
def user_folder(words: Sequence[str]) -> Iterator[list[str]]:
    """The words without `--config-dir DIR`; within this context that folder is the user's.

    It stands in the environment, where the ranks and jobs that this process starts find it, too.
    Raises ConfigError for a folder that is not there.
    """
    named, rest = _split(words)
    before = os.environ.get(VARIABLE)
    if named is not None:
        os.environ[VARIABLE] = str(existing_folder(FLAG, named))
    try:
        yield rest
    finally:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    named: str | None = None
    rest: list[str] = []
    pending = iter(words)
    for word in pending:
        if word == FLAG:
            named = next(pending, "")
        elif word.startswith(f"{FLAG}="):
            named = word.partition("=")[2]
        else:
            rest.append(word)
    if named == "":
        raise ConfigError(FLAG, "(nothing)", "needs a folder", f"{FLAG}=FOLDER")
    return named, rest
