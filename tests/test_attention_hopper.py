"""The Hopper kernels: numerics and races in Pallas's interpreter, and compiled for an H200 that need not be there."""

import functools
import importlib.metadata
import re
import subprocess

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gqa_jax.attention import conformance, hopper, unsupported_reason
from gqa_jax.attention.conformance import PROBLEMS, Problem
from gqa_jax.attention.spec import Case, Mask
from gqa_jax.attention.vjp import Kernel, attend
from tests import machines

QUICK = ("one query", "heads of 128", "offset, traced", "documents and an offset")  # the interpreter takes seconds for each
BEYOND = {
    "float32": "takes bfloat16, not float32", "float16": "takes bfloat16, not float16",
    "heads of 16": "heads of 64 and 128", "heads of 80": "heads of 64 and 128",
}  # fmt: skip


@pytest.fixture
def races(monkeypatch):
    """Races that the interpreter finds in shared and global memory; what it takes for the memory of registers has none."""
    from jax._src.pallas.mosaic_gpu.interpret import race_detection_state, shared_memory

    found, registers = [], shared_memory.get_memory_space_idx(plgpu.REGS)
    for name in ("check_read", "check_write"):
        original = getattr(race_detection_state.GPURaceDetectionState, name)

        def check(self, thread, clock, key, *args, original=original, **kwargs):
            if key.memory_space_id != registers:
                original(self, thread, clock, key, *args, **kwargs)
                found.extend([key] if self.races_found else [])

        monkeypatch.setattr(race_detection_state.GPURaceDetectionState, name, check)
    monkeypatch.setattr(plgpu, "InterpretGPUParams", functools.partial(plgpu.InterpretGPUParams, detect_races=True))
    return found


def is_right(problem):
    return conformance.check("pallas_gpu", problem, interpret=True).status == "right"


TAKEN = [title for title in PROBLEMS if title not in BEYOND and not title.startswith("decode")]


@pytest.mark.parametrize(
    "title", [pytest.param(title, marks=() if title in QUICK else pytest.mark.thorough) for title in TAKEN]
)
def test_is_right_and_has_no_races(races, title):
    assert is_right(PROBLEMS[title])
    assert not races


RING = hopper.Tile(consumers=2, block=64, stages=2, consumer_registers=240, loader_registers=24)


@pytest.mark.parametrize(
    ("problem", "splits"),
    [
        (Problem((2, 1), 64, 448), 1),  # many blocks through few slots: what is loaded ahead must not overwrite what is read
        (Problem((4, 1), 64, 130), 2),  # a group split over CTAs sums to the same
    ],
)
def test_rings_are_reused_and_groups_split_without_races(races, monkeypatch, problem, splits):
    monkeypatch.setattr(hopper, "choose", lambda *_: hopper.Options(RING, RING, RING._replace(splits=splits)))
    assert is_right(problem)
    assert not races


@pytest.mark.parametrize("title", BEYOND)
def test_what_it_can_not_run(title):
    found = conformance.check("pallas_gpu", PROBLEMS[title], interpret=True)
    assert found.status == "can't run"
    assert BEYOND[title] in found.said


def compiled_for_h200(n_heads, n_kv, head_dim, length, *, batch=1, offsets=False, segments=False):
    """Forward and backward pass, compiled; `offsets`: traced ones."""
    mesh = machines.mesh("h200")
    group, replicated = n_heads // n_kv, NamedSharding(mesh, PartitionSpec())
    options = hopper.choose(head_dim, length, group, batch * n_kv, segments)
    kernel = Kernel(hopper.forward, hopper.backward, head_dim**-0.5, options)

    def both(q, k, v, d_out, offset, ids):
        mask = Mask(offset if offsets else 0, 0, *((ids, ids) if segments else ()))
        (_, lse), pull = jax.vjp(lambda *x: attend(kernel, *x, mask), q, k, v)
        return pull((d_out, jnp.zeros_like(lse)))

    q, k = (batch, length, n_kv, group, head_dim), (batch, length, n_kv, head_dim)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=replicated)
        for shape, dtype in (*((x, jnp.bfloat16) for x in (q, k, k, q)), ((), jnp.int32), ((batch, length), jnp.int32))
    ]
    with jax.set_mesh(mesh):
        return jax.jit(both).lower(*arguments).compile()


