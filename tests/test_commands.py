"""`launch.commands`: what a notebook gets is what the command line prints; nothing is printed, and errors are raised."""

import inspect
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from gqa_jax.errors import ConfigError
from gqa_jax.laws import Heads
from gqa_jax.search.objectives import OBJECTIVES, settings
from gqa_jax.search.presets import PRESETS
from launch import __main__ as launch
from launch import commands
from tests import grid_fakes

OF_A_GRID = {"grid", "root", "rules"}
OF_A_SOURCE = {*OF_A_GRID, "allow_confounded", "preset", "columns", "units", "context_trained", "heads_rule"}
SHOWN = {"plan": {"format", "out"}, "run": {"json"}, "status": {"json", "rows"}, "fit": {"format"}, "optimum": {"format"},
         "generate": {"prompt"}, "benchmark-serving": {"format", "out"}}  # fmt: skip
SOURCES = ("export", "fit", "optimum", "next", "report")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A finished grid: its file, its layout and its cells."""
    monkeypatch.chdir(tmp_path)
    return grid_fakes.finished_grid(tmp_path)


def verbs():
    (found,) = [action.choices for action in launch.parser()._actions if action.choices]
    return found


def options(verb):
    """The options of a verb, by the names of its arguments."""
    parser = verbs()[verb]
    parser.format_help()
    parser._fill(parser)
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def said(capsys, *argv):
    capsys.readouterr()
    assert launch.main(argv) in (launch.EXIT_DONE, launch.EXIT_UNFINISHED)
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", verbs())
def test_a_verb_is_a_function_that_takes_its_options(verb):
    parameters = inspect.signature(getattr(commands, verb.replace("-", "_"))).parameters
    taken = set(parameters) | {name for cost in OBJECTIVES for name in settings(cost)} | {"prices"}
    if not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values()):
        taken = set(parameters)
    left = {*options(verb)} - (OF_A_SOURCE if verb in SOURCES else OF_A_GRID) - SHOWN.get(verb, set())
    assert left - taken == set()
    for name, option in options(verb).items():
        if name in parameters and option.default is not None and parameters[name].default is not inspect.Parameter.empty:
            assert parameters[name].default == option.default or not (option.default or parameters[name].default), name
    assert f"`{verb}`" in Path(__file__).parents[1].joinpath("docs/commands.md").read_text()


def test_costs_and_presets_are_those_of_their_registries():
    found = options("optimum")
    assert tuple(found["cost"].choices) == tuple(OBJECTIVES)
    assert tuple(found["preset"].choices) == tuple(PRESETS)


def parsed(*argv):
    return {name: value for name, value in vars(launch.parser().parse_args(argv)).items() if value not in (None, False)}


@pytest.mark.parametrize("verb", [verb for verb in verbs() if "grid" in options(verb)])
def test_options_and_arguments_come_in_any_order(verb):
    needed = {"optimum": ("--context=8K", "--loss=2"), "next": ("--context=8K", "--loss=2", "--budget=1e9")}.get(verb, ())
    cells = {"logs": ["one"], "cancel": ["one", "two"], "retry": ["one", "two"]}.get(verb, [])
    first = parsed(verb, "GRID", *cells, "--root", "R", "--rules", "old", *needed)
    assert (first["grid"], first["root"], first["rules"]) == ("GRID", "R", "old")
    assert [first.get("cell")] == cells or first.get("cells", []) == cells
    for order in (
        (*needed, "--root", "R", "GRID", *cells, "--rules", "old"),
        ("GRID", "--root", "R", *cells, "--rules", "old", *needed),
        ("--root", "R", "--rules=old", *needed, "GRID", *cells),
        ("GRID", *cells[:1], "--rules", "old", *needed, *cells[1:], "--root=R"),
    ):
        assert parsed(verb, *order) == first


def test_names_of_options_may_have_dashes_and_unknown_ones_are_told_of(capsys):
    assert parsed("run", "--dry-run", "my-grid.py") == parsed("run", "my-grid.py", "--dry_run")
    assert parsed("plan", "G", "--flops-per-second=1e9", "--out=a-b.csv")["out"] == "a-b.csv"
    for argv, said in (
        (("plan", "G", "--topolgy", "v5e:4x4"), "unrecognized arguments: --topolgy v5e:4x4: did you mean --topology?"),
        (("status", "G", "H"), "unrecognized arguments: H"),
        (("logs", "--root", "R"), "the following arguments are required: GRID"),
    ):
        with pytest.raises(SystemExit) as left:
            launch.main(argv)
        assert left.value.code == launch.EXIT_BAD_INPUT
        assert capsys.readouterr().err.endswith(f"python -m launch {argv[0]}: error: {said}\n")


class TestQuestions:
    def test_an_answer_is_what_json_says(self, small, capsys):
        file, layout, _ = small
        found = commands.optimum(str(layout.root), loss=2.1, context=8192, draws=100)
        assert capsys.readouterr().out == ""
        asked = ("optimum", str(file), "--loss", "2.1", "--context", "8K", "--draws", "100", "--format", "json")
        assert json.loads(said(capsys, *asked)) == json.loads(json.dumps(found.to_dict()))
        assert found.found.heads == Heads(found.to_dict()["n_heads"], found.to_dict()["n_kv_heads"])

    def test_devices_and_conventions_have_all_numbers_too(self, capsys):
        asked = {"loss": 2.615, "context": "128K", "draws": 50}
        words = ("optimum", "--preset", "paper", "--loss", "2.615", "--context", "128K", "--draws", "50", "--format", "json")
        found = commands.optimum("paper", cost="price", device="h200,v5e", batch=8, **asked)
        assert [*found.to_dict()["answers"]] == ["h200", "v5e"]
        several = said(capsys, *words, "--cost", "price", "--device", "h200,v5e", "--batch", "8")
        assert json.loads(several) == json.loads(json.dumps(found.to_dict()))
        other = commands.optimum("paper", conventions=True, aspect="paper", heads=[Heads(8, 1), Heads(8, 8)], **asked)
        said_too = said(capsys, *words, "--conventions", "--aspect", "paper", "--heads", "8,1", "8,8")
        assert json.loads(said_too) == json.loads(json.dumps(other.to_dict()))

    def test_laws_are_the_tables_of_the_command(self, small, capsys):
        file, _, _ = small
        found = commands.fit(str(file))
        rows = json.loads(said(capsys, "fit", str(file), "--format", "json"))
        assert [row["b"] for row in rows] == pytest.approx([*found.tables()[0]["b"]])
        with pytest.raises(ConfigError, match="not both"):
            commands.fit(str(file), free_entropy=True, entropy=1.0)

    def test_of_a_loss_and_a_model_one_is_asked(self):
        for given in ({}, {"loss": 2.6, "like": "llama-3.2-1b"}):
            with pytest.raises(ConfigError, match="give --loss, which must be reached, or --like"):
                commands.optimum("paper", context=8192, **given)
        with pytest.raises(ConfigError, match=r"--cost latency: .*needs device"):
            commands.optimum("paper", context=8192, loss=2.6, cost="latency")


class TestGrids:
    def test_plan_and_status_are_what_is_printed(self, small, capsys):
        file, layout, cells = small
        found = commands.plan(str(file), where="n_heads=2")
        assert said(capsys, "plan", str(file), "--where", "n_heads=2", "--format", "csv") == found.frame.to_csv(index=False)
        (layout.cell(cells[0].name) / "result.json").unlink()
        rows = commands.status(str(file)).rows()
        assert rows[0]["state"] == "planned"
        assert [row["state"] for row in json.loads(said(capsys, "status", str(file), "--json"))] == [r["state"] for r in rows]

    def test_a_dry_run_gives_what_would_be_submitted(self, small, capsys):
        file, layout, cells = small
        (layout.cell(cells[0].name) / "result.json").unlink()
        found = commands.run(commands.open_cells(str(file)), dry_run=True)
        assert [one.cell for one in found.submissions] == [cells[0].name]
        assert found.last is None
        assert capsys.readouterr().out == ""
        (one,) = json.loads(said(capsys, "run", str(file), "--dry_run", "--json"))
        assert one["command"] == found.submissions[0].command

    def test_export_gives_the_tables_that_it_writes(self, small, capsys):
        file, layout, _ = small
        found = commands.export(str(file))
        assert len(found.loss) == 6
        assert [*found.laws["n_heads"]] == [1, 2]
        assert capsys.readouterr().out == ""
        assert (layout.tables / "fits.csv").read_text() == found.laws.to_csv(index=False)

    def test_retry_refuses_before_it_moves_anything(self, small):
        file, layout, cells = small
        for cell in cells[:2]:
            grid_fakes.finish(cell, layout, status="diverged")
        with pytest.raises(ConfigError, match=f"{cells[2].name} is done: only failed and diverged"):
            commands.retry(str(file), [cells[0].name, cells[2].name])
        assert (layout.cell(cells[0].name) / "result.json").exists()
        assert [*commands.retry(str(file)).moved] == [cell.name for cell in cells[:2]]
        assert not (layout.cell(cells[0].name) / "result.json").exists()

    def test_logs_come_in_pieces_and_nothing_is_an_error(self, small):
        file, layout, cells = small
        (layout.cell(cells[0].name) / "log.txt").write_text("one\ntwo\n")
        assert "".join(commands.logs(str(file), cells[0].name)).endswith("one\ntwo\n")
        assert any(path.name == "log.txt" for path in commands.log_files(str(file)))
        with pytest.raises(ConfigError, match="has printed nothing yet: it is done"):
            list(commands.logs(str(file), cells[1].name))
        assert commands.cancel(str(file)).jobs == []

    def test_a_table_of_runs_is_no_grid(self, caplog):
        with pytest.raises(ConfigError, match="it is a table of runs, not a grid"):
            commands.status("runs.csv")


def test_what_is_logged_comes_on_stderr_once(small, capsys):
    launch.main(["status", str(small[0])])
    logging.getLogger("launch.commands").warning("nobody listens")
    capsys.readouterr()
    launch.main(["fit", "nowhere"])
    assert capsys.readouterr().err.startswith("launch: nowhere is not there")
    assert logging.getLogger("launch").handlers == []


def test_the_help_has_the_names_of_the_library():
    from gqa_jax.laws import external, posterior
    from gqa_jax.search import presets
    from launch import options

    assert options.UNITS == external.UNITS
    assert options.METHODS == posterior.METHODS
    assert tuple(presets.PRESETS) == options.PRESETS


@pytest.mark.parametrize("command", ["optimum", "fit", "report", "next"])
def test_the_help_imports_no_pandas(command):
    code = (
        "import sys\nfrom launch.__main__ import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'jax', 'pandas', 'scipy'} & sys.modules.keys()), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
