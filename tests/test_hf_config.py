"""config.json of Hugging Face: ours has what each reader takes, and what theirs says is read or refused."""

import dataclasses
import itertools

import pytest

from gqa_jax.config import ModelConfig
from gqa_jax.conversion import hf_config
from gqa_jax.errors import ConfigError
from tests.test_own_model import LLAMA_32_1B, MISTRAL

LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 32.0, "rope_original_context": 8192}
LINEAR = {"rope_scaling": "linear", "rope_factor": 4.0}
SCALED = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192}
_SHAPE = (
    "architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "vocab_size rms_norm_eps tie_word_embeddings max_position_embeddings"
)

#: What each reader takes from config.json, and would else have another value of: by their sources, of the versions named.
READERS = {
    "transformers 5.24.0": f"{_SHAPE} head_dim hidden_act rope_parameters dtype bos_token_id eos_token_id initializer_range",
    "transformers 4": f"{_SHAPE} head_dim hidden_act rope_theta rope_scaling torch_dtype bos_token_id eos_token_id",
    "mlx-lm 0.32.2": f"{_SHAPE} head_dim rope_theta rope_scaling eos_token_id",
    "SGLang 0.5.23": f"{_SHAPE} head_dim hidden_act rope_parameters dtype eos_token_id",
    "vLLM 0.24": f"{_SHAPE} head_dim hidden_act rope_parameters dtype eos_token_id bos_token_id",
    "llama.cpp 2026": f"{_SHAPE} head_dim rope_parameters rope_scaling eos_token_id",
}


def config(**changes):
    return ModelConfig(**{"n_layers": 3, "d_model": 256, "n_heads": 8, "n_kv_heads": 2, "vocab_size": 320} | changes)


def read(theirs=LLAMA_32_1B, dtype="bfloat16", **changes):
    values = {name: value for name, value in (theirs | changes).items() if value != "missing"}
    return hf_config.model_of(values, "mine/config.json", dtype)


@pytest.mark.parametrize(
    ("changes", "untied", "rope"),
    [*itertools.product(({}, {"d_model": 321, "n_heads": 5, "n_kv_heads": 1}), (False, True), ({}, LINEAR, LLAMA3))],
)
def test_a_model_is_read_back_from_the_file_that_is_written_of_it(changes, untied, rope):
    model = config(untied=untied, dtype="float32", rope_theta=12_345.0, norm_eps=1e-5, init_std=0.05, **changes, **rope)
    written = hf_config.of_model(model, "float32", 4096, 256)
    assert hf_config.model_of(written, "", "bfloat16") == model
    assert (hf_config.context_of(written), hf_config.eos_of(written)) == (4096, [256])
    assert written["model_type"] == ("mistral" if changes else "llama")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "changes", [{}, {"d_model": 321, "n_heads": 5, "n_kv_heads": 1}, LLAMA3], ids=["llama", "mistral", "llama3"]
)
def test_every_reader_finds_what_it_takes(reader, changes):
    model = config(**changes)
    written = hf_config.of_model(model, "bfloat16", 131_072, 256)
    assert set(READERS[reader].split()) <= written.keys()
    assert (written["rope_theta"], written["dtype"], written["torch_dtype"]) == (500_000.0, "bfloat16", "bfloat16")
    assert written["rope_parameters"]["rope_theta"] == 500_000.0
    assert written["bos_token_id"] is None  # else Llama's default, 1, an ordinary byte of ours
    if changes == LLAMA3:
        assert written["rope_scaling"] == {"rope_type": "llama3"} | SCALED
        assert written["rope_parameters"] == {"rope_type": "llama3", "rope_theta": 500_000.0} | SCALED
        assert written["original_max_position_embeddings"] == 8192  # where llama.cpp looks
    elif "d_model" in changes:
        assert written["sliding_window"] is None
    else:
        assert written["attention_bias"] is written["mlp_bias"] is False


def test_published_models_are_read():
    model = read(rope_scaling={"rope_type": "llama3"} | SCALED, rope_theta=500_000.0, torch_dtype="bfloat16")
    assert model == ModelConfig(
        16, 2048, 32, 8, 64, 8192, 128_256, False, norm_eps=1e-5, dtype="bfloat16", rope_theta=500_000.0,
        rope_low_freq_factor=1.0, rope_high_freq_factor=4.0, **LLAMA3,
    )  # fmt: skip
    kanana = read(hidden_size=1792, num_attention_heads=24, head_dim=128, rope_scaling=None)  # transformers 5 refuses it
    assert (kanana.d_model, kanana.n_heads, kanana.head_dim) == (1792, 24, 128)
    mistral = read(MISTRAL, rope_theta=1e6)
    assert (mistral.rope_theta, mistral.untied) == (1e6, True)
    ministral = MISTRAL | {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "sliding_window": 4096}
    assert read(ministral, layer_types=["full_attention"] * 40) == dataclasses.replace(mistral, rope_theta=10_000.0)


