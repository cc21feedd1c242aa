import dataclasses
import json
import re

import pytest

from gqa_jax.config import ConfigError, Execution, TrainConfig, hash_identity
from launch import grid, grid_cells, grid_file
from launch.training_cells import said
from tests import grid_fakes


def two_phases(**changes):
    """A run at T = 32, one from it at T = 64, and one from that: 1,024, 512 and 512 tokens; children come first."""
    first = grid_fakes.config()
    second = grid.continued(first, context_length=64, learning_rate=1e-5, tokens=500, **changes)
    third = grid.continued(second, context_length=64, learning_rate=1e-6, tokens=512, schedule="cosine")
    return grid.Grid("phases", [third, second, first], [1024])


def test_names_are_readable_unique_and_valid_for_every_engine():
    for path in ("configs/grids/quickstart.py", "configs/grids/paper.py"):
        names = [cell.name for cell in grid.cells(grid.load(path))]
        assert len(names) == len(set(names))
        assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,48}", name) for name in names)
    assert re.fullmatch(r"s1p2b-t131072-h32-1-[0-9a-f]{8}", names[-1])


def test_the_papers_grid_is_8_sizes_by_21_heads_at_8k_and_the_contexts_of_its_figures():
    cells = grid.cells(grid.load("configs/grids/paper.py"))
    rows = [cell.describe() for cell in cells]
    at_8k = [row for row in rows if row["context"] == 8192]
    assert len(at_8k) == 168
    assert len({(row["n_heads"], row["n_kv_heads"]) for row in at_8k}) == 21
    assert {row["batch_tokens"] for row in rows} == {524_288}
    assert {row["context"] for row in rows} == {1024, 2048, 8192, 32_768, 131_072}
    tokens = {row["size"]: row["tokens"] for row in rows}
    assert tokens["1.2B"] == pytest.approx(24e9, rel=1e-4)


def test_the_quickstart_has_what_it_promises():
    rows = [cell.describe() for cell in grid.cells(grid.load("configs/grids/quickstart.py"))]
    assert len(rows) == 18
    assert [len({row[key] for row in rows}) for key in ("size", "context")] == [3, 2]
    assert len({(row["n_heads"], row["n_kv_heads"]) for row in rows}) == 3


def test_product_with_a_skip_rule():
    points = list(grid.product(lambda **point: point, skip=lambda a, b: a == b, a=[1, 2], b=[1, 2, 3]))
    assert points == [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"a": 2, "b": 1}, {"a": 2, "b": 3}]


