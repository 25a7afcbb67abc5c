"""Hydra, told where to look and left as it was found: the one file that touches its global
state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from k2train.config.folders import config_dir, search_path


class UserFolder(SearchPathPlugin):
    """Puts the user's folder before the package's.

    Hydra's own `hydra.searchpath` could only put it behind.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        mains = [place.path for place in search_path.get_path() if place.provider == "main"]
        # Another program that uses Hydra in this process is none of our business.
        if any(path.removeprefix("file://") == str(config_dir()) for path in mains):
            for folder in _user_folders():
                search_path.prepend("k2train", f"file://{folder}", anchor="main")


def _user_folders() -> list[Path]:
    return [folder for folder in search_path() if folder != config_dir()]


def know_user_folders() -> None:
    """Make Hydra ask `UserFolder`, once a process."""
    plugins = Plugins.instance()
    if UserFolder not in plugins.discover(SearchPathPlugin):
        plugins.register(UserFolder)


def hydra_compose(
    folder: Path, config_name: str, overrides: Sequence[str], with_hydra: bool = False
) -> DictConfig:
    """What Hydra makes of a file of `folder` and overrides. with_hydra: with the section of Hydra's
    own settings.

    Raises what Hydra, OmegaConf and YAML raise.
    """
    know_user_folders()
    with untouched(), initialize_config_dir(str(folder), version_base="1.3"):
        composed = compose(config_name, overrides=list(overrides), return_hydra_config=with_hydra)
    OmegaConf.set_struct(composed, False)
    return composed


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Within this context Hydra is not initialised; after it, it is as before.

    A job of a sweep runs inside Hydra.
    """
    state = Singleton.get_state()
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        Singleton.set_state(state)
