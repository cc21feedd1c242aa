"""One program on any mesh: the same losses, everything sharded, the collectives that were meant and no others."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gqa_jax import program, sharding
from gqa_jax.mesh import MeshShape
from tests.test_train import tiny


def resolved(mesh="data=1", accumulation_steps=1, remat="none", method="gather", **changes):
    model = {"d_model": 64, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "remat": remat, **changes.pop("model", {})}
    return tiny(
        mesh=mesh, accumulation_steps=accumulation_steps, context_attention=method, batch_tokens=512, context_length=64,
        model=model, **changes,
    )  # fmt: skip


def mesh_of(config):
    return sharding.make_mesh(config.mesh_shape)


def batches(config, n, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(n):
        tokens = rng.integers(0, 256, size=(config.batch_size, config.context_length + 1)).astype(np.int32)
        batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
        if config.data.document_mask:
            batch["segments"] = np.sort(rng.integers(0, 4, size=batch["tokens"].shape), axis=1).astype(np.int32)
        yield batch


def placed(config, mesh, batch):
    rows = program.local_rows(config, mesh, config.accumulation_steps)
    assert np.array_equal(rows, np.arange(config.batch_size))  # one process has them all
    return program.place(config, mesh, batch, rows, config.accumulation_steps)


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
    ("data=8", 2, "gather"),
    ("fsdp=8", 2, "gather"),
    ("tensor=4", 2, "gather"),
    ("tensor=2", 2, "gather"),
    ("context=8", 2, "gather"),
    ("context=4", 1, "ring"),
    ("data=2,fsdp=2,context=2", 1, "gather"),
    ("data=2,tensor=2,context=2", 1, "ring"),
    ("fsdp=2,tensor=2,context=2", 2, "gather"),
]


@pytest.mark.parametrize(("mesh", "n_kv", "method"), MESHES)
def test_losses_are_those_of_one_device(alone, mesh, n_kv, method):
    rows, _ = train(resolved(mesh, method=method, model={"n_kv_heads": n_kv}))
    np.testing.assert_allclose(rows, alone[n_kv, False], rtol=1e-5)


@pytest.mark.parametrize(("mesh", "method"), [("context=4", "gather"), ("context=4", "ring"), ("fsdp=2,context=2", "ring")])
def test_document_masks_reach_across_devices(alone, mesh, method):
    config = resolved(mesh, method=method, data={"document_mask": True})
    np.testing.assert_allclose(train(config)[0], alone[2, True], rtol=1e-5)
    assert np.abs(alone[2, True][:, 0] - alone[2, False][:, 0]).max() > 1e-4  # the mask does something


def test_accumulation_and_remat_give_the_same_losses(alone):
    for changes in ({"accumulation_steps": 4}, {"remat": "full"}, {"remat": "attention_only"}, {"remat": "dots"}):
        rows, _ = train(resolved("data=2,fsdp=1", **changes), 4)
        np.testing.assert_allclose(rows, alone[2, False][:4], rtol=1e-5)


def test_fresh_states_are_the_same_bits_on_any_mesh():
    states = [program.fresh_state(c, mesh_of(c)) for c in (resolved(), resolved("fsdp=4,context=2"))]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(s.params) for s in states))


def test_the_first_loss_is_the_same_bits_where_each_device_sums_alone(alone):
    """A data axis of 2 halves the batch: sums of a token stay what they were, only the mean is of two parts."""
    first = train(resolved("tensor=1"), 1)[0][0, 0]
    assert first == alone[2, False][0, 0]
    assert train(resolved("data=2"), 1)[0][0, 0] == pytest.approx(first, rel=2e-7)


@pytest.mark.parametrize("mesh", ["fsdp=8", "fsdp=2,tensor=2,context=2", "data=2,context=4"])
def test_nothing_is_replicated_by_accident(mesh):
    """Parameters and both moments take 1 / (fsdp context tensor) of the bytes on each device, but for the norms."""
    config = resolved(mesh)
    _, state = train(config, 1)
    shape = config.mesh_shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = sharding.name_of(path)
        parts = leaf.size // leaf.addressable_shards[0].data.size
        if name in sharding.SCALARS or name.endswith("_norm"):
            assert parts == 1
        else:
            assert parts == shape.parameters * shape.tensor, jax.tree_util.keystr(path)


def test_key_value_heads_that_tensor_does_not_divide_are_replicated():
    params = jax.eval_shape(lambda: program.model.init_params(resolved().model, jax.random.key(0)))
    for n_kv, expected in ((2, PartitionSpec(None, "fsdp", "tensor", None)), (1, PartitionSpec(None, "fsdp", None, None))):
        found = sharding.specs(params, MeshShape(fsdp=2, tensor=2), n_kv)["layers"]["key"]
        assert jax.tree.map(str, found) == jax.tree.map(str, expected) or str(found).replace("('fsdp',)", "'fsdp'").replace(
            "('tensor',)", "'tensor'"
        ) == str(expected)


def test_a_leaf_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match="no rule of gqa_jax.sharding"):
        sharding.specs({"layers": {"gamma": jnp.zeros(3)}}, MeshShape(), 1)


def test_a_mesh_of_too_many_devices_says_how_many_there_are():
    with pytest.raises(ValueError, match="takes 16 devices, and there are 8"):
        sharding.make_mesh(MeshShape(data=16))


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


def collectives(compiled):
    """(kind, elements of the result) of every collective of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        match = re.search(
            r"= (\(?[a-z0-9]+\[[^=]*?) (all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all)(-start)?\(", line
        )
        if match:
            sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", match[1])]
            found.append((match[2], max(sizes), line))
    return found


def test_a_context_parallel_step_moves_keys_and_values_and_weights_but_no_queries_and_no_logits():
    config = dataclasses.replace(resolved("context=8", remat="attention_only"))
    compiled = program.compile_step(config, mesh_of(config))
    model, length = config.model, config.context_length
    queries = config.batch_size * length * model.n_heads * model.head_dim
    logits = config.batch_size * length * model.vocab_size
    sizes = [(kind, size) for kind, size, _ in collectives(compiled)]
    assert ("all-gather", logits) not in sizes
    keys_and_values = 2 * config.batch_size * length * model.n_kv_heads * model.head_dim
    gathers = [size for kind, size in sizes if kind == "all-gather" and size == keys_and_values]
    assert len(gathers) == 2  # in the scan over layers: forward, and again backward
    assert queries == keys_and_values or ("all-gather", queries) not in sizes