def test_the_dtype_is_that_of_the_file_or_of_its_arrays():
    plain = {"rope_scaling": None}
    assert read(**plain, dtype="float32").dtype == "float32"
    assert hf_config.model_of(LLAMA_32_1B | plain | {"torch_dtype": "float16"}, "", "bfloat16").dtype == "float32"
    assert hf_config.model_of(LLAMA_32_1B | plain | {"dtype": "bfloat16"}, "", "float32").dtype == "bfloat16"
    assert hf_config.model_of(LLAMA_32_1B | plain, "", "float16").dtype == "float32"
    assert {read(**plain).param_dtype} == {"float32"}


def test_the_base_is_where_versions_4_and_5_have_it():
    for changes, base in (
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 7e5),
        ({"rope_theta": 7e5}, 7e5),
        ({"rope_theta": 7e5, "rope_parameters": {"rope_theta": 7e5}}, 7e5),
        ({}, 10_000.0),
    ):
        assert read(rope_scaling=None, **changes).rope_theta == base
    linear = read(rope_scaling={"type": "linear", "factor": 4})
    assert (linear.rope_scaling, linear.rope_factor) == ("linear", 4.0)
    top = read(
        rope_scaling={"rope_type": "llama3"} | {k: v for k, v in SCALED.items() if k[0] != "o"},
        original_max_position_embeddings=4096,
    )
    assert top.rope_original_context == 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 'rope_scaling = .*: RoPE of the kind "yarn"'),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 'RoPE of the kind "dynamic"'),
        ({"rope_parameters": {"rope_type": "longrope"}, "rope_scaling": None}, 'rope_parameters = .*kind "longrope"'),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is null: it must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0: it must be a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 32}}, "a RoPE of the kind linear has no beta_fast"),
        ({"rope_scaling": {"rope_type": "linear", "type": "llama3"}}, "type and rope_type 'linear' differ"),
        (
            {"rope_scaling": None, "rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
            "rope_theta is 5.0 here, and 6.0 elsewhere",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            "one RoPE, the same in all layers",
        ),
        ({"rope_scaling": None, "partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: heads of which a part is rotated"),
        ({"rope_scaling": None, "rope_theta": "10000"}, 'rope_theta is "10000": it must be a number above 0'),
        ({"rope_scaling": None, "quantization_config": {"bits": 4}}, "quantization_config = .*: quantized weights"),
        ({"rope_scaling": None, "pretraining_tp": 2}, "pretraining_tp = 2: products in slices"),
        ({"rope_scaling": None, "use_qk_norm": True}, "use_qk_norm = true: norms of queries and keys"),
        ({"rope_scaling": None, "no_rope_layers": [1, 0]}, "no_rope_layers = .*: layers that differ"),
        ({"rope_scaling": None, "attention_bias": True}, "attention_bias = true: biases"),
        ({"rope_scaling": None, "hidden_act": "gelu"}, 'hidden_act = "gelu": our models have silu'),
        ({"rope_scaling": None, "rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05: it must be a number above 0"),
        (
            {"rope_scaling": None, "torch_dtype": "float8_e4m3fn"},
            'torch_dtype = "float8_e4m3fn": use float16, float32, bfloat16',
        ),
        ({"rope_scaling": None, "head_dim": "missing", "num_attention_heads": 24}, "it does not divide hidden_size = 2048"),
        ({"rope_scaling": None, "head_dim": 65}, r"model\.head_dim = 65: must be even"),
        ({"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}, 'model_type = "gemma3_text": only models'),
    ],
)
def test_what_would_compute_otherwise_is_refused_by_its_field(changes, said):
    with pytest.raises(ConfigError, match=f"^mine/config.json: .*{said}"):
        read(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sliding_window": "missing"}, "sliding_window is missing: a Mistral without that field has a window of 4,096"),
        ({"sliding_window": 4096}, "sliding_window = 4096: attention to a window"),
        ({"num_key_value_heads": "missing"}, "num_key_value_heads is missing"),
        (
            {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "layer_types": ["sliding_attention"]},
            "layer_types = .*: layers that differ",
        ),
        ({"model_type": "ministral3", "architectures": ["Ministral3ForCausalLM"]}, 'model_type = "ministral3"'),
    ],
)
def test_windows_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        read(MISTRAL, **changes)


def test_several_ends_of_an_answer_and_none():
    assert hf_config.eos_of({"eos_token_id": [128_001, 128_009]}) == [128_001, 128_009]
    assert hf_config.eos_of({"eos_token_id": None}) == hf_config.eos_of({}) == []
    assert hf_config.context_of({}) is None
