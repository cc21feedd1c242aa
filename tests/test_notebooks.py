"""The notebooks of notebooks/: they run from top to bottom without a warning, and what is committed is what they say.

python -m tests.test_notebooks        # executes them on this machine's runs/quickstart, and writes their outputs
"""

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient
from PIL import Image
from traitlets.config import Config

from gqa_jax import hardware
from gqa_jax.config import TrainConfig
from gqa_jax.training.metrics import write_json
from launch import grid, grid_cells
from launch.cells import Layout
from tests import grid_fakes

FOLDER = Path(__file__).parents[1] / "notebooks"
EXPLORE, MODEL = FOLDER / "explore_a_grid.ipynb", FOLDER / "optimum_for_my_model.ipynb"
SERVE = FOLDER / "what_it_costs_to_serve.ipynb"
PICTURES = {EXPLORE: 4, MODEL: 4, SERVE: 2}  # at least
EVERY = pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
LARGEST = 400_000  # bytes of a file
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(path, cwd, **environment):
    """The notebook with fresh outputs; raises CellExecutionError for an error in a cell."""
    notebook = nbformat.read(path, as_version=4)
    # Sockets are files of a folder with a short name (the limit is 107 characters), not ports that others may take.
    with tempfile.TemporaryDirectory(prefix="nb") as folder:
        config = Config()
        config.KernelManager.update(transport="ipc", ip=f"{folder}/k", connection_file=f"{folder}/kernel.json")
        options = {"timeout": 600, "record_timing": False, "resources": {"metadata": {"path": str(cwd)}}, "config": config}
        client = NotebookClient(notebook, kernel_name="python3", **options)
        client.execute(env=os.environ | {"IPYTHONDIR": folder} | environment)
    return notebook


def outputs(notebook):
    return [(cell["id"], output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def text_of(output):
    """What an output says in words."""
    return output.text if output.output_type == "stream" else output.data.get("text/plain", "")


def complaints(notebook):
    return [
        (name, text_of(output))
        for name, output in outputs(notebook)
        if output.output_type == "error" or output.get("name") == "stderr" or "Warning" in text_of(output)
    ]


_NUMBER = re.compile(r"\d+(?:[,_]\d{3})*(?:\.\d+)?")


def differences(old, new):
    """Where texts differ in words, or in a number by more than one unit of its last digit: processors round differently."""
    if _words(old) != _words(new):
        return [(old, new)]
    return [pair for pair in zip(_NUMBER.findall(old), _NUMBER.findall(new), strict=True) if not _close(*pair)]


def _words(text):
    return _NUMBER.sub("#", " ".join(text.replace("<", "").replace(">", "").split()))  # >99.9% may be 99.9%


def _close(one, other):
    digits = max(len(text.partition(".")[2]) for text in (one, other))
    return abs(float(re.sub("[,_]", "", one)) - float(re.sub("[,_]", "", other))) <= 1.001 * 10.0**-digits


class TestDifferences:
    def test_the_last_digit_may_differ_by_one(self):
        assert not differences("2.38B (99.6%)  1,024", "2.39B (99.5%) 1,024")

    @pytest.mark.parametrize(
        ("old", "new"), [("2.38B", "2.40B"), ("(8,1) 60k", "(4,1) 58k"), ("cheap", "dear"), ("60k", "60M")]
    )
    def test_more_is_a_difference(self, old, new):
        assert differences(old, new)


@EVERY
class TestWhatIsCommitted:
    def test_is_small_and_of_no_machine(self, path):
        text = path.read_text()
        assert len(text) < LARGEST
        assert not re.search(r"(?<![\w.:/])/(home|root|tmp|work|usr|Users|opt|mnt)/", text), "a path of somebody's machine"
        assert "127.0.0.1" not in text

    def test_was_executed_from_top_to_bottom(self, path):
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not complaints(notebook)
        assert sum("image/png" in output.get("data", {}) for _, output in outputs(notebook)) >= PICTURES[path]

    def test_holds_nothing_else(self, path):
        notebook = nbformat.read(path, as_version=4)
        assert notebook.metadata == METADATA
        assert all(cell.metadata == {} for cell in notebook.cells)


def trained(folder, sizes, heads, contexts):
    """A grid folder of runs that fell on a power law, but for noise of 0.003 nats."""

    def config(size, heads, context):
        values = grid_fakes.config(size=size, n_heads=heads[0], context=context)
        values.model.n_kv_heads = heads[1]
        return values

    configs = list(grid.product(config, size=sizes, heads=heads, context=contexts))
    the_grid = grid.Grid("fake", configs, contexts_served=[1024, 131_072])
    layout, cells = Layout(folder), grid.cells(the_grid)
    folder.mkdir()
    write_json(folder / "grid.json", grid_cells.facts(the_grid, cells))
    for cell, noise in zip(cells, np.random.default_rng(0).normal(scale=0.003, size=len(cells)), strict=True):
        grid_fakes.finish(cell, layout)
        result = layout.cell(cell.name) / "result.json"
        values = json.loads(result.read_text())
        write_json(Path(result), values | {"loss": values["loss"] + noise})
    return folder


@pytest.mark.thorough
class TestExploreAGrid:
    def test_of_a_few_runs(self, tmp_path):
        """As many as the quickstart has."""
        folder = trained(tmp_path / "grid", sizes=[16, 32, 64], heads=[(4, 4), (4, 1), (1, 1)], contexts=[16, 64])
        notebook = execute(EXPLORE, tmp_path, GQA_JAX_GRID=str(folder))
        assert not complaints(notebook)
        said = [(name, text_of(output)) for name, output in outputs(notebook)]
        assert any(name == "runs" and "18 runs: 18 done" in text for name, text in said)
        assert any(name == "held-out" and "leave_largest_out: too few runs" in text for name, text in said)
        assert any(name == "contexts" and "a test needs three or more" in text for name, text in said)

    def test_of_more_runs(self, tmp_path):
        """Runs can be held out, heads be pooled, and contexts be compared."""
        heads = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)]
        folder = trained(tmp_path / "grid", sizes=[16, 32, 64, 128], heads=heads, contexts=[16, 32, 64])
        notebook = execute(EXPLORE, tmp_path, GQA_JAX_GRID=str(folder))
        assert not complaints(notebook)
        said = [(name, text_of(output)) for name, output in outputs(notebook)]
        assert any(name == "held-out" and "leave_largest_out" in text and "log_quadratic" in text for name, text in said)
        assert any(name == "contexts" and "differences to (4,4)" in text for name, text in said)


