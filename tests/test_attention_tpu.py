"""The TPU kernels: numerics interpreted on CPU, then compiled ahead of time for real chips (package libtpu)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import tpu_cycles
from gqa_jax import attention, hardware
from gqa_jax.attention import conformance, tpu
from gqa_jax.attention.conformance import PROBLEMS, Problem
from gqa_jax.attention.spec import Mask
from gqa_jax.attention.tpu import Options
from gqa_jax.hardware import Tiles
from tests import attention_cases as cases
from tests import machines

SMALL = Tiles(rows=256, keys=128, strip=128, chunk=128, ahead=1, together=1)  # many blocks in little time
PACKED = Tiles(rows=512, keys=256, strip=256, chunk=128, ahead=3, together=2)


@pytest.fixture
def tiles(monkeypatch):
    """A function that has `pallas_tpu` take these tiles and cores."""

    def choose(forward, backward=None, **how):
        options = Options(forward, backward or forward, **{"interpret": True, **how})
        monkeypatch.setattr(tpu, "choose", lambda case: options)

    return choose


@pytest.mark.parametrize("forward", [SMALL, PACKED, None])
@pytest.mark.parametrize("title", [pytest.param("groups", marks=pytest.mark.thorough), "documents"])
def test_tiles_of_all_kinds(tiles, forward, title):
    if forward is not None:  # else those of the table
        tiles(forward)
    assert conformance.check("pallas_tpu", PROBLEMS[title], interpret=True, jit=True).status == "right"


@pytest.mark.parametrize("title", ["queries that see no key, traced", "offset"])
def test_two_cores_with_offsets(tiles, title):
    tiles(SMALL, cores=2)
    assert conformance.check("pallas_tpu", PROBLEMS[title], interpret=True, jit=True).status == "right"


def test_documents_equal_separate_documents():
    arrays = cases.inputs(4, 1, 64, 384)
    ids = jnp.asarray(np.repeat([3, 7, 8], 128)[None], jnp.int32)
    options = Options(PACKED, PACKED, interpret=True)
    whole = cases.run(tpu.forward, tpu.backward, options, arrays, Mask(0, 0, ids, ids))
    for n in range(3):
        part = [x[:, 128 * n : 128 * (n + 1)] for x in arrays]
        alone = cases.run(tpu.forward, tpu.backward, options, part)
        for a, b, axis in zip(whole, alone, (1, 3, 1, 1, 1), strict=True):
            there = np.take(a, range(128 * n, 128 * (n + 1)), axis=axis)
            np.testing.assert_allclose(np.float32(there), np.float32(b), rtol=2e-2, atol=2e-2)


# Shared between the cores: heads, nothing, key blocks, key blocks.
@pytest.mark.parametrize("heads", [(2, 1), (4, 2), (3, 1), pytest.param((1, 1), marks=pytest.mark.thorough)])
def test_two_cores_give_what_one_gives(heads):
    arrays = cases.inputs(*heads, 64, 700)
    one, two = (cases.run(tpu.forward, tpu.backward, Options(SMALL, SMALL, cores=n, interpret=True), arrays) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("heads", [(2, 1), pytest.param((1, 1), marks=pytest.mark.thorough)])
def test_no_races_under_tpu_semantics(tiles, heads):
    """DMAs that land when they are waited for, two cores, uninitialised memory that is NaN, races detected."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    interpret = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    tiles(SMALL, cores=2, interpret=interpret)
    assert conformance.check("pallas_tpu", Problem(heads, 64, 384), interpret=True, jit=True).status == "right"
    assert not interpret_pallas_call.races.races_found


