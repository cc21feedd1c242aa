import dataclasses
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gqa_jax import attention, costs, model, train
from gqa_jax.config import ConfigError, TrainConfig, default_config
from gqa_jax.data import catalog, reader, store
from gqa_jax.planning import planner
from gqa_jax.training import checkpoint, evaluation, metrics, run_folder, setup
from gqa_jax.training.run_folder import Diverged, Preempted
from tests import first_version

pytestmark = pytest.mark.usefixtures("compiled_once")

REPOSITORY = Path(__file__).resolve().parent.parent


def tiny(**changes):
    """A run of a second: 12 steps of 256 bytes."""
    config = default_config()
    config.context_length = 32
    config.batch_tokens = 256
    config.steps = 12
    config.model.update(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, head_dim=8, vocab_size=320, dtype="float32")
    config.data.update(store="sotu-bytes", block_tokens=64)
    config.evaluation.tokens = 1024
    config.checkpoint.every_steps = 4
    config.logging.update(every_steps=2, progress=False)
    with config.unlocked():
        config.update(changes)
    return TrainConfig.from_dict(config.to_dict())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that was never interrupted, and its result."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, train.train_and_evaluate(tiny(), folder)


def losses(folder):
    return [row["loss"] for row in metrics.read_metrics(folder) if row["kind"] == "train"]


def test_a_run_leaves_result_metrics_and_environment(finished):
    folder, result = finished
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["status"] == "done"
    assert result["step"] == 12
    assert result["tokens"] == 12 * 256
    assert result["attention"] == "xla"
    assert 4 < result["loss"] < 6  # 320 ids: log 320 = 5.77 before training
    assert (result["rules"], result["holdout"]) == (
        f"{result['holdout']}/spread/one",
        catalog.open_store("sotu-bytes").holdout_rule,
    )
    assert result["heldout"] == f"{result['data_fingerprint'][:12]}/spread/16x64"
    assert 1 < result["eval_documents"] <= result["heldout_documents"]
    assert result["heldout_tokens"] == len(catalog.open_store("sotu-bytes").tokens("validation"))
    assert result["loss_low"] < result["loss"] - 2 * result["loss_sem"] < result["loss"]
    assert result["loss_high"] - result["loss"] == pytest.approx(result["loss"] - result["loss_low"])
    assert result["mfu"] is None  # no peak is known of a CPU
    assert [row["step"] for row in metrics.read_metrics(folder) if row["kind"] == "train"] == list(range(1, 13))
    assert losses(folder)[-1] < losses(folder)[0]
    assert json.loads((folder / "environment.json").read_text())["versions"]["jax"] == jax.__version__


def test_a_run_leaves_its_evaluation_by_part_and_by_document(finished):
    folder, result = finished
    rows = json.loads((folder / "evaluations.json").read_text())["rows"]
    assert rows[0]["value"] == result["loss"]
    assert rows[0]["standard_error"] == result["loss_sem"]
    assert {(row["step"], row["context"], row["rules"]) for row in rows} == {(12, 32, result["rules"])}
    positions = [row for row in rows if row["position"]]
    assert [row["position"] for row in positions] == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
    assert sum(row["n"] for row in positions) == result["eval_tokens"] == 1024
    of = evaluation.from_bytes((folder / "documents.npz").read_bytes())
    assert len(of.document) == result["eval_documents"]
    assert of.loss.sum() / of.tokens.sum() == pytest.approx(result["loss"])
    assert of.loss.sum() / np.log(2) / of.text_bytes.sum() == pytest.approx(result["bits_per_byte"])


