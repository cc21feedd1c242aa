import dataclasses

import pytest

from gqa_jax import prices
from gqa_jax.hardware import CHIPS


@pytest.mark.parametrize(("name", "text"), [("p.json", '{"v5e": 0.5, "h200": 3}'), ("p.toml", "v5e = 0.5\nh200 = 3\n")])
def test_a_file_takes_the_place_of_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    table = prices.load(str(tmp_path / name))
    assert (table["v5e"].usd_per_hour, table["h200"].usd_per_hour) == (0.5, 3.0)
    assert table["v5e"].origin == str(tmp_path / name)
    assert table["v6e"] == CHIPS["v6e"].price


def test_a_chip_without_a_price_is_left_out(monkeypatch):
    assert prices.load()["v5e"] == CHIPS["v5e"].price
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], prices=()))
    assert set(prices.load()) == {*CHIPS} - {"v5e"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"v5": 1.2}', r"unknown chip 'v5': did you mean 'v5[ep]'\?"),
        ('{"v5e": "1.2"}', r"v5e = '1.2': must be US dollars per chip-hour"),
        ('{"v5e": -1}', "must be US dollars"),
        ('{"v5e": NaN}', "must be US dollars"),
        ("[1, 2]", "must map chips"),
        ("{", "prices .*p.json: Expecting"),
    ],
)
def test_what_is_no_price_is_refused(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        prices.load(str(tmp_path / "p.json"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"prices .*gone.json: .*No such file"):
        prices.load(str(tmp_path / "gone.json"))
