"""The catalogue of a model's tensors, from the config alone: what its blocks say, in order.

Parameter counts, optimizer ownership, checkpoints and the Hugging Face import all read this one
list, and a test holds it against the tensors the torch model really has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from k2train.architecture.embedding import embedding_tensors
from k2train.architecture.head import head_tensors
from k2train.architecture.layer import layer_kind, layer_of
from k2train.architecture.tensors import TensorSpec
from k2train.config.model import ModelConfig


def model_tensors(model: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, embedding first, head last, layers in order."""
    yield from embedding_tensors(model)
    for layer in range(model.num_hidden_layers):
        yield from layer_tensors(model, layer)
    yield from head_tensors(model)


def layer_tensors(
    model: ModelConfig, layer: int, experts: Iterable[int] | None = None
) -> Iterator[TensorSpec]:
    """The tensors of one transformer layer, counted from 0.

    Of its routed experts only `experts`, None for all.
    """
    return layer_of(model, layer_kind(model, layer)).tensors(layer, experts)


def part_tensors(
    model: ModelConfig, layers: Iterable[int], embedding: bool, head: bool, experts: Iterable[int]
) -> Iterator[TensorSpec]:
    """The tensors of one virtual stage. experts: the routed experts held of every layer.

    The whole model's catalogue has 70,000 entries for K2, too many to list on 256 ranks.
    """
    held = tuple(experts)
    if embedding:
        yield from embedding_tensors(model)
    for layer in layers:
        yield from layer_tensors(model, layer, held)
    if head:
        yield from head_tensors(model)
