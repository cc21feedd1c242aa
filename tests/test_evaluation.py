import numpy as np
import pytest

from gqa_jax import evaluation


def test_clustered_error_is_the_ordinary_one_for_clusters_of_one():
    values = np.random.default_rng(0).normal(size=50)
    mean, sem, clusters = evaluation.clustered_mean(values, np.arange(50))
    assert mean == pytest.approx(values.mean())
    assert sem == pytest.approx(values.std(ddof=1) / np.sqrt(50))
    assert clusters == 50


def test_clustered_error_covers_the_truth_where_values_of_a_cluster_depend_on_each_other():
    """Monte Carlo: the spread of the mean over draws equals the stated error; the naive error is far too small."""
    rng = np.random.default_rng(1)
    means, stated, naive = [], [], []
    for _ in range(400):
        values = (rng.normal(size=(30, 1)) + 0.5 * rng.normal(size=(30, 20))).ravel()
        mean, sem, _ = evaluation.clustered_mean(values, np.repeat(np.arange(30), 20))
        means.append(mean)
        stated.append(sem)
        naive.append(values.std() / np.sqrt(values.size))
    assert np.mean(stated) == pytest.approx(np.std(means), rel=0.1)
    assert np.mean(naive) < 0.4 * np.std(means)


def test_one_document_has_no_error_estimate():
    assert evaluation.clustered_mean(np.ones(4), np.zeros(4, int)) == (1.0, None, 1)


def test_uniform_model_gives_log2_v_bits_per_byte_for_bytes_and_masked_rows_do_not_count():
    batches = [
        {"tokens": np.zeros((2, 4), int), "targets": np.zeros((2, 4), int), "mask": np.array([[True] * 4, [last] * 4])}
        for last in (True, False)
    ]

    def losses(batch):
        return np.full(batch["tokens"].shape, np.log(256.0))

    result = evaluation.evaluate(losses, batches, np.array([0] * 5 + [1] * 7), n_bytes=12)
    assert result.tokens == 12
    assert result.loss == pytest.approx(np.log(256))
    assert result.bits_per_byte == pytest.approx(8.0)
    assert result.loss_sem == pytest.approx(0.0, abs=1e-12)
