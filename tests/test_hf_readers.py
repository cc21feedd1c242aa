"""What real readers make of folders that are written: mlx-lm, AutoTokenizer, transformers with torch. And how much memory."""

import json
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import gqa_jax
from gqa_jax import model
from gqa_jax.config import ModelConfig
from gqa_jax.conversion import hf, hf_config, hf_tensors
from gqa_jax.data import tokenizer as tokenizing
from gqa_jax.training.parameters import Leaf, abstract, write_import
from tests.needs import TORCH_PYTHON
from tests.test_hf import drawn

READERS = Path(__file__).with_name("hf_readers.py")
#: (query, key/value) heads, width: heads that divide it and that don't, a width that is odd, a group of everything.
FORMS = [((1, 1), 64), ((8, 1), 64), ((32, 8), 256), ((12, 12), 320), ((5, 1), 321), ((4, 2), 72), ((12, 4), 321)]
SCALINGS = (
    {},
    {"rope_scaling": "llama3", "rope_factor": 8.0},
    {"rope_scaling": "linear", "rope_factor": 4.0},
)
TOLERANCE = 1e-4  # of logits, times the larger of 1 and their standard deviation: float32 itself
LONGEST = 131_072
TOKENS = np.random.default_rng(0).integers(0, 320, (2, 24))
POSITIONS = np.sort(np.random.default_rng(1).choice(LONGEST, 24, replace=False))


def ask(python, *arguments, jobs, folder):
    """Runs tests/hf_readers.py, which imports nothing of ours."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([python, READERS, *arguments, folder / "jobs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def models(both=False):
    """Name and configuration of every form of heads; scalings take turns, and so do tied and untied unless it is `both`."""
    for i, ((n_heads, n_kv_heads), d_model) in enumerate(FORMS):
        for untied in (False, True) if both else (i % 2 == 1,):
            scaling = SCALINGS[(i + untied) % 3]
            config = ModelConfig(
                n_layers=2, d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=32, vocab_size=320, untied=untied,
                dtype="float32", **scaling,
            )  # fmt: skip
            yield f"{n_heads}-{n_kv_heads}-{d_model}-{untied}", config


def same(ours, theirs):
    ours = np.asarray(ours)
    assert np.abs(ours - theirs).max() <= TOLERANCE * max(1.0, ours.std())


@partial(jax.jit, static_argnums=0)
def logits(config, params, positions):
    transformer = model.with_params(config, params)
    return transformer.logits(transformer.hidden(transformer.embed(jnp.asarray(TOKENS)), positions)[0])


def write(root, both=False):
    """Folders of all forms, and what their parameters are, by name."""
    found = {}
    np.save(root / "tokens.npy", TOKENS)
    np.save(root / "positions.npy", POSITIONS)
    for name, config in models(both):
        params = drawn(config, std=0.05)
        write_import(root / f"{name}-ours", config, params, provenance="a test", context=LONGEST)
        hf.export(root / f"{name}-ours", root / name)
        found[name] = config, params
    return found


@pytest.mark.needs("mlx-lm")
def test_logits_of_mlx_lm(tmp_path):
    root, found = tmp_path, write(tmp_path)
    jobs = [(str(root / name), str(root / "tokens.npy"), None, str(root / f"{name}-mlx.npy")) for name in found]
    ask(sys.executable, "logits", "mlx", jobs=jobs, folder=root)
    for name, (config, params) in found.items():
        same(logits(config, params, np.arange(24)), np.load(root / f"{name}-mlx.npy"))


@pytest.mark.needs("mlx-lm")
def test_what_others_wrote_comes_in_with_the_logits_of_mlx_lm(tmp_path):
    """Arrays that no code of ours has laid out, of shapes that transformers refuses: heads of 16 that don't fill the width."""
    rng, jobs = np.random.default_rng(0), []
    np.save(tmp_path / "tokens.npy", TOKENS)
    for name, (n, k, d, f) in {"llama": (6, 2, 56, 80), "mistral": (5, 1, 33, 64)}.items():
        shapes = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (16 * n, d),
            "self_attn.k_proj": (16 * k, d),
            "self_attn.v_proj": (16 * k, d),
            "self_attn.o_proj": (d, 16 * n),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        shapes = {f"model.layers.{i}.{part}.weight": shape for i in range(2) for part, shape in shapes.items()}
        shapes |= {"model.embed_tokens.weight": (320, d), "model.norm.weight": (d,), "lm_head.weight": (320, d)}
        arrays = {
            part: (0.2 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32) for part, shape in shapes.items()
        }
        fields = {
            "model_type": name, "architectures": [hf_config.CLASSES[name]], "hidden_size": d, "intermediate_size": f,
            "num_hidden_layers": 2, "num_attention_heads": n, "num_key_value_heads": k, "head_dim": 16, "vocab_size": 320,
            "rms_norm_eps": 1e-5, "rope_theta": 5e4, "tie_word_embeddings": False, "sliding_window": None,
        }  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
        safetensors.numpy.save_file(arrays, tmp_path / name / "model.safetensors")
        hf.read_in(tmp_path / name, tmp_path / f"{name}-in")
        jobs.append((str(tmp_path / name), str(tmp_path / "tokens.npy"), None, str(tmp_path / f"{name}.npy")))
    ask(sys.executable, "logits", "mlx", jobs=jobs, folder=tmp_path)
    for name in ("llama", "mistral"):
        same(np.asarray(gqa_jax.load_model(tmp_path / f"{name}-in").apply(TOKENS)), np.load(tmp_path / f"{name}.npy"))


