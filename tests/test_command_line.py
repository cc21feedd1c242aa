"""The configuration of a command line: every field can be given, None too, and what is wrong is one sentence."""

import logging

import pytest
from absl import flags
from ml_collections import config_flags

from gqa_jax import train
from gqa_jax.config import BUDGETS, ConfigError, Execution, TrainConfig, field_types

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections

TINY, SMALL = "configs/train/tiny.py", "configs/train/3m.py"  # 250 steps; 60M tokens in 8 micro-batches
HEADER = "from gqa_jax.config import default_config\n\n\ndef get_config():\n    c = default_config()\n"


def parse(*arguments):
    """As a program of its own, with nothing left of others' flags."""
    argv = ["train", *arguments]
    given = flags.FlagValues()
    config_flags.DEFINE_config_file(train.FLAG, None, flag_values=given, sys_argv=argv)
    return train.read_config(argv, given)


def config(file, *overrides):
    values, rest = parse(f"--config={file}", *(f"--config.{override}" for override in overrides))
    assert rest == []
    return TrainConfig.from_dict(values)


def refused(file, *overrides):
    with pytest.raises(ConfigError) as error:
        config(file, *overrides)
    assert "Traceback" not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("file", "given", "replaced"),
    [
        (SMALL, "steps = 20", "tokens = 60000000"),
        (SMALL, "tokens_per_param = 20.0", "tokens = 60000000"),
        (TINY, "tokens = 20480", "steps = 250"),
    ],
)
def test_a_budget_of_the_command_line_replaces_that_of_the_file_and_says_so(file, given, replaced, caplog):
    name, value = given.split(" = ")
    with caplog.at_level(logging.INFO):
        found = config(file, f"{name}={value}")
    assert {one: getattr(found, one) for one in BUDGETS} == dict.fromkeys(BUDGETS) | {name: float(value)}
    assert caplog.messages == [f"{given} of the command line replaces {replaced} of the file"]


def test_the_same_budget_is_replaced_without_a_word(caplog):
    with caplog.at_level(logging.INFO):
        assert config(TINY, "steps=20").steps == 20
        assert config(TINY, "tokens=20480", "steps=None").tokens == 20480
    assert caplog.messages == []


def test_two_budgets_of_the_command_line_are_refused(caplog):
    assert "give exactly one of tokens, tokens_per_param and steps" in refused(SMALL, "steps=20", "tokens=100")
    with caplog.at_level(logging.INFO):
        assert "'steps': 250" in refused(TINY, "tokens=100", "tokens_per_param=2")
    assert caplog.messages == []  # which of them would replace the file's?
    assert "give exactly one of tokens, tokens_per_param and steps; here: none of them" in refused(TINY, "steps=None")


def test_every_field_that_may_be_none_can_be_given_none():
    optional = [path for path, allowed in field_types(TrainConfig).items() if type(None) in allowed]
    assert {"execution.mesh", "model.d_ff", "logging.wandb_project", "continue_from", "execution.accumulation_steps"} <= set(
        optional
    )
    given = [f"{path}=None" for path in optional if path not in BUDGETS]
    found = config(SMALL, "execution.mesh=fsdp=2", "execution.remat=full", "model.d_ff=64", *given)
    assert found.execution == Execution()
    assert (found.continue_from, found.logging.wandb_project) == (None, None)
    assert found.model.d_ff == 672  # what None stands for


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_tokens=None", "batch_tokens = None: must be int"),
        ("label=None", "label = None: must be str"),
        ("data.document_mask=None", "data.document_mask = None: must be bool"),
        ("model.n_layers=three", "model.n_layers = 'three': must be int"),
        ("model.n_layers=1e3", "model.n_layers = '1e3': must be int"),
        ("model.n_layers=", "model.n_layers = '': must be int"),
        ("steps=many", "steps = 'many': must be int or None"),
        ("optimizer.learning_rate=fast: very", "optimizer.learning_rate = 'fast: very': must be float"),
        ("data.document_mask=maybe", "data.document_mask = 'maybe': must be bool"),
        ("optimizer.learning_rate=inf", "optimizer.learning_rate = inf: must be a finite number"),
        ("seed=18446744073709551616", "seed = 18446744073709551616: must be 0 to 9223372036854775807 (2^63 - 1)"),
        ("learning_rate=1e-3", "unknown configuration key 'learning_rate': did you mean 'optimizer.learning_rate'?"),
        ("model.learning_rate=1", "unknown configuration key 'model.learning_rate': did you mean 'optimizer.learning_rate'?"),
        ("mesh=fsdp=2", "unknown configuration key 'mesh': did you mean 'execution.mesh'?"),
        ("model.remat=full", "unknown configuration key 'model.remat': did you mean 'execution.remat'?"),
        ("execution.mesh=fsdp:4", "execution.mesh: mesh 'fsdp:4': write it like data=2,fsdp=4,context=8; 'fsdp:4' is no axis"),
        ("model.n_layer=3", "unknown configuration key 'model.n_layer': did you mean 'model.n_layers'?"),
        ("to_dict=3", "unknown configuration key 'to_dict': allowed: context_length, "),
        ("model[0]=3", "unknown configuration key 'model[0]'"),
        ("=3", "unknown configuration key '': allowed: context_length, "),
        ("model={}", "--config.model is a group of fields: give one of them, like --config.model.n_layers=VALUE"),
    ],
)
def test_a_field_that_can_not_be_is_one_sentence(override, message):
    assert message in refused(TINY, override)


