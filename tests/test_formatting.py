import pytest

from gqa_jax import formatting

# What each number is, as the functions of the columns write it.
COLUMNS = (formatting.short, formatting.si, formatting.three, formatting.figure)
NUMBERS = [
    (2.0834e9, "2.08B", "2.08G", "2,083,400,000", "2,083,400,000"),
    (999.6e6, "1B", "1G", "999,600,000", "999,600,000"),
    (999.4e6, "999M", "999M", "999,400,000", "999,400,000"),
    (35_000, "35k", "35k", "35,000", "35,000"),
    (999.6, "1k", "1k", "1,000", "1,000"),
    (950.0, "950", "950", "950", "950"),
    (12.0, "12", "12", "12.0", "12"),
    (9.999, "10", "10", "10.0", "10"),
    (0.012345, "0.0123", "0.0123", "0.0123", "0.0123"),
    (1.5e22, "15Z", "15Z", "15,000,000,000,000,000,000,000", "15,000,000,000,000,000,000,000"),
    (0.0, "0", "0", "0", "0"),
]


@pytest.mark.parametrize(("value", "texts"), [(value, texts) for value, *texts in NUMBERS])
def test_numbers(value, texts):
    assert [write(value) for write in COLUMNS] == texts


@pytest.mark.parametrize(
    ("n_params", "text"),
    [
        (1.99e-28, "<1k"),
        (999.0, "<1k"),
        (1e3, "1.00k"),
        (2.0834e9, "2.08B"),
        (1e13, "10.0T"),
        (1.86e17, ">10T"),
        (float("inf"), ">10T"),
        (float("nan"), ""),
    ],
)
def test_sizes_of_models(n_params, text):
    assert formatting.size(n_params) == text


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ((1.93e9, 2.11e9), "1.93B to 2.11B"),
        ((951.0, 3e9), "at most 3.00B"),
        ((1.93e9, float("inf")), "at least 1.93B"),
        ((184.0, 1.93e14), "any size"),
        ((0.0, float("inf")), "any size"),
        ((float("nan"), 2e9), ""),
        ((0.0, 951.0), "<1k"),
        ((1e14, 1e15), ">10T"),
    ],
)
def test_intervals_of_sizes(ends, text):
    assert formatting.sizes(*ends) == text


def test_an_interval_is_open_where_nothing_bounds_it():
    assert formatting.interval(0.01, float("inf"), "{:.2f}".format) == "at least 0.01"
    assert formatting.interval(0.0, 1.888, "{:.2f}".format, (0.0, 10.0)) == "at most 1.89"
    assert formatting.interval(-1.0, 12.0, "{:.2f}".format, (0.0, 10.0)) == "any value"


@pytest.mark.parametrize(
    ("saving", "low", "high", "text", "between"),
    [
        (0.292, 0.253, 0.31, "29.2% less", "25.3% to 31.0%"),
        (-0.066, -0.107, -0.041, "6.6% more", "4.1% to 10.7%"),
        (0.02, -0.02, 0.051, "2.0% less", "2.0% more to 5.1% less"),
        (0.0004, 0.0, 0.001, "the same", "0.0% to 0.1%"),
        (-12.0, -50.0, -3.0, ">1000% more", "300.0% to >1000%"),
        (float("-inf"), float("-inf"), -3.0, ">1000% more", "300.0% to >1000%"),
        (float("nan"), float("nan"), float("nan"), "", ""),
    ],
)
def test_savings_say_their_direction(saving, low, high, text, between):
    assert (formatting.saving(saving), formatting.saving_between(low, high)) == (text, between)


