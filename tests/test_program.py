"""One program on any mesh: the same losses, everything sharded, the collectives that were meant and no others."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from gqa_jax import model
from gqa_jax.config import TrainConfig, default_config
from gqa_jax.mesh import MeshShape
from gqa_jax.planning import topologies
from gqa_jax.training import program, sharding
from tests.test_train import tiny


def resolved(mesh="data=1", accumulation_steps=1, remat="none", method="gather", **changes):
    model = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, **changes.pop("model", {})}
    execution = {"mesh": mesh, "remat": remat, "accumulation_steps": accumulation_steps, "context_attention": method}
    return tiny(execution=execution, batch_tokens=512, context_length=64, model=model, **changes)


def carried_out(config, **execution):
    return dataclasses.replace(config, execution=dataclasses.replace(config.execution, **execution))


def mesh_of(config):
    return sharding.make_mesh(config.execution.mesh)


def batches(config, n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        tokens = rng.integers(0, 256, size=(config.batch_size, config.context_length + 1)).astype(np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        if config.data.document_mask:
            batch["segments"] = np.sort(rng.integers(0, 4, size=batch["tokens"].shape), axis=1).astype(np.int32)
        yield batch


def placed(config, mesh, batch):
    rows = program.local_rows(config, mesh, config.execution.accumulation_steps)
    assert np.array_equal(rows, np.arange(config.batch_size))  # one process has them all
    return program.place(config, mesh, batch, rows, config.execution.accumulation_steps)


def train(config, n_steps=20):
    """Losses and gradient norms of `n_steps`, and the last state."""
    mesh = mesh_of(config)
    state, step = program.fresh_state(config, mesh), program.compile_step(config, mesh)
    rows = []
    for batch in batches(config, n_steps):
        state, metrics = step(state, placed(config, mesh, batch))
        rows.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return np.array(rows), state


@pytest.fixture(scope="module")
def alone():
    """20 steps on one device, plain and with document masks, for key/value head counts that meshes treat differently."""
    return {
        (n_kv, masked): train(resolved(model={"n_kv_heads": n_kv}, data={"document_mask": masked}))[0]
        for n_kv, masked in ((2, False), (1, False), (2, True))
    }


MESHES = [
    ("context=4", 1, "ring"),
    ("fsdp=2,tensor=2,context=2", 2, "gather"),
    *(
        pytest.param(*rest, marks=pytest.mark.thorough)
        for rest in (
            ("data=8", 2, "gather"),
            ("fsdp=8", 2, "gather"),
            ("tensor=4", 2, "gather"),  # a head is on two devices
            ("context=8", 2, "gather"),
            ("data=2,fsdp=2,context=2", 1, "gather"),
            ("tensor=2", 2, "gather"),
            ("data=2,tensor=2,context=2", 1, "ring"),
            ("data=2,fsdp=2,tensor=2", 1, "gather"),
            ("fsdp=4,context=2", 2, "ring"),
        )
    ),
]


@pytest.mark.parametrize(("mesh", "n_kv", "method"), MESHES)
def test_losses_are_those_of_one_device(alone, mesh, n_kv, method):
    rows, _ = train(resolved(mesh, method=method, model={"n_kv_heads": n_kv}))
    np.testing.assert_allclose(rows, alone[n_kv, False], rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "method"),
    [
        ("fsdp=2,context=2", "ring"),
        pytest.param("context=4", "gather", marks=pytest.mark.thorough),
        pytest.param("context=4", "ring", marks=pytest.mark.thorough),
    ],
)
def test_document_masks_reach_across_devices(alone, mesh, method):
    config = resolved(mesh, method=method, data={"document_mask": True})
    np.testing.assert_allclose(train(config)[0], alone[2, True], rtol=1e-5)
    assert np.abs(alone[2, True][:, 0] - alone[2, False][:, 0]).max() > 1e-4  # the mask does something


def test_accumulation_and_remat_give_the_same_losses(alone):
    for changes in ({"accumulation_steps": 4}, {"remat": "full"}, {"remat": "attention_only"}, {"remat": "dots"}):
        rows, _ = train(resolved("data=2,fsdp=1", **changes), 4)
        np.testing.assert_allclose(rows, alone[2, False][:4], rtol=1e-5)


# What an optimizer would do nothing with but keep: the state after a step is the gradient.
KEEP = optax.GradientTransformation(lambda _: (), lambda grads, _, params: (jax.tree.map(jnp.zeros_like, params), grads))


def gradients(config):
    """A function (params, batch) -> gradients as an optimizer is given them, their norm, and the loss."""
    mesh = mesh_of(config)
    step = jax.jit(functools.partial(program.train_step, config, KEEP, mesh))

    def of(params, batch):
        with jax.set_mesh(mesh):
            state, metrics = step(program.TrainState(jnp.int32(0), params, ()), placed(config, mesh, batch))
        return jax.device_get(state.opt_state), metrics["grad_norm"], metrics["loss"]

    return of


def differences(found, expected):
    """Of each gradient, the norm of what it has otherwise, relative to its own."""
    return jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b), found, expected)


def apart(found, expected):
    """The largest, over parameters, of the norm of what a gradient has otherwise, relative to its own."""
    relative = jax.tree.map(lambda a, b: np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b), found, expected)
    return max(jax.tree.leaves(relative))


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def narrow(request):
    """Parameters in bfloat16, computed with in either dtype, 64 sequences, and the mean of the gradients of each alone."""
    model = {"param_dtype": "bfloat16", "dtype": request.param, "n_kv_heads": 1}
    config = dataclasses.replace(resolved(model=model), batch_tokens=64 * 64)
    params = jax.device_get(program.fresh_state(config, mesh_of(config)).params)
    (batch,) = batches(config, 1)
    alone = gradients(dataclasses.replace(config, batch_tokens=64))
    each = [alone(params, {name: x[i : i + 1] for name, x in batch.items()})[0] for i in range(64)]
    return config, params, batch, jax.tree.map(lambda *grads: np.mean(np.asarray(grads, np.float64), axis=0), *each)


def test_gradients_of_parameters_in_bfloat16_are_summed_over_micro_batches_in_float32(narrow):
    """Summed in bfloat16 they are off by some hundredths: a small gradient is lost beside a large sum."""
    config, params, batch, mean = narrow
    found, norm, _ = gradients(carried_out(config, accumulation_steps=64))(params, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    assert apart(found, mean) < 1e-6
    assert float(norm) == pytest.approx(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(mean))), rel=1e-6)


@pytest.mark.parametrize("narrow", ["float32"], indirect=True)
@pytest.mark.parametrize(
    ("mesh", "tolerance"),
    [
        ("data=8", 1e-6),
        ("fsdp=8", 2**-8),  # the sum over devices is rounded once to the dtype of the matrix
        ("data=2,tensor=4", 2**-8),
    ],
)
def test_gradients_of_parameters_in_bfloat16_are_summed_over_devices_in_float32(narrow, mesh, tolerance):
    config, params, batch, mean = narrow
    on = carried_out(config, mesh=MeshShape.parse(mesh), accumulation_steps=8)
    state, placement = program.TrainState(jnp.int32(0), params, ()), placed(on, mesh_of(on), batch)
    jaxpr = jax.make_jaxpr(functools.partial(program.train_step, on, KEEP, mesh_of(on)))(state, placement)
    sums = re.findall(r":(\w+)\[[\d,]*\] = (?:psum|reduce_scatter)\[", str(jaxpr))  # computed in float32: all others are too
    assert set(sums) == {"f32"}
    assert apart(gradients(on)(params, batch)[0], mean) < tolerance


def test_gradients_of_parameters_in_bfloat16_and_their_norm_are_float32(narrow):
    """Of a batch without micro-batches. In bfloat16 norms are on a grid of 1 in 128 to 256: of ten batches many are equal."""
    config, params, _, _ = narrow
    one = dataclasses.replace(config, batch_tokens=512)
    step = gradients(one)
    found = [step(params, batch) for batch in batches(one, 10)]
    grads = jax.tree.leaves_with_path(found[0][0])
    assert {leaf.dtype for _, leaf in grads} == {np.dtype(np.float32)}
    rounded = {sharding.name_of(path) for path, leaf in grads if (leaf == leaf.astype(jnp.bfloat16)).all()}
    assert not rounded & {"embedding", "final_norm", "attention_norm", "ffn_norm"}  # sums over tokens
    expected = np.sqrt(sum(np.sum(np.square(leaf.astype(np.float64))) for _, leaf in grads))
    assert float(found[0][1]) == pytest.approx(expected, rel=1e-6)
    assert {norm.dtype for _, norm, _ in found} == {np.dtype(np.float32)}
    assert sum(float(norm) == float(norm.astype(jnp.bfloat16)) for _, norm, _ in found) < 3


@pytest.fixture(scope="module")
def untied():
    """Parameters of an untied model, a batch, and loss and gradients by the plain form of both."""
    config = resolved(model={"untied": True})
    params = jax.device_get(program.fresh_state(config, mesh_of(config)).params)
    (batch,) = batches(config, 1)

    def mean_loss(params):
        log_p = jax.nn.log_softmax(model.with_params(config.model, params)(batch["tokens"]))
        return -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1).mean()

    return params, batch, *jax.device_get(jax.value_and_grad(mean_loss)(params))


@pytest.mark.parametrize(
    ("mesh", "accumulation_steps"),
    [
        ("data=1", 1),
        ("fsdp=2,tensor=2,context=2", 1),
        ("data=2,fsdp=4", 4),
        *(pytest.param(mesh, 2, marks=pytest.mark.thorough) for mesh in ("data=4", "fsdp=2", "tensor=4", "context=4")),
    ],
)
def test_an_untied_model_has_the_gradients_of_the_plain_form_on_any_mesh(untied, mesh, accumulation_steps):
    """The loss differentiates the head, the lookup the embedding, whose rows of tokens that do not occur stay zero."""
    params, batch, loss, expected = untied
    config = resolved(mesh, accumulation_steps=1, model={"untied": True})
    config = carried_out(
        config, accumulation_steps=min(accumulation_steps, config.batch_size // config.execution.mesh.sequences)
    )
    found, norm, mean = gradients(config)(params, batch)
    assert float(mean) == pytest.approx(float(loss), rel=1e-6)
    assert apart(found, expected) < 1e-5
    assert float(norm) == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
    absent = np.setdiff1d(np.arange(config.model.vocab_size), batch["tokens"])
    assert len(absent) > 0
    assert not found["embedding"][absent].any()
    assert found["head"][absent].any(axis=1).all()


def test_gradients_of_a_head_in_bfloat16_are_sums_in_float32():
    config = resolved(model={"untied": True, "param_dtype": "bfloat16"})
    params, (batch,) = program.fresh_state(config, mesh_of(config)).params, batches(config, 1)
    found, _, _ = gradients(config)(params, batch)
    for name in ("embedding", "head"):
        assert found[name].dtype == np.float32
        assert (found[name] != found[name].astype(jnp.bfloat16)).any()


def test_an_untied_model_is_evaluated_by_its_head(untied):
    params, batch, loss, _ = untied
    for mesh in ("data=1", "fsdp=2,tensor=2,context=2"):
        config = resolved(mesh, model={"untied": True})
        on = mesh_of(config)
        losses = program.evaluation_losses(config, on)(params, placed(config, on, batch))
        assert float(np.mean(losses)) == pytest.approx(float(loss), rel=1e-6)


@pytest.mark.parametrize("untied", [False, True])
def test_fresh_states_are_the_same_bits_on_any_mesh(untied):
    both = (resolved(mesh, model={"untied": untied}) for mesh in ("data=1", "fsdp=4,context=2"))
    states = [program.fresh_state(c, mesh_of(c)) for c in both]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(s.params) for s in states))


def test_weights_are_of_the_whole_seed():
    first, *others = (program.fresh_state(c, mesh_of(c)).params for c in (resolved(seed=s) for s in (5, 2**32 + 5, 2**63 - 1)))
    drawn = {name: [p["layers"][name] for p in (first, *others)] for name in ("query", "down")}
    for one, *rest in [*drawn.values(), [p["embedding"] for p in (first, *others)]]:
        assert not any((one == other).any() for other in rest)
    expected = model.init_params(resolved().model, jax.random.key(5))
    np.testing.assert_allclose(first["embedding"], expected["embedding"], rtol=1e-6)


@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8"])
def test_losses_of_tokens_before_the_first_step_are_the_same_bits(mesh):
    """Where no sum of a token is cut. Over `context` keys meet a query in other chunks: the last bit may differ."""
    losses = []
    for config in (resolved(mesh), resolved()):
        (batch,) = batches(config, 1)
        state, on = program.fresh_state(config, mesh_of(config)), mesh_of(config)
        rows = program.local_rows(config, on, 1)
        out = program.evaluation_losses(config, on)(state.params, program.place(config, on, batch, rows, 1))
        losses.append(np.asarray(out)[:, np.argsort(program.order(config))])
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize(
    ("mesh", "untied"), [("fsdp=8", False), ("fsdp=2,tensor=2,context=2", True), ("data=2,context=4", False)]
)
def test_nothing_is_replicated_by_accident(mesh, untied):
    """Parameters and both moments take 1 / (fsdp context tensor) of the bytes on each device, but for the norms."""
    config = resolved(mesh, model={"untied": untied})
    _, state = train(config, 1)
    shape = config.execution.mesh
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = sharding.name_of(path)
        parts = leaf.size // leaf.addressable_shards[0].data.size
        if name in sharding.SCALARS or name.endswith("_norm"):
            assert parts == 1
        else:
            assert parts == shape.parameters * shape.tensor, jax.tree_util.keystr(path)


def test_key_value_heads_that_tensor_does_not_divide_are_replicated():
    params = jax.eval_shape(lambda: model.init_params(resolved().model, jax.random.key(0)))
    for n_kv, expected in ((2, PartitionSpec(None, "fsdp", "tensor", None)), (1, PartitionSpec(None, "fsdp", None, None))):
        found = sharding.specs(params, MeshShape(fsdp=2, tensor=2), n_kv)["layers"]["key"]
        assert found == expected


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="add one"):
        sharding.specs({"layers": {"gamma": jnp.zeros(3)}}, MeshShape(), 1)


def test_a_mesh_of_too_many_devices_says_how_many_there_are():
    with pytest.raises(ValueError, match="takes 16 devices, and there are 8"):
        sharding.make_mesh(MeshShape(data=16))


@dataclasses.dataclass(frozen=True)
class Device:
    """A device as a mesh looks at it: TPUs know their slice, and where in it they are."""

    id: int
    process_index: int
    slice_index: int = 0
    coords: tuple = ()
    platform: str = "cpu"
    device_kind: str = "cpu"
    core_on_chip: int = 0


@pytest.mark.parametrize("mesh", ["data=4,fsdp=4", "fsdp=16", "fsdp=4,tensor=2,context=2"])
def test_neighbours_in_a_mesh_are_neighbours_on_the_network_of_a_tpu(mesh):
    """Four hosts of 2 x 2 chips are a v5e of 4 x 4: four devices in turn are a row of it, and not a host's chips."""
    places = [(host, (2 * (host % 2) + chip % 2, 2 * (host // 2) + chip // 2, 0)) for host in range(4) for chip in range(4)]
    devices = [Device(i, host, 0, at, "tpu", "TPU v5 lite") for i, (host, at) in enumerate(places)]
    rows = sharding.make_mesh(MeshShape.parse(mesh), devices).devices.reshape(4, 4)
    assert [[device.coords[:2] for device in row] for row in rows] == [[(x, y) for x in range(4)] for y in range(4)]


def test_data_is_spread_over_slices_first():
    devices = [Device(i, i % 2, i % 2) for i in range(8)]
    mesh = sharding.make_mesh(MeshShape(data=4, fsdp=2), devices)
    assert mesh.devices.shape == (4, 2, 1, 1)
    assert [[device.slice_index for device in row.flat] for row in mesh.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(ValueError, match="on 2 slices: data must be a multiple of 2"):
        sharding.make_mesh(MeshShape(fsdp=8), devices)


def test_steps_compile_once_and_donate_their_state():
    config = resolved("fsdp=2,context=2")
    mesh = mesh_of(config)
    state, step = program.fresh_state(config, mesh), program.compile_step(config, mesh)
    before = state.params["embedding"]
    for batch in batches(config, 3):
        state, _ = step(state, placed(config, mesh, batch))  # a Compiled takes one set of shapes and shardings only
    assert before.is_deleted()
    assert int(state.step) == 3


def test_evaluation_gives_the_loss_of_every_token_in_order():
    config = resolved("fsdp=2,tensor=2,context=2")
    mesh, lone = mesh_of(config), resolved()
    (batch,) = batches(config, 1)
    rows = program.local_rows(config, mesh, 1)
    losses = []
    for c in (config, lone):
        state = program.fresh_state(c, mesh_of(c))
        out = program.evaluation_losses(c, mesh_of(c))(state.params, program.place(c, mesh_of(c), batch, rows, 1))
        losses.append(np.asarray(out)[:, np.argsort(program.order(c))])
    np.testing.assert_allclose(*losses, rtol=2e-5)


KINDS = "all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all"
# From the beginning of a line on: kernels are words of megabytes, in which a search from every character on takes minutes.
COLLECTIVE = re.compile(
    rf"^\s*(?:ROOT )?(\S+) = (\(?[a-z0-9]+\[[^=\n]*?) ({KINDS})(?:-start)?\(.*channel_id=(\d+)", re.MULTILINE
)


def collectives(compiled):
    """Kind and elements of the largest result of every collective of a TPU program.

    An all-gather that overlaps with others' work is several lines with one channel.
    """
    found = {}
    for name, result, kind, channel in COLLECTIVE.findall(compiled.as_text()):
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", result)]
        found[channel if kind == "all-gather" else name] = (kind, max(sizes))
    return list(found.values())


@pytest.mark.needs("libtpu")
@pytest.mark.thorough
def test_a_step_at_128k_moves_keys_and_values_once_each_way_and_no_queries_and_no_logits():
    """Compiled for 16 chips of a v5e. In the scan over layers, so once a layer; backward gathers again, then scatters."""
    length, n_heads, head_dim = 131_072, 8, 64
    config = default_config()
    config.context_length, config.batch_tokens, config.steps = length, 4 * length, 10
    config.execution.update(mesh="fsdp=4,context=4", remat="attention_only", accumulation_steps=1, context_attention="gather")
    config.model.update(n_layers=3, d_model=256, n_heads=n_heads, n_kv_heads=1)
    config = TrainConfig.from_dict(config.to_dict())
    found = collectives(program.compile_step(config, topologies.mesh("v5e:4x4", config.execution.mesh)))
    keys_and_values = 2 * length * head_dim
    assert found.count(("all-gather", keys_and_values)) == 2
    assert found.count(("reduce-scatter", keys_and_values // 4)) == 1
    embedding = config.model.vocab_size * config.model.d_model
    logits, queries = length * config.model.vocab_size, length * n_heads * head_dim
    largest = max(size for _, size in found)
    assert largest < 1.01 * max(embedding, keys_and_values) < min(logits, queries)
