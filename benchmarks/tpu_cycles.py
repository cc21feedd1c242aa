"""Cycles of the attention kernels in the TPU compiler's static schedule, without a TPU: python -m benchmarks.tpu_cycles

Compiles ahead of time (package libtpu), has the compiler dump its schedule, and counts the VLIW bundles of each kernel's
inner bodies: stalls included, branch by branch, scaled to 1024 queries x 1024 keys of one query head. `all visible` is the
branch of blocks without a mask, nearly all of them at long context; `masked` that of blocks on the diagonal. Waiting for
memory and the overhead of a grid step are not in it: the figures rank kernels, and bound their time from below.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from gqa_jax import hardware

CHIPS = [name for name, chip in hardware.CHIPS.items() if chip.tpu is not None and chip.tpu.tiles]
SCHEDULED = [name for name in CHIPS if hardware.CHIPS[name].attention_share]  # whose cycles are known
AREA = 1024 * 1024


class Region(NamedTuple):
    """Bundles between two transfers of control, and how often each unit is used in them."""

    kernel: str
    cycles: int
    used: dict[str, int]
    capacity: dict[str, int]

    def share(self, unit: str) -> float:
        return self.used[unit] / self.capacity[unit] / self.cycles


class Count(NamedTuple):
    """Cycles for 1024 x 1024 scores."""

    chip: str
    head_dim: int
    direction: str  # forward or backward
    kernel: str  # ours or splash
    branch: str
    cycles: float
    mxu: float  # share of the cycles in which the matrix units work
    spills: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", default=",".join(SCHEDULED), help=f"of {', '.join(CHIPS)} (default: %(default)s)")
    parser.add_argument("--head_dims", default="64,128")
    parser.add_argument("--splash", action="store_true", help="jax's splash attention too, unfused, in blocks of 1024")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--heads", default="8/1", help="query heads / key-value heads (default: 8/1)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args()
    chips = args.chips.split(",")
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"--chips: {', '.join(sorted(unknown))} unknown; there are {', '.join(CHIPS)}")
    if not args.json:
        print(f"{'chip':5s} {'d_h':>4s} {'pass':9s} {'kernel':7s} {'branch':12s} {'cycles':>7s} {'MXU':>5s} {'spills':>7s}")
    for chip in chips:
        for head_dim in map(int, args.head_dims.split(",")):
            for kernel in ("ours", "splash") if args.splash else ("ours",):
                for count in measure(chip, head_dim, kernel=kernel, length=args.length, heads=args.heads):
                    if args.json:
                        print(json.dumps(count._asdict()), flush=True)
                    else:
                        c = count
                        print(
                            f"{c.chip:5s} {c.head_dim:4d} {c.direction:9s} {c.kernel:7s} {c.branch:12s} {c.cycles:7.0f}"
                            f" {c.mxu:5.0%} {c.spills:7d}",
                            flush=True,
                        )


def measure(chip: str, head_dim: int, *, kernel: str = "ours", length: int = 8192, heads: str = "8/1") -> list[Count]:
    """Counts of both passes. Compiles in a process of its own: the compiler reads where to dump when it is loaded.

    Raises RuntimeError with what the compiler said when it did not compile.
    """
    with tempfile.TemporaryDirectory() as dump:
        environment = os.environ | {
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true --xla_jf_dump_hlo_text=false",
            "JAX_PLATFORMS": "cpu",
        }
        program = f"from benchmarks import tpu_cycles; tpu_cycles.compile_{kernel}({chip!r}, {head_dim}, {length}, {heads!r})"
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{kernel} did not compile for {chip}:\n{done.stderr[-4000:]}")
        areas = json.loads(done.stdout.splitlines()[-1])
        found = regions(dump)
    counts = []
    for direction, pattern, branches in areas:
        bodies = [r for r in found if re.search(pattern, r.kernel) and r.used["MATMUL"]]
        bodies = sorted(bodies, key=lambda r: r.used["MATMUL"], reverse=True)[: len(branches)]
        for (branch, area), body in zip(branches, bodies, strict=True):
            cycles, spills = body.cycles * AREA / area, body.used["VSTORE:SPILL"]
            counts.append(Count(chip, head_dim, direction, kernel, branch, cycles, body.share("MATMUL"), spills))
    return counts


def compile_ours(chip: str, head_dim: int, length: int, heads: str) -> None:
    """Forward and backward of `pallas_tpu`; prints the branches of each pass and the scores each computes."""
    import jax

    from gqa_jax.attention import Case, Mask, tpu

    q, k, rows, mesh = _operands(chip, head_dim, length, heads)
    with jax.set_mesh(mesh):
        case = Case.of(q, k, Mask())
        options = tpu.choose(case)
        scale = head_dim**-0.5
        forward = jax.jit(lambda q, k, v: tpu.forward(q, k, v, Mask(), scale, options))
        backward = jax.jit(lambda *x: tpu.backward(*x, Mask(), scale, options))
        forward.lower(q, k, k).compile()
        backward.lower(q, k, k, rows, rows, q).compile()
    areas = []
    for name, tiles in (("forward", options.forward), ("backward", options.backward)):
        branches = [("all visible", tiles.rows * tiles.keys), ("masked", tiles.rows * 512)]
        areas.append((name, f"gqa_{name}", branches))
    print(json.dumps(areas))


def compile_splash(chip: str, head_dim: int, length: int, heads: str) -> None:
    """Forward and unfused backward of jax's splash attention, in blocks of 1024: it masks every block."""
    import jax
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    n_heads, n_kv = map(int, heads.split("/"))
    q, k, _, mesh = _operands(chip, head_dim, length, heads)
    q = jax.ShapeDtypeStruct((n_kv, n_heads // n_kv, length, head_dim), q.dtype, sharding=q.sharding)
    k = jax.ShapeDtypeStruct((n_kv, length, head_dim), q.dtype, sharding=q.sharding)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": 1024 for name in names})
    mask = splash.MultiHeadMask([splash.CausalMask((length, length)) for _ in range(n_heads // n_kv)])
    kernel = jax.vmap(splash.make_splash_mqa_single_device(mask, block_sizes=sizes))
    with jax.set_mesh(mesh):
        loss = jax.jit(jax.grad(lambda q, k, v: kernel(q, k, v).astype("float32").sum(), argnums=(0, 1, 2)))
        loss.lower(q, k, k).compile()
    area = [("masked", AREA)]
    print(
        json.dumps(
            [("forward", "splash.*fwd", area), ("backward dq", "splash.*dq", area), ("backward dkv", "splash.*dkv", area)]
        )
    )


def _operands(chip: str, head_dim: int, length: int, heads: str):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from gqa_jax.planning import topologies

    n_heads, n_kv = map(int, heads.split("/"))
    mesh = topologies.mesh(chip)
    here = NamedSharding(mesh, PartitionSpec())
    q = jax.ShapeDtypeStruct((1, length, n_kv, n_heads // n_kv, head_dim), jnp.bfloat16, sharding=here)
    k = jax.ShapeDtypeStruct((1, length, n_kv, head_dim), jnp.bfloat16, sharding=here)
    rows = jax.ShapeDtypeStruct((1, n_kv, n_heads // n_kv, length), jnp.float32, sharding=here)
    return q, k, rows, mesh


def regions(dump: str) -> list[Region]:
    """Regions of every kernel in a dump: from the bundles before stalls are folded, cut where control may pass."""
    found = []
    for path in sorted(glob.glob(f"{dump}/*pre-delay_hlo-static-per-bundle-utilization.txt")):
        stem, kernel = re.match(r"(.*/\d+-(.*?)(?:\.\d+)?)-\d+-pre-delay", path).groups()
        with open(path) as f:
            _, units, capacities, _, *rows = f.read().strip().split("\n")
        units = [unit.strip() for unit in units.split(",")]
        capacity = dict(zip(units, map(int, capacities.split()), strict=True))
        rows = [tuple(map(int, row.split())) for row in rows]
        (schedule,) = glob.glob(f"{glob.escape(stem)}-*-packed-bundles-post-ra.txt")
        cuts = sorted({0, len(rows), *(cut for cut in _transfers(schedule) if cut < len(rows))})
        for start, stop in itertools.pairwise(cuts):
            used = dict(zip(units, map(sum, zip(*rows[start:stop], strict=True)), strict=True))
            found.append(Region(kernel, stop - start, used, capacity))
    return found


def _transfers(schedule: str) -> set[int]:
    """Addresses of the bundles that branches lead to or come after."""
    cuts = set()
    with open(schedule) as f:
        for line in f:
            if not (bundle := re.match(r"\s*(0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*:", line)):
                continue
            address = int(bundle[1], 16)
            if bundle[2]:
                cuts.add(address)
            if "sbr.rel" in line:
                cuts |= {address + 1, *map(int, re.findall(r"bundleno = (\d+)", line))}
    return cuts


if __name__ == "__main__":
    main()