def test_what_it_costs_to_serve_measures_this_machine(tmp_path, monkeypatch):
    """Short contexts and few tokens of models of a grid that is made up; everything else as it stands."""
    folder = trained(tmp_path / "grid", sizes=[16, 32, 64], heads=[(4, 4), (4, 1), (1, 1)], contexts=[16])
    source = next(cell.source for cell in nbformat.read(SERVE, as_version=4).cells if cell.get("id") == "question")
    asked = {
        "GRID": repr(str(folder)), "DEVICE": repr(str(tmp_path / "device.json")), "CONTEXT": "1024",
        "CONTEXTS, BATCHES": "[64, 96, 128], [1, 2]",
    }  # fmt: skip
    lines = [f"{name} = {asked[name]}" if (name := line.partition(" = ")[0]) in asked else line for line in source.splitlines()]
    said = run_cells(SERVE, {"question": "\n".join(lines)})
    assert "GFLOP/s in products with parameters" in said["measured"]
    assert "expected / measured of 8 runs" in said["off"]
    assert "Seconds to the first token" in said["check"]
    assert "by h200's data sheet: (" in said["answer"]
    assert "Measured here" in said["answer-picture"]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    return execute(MODEL, tmp_path_factory.mktemp("model"))


@pytest.mark.thorough
class TestOptimumForMyModel:
    def test_says_what_is_committed(self, fresh):
        assert not complaints(fresh)
        committed, now = outputs(nbformat.read(MODEL, as_version=4)), outputs(fresh)
        assert [name for name, _ in committed] == [name for name, _ in now]
        pairs = [(name, text_of(old), text_of(new)) for (name, old), (_, new) in zip(committed, now, strict=True)]
        changed = {name: found for name, old, new in pairs if (found := differences(old, new))}
        assert not changed, "python -m tests.test_notebooks writes the outputs anew"

    def test_its_configuration_can_be_trained(self, fresh):
        (text,) = [text_of(output) for name, output in outputs(fresh) if name == "config"]
        scope = {}
        exec(text, scope)
        config = TrainConfig.from_dict(scope["get_config"]().to_dict())
        assert (config.model.n_heads, config.model.n_kv_heads) == (8, 1)
        assert config.train_tokens == pytest.approx(20 * 2.54e9, rel=0.05)


