import dataclasses
import json
import math

import pytest

from gqa_jax.config import (
    ConfigError,
    Execution,
    TrainConfig,
    default_config,
    differing_fields,
    hash_identity,
    unknown_key,
)
from gqa_jax.mesh import MeshShape, divisors

LINEAR = {"rope_scaling": "linear", "rope_factor": 2.0}
LLAMA3 = {"rope_scaling": "llama3", "rope_factor": 8.0}


def make(**changes):
    config = default_config()
    config.steps = 10
    config.update(changes)
    return TrainConfig.from_dict(config.to_dict())


def test_dict_round_trip_through_json():
    config = make(model={"n_heads": 8, "n_kv_heads": 2}, label="x")
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_stored_configuration_without_the_rules_of_today_has_the_old_ones():
    today = make()
    assert (today.evaluation.windows, today.optimizer.warmup_from) == ("spread", "one")
    stored = today.to_dict()
    del stored["evaluation"]["windows"], stored["optimizer"]["warmup_from"]
    old = TrainConfig.from_stored(stored)
    assert (old.evaluation.windows, old.optimizer.warmup_from) == ("first", "zero")
    assert TrainConfig.from_stored(today.to_dict()) == today
    assert (today.rules("hash"), old.rules("position")) == ("hash/spread/one", "position/first/zero")
    assert hash_identity(today.identity("x")) != hash_identity(old.identity("x"))


def test_a_mesh_is_text_in_files_and_parsed_once():
    config = make(execution={"mesh": "context=2,fsdp=4", "attention": "xla"})
    assert config.execution == Execution(mesh=MeshShape(fsdp=4, context=2), attention="xla")
    assert config.to_dict()["execution"]["mesh"] == "fsdp=4,context=2"
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"execution.mesh = 4: must be str or None"):
        TrainConfig.from_dict(config.to_dict() | {"execution": {"mesh": 4}})


def test_a_stored_configuration_of_before_execution_was_a_group_is_read():
    """As the code of November 2026 wrote config.json: three fields at the top, two in the model's group."""
    now = make(execution={"mesh": "fsdp=4", "remat": "full", "accumulation_steps": 2, "attention": "xla"})
    stored = now.to_dict()
    execution = stored.pop("execution")
    stored |= {name: execution[name] for name in ("mesh", "accumulation_steps", "context_attention")}
    stored["model"] |= {name: execution[name] for name in ("remat", "attention")}
    kept = json.dumps(stored)
    assert TrainConfig.from_stored(stored) == now
    assert json.dumps(stored) == kept  # which is not changed
    del stored["model"]["attention"], stored["mesh"]  # of a version that did not have them
    assert TrainConfig.from_stored(stored).execution == dataclasses.replace(now.execution, mesh=None, attention=None)
    with pytest.raises(ConfigError, match=r"'mesh': did you mean 'execution\.mesh'"):
        TrainConfig.from_dict(now.to_dict() | {"mesh": None})


def test_d_ff_is_the_closest_multiple_of_32():
    assert [make(model={"d_model": d}).model.d_ff for d in (256, 512, 768, 1024, 1536)] == [672, 1376, 2048, 2720, 4096]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"n_heads": 6, "n_kv_heads": 4}}, r"n_heads = 6 is not a multiple .* use n_kv_heads from \[1, 2, 3, 6\]"),
        ({"model": {"n_layers": 0}}, "model.n_layers = 0: must be an integer of at least 1"),
        ({"model": {"head_dim": 7}}, "must be even"),
        ({"model": {"dtype": "bfloat61"}}, "did you mean 'bfloat16'"),
        ({"execution": {"remat": "ful"}}, "did you mean 'full'"),
        ({"execution": {"mesh": "fdsp=4"}}, "execution.mesh: mesh 'fdsp=4': .*did you mean 'fsdp'"),
        ({"execution": {"mesh": "fsdp=3"}}, "execution.mesh 'fsdp=3': data x fsdp = 3 does not divide the 64 sequences"),
        ({"execution": {"context_attention": "rnig"}}, "execution.context_attention = 'rnig': did you mean 'ring'"),
        ({"execution": {"accumulation_steps": 0}}, "execution.accumulation_steps = 0: must be an integer of at least 1"),
        ({"batch_tokens": 10_000}, "is not a multiple of context_length = 8192: use 8192"),
        ({"execution": {"accumulation_steps": 7}}, "does not divide the 64 sequences"),
        ({"data": {"block_tokens": 10_000}}, "does not divide data.block_tokens"),
        ({"evaluation": {"tokens": 8193}}, "evaluation.tokens = 8193 is not a multiple"),
        ({"steps": 0}, "steps = 0: must be above 0"),
        ({"optimizer": {"schedule": "wds"}}, "did you mean 'wsd'"),
        ({"optimizer": {"warmup_fraction": 0.9}}, "must be at most 1"),
        ({"optimizer": {"b2": 1.0}}, r"must be in \[0, 1\)"),
        ({"checkpoint": {"keep": 1}}, "must be at least 2"),
        ({"evaluation": {"windows": "sprad"}}, "did you mean 'spread'"),
        ({"optimizer": {"warmup_from": "two"}}, "optimizer.warmup_from = 'two': "),
        ({"seed": 2**63}, r"seed = 9223372036854775808: must be 0 to .* \(2\^63 - 1\)"),
        ({"seed": -1}, "seed = -1: must be 0"),
        ({"steps": 10**400}, r"steps = 10{39}: must be below 10\^24"),
        ({"tokens": 5}, "exactly one of tokens, tokens_per_param and steps"),
        ({"model": {"rope_scaling": "lama3"}}, "model.rope_scaling = 'lama3': did you mean 'llama3'"),
        (
            {"model": {"rope_factor": 2.0}},
            "rope_factor = 2.0: .*None does not take it; leave it 1.0, .* to 'linear' or 'llama3'",
        ),
        ({"model": {"rope_original_context": 4096}}, "rope_original_context = 4096: .*leave it 8192, or set .* to 'llama3'$"),
        (
            {"model": LINEAR | {"rope_low_freq_factor": 2.0}},
            "rope_low_freq_factor = 2.0: rope_scaling = 'linear' does not take",
        ),
        ({"model": LINEAR | {"rope_factor": 0.5}}, "model.rope_factor = 0.5: must be a finite number of at least 1"),
        ({"model": LLAMA3 | {"rope_original_context": 0}}, "rope_original_context = 0: must be a finite number of at least 1"),
        ({"model": LLAMA3 | {"rope_low_freq_factor": 0.0}}, "rope_low_freq_factor = 0.0: must be a finite number above 0"),
        ({"model": LLAMA3 | {"rope_high_freq_factor": 1.0}}, "rope_high_freq_factor = 1.0: must be above rope_low.* = 1.0"),
    ],
)
def test_bad_values_name_the_field_the_value_and_the_fix(changes, message):
    with pytest.raises(ConfigError, match=message):
        make(**changes)


