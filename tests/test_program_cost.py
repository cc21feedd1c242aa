"""Kernels, bytes, FLOPs and trips of HLO that is written here, counted by hand, and of a step that XLA compiled."""

import dataclasses

import pytest

from benchmarks import program_cost
from gqa_jax import hardware

CHIP = dataclasses.replace(hardware.CHIPS["h100"], peak_flops=1e12, memory_bandwidth=1e12, interconnect=1e11)

# A loop of 12 layers: a product with what is added to it, a slice of stacked weights, a store into a stacked array, a gather
# that runs beside the product; before it a fill, behind it a cuBLAS product of the loss, a copy.
PROGRAM = """HloModule jit_train_step, is_scheduled=true

%stored (param_0: f32[12,64,32], param_1: f32[64,32], param_2: s32[]) -> f32[12,64,32] {
  %param_0 = f32[12,64,32]{2,1,0} parameter(0)
  %param_1 = f32[64,32]{1,0} parameter(1)
  %param_2 = s32[] parameter(2)
  %bitcast.1 = f32[1,64,32]{2,1,0} bitcast(%param_1)
  ROOT %dynamic-update-slice.1 = f32[12,64,32]{2,1,0} dynamic-update-slice(%param_0, %bitcast.1, %param_2)
}

%sliced (param_0.1: f32[12,32,16], param_1.1: s32[]) -> bf16[32,16] {
  %param_0.1 = f32[12,32,16]{2,1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %dynamic-slice.1 = f32[1,32,16]{2,1,0} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,32,16}
  %bitcast.2 = f32[32,16]{1,0} bitcast(%dynamic-slice.1)
  ROOT %convert.1 = bf16[32,16]{1,0} convert(%bitcast.2)
}

%product (param_0.2: bf16[64,32], param_1.2: bf16[32,16], param_2.2: bf16[64,16]) -> bf16[64,16] {
  %param_0.2 = bf16[64,32]{1,0} parameter(0)
  %param_1.2 = bf16[32,16]{1,0} parameter(1)
  %param_2.2 = bf16[64,16]{1,0} parameter(2)
  %dot.1 = bf16[64,16]{1,0} dot(%param_0.2, %param_1.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %add.1 = bf16[64,16]{1,0} add(%dot.1, %param_2.2)
}

%filled () -> f32[12,64,32] {
  %constant.1 = f32[] constant(0)
  ROOT %broadcast.1 = f32[12,64,32]{2,1,0} broadcast(%constant.1), dimensions={}
}

%body (p: (s32[], f32[12,64,32], f32[12,32,16])) -> (s32[], f32[12,64,32], f32[12,32,16]) {
  %p = (s32[], f32[12,64,32]{2,1,0}, f32[12,32,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %kept = f32[12,64,32]{2,1,0} get-tuple-element(%p), index=1
  %weights = f32[12,32,16]{2,1,0} get-tuple-element(%p), index=2
  %own = bf16[8,16]{1,0} constant({...})
  %convert_fusion = bf16[32,16]{1,0} fusion(%weights, %i), kind=kLoop, calls=%sliced, metadata={op_name="jit(s)/jvp()/while/convert"}
  %all-gather-start.1 = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%own), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %gemm = bf16[64,16]{1,0} fusion(%x, %convert_fusion, %y), kind=kCustom, calls=%product, metadata={op_name="jit(s)/jvp()/while/ffn/dot_general"}
  %all-gather-done.1 = bf16[32,16]{1,0} all-gather-done(%all-gather-start.1)
  %store = f32[12,64,32]{2,1,0} fusion(%kept, %z, %i), kind=kLoop, calls=%stored, metadata={op_name="jit(s)/jvp()/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice"}
  ROOT %tuple.1 = (s32[], f32[12,64,32]{2,1,0}, f32[12,32,16]{2,1,0}) tuple(%i, %store, %weights)
}

%condition (p.1: (s32[], f32[12,64,32], f32[12,32,16])) -> pred[] {
  %p.1 = (s32[], f32[12,64,32]{2,1,0}, f32[12,32,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %constant.7 = s32[] constant(12)
  ROOT %lt = pred[] compare(%i.1, %constant.7), direction=LT
}

ENTRY %main (own: bf16[8,16], z: f32[64,32]) -> f32[64,512] {
  %h = bf16[64,16]{1,0} parameter(0)
  %e = bf16[512,16]{1,0} parameter(1)
  %fill = f32[12,64,32]{2,1,0} fusion(), kind=kLoop, calls=%filled, metadata={op_name="jit(s)/jvp()/broadcast_in_dim"}
  %while.1 = (s32[], f32[12,64,32]{2,1,0}, f32[12,32,16]{2,1,0}) while(%t), condition=%condition, body=%body
  %logits = (f32[64,512]{1,0}, s8[1024]{0}) custom-call(%h, %e), custom_call_target="__cublas$gemm", metadata={op_name="jit(s)/jvp(loss)/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  ROOT %copy.1 = f32[64,512]{1,0} copy(%l)
}
"""  # fmt: skip # noqa: E501