def run_cells(path, changed):
    """The code cells of a notebook, one after the other in this process, without a kernel: what each prints and shows.

    changed: id of a cell -> its source instead. Raises what a cell raises.
    """
    scope, said = {}, {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        source = changed.get(cell["id"], cell.source)
        tree = ast.parse("\n".join(line for line in source.splitlines() if not line.startswith("%")))
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        out = io.StringIO()
        scope["display"] = lambda value, out=out: print(shown(value), file=out)
        with contextlib.redirect_stdout(out):
            exec(compile(tree, cell["id"], "exec"), scope)
            if last is not None and (value := eval(compile(last, cell["id"], "eval"), scope)) is not None:
                scope["display"](value)
        said[cell["id"]] = out.getvalue()
    return said


def shown(value):
    """What a notebook would show: a picture is drawn, and gives its titles."""
    if isinstance(value, Figure):
        value.savefig(io.BytesIO(), format="png", dpi=30)
        return " ".join(ax.get_title() for ax in value.axes) or "a picture"
    return value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)


def question(serving, loss=2.6, context=131_072):
    """The first code cell of the notebook of one's own model with the question changed."""
    source = next(cell.source for cell in nbformat.read(MODEL, as_version=4).cells if cell.get("id") == "question")
    lines = {"LOSS": f"LOSS = {loss}", "CONTEXT": f"CONTEXT = {context}", "SERVING": f"SERVING = {serving}"}
    found = [lines.pop(line.partition(" = ")[0], line) for line in source.splitlines()]
    assert not lines, "the question has other lines than the test changes"
    return {"question": "\n".join(found)}


class TestOptimumForOtherDevices:
    """The page says: change the three lines of the question."""

    def check(self, said, fits=True):
        assert "(8,1)" in said["z"]
        assert "k = 0.00" in said["shape"]
        assert ("layers x width" in said["device"]) == fits
        assert len(said) == len([cell for cell in nbformat.read(MODEL, as_version=4).cells if cell.cell_type == "code"])

    def test_the_smallest(self):
        said = run_cells(MODEL, question('RooflineServing("v5e", batch=8, decode_share=0.1)'))
        self.check(said)
        assert "(8,2) can't be served so" in said["device"]
        assert "none can be served so" in said["goals"]  # four times as many
        assert "none can be served so" in said["assumptions"]  # a width of 64 times the depth: 16.1 GB of 15.2

    def test_none_that_can_be_served(self):
        said = run_cells(MODEL, question('RooflineServing("v5e", batch=32, decode_share=0.1)'))
        self.check(said, fits=False)
        assert "no head configuration can be served as asked" in said["device"]

    @pytest.mark.thorough
    @pytest.mark.parametrize("device", list(hardware.CHIPS))
    def test_every_device(self, device):
        self.check(run_cells(MODEL, question(f'RooflineServing("{device}", batch="best", decode_share=0.1)')))

    @pytest.mark.thorough
    @pytest.mark.parametrize("device", list(hardware.CHIPS))
    def test_every_device_with_another_batch(self, device):
        """Four times as many requests are asked about, too."""
        self.check(run_cells(MODEL, question(f'RooflineServing("{device}", batch=8, decode_share=0.1)')))

    @pytest.mark.thorough
    def test_another_loss_and_context(self):
        said = run_cells(
            MODEL, question('RooflineServing("h100", n_devices=2, ttft=2.0, tpot=0.05)', loss=2.75, context=32_768)
        )
        assert "layers x width" in said["device"]


def in_few_colors(png):
    """A picture, base64, with 128 colours: a third of the bytes, and no difference that is seen."""
    small = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def refresh(path):
    """Executes the notebook where it lies, and writes it with its outputs, pictures in 128 colours."""
    notebook = execute(path, FOLDER)
    for name, output in outputs(notebook):
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = in_few_colors(output.data["image/png"])
        if output.output_type == "error" or output.get("name") == "stderr":
            print(f"{path.name}, {name}: {text_of(output)}", file=sys.stderr)
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, path)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    for notebook_path in (EXPLORE, MODEL, SERVE):
        refresh(notebook_path)
