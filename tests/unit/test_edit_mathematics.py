"""Spectral edits, objectives and masks against literal references, and what makes each of them the identity."""

from __future__ import annotations

import pytest
import torch

from tests.reference import edits as literal
from unmemorize.errors import ConfigError, ShapeMismatch
from unmemorize.remove.objectives import forget_scale, forget_terms
from unmemorize.remove.output_vectors import smallest_change
from unmemorize.remove.settings import (
    CurvatureSettings,
    OutputVectorSettings,
    SubnetSettings,
    SvdSettings,
    UnlearningSettings,
    settings_for,
)
from unmemorize.remove.spectra import (
    Factors,
    kept_pairs,
    main_directions,
    without_low_curvature,
    without_small_singular,
)
from unmemorize.remove.subnet import mask_of, straight_through


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(outputs: int, inputs: int, seed: int, num: int = 40) -> Factors:
    x, g = draw(num, inputs, seed=seed), draw(num, outputs, seed=seed + 1)
    return Factors(x.T @ x / num, g.T @ g / num)


@pytest.mark.parametrize("keep_frac", [0.0, 0.3, 0.6, 0.95])
def test_kept_pairs_are_the_fewest_that_reach_the_share(keep_frac: float) -> None:
    mass = draw(5, 7).square()
    plain = {(i, j): float(mass[i, j]) for i in range(5) for j in range(7)}
    found = {(i, j) for i in range(5) for j in range(7) if kept_pairs(mass, keep_frac)[i, j]}
    assert found == (literal.kept(plain, keep_frac) if keep_frac else set())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_curvature_edit_equals_the_sum_of_kept_components(dtype: torch.dtype) -> None:
    weight, own, second = draw(6, 9).to(dtype), moments(6, 9, 3), moments(6, 9, 7)
    for protect in (None, second):
        pair = None if protect is None else (protect.inputs_II, protect.gradients_OO)
        expected = literal.curvature_edit(weight, own.inputs_II, own.gradients_OO, 0.6, pair, 0.5)
        edited = without_low_curvature(weight, own, 0.6, protect=protect, protect_frac=0.5)
        assert edited.dtype == dtype
        torch.testing.assert_close(
            edited, expected.to(dtype), atol=1e-12 if dtype.itemsize == 8 else 1e-2, rtol=0
        )
        assert not torch.equal(edited, weight)


def test_protection_keeps_more_and_everything_at_full_strength() -> None:
    weight, own, second = draw(6, 9), moments(6, 9, 3), moments(6, 9, 7)
    plain = without_low_curvature(weight, own, 0.4)
    protected = without_low_curvature(weight, own, 0.4, protect=second, protect_frac=0.8)
    assert (protected - weight).norm() < 0.8 * (plain - weight).norm()
    whole = without_low_curvature(weight, own, 0.4, protect=second, protect_frac=1.0)
    assert torch.equal(whole, weight)


