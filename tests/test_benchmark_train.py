import io
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from rich.console import Console

from benchmarks import train, train_case, train_ours
from benchmarks.workers import Worker
from gqa_jax import hardware, model
from tests import llama_numpy
from tests.needs import TORCH_PYTHON

LIMITS = {"start": 120, "lower": 120, "compile": 300, "run": 120, "check": 120}
SHAPE = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "vocab_size": 96}
CASE = {"model": SHAPE, "context_length": 64, "micro_batch": 2, "accumulation_steps": 2, "dtype": "float32"}


def run_worker(tmp_path, module, *arguments, python=sys.executable):
    environment = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(train.ROOT)}
    argv = [str(python), "-m", f"benchmarks.{module}", *arguments]
    return Worker(argv, tmp_path / f"{module}.log", env=environment, cwd=train.ROOT)


def ask(worker, do, **fields):
    outcome = worker.ask({"do": do, "case": "a", **fields}, limits=LIMITS)
    assert outcome.ok, outcome
    return outcome


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    with run_worker(tmp_path_factory.mktemp("ours"), "train_ours") as worker:
        yield worker


def test_our_worker_prepares_measures_and_forgets(ours, tmp_path):
    prepared = ask(ours, "prepare", **CASE)
    assert set(prepared.seconds) == {"start", "lower", "compile", "run"}
    found = prepared.result
    assert (found["attention"], found["compiled"], found["remat"]) == ("xla", "xla", "none")
    layer = 2 * 32 * 16 * (4 + 2) + 3 * 32 * 96 + 2 * 32  # d_ff: the multiple of 32 closest to 8 * 32 / 3
    assert found["parameters"] == 96 * 32 + 2 * layer + 32
    assert found["tokens_per_step"] == 64 * 2 * 2
    assert found["bytes_arguments"] > 12 * found["parameters"]
    assert found["peak_flops"] is None
    assert found["planner"] is None
    first = ask(ours, "losses", steps=4).result
    rest = ask(ours, "measure", steps=2).result
    assert len(rest["seconds"]) == 2
    assert min(rest["seconds"]) > 0
    again = ask(ours, "losses", steps=6).result  # from the initial state, whatever was trained since
    assert again["losses"] == first["losses"] + rest["losses"]
    assert first["losses"][0] == pytest.approx(np.log(96), rel=0.02)
    assert again["losses"][-1] < again["losses"][0] - 0.02
    assert len(ask(ours, "measure", steps=3, blocked=False).result["seconds"]) == 1
    profiled = ask(ours, "profile", folder=str(tmp_path)).result
    summary = json.loads((tmp_path / "profile-a.json").read_text())
    assert summary["kernels"] == profiled["kernels"]
    assert any("dot" in kernel["name"] or "fusion" in kernel["name"] for kernel in summary["kernels"])
    times = [kernel["seconds"] for kernel in summary["kernels"]]
    assert times == sorted(times, reverse=True)
    assert 0 < times[0] < summary["seconds_span"] * 64
    ask(ours, "forget")
    refused = ours.ask({"do": "measure", "case": "a", "steps": 1}, limits=LIMITS)
    assert (refused.status, refused.reason) == ("failed", "ValueError: case 'a' is not prepared: there are none")


def test_weights_in_the_file_give_our_losses_by_the_numpy_llama(ours, tmp_path):
    """The file's names and shapes are a Llama checkpoint's: read back by them, the model has the same loss."""
    fields = CASE | {"context_length": 8, "accumulation_steps": 1, "seed": 3}
    ask(ours, "prepare", **fields)
    ask(ours, "weights", path=str(tmp_path / "weights.npz"))
    loss = ask(ours, "losses", steps=1).result["losses"][0]
    recipe = train_case.load_recipe(tmp_path / "weights.npz")
    weights = {name: x.astype(np.float64) for name, x in train_case.load_weights(tmp_path / "weights.npz").items()}
    config = train_ours.make_config(**fields).model
    d, h = config.d_model, config.head_dim

    def stack(name, read):
        return np.stack([read(weights[f"model.layers.{i}.{name}.weight"]) for i in range(config.n_layers)])

    params = {
        "embedding": weights["model.embed_tokens.weight"],
        "final_norm": weights["model.norm.weight"],
        "layers": {
            "attention_norm": stack("input_layernorm", np.asarray),
            "ffn_norm": stack("post_attention_layernorm", np.asarray),
            "query": stack("self_attn.q_proj", lambda x: x.T.reshape(d, 4, h)),
            "key": stack("self_attn.k_proj", lambda x: x.T.reshape(d, 2, h)),
            "value": stack("self_attn.v_proj", lambda x: x.T.reshape(d, 2, h)),
            "output": stack("self_attn.o_proj", lambda x: x.T.reshape(4, h, d)),
            "gate": stack("mlp.gate_proj", np.transpose),
            "up": stack("mlp.up_proj", np.transpose),
            "down": stack("mlp.down_proj", np.transpose),
        },
    }
    (tokens,) = train_case.tokens(recipe, 0)
    logits = llama_numpy.logits(params, tokens[:, :-1], config)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert loss == pytest.approx(-np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean(), rel=1e-5)


