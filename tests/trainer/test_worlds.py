"""Which world a config and an environment mean, and what does not fit."""

from pathlib import Path

import pytest
import torch

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.layout.build import build_layout
from k2train.trainer.finish import resume_command
from k2train.trainer.worlds import choose_world, fit_to_launcher

CPU = torch.device("cpu")


def _choose(words: list[str], environment: dict[str, str]) -> str:
    config = fit_to_launcher(load_config(words), environment)
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    return choose_world(config, layout, CPU, environment)


@pytest.mark.parametrize(
    ("words", "environment", "world"),
    [
        ([], {}, "single"),
        (["layout=laptop"], {}, "threads"),
        (["layout=laptop"], {"WORLD_SIZE": "4"}, "processes"),
        ([], {"WORLD_SIZE": "1"}, "processes"),
        (["world=threads"], {}, "threads"),
        (["layout=laptop", "world=threads"], {"WORLD_SIZE": "1"}, "threads"),
    ],
)
def test_auto_takes_the_launcher_then_the_layout(
    words: list[str], environment: dict[str, str], world: str
) -> None:
    assert _choose(words, environment) == world


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["layout=laptop", "world=single"], {}, "layout has 4 ranks"),
        (["layout=laptop"], {"WORLD_SIZE": "6"}, "not a multiple of 4\n.*start 4 ranks"),
        (["layout=laptop", "layout.edp=2"], {"WORLD_SIZE": "4"}, "launcher started 4"),
    ],
)
def test_what_does_not_fit_is_named(words: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _choose(words, environment)


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_replicas_follow_from_the_ranks_the_launcher_started(groups: int) -> None:
    config = load_config(["layout=laptop"])
    assert fit_to_launcher(config, {"WORLD_SIZE": str(4 * groups)}).layout.edp == groups
    fixed = load_config(["layout=laptop", "layout.edp=1"])
    assert fit_to_launcher(fixed, {"WORLD_SIZE": str(4 * groups)}) == fixed
    assert fit_to_launcher(config, {}) == config


def test_the_command_to_resume_names_the_launcher_and_the_directory_once() -> None:
    words = ["experiment=laptop", "run_dir=old", "train.steps=3"]
    alone = resume_command(Path("runs/a b"), words, {})
    assert alone == "k2train train experiment=laptop train.steps=3 'run_dir=runs/a b'"
    launched = resume_command(Path("r"), words, {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    assert (
        launched == "torchrun --nproc-per-node=4 -m k2train train experiment=laptop train.steps=3 run_dir=r"
    )
    slurm = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    submitted = resume_command(Path("r"), words, {**slurm, "TORCHELASTIC_RUN_ID": "7"})
    assert submitted == "sbatch --nodes=2 launch/slurm.sbatch experiment=laptop train.steps=3 run_dir=r"
    by_hand = resume_command(Path("r"), words, {**slurm, "TORCHELASTIC_RUN_ID": "k2train"})
    assert by_hand.startswith("torchrun --nproc-per-node=2")


def test_the_command_to_resume_has_what_the_job_was_started_with() -> None:
    """The user's folder of configs, several nodes under torchrun, and what a launch script says of
    itself."""
    words = ["experiment=mine", "run_dir=old"]
    folder = resume_command(Path("r"), words, {"K2TRAIN_CONFIG_DIR": "/my configs"})
    assert folder == "k2train train '--config-dir=/my configs' experiment=mine run_dir=r"
    nodes = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "head"}
    assert "torchrun --nproc-per-node=4 --nnodes=2 --rdzv-endpoint=head:29400 -m" in resume_command(
        Path("r"), words, nodes
    )
    started = {**nodes, "K2TRAIN_STARTED_BY": "RANKS=4 NODE_RANK=$i launch/torchrun.sh"}
    assert (
        resume_command(Path("r"), words, started)
        == "RANKS=4 NODE_RANK=$i launch/torchrun.sh experiment=mine run_dir=r"
    )
