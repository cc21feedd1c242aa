"""config.json of Hugging Face for models of the Llama class: what one describes, and the one of a model of ours.

Ours are pre-norm, with a gated feed-forward network of three matrices, grouped queries, rotary positions, no biases, and every
layer alike. What is not of that kind is refused by the field that says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from gqa_jax.config import DTYPES, ModelConfig
from gqa_jax.costs import Shape
from gqa_jax.errors import ConfigError, first_line

CONFIG = "config.json"
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"}
DEFAULT_THETA = 10_000.0  # of all three classes
_ONLY = f"only models of the Llama class ({', '.join(CLASSES)}) are of the same kind as ours"

#: What makes another kind of model, and the fields that say so unless they are missing, null, false, 0 or empty.
_OTHER_KINDS = {
    "biases, which our models have not": "attention_bias mlp_bias qkv_bias use_bias",
    "a mixture of experts": "num_local_experts num_experts n_routed_experts num_experts_per_tok moe_intermediate_size",
    "latent attention (MLA): its cache holds no heads": "kv_lora_rank q_lora_rank qk_rope_head_dim v_head_dim",
    "attention to something that is no text": "cross_attention_layers",
    "further layers that predict several tokens": "num_nextn_predict_layers",
    "layers that differ": "block_configs no_rope_layers",
}
#: The same of what changes a model's logits and not what it costs.
_OTHER_NUMBERS = {
    "quantized weights": "quantization_config compression_config",
    "norms of queries and keys": "use_qk_norm qk_norm qk_layernorm",
    "logits that are capped": "attn_logit_softcapping final_logit_softcapping",
    "attention in chunks": "attention_chunk_size",
    "queries scaled by their position": "attn_temperature_tuning llama_4_scaling_beta",
}
#: Names in a config.json of what our RoPE scalings take (`gqa_jax.config.ROPE_SCALINGS`).
_ROPE = {
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_context": "original_max_position_embeddings",
}
_SCALINGS = {"default": (), "linear": ("rope_factor",), "llama3": tuple(_ROPE)}


def read(folder: Path) -> dict[str, Any]:
    """The fields of the config.json in a folder. Raises ConfigError: there is none, or it is no JSON."""
    path = folder / CONFIG
    if not path.is_file():
        raise ConfigError(f"{folder}: the folder holds no {CONFIG}")
    return read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """The fields of a file. Raises ConfigError: it can't be read, or holds no fields."""
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: it is no JSON file of a model: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: it holds no fields of a model, but a {type(values).__name__}")
    return values


def shape_of(config: Mapping[str, Any], source: str) -> Shape:
    """Layers, widths, heads and vocabulary of the model that the fields describe.

    Raises ConfigError, naming the field, its value and what is wrong; `source` is what it begins with.
    """
    return _Fields(config, source).shape()


def model_of(config: Mapping[str, Any], source: str, dtype: str) -> ModelConfig:
    """The configuration that computes what the fields describe, parameters in float32.

    Args:
      dtype: of the arrays of the model, and of its computation where the fields name none; float16 computes in float32.
    Raises:
      ConfigError: as `shape_of`, and for what would change its logits: another kind of RoPE, a quantized model.
    """
    return _Fields(config, source).model(dtype)


def context_of(config: Mapping[str, Any]) -> int | None:
    """Tokens of the context that a model is for; None: not said."""
    value = config.get("max_position_embeddings")
    return value if type(value) is int and value >= 1 else None


def eos_of(config: Mapping[str, Any]) -> list[int]:
    """The ids that end an answer, the end of a document first; none: not said."""
    value = config.get("eos_token_id")
    return [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]


