"""Models that somebody has: what a config.json says, what is refused by which field, and the table of public models."""

import json

import pytest

from gqa_jax import costs
from gqa_jax.errors import ConfigError
from gqa_jax.search import own_model

#: Parameters in the published weights: the sum over the tensors of the safetensors files.
PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200,
    "yi-6b": 6_061_035_520,
    "yi-34b": 34_388_917_248,
}

LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "rope_type": "llama3"},
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 5120,
    "intermediate_size": 14336,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}


def read(**changes):
    config = {name: value for name, value in (LLAMA_32_1B | changes).items() if value != "missing"}
    return own_model.from_config(config, "mine", "mine/config.json")


def test_the_table_counts_what_was_published():
    assert {name: one.total_params for name, one in own_model.PUBLIC.items()} == PUBLISHED


def test_shapes_are_tied_as_those_that_they_are_compared_with():
    """Serving is told of an untied head for all of them (`gqa_jax.search.own_answer`)."""
    assert {one.untied for one in own_model.PUBLIC.values()} == {True, False}
    assert not any(one.shape.untied for one in own_model.PUBLIC.values())


def test_a_config_is_the_same_model_as_the_table_has():
    assert read().shape == own_model.PUBLIC["llama-3.2-1b"].shape
    assert not read().untied
    nemo = own_model.from_config(MISTRAL, "nemo", "config.json")
    assert (nemo.shape, nemo.untied) == (own_model.PUBLIC["mistral-nemo-12b"].shape, True)
    assert not nemo.fills_width
    assert read().fills_width


def test_n_is_counted_as_the_laws_count():
    own = read()
    assert own.n_params("exact") - own.n_params("figures") == (2 * 16 + 1) * 2048
    assert own.n_params("figures") == 16 * (2 * 2048 * 64 * (32 + 8) + 3 * 2048 * 8192)
    assert own.total_params == costs.count_params(own.shape, "exact").total
    assert own.ratio == 128


def test_heads_of_another_size_have_the_same_widths():
    assert own_model.PUBLIC["llama-3.1-8b"].heads_of(64) == (64, 16)
    assert own_model.PUBLIC["llama-3.2-1b"].heads_of(128) == (16, 4)
    assert read(head_dim=80).heads_of(64) == (40, 10)


def test_defaults_are_those_of_the_class():
    shape = read(head_dim="missing", num_key_value_heads="missing", tie_word_embeddings="missing").shape
    assert (shape.head_dim, shape.n_kv_heads) == (64, 32)
    assert read(tie_word_embeddings="missing").untied
    assert read(head_dim=None, num_attention_heads=24, num_key_value_heads=8).shape.head_dim == 85  # 2048 // 24
    assert read(hidden_size=1792, num_attention_heads=24, head_dim=128).shape.head_dim == 128  # does not divide


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "qwen3"}, 'model_type = "qwen3": only models of the Llama class \\(llama, mistral, ministral\\) are'),
        ({"model_type": "missing"}, "model_type is missing"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures = \[\"LlamaFor.*must be a \['LlamaForCausalLM'",
        ),
        ({"sliding_window": 4096}, "sliding_window = 4096: attention to a window"),
        ({"attention_bias": True}, "attention_bias = true: biases"),
        ({"mlp_bias": True}, "mlp_bias = true: biases"),
        ({"num_local_experts": 8}, "num_local_experts = 8: a mixture of experts"),
        ({"kv_lora_rank": 512}, "kv_lora_rank = 512: latent attention"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types = .*: layers that differ"),
        ({"layer_types": "full_attention"}, "layer_types = "),
        ({"hidden_act": "relu"}, 'hidden_act = "relu": our models have silu'),
        ({"hidden_size": "missing"}, "hidden_size is missing: a model can't be told without it"),
        ({"vocab_size": None}, "vocab_size = null: it must be a whole number above 0"),
        ({"num_hidden_layers": 16.0}, "num_hidden_layers = 16.0: it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = true: it must be a whole number"),
        ({"intermediate_size": [8192, 4096]}, r"intermediate_size = \[8192, 4096\]: it must be a whole number"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: it must be a whole number above 0"),
        ({"num_attention_heads": "32"}, 'num_attention_heads = "32": it must be a whole number'),
        ({"num_key_value_heads": 5}, "num_key_value_heads = 5: it must divide num_attention_heads = 32"),
        (
            {"num_attention_heads": 4096, "num_key_value_heads": 8, "head_dim": None},
            "num_attention_heads = 4096: more than",
        ),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings = "yes": it must be true or false'),
    ],
)
def test_another_kind_of_model_is_refused_by_its_field(changes, said):
    with pytest.raises(ConfigError, match=f"^mine/config.json: {said}"):
        read(**changes)


@pytest.mark.parametrize(("field", "said"), [("sliding_window", "a window of 4,096"), ("num_key_value_heads", "can't be told")])
def test_a_mistral_has_other_defaults(field, said):
    """Without these fields transformers gives a Mistral a window of 4,096 and 8 key/value heads."""
    config = {name: value for name, value in MISTRAL.items() if name != field}
    with pytest.raises(ConfigError, match=f"{field} is missing: .*{said}"):
        own_model.from_config(config, "m", "config.json")


def test_layers_that_all_see_everything_are_like_others():
    assert read(layer_types=["full_attention"] * 16).shape == read().shape


def test_a_file_and_its_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"my-model: the folder holds no config\.json"):
        own_model.load(folder)
    (folder / "config.json").write_text(json.dumps(LLAMA_32_1B))
    for path in (folder, folder / "config.json", str(folder)):
        own = own_model.load(path)
        assert (own.name, own.shape, own.source) == ("my-model", read().shape, str(folder / "config.json"))
    (tmp_path / "other.json").write_text(json.dumps(LLAMA_32_1B))
    assert own_model.load(tmp_path / "other.json").name == "other"
    hub = tmp_path / "models--meta-llama--Llama-3.2-1B" / "snapshots" / "abc"
    hub.mkdir(parents=True)
    (hub / "config.json").write_text(json.dumps(LLAMA_32_1B))
    assert own_model.load(hub).name == "Llama-3.2-1B"


@pytest.mark.parametrize("text", ["{", "", "\udcff", "[1, 2]", '"llama"', "null", "NaN", "[" * 100_000])
def test_what_is_no_model_is_said(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"config\.json: it (is no JSON file|holds no fields)"):
        own_model.load(path)


def test_names_are_found_as_people_write_them():
    for text in ("llama-3.1-8b", "Llama 3.1 8B", "meta-llama/Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-8B-Instruct"):
        assert own_model.load(text).name == "llama-3.1-8b"
    assert own_model.load("meta-llama/Llama-2-7b-hf").name == "llama-2-7b"
    with pytest.raises(ConfigError, match=r"llama-3\.1-9b: neither .*did you mean llama-3\.1-8b\? \(there are smollm2-135m, "):
        own_model.load("llama-3.1-9b")
    with pytest.raises(ConfigError, match=r"gpt-oss: neither .*nor a model of the table \(there are .*yi-34b\)"):
        own_model.load("gpt-oss")
    with pytest.raises(ConfigError, match=r"^no/such/config\.json: there is no such file"):
        own_model.load("no/such/config.json")
