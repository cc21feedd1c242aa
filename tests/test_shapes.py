from gqa_jax import shapes


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