def of_model(model: ModelConfig, dtype: str, context: int | None, eos_id: int | list[int] | None) -> dict[str, Any]:
    """The fields of a model of ours.

    Llama where the query heads divide the width, which its class demands; else Mistral without a window, the same model. What
    readers take from different places is in all of them: the RoPE base and its scaling, the dtype (docs/elsewhere.md).

    Args:
      dtype: of the arrays.
      context: tokens that the model was trained at; None: not known, and 2,048, Llama's default, is written.
      eos_id: what ends an answer; None: not known.
    """
    kind = "mistral" if model.d_model % model.n_heads else "llama"
    rope = {_ROPE[name]: getattr(model, name) for name in _SCALINGS[model.rope_scaling or "default"]}
    scaling = {"rope_type": model.rope_scaling or "default", **rope}
    scaled = model.rope_scaling is not None
    original = {name: rope[name] for name in ("original_max_position_embeddings",) if name in rope}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": "silu",
        "tie_word_embeddings": not model.untied,
        "max_position_embeddings": 2048 if context is None else context,
        "rope_parameters": scaling | {"rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": scaling if scaled else None,
        **original,
        "initializer_range": model.init_std,
        "attention_dropout": 0.0,
        "dtype": dtype,
        "torch_dtype": dtype,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "use_cache": True,
        **({"sliding_window": None} if kind == "mistral" else {"attention_bias": False, "mlp_bias": False}),
    }