def test_unknown_keys_name_the_closest():
    values = make().to_dict()
    values["model"]["n_head"] = 3
    with pytest.raises(ConfigError, match=r"'model.n_head': did you mean 'model.n_heads'"):
        TrainConfig.from_dict(values)


@pytest.mark.parametrize(
    ("path", "meaning"),
    [
        ("learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("model.learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("optimiser.learning_rate", "did you mean 'optimizer.learning_rate'?"),
        ("optimiser.rate", "unknown configuration key 'optimiser': did you mean 'optimizer'?"),
        ("every_steps", "did you mean 'evaluation.every_steps' or 'checkpoint.every_steps' or 'logging.every_steps'?"),
        ("model.step", "did you mean 'steps'?"),
        ("seeed", "did you mean 'seed'?"),
        ("model.foo", "unknown configuration key 'model.foo': allowed: n_layers, d_model, n_heads, "),
        ("foo", "unknown configuration key 'foo': allowed: context_length, batch_tokens, "),
        ("seed.x", "'seed.x': 'seed' is no group of fields"),
    ],
)
def test_an_unknown_key_names_the_closest_of_any_group(path, meaning):
    assert meaning in unknown_key(path, TrainConfig)


def test_numbers_that_no_run_can_have_are_refused_at_once():
    for changes, message in (
        ({"optimizer": {"learning_rate": math.inf}}, r"optimizer.learning_rate = inf: must be a finite number"),
        ({"model": {"rope_theta": math.nan}}, r"model.rope_theta = nan: must be a finite number"),
        ({"steps": None, "tokens_per_param": 1e308}, r"tokens_per_param = 1e\+308: must be above 0, and below 2\^63"),
        ({"model": {"n_layers": 10**12}}, r"model.n_layers = 1000000000000: must be an integer .* below 2\^31"),
        ({"model": {"n_layers": 2**31}}, r"model.n_layers = 2147483648: must be an integer .* below 2\^31"),
        ({"model": {"n_layers": 2**30, "d_model": 2**20}}, r"one array would have .* values; use a smaller model"),
        (
            {"model": {"n_heads": 2**30, "n_kv_heads": 3}},
            r"serves the same number of query heads; use n_kv_heads from \[1, 2, 4",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make(**changes)


def test_divisors_are_all_and_those_of_a_huge_number_take_no_time():
    for n in (1, 2, 12, 36, 97, 1_000_003 * 2):
        assert divisors(n) == [i for i in range(1, n + 1) if n % i == 0]
    assert divisors(2**80)[:3] == [1, 2, 4]


def test_wrong_types_are_refused():
    values = make().to_dict()
    values["model"]["n_heads"] = 2.0
    with pytest.raises(ConfigError, match=r"model.n_heads = 2.0: must be int"):
        TrainConfig.from_dict(values)


def test_budget_in_tokens_and_per_parameter():
    by_tokens = make(steps=None, tokens=1_000_000)
    assert by_tokens.n_steps == 2
    assert by_tokens.train_tokens == 1_048_576
    assert make(steps=None, tokens_per_param=20.0).n_steps == -(-20 * 3_115_264 // 524_288)


def test_identity_holds_what_changes_the_result_and_nothing_else():
    base = hash_identity(make().identity("f"))
    same = [
        {"execution": {"remat": "full", "attention": "xla"}},
        {"execution": {"accumulation_steps": 2, "mesh": "fsdp=2"}},
        {"checkpoint": {"every_steps": 7}},
        {"logging": {"tensorboard": True}},
        {"label": "other"},
        {"data": {"store": "elsewhere", "epochs": 2}},
    ]
    other = [
        {"seed": 1},
        {"steps": 11},
        {"model": {"n_heads": 8}},
        {"model": {"dtype": "float32"}},
        {"model": {"untied": True}},
        {"model": LINEAR},
        {"model": LINEAR | {"rope_factor": 3.0}},
        {"model": LLAMA3},
        {"model": LLAMA3 | {"rope_original_context": 4096}},
        {"optimizer": {"learning_rate": 2e-3}},
        {"data": {"block_tokens": 8192}},
        {"evaluation": {"tokens": 8192}},
        {"evaluation": {"windows": "first"}},
        {"optimizer": {"warmup_from": "zero"}},
        {"context_length": 4096},
    ]
    assert {hash_identity(make(**change).identity("f")) for change in same} == {base}
    changed = [hash_identity(make(**change).identity("f")) for change in other] + [hash_identity(make().identity("g"))]
    assert base not in changed
    assert len(set(changed)) == len(changed)


def test_the_same_budget_said_in_another_way_is_the_same_run():
    assert make(steps=2).identity("f") == make(steps=None, tokens=1_048_576).identity("f")


def test_differing_fields_are_named_by_their_path():
    assert differing_fields(make().to_dict(), make(model={"n_heads": 8}).to_dict()) == ["model.n_heads: 4 here, 8 there"]


def test_identities_and_so_names_stay_what_they_were():
    """Computed before meshes, phases and rules came: a change here trains every finished cell again."""
    rules = {"evaluation": {"windows": "first"}}
    first = make(**rules, optimizer={"warmup_from": "zero"})
    assert hash_identity(first.identity("f"), 64) == "587066fcbbac91c793904f3ce804c51d8dce51131d8d9e84779f2c0680ccb260"
    other = make(
        model={"n_heads": 8, "n_kv_heads": 1},
        execution={"remat": "full"},
        steps=None,
        tokens_per_param=20.0,
        optimizer={"schedule": "cosine", "warmup_from": "zero"},
        **rules,
    )
    assert hash_identity(other.identity("f")) == "f00f7c58d9"
    new = {"mesh": "fsdp=2", "accumulation_steps": 2, "context_attention": "ring", "remat": "offload"}
    assert make(execution=new).identity("f") == make().identity("f")
    for used in ({"data": {"skip_tokens": 8192}}, {"data": {"document_mask": True}}):
        assert make(**used).identity("f") != make().identity("f")


def test_the_model_of_an_identity_has_the_fields_that_are_used():
    first = {"n_layers", "d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff", "vocab_size", "rope_theta", "norm_eps",
             "init_std", "dtype", "param_dtype"}  # fmt: skip
    of_both = {"rope_scaling", "rope_factor"}
    of_llama3 = {"rope_low_freq_factor", "rope_high_freq_factor", "rope_original_context"}
    for model, more in (({}, set()), ({"untied": True}, {"untied"}), (LINEAR, of_both), (LLAMA3, of_both | of_llama3)):
        config = make(model=model)
        assert {*config.identity("f")["model"]} == first | more
        assert TrainConfig.from_stored(config.to_dict() | {"model": config.model.identity()}) == config


def test_a_run_that_continues_is_named_by_the_other_run_and_not_by_its_path():
    here, there = make(continue_from="../a"), make(continue_from="/elsewhere/b")
    assert here.identity("f", "abc") == there.identity("f", "abc")
    assert here.identity("f", "abc") != here.identity("f", "def")
    assert here.identity("f", "abc") == make().identity("f") | {"continue_from": "abc"}
    with pytest.raises(ConfigError, match=r"continue_from = '../a': the identity of that run is not known"):
        here.identity("f")
    with pytest.raises(ConfigError, match="starts from scratch"):
        make().identity("f", "abc")
    with pytest.raises(ConfigError, match="must be a run folder, or None"):
        make(continue_from="")


def test_a_run_continues_another_with_the_same_parameters():
    run = make(
        continue_from="../a", context_length=4096, model={"rope_theta": 1e7, "dtype": "float32"}, execution={"remat": "full"}
    )
    run.check_source(make().model)
    with pytest.raises(ConfigError, match=r"'../a' has other parameters: model.n_heads: 4 here, 8 there\. Use the same model"):
        run.check_source(make(model={"n_heads": 8}).model)
    with pytest.raises(ConfigError, match=r"has other parameters: model.untied: False here, True there"):
        run.check_source(make(model={"untied": True}).model)
    run.check_source(make(model=LLAMA3).model)