def test_values_are_read_as_they_are_written():
    found = config(TINY, "optimizer.learning_rate=1", "seed=4294967296", "data.document_mask", "label=None of these")
    assert (found.optimizer.learning_rate, found.seed, found.data.document_mask) == (1.0, 2**32, True)
    assert found.label == "None of these"
    values, rest = parse(f"--config={TINY}", "-config.steps", "7", "--noconfig.data.document_mask", "more")
    assert (values["steps"], values["data"]["document_mask"], rest) == (7, False, ["more"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            HEADER + "    c.learning_rate = 1\n    return c\n",
            ", line 6: unknown configuration key 'learning_rate': did you mean ",
        ),
        (HEADER + "    c.model.update(n_layer=1)\n", ", line 6: unknown configuration key 'n_layer': did you mean 'model.n_la"),
        (HEADER + "    c.model.n_layers = 'three'\n", ", line 6: TypeError: "),
        (HEADER + "    open('nowhere')\n", ", line 6: FileNotFoundError: "),
        (HEADER + "    1 / 0\n", ", line 6: ZeroDivisionError: division by zero"),
        (HEADER, "get_config() gives NoneType: it must return what gqa_jax.config.default_config() gives"),
        ("def get_config():\n    return {'steps': 5}\n", "get_config() gives dict: it must return what"),
        ("def get_config(path):\n    pass\n", ": TypeError: get_config() missing 1 required positional argument: 'path'"),
        ("def get_config(:\n", "invalid syntax (file.py, line 1)"),
    ],
)
def test_a_file_that_fails_is_one_sentence_with_the_line(tmp_path, content, message):
    (tmp_path / "file.py").write_text(content)
    assert message in refused(tmp_path / "file.py")


def test_an_error_of_a_file_that_explains_itself_is_left_alone():
    assert refused("configs/cell.py:nope.json") == (
        "nope.json is not there: give the config.json of a cell's folder, which `launch run` writes"
    )


def test_flags_that_can_not_be_are_one_sentence(tmp_path):
    (tmp_path / "flags.txt").write_text("--config.stepz=7\n")
    for arguments, message in (
        ([f"--config={tmp_path / 'none.py'}"], "No such file or directory"),
        ([f"--config={TINY}", "--nope"], "Unknown command line flag 'nope'"),
        ([f"--config={TINY}", "--config.steps"], "Missing value for flag --config.steps"),
        (["--config.steps=3", f"--config={TINY}"], "before a value for --config was specified"),
        ([f"--config={TINY}", f"--flagfile={tmp_path / 'flags.txt'}"], "'stepz': did you mean 'steps'?"),
    ):
        with pytest.raises(ConfigError) as error:
            parse(*arguments)
        assert message in str(error.value)
        assert "Traceback" not in str(error.value)
    assert parse() == (None, [])