def by_name(text=PROGRAM):
    return {kernel.name: (kernel, times) for kernel, times in program_cost.kernels(program_cost.parse(text))}


def test_loops_are_counted_by_their_trips_as_noted_or_as_compared():
    assert {name: times for name, (_, times) in by_name().items()} == {
        "fill": 1, "convert_fusion": 12, "all-gather-start.1": 12, "gemm": 12, "store": 12, "logits": 1, "copy.1": 1,
    }  # fmt: skip
    noted = PROGRAM.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert by_name(noted)["gemm"][1] == 5


def test_bytes_are_of_the_slice_that_is_read_and_of_the_update_that_is_written_in_place():
    found = by_name()
    # a slice of float32 weights, its index, and the same in bfloat16
    assert found["convert_fusion"][0].bytes == 32 * 16 * 4 + 4 + 32 * 16 * 2
    # the update is read and written, and its index is read: nothing of the stacked array besides
    assert found["store"][0].bytes == 2 * 64 * 32 * 4 + 4
    assert found["fill"][0].bytes == 12 * 64 * 32 * 4


def test_products_have_two_flops_for_a_multiplication_wherever_they_stand():
    found = by_name()
    assert found["gemm"][0].flops == 2 * 64 * 32 * 16
    assert found["logits"][0].flops == 2 * 64 * 512 * 16
    text = "ENTRY %main () -> f32[2] {\n  %a = f32[128,64]{1,0} parameter(0)\n  %b = f32[64,32]{1,0} parameter(1)\n"
    text += "  ROOT %c = f32[128,32]{1,0} convolution(%a, %b), dim_labels=bf_io->bf\n}\n"
    assert by_name(text)["c"][0].flops == pytest.approx(2 * 128 * 64 * 32)


def test_parts_phases_and_scopes_are_those_of_the_source():
    found = {name: (one.part, one.phase, one.scope) for name, (one, _) in by_name().items()}
    assert found == {
        "fill": ("stacking", "forward", ""),
        "convert_fusion": ("elementwise", "forward", ""),
        "all-gather-start.1": ("collectives", "forward", ""),
        "gemm": ("products", "forward", "ffn"),
        "store": ("stacking", "forward", ""),
        "logits": ("loss products", "loss", ""),
        "copy.1": ("stacking", "forward", ""),
    }
    assert {part for part, *_ in found.values()} <= set(program_cost.PARTS)


def test_seconds_are_the_longer_of_bytes_and_flops_and_a_collective_is_hidden_behind_what_runs_beside_it():
    cost = program_cost.static_cost(PROGRAM, CHIP)
    bandwidth, flops = program_cost.BANDWIDTH * 1e12, program_cost.PRODUCTS * 1e12
    gemm = max(2 * 64 * 32 * 16 / flops, (64 * 32 + 32 * 16 + 2 * 64 * 16) * 2 / bandwidth)
    gather = 3 * 8 * 16 * 2 / (program_cost.NETWORK * 1e11)  # from three others
    assert gather < gemm
    assert cost.seconds["collectives"] == 0
    assert cost.seconds["products"] == pytest.approx(12 * gemm)
    stores = 12 * (2 * 64 * 32 * 4 + 4) + 12 * 64 * 32 * 4 + 64 * 512 * 4  # of the copy what it writes: %l has no type here
    assert cost.seconds["stacking"] == pytest.approx(stores / bandwidth)
    slow = dataclasses.replace(CHIP, interconnect=1e9)
    late = 3 * 8 * 16 * 2 / (program_cost.NETWORK * 1e9) - gemm
    assert program_cost.static_cost(PROGRAM, slow).seconds["collectives"] == pytest.approx(12 * late)
    assert program_cost.static_seconds(PROGRAM, CHIP) == pytest.approx(sum(cost.seconds.values()))
    assert cost.kernels == 4 * 12 + 3


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("replica_groups=[2,4]<=[8]", 4),
        ("replica_groups={{0,1},{2,3}}", 2),
        ("replica_groups=mesh['data'=1,'fsdp'=8,'tensor'=2,'context'=1] {'fsdp','tensor'}", 16),
    ],
)
def test_a_device_receives_what_a_ring_brings_it(groups, devices):
    def received(operation, shape):
        body = f"  %a = {shape} parameter(0)\n  ROOT %c = f32[64]{{0}} {operation}(%a), {groups}\n"
        text = f"ENTRY %main () -> f32[2] {{\n{body}}}\n"
        return by_name(text)["c"][0].exchanged

    others = devices - 1
    assert received("all-gather", "bf16[32]{0}") == 64 * others
    assert received("all-reduce", "f32[64]{0}") == pytest.approx(2 * 256 * others / devices)
    assert received("reduce-scatter", "f32[64]{0}") == pytest.approx(256 * others / devices)
    assert received("collective-permute", "f32[64]{0}") == 256


ATTENTION = """ENTRY %main () -> f32[2] {{
  %q = bf16[2,1024,{q}64]{{4,3,2,1,0}} parameter(0)
  %k = bf16[2,1024,2,64]{{3,2,1,0}} parameter(1)
  %v = bf16[2,1024,2,64]{{3,2,1,0}} parameter(2)
  ROOT %call = bf16[2,1024,{q}64]{{0}} custom-call(%q, %k, %v), custom_call_target="{target}", metadata={{op_name="{path}"}}
}}
"""