def test_names_and_shapes_of_a_llama_checkpoint():
    config = train_ours.make_config(**CASE).model
    shapes = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
    found = {name: x.shape for name, x in train_case.llama_weights(params)}
    layer = {
        "input_layernorm": (32,), "post_attention_layernorm": (32,), "self_attn.q_proj": (64, 32), "self_attn.k_proj": (32, 32),
        "self_attn.v_proj": (32, 32), "self_attn.o_proj": (32, 64), "mlp.gate_proj": (96, 32), "mlp.up_proj": (96, 32),
        "mlp.down_proj": (32, 96),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in layer.items()}
    assert found == expected | {"model.embed_tokens.weight": (96, 32), "model.norm.weight": (32,)}


def test_tokens_are_a_function_of_seed_and_step_with_something_to_learn():
    recipe = {"accumulation_steps": 2, "micro_batch": 3, "context_length": 2000, "vocab_size": 50304, "seed": 0}
    tokens = train_case.tokens(recipe, 5)
    assert (tokens.shape, tokens.dtype) == ((2, 3, 2001), np.int32)
    assert 0 <= tokens.min() < tokens.max() < 50304
    np.testing.assert_array_equal(tokens, train_case.tokens(recipe, 5))
    assert not np.array_equal(tokens, train_case.tokens(recipe, 6))
    assert not np.array_equal(tokens, train_case.tokens(recipe | {"seed": 1}, 5))
    # P(t < x V) of the product of three uniforms: x (1 - ln x + (ln x)^2 / 2)
    x = 0.1
    assert (tokens < x * 50304).mean() == pytest.approx(x * (1 - np.log(x) + np.log(x) ** 2 / 2), abs=0.02)
    assert train_case.tokens_sha256(recipe, 2) != train_case.tokens_sha256(recipe, 3)


def test_weights_go_to_one_kind_of_file(tmp_path):
    with pytest.raises(ValueError, match=r"weights = .*must end with \.npz"):
        train_case.save(tmp_path / "weights.safetensors", {}, {})


def test_a_case_of_the_table_of_sizes():
    config = train_ours.make_config(model={"size": "470M", "n_heads": 8, "n_kv_heads": 1}, context_length=8192, micro_batch=2)
    assert (config.model.n_layers, config.model.d_model, config.model.vocab_size) == (24, 1280, 50304)
    assert (config.batch_size, config.micro_batch, config.optimizer.learning_rate) == (2, 2, 5e-4)
    with pytest.raises(ValueError, match="size = '471M': there are 3M, 19M"):
        train_ours.make_config(model={"size": "471M"}, context_length=8192, micro_batch=2)


def test_flops_of_a_step_in_both_conventions_by_hand():
    shape = {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "d_ff": 160, "vocab_size": 1000}
    config = train_ours.make_config(model=shape, context_length=128, micro_batch=2, dtype="bfloat16")
    weights = 3 * (2 * 64 * 16 * (4 + 2) + 3 * 64 * 160) + 64 * 1000
    scores = {"causal": 64, "full": 128}  # keys of a token
    for name, keys in scores.items():
        by_hand = 256 * 3 * (2 * weights + 3 * 4 * keys * 4 * 16)
        assert train_ours.flops_per_step(config)[name] == by_hand
    assert train_ours.peak_flops(config, "NVIDIA H100 80GB HBM3") == 989e12
    assert train_ours.peak_flops(config, "cpu") is None
    other = train_ours.make_config(model=shape, context_length=128, micro_batch=2, dtype="float32")
    assert train_ours.peak_flops(other, "NVIDIA H100 80GB HBM3") is None


