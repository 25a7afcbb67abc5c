"""config.json of a Hugging Face model to ModelConfig and back.

Read are the published files of K2 (model_type kimi_k2), DeepSeek-V3 and Moonlight (deepseek_v3),
files of GLM-4-MoE (glm4_moe) without biases in attention and norms of queries and keys, and what
transformers 4 and 5 save: version 4 has `rope_theta` and `rope_scaling`, version 5 one
`rope_parameters`. Written is deepseek_v3 or glm4_moe with both spellings, which transformers reads
without remote code. A feature this program does not have is an error that names its field; a shape
or routing field that is absent is one too, for the defaults of the families' own code differ.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from k2train.config.convert import from_dict
from k2train.config.errors import ConfigError
from k2train.config.model import OPTIONAL_BY_MIXER, REQUIRED_BY_MIXER, MixerKind, ModelConfig, YarnConfig

CONFIG_FILE = "config.json"
MODEL_TYPES: Mapping[str, MixerKind] = {
    "deepseek_v3": "latent",
    "kimi_k2": "latent",
    "glm4_moe": "grouped_query",
}
"""The mixer of every model_type."""
_Fixed = Mapping[str, tuple[tuple[Any, ...], str]]
_FIXED: _Fixed = {
    "attention_bias": ((False, None), "biases in attention are not supported"),
    "hidden_act": (("silu",), "only SwiGLU, hidden_act=silu, is supported"),
    "tie_word_embeddings": ((False,), "embedding and head must be separate tensors"),
    "attention_dropout": ((0, None), "dropout is not supported"),
}
"""Fields that switch on something this model does not have.