def test_projection_keeps_the_outputs_of_protected_inputs() -> None:
    weight, own = draw(6, 9), moments(6, 9, 3)
    x = draw(4, 9, seed=11)  # four inputs span four of nine directions
    protect = Factors(x.T @ x / 4, torch.eye(6, dtype=torch.float64))
    edited = without_low_curvature(
        weight, own, 0.3, protect=protect, protect_frac=1.0, protect_by="projection"
    )
    assert main_directions(protect.inputs_II, 1.0).shape == (9, 4)
    torch.testing.assert_close(x @ edited.T, x @ weight.T, atol=1e-12, rtol=0)
    other = draw(1, 9, seed=12)
    assert (other @ (edited - weight).T).norm() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_dropped_is_the_identity_bit_for_bit(dtype: torch.dtype) -> None:
    weight = draw(6, 9).to(dtype)
    assert torch.equal(without_low_curvature(weight, moments(6, 9, 3), 1.0), weight)
    assert torch.equal(without_small_singular(weight, 0.0), weight)
    assert torch.equal(without_small_singular(weight, 0.08), weight)  # 0.48 of a singular value


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_singular_edit_keeps_the_largest_components(shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    edited = without_small_singular(weight, 0.5)
    torch.testing.assert_close(edited, literal.singular_edit(weight, 3), atol=1e-10, rtol=0)
    assert torch.linalg.matrix_rank(edited) == 3


def test_factors_of_another_shape_are_refused() -> None:
    with pytest.raises(ShapeMismatch, match=r"do not fit a matrix of shape \(6, 9\)"):
        without_low_curvature(draw(6, 9), moments(9, 6, 0), 0.5)
    with pytest.raises(ConfigError, match="protect_by is 'luck', expected union or projection"):
        without_low_curvature(draw(6, 9), moments(6, 9, 0), 0.5, protect_by="luck")


def test_objectives_equal_their_definitions() -> None:
    nll, before = torch.tensor([3.0, 8.0, 0.5]), torch.tensor([2.0, 8.5, 0.1])
    tokens = torch.tensor([3, 4, 2])

    def loss(objective: str, **settings: object) -> float:
        terms = forget_terms(objective, nll, tokens, **settings)
        return float(terms.sum() * forget_scale(objective, tokens))

    assert loss("gradient-ascent") == pytest.approx(literal.ascent_loss(11.5 / 9, 0, 1, 0))
    expected = literal.npo_loss((-nll).tolist(), (-before).tolist(), 0.1)
    assert loss("npo", reference_nll_N=before, beta=0.1) == pytest.approx(expected, rel=1e-5)
    expected = literal.simnpo_loss(nll.tolist(), tokens.tolist(), 4.5, 0.2)
    assert loss("simnpo", beta=4.5, delta=0.2) == pytest.approx(expected, rel=1e-5)
    assert loss("npo", reference_nll_N=nll, beta=0.1) == pytest.approx(20 * 0.6931472, rel=1e-6)


def test_every_objective_pushes_the_targets_loss_up() -> None:
    tokens = torch.tensor([3, 4])
    for objective in ("gradient-ascent", "gradient-difference", "npo", "simnpo"):
        nll = torch.tensor([3.0, 8.0], requires_grad=True)
        terms = forget_terms(objective, nll, tokens, reference_nll_N=nll.detach())
        terms.sum().backward()
        assert (nll.grad < 0).all(), objective
    with pytest.raises(ConfigError, match="npo needs the targets' losses before unlearning"):
        forget_terms("npo", torch.ones(2), tokens)
    with pytest.raises(ConfigError, match="unknown objective 'hope'"):
        forget_terms("hope", torch.ones(2), tokens)


def test_masks_drop_the_smallest_scores_and_pass_the_gradient_of_their_size() -> None:
    scores = torch.tensor([[0.3, -0.1, 0.2], [-0.5, 0.05, 0.4]], requires_grad=True)
    expected = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    assert torch.equal(mask_of(scores.detach(), 0.49), expected)
    mask = straight_through(scores, 0.49)
    assert torch.equal(mask.detach(), expected)
    upstream = draw(2, 3).float()
    (mask * upstream).sum().backward()
    assert torch.equal(scores.grad, upstream * scores.detach().sign())
    assert torch.equal(mask_of(scores.detach(), 0.0), torch.ones(2, 3))


def test_the_smallest_change_has_the_effect_and_spares_ordinary_text() -> None:
    effect, seen = draw(5), draw(30, 5, seed=4)
    moment = seen.T @ seen / 30
    free = smallest_change(effect, moment, 2.0, 0.0)
    torch.testing.assert_close(free, 2.0 * effect / effect.square().sum())
    spared = smallest_change(effect, moment, 2.0, 100.0)
    assert float(spared @ effect) == pytest.approx(2.0)
    assert (seen @ spared).norm() < (seen @ free).norm()
    # No other change with the same effect is cheaper.
    metric = torch.eye(5, dtype=torch.float64) + 100 * moment / moment.diagonal().mean()
    aside = draw(5, seed=9)
    aside = aside - effect * (aside @ effect) / effect.square().sum()
    for step in (-0.1, 0.1):
        other = spared + step * aside
        assert other @ metric @ other > spared @ metric @ spared


def test_settings_out_of_range_are_refused() -> None:
    cases = [
        (lambda: SvdSettings(drop_gate_frac=1.5), "drop_gate_frac is 1.5, expected 0 to 1"),
        (lambda: CurvatureSettings(keep_frac=-0.1), "keep_frac is -0.1, expected 0 to 1"),
        (lambda: CurvatureSettings(kinds=("side",)), "kinds is 'side', expected one of gate, up, down"),
        (lambda: SubnetSettings(batch_size=0), "batch_size is 0, expected above 0"),
        (lambda: OutputVectorSettings(position="last"), "position is 'last', expected one of first, weakest"),
        (lambda: UnlearningSettings(beta=0.0), "beta is 0.0, expected above 0"),
        (lambda: UnlearningSettings(epochs=-1), "epochs is -1, expected 0 or more"),
        (lambda: settings_for("magic", None), "unknown edit 'magic'; expected one of fold, svd"),
        (lambda: settings_for("fold", None), r"fold needs neurons; pass FoldSettings\(neurons=...\)"),
        (lambda: settings_for("npo", SvdSettings()), "npo takes UnlearningSettings, not SvdSettings"),
    ]
    for make, message in cases:
        with pytest.raises(ConfigError, match=message):
            make()
    assert settings_for("simnpo", None).beta_of("simnpo") == 4.5
