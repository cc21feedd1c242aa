"""Prices by words, from a file, and side by side; the page that lists them."""

import dataclasses
from pathlib import Path

import pytest

from gqa_jax.hardware import CHIPS, Price, prices
from launch import __main__ as launch

PAGE = Path(__file__).parents[1] / "docs" / "prices.md"


def dollars(spec):
    return {name: price.usd_per_hour for name, price in prices.load(spec).items()}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("google:spot", {"v4": 0.922, "v5e": 0.245, "v5p": 0.836, "v6e": 0.544, "h100": 6.571}),
        ("spot", {"v4": 0.922, "v5e": 0.245, "v5p": 0.836, "v6e": 0.544, "h100": 6.571}),
        (" Google : US-east5:spot ", {"v5e": 0.6, "v5p": 1.68, "v6e": 1.215}),
        ("google cloud:europe-west4", {"v5e": 1.56, "v5p": 4.2525, "v6e": 2.97}),
        ("us-central1:v6e:on-demand", {"v6e": 2.7}),
        ("lambda", {"h100": 3.99, "a100": 2.79, "b200": 6.69}),
        ("lambda:1x", {"h100": 4.29, "b200": 6.99}),
        ("runpod:secure", {"h200": 4.59, "h100": 3.49, "a100": 1.59, "b200": 6.79}),
        ("community", {"h200": 3.59, "h100": 2.69, "a100": 1.39, "b200": 5.98}),
        ("p5.48xlarge", {"h100": 6.88}),
        ("azure:", {"h100": 12.29}),
    ],
)
def test_words_name_the_first_row_of_each_chip_that_has_them_all(words, found):
    assert dollars(words) == found


def test_without_words_the_first_row_is_taken():
    assert prices.load() == {name: chip.price for name, chip in CHIPS.items()}
    assert prices.load("on-demand") == prices.load()
    assert dollars("google") == {name: usd for name, usd in dollars(None).items() if name != "b200"}


def test_every_row_can_be_named():
    for name, chip in CHIPS.items():
        for price in chip.prices:
            term = prices.SPOT if price.spot else prices.ON_DEMAND
            assert prices.find(name, f"{price.product}:{price.region}:{term}") == price


def test_a_word_is_found_where_one_begins():
    assert "b200" not in prices.load("us")  # Nebius has it, and no us-east1
    assert set(prices.load("h1")) == {"h100"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("gogle", r"prices 'gogle': no list price has 'gogle' in its vendor, product or region, did you mean 'google'\?; "
                  r"vendors are aws, azure, google, lambda, nebius, runpod, terms spot and on-demand; a file ends in .json or"),
        ("google:mars", "no list price has 'mars' in its vendor, product or region; vendors are"),
        ("bus", "no list price has 'bus'"),
        ("mine.yaml", "no list price has 'mine.yaml'.*a file ends in .json or .toml"),
        ("azure:spot", "no list price has all of these words, spot; there are Azure ND96isr_H100_v5$"),
        ("lambda:us-central1", "no list price has all of these words, on-demand; there are Lambda 8x H100 SXM, Lambda 4x"),
        ("google:spot:on-demand", "either spot or on-demand"),
        ("", "prices '': no words; vendors are aws"),
        (" : ", "no words"),
    ],
)  # fmt: skip
def test_words_that_name_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        prices.load(words)


def test_a_chip_without_the_words_has_no_price_and_its_rows_are_listed():
    assert prices.find("h200", "azure") is None
    assert "h200" not in prices.load("azure")
    assert prices.listing("h200") == (
        "Google Cloud a3-ultragpu-8g, us-central1: $10.44; RunPod secure H200, any region: $4.59; "
        "RunPod community H200, any region: $3.59; Nebius HGX H200, any region: $4.50"
    )
    assert "Google Cloud a3-highgpu-1g, us-central1, spot: $6.57" in prices.listing("h100")


