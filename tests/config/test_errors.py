"""Every mistake is told in words: bad words, keys that errors name, and remedies that work when
followed."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from k2train.cli.export_hf import ExportConfig
from k2train.cli.import_hf import ImportConfig
from k2train.cli.report import ReportConfig
from k2train.config.compose import load_config
from k2train.config.data import DataBuildConfig
from k2train.config.errors import ConfigError
from k2train.config.folders import group_options
from k2train.config.help import keys_of
from k2train.config.schema import Config
from k2train.data.show import ShowConfig
from k2train.layout.build import build_layout, num_microbatches

PACKAGE = Path(__file__).resolve().parents[2] / "k2train"
ROOTS = (Config, DataBuildConfig, ShowConfig, ReportConfig, ExportConfig, ImportConfig)
KEYS = {entry.name.replace("[]", "") for root in ROOTS for entry in keys_of(root)}
# Words of the command line that are no keys of a config.
WORDS = {
    "command",
    "flag",
    "override",
    "config",
    "data",
    "bench",
    "doctor",
    "DIR",
    "checkpoint",
    "--help",
    "--config-dir",
    "K2TRAIN_CONFIG_DIR",
    "hydra/launcher",
    "experiment",
}
# Arguments of functions that no config reaches: a caller's mistake, named by the argument.
ARGUMENTS = {"costs", "num_rows", "num_owners", "shape", "spec", "num_microbatches"}

BAD_WORDS = """model=null|~model|model=|model=[k2]|model={a:1}|model=K2|=5|==|train.=3|.train=3|train..steps=3|
train.steps=${nothing}|train.steps=${train.steps}|train.steps=${oc.env:NOPE}|train.steps=${foo:1}|run_dir=${|
train.steps=1e400|train.steps=[1,2|train.steps={a|train.steps="x|train.steps='x|+train.steps=3|++train.nope=3|+nope=3|
~nope|~train|train=null|optim.lr_phases=null|optim.lr_phases=[3]|data.blend=[x]|data.blend={a: 1}|data=null|hydra=null|
hydra/launcher=nope|hydra.nope=3|hydra.searchpath=3|experiment=null|experiment=nope|experiment=[tiny,k2]|model@x=k2|
model@:=k2|train@x=3|name=null|--cfg|-x|train|train.steps:3|defaults=[]|run_dir=~x|é=3|train.steps=٣|world=3|
layout.layers_per_virtual_stage=[a]|model.rope_scaling=3|model.rope_scaling={}|telemetry=3|choice(1,2)|
train.steps=range(1,4)|data.blend=[{prefix: a, weight: -1}]|optim={name: adamw}""".replace("\n", "").split(
    "|"
)


@pytest.mark.parametrize("word", BAD_WORDS)
def test_a_bad_word_is_told_in_a_few_lines(word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([word])
    text = str(caught.value)
    assert len(text.splitlines()) <= 2
    assert "Exception" not in text
    assert "Traceback" not in text


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of the package that makes a ConfigError, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id == "ConfigError"
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def test_every_error_names_a_whole_key() -> None:
    """Fields that are computed start with a section, or are checked where they are raised."""
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    wrong, seen = [], 0
    for place, call in calls():
        field = call.args[0] if call.args else None
        if isinstance(field, ast.Constant):
            seen += 1
            if field.value not in KEYS | WORDS | ARGUMENTS:
                wrong.append(f"{place} {field.value!r}")
        elif isinstance(field, ast.JoinedStr) and isinstance(field.values[0], ast.Constant):
            seen += 1
            if str(field.values[0].value).split(".")[0].split("[")[0] not in sections:
                wrong.append(f"{place} {ast.unparse(field)}")
    assert seen > 90
    assert not wrong


def test_every_key_that_a_message_tells_to_set_is_one() -> None:
    """What looks like `section.key=value` in the text of an error."""
    groups = set(group_options())
    written = re.compile(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)=")
    wrong, seen = [], 0
    for place, call in calls():
        for node in ast.walk(call):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names = written.findall(node.value)
                seen += len(names)
                wrong += [f"{place} {name}" for name in names if name not in KEYS | groups]
    assert seen > 40
    assert not wrong


def composes_and_divides(words: list[str]) -> None:
    """What every command checks of a config before it does anything."""
    config = load_config(words)
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    num_microbatches(config.train, layout)


NODES = ["experiment=k2", "layout.nodes=16"]
SMALL = ["model=k2", "layout=k2", "cluster=h800", "layout.nodes=256"]


@pytest.mark.parametrize(
    ("words", "remedy", "followed"),
    [
        (NODES, "nearest is 32", ["layout.nodes=32"]),
        (NODES, "layout.pp=8", ["layout.pp=8"]),
        (["experiment=k2", "layout.nodes=40"], "nearest are 32 and 64", ["layout.nodes=64"]),
        (SMALL, "nearest is 262144", ["train.global_batch_tokens=262144"]),
        (
            SMALL,
            "train.seq_len=128, train.microbatch_size=16",
            ["train.seq_len=4", "train.microbatch_size=1", "train.global_batch_tokens=2048"],
        ),
        (
            ["experiment=k2", "train.global_batch_tokens=100000"],
            "nearest are 65536 and 131072",
            ["train.global_batch_tokens=131072"],
        ),
        (
            ["experiment=k2", "train.global_batch_tokens=10000"],
            "nearest is 65536",
            ["train.global_batch_tokens=65536"],
        ),
        (["train.global_batch_tokens=5000"], "nearest are 4096 and 6144", ["train.global_batch_tokens=6144"]),
        (["layout.ep=3"], "nearest are 2 and 4", ["layout.ep=4", "train.global_batch_tokens=8192"]),
        (
            ["layout=k2", "layout.edp=3", "layout.nodes=32", "model=k2"],
            "layout.edp=1",
            ["layout.edp=1", "train.global_batch_tokens=32768"],
        ),
        (["layout.pp=100"], "layout.pp=6", ["layout.pp=6"]),
        (["layout.pp=4", "layout.vpp=3"], "layout.vpp=1", ["layout.vpp=1"]),
        (["data.tokenizer.kind=tiktoken"], "data.tokenizer.kind=byte", ["data.tokenizer.kind=byte"]),
        (["data.tokenizer.kind=tiktoken"], "data.tokenizer.path=FILE", ["data.tokenizer.path=FILE"]),
        (
            ["schedule=1f1b", "schedule.pair_forward_backward=true"],
            "schedule.split_weight_grad=true",
            ["schedule.split_weight_grad=true"],
        ),
        (["model.topk_group=2"], "model.n_group=1", ["model.topk_group=1"]),
        (["model.num_experts_per_tok=17"], "use at most 16", ["model.num_experts_per_tok=16"]),
        (
            ["experiment=null"],
            "~experiment",
            ["~experiment", "train.seq_len=8", "train.microbatch_size=4", "train.global_batch_tokens=32"],
        ),
    ],
)
def test_a_remedy_that_is_followed_works(words: list[str], remedy: str, followed: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        composes_and_divides(words)
    assert remedy in str(caught.value)
    keys = {word.split("=")[0].lstrip("~") for word in followed}
    composes_and_divides([*(word for word in words if word.split("=")[0] not in keys), *followed])


def test_an_error_of_a_shared_section_is_placed_where_it_is_held() -> None:
    error = ConfigError("tokenizer.path", None, "rule", "set tokenizer.path=X, or give a tokenizer.json")
    placed = error.placed("data.tokenizer")
    assert (placed.field, placed.remedy) == (
        "data.tokenizer.path",
        "set data.tokenizer.path=X, or give a tokenizer.json",
    )
    assert error.placed("tokenizer") is error
    assert ConfigError("train.steps", 0, "rule").placed("train").field == "train.steps"
    assert ConfigError("data.blend.weight", 0, "rule").placed("data.blend[1]").field == "data.blend[1].weight"
