import errno

import pytest

from gqa_jax import config, errors


def test_the_closest_name_is_told_or_all_of_them():
    assert errors.close("n_head", ["n_heads", "d_model"]) == "n_heads"
    assert errors.close("rows", ["n_heads", "d_model"]) is None
    assert errors.closest("n_head", ["n_heads", "d_model"]) == "did you mean 'n_heads'?"
    assert errors.closest("rows", (name for name in ("n_heads", "d_model"))) == "allowed: n_heads, d_model"
    assert [errors.closest(name, ["n_heads"], "there are many") for name in ("n_head", "rows")] == [
        "did you mean 'n_heads'?",
        "there are many",
    ]


@pytest.mark.parametrize(
    ("error", "line", "named"),
    [
        (ValueError("\nfirst\nsecond"), "first", "ValueError: first"),
        (KeyError(), "", "KeyError"),
        (RuntimeError(" \n "), "", "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error(error, line, named):
    assert errors.first_line(error) == line
    assert errors.named(error) == named


def test_a_long_line_is_cut():
    assert errors.named(ValueError("x" * 300), 200) == "ValueError: " + "x" * 200


def test_a_chain_has_causes_and_what_was_being_handled():
    first, second, third = OSError("a"), ValueError("b"), RuntimeError("c")
    second.__cause__, third.__context__ = first, second
    assert errors.chain(third) == [third, second, first]
    first.__context__ = third  # a circle, as handlers that raise the same error again can make
    assert errors.chain(third) == [third, second, first]


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (ValueError("RESOURCE: write failed: No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("no space"), False),
    ],
)
def test_a_full_disk(error, full):
    assert errors.disk_is_full(error) == full


def test_a_configuration_error_is_one_class():
    assert config.ConfigError is errors.ConfigError
    assert issubclass(errors.ConfigError, ValueError)
