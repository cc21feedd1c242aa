"""The wide posterior against a long Markov chain on the exact likelihood, and what it does with effects and bends."""

import numpy as np
import pytest

from gqa_jax import laws
from gqa_jax.laws import bends, evidence, posterior
from tests import law_tables

SIZES = [(12, 768), (16, 1024), (20, 1280), (24, 1536), (28, 1792), (32, 2048)]
THREE = [(8, 8), (8, 1), (1, 1)]
SEVEN = list(law_tables.TRACED)


def fitted(heads, noise=0.001, seed=0, change=lambda table: table):
    table = law_tables.table(*law_tables.truth(heads), SIZES, noise, np.random.default_rng(seed))
    return laws.fit_by_heads(change(table))


def shared_by_size(share, total=0.003, seed=0):
    def change(table):
        generator = np.random.default_rng(seed)
        effects = dict(zip(SIZES, generator.normal(size=len(SIZES)), strict=True))
        common = np.array([effects[size] for size in zip(table["n_layers"], table["d_model"], strict=True)])
        own = generator.normal(size=len(table))
        return table.assign(loss=table["loss"] + total * (np.sqrt(share) * common + np.sqrt(1 - share) * own))

    return change


def ensemble(log_density, start_WxP, steps, generator):
    """Affine-invariant ensemble sampling (Goodman and Weare 2010): positions of the second half of the steps."""
    walkers, now = start_WxP.copy(), log_density(start_WxP)
    count, dims = walkers.shape
    kept = []
    for step in range(steps):
        for half in (slice(0, count // 2), slice(count // 2, count)):
            others = np.delete(np.arange(count), np.arange(count)[half])
            partner = walkers[generator.choice(others, count // 2)]
            stretch = (1 + generator.random(count // 2)) ** 2 / 2
            trial = partner + stretch[:, None] * (walkers[half] - partner)
            height = log_density(trial)
            accept = np.log(generator.random(count // 2)) < (dims - 1) * np.log(stretch) + height - now[half]
            walkers[half] = np.where(accept[:, None], trial, walkers[half])
            now[half] = np.where(accept, height, now[half])
        if step >= steps // 2 and step % 20 == 0:
            kept.append(walkers.copy())
    return np.concatenate(kept)


@pytest.mark.parametrize("kind", [bends.DRIFT, bends.BREAK])
def test_equals_a_long_chain(kind, monkeypatch):
    """Three H that are not pooled, one form of a bend, an effect of sizes: the chain linearises nothing."""
    one = fitted(THREE, change=shared_by_size(0.5), noise=0)
    block = one.blocks[0]
    form = evidence.Form(kind, 0.3, 0.01 if kind == bends.DRIFT else 0.05, 1.0)
    model = evidence.Model((form,), True, 4.0)
    monkeypatch.setattr(evidence, "model_of", lambda block, wide: model)
    monkeypatch.setattr(evidence, "SIZE_EFFECT", 1 - 1e-12)
    drawn = posterior.draw(one, 4000, 0, "posterior")
    x, y, sizes = block.x_GxM, block.loss_GxM, block.size_GxM
    assert (sizes == sizes[0]).all()
    q = bends.shape(x, kind, form.place, model.reach)[0]
    G, M = x.shape
    # The prior makes up for the volume of (alpha, b) given E: of the least squares, as the posterior takes it.
    grid = np.linspace(0.0, block.lowest * (1 - 1e-4), 400)
    linear = evidence.linearise(block, model, None, grid, np.ones(400))
    volume, ridge = linear.log_volume_I, linear.theta_IxGx2

    def along(entropy):
        """The least squares' (alpha, b)_WxGx2 at E: the chain walks in what differs from them, which E hardly moves."""
        columns = [np.interp(entropy, grid, column) for column in ridge.reshape(400, -1).T]
        return np.stack(columns, -1).reshape(-1, G, 2)

    low, high = evidence.SHARE

    def log_density(values):
        """Of (E, ln sigma, logit of the share, amount, and alpha and b of every H less those of the least squares at E)."""
        entropy, log_sigma, logit, amount = values[:, :4].T
        theta = along(entropy) + values[:, 4:].reshape(-1, G, 2)
        inside = (entropy > 0) & (entropy < block.lowest * (1 - 1e-4)) & (np.abs(log_sigma - np.log(block.sigma)) < 4)
        share = 1 / (1 + np.exp(-logit))
        inside &= (share > low) & (share < high)
        fall = np.where(kind == bends.DRIFT, -2 * np.abs(amount) * model.reach, np.minimum(amount, 0.0))
        inside &= theta[..., 1].min(1) + fall > 0.01
        fitted = entropy[:, None, None] + np.exp(
            np.clip(theta[..., :1] - theta[..., 1:] * x - amount[:, None, None] * q, -50, 50)
        )
        rest, sigma2, kappa = y - fitted, np.exp(2 * log_sigma), share / (1 - share)
        squares = np.sum(rest**2, (1, 2)) - np.sum(rest.sum(1) ** 2, 1) * kappa / (1 + G * kappa)
        found = -0.5 * squares / sigma2 - G * M * log_sigma - 0.5 * M * np.log1p(G * kappa)
        found += -0.5 * (amount / form.sd) ** 2 + np.log(share * (1 - share)) + np.interp(entropy, grid, volume)
        return np.where(inside, found, -np.inf)

    generator = np.random.default_rng(0)
    start = np.array([block.entropy, np.log(block.sigma), 0.0, 0.0] + [0.0] * (2 * G))
    walkers = start + generator.normal(size=(120, len(start))) * ([1e-2, 0.1, 0.3, 1e-3] + [1e-3, 1e-3] * G)
    chain = ensemble(log_density, walkers, 12_000, generator)
    at = np.log(2e9)
    alpha, b = (along(chain[:, 0])[:, 0] + chain[:, 4:6]).T
    amount = chain[:, 3]
    log_above = alpha - b * (at - np.log(block.center)) - amount * bends.shape(at - np.log(block.center), kind, 0.3, 4.0)[0]
    pairs = {
        "E": (chain[:, 0], drawn.entropy_SxH[:, 0]),
        "amount": (amount, drawn.bends.amount_S),
        "sigma": (chain[:, 1], np.log(drawn.sigma_SxH[:, 0])),
        "kappa": (chain[:, 2], np.log(drawn.kappa_S)),
        "loss": (chain[:, 0] + np.exp(log_above), drawn.loss(block.heads[0], 2e9)[:, 0]),
    }
    for name, (slow, fast) in pairs.items():
        low_, middle, high_ = np.quantile(slow, [0.1, 0.5, 0.9])
        found = np.quantile(fast, [0.1, 0.5, 0.9])
        np.testing.assert_allclose(found, [low_, middle, high_], atol=0.13 * (high_ - low_), err_msg=name)


def test_what_sizes_share_widens_and_is_believed():
    found = fitted(SEVEN, noise=0, change=shared_by_size(0.9)).blocks[0].explored(True, 0)
    clean = fitted(SEVEN).blocks[0].explored(True, 0)
    share, of_clean = (one.weight_S[one.points.kappa_S > 0].sum() for one in (found, clean))
    assert share > 0.9
    assert of_clean < 0.6
    assert max(np.sum(found.weight_S**2), np.sum(clean.weight_S**2)) < 1 / 500  # worth as many equal draws (Kish)


def test_a_plain_break_is_believed_and_its_size_found():
    def breaks(table):
        x = np.log(table["params_non_embedding"] / 3e8)
        above = table["loss"] - law_tables.ENTROPY
        return table.assign(loss=law_tables.ENTROPY + above * np.exp(-0.12 * np.logaddexp(0, 2 * x) / 2))

    one = fitted(SEVEN, noise=0.0003, change=breaks)
    found = one.blocks[0].explored(True, 0)
    kinds = np.array([form.kind for form in found.model.forms])[found.linear.form_I[found.points.node_S]]
    assert found.weight_S[kinds == bends.NONE].sum() < 0.05
    true = 3e9
    x = np.log(true / 3e8)
    loss = law_tables.ENTROPY + law_tables.loss(0.0, law_tables.TRACED[8, 1], true) * np.exp(-0.12 * np.logaddexp(0, 2 * x) / 2)
    wide, narrow = (
        one.draws(1000, 0, method).log_size(loss)[:, list(one).index((8, 1))] for method in ("posterior", "independent")
    )
    low, high = np.quantile(wide, [0.025, 0.975])
    assert low < np.log(true) < high
    assert not np.quantile(narrow, 0.025) < np.log(true) < np.quantile(narrow, 0.975)


def test_one_head_configuration_has_no_effect_of_sizes():
    model = evidence.model_of(fitted([(8, 1)]).blocks[0], wide=True)
    assert not model.shared
    assert len(model.forms) > 2


def test_draws_fall_with_size_and_are_as_many_as_asked():
    drawn = fitted(THREE, noise=0.01).draws(500)
    assert drawn.b_SxH.shape[0] == 500
    assert drawn.bends.falls(drawn.b_SxH[:, :3]).all()
    loss = drawn.loss((8, 1), np.geomspace(1e6, 1e13, 30))
    assert (np.diff(loss, axis=1) < 0).all()