def test_a_standard_error_that_is_not_known_is_left_out(tmp_path, caplog):
    """Of a single document: no "nan" in the log, the result or the summary."""
    config = tiny(steps=2, evaluation={"windows": "first"}, data={"store": "sotu-bytes"})
    with caplog.at_level("INFO", logger="gqa_jax.train"):
        result = train.train_and_evaluate(config, tmp_path)
    assert (result["eval_documents"], result["loss_sem"], result["loss_low"]) == (1, None, None)
    assert f"step 2: held-out loss {result['loss']:.4f}\n" in caplog.text
    summary = train._summary(result, "run")
    assert summary.startswith(
        f"loss {result['loss']:.4f} nats/token (1 of {result['heldout_documents']} held-out documents) · "
        f"{result['bits_per_byte']:.4f} bits/byte · 512 tokens"
    )
    assert "nan" not in summary + caplog.text + (tmp_path / "evaluations.json").read_text()


def test_a_summary_says_what_the_loss_is_of():
    result = {
        "status": "done", "loss": 1.729, "loss_sem": 0.031, "loss_low": 1.6608, "loss_high": 1.7972, "bits_per_byte": 2.4944,
        "eval_documents": 12, "heldout_documents": 12, "tokens": 1_048_576, "tokens_per_second": 12345.6, "step": 9,
    }  # fmt: skip
    rest = " · 2.4944 bits/byte · 1,048,576 tokens · 12,346 tokens/s · runs/x/result.json"
    assert train._summary(result, "runs/x") == (
        "loss 1.7290 ± 0.0310 nats/token (12 of 12 held-out documents, 95%: 1.661 to 1.797)" + rest
    )
    single = result | {"eval_documents": 1, "heldout_documents": 1, "loss_sem": None, "loss_low": None, "loss_high": None}
    assert train._summary(single, "runs/x") == "loss 1.7290 nats/token (1 of 1 held-out document)" + rest
    first_version = {key: result[key] for key in result if key not in ("loss_low", "loss_high", "heldout_documents")}
    assert train._summary(first_version, "runs/x") == "loss 1.7290 ± 0.0310 nats/token (12 held-out documents)" + rest
    textless = result | {"bits_per_byte": None, "loss_low": 1.0, "loss_high": 31.0}
    assert "12 of 12 held-out documents, 95%: 1.0 to 31.0) · 1,048,576 tokens" in train._summary(textless, "runs/x")


def test_a_run_of_the_first_version_is_over_under_its_rules(tmp_path, monkeypatch):
    """The same command says under which options; with them there is nothing to do, and nothing in the folder changes."""
    folder = first_version.unpack(tmp_path)
    monkeypatch.chdir(folder)
    config = TrainConfig.from_dict(runpy.run_path("config.py")["get_config"]().to_dict())
    options = r"add --config\.evaluation\.windows=first --config\.optimizer\.warmup_from=zero, or start this one in another"
    for run in ("run", "begun"):
        with pytest.raises(ConfigError, match=rf"begun under the rules of the first version: to resume it {options}"):
            train.train_and_evaluate(config, run)
    old = dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, windows="first"),
        optimizer=dataclasses.replace(config.optimizer, warmup_from="zero"),
    )

    def files():
        return {
            path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*") if path.is_file() and path.name != ".lock"
        }

    before = files()
    result = train.train_and_evaluate(old, "run")
    assert (result["loss"], result["identity"]) == (first_version.LOSS, first_version.IDENTITY)
    assert before == files()
    assert "(2 held-out documents)" in train._summary(result, "run")


def test_other_data_than_that_of_a_run_that_is_over_is_said(finished, tmp_path):
    """As after an upgrade: the store of that name was another."""
    folder, result = finished
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "result.json"
    path.write_text(json.dumps(result | {"identity": "0" * 10, "data_fingerprint": "1" * 64}))
    message = (
        rf"is of other data \(data\.fingerprint: {result['data_fingerprint'][:12]} here, 111111111111 there; if that run is of "
        r"the first version, add --config\.data\.store=sotu-bytes@position\): use another --workdir"
    )
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(tiny(), tmp_path / "run")
    path.write_text(json.dumps(result | {"identity": "0" * 10}))
    with pytest.raises(ConfigError, match="is of another configuration or other data: use another --workdir"):
        train.train_and_evaluate(tiny(), tmp_path / "run")


