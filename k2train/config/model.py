"""`model`: the architecture, in the names of Hugging Face's DeepseekV3Config and Glm4MoeConfig, so
that a config.json maps one to one."""

from __future__ import annotations

import dataclasses
from typing import Literal

from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key


@dataclasses.dataclass(frozen=True)
class YarnConfig:
    """`model.rope_scaling`: YaRN, the long-context stretch of the rotary embedding (arXiv
    2309.00071)."""

    factor: float = key("how many times longer the context is than the one trained on", minimum=1.0)
    original_max_position_embeddings: int = key("context before stretching", unit="tokens", minimum=1)
    beta_fast: float = key("rotations above which a dimension keeps its frequency", default=32.0, above=0.0)
    beta_slow: float = key("rotations below which a dimension is fully stretched", default=1.0, above=0.0)
    mscale: float = key("attention temperature of the rotated part", default=1.0, minimum=0.0)
    mscale_all_dim: float = key("attention temperature of all dimensions", default=0.0, minimum=0.0)

    def __post_init__(self) -> None:
        check_ranges("model.rope_scaling", self)


MixerKind = Literal["latent", "grouped_query"]
REQUIRED_BY_MIXER: dict[MixerKind, tuple[str, ...]] = {
    "latent": ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "grouped_query": ("num_key_value_heads", "head_dim"),
}
"""Keys of `model` that a mixer must be given, and that no other mixer has."""
OPTIONAL_BY_MIXER: dict[MixerKind, tuple[str, ...]] = {
    "latent": ("q_lora_rank", "rope_scaling"),
    "grouped_query": ("partial_rotary_factor",),
}
"""Keys of `model` that a mixer may be given, and that no other mixer has."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """`model`: shapes and routing rules of a model of DeepSeek-V3's kind (K2, DeepSeek-V3,
    Moonlight), whose attention may also be grouped-query attention (GLM-4-MoE)."""

    vocab_size: int = key("size of the vocabulary", unit="tokens", minimum=2)
    hidden_size: int = key("width of the residual stream", unit="features", minimum=1)
    num_hidden_layers: int = key("transformer layers", unit="layers", minimum=1)
    first_k_dense_replace: int = key("leading layers with a dense feed-forward", unit="layers", minimum=0)
    intermediate_size: int = key("width of the dense feed-forward", unit="features", minimum=1)
    moe_intermediate_size: int = key("width of one expert", unit="features", minimum=1)
    n_routed_experts: int = key("routed experts in a MoE layer", unit="experts", minimum=1)
    num_experts_per_tok: int = key("routed experts a token activates", unit="experts", minimum=1)
    n_shared_experts: int = key("experts every token passes through", unit="experts", minimum=0)
    num_attention_heads: int = key("attention heads", unit="heads", minimum=1)
    q_lora_rank: int | None = key(
        "latent: width of the query latent; null projects queries directly, as other mixers do",
        unit="features",
        minimum=1,
    )
    mixer: MixerKind = key(
        "what mixes positions: multi-head latent attention, or grouped-query attention", default="latent"
    )
    kv_lora_rank: int | None = key(
        "latent: width of the key-value latent", default=None, unit="features", minimum=1
    )
    qk_nope_head_dim: int | None = key(
        "latent: unrotated query and key width of a head", default=None, unit="features", minimum=1
    )
    qk_rope_head_dim: int | None = key(
        "latent: rotated query and key width of a head", default=None, unit="features", minimum=2
    )
    v_head_dim: int | None = key("latent: value width of a head", default=None, unit="features", minimum=1)
    num_key_value_heads: int | None = key(
        "grouped_query: key and value heads, each shared by as many query heads",
        default=None,
        unit="heads",
        minimum=1,
    )
    head_dim: int | None = key(
        "grouped_query: query, key and value width of a head", default=None, unit="features", minimum=2
    )
    partial_rotary_factor: float | None = key(
        "grouped_query: share of a head's query and key features that is rotated; null for all",
        default=None,
        above=0.0,
        maximum=1.0,
    )
    n_group: int = key(
        "groups the experts are divided into for group-limited routing", default=1, unit="groups", minimum=1
    )
    topk_group: int = key("groups a token may choose experts from", default=1, unit="groups", minimum=1)
    norm_topk_prob: bool = key("normalise the chosen experts' scores to sum 1", default=True)
    routed_scaling_factor: float = key("factor on the routed experts' output", default=1.0, above=0.0)
    rms_norm_eps: float = key(
        "epsilon of the layer norms; the two latent norms use 1e-6", default=1e-6, above=0.0
    )
    rope_theta: float = key("base of the rotary embedding", default=10000.0, above=0.0)
    rope_scaling: YarnConfig | None = key(
        "latent: YaRN stretch of the rotary embedding; null for none", default=None
    )
    max_position_embeddings: int = key(
        "longest sequence the model is meant for", default=4096, unit="tokens", minimum=1
    )
    initializer_range: float = key("standard deviation of the initial weights", default=0.02, above=0.0)

    def __post_init__(self) -> None:
        check_ranges("model", self)
        check_routing(self)
        check_mixer(self)
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ConfigError(
                "model.first_k_dense_replace",
                self.first_k_dense_replace,
                f"cannot exceed model.num_hidden_layers={self.num_hidden_layers}",
                f"use at most {self.num_hidden_layers}",
            )

    @property
    def rotated_features(self) -> int:
        """Query and key features of a head that grouped-query attention rotates."""
        return int((self.head_dim or 0) * (self.partial_rotary_factor or 1.0))

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.first_k_dense_replace

    @property
    def sparsity(self) -> float:
        """Routed experts per active one; K2 is 384 / 8 = 48 (K2 report, section 2.3)."""
        return self.n_routed_experts / self.num_experts_per_tok


def check_mixer(model: ModelConfig) -> None:
    """The mixer's keys are all there, those of other mixers are not, and heads come out even."""
    for kind, required in REQUIRED_BY_MIXER.items():
        for name in (*required, *OPTIONAL_BY_MIXER[kind]):
            value = getattr(model, name)
            if kind == model.mixer and value is None and name in required:
                meaning = type(model).__dataclass_fields__[name].metadata["doc"]
                remedy = f"give model.{name}: {meaning}"
                raise ConfigError(f"model.{name}", "(missing)", "must be given", remedy)
            if kind != model.mixer and value is not None:
                raise ConfigError(
                    f"model.{name}",
                    value,
                    f"belongs to model.mixer={kind}, not to {model.mixer}",
                    f"set model.{name}=null, or model.mixer={kind}",
                )
    if model.mixer == "grouped_query":
        _check_groups(model)
    elif (model.qk_rope_head_dim or 0) % 2:
        raise ConfigError(
            "model.qk_rope_head_dim", model.qk_rope_head_dim, "must be even: rotary features come in pairs"
        )


