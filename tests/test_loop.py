"""The loop's own pieces; whole runs are in test_train.py."""

import jax.numpy as jnp
import pytest

from gqa_jax.training import loop


def test_steps_are_numbered_from_the_last_one_done_and_begin_one_at_a_time():
    begun = []

    def step_fn(state, batch):
        begun.append(batch)
        return state + batch, {"loss": jnp.float32(batch)}

    found = loop.steps(step_fn, 100, iter([1, 2, 3]), first_step=7)
    assert begun == []
    step, state, metrics = next(found)
    assert (step, state, float(metrics["loss"]), begun) == (8, 101, 1.0, [1])
    assert [(step, state) for step, state, _ in found] == [(9, 103), (10, 106)]
    assert list(loop.steps(step_fn, 100, iter([]), first_step=10)) == []


def test_progress_adds_up_what_was_training(monkeypatch):
    clock = iter([10.0, 14.0, 15.0, 16.0])
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    begun = loop.Progress(seconds_train=5.0, since=loop.time.perf_counter())
    rows = begun.after(tokens=8, train_loss=2.5)
    assert rows == loop.Progress(9.0, 10.0, 2.5, 2.0)
    assert begun.seconds_train == 5.0  # nothing changes in place
    after_evaluation = rows.now()
    assert after_evaluation.after(tokens=2, train_loss=2.0).seconds_train == pytest.approx(10.0)
