"""Near-duplicates: which paragraphs count as copies, and which are looked at."""

import numpy as np
import pytest

from gqa_jax.data import paragraphs

LINE = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
LONG = " ".join(f"Sentence number {i} of a long paragraph." for i in range(60))


def keys(*texts):
    found, counts = paragraphs.keys(text.encode() for text in texts)
    assert found.dtype == np.uint64
    assert counts.dtype == np.int32
    assert counts.sum() == len(found)
    return found.tolist(), counts.tolist()


@pytest.mark.parametrize("text", [LINE, LONG, "Élan vital, été: " + LINE, "Москва — столица России. " * 20, LINE + " é"])
def test_case_and_white_space_do_not_matter(text):
    (expected,), _ = keys(text)
    for change in (text.upper(), f"\n{text}\n", *(text.replace(" ", blank) for blank in ("\n", "  \t", "\u00a0"))):
        if change.count("\n") > 2:
            change += "\n\nx"  # else every line would be a paragraph
        assert keys(change)[0] == [expected]
    assert keys(text[1:])[0] != [expected]
    assert keys(text.rstrip() + "?")[0] != [expected]


def test_an_empty_line_ends_a_paragraph_and_without_any_a_line_does():
    other = LINE.replace("times", "days")
    (a, b), _ = keys(LINE, other)
    for text in (f"{LINE}\n\n{other}", f"{LINE}\r\n\r\n{other}", f"{LINE}\n\n\n\n{other}\n", f"\n\n{LINE}\n{other}\n\n"):
        assert keys(text) == ([a, b], [2])
    assert keys(f"{LINE}\n{other}\n\nshort") == keys(f"{LINE}\r\n{other}\r\n\r\nshort") == keys(f"{LINE} {other}")


def test_short_paragraphs_are_not_looked_at():
    assert keys("a" * 63, "a" * 64, "é" * 63, "é" * 64, " a" * 63, "漢" * 40, "", "\n\n\n")[1] == [0, 1, 0, 1, 0, 0, 0, 0]
    assert keys("yours sincerely\n\n" * 100) == ([], [0])


def test_long_paragraphs_are_compared_by_their_ends():
    middle = LONG[: len(LONG) // 2] + " A word more. " + LONG[len(LONG) // 2 :]
    assert keys(LONG)[0] == keys(middle)[0]
    assert keys(LONG)[0] != keys(LONG + " A word more.")[0]
    assert keys(LONG)[0] != keys("A word more. " + LONG)[0]
    spaced = LONG.replace(" ", " " * 60)  # hardly anything but white space at the ends
    assert keys(LONG)[0] == keys(spaced)[0]
    russian = "Москва — столица России. " * 40
    assert keys("x" + russian)[0] != keys("xy" + russian)[0]  # cut within characters or not
    assert keys("x" + russian)[0] == keys(" x" + russian.upper())[0]


def test_overlap_is_counted_by_paragraph_and_by_document():
    trained = [np.array(own, np.uint64) for own in ([], [3, 7, 7], [10, 0], [5])]
    found = paragraphs.copied(np.array([5, 7, 5, 9, 1], np.uint64), np.array([2, 0, 2, 1]), trained)
    assert found == {"paragraphs": 5, "copied_paragraphs": 3, "documents": 4, "documents_with_copies": 2}
    found = paragraphs.copied(np.zeros(0, np.uint64), np.array([0]), trained)
    assert found == {"paragraphs": 0, "copied_paragraphs": 0, "documents": 1, "documents_with_copies": 0}
