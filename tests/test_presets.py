import numpy as np
import pytest

from gqa_jax.laws import LLAMA3, Heads, fit_loss_nd
from gqa_jax.search import presets
from gqa_jax.shapes import Aspect

# Held to ../README of the preset's data: laws fitted elsewhere to the same points, with an E per H.
FREE = {  # heads: b, E, R^2
    Heads(8, 8): (0.228, 2.13, 0.99985),
    Heads(8, 4): (0.229, 2.16, 0.99984),
    Heads(8, 2): (0.235, 2.18, 0.99978),
    Heads(8, 1): (0.215, 2.12, 0.99981),
    Heads(4, 1): (0.207, 2.09, 0.99853),
    Heads(2, 1): (0.185, 2.04, 0.99953),
    Heads(1, 1): (0.180, 2.02, 0.99999),
    LLAMA3: (0.156, 1.76, 0.99912),
}


def test_the_papers_points_are_complete():
    table = presets.paper_losses()
    assert len(table) == 45
    assert table["n_heads"].isna().sum() == 6
    d, layers = table["d_model"], table["n_layers"]
    n_heads = table["n_heads"].fillna(d // 64)
    assert (table["params_non_embedding"] == layers * (8 * d**2 + 128 * d * (n_heads + table["n_kv_heads"]))).all()
    assert (d / layers == 64).all()


def test_laws_of_the_papers_points():
    """Shared E 2.07, 95% about 1.98 to 2.14, rms 0.0035; N*(2.615; 8,1) = 2.08B."""
    laws = presets.load("paper")
    assert laws.status == "CONVERGED"
    assert len(laws) == 8
    assert laws.blocks[0].entropy == pytest.approx(2.07, abs=0.005)
    low, high = laws.blocks[0].entropy_interval()
    assert low == pytest.approx(1.98, abs=0.015)
    assert high == pytest.approx(2.14, abs=0.015)
    assert np.sqrt(np.mean(laws.residuals["residual"] ** 2)) == pytest.approx(0.0035, abs=0.0002)
    assert laws[Heads(8, 1)].solve(2.615) == pytest.approx(2.08e9, rel=0.005)
    assert set(np.round(laws.aspect.ratio, 9)) == {64}
    assert laws.sigma == pytest.approx(presets.READING_ERROR, abs=0.0001)


def test_an_entropy_per_h_as_others_have_fitted_it():
    from gqa_jax.laws import fit_by_heads

    laws = fit_by_heads(presets.paper_losses(), shared_entropy=False)
    for heads, (b, entropy, r_squared) in FREE.items():
        assert laws[heads].b == pytest.approx(b, abs=0.0012), heads
        assert laws[heads].entropy == pytest.approx(entropy, abs=0.012), heads
        assert laws[heads].r_squared == pytest.approx(r_squared, abs=2e-5), heads


@pytest.mark.parametrize(("entropy", "size"), [(2.07, 2.08e9), (1.95, 1.98e9), (1.53, 1.81e9)])
def test_what_a_given_e_does_to_the_size(entropy, size):
    from gqa_jax.laws import fit_by_heads

    laws = fit_by_heads(presets.paper_losses(), entropy=entropy)
    assert laws[Heads(8, 1)].solve(2.615) == pytest.approx(size, rel=0.012)
    assert laws.blocks[0].entropy_interval() == (entropy, entropy)


def test_the_calibrated_preset_says_what_it_is():
    laws = presets.load("paper-table4")
    assert len(laws) == 21
    assert laws.aspect == Aspect.constant(64)
    assert "no evidence" in laws.source
    assert laws[Heads(8, 1)].predict(1e9) == pytest.approx(1.95 + 0.75529, abs=1e-6)
    drawn = laws.draws(200)
    assert np.std(drawn.entropy_SxH[:, 0]) > 0.01  # reading errors, not certainty


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="preset 'papers' is unknown: did you mean 'paper'"):
        presets.load("papers")


#: Coefficients of arXiv 2403.08540 for L = E + (a M^eta + b M^-eta) C^-eta, as it prints them.
PUBLISHED = {
    "c4": (1.51, 141, 190, 0.121),
    "redpajama": (1.84, 212, 367, 0.136),
    "refinedweb": (1.73, 157, 246, 0.127),
}


@pytest.mark.parametrize("data", PUBLISHED)
def test_other_peoples_law_of_other_peoples_runs(data):
    """Five runs, one exponent for both terms: with C = 6 N D and M = D / N, A = a / 6^eta, B = b / 6^eta, alpha = 2 eta."""
    runs = presets.overtraining()
    runs = runs[runs["data"] == data]
    smallest, multiplier = runs["params_total"] == runs["params_total"].min(), runs["chinchilla_multiplier"]
    five = runs[((multiplier == 1) & (runs["params_total"] < 5e8)) | (smallest & (multiplier == 16))]
    assert len(five) == 5
    law = fit_loss_nd(five["params_total"], five["tokens"], five["loss"], log=False, alpha_equals_beta=True)
    eta = law.alpha / 2
    assert law.beta == law.alpha
    found = (round(law.E, 2), round(law.A * 6**eta), round(law.B * 6**eta), round(eta, 3))
    assert found == PUBLISHED[data]


def test_other_peoples_runs_are_whole():
    runs = presets.overtraining()
    assert len(runs) == 104
    assert runs.notna().all(axis=None)
    assert (runs["params_non_embedding"] < runs["params_total"]).all()
