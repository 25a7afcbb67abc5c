"""The words of `k2train rehearse`, before anything is rehearsed."""

from __future__ import annotations

import pytest

from k2train.cli.rehearse import as_rehearsed, check_section
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError

# A sequence length that K2's batch of 67.1M tokens is no multiple of.
ODD = ["experiment=k2", "train.seq_len=3000"]


def test_a_rehearsal_of_some_microbatches_needs_no_right_batch() -> None:
    """16 data-parallel ranks, each with its microbatches of one sequence."""
    train = as_rehearsed(load_config([*ODD, "rehearse.microbatches=5"])).train
    assert train.global_batch_tokens == 16 * 5 * 3000


def test_without_it_the_batch_is_checked() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch_tokens=67108864: must be a multiple"):
        load_config(ODD)


def test_a_list_of_layers_for_a_folded_pipeline_can_be_rehearsed() -> None:
    """The kind of schedule decides how many pieces the model has: DualPipeV makes two a stage."""
    words = ["schedule=dualpipe_v", "layout.pp=2", "layout.layers_per_virtual_stage=[1,1,1,1]"]
    config = as_rehearsed(load_config([*words, "model.num_hidden_layers=4", "rehearse.microbatches=4"]))
    check_section(config)
    assert config.train.global_batch_tokens == 4 * config.train.microbatch_size * config.train.seq_len