class _Fields:
    """The fields of a config.json, read one by one; an error names the field, its value and what is wrong."""

    def __init__(self, config: Mapping[str, Any], source: str):
        if not isinstance(config, Mapping):
            raise ConfigError(f"{source}: it holds no fields of a model, but a {type(config).__name__}")
        self.config, self.source = config, source

    def wrong(self, field: str, why: str) -> NoReturn:
        said = f"{field} = {_short(self.config[field])}" if field in self.config else f"{field} is missing"
        raise ConfigError(f"{self.source}: {said}: {why}")

    def shape(self) -> Shape:
        config, kind = self.config, self.config.get("model_type")
        if kind not in CLASSES:
            self.wrong("model_type", _ONLY)
        if (named := config.get("architectures")) is not None and named != [CLASSES[kind]]:
            self.wrong("architectures", f"a model_type of {kind} must be a [{CLASSES[kind]!r}]")
        self.refuse(_OTHER_KINDS)
        self.check_windows(kind)
        if config.get("hidden_act", "silu") not in ("silu", "swish"):
            self.wrong("hidden_act", "our models have silu")
        d_model, n_heads = self.whole("hidden_size"), self.whole("num_attention_heads")
        n_kv_heads = self.whole("num_key_value_heads", n_heads if kind == "llama" else None)  # a Mistral's default is 8
        if n_heads % n_kv_heads:
            self.wrong("num_key_value_heads", f"it must divide num_attention_heads = {n_heads}")
        if config.get("head_dim") is None and n_heads > d_model:
            self.wrong("num_attention_heads", f"more than hidden_size = {d_model}, and no head_dim")
        return Shape(
            n_layers=self.whole("num_hidden_layers"),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=self.whole("head_dim", d_model // n_heads),
            d_ff=self.whole("intermediate_size"),
            vocab_size=self.whole("vocab_size"),
            untied=not self.flag("tie_word_embeddings", False),
        )

    def refuse(self, kinds: Mapping[str, str]) -> None:
        for what, field in ((what, field) for what, fields in kinds.items() for field in fields.split()):
            if self.config.get(field) not in (None, False, 0, "", [], {}):
                self.wrong(field, f"{what}; {_ONLY}")

    def check_windows(self, kind: str) -> None:
        layers = self.config.get("layer_types")
        if layers is not None and (not isinstance(layers, list) or any(one != "full_attention" for one in layers)):
            self.wrong("layer_types", "layers that differ; in our models all layers see the whole context")
        if kind == "ministral" and layers:
            return  # that is how it says so
        if kind != "llama" and "sliding_window" not in self.config:
            self.wrong("sliding_window", "a Mistral without that field has a window of 4,096; write null if yours has none")
        if self.config.get("sliding_window") not in (None, False, 0):
            self.wrong("sliding_window", f"attention to a window: its cache does not grow with the context; {_ONLY}")

    def model(self, dtype: str) -> ModelConfig:
        self.refuse(_OTHER_NUMBERS)
        shape = self.shape()
        if self.config.get("pretraining_tp") not in (None, 0, 1):
            self.wrong("pretraining_tp", "products in slices, which round otherwise: only 1 is taken")
        if self.config.get("head_dim") is None and shape.d_model % shape.n_heads:
            self.wrong("num_attention_heads", f"it does not divide hidden_size = {shape.d_model}, and there is no head_dim")
        named = next((self.config[name] for name in ("dtype", "torch_dtype") if self.config.get(name) is not None), dtype)
        named = str(named).removeprefix("torch.")
        if named not in (*DTYPES, "float16"):
            self.wrong("dtype" if self.config.get("dtype") else "torch_dtype", f"use float16, {', '.join(DTYPES)}")
        try:
            return ModelConfig(
                **vars(shape),
                **self.rope(),
                norm_eps=self.number("rms_norm_eps", 1e-6),
                init_std=self.number("initializer_range", 0.02),
                dtype="float32" if named == "float16" else named,
            )
        except ConfigError as error:
            raise error if str(error).startswith(self.source) else ConfigError(f"{self.source}: {error}") from error

    def rope(self) -> dict[str, Any]:
        """Base and scaling of the rotations, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
        groups = {}
        for field in ("rope_parameters", "rope_scaling"):
            if (values := self.config.get(field)) is None:
                continue
            if not isinstance(values, Mapping) or any(isinstance(value, Mapping) for value in values.values()):
                self.wrong(field, "it must be an object with the fields of one RoPE, the same in all layers")
            groups[field] = {name: value for name, value in values.items() if value is not None}
        merged: dict[str, Any] = {}
        top = {name: self.config[name] for name in ("rope_theta", "partial_rotary_factor") if self.config.get(name) is not None}
        for field, values in (*groups.items(), ("", top)):
            kind = values.pop("type", None)
            if kind is not None and values.setdefault("rope_type", kind) != kind:
                self.wrong(field, f"type and rope_type {values['rope_type']!r} differ")
            for name, value in values.items():
                if merged.setdefault(name, value) != value:
                    self.wrong(field or name, f"{name} is {value} here, and {merged[name]} elsewhere in the file")
        field = next(iter(groups), "rope_scaling")
        kind, theta = merged.pop("rope_type", "default"), merged.pop("rope_theta", DEFAULT_THETA)
        if kind not in _SCALINGS:
            self.wrong(field, f"RoPE of the kind {_short(kind)}: {', '.join(_SCALINGS)} are taken")
        if merged.pop("partial_rotary_factor", 1) != 1:
            self.wrong(field if field in groups else "partial_rotary_factor", "heads of which a part is rotated")
        found = {"rope_theta": self.positive(field, "rope_theta", theta)}
        for ours in _SCALINGS[kind]:
            theirs = _ROPE[ours]
            value = merged.pop(theirs, self.config.get(theirs))
            found[ours] = self.positive(field, theirs, value)
            if ours == "rope_original_context":
                found[ours] = int(found[ours])
        merged.pop("original_max_position_embeddings", None)  # of no effect elsewhere
        if merged:
            self.wrong(field, f"a RoPE of the kind {kind} has no {', '.join(merged)}")
        return found if kind == "default" else found | {"rope_scaling": kind}

    def positive(self, field: str, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self.wrong(field, f"{name} is {_short(value)}: it must be a number above 0")
        return float(value)

    def number(self, field: str, default: float) -> float:
        value = self.config.get(field)
        return default if value is None else self.positive(field, field, value)

    def whole(self, field: str, default: int | None = None) -> int:
        value = self.config.get(field)
        if value is None and default is not None:
            return default
        if field not in self.config:
            self.wrong(field, "a model can't be told without it")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.wrong(field, "it must be a whole number above 0")
        return value

    def flag(self, field: str, default: bool) -> bool:
        value = self.config.get(field, default)
        if not isinstance(value, bool):
            self.wrong(field, "it must be true or false")
        return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
