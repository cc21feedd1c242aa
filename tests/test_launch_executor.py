import os

import pytest

from gqa_jax.config import ConfigError
from launch import grid
from launch.cells import Layout
from launch.executors import base, job_names, local
from tests import grid_fakes


def cluster(tmp_path, text):
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    return base.load(str(path), Layout(tmp_path))


def test_an_engine_has_the_options_of_its_file(tmp_path):
    one = cluster(tmp_path, 'engine = "local"\nslots = 1\nprocesses = 2\n[environment]\nA = "1"\n')
    assert isinstance(one, local.Executor)
    assert (one.options.processes, one.options.environment, one.capacity) == (2, {"A": "1"}, 1)
    assert base.load("local", Layout(tmp_path)).options == local.Options()  # the file of the repository changes nothing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('engine = "slrum"', "did you mean 'slurm'"),
        ("slots = 2", "engine = None"),
        ('engine = "local"\nslot = 1', "unknown configuration key 'slot': did you mean 'slots'"),
        ('engine = "local"\nslots = "two"', "slots = 'two': must be int or None"),
        ('engine = "local"\nmax_jobs = 0', "max_jobs = 0: must be at least 1"),
        ('engine = "local"\ntopology = "v5e:3x3"', "unknown topology 'v5e:3x3'"),
        ('engine = "local"\n[environment]\nA = 1', "environment.A = 1"),
        ("engine = ", "cluster.toml"),
    ],
)
def test_a_bad_cluster_file_is_a_sentence_that_names_it(tmp_path, text, message):
    with pytest.raises(ConfigError, match=r"cluster\.toml") as caught:
        cluster(tmp_path, text)
    assert message in str(caught.value)


def test_no_such_engine_or_file(tmp_path):
    with pytest.raises(ConfigError, match="--on kubernetes: must be local, slurm, tpu, sky, or a cluster file"):
        base.load("kubernetes", Layout(tmp_path))


@pytest.mark.parametrize("engine", base.ENGINES)
def test_the_example_files_name_real_options(engine, tmp_path):
    assert base.load(engine, Layout(tmp_path)).engine == engine


def test_names_of_jobs_are_valid_everywhere_and_of_one_grid_alone(tmp_path):
    cells = grid.cells(grid_fakes.small_grid())
    here, there = Layout(tmp_path / "a"), Layout(tmp_path / "b")
    names = {job_names.of(layout, cell.name) for layout in (here, there) for cell in cells}
    assert len(names) == 2 * len(cells)
    for name in names:
        assert len(name) <= 58
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert name[0].isalpha()
    assert job_names.of(here, cells[0].name).removeprefix(job_names.prefix(here)) == cells[0].name
    (tmp_path / "a").mkdir()
    os.symlink(tmp_path / "a", tmp_path / "link")
    assert job_names.prefix(Layout(tmp_path / "link")) == job_names.prefix(here)  # one folder has one name