def test_how_many_times():
    assert [formatting.times(x) for x in (1.84, 81.2, 110.0, 1234.5)] == ["1.84x", "81.2x", "110x", "1,234x"]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (57_600.0, "", "57.6k"),
        (0.0449, "US dollars", "$0.0449"),
        (1234.0, "US dollars", "$1,234"),
        (130e3, "US dollars", "$130k"),
        (91.8, "seconds", "91.8 s"),
        (0.000107, "seconds", "0.107 ms"),
        (613e6, "bytes", "613 MB"),
        (12.0, "bytes", "12.0 B"),
        (62e3, "", "62.0k"),
        (857e18, "FLOPs", "857E"),
        (float("inf"), "FLOPs", ""),
        (float("nan"), "seconds", ""),
    ],
)
def test_amounts_of_a_cost(value, unit, text):
    assert formatting.amount(value, unit) == text


def test_a_time_has_three_digits():
    assert [formatting.seconds(x) for x in (0.00198, 0.0998, 0.5, 96.6)] == ["1.98 ms", "99.8 ms", "0.500 s", "96.6 s"]


def test_endings_may_be_words():
    names = (" sextillion", " quintillion", " quadrillion", " trillion", " billion", " million", " thousand")
    assert formatting.scaled(2.0834e9, names, formatting.three) == "2.08 billion"


def test_three_digits_of_a_negative_number():
    assert [formatting.three(x) for x in (-1234.0, -0.5)] == ["-1,234", "-0.500"]


@pytest.mark.parametrize(
    ("share", "counted", "probable"),
    [
        (1.0, "100%", ">99.9%"),
        (0.9995, ">99%", ">99.9%"),
        (0.995, ">99%", "99.5%"),
        (0.8744, "87%", "87.4%"),
        (0.004, "<1%", "0.4%"),
        (0.0005, "<1%", "<0.1%"),
        (0.0, "0%", "<0.1%"),
    ],
)
def test_shares(share, counted, probable):
    assert (formatting.percent(share), formatting.probability(share)) == (counted, probable)
    assert formatting.percent_of_draws(share) == {"100%": ">99%", "0%": "<1%"}.get(counted, counted)  # never sure


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0.00%"),
        (1e-6, "<0.01%"),
        (0.0012, "0.12%"),
        (0.371, "37.10%"),
        (1.0, "100.00%"),
        (9.999, "999.90%"),
        (9.99996, ">1000%"),
        (10.0, ">1000%"),
        (float("inf"), ">1000%"),
        (float("nan"), ""),
    ],
)
def test_regrets(share, text):
    assert formatting.regret(share) == text


def test_numbers_that_stand_in_a_row_have_as_many_decimals():
    assert formatting.alike([3.0, 2.35, 2.5]) == ["3.00", "2.35", "2.50"]
    assert formatting.alike([3.0, 2.0]) == ["3", "2"]


def test_contexts_are_read_as_they_are_written():
    texts = [formatting.context(tokens) for tokens in (131_072, 8192, 1000, 10_000, 1_048_576)]
    assert texts == ["128K", "8K", "1,000", "10,000", "1024K"]
    assert [formatting.read_context(text) for text in ("131072", "128K", "8k", "1M")] == [131_072, 131_072, 8192, 1_048_576]


@pytest.mark.parametrize("text", ["", "K", "8G", "1.5K", "-8K", "0", "0K", "8 K", "²K", "2M" * 9, "1048577M", "9" * 5000])
def test_what_is_no_context(text):
    with pytest.raises(ValueError, match="is no number of tokens: write it like 131072 or 128K"):
        formatting.read_context(text)


def test_durations():
    seconds = (0.4, 5, 89.4, 90, 3599, 3600, 86_399, 86_400, 1e6)
    assert [formatting.duration(x) for x in seconds] == [
        "0 s", "5 s", "89 s", "2 min", "60 min", "1.0 h", "24.0 h", "1.0 d", "11.6 d",
    ]  # fmt: skip


def test_memory():
    assert formatting.gib(15.75 * 2**30) == "15.75 GiB"
    assert [formatting.gb(x) for x in (16.911e9, 105.75e9, 60e9, 1.234e6)] == ["16.91 GB", "105.8 GB", "60 GB", "0.001234 GB"]
