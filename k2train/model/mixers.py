"""Which class computes which mixer."""

from __future__ import annotations

from k2train.architecture.grouped_query import GroupedQueryMixer
from k2train.architecture.latent_attention import LatentMixer
from k2train.architecture.layer import Mixer
from k2train.model.attention import Attention, LayerTools
from k2train.model.grouped_query import GroupedQueryAttention
from k2train.model.latent_attention import LatentAttention


def build_attention(mixer: Mixer, layer: int, tools: LayerTools) -> Attention:
    """The attention of layer `layer`, with empty parameters."""
    if isinstance(mixer, GroupedQueryMixer):
        return GroupedQueryAttention(mixer, layer, tools)
    assert isinstance(mixer, LatentMixer), f"no class computes {mixer}"
    return LatentAttention(mixer, layer, tools)