def test_figures_of_a_row_by_hand():
    facts = {"tokens_per_step": 4000, "flops_per_step": {"causal": 300e12, "full": 400e12}, "peak_flops": 1000e12}
    prepared = {"bytes_peak": 7e9, "seconds_lower": 1.5, "seconds_compile": 20.0, "versions": {"jax": "1"}}
    row = train.row("a", prepared, [0.5, 2.0, 1.0], facts)
    assert row["tokens_per_second"] == 4000
    assert (row["mfu_causal"], row["mfu_full"]) == pytest.approx((0.3, 0.4))
    assert row["seconds_compile"] == 21.5
    assert train.mfu(300e12, 1.0, None) is None
    assert train.ratios([1.0, 2.0, 4.0], [3.0, 2.0, 8.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert train.loss_difference([2.0, 4.0], [2.01, 3.9]) == pytest.approx(0.025)
    assert not train.loss_difference([2.0, 4.0], [float("nan"), 4.0]) <= 1


@pytest.mark.parametrize("peak", [1000e12, None])
def test_the_table_has_what_is_known_in_80_columns(peak):
    facts = {"tokens_per_step": 16384, "flops_per_step": {"causal": 3e12, "full": 4e12}, "peak_flops": peak}
    prepared = {"bytes_peak": None if peak is None else 51.3e9, "seconds_compile": 101.25, "versions": {}}
    rows = [
        train.row("gqa_jax", prepared, [0.01], facts),
        train.row("PyTorch compiled", prepared, [0.02], facts) | {"ratio": {"median": 2.0, "low": 1.25, "high": 12.5}},
        {"form": "PyTorch eager", "status": "failed", "reason": "out of memory"},
    ]
    console = Console(width=80, file=io.StringIO())
    console.print(train.table(rows))
    lines = console.file.getvalue()
    assert "1,638,400" in lines
    assert "2.00x (1.25 to 12.50)" in lines
    assert "PyTorch eager" not in lines
    assert "…" not in lines
    assert max(map(len, lines.splitlines())) <= 80
    assert ("MFU" in lines) == ("51.3" in lines) == ("30.0, 40.0" in lines) == (peak is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--heads 3/2", "'3/2': 3 query heads are not a multiple of 2 key/value heads"),
        ("--heads 8", "'' is not a positive whole number"),
        ("--context 8Q", "'8Q' is not a positive whole number"),
        ("--size 4M", "invalid choice: '4M'"),
        ("--torch_python /nowhere/python", "--torch_python: "),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_python_without_torch_is_named_with_the_option_that_helps(tmp_path, capsys):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E "$@"\n')  # -S: no installed packages
    bare.chmod(0o755)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--torch_python", str(bare)])
    assert stopped.value.code == 2
    message = (
        f"no torch and no transformers and no numpy in {bare}: --torch_python PYTHON, of one that has torch and transformers"
    )
    assert message in capsys.readouterr().err


def test_the_command_and_what_the_workers_share_import_no_jax():
    code = "import sys, benchmarks.train, benchmarks.train_case, benchmarks.workers; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=train.ROOT).returncode == 0


FORM = """
from benchmarks.workers import serve
turns = iter({turns})
def measure(phase, case, steps, blocked):
    assert not blocked
    return {{"seconds": [next(turns)]}}
serve({{"measure": measure}})
"""


def form(tmp_path, name, turns):
    return Worker([sys.executable, "-c", FORM.format(turns=turns)], tmp_path / f"{name}.log", cwd=train.ROOT)


def test_a_form_that_fails_leaves_the_turns_and_ours_ends_them(tmp_path):
    with (
        form(tmp_path, "ours", [1.0, 2.0, 3.0]) as ours,
        form(tmp_path, "a", [4.0]) as a,
        form(tmp_path, "b", [5.0, 6.0, 7.0]) as b,
    ):
        seconds, failures = train.take_turns({train.OURS: ours, "a": a, "b": b}, 3, 1)
        assert seconds == {train.OURS: [1.0, 2.0, 3.0], "a": [4.0], "b": [5.0, 6.0, 7.0]}
        assert failures == {"a": "a: measure: failed in phase 'start': StopIteration"}
        with pytest.raises(train.Failure, match="gqa_jax: measure: failed in phase 'start': StopIteration"):
            train.take_turns({train.OURS: ours, "b": b}, 1, 1)


def test_kernels_of_a_gpu_run_here_when_they_are_interpreted(tmp_path, ours):
    fields = CASE | {"model": SHAPE | {"n_layers": 1}, "context_length": 32, "accumulation_steps": 1}
    ask(ours, "prepare", **fields)
    expected = ask(ours, "losses", steps=2).result["losses"]
    with run_worker(tmp_path, "train_ours", "--interpreted") as worker:
        found = ask(worker, "prepare", **fields, attention="pallas_triton").result
        assert found["attention"] == "pallas_triton"
        assert ask(worker, "losses", steps=2).result["losses"] == pytest.approx(expected, rel=1e-5)
    refused = ours.ask({"do": "prepare", "case": "b", **fields, "attention": "pallas_triton"}, limits=LIMITS)
    assert refused.status == "failed"
    assert re.search("pallas_triton runs on NVIDIA GPUs.*, and this is cpu", refused.reason)


@pytest.mark.thorough
@pytest.mark.needs("jax-cuda13-plugin")
def test_a_case_is_compiled_for_a_gpu_that_is_not_here(tmp_path):
    shape = SHAPE | {"head_dim": 64}
    with run_worker(tmp_path, "train_ours", "--compile_only", "h100:1") as worker:
        found = ask(worker, "prepare", model=shape, context_length=256, micro_batch=2, attention="cudnn", remat="dots").result
        refused = worker.ask({"do": "measure", "case": "a", "steps": 1}, limits=LIMITS)
    assert (found["attention"], found["remat"]) == ("cudnn", "dots")
    assert found["compiled"] in ("pallas_triton for cudnn", "cudnn")  # the latter where it is installed
    assert (found["platform"], found["device"]) == ("gpu", hardware.CHIPS["h100"].gpu.device_kind)
    assert found["peak_flops"] == 989e12
    assert found["bytes_arguments"] == pytest.approx(found["planner"]["bytes_arguments"], rel=1e-3)
    assert found["bytes_temporary"] > 0
    assert found["bytes_peak"] is None
    assert (refused.status, refused.reason) == ("failed", "ValueError: programs for h100:1 are compiled, and nothing runs")


@pytest.mark.thorough
@pytest.mark.needs("torch")
def test_pytorch_trains_the_same(ours, tmp_path):
    ask(ours, "prepare", **CASE)
    weights = tmp_path / "weights.npz"
    ask(ours, "weights", path=str(weights))
    expected = ask(ours, "losses").result
    with run_worker(tmp_path, "train_torch", "--device", "cpu", python=TORCH_PYTHON) as worker:
        found = ask(worker, "prepare", weights=str(weights), **CASE).result
        losses = ask(worker, "losses").result
        assert len(ask(worker, "measure", steps=2).result["seconds"]) == 2
        other = worker.ask({"do": "prepare", "case": "a", "weights": str(weights), "micro_batch": 3}, limits=LIMITS)
    assert found["parameters"] == model_parameters()
    assert losses["tokens_sha256"] == expected["tokens_sha256"]
    assert losses["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert other.reason == "ValueError: micro_batch = 3: the file of weights is of 2"


NO_MASK = """
import torch
from benchmarks import train_torch
recipe = dict(n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=96, vocab_size=128, norm_eps=1e-6)
model = train_torch.build(recipe | {"context_length": 64, "rope_theta": 5e5}, "cpu")
tokens = torch.randint(128, (2, 64))
eager = model(input_ids=tokens, use_cache=False).logits
traced = torch.compile(lambda x: model(input_ids=x, use_cache=False).logits, backend="eager", fullgraph=True)
assert torch.equal(eager, traced(tokens))
others = torch.cat([tokens[:, :40], 0 * tokens[:, 40:]], dim=1)
changed = (model(input_ids=others, use_cache=False).logits - eager).abs().amax(dim=(0, 2))
assert changed[:40].max() == 0 and changed[40:].min() > 0, changed
"""


@pytest.mark.thorough
@pytest.mark.needs("torch")
def test_pytorch_attends_causally_without_a_mask_compiled_too():
    """With one, its flash attention refuses, and what we are compared with would be slower than it could be."""
    environment = os.environ | {"PYTHONPATH": str(train.ROOT)}
    ran = subprocess.run([TORCH_PYTHON, "-c", NO_MASK], env=environment, cwd=train.ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def model_parameters():
    shapes = jax.eval_shape(lambda: model.init_params(train_ours.make_config(**CASE).model, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
