"""The commands of docs pages about models that go elsewhere, come in, or get other heads, run as they are written."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from gqa_jax import train
from gqa_jax.conversion import hf
from launch import __main__ as launch
from tests.test_heads import WIDE
from tests.test_train import tiny as training

pytestmark = pytest.mark.usefixtures("compiled_once")

DOCS = Path(__file__).parents[1] / "docs"
PAGES = ("elsewhere", "bring-a-model", "fewer-heads")
#: What is tested elsewhere: it takes long, or the model of these tests is too small for its answer.
ELSEWHERE = ("benchmark-serving", "optimum", "run")


def commands(page):
    """Those in blocks and in tables, in their order."""
    text = (DOCS / f"{page}.md").read_text()
    found = re.findall(r"^    python -m launch (.+)$|`python -m launch ([^`]+)`", text, re.MULTILINE)
    return [one for one in (shlex.split(a or b) for a, b in found) if one[0] not in ELSEWHERE and "GRID" not in one]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A run, and a folder as it is downloaded."""
    root = tmp_path_factory.mktemp("pages")
    train.train_and_evaluate(training(**WIDE), root / "run")
    hf.export(root / "run", root / "SmolLM2-135M")
    return root


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page(page, there, tmp_path, monkeypatch, capsys):
    shutil.copytree(there / "SmolLM2-135M", tmp_path / "SmolLM2-135M")
    monkeypatch.chdir(tmp_path)
    found = commands(page)
    assert len(found) >= 2
    for arguments in found:
        names = {"RUN": str(there / "run"), "TEXT": "We"}
        short = ["--max_new_tokens", "2"] if arguments[0] == "generate" else []
        if arguments[0] == "generate" and arguments[-1] == "TEXT":
            continue  # the same once more
        assert launch.main([*(names.get(one, one) for one in arguments), *short]) == 0, (arguments, capsys.readouterr().err)


def test_pages_are_there_for_every_verb_of_theirs():
    text = " ".join((DOCS / f"{page}.md").read_text() for page in PAGES)
    assert all(f"python -m launch {verb} " in text for verb in ("export-hf", "import-hf", "convert-heads"))