TEXTS = [
    "Fellow citizens of the Senate",
    "Grüße 👋🏽\n\t x", "a <|endoftext|> b",
    "\0\x1f né", "  two  spaces \n\n ", "", "1234567 don't",
    "".join(map(chr, range(1, 700))), "".join(map(chr, range(0x4E00, 0x4E40))), "".join(map(chr, range(0x1F600, 0x1F650))),
]  # fmt: skip


@pytest.mark.needs("transformers")
@pytest.mark.parametrize("name", ["bytes", "gpt2", "bpe"])
def test_auto_tokenizer_encodes_as_the_model_was_trained(name, tmp_path):
    corpus = ["the cat sat on the mat, and the rat sat on the cat"] * 9
    tokenizer = tokenizing.train_bpe(corpus, 270) if name == "bpe" else tokenizing.load_tokenizer(name)
    config = ModelConfig(n_layers=1, d_model=16, n_heads=1, n_kv_heads=1, head_dim=16, vocab_size=50_304, dtype="float32")
    write_import(tmp_path / "in", config, drawn(config), provenance="", tokenizer=tokenizer)
    hf.export(tmp_path / "in", tmp_path / "hf")
    ask(sys.executable, "tokenize", jobs=[(str(tmp_path / "hf"), TEXTS, str(tmp_path / "out.json"))], folder=tmp_path)
    found = json.loads((tmp_path / "out.json").read_text())
    ids = [one.tolist() for one in tokenizer.encode_batch(TEXTS)]
    assert found == {"ids": ids, "texts": [tokenizer.decode(one) for one in ids], "eos": tokenizer.eos_id}
    if name != "bpe":
        assert found["texts"] == TEXTS