@pytest.mark.parametrize(("split", "place"), [("train", slice(0, 900_000)), ("validation", slice(0, None))])
def test_a_store_that_turns_out_to_be_damaged_ends_a_run(split, place, tmp_path, monkeypatch):
    """As where it was written to after it was verified."""
    shutil.copytree(catalog.open_store("sotu-bytes").path, tmp_path / "store")
    tokens = np.memmap(tmp_path / "store" / f"{split}.bin", dtype="<u2", mode="r+")
    tokens[place] = 300  # above the 257 of the store, below the 320 of the model
    tokens.flush()
    opened = store.TokenStore.open(tmp_path / "store")
    monkeypatch.setattr(catalog, "open_store", lambda _: opened)
    train_batches, _ = reader.check(tiny(), opened)
    with pytest.raises(ConfigError, match=rf"the {split} split of .* holds the id 300, .* copy the store again"):
        [*setup.read(train_batches, 0, 12)] if split == "train" else setup.open_data(tiny())


FIRST_VERSION = {
    "data": {"store": "sotu-bytes@position"}, "evaluation": {"windows": "first"}, "optimizer": {"warmup_from": "zero"},
}  # fmt: skip


def test_golden_numbers_of_the_first_steps(finished, tmp_path):
    """A change here means that model, initialisation, data order, loss or optimizer is another: say so in the commit.

    Those of the first version stay for ever: its cells must have the numbers that they had.
    """
    folder, _ = finished
    np.testing.assert_allclose(losses(folder)[:3], GOLDEN_LOSSES, rtol=2e-5)
    result = train.train_and_evaluate(tiny(**FIRST_VERSION), tmp_path)
    np.testing.assert_allclose(losses(tmp_path)[:3], GOLDEN_LOSSES_OF_FIRST_VERSION, rtol=2e-5)
    assert (result["rules"], result["identity"]) == ("position/first/zero", "2c8a906034")


GOLDEN_LOSSES = [5.7650499, 5.7486348, 5.7291732]
GOLDEN_LOSSES_OF_FIRST_VERSION = [5.7551126, 5.7616167, 5.7449160]


@pytest.mark.parametrize(
    "implementation",
    ["pallas_tpu", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("reference", "pallas_triton"))],
)
def test_losses_agree_between_implementations_of_attention(implementation, tmp_path):
    model_changes = {"head_dim": 16}
    plain = train.train_and_evaluate(tiny(model=model_changes, steps=4), tmp_path / "xla")
    with attention.interpreted():
        other = train.train_and_evaluate(
            tiny(model=model_changes, execution={"attention": implementation}, steps=4), tmp_path / implementation
        )
    assert (plain["attention"], other["attention"]) == ("xla", implementation)
    np.testing.assert_allclose(losses(tmp_path / implementation), losses(tmp_path / "xla"), rtol=1e-5)
    np.testing.assert_allclose(other["loss"], plain["loss"], rtol=1e-5)
    assert other["params_sha256"] != plain["params_sha256"]  # another order of sums: it did run


def test_attention_that_cannot_run_here_is_refused_before_data_is_opened(tmp_path):
    config = tiny(model={"head_dim": 64}, execution={"attention": "pallas_gpu"}, data={"store": str(tmp_path / "none")})
    with pytest.raises(ConfigError, match=r"execution\.attention: .*'pallas_gpu' can't run here: .* These can: reference, xla"):
        train.train_and_evaluate(config, tmp_path / "run")