@pytest.mark.parametrize(
    ("q", "target", "path", "way", "count"),
    [
        ("2,4,", "__gpu$xla.gpu.triton", "jit(s)/attention/gqa_triton_forward/pallas_call", "forward", 2),
        ("2,4,", "__gpu$xla.gpu.triton", "jit(s)/attention/gqa_triton_dq/pallas_call", "backward", 2),
        ("2,4,", "__gpu$xla.gpu.triton", "jit(s)/attention/gqa_triton_dkv/pallas_call", "backward", 3),
        ("8,", "__cudnn$fmhaSoftmax", "jit(s)/attention/dot_product_attention_fwd", "forward", 2),
        ("8,", "__cudnn$fmhaSoftmaxBackward", "jit(s)/attention/dot_product_attention_bwd", "backward", 5),
    ],
)
def test_attention_is_counted_causal_at_its_published_rate_whichever_kernel_runs(q, target, path, way, count):
    (one, _) = by_name(ATTENTION.format(q=q, target=target, path=path))["call"]
    assert (one.part, one.attention, one.head_dim) == ("attention", way, 64)
    assert one.flops == count * 2 * (2 * 8 * 1024 * 1024 * 64) / 2
    forward, backward = CHIP.attention_shares(64)
    assert program_cost.seconds_of(one, CHIP) == pytest.approx(one.flops / (forward if way == "forward" else backward) / 1e12)


def test_copies_to_the_host_go_over_its_link():
    text = """ENTRY %main () -> f32[2] {
  %h = f32[1024]{0:S(5)} parameter(0)
  %a = f32[1024]{0} parameter(1)
  %buffer = f32[1024]{0:S(5)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %c = f32[1024]{0:S(5)} copy(%a)
}
"""
    cost = program_cost.static_cost(text, CHIP)
    assert cost.seconds == {"host": pytest.approx(4096 / 64e9)}


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no HLO"):
        program_cost.parse("HloModule nothing\n")


def test_products_of_a_compiled_step_are_the_models():
    """On this CPU, attention by the plain formula: dots over all keys, twice the causal count."""
    from gqa_jax import costs
    from gqa_jax.config import TrainConfig
    from gqa_jax.training import program, sharding

    values = TrainConfig(steps=10).to_dict()
    values |= {"context_length": 128, "batch_tokens": 512}
    how = {"remat": "none", "accumulation_steps": 2, "context_attention": "gather", "attention": "reference"}
    values["execution"] |= {"mesh": "data=1"} | how
    values["data"]["block_tokens"] = values["evaluation"]["tokens"] = 512
    values["model"] |= {"n_layers": 3, "d_model": 128, "n_heads": 2, "n_kv_heads": 1, "vocab_size": 512, "d_ff": None}
    values["model"] |= {"dtype": "float32"}
    config = TrainConfig.from_dict(values)
    import jax

    text = program.compile_step(config, sharding.make_mesh(config.execution.mesh, jax.devices()[:1])).as_text()
    found = sum(times * kernel.flops for kernel, times in program_cost.kernels(program_cost.parse(text)))
    causal = costs.train_flops(config.model, 128, 512, "exact")
    scores = 3 * 512 * 3 * 4 * (128 / 2) * 2 * 64  # forward and twice that, three layers
    assert found == pytest.approx(causal + scores, rel=0.02)


HLO = """HloModule jit_step

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %all-gather.1 = bf16[8,128]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=3, dimensions={1}
  %all-gather.2 = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%y), channel_id=3, dimensions={1}
  %reduce-scatter.1 = f32[8,16]{1,0} reduce-scatter(%z), channel_id=4, to_apply=%add
}

%condition (p: (s32[], bf16[8,16])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(36), metadata={}
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}

ENTRY %main (a: f32[16]) -> f32[16] {
  %while.1 = (s32[], bf16[8,16]) while(%t), condition=%condition, body=%body
  %all-reduce.5 = (f32[4]{0}, f32[2,3]{1,0}) all-reduce(%a, %b), channel_id=9, to_apply=%add
}
"""


def test_collectives_are_counted_by_channel_and_by_trips_of_loops():
    assert program_cost.collectives(HLO) == {
        "all-gather": {"count": 36, "bytes": 36 * 8 * 128 * 2},
        "reduce-scatter": {"count": 36, "bytes": 36 * 8 * 16 * 4},
        "all-reduce": {"count": 1, "bytes": (4 + 6) * 4},
    }


@pytest.mark.needs("libtpu")
def test_a_step_gathers_the_weights_of_every_layer_and_its_keys_and_values():
    """Of each layer both each way, and the embedding: more than the three layers."""
    from gqa_jax.planning import topologies
    from gqa_jax.training import program
    from tests.test_compile_check import tiny

    compiled = program.compile_step(tiny(), topologies.mesh("v5e:2x2", tiny().execution.mesh))
    assert program_cost.collectives(compiled.as_text())["all-gather"]["count"] >= 2 * 3 + 1
