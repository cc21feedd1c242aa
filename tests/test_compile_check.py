import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import gqa_jax
from gqa_jax import hardware
from gqa_jax.config import TrainConfig, default_config
from gqa_jax.planning import compile_check
from gqa_jax.planning.compile_check import CompileCheck, Compilers


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GQA_JAX_CACHE", str(tmp_path))
    return tmp_path / "plans"


def tiny(**changes):
    values = TrainConfig(steps=10).to_dict()
    values |= {"context_length": 256, "batch_tokens": 2048}
    values["execution"] = {
        "mesh": "fsdp=2,context=2", "remat": "full", "accumulation_steps": 1, "context_attention": "gather", "attention": "xla",
    } | changes.pop("execution", {})  # fmt: skip
    values["data"]["block_tokens"] = values["evaluation"]["tokens"] = 1024
    values["model"] |= {"n_layers": 3, "d_model": 128, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 512, "d_ff": None}
    values["model"] |= changes.pop("model", {})
    return TrainConfig.from_dict(values | changes)


@pytest.mark.needs("libtpu")
def test_a_step_is_compiled_for_a_slice_that_is_not_here_once(cache):
    with Compilers(1) as compilers:
        first = compilers.submit(tiny(), "v5e:2x2").result()
    assert first.error is None
    assert first.fits
    assert first.bytes_limit == hardware.find("v5e:2x2").chip.memory_bytes
    assert 0 < first.bytes_arguments < first.bytes_used < 200e6
    assert first.attention == "xla"
    assert first.seconds_compile > 0
    assert len(list(cache.glob("*.json"))) == 1
    with Compilers(1) as compilers:
        again = compilers.submit(tiny(seed=7, label="other", steps=99), "v5e:2x2").result()
        assert not compilers._processes  # nothing was started
    assert again == first


@pytest.mark.thorough
@pytest.mark.needs("libtpu")
def test_what_is_too_large_is_said_with_its_bytes(cache):
    large = tiny(
        batch_tokens=2**21, context_length=1024, execution={"mesh": "data=1", "remat": "none"},
        model={"n_layers": 24, "d_model": 1024},
    )  # fmt: skip
    with Compilers(1) as compilers:
        answer = compilers.submit(large, "v5e:1x1").result()
    assert not answer.fits
    assert answer.bytes_needed > hardware.find("v5e:1x1").chip.memory_bytes
    assert answer.is_final
    assert len(list(cache.glob("*.json"))) == 1


def test_a_missing_compiler_says_what_to_install(monkeypatch):
    monkeypatch.setattr(hardware.importlib.util, "find_spec", lambda module: None)
    with Compilers(1) as compilers, pytest.raises(ValueError, match=r"pip install 'gqa-jax\[aot\]'"):
        compilers.submit(tiny(), "v5e:2x2")


def test_a_compiler_that_dies_is_an_answer_that_is_not_kept(cache, monkeypatch):
    monkeypatch.setattr(hardware.Slice, "require_compiler", lambda self: None)
    monkeypatch.setattr(compile_check.sys, "executable", "false")
    with Compilers(1) as compilers:
        answer = compilers.submit(tiny(), "v5e:2x2").result()
    assert not answer.fits
    assert "ended with exit code 1" in answer.error
    assert not answer.is_final
    assert not cache.exists()


def test_the_key_depends_on_what_the_program_depends_on():
    same = compile_check.key(tiny(), "v5e:2x2", False)
    assert compile_check.key(tiny(seed=3, label="x", steps=5), "v5e:2x2", False) == same
    changed = [
        compile_check.key(tiny(), "v5e:2x4", False),
        compile_check.key(tiny(), "v5e:2x2", True),
        compile_check.key(tiny(execution={"accumulation_steps": 2}), "v5e:2x2", False),
        compile_check.key(tiny(execution={"remat": "dots"}), "v5e:2x2", False),
        compile_check.key(tiny(execution={"mesh": "fsdp=4"}), "v5e:2x2", False),
        compile_check.key(tiny(data=tiny().to_dict()["data"] | {"document_mask": True}), "v5e:2x2", False),
    ]
    assert len({same, *changed}) == 1 + len(changed)


def test_the_key_depends_on_every_source_that_the_step_imports():
    """A module that `program` imports is in SOURCES."""
    code = "import sys, gqa_jax.training.program; print(*(n for n in sys.modules if n.startswith('gqa_jax.')))"
    imported = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    here = Path(gqa_jax.__file__).parent
    hashed = {path for pattern in compile_check.SOURCES for path in here.glob(pattern)}
    files = {here / Path(*name.split(".")[1:]).with_suffix(".py") for name in imported}
    assert {path for path in files if path.exists()} <= hashed


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (22.80G) exceeds available HBM (15.75G). HLO module: jit_train_step.", 22.80 * 2**30),
        ("RESOURCE_EXHAUSTED: Used 16.02G of 15.75G hbm. Exceeded hbm capacity by 276.00M.", 16.02 * 2**30),
        ("RESOURCE_EXHAUSTED: something else", 0.0),
        ("INTERNAL: Mosaic failed to compile TPU kernel", None),
    ],
)  # fmt: skip
def test_bytes_are_read_from_what_the_compiler_says(message, needed):
    assert compile_check.bytes_needed(message) == needed


def test_an_answer_survives_its_file(cache):
    answer = CompileCheck("v5e:2x2", True, 1e9, bytes_arguments=5, bytes_output=4, bytes_alias=3, bytes_temporary=2)
    path = compile_check._path(tiny(), "v5e:2x2", False)
    compile_check._keep(answer, path)
    assert compile_check.cached(tiny(), "v5e:2x2") == answer
    assert answer.bytes_used == 5 + 4 - 3 + 2
    path.write_text(json.dumps(dataclasses.asdict(answer))[:-9])
    assert compile_check.cached(tiny(), "v5e:2x2") is None


@pytest.mark.needs("libtpu")
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("topology", "size", "context", "mesh", "gigabytes"),
    [
        ("v5e:4x4", (36, 1536), 131_072, "fsdp=4,context=4", 8.0),  # 7.6 with a batch of four sequences
        ("v5e:8x8", (36, 2048), 524_288, "context=64", 4.0),  # 3.4 with a batch of one
    ],
)
def test_long_contexts_fit_small_chips(topology, size, context, mesh, gigabytes):
    """1.2B at T = 128K on a v5e-16 and 1.8B at T = 512K on a v5e-64, H = (8,1), batches of 512K tokens, far below 16.9 GB."""
    config = default_config()
    config.context_length, config.batch_tokens, config.steps = context, 524_288, 10
    config.model.update(n_layers=size[0], d_model=size[1], n_heads=8, n_kv_heads=1)
    config.execution.update(mesh=mesh, remat="attention_only", accumulation_steps=1, context_attention="gather")
    config.data.block_tokens = context
    config.evaluation.tokens = 2 * context
    answer = compile_check.check(TrainConfig.from_dict(config.to_dict()), topology)
    assert answer.fits, answer.error
    assert answer.attention == "pallas_tpu"
    assert answer.bytes_used < gigabytes * 1e9
