import pytest

from gqa_jax import slices


def test_chips_and_hosts_follow_from_the_name():
    found = {name: slices.find(name) for name in ("v5e:4x4", "v5e:1x1", "v5p:2x2x4", "v4:2x2x2", "h200:8", "l4:1")}
    assert {name: s.n_chips for name, s in found.items()} == {
        "v5e:4x4": 16, "v5e:1x1": 1, "v5p:2x2x4": 16, "v4:2x2x2": 8, "h200:8": 8, "l4:1": 1,
    }  # fmt: skip
    assert [s.n_hosts for s in found.values()] == [4, 1, 4, 2, 1, 1]
    assert found["h200:8"].chip.name == "h200"


def test_an_unknown_name_says_the_closest():
    with pytest.raises(ValueError, match=r"did you mean 'v5e:4x4'\?"):
        slices.find("v5:4x4")
    with pytest.raises(ValueError, match=r"unknown topology 'h200:16': of h200 there are h200:1, h200:2, h200:4, h200:8"):
        slices.find("h200:16")
    with pytest.raises(ValueError, match=r"there are v4:2x2x1, .*; v5e:1x1, "):
        slices.find("cpu")


def test_larger_slices_are_of_the_same_chip_smallest_first():
    assert [s.name for s in slices.larger(slices.find("v5e:8x8"))] == ["v5e:8x16", "v5e:16x16"]
    assert slices.larger(slices.find("h200:8")) == []
