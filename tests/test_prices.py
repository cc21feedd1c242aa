import dataclasses
from pathlib import Path

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
    ("words", "chip", "usd"),
    [
        ("google", "h100", 10.9791),
        ("google:spot", "h100", 6.57),
        ("Lambda", "h100", 3.99),
        ("lambda:1x", "h100", 4.29),
        ("runpod:community", "h200", 3.59),
        ("google:europe-west4", "v5e", 1.56),
        ("spot:google:europe-west4", "v5e", 0.445),
        ("on-demand", "b200", 6.69),
        ("spot", "b200", None),
        ("lambda", "v6e", None),
    ],
)
def test_a_price_is_named_by_words_of_it(words, chip, usd):
    found = prices.find(chip, words)
    assert (found and found.usd_per_hour) == usd
    table = prices.load(words)
    assert (chip in table) == (usd is not None)
    assert all(price.spot == ("spot" in words) for price in table.values())


def test_words_that_no_price_has_are_refused_with_the_vendors():
    with pytest.raises(ValueError, match="prices 'acme': no list price is called so; vendors are AWS, Azure, Google Cloud"):
        prices.load("acme")


def test_a_spot_price_says_so():
    assert prices.find("v6e", "google:spot").origin == "Google Cloud, us-central1, spot, 2026-11"


def test_a_file_may_say_whose_prices_they_are(tmp_path):
    mine = '[h100]\nusd_per_hour = 2\nvendor = "Our own"\nregion = "cellar"\ndate = "2026-11"\nspot = true\n'
    (tmp_path / "p.toml").write_text(mine)
    assert prices.load(str(tmp_path / "p.toml"))["h100"].origin == "Our own, cellar, spot, 2026-11"
    (tmp_path / "p.toml").write_text("[h100]\nusd = 2\n")
    with pytest.raises(ValueError, match=r"h100.usd is unknown: allowed: usd_per_hour"):
        prices.load(str(tmp_path / "p.toml"))


def test_side_by_side_prices_are_of_one_vendor_or_it_is_said():
    assert prices.one_vendor(["h200", "h100", "v6e"]) == "Google Cloud"
    assert prices.one_vendor(["b200", "h100"]) == "Lambda"
    assert prices.one_vendor(["b200", "v6e"]) is None
    assert prices.compared(["h200", "v6e"], prices.load()) is None
    assert "--prices lambda compares one" in prices.compared(["b200", "h100"], prices.load())
    assert "b200 Lambda, v6e Google Cloud" in prices.compared(["b200", "v6e"], prices.load())
    assert "nobody lists all of them" in prices.compared(["b200", "v6e"], prices.load())


def test_the_page_has_every_list_price():
    assert prices.markdown() in (Path(__file__).parent.parent / "docs" / "prices.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"v5": 1.2}', r"unknown chip 'v5': did you mean 'v5[ep]'\?"),
        ('{"v5e": "1.2"}', r"v5e = '1.2': must be US dollars per chip-hour"),
        ('{"v5e": -1}', "must be US dollars"),
        ('{"v5e": 0}', "a number above 0"),
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
