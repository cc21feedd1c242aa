import pytest

from gqa_jax.config import ModelConfig
from gqa_jax.mesh import MeshShape


def test_a_mesh_is_read_as_it_is_written():
    shape = MeshShape.parse(" fsdp=4, context=2")
    assert shape == MeshShape(fsdp=4, context=2)
    assert str(shape) == "fsdp=4,context=2"
    assert MeshShape.parse(str(shape)) == shape
    assert shape.n_devices == 8
    assert str(MeshShape()) == "data=1"
    assert MeshShape.parse("data=1") == MeshShape()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fdsp=4", "did you mean 'fsdp'"),
        ("rows=4", "allowed: data, fsdp, tensor, context"),
        ("fsdp=4,fsdp=2", "there twice"),
        ("fsdp=0", "at least 1"),
        ("fsdp=x", "fsdp=x must be a whole number"),
        ("", "is no axis"),
    ],
)
def test_a_mesh_that_cannot_be_read_says_why(text, message):
    with pytest.raises(ValueError, match=message):
        MeshShape.parse(text)


@pytest.mark.parametrize(
    ("mesh", "n_kv", "message"),
    [
        ("data=3", 2, "data x fsdp = 3 does not divide the 8 sequences of a micro-batch: use [1, 2, 4, 8]"),
        ("context=3", 2, "context = 3 does not divide half of context_length = 64: use [1, 2, 4, 8, 16, 32]"),
        ("fsdp=8,context=8,tensor=2", 2, "does not divide model.d_model = 64"),
        ("tensor=8", 2, "does not divide model.n_heads = 12"),
        ("tensor=4", 6, "neither divides model.n_kv_heads = 6"),
        ("tensor=4", 1, None),
        ("tensor=2", 2, None),
        ("data=2,fsdp=2,context=2", 2, None),
    ],
)
def test_what_does_not_divide_is_said_with_what_would(mesh, n_kv, message):
    model = ModelConfig(d_model=64, n_heads=12, n_kv_heads=n_kv, head_dim=8)
    reason = MeshShape.parse(mesh).unsupported_reason(model, 64, 8)
    if message is None:
        assert reason is None
    else:
        assert message in reason


@pytest.mark.parametrize(("sequences", "context_length", "fits"), [(2, 12, False), (4, 12, True), (2, 16, True)])
def test_tensor_divides_the_tokens_of_a_device(sequences, context_length, fits):
    model = ModelConfig(d_model=64, n_heads=12, n_kv_heads=1, head_dim=8)
    reason = MeshShape(data=2, tensor=4, context=2).unsupported_reason(model, context_length, sequences)
    assert (reason is None) == fits
    if not fits:
        assert reason == "tensor = 4 does not divide the tokens of a device, which the loss is spread over"