def test_parameters_in_bfloat16_are_warned_of_and_train(finished, tmp_path, caplog):
    """And are resumed: their optimizer state is in bfloat16 too."""
    config = tiny(model={"param_dtype": "bfloat16"}, execution={"accumulation_steps": 4})
    whole = train.train_and_evaluate(config, tmp_path / "whole")
    assert caplog.text.count("updates smaller than about 1/256 of a parameter are lost") == 1
    assert whole["loss"] == pytest.approx(finished[1]["loss"], rel=0.02)
    shutil.copytree(tmp_path / "whole", tmp_path / "part", ignore=shutil.ignore_patterns("12", "result.json"))
    assert train.train_and_evaluate(config, tmp_path / "part")["params_sha256"] == whole["params_sha256"]
    rows = [row["grad_norm"] for row in metrics.read_metrics(tmp_path / "whole") if row["kind"] == "train"]
    assert sum(norm == float(jnp.bfloat16(norm)) for norm in rows) < 3
    caplog.clear()
    train.train_and_evaluate(tiny(steps=1), tmp_path / "wide")
    assert "param_dtype" not in caplog.text


def test_a_finished_run_is_not_trained_again(finished):
    folder, result = finished
    before = sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*.jsonl"))
    assert train.train_and_evaluate(tiny(), folder) == result
    assert before == sorted((path, path.stat().st_mtime_ns) for path in folder.rglob("*.jsonl"))


def test_resume_with_another_config_is_refused_with_the_fields(finished):
    folder, _ = finished
    other = dataclasses.replace(tiny(), seed=1)
    with pytest.raises(ConfigError, match="seed: 1 here, 0 there"):
        train.train_and_evaluate(other, folder)


def test_logging_and_checkpoints_are_no_other_config(finished):
    folder, result = finished
    other = tiny(checkpoint={"every_steps": 5}, execution={"accumulation_steps": 2})
    assert train.train_and_evaluate(other, folder) == result


def interrupt_after(monkeypatch, step):
    """Raises at the end of a step, as an exception in a callback would; what was saved before stays."""
    real = metrics.Metrics.write

    def write(self, kind, at, values):
        real(self, kind, at, values)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(metrics.Metrics, "write", write)