GOOD = "from launch.grid import Grid\nfrom tests.grid_fakes import config\ndef get_grid():\n    return Grid({})\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", r"g.py: it defines no get_grid\(\)"),
        ("get_grid = 3", r"g.py: it defines no get_grid\(\)"),
        ("def get_grid(): return 3", "returns a int"),
        ("import nothing_like_this", r"g.py, line 1: ModuleNotFoundError: No module named"),
        ("x = 1\ndef get_grid():\n    return f(\n    )\ndef f():\n    return 1 / 0", r"g.py, line 6: ZeroDivisionError: div"),
        ("x = 1\ndef get_grid(:", r"g.py, line 2: SyntaxError: invalid syntax"),
        ("\0", r"g.py: SyntaxError: source code string cannot contain null bytes"),
        ("\xff\xfe", "g.py.*: SyntaxError: "),
        ("def get_grid():\n    raise SystemExit(3)", r"g.py, line 2: it ends the program"),
        ("import sys\nsys.exit()", r"g.py, line 2: it ends the program"),
        ("def get_grid(): return get_grid()", r"g.py, line 1: RecursionError: maximum recursion depth"),
        ("class E(BaseException): pass\nraise E('a\\nb')", r"g.py, line 2: E: a$"),
        (
            "from gqa_jax.config import default_config\ndefault_config().n_layer = 2",
            r"g.py, line 2: unknown .* 'model.n_layers'",
        ),
        (
            "from gqa_jax.config import default_config as d\nd().steps = 'a\\0'",
            r"g.py, line 2: steps = 'a\\x00': must be int, not str",
        ),
        (GOOD.format("'g', [], [1024]"), "g.py, line 4: Grid: configs = .*: the grid has no cells"),
    ],
)
def test_bad_grid_files_are_one_sentence(tmp_path, content, message):
    path = tmp_path / "g.py"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=message) as found:
        grid.load(str(path))
    assert "\n" not in str(found.value)
    assert [file.name for file in tmp_path.iterdir()] == ["g.py"]  # nothing is kept beside it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("3, [config()], [1024]", "name = 3: must be 1 to 64 letters"),
        ("'../g', [config()], [1024]", r"name = '\.\./g'"),
        ("'', [config()], [1024]", "name = ''"),
        ("'g', 5, [1024]", "configs = 5: must be a list"),
        (
            "'g', [config(), {'a': 1}], [1024]",
            r"configs\[1\] = \{'a': 1\}: must be what gqa_jax.config.default_config\(\) gives",
        ),
        ("'g', [5], [1024]", r"configs\[0\] = 5"),
        ("'g', config(), [1024]", r"configs = batch_tokens:.*: must be a list$"),
        ("'g', [config(), [object() for _ in range(99)]], [1024]", r"configs\[1\] = \[<object.*, \.\.\.\]: must be what"),
        ("'g', [config()], []", r"contexts_served = \[\]: name one context or more"),
        ("'g', [config()], 1024", "contexts_served = 1024: must be a list"),
        ("'g', [config()], '8K'", "contexts_served = '8K': must be a list"),
        ("'g', [config()], [1024, -1]", r"contexts_served\[1\] = -1: must be a whole number of tokens, 1 to 1099511627776"),
        ("'g', [config()], ['a']", r"contexts_served\[0\] = 'a': must be a whole number"),
        ("'g', [config()], [8192.5]", r"contexts_served\[0\] = 8192.5"),
        ("'g', [config()], [True]", r"contexts_served\[0\] = True"),
        ("'g', [config()], [2**41]", r"contexts_served\[0\] = 2199023255552"),
        ("'g', [config()], [1024], ['2.0']", r"losses\[0\] = '2.0': must be a finite number above 0"),
        ("'g', [config()], [1024], [float('nan')]", r"losses\[0\] = nan"),
        ("'g', [config()], [1024], [0]", r"losses\[0\] = 0"),
        ("'g', [config()], [1024], 2.0", "losses = 2.0: must be a list"),
        ("'g', [config()], [1024], convention='figurs'", "convention = 'figurs': did you mean 'figures'"),
        ("'g', [config()], [1024], convention=None", "convention = None: allowed: paper, figures, exact"),
        ("'g', [config()], [1024], others=[]", r"others = \[\]"),
        ("'g', [config()], [1024], old_rules='no'", "old_rules = 'no'"),
    ],
)
def test_a_grid_that_would_fail_after_its_runs_is_refused_with_its_line(tmp_path, arguments, message):
    path = tmp_path / "g.py"
    path.write_text(GOOD.format(arguments))
    with pytest.raises(ConfigError, match=f"g.py, line 4: Grid: .*{message}"):
        grid.load(str(path))


def test_a_grid_takes_any_numbers_and_any_lists(tmp_path, capsys):
    path = tmp_path / "g.py"
    numbers = "np.array([1024, 2048]), (np.float32(2),)"
    path.write_text("import numpy as np\nprint('hello')\n" + GOOD.format(f"'g', (config() for _ in range(1)), {numbers}"))
    found = grid.load(str(path))
    assert (len(found.configs), found.contexts_served, found.losses) == (1, [1024, 2048], [2.0])
    assert json.dumps([found.contexts_served, found.losses]) == "[[1024, 2048], [2.0]]"
    assert grid.Grid("a b", found.configs, ["8K", 1]).contexts_served == [8192, 1]
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "hello\n")  # what --json prints stays JSON