def test_bit_equal_from_run_to_run():
    arrays = cases.inputs(8, 2, 64, 500)
    options = Options(PACKED, PACKED, interpret=True)
    first, second = (cases.run(tpu.forward, tpu.backward, options, arrays) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_it_refuses():
    q, k, v, _ = cases.inputs(2, 1, 64, 128)
    with pytest.raises(ValueError, match=r"runs on TPUs, and this is cpu .*These can: reference, xla"):
        attention.attention(q, k, v, implementation="pallas_tpu")
    with attention.interpreted():
        with pytest.raises(ValueError, match="bfloat16 and float32, not float16"):
            attention.attention(*(x.astype(jnp.float16) for x in (q, k, v)), implementation="pallas_tpu")
        with pytest.raises(ValueError, match=r"heads of a multiple of 16 up to 128 on cpu, not 40"):
            attention.attention(*(x[..., :40] for x in (q, k, v)), implementation="pallas_tpu")
    case = attention.Case("tpu", "TPU v99", 1, 128, 128, 2, 1, 64, jnp.bfloat16)
    assert "no tiles for TPU v99" in attention.unsupported_reason("pallas_tpu", case)


# Compiled for chips that are not there.

CHIPS = ("v5e", "v5p", "v6e")


def compiled(chip, n_heads, n_kv, head_dim, length, **how):
    """attention(...) and its gradients, compiled for `chip`, and the operands' (n_heads, T, H) bytes in float32."""
    mesh = machines.mesh(chip)
    here = NamedSharding(mesh, PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=here)
    q = shape((1, length, n_heads, head_dim), jnp.bfloat16)
    k = shape((1, length, n_kv, head_dim), jnp.bfloat16)
    ids = shape((1, length), jnp.int32)

    def step(q, k, v, d_out, ids):
        segment_ids = ids if how.get("segments") else None
        out, pull = jax.vjp(lambda q, k, v: attention.attention(q, k, v, segment_ids=segment_ids), q, k, v)
        return out, pull(d_out)

    with jax.set_mesh(mesh):
        assert attention.resolve(None, attention.Case.planned(
            batch=1, length=length, n_heads=n_heads, n_kv_heads=n_kv, head_dim=head_dim, dtype=jnp.bfloat16
        )) == "pallas_tpu"  # fmt: skip
        return jax.jit(step).lower(q, k, k, q, ids).compile(), n_heads * length * head_dim * 4


@pytest.mark.needs("libtpu")
@pytest.mark.parametrize("chip", CHIPS)
def test_memory_is_linear_at_512k(chip):
    program, unit = compiled(chip, 8, 1, 64, 512 * 1024)
    assert program.memory_analysis().temp_size_in_bytes <= 3 * unit


@pytest.mark.thorough
@pytest.mark.needs("libtpu")
def test_many_heads_at_128k_fit_a_v5e():
    program, unit = compiled("v5e", 32, 32, 64, 128 * 1024)
    memory = program.memory_analysis()
    used = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.temp_size_in_bytes <= 4 * unit  # keys and values with 64 of 128 lanes are padded
    assert used < 15.75 * 2**30


@pytest.mark.needs("libtpu")
@pytest.mark.parametrize("chip", CHIPS)
def test_documents_and_odd_lengths_compile(chip):
    compiled(chip, 6, 2, 128, 5000, segments=True)


def test_every_row_of_the_table_compiles_for_its_chip():
    # v4 has the tiles of v5p, and is not compiled for by these tests
    assert {name for name, chip in hardware.CHIPS.items() if chip.tpu is not None and chip.tpu.tiles} == {"v4", *CHIPS}


# (chip, head size, pass) -> most cycles for 1024 x 1024 scores of unmasked blocks, of masked ones. jax's splash attention,
# counted the same way: v5e 5379 forward, 14746 backward; v6e 3508 and 8340, at both head sizes.
CYCLES = {
    ("v5e", 64, "forward"): (3300, 3700), ("v5e", 64, "backward"): (7400, 7600),
    ("v5e", 128, "forward"): (4300, 4600), ("v5e", 128, "backward"): (10418, 10650),
    ("v6e", 64, "forward"): (2200, 3350), ("v6e", 64, "backward"): (4150, 4650),
    ("v6e", 128, "forward"): (2500, 3650), ("v6e", 128, "backward"): (4550, 4950),
    ("v5p", 64, "forward"): (3300, 3750), ("v5p", 64, "backward"): (7400, 7600),
}  # fmt: skip


@pytest.mark.needs("libtpu")
@pytest.mark.thorough
@pytest.mark.parametrize(("chip", "head_dim"), [("v5p", 64), ("v5e", 128), ("v6e", 128)])
def test_cycles_of_the_other_chips(chip, head_dim):
    check_cycles(chip, head_dim)


@pytest.mark.thorough
@pytest.mark.needs("libtpu")
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_cycles(chip):
    check_cycles(chip, 64)


def check_cycles(chip, head_dim):
    machines.mesh(chip)
    counts = tpu_cycles.measure(chip, head_dim)
    assert len(counts) == 4
    for count in counts:
        most = CYCLES[chip, head_dim, count.direction][count.branch == "masked"]
        assert count.cycles <= most, f"{count}: at most {most}"