def test_the_device_that_has_no_such_price_is_told_its_rows(capsys):
    asked = ["optimum", "--preset", "paper", "--context", "32K", "--loss", "2.615", "--cost", "price", "--device", "h200"]
    assert launch.main([*asked, "--prices", "azure"]) == launch.EXIT_BAD_INPUT
    assert f"--prices azure: h200 has {prices.listing('h200')}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("chips", "vendor"),
    [
        (["v5e", "h200", "h100"], "Google Cloud"),
        (["b200", "h100"], "Lambda"),
        (["h200", "b200"], "RunPod"),  # Google has no B200, Lambda no H200 here
        (["v5e", "b200"], None),
        ([], None),
        (["h100", "mine"], None),
    ],
)
def test_a_vendor_of_all_the_chips(chips, vendor):
    assert prices.one_vendor(chips) == vendor


def test_prices_side_by_side_are_of_one_vendor_or_that_is_said(tmp_path):
    table = prices.load()
    assert prices.compared(["v5e", "h200", "h100"], table) is None
    assert prices.compared(["b200"], table) is None
    assert prices.compared(["h200", "b200"], table) == (
        "prices of several vendors are compared (h200 Google Cloud, b200 Lambda), which ask for different things: "
        "--prices runpod compares one"
    )
    assert prices.compared(["h200", "b200"], prices.load("runpod")) is None
    assert prices.compared(["v6e", "b200"], table).endswith("which ask for different things: nobody lists all of them")
    assert prices.compared(["h200", "h100"], {"h200": table["h200"]}) is None  # nothing to compare with
    of_mine = prices.compared(["h100", "mine"], {"h100": table["h100"], "mine": Price(2.0, "Me")})
    assert of_mine.startswith("prices of several vendors are compared (h100 Google Cloud, mine Me)")
    mixed = table | {"h100": prices.load("google:spot")["h100"]}
    assert prices.compared(["h200", "h100"], mixed) == (
        "prices on several terms are compared (h200 Google Cloud, h100 Google Cloud spot): a spot machine may be taken back"
    )


@pytest.mark.parametrize(("name", "text"), [("p.json", '{"v5e": 0.5, "h200": 3}'), ("P.TOML", "v5e = 0.5\nh200 = 3\n")])
def test_a_file_takes_the_place_of_rows(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    table = prices.load(str(tmp_path / name))
    assert (table["v5e"].usd_per_hour, table["h200"].usd_per_hour) == (0.5, 3.0)
    assert table["v5e"].origin == str(tmp_path / name)
    assert table["v6e"] == CHIPS["v6e"].price


def test_a_file_may_say_whose_prices_they_are(tmp_path):
    h100 = 'usd_per_hour = 2.4\nvendor = "Our cluster"\nregion = "here"\nspot = true\ndate = 2026-11-01'
    (tmp_path / "p.toml").write_text(f"[v5e]\nusd_per_hour = 1\n[h100]\n{h100}\n")
    table = prices.load(str(tmp_path / "p.toml"))
    assert table["h100"] == Price(2.4, "Our cluster", region="here", date="2026-11-01", spot=True)
    assert table["h100"].origin == "Our cluster, here, spot, 2026-11-01"
    assert table["v5e"].origin == str(tmp_path / "p.toml")


def test_a_chip_without_a_price_is_left_out(monkeypatch):
    monkeypatch.setitem(CHIPS, "v5e", dataclasses.replace(CHIPS["v5e"], prices=()))
    assert set(prices.load()) == {*CHIPS} - {"v5e"}
    assert prices.listing("v5e") == "no list price"
    assert prices.one_vendor(["v5e", "h100"]) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"v5": 1.2}', r"unknown chip 'v5': did you mean 'v5[ep]'\?"),
        ('{"v5e": "1.2"}', r"v5e = '1.2': must be US dollars per chip-hour"),
        ('{"v5e": -1}', "must be US dollars"),
        ('{"v5e": 0}', "v5e = 0: must be US dollars per chip-hour, a number above 0"),
        ('{"v5e": NaN}', "must be US dollars"),
        ('{"v5e": Infinity}', "must be US dollars"),
        (f'{{"v5e": {10**400}}}', "must be US dollars"),
        ('{"v5e": true}', "must be US dollars"),
        ('{"v5e": {"vendor": "Me"}}', "v5e = None: must be US dollars"),
        ('{"v5e": {"usd": 1}}', r"v5e.usd is unknown: did you mean 'usd_per_hour'\?|v5e.usd is unknown: allowed"),
        ('{"v5e": {"usd_per_hour": 1, "spot": "no"}}', "v5e.spot = 'no': must be true or false"),
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