The values that leave it off, and what the others mean.
"""


@dataclasses.dataclass(frozen=True)
class _Family:
    """What is written for a mixer, and which further fields must leave something off."""

    model_type: str
    architecture: str
    fixed: _Fixed


_FAMILIES: Mapping[MixerKind, _Family] = {
    "latent": _Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {
            **_FIXED,
            "scoring_func": (("sigmoid",), "only sigmoid router scores are supported"),
            "topk_method": (
                ("noaux_tc",),
                "only the correction-bias choice of experts, noaux_tc, is supported",
            ),
            "moe_layer_freq": (
                (1,),
                "every layer after the dense ones must be a MoE layer, moe_layer_freq=1",
            ),
            "rope_interleave": ((True, None), "rotary features must be interleaved in pairs"),
        },
    ),
    "grouped_query": _Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**_FIXED, "use_qk_norm": ((False, None), "norms of queries and keys are not supported")},
    ),
}
# Special tokens: not part of the architecture, carried through import and export as they are.
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Keys of rope_scaling / rope_parameters that must be absent or hold one of these values.
_ROPE_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_factor": (None,),
    "truncate": (None, True),
}
_ROPE_KNOWN = {
    "type",
    "rope_type",
    "rope_theta",
    "partial_rotary_factor",
    *_ROPE_FIXED,
    *(f.name for f in dataclasses.fields(YarnConfig)),
}


def read_config_file(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face model directory. Raises ConfigError where it is missing or not
    JSON."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise ConfigError(
            "DIR",
            directory,
            f"there is no {CONFIG_FILE} in it",
            "give the directory that holds config.json and the safetensors files",
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("DIR", path, f"cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError("DIR", path, "must hold a JSON object")
    return data


def to_model_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The architecture that a config.json describes. Raises ConfigError for what this program does
    not support."""
    mixer = _check_supported(hf)
    if mixer == "grouped_query" and {"hidden_size", "num_attention_heads"} <= hf.keys():
        # transformers derives the width of a head where the file has none.
        hf = {"head_dim": hf["hidden_size"] // hf["num_attention_heads"], **hf}
    values: dict[str, Any] = dict.fromkeys(_foreign_fields(mixer)) | {"mixer": mixer}
    from_rope = {"mixer", "rope_theta", "rope_scaling", "partial_rotary_factor"}
    for field in dataclasses.fields(ModelConfig):
        if field.name in from_rope or field.name in _foreign_fields(mixer):
            continue
        if field.name in hf:
            values[field.name] = hf[field.name]
        elif field.name not in ("max_position_embeddings", "initializer_range"):
            raise ConfigError(
                f"{CONFIG_FILE}: {field.name}", "(missing)", "must be given", field.metadata["doc"]
            )
    for name, absent in (("n_group", 1), ("topk_group", 1), ("n_shared_experts", 0)):
        if values[name] is None:
            values[name] = absent
    values["rope_theta"], values["rope_scaling"] = _read_rope(hf, mixer)
    if mixer == "grouped_query":
        values["partial_rotary_factor"] = _rotary_share(hf)
    return from_dict(ModelConfig, values, "model")


def to_hf_config(model: ModelConfig, dtype: str, tokens: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a model; dtype is torch's name ("bfloat16") for from_pretrained's
    default."""
    family = _FAMILIES[model.mixer]
    values: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "dtype": dtype,
        "num_key_value_heads": model.num_attention_heads,
        "num_nextn_predict_layers": 0,
        "ep_size": 1,
        "use_cache": True,
    }
    values |= {name: allowed[0] for name, (allowed, _) in family.fixed.items()}
    # Written even where unknown: transformers' defaults would declare tokens 0 and 1 special.
    values |= {name: (tokens or {}).get(name) for name in TOKEN_FIELDS}
    foreign = _foreign_fields(model.mixer) | {"mixer", "rope_scaling"}
    described = dataclasses.asdict(model)
    yarn = described["rope_scaling"]
    values |= {name: value for name, value in described.items() if name not in foreign}
    scaling = {"type": "yarn", "rope_type": "yarn", **yarn} if yarn else None
    parameters = {"rope_type": "yarn", **yarn} if yarn else {"rope_type": "default"}
    values["rope_scaling"] = scaling
    values["rope_parameters"] = {"rope_theta": model.rope_theta, **parameters}
    if model.mixer == "grouped_query":
        # Written even where all features are rotated: transformers' default is half of them.
        values["partial_rotary_factor"] = model.partial_rotary_factor or 1.0
        values["rope_parameters"]["partial_rotary_factor"] = values["partial_rotary_factor"]
    return dict(sorted(values.items()))


def fp8_block_size(hf: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that share one scale in the published FP8 form (128 x 128 unless config.json
    says otherwise).

    Raises ConfigError for a quantisation other than block FP8.
    """
    quantization = hf.get("quantization_config")
    if not quantization:
        return (128, 128)
    field = f"{CONFIG_FILE}: quantization_config"
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size", (128, 128))
    if method != "fp8" or quantization.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(
            f"{field}.quant_method",
            method,
            "only block FP8 (quant_method fp8, fmt e4m3) can be read",
            "take the BF16 or block-FP8 form of the checkpoint",
        )
    if not (
        isinstance(block, (list, tuple))
        and len(block) == 2
        and all(isinstance(n, int) and n > 0 for n in block)
    ):
        raise ConfigError(
            f"{field}.weight_block_size", block, "must be two positive whole numbers, rows and columns"
        )
    return block[0], block[1]


def _foreign_fields(mixer: MixerKind) -> set[str]:
    """Keys of `model` that belong to other mixers."""
    kinds = [kind for kind in REQUIRED_BY_MIXER if kind != mixer]
    return {name for kind in kinds for name in (*REQUIRED_BY_MIXER[kind], *OPTIONAL_BY_MIXER[kind])}


def _check_supported(hf: Mapping[str, Any]) -> MixerKind:
    """The mixer of the file's model."""
    mixer = MODEL_TYPES.get(str(hf.get("model_type")))
    if mixer is None:
        raise ConfigError(
            f"{CONFIG_FILE}: model_type",
            hf.get("model_type", "(missing)"),
            f"must be one of {', '.join(MODEL_TYPES)}: K2, DeepSeek-V3, Moonlight or GLM-4-MoE",
        )
    for name, (allowed, rule) in _FAMILIES[mixer].fixed.items():
        if name in hf and hf[name] not in allowed:
            raise ConfigError(f"{CONFIG_FILE}: {name}", hf[name], rule)
    heads = hf.get("num_attention_heads")
    if mixer == "latent" and hf.get("num_key_value_heads") not in (None, heads):
        raise ConfigError(
            f"{CONFIG_FILE}: num_key_value_heads",
            hf["num_key_value_heads"],
            f"must equal num_attention_heads={heads}: latent attention has no grouped heads",
        )
    return mixer


def _rotary_share(hf: Mapping[str, Any]) -> float | None:
    """partial_rotary_factor, from either spelling, None for all features; transformers'
    Glm4MoeConfig takes a half where there is none."""
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    given = [place.get("partial_rotary_factor") for place in (rope, hf)]
    share = next((float(value) for value in given if value is not None), 0.5)
    return None if share == 1.0 else share


def _read_rope(hf: Mapping[str, Any], mixer: MixerKind) -> tuple[float, dict[str, Any] | None]:
    """The rotary base and the YaRN section, from either spelling; rope_scaling wins, as it does in
    transformers."""
    field = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    rope = hf.get(field) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{CONFIG_FILE}: {field}", rope, "must be an object or null")
    theta = rope.get("rope_theta") or hf.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kinds = ("default", "yarn") if mixer == "latent" else ("default",)
    if kind not in kinds:
        rule = f"only {' and '.join(kinds)} {'are' if len(kinds) > 1 else 'is'} supported"
        raise ConfigError(f"{CONFIG_FILE}: {field}.rope_type", kind, rule)
    fixed = {**_ROPE_FIXED, **({"partial_rotary_factor": (None, 1)} if mixer == "latent" else {})}
    for name, value in rope.items():
        if name not in _ROPE_KNOWN or value not in fixed.get(name, (value,)):
            raise ConfigError(f"{CONFIG_FILE}: {field}.{name}", value, "is not supported")
    if kind == "default":
        return theta, None
    given = {f.name: rope[f.name] for f in dataclasses.fields(YarnConfig) if rope.get(f.name) is not None}
    if "max_position_embeddings" in hf:
        given.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    return theta, given