def test_cells_of_other_kinds_that_fail_have_their_line(tmp_path):
    path = tmp_path / "g.py"
    path.write_text(GOOD.format("'g', [config()], [1024], others=lambda trained: (\n1 / 0)"))
    with pytest.raises(ConfigError, match=r"g.py, line 5: ZeroDivisionError: division by zero"):
        grid.cells(grid.load(str(path)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("README.md", "README.md is no grid file: give a .py that defines get_grid"),
        ("/etc/hostname", "/etc/hostname is no grid file"),
        ("/dev/null", "/dev/null is no grid file"),
        ("configs/grids", "configs/grids is a folder: give a grid file"),
        ("", " is not there"),
        ("a\0.py", "is not there"),
    ],
)
def test_what_is_no_grid_file_says_what_one_is(name, message):
    with pytest.raises(ConfigError, match=message):
        grid.load(name)


def test_a_missing_file_names_the_closest():
    with pytest.raises(ConfigError, match=r"did you mean 'configs/grids/quickstart.py'"):
        grid.load("configs/grids/quickstrat.py")


def test_bad_cells_are_found_before_anything_starts():
    def of(**changes):
        return grid.Grid("g", [grid_fakes.config(**changes)], [1024])

    with pytest.raises(ConfigError, match=r"cell 0 of grid 'g': model.n_heads = 2 is not a multiple"):
        grid.cells(of(model={"n_kv_heads": 4}))
    with pytest.raises(ConfigError, match=r"data\.epochs"):
        grid.cells(of(steps=10**7))
    with pytest.raises(ConfigError, match="less than one block"):
        grid.cells(of(context=2**25, batch_tokens=2**25, data={"block_tokens": 2**25}, evaluation={"tokens": 2**25}))
    with pytest.raises(ConfigError, match=r"allow data\.epochs = 99\d{7},"):  # at once, and without a batch of 2 EiB
        grid.cells(of(batch_tokens=256 * 10**13, steps=4))
    twice = grid.Grid("g", [grid_fakes.config(), grid_fakes.config(label="other")], [1024])
    with pytest.raises(ConfigError, match="the same run"):
        grid.cells(dataclasses.replace(twice, configs=[grid_fakes.config()] * 2))


def test_where_selects_by_any_field_and_names_the_closest():
    cells = grid.cells(grid_fakes.small_grid())
    assert [c.describe()["d_model"] for c in grid_cells.select(cells, "n_heads=2,size=32d")] == [32]
    with pytest.raises(ConfigError, match="did you mean 'n_heads'"):
        grid_cells.select(cells, "n_head=2")
    with pytest.raises(ConfigError, match="no cell matches"):
        grid_cells.select(cells, "n_heads=3")


def test_a_store_that_is_not_there_yet_leaves_the_plan_possible():
    (cell,) = grid.cells(grid.Grid("g", [grid_fakes.config(data={"store": "stores/not-yet"})], [1024]))
    assert cell.data_fingerprint is None


def test_phases_come_after_what_they_continue_and_are_named_by_it():
    first, second, third = grid.cells(two_phases())
    assert [cell.parent for cell in (first, second, third)] == [None, first.name, second.name]
    assert second.config.continue_from == f"../{first.name}"
    assert second.describe()["continue_from"] == first.name
    assert first.describe()["continue_from"] is None
    stored = json.loads(json.dumps(first.identity))  # as a checkpoint's metadata
    assert second.identity["continue_from"] == hash_identity(stored)
    changed = two_phases()
    changed.configs[2].optimizer.weight_decay = 0.2
    with pytest.raises(
        ConfigError, match=r"cell 0 of grid 'phases': continue_from = 'cell [0-9a-f]{16}' is no cell of this grid"
    ):
        grid.cells(changed)
    alone = dataclasses.replace(two_phases(), configs=two_phases().configs[:1])
    with pytest.raises(ConfigError, match=r"put the configuration that launch\.grid\.continued was given into the grid too"):
        grid.cells(alone)
    (plain,) = grid.cells(grid.Grid("g", [grid_fakes.config()], [1024]))
    assert plain.name == first.name


def test_another_first_phase_is_another_second_phase():
    names = []
    for seed in (0, 1):
        first = grid_fakes.config(seed=seed)
        second = grid.continued(first, context_length=64, learning_rate=1e-5, tokens=512, seed=0)
        names.append(grid.cells(grid.Grid("g", [first, second], [1024]))[1].name)
    assert names[0] != names[1]


