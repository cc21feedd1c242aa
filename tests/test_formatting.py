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


@pytest.mark.parametrize("text", ["", "K", "8G", "1.5K", "-8K", "0", "0K", "8 K", "²K"])
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