def test_resume_is_exact_and_rows_of_the_later_attempt_count(finished, tmp_path, monkeypatch):
    whole, result = finished
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(), tmp_path)
    resumed = train.train_and_evaluate(tiny(), tmp_path)
    assert resumed["params_sha256"] == result["params_sha256"]
    assert resumed["loss"] == result["loss"]
    assert resumed["attempts"] == 2
    assert losses(tmp_path) == losses(whole)
    second = [json.loads(line) for line in (tmp_path / "metrics" / "attempt-001.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in second) == 5  # the checkpoint of step 4 was used


def test_a_run_that_was_begun_by_mistake_is_left_at_once(monkeypatch, capsys):
    def parse(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_parse", parse)
    assert train.main(["train"]) == 130
    assert "stopped before it trained; the same command starts it again\n" in capsys.readouterr().err


def test_a_request_to_end_saves_and_the_next_attempt_goes_on_from_there(finished, tmp_path, monkeypatch):
    whole, result = finished
    real = metrics.Metrics.write

    def write(self, kind, at, values):
        real(self, kind, at, values)
        if at == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Metrics, "write", write)
        with pytest.raises(Preempted, match=r"asked to end \(Ctrl-C\): saved after step 7; the same command goes on"):
            train.train_and_evaluate(tiny(), tmp_path)
    assert signal.getsignal(signal.SIGINT) == before
    assert run_folder.exit_code(Preempted(7)) == 75
    end = json.loads((tmp_path / "exit.json").read_text())
    assert (end["code"], end["class"], end["attempt"]) == (75, "preempted", 0)
    resumed = train.train_and_evaluate(tiny(), tmp_path)
    assert resumed["params_sha256"] == result["params_sha256"]
    assert losses(tmp_path) == losses(whole)
    second = [json.loads(line) for line in (tmp_path / "metrics" / "attempt-001.jsonl").read_text().splitlines()]
    assert min(row["step"] for row in second) == 8
    assert not (tmp_path / "exit.json").exists()


LONGER = {"context_length": 64, "steps": 4, "optimizer": {"learning_rate": 1e-5}, "data": {"skip_tokens": 12 * 256}}


def test_a_second_phase_starts_from_the_parameters_of_the_first(finished, tmp_path):
    folder, first = finished
    (tmp_path / "first").symlink_to(folder)
    config = tiny(**LONGER, continue_from="../first")
    result = train.train_and_evaluate(config, tmp_path / "second")
    assert (result["status"], result["step"]) == ("done", 4)
    assert result["loss"] == pytest.approx(first["loss"], abs=0.05)  # of the same held-out tokens, hardly trained on
    assert result["identity"] != train.train_and_evaluate(tiny(**LONGER), tmp_path / "scratch")["identity"]
    assert losses(tmp_path / "second")[0] < losses(tmp_path / "scratch")[0] - 0.1
    assert train.train_and_evaluate(config, tmp_path / "second") == result  # it is over

    with pytest.raises(ConfigError, match=r"'\.\./second' has other parameters: model\.d_ff: 64 here, 32 there"):
        train.train_and_evaluate(tiny(model={"d_ff": 64}, continue_from="../second"), tmp_path / "third")
    (folder / "checkpoints" / "12").rename(tmp_path / "away")
    try:
        with pytest.raises(ConfigError, match=r"newest checkpoint that can be used there is of step 8, not the last \(12\)"):
            train.train_and_evaluate(config, tmp_path / "fourth")
    finally:
        (tmp_path / "away").rename(folder / "checkpoints" / "12")


def test_a_second_phase_needs_a_first_that_is_done(finished, tmp_path):
    folder, first = finished
    config = tiny(**LONGER, continue_from="../first")
    with pytest.raises(ConfigError, match=r"continue_from = '\.\./first': .* has no result\.json: let that run end first"):
        train.train_and_evaluate(config, tmp_path / "second")
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "first" / "result.json").write_text(json.dumps(first | {"status": "diverged"}))
    with pytest.raises(ConfigError, match="that run diverged at step 12"):
        train.train_and_evaluate(config, tmp_path / "second")


@pytest.mark.parametrize(
    ("device_kind", "fix"),
    [
        (
            "TPU v5 lite",
            r"execution\.mesh=.*, execution\.remat=.*, .*accumulation_steps=.*, .*context_attention=.* should fit",
        ),
        ("cpu", "raise execution.accumulation_steps, set execution.remat to full, or use a mesh of more devices"),
    ],
)
def test_a_step_that_needs_too_much_memory_is_refused_with_what_would_fit(device_kind, fix):
    config = planner.resolve(tiny(execution={"mesh": "data=1", "remat": "none"}), "cpu", 1)
    gib = 2**30
    program = SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(
            argument_size_in_bytes=12 * gib,
            output_size_in_bytes=8 * gib,
            alias_size_in_bytes=7 * gib,
            temp_size_in_bytes=4 * gib,
        )
    )

    def mesh(limit):
        stats = None if limit is None else {"bytes_limit": limit}
        return SimpleNamespace(local_devices=[SimpleNamespace(device_kind=device_kind, memory_stats=lambda: stats)], size=1)

    for limit in (None, 17 * gib):
        setup.check_memory(config, mesh(limit), program)
    with pytest.raises(ConfigError, match=rf"a step needs 17\.00 GiB of each {device_kind}, which gives 16\.00: {fix}"):
        setup.check_memory(config, mesh(16 * gib), program)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_is_used(finished, tmp_path, monkeypatch, caplog, damage):
    _, result = finished
    with monkeypatch.context() as patch:
        interrupt_after(patch, 11)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(tiny(), tmp_path)
    assert {"4", "8"} <= {path.name for path in (tmp_path / "checkpoints").iterdir()}
    largest = max((p for p in (tmp_path / "checkpoints" / "8").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 0xFF
        largest.write_bytes(content)
    elif damage == "truncate":
        largest.write_bytes(content[: len(content) // 2])
    else:
        largest.unlink()
    resumed = train.train_and_evaluate(tiny(), tmp_path)
    assert "checkpoint of step 8 is damaged" in caplog.text
    assert len(list((tmp_path / "damaged-checkpoints").iterdir())) == 1  # moved aside, not deleted
    assert resumed["params_sha256"] == result["params_sha256"]


def test_a_renamed_checkpoint_trains_nothing(finished, tmp_path):
    """It would be taken for the end of the run, with the loss of an earlier step."""
    folder, _ = finished
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(folder / "config.json", tmp_path)
    shutil.copytree(folder / "checkpoints" / "8", tmp_path / "checkpoints" / "12")
    with pytest.raises(
        ConfigError, match="checkpoints/12 holds the state after step 8, not 12: it was renamed or copied"
    ) as error:
        train.train_and_evaluate(tiny(), tmp_path)
    assert run_folder.exit_code(error.value) == 2
    assert json.loads((tmp_path / "exit.json").read_text())["class"] == "config"
    assert metrics.read_metrics(tmp_path) == []
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["12"]
    assert not (tmp_path / "damaged-checkpoints").exists()


def test_a_non_finite_loss_stops_and_is_a_result(tmp_path):
    config = tiny(optimizer={"learning_rate": 1e30, "warmup_fraction": 0.0, "clip_norm": 1e30})
    with pytest.raises(Diverged, match=r"lower optimizer.learning_rate"):
        train.train_and_evaluate(config, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["status"] == "diverged"
    assert result["loss"] is None
    assert 1 <= result["step"] < 12
    assert json.loads((tmp_path / "exit.json").read_text())["class"] == "diverged"


def test_two_processes_in_one_folder_are_refused(tmp_path):
    from gqa_jax.training import run_folder

    with run_folder.claim(tmp_path), pytest.raises(ConfigError, match="another process trains in this folder"):
        train.train_and_evaluate(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"vocab_size": 64}}, "smaller than the vocabulary"),
        ({"steps": 10**6}, "allow data.epochs"),
        ({"evaluation": {"tokens": 2**25}}, "evaluation.tokens"),
        ({"data": {"store": "sotu-byte"}}, "sotu-bytes"),
    ],
)
def test_bad_data_is_an_error_before_training(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        train.train_and_evaluate(tiny(**changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert json.loads((tmp_path / "exit.json").read_text())["class"] == "config"


def test_a_full_disk_is_said_and_nothing_saved_is_lost(finished, tmp_path, monkeypatch):
    _, result = finished
    real = checkpoint.Checkpoints.save

    def save(self, step, *rest):
        if step == 8:
            raise OSError(28, "No space left on device")
        real(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save)
        with pytest.raises(OSError, match="No space left"):
            train.train_and_evaluate(tiny(), tmp_path)
    end = json.loads((tmp_path / "exit.json").read_text())
    assert end["class"] == "disk_full"
    assert "free space" in end["reason"]
    assert train.train_and_evaluate(tiny(), tmp_path)["params_sha256"] == result["params_sha256"]


REFERENCE = model.Hooks(attend=lambda q, k, v, state: (attention.attention(q, k, v, implementation="reference"), state))


def test_cost_model_counts_the_flops_that_xla_counts():
    """Of an unrolled forward pass: XLA counts the body of a scan once. Beside matmuls it counts some elementwise work."""
    config = dataclasses.replace(tiny().model, n_layers=3, d_model=128, d_ff=352, n_heads=4, n_kv_heads=2, head_dim=64)
    length, batch = 256, 1
    params = model.init_params(config, jax.random.key(0))
    tokens = jnp.zeros((batch, length), jnp.int32)

    def forward(params, tokens):
        transformer = model.with_params(config, params)
        layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(config.n_layers)]
        x, _ = model.run_layers(config, layers, transformer.embed(tokens), jnp.arange(length), REFERENCE)
        x = model.rms_norm(x, params["final_norm"], config.norm_eps)
        return x @ params["embedding"].T

    expected = batch * length * costs.forward_flops(config, length, "exact").total
    assert _matmul_flops(jax.make_jaxpr(forward)(params, tokens).jaxpr) == expected
    by_xla = jax.jit(forward).lower(params, tokens).compile().cost_analysis()["flops"]
    assert expected < by_xla < 1.05 * expected

    def scanning(params, tokens):
        transformer = model.with_params(config, params)
        return transformer.logits(transformer.hidden(transformer.embed(tokens), jnp.arange(length), REFERENCE)[0])

    scanned = jax.make_jaxpr(scanning)(params, tokens)
    assert _matmul_flops(scanned.jaxpr) == expected  # what is trained is the same model


def _matmul_flops(jaxpr, times=1):
    """FLOPs of every dot_general of a jaxpr, the bodies of scans times their length."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * times * int(np.prod(equation.outvars[0].aval.shape)) * int(np.prod([left[i] for i in contracted]))
        inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            for sub in value if isinstance(value, tuple | list) else (value,):
                if hasattr(sub, "eqns"):
                    total += _matmul_flops(sub, inner)
                elif hasattr(sub, "jaxpr"):
                    total += _matmul_flops(sub.jaxpr, inner)
    return total


COMMAND = [sys.executable, "-m", "gqa_jax.train", "--config=configs/train/tiny.py"]
SHORT = [
    "--config.steps=400",
    "--config.checkpoint.every_steps=5",
    "--config.batch_tokens=1024",
    "--config.evaluation.tokens=8192",
]


def command_line(*arguments, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.learning_rate=1e-3"], "did you mean 'optimizer.learning_rate'?"),
        (["--config.model.n_layers=three"], "model.n_layers = 'three': must be int"),
        (["--config.seed=18446744073709551616"], "seed = 18446744073709551616: must be 0 to 9223372036854775807"),
        (["--config.model.n_kv_heads=3"], "is not a multiple of model.n_kv_heads = 3"),
        (["--config=configs/train/tinny.py"], "No such file or directory: 'configs/train/tinny.py'"),
        (["--workdirs=x"], "workdir"),
        (["--config.steps=5", "--config.tokens=100"], "exactly one of tokens"),
    ],
)
def test_bad_command_lines_are_one_sentence_and_exit_2(tmp_path, arguments, message):
    done = command_line(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path):
    """SIGKILL at seeded random moments: while it starts, between steps, and during saves (every 5 steps)."""
    undisturbed = command_line(f"--workdir={tmp_path / 'whole'}", *SHORT)
    assert undisturbed.returncode == 0, undisturbed.stderr
    moments = random.Random(0)
    kills = during_save = 0
    folder = tmp_path / "killed"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    for attempt in range(9):
        process = subprocess.Popen(
            [*COMMAND, f"--workdir={folder}", *SHORT],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        kind = attempt % 3
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if kind == 0 and (folder / "heartbeat.json").exists():  # any time from the start on
                time.sleep(moments.uniform(0, 3))
                break
            if kind == 1 and any(folder.glob("checkpoints/*.orbax-checkpoint-tmp*")):  # a save is under way
                during_save += 1
                break
            if kind == 2 and any(folder.glob("checkpoints/*/metadata")):  # a save has just ended, steps go on
                time.sleep(moments.uniform(0, 0.5))
                break
            time.sleep(0.0005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
        if (folder / "result.json").exists():
            break
    assert kills >= 3
    assert during_save >= 1
    last = command_line(f"--workdir={folder}", *SHORT)
    assert last.returncode == 0, last.stderr
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0]["params_sha256"] == results[1]["params_sha256"]
    assert results[0]["loss"] == results[1]["loss"]
    assert losses(tmp_path / "whole") == losses(folder)