def test_a_second_phase_has_its_own_recipe_and_reads_on():
    first = grid_fakes.config(execution={"accumulation_steps": 2, "mesh": "fsdp=4", "remat": "full", "attention": "xla"})
    second = TrainConfig.from_dict(grid.continued(first, context_length=64, learning_rate=1e-5, tokens=500).to_dict())
    source = TrainConfig.from_dict(first.to_dict())
    assert (second.context_length, second.tokens, second.steps, second.train_tokens) == (64, 500, None, 512)
    assert second.execution == Execution(attention="xla")
    assert (second.optimizer.learning_rate, second.optimizer.schedule) == (1e-5, "constant")
    assert second.model == source.model
    assert second.data.skip_tokens == source.train_tokens == 1024
    _, second_cell, third_cell = grid.cells(two_phases())
    assert third_cell.config.data.skip_tokens == 1024 + second_cell.config.train_tokens

    def skipped(**changes):
        return grid.continued(first, **{"context_length": 64, "learning_rate": 1e-5, "tokens": 512} | changes).data.skip_tokens

    assert skipped(seed=1) == skipped(data={"block_tokens": 128}) == 0  # another order
    assert skipped(data={"skip_tokens": 64}) == 64
    assert skipped(context_length=384, batch_tokens=384, data={"block_tokens": 64}) == 1152  # a whole number of sequences
    assert first.context_length == 32  # untouched


def test_a_second_phase_of_other_parameters_is_refused():
    with pytest.raises(ConfigError, match=r"has other parameters: model\.n_layers: 3 here, 2 there"):
        grid.cells(two_phases(model={"n_layers": 3}))


def test_a_second_phase_may_have_its_positions_interpolated():
    scaled = {"rope_scaling": "linear", "rope_factor": 4.0}
    _, second, third = grid.cells(two_phases(model=scaled))
    assert second.start.differs == ("model.rope_factor: 4.0 here, 1.0 there", "model.rope_scaling: 'linear' here, None there")
    assert (third.config.model.rope_factor, third.start.differs) == (4.0, ())
    _, plain, _ = grid.cells(two_phases())
    assert (plain.parent, plain.start.differs) == (second.parent, ())
    assert plain.name != second.name


def test_a_second_phase_on_other_data_and_another_rope_base():
    first, second, third = grid.cells(two_phases(rope_theta=1e6, data={"store": "sotu-bytes@position"}))
    assert second.config.data.skip_tokens == 0  # of another order
    assert third.config.data.skip_tokens == second.config.train_tokens
    assert second.config.model.rope_theta == third.config.model.rope_theta == 1e6
    base, data = second.start.differs
    assert base == "model.rope_theta: 1000000.0 here, 500000.0 there"
    assert data == f"data.fingerprint: {second.data_fingerprint[:12]} here, {first.data_fingerprint[:12]} there"
    assert third.start.differs == ()
    assert said([first, second, third]) == [f"{second.name}: not as where it starts: {line}" for line in (base, data)]
    _, provisional, _ = grid.cells(two_phases(data={"store": "stores/not-yet"}))
    assert provisional.start.differs == ()


def test_the_long_context_grid_is_appendix_j():
    rows = [cell.describe() for cell in grid.cells(grid.load("configs/grids/long_context.py"))]
    assert [(row["size"], row["n_heads"], row["n_kv_heads"], row["context"]) for row in rows] == [
        ("1.2B", 32, 8, 4096), ("1.8B", 8, 1, 4096), ("1.2B", 32, 8, 131_072), ("1.8B", 8, 1, 131_072),
    ]  # fmt: skip
    assert [row["tokens"] for row in rows] == pytest.approx([20e9, 20e9, 1e9, 1e9], rel=1e-3)
    assert [row["continue_from"] for row in rows] == [None, None, rows[0]["cell"], rows[1]["cell"]]


def test_what_is_right_is_not_put_in_words(monkeypatch):
    """Of a large grid that took most of a command's time."""
    monkeypatch.setattr(grid_file, "_shown", lambda value: pytest.fail(f"{type(value)} is shown"))
    assert len(grid_fakes.small_grid().configs) == 6