class Drawn:
    """Parameters that are drawn when they are read, and what a process takes that writes or reads them."""

    TINY = ModelConfig(n_layers=2, d_model=64, n_heads=1, n_kv_heads=1, vocab_size=320, dtype="float32")
    LARGE = ModelConfig(n_layers=19, d_model=1024, n_heads=16, n_kv_heads=4, vocab_size=320, dtype="float32")

    @staticmethod
    def write(config, folder):
        def leaf(like):
            def draw():
                return np.random.default_rng(0).standard_normal(like.shape, dtype=np.float32)

            return Leaf(like.shape, np.dtype(like.dtype), draw)

        write_import(folder, config, jax.tree.map(leaf, abstract(config)), provenance="a test")

    @classmethod
    def act(cls, what, root):
        """In a process of its own; prints the bytes that LARGE took beyond TINY."""
        hf_tensors.SHARD_BYTES = 10**8
        used = []
        for i, config in enumerate((cls.TINY, cls.LARGE)):
            ours, theirs, again = (Path(root) / f"{name}-{i}" for name in ("ours", "theirs", "again"))
            match what:
                case "write":
                    cls.write(config, ours)
                case "export":
                    hf.export(ours, theirs)
                case "import":
                    hf.read_in(theirs, again)
            used.append(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(used[1] - used[0])


@pytest.mark.slow
def test_200m_parameters_are_never_in_memory_together(tmp_path):
    size = sum(4 * np.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(Drawn.LARGE)))
    assert size > 4 * 200e6
    code = "import sys; from tests.test_hf_readers import Drawn; Drawn.act(*sys.argv[1:])"
    for what in ("write", "export", "import"):
        command = [sys.executable, "-c", code, what, tmp_path]
        done = subprocess.run(command, capture_output=True, text=True, cwd=READERS.parents[1])
        assert done.returncode == 0, done.stderr[-3000:]
        assert int(done.stdout.split()[-1]) < 1.2 * size, what  # the largest parameter is a quarter; all, read and held, are 2


@pytest.mark.thorough
@pytest.mark.needs("torch")
class TestTransformers:
    """With torch, in both directions; what no other test needs it for."""

    @pytest.mark.parametrize("positions", [None, "positions.npy"], ids=["first", "to 128K"])
    def test_logits_of_what_is_written(self, tmp_path, positions):
        root, found = tmp_path, write(tmp_path, both=True)
        place = None if positions is None else str(root / positions)
        jobs = [(str(root / name), str(root / "tokens.npy"), place, str(root / f"{name}-torch.npy")) for name in found]
        ask(TORCH_PYTHON, "logits", "transformers", jobs=jobs, folder=root)
        for name, (config, params) in found.items():
            at = np.arange(24) if positions is None else POSITIONS
            same(logits(config, params, at), np.load(root / f"{name}-torch.npy"))

    def test_logits_of_what_transformers_wrote(self, tmp_path):
        np.save(tmp_path / "tokens.npy", TOKENS)
        jobs = []
        for name, config in models(both=True):
            kind = "MistralForCausalLM" if config.d_model % config.n_heads else "LlamaForCausalLM"
            kind = "MinistralForCausalLM" if name.startswith("4-2") else kind
            fields = hf_config.of_model(config, "float32", LONGEST, 256)
            named = {
                key: fields[key]
                for key in fields
                if key not in ("architectures", "model_type", "dtype", "torch_dtype", "rope_theta", "rope_scaling")
            }
            if kind == "MinistralForCausalLM":  # it has a window for the layers that have one
                named |= {"sliding_window": 8, "layer_types": ["full_attention"] * config.n_layers}
            jobs.append((kind, named, str(tmp_path / name), "20KB" if "True" in name else "5GB"))
        ask(TORCH_PYTHON, "save", jobs=jobs, folder=tmp_path)
        out = [
            (str(tmp_path / name), str(tmp_path / "tokens.npy"), None, str(tmp_path / f"{name}.npy"))
            for name, _ in models(both=True)
        ]
        ask(TORCH_PYTHON, "logits", "transformers", jobs=out, folder=tmp_path)
        for name, config in models(both=True):
            hf.read_in(tmp_path / name, tmp_path / f"{name}-in")
            loaded = gqa_jax.load_model(tmp_path / f"{name}-in")
            assert loaded.config == config
            same(np.asarray(loaded.apply(TOKENS)), np.load(tmp_path / f"{name}.npy"))