def check_machine_code(folder, head_dim):
    """Tensor cores fed by the TMA, registers moved between warpgroups, hardly any spilled, products in flight."""
    # dk/dv at head size 128 may spill a scalar: stored before its loops, loaded after them
    allowed = {"gqa_backward_dkv": 8 if head_dim == 128 else 0}
    programs = {re.sub(r"_\d+$", "", path.stem): path for path in folder.glob("*.ptx")}
    assert sorted(programs) == ["gqa_backward_dkv", "gqa_backward_dq", "gqa_forward"]
    for name, path in programs.items():
        ptx = path.read_text()
        for instruction in ("wgmma.mma_async", "cp.async.bulk.tensor", "setmaxnreg.inc", "setmaxnreg.dec"):
            assert instruction in ptx, (path.name, instruction)
        said = subprocess.run(
            [ptxas(), "-v", "-arch=sm_90a", str(path), "-o", "/dev/null"], capture_output=True, text=True, check=True
        ).stderr
        assert int(re.search(r"(\d+) bytes spill stores", said)[1]) <= allowed.get(name, 0), said
        assert "serialized" not in said, said  # products awaited one by one
        assert "setmaxnreg ignored" not in said, said


def ptxas():
    """The assembler of the extra `aot`."""
    return next(str(file.locate()) for file in importlib.metadata.files("nvidia-cuda-nvcc") if file.name == "ptxas")


SHAPES = [
    (8, 1, 64, 2**13), (32, 8, 128, 2**17),
    *(pytest.param(*case, marks=pytest.mark.thorough) for case in (
        (8, 1, 128, 2**13), (32, 8, 64, 2**17),
        (32, 8, 64, 2**13), (32, 8, 128, 2**13), (8, 1, 64, 2**17), (8, 1, 128, 2**17), (8, 1, 64, 2**19), (12, 4, 128, 1000),
    )),
]  # fmt: skip


@pytest.fixture
def dumped(monkeypatch, tmp_path):
    """Where Mosaic writes the PTX of what is compiled."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    return tmp_path


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.parametrize(("n_heads", "n_kv", "head_dim", "length"), SHAPES)
def test_compiles_for_h200_into_what_it_is_written_as(dumped, n_heads, n_kv, head_dim, length):
    program = compiled_for_h200(n_heads, n_kv, head_dim, length)
    check_machine_code(dumped, head_dim)
    heads_bytes, row_bytes = n_heads * length * head_dim * 2, n_heads * length * 4
    splits = hopper.choose(head_dim, length, n_heads // n_kv, n_kv).dkv.splits
    partial_sums = 2 * splits * n_kv * length * head_dim * 4 if splits > 1 else 0
    padding = 6 * 2**20
    # output, and three numbers per row: log-sum-exp in two bases, delta
    assert program.memory_analysis().temp_size_in_bytes <= 2 * heads_bytes + 4 * row_bytes + partial_sums + padding


@pytest.mark.needs("jax-cuda13-plugin")
@pytest.mark.parametrize(
    "case",
    [
        ((6, 2, 64, 1000), {"offsets": True, "segments": True, "batch": 2}),
        pytest.param(((32, 8, 128, 1024), {"batch": 2}), marks=pytest.mark.thorough),
        pytest.param(((12, 4, 128, 1000), {"offsets": True, "batch": 3}), marks=pytest.mark.thorough),
        pytest.param(((8, 1, 128, 8192), {"segments": True}), marks=pytest.mark.thorough),
    ],
)
def test_batches_offsets_and_segments_compile_for_h200(dumped, case):
    shape, more = case
    compiled_for_h200(*shape, **more)
    check_machine_code(dumped, head_dim=shape[2])


def test_splits_fill_the_chip_and_divide_the_group():
    assert hopper.choose(64, 2**13, 8, kv_heads=1).dkv.splits == 4
    assert hopper.choose(64, 2**17, 8, kv_heads=1).dkv.splits == 1
    assert hopper.choose(128, 1024, 6, kv_heads=2).dkv.splits == 6
    assert hopper.choose(128, 1024, 1, kv_heads=2).dkv.splits == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, None),
        ({"chip": "NVIDIA H100 80GB HBM3"}, None),
        ({"chip": "NVIDIA GH200 480GB"}, None),
        ({"chip": "NVIDIA A100-SXM4-80GB"}, "Hopper"),
        ({"chip": "NVIDIA B200"}, "Hopper"),
        ({"platform": "cpu", "chip": "cpu"}, "this is cpu"),
        ({"platform": "cpu", "chip": "cpu", "interpreted": True}, None),
        ({"dtype": jnp.dtype(jnp.float32)}, "'reference' and 'xla'"),
        ({"head_dim": 80}, "heads of 64 and 128 on"),
        ({"segments": True, "aligned": False, "return_lse": True}, None),
    ],
)
def test_obstacles(change, said):
    case = Case("gpu", "NVIDIA H200", 1, 8192, 8192, 8, 1, 64, jnp.dtype(jnp.bfloat16))
    obstacle = unsupported_reason("pallas_gpu", case._replace(**change))
    assert obstacle is None if said is None else said in obstacle