def _check_groups(model: ModelConfig) -> None:
    heads, groups = model.num_attention_heads, model.num_key_value_heads or 1
    if heads % groups:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            "model.num_key_value_heads",
            groups,
            f"must divide model.num_attention_heads={heads}",
            f"use one of {divisors}",
        )
    rotated = model.rotated_features
    if rotated < 2 or rotated % 2:
        raise ConfigError(
            "model.partial_rotary_factor",
            model.partial_rotary_factor,
            f"rotates {rotated} of model.head_dim={model.head_dim} features, which must be even and "
            "at least 2: rotary features come in pairs",
            "use null for all of an even model.head_dim, or another share",
        )


def check_routing(model: ModelConfig) -> None:
    """Top-k must be choosable: within the experts, and within the groups a token may use."""
    experts, top_k, groups = model.n_routed_experts, model.num_experts_per_tok, model.n_group
    if top_k > experts:
        raise ConfigError(
            "model.num_experts_per_tok",
            top_k,
            f"cannot exceed model.n_routed_experts={experts}",
            f"use at most {experts}",
        )
    if experts % groups:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ConfigError(
            "model.n_group",
            groups,
            f"must divide model.n_routed_experts={experts}",
            f"use one of {', '.join(map(str, divisors[:12]))}",
        )
    if model.topk_group > groups:
        raise ConfigError("model.topk_group", model.topk_group, f"cannot exceed model.n_group={groups}")
    if groups > 1 and experts // groups < 2:
        raise ConfigError(
            "model.n_group",
            groups,
            f"leaves {experts // groups} expert a group, but a group is ranked by its two best",
            f"use at most {experts // 2} groups",
        )
    if top_k > experts // groups * model.topk_group:
        raise ConfigError(
            "model.num_experts_per_tok",
            top_k,
            f"the {model.topk_group} chosen groups hold only {experts // groups * model.topk_group} experts",
            "raise model.topk_group or lower model.n_group",
        )
