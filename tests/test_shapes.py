import numpy as np
import pytest

from gqa_jax import shapes
from gqa_jax.shapes import Aspect


def test_the_21_head_configurations():
    heads = shapes.head_configurations()
    assert len(heads) == len(set(heads)) == 21
    assert all(n % k == 0 for n, k in heads)


def test_names_of_table_9_are_close_to_12_l_d_squared():
    """Table 9's names but "1.2B" are 12 L d^2 within a few percent."""
    for name, size in shapes.SIZES.items():
        if name != "1.2B":
            assert abs(12 * size.n_layers * size.d_model**2 / (float(name[:-1]) * 1e6) - 1) < 0.06, name


def test_ffn_width_is_a_multiple_of_32_next_to_8_d_over_3():
    for d in range(32, 4096, 8):
        width = shapes.ffn_width(d)
        assert width % 32 == 0
        assert abs(width - 8 * d / 3) <= 16 or width == 32


def test_aspect_is_linear_between_known_sizes_and_constant_outside():
    aspect = Aspect.between([(200.0, 2, 64), (100.0, 2, 32)])
    assert aspect == Aspect((100.0, 200.0), (16.0, 32.0))
    np.testing.assert_array_equal(aspect([[1, 100, 150], [200, 1e9, np.inf]]), [[16, 16, 24], [32, 32, 32]])
    assert aspect(150) == 24


def test_the_papers_aspect_is_table_9_then_table_7():
    """Of N = 12 L d^2; not monotone."""
    aspect = shapes.paper_aspect()
    assert len(aspect.params) == 7 + 7
    assert [aspect(12 * size.n_layers * size.d_model**2) for size in shapes.SIZES.values()] == pytest.approx(
        [64, 256 / 3, 64, 256 / 3, 64, 160 / 3, 64, 128 / 3]
    )
    assert aspect(12 * 80 * 8192**2) == aspect(1e15) == pytest.approx(102.4)
    assert aspect(2.087e9) == pytest.approx(56.4, abs=0.05)


def test_a_constant_aspect_is_the_same_for_every_size():
    np.testing.assert_array_equal(Aspect.constant(64)(np.array([1e6, 1e12, np.inf])), [64, 64, 64])


@pytest.mark.parametrize(
    ("params", "ratio", "message"),
    [
        ((), (), "0 sizes and 0 ratios"),
        ((1.0,), (64.0, 64.0), "1 sizes and 2 ratios"),
        ((1.0, 1.0), (64.0, 32.0), "params 1, 1: sizes must increase"),
        ((2.0, 1.0), (64.0, 32.0), "params 2, 1: sizes must increase"),
        ((1.0,), (0.0,), r"aspect ratio = 0.0: must be above 0"),
        ((float("nan"),), (64.0,), "aspect params = nan: must be above 0 and finite"),
    ],
)
def test_knots_that_make_no_aspect_are_refused(params, ratio, message):
    with pytest.raises(ValueError, match=message):
        Aspect(params, ratio)


def test_one_size_with_two_aspects_is_refused():
    assert Aspect.between([(100, 2, 32), (100, 2, 32)]) == Aspect((100,), (16,))
    with pytest.raises(ValueError, match="one ratio d / L each"):
        Aspect.between([(100, 2, 32), (100, 4, 32)])
