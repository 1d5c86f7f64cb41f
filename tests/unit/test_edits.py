"""The closed-form edit: equal to its definition, exact in its limits, low rank, and without a visible fingerprint."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.reference.value_edit import edited_rows
from unmemorize.errors import ConfigError, FileFormatError, ShapeMismatch
from unmemorize.remove.edits import Correction, Memorized, correction, drift_frac, kept_frac
from unmemorize.remove.moments import SecondMoments, load_second_moments

WIDTH, ROWS = 12, 5


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(
    inputs: Tensor,
    ordinary: Tensor,
    *,
    wanted: Tensor | None = None,
    strength: float = 1.0,
    ridge_frac: float = 1e-3,
) -> Correction:
    return correction(
        Memorized.of(inputs, wanted),
        ordinary.T @ ordinary / len(ordinary),
        strength=strength,
        ridge_frac=ridge_frac,
    )


@pytest.mark.parametrize("strength", [0.01, 1.0, 50.0])
@pytest.mark.parametrize("num_inputs", [1, 4, 30])
@pytest.mark.parametrize("has_wanted", [False, True])
def test_the_edit_solves_its_least_squares_problem(
    strength: float, num_inputs: int, has_wanted: bool
) -> None:
    weight, inputs, ordinary = (
        random(ROWS, WIDTH, seed=0),
        random(num_inputs, WIDTH, seed=1),
        random(40, WIDTH, seed=2),
    )
    wanted = random(num_inputs, WIDTH, seed=3) if has_wanted else torch.zeros_like(inputs)
    found = solve(inputs, ordinary, wanted=wanted, strength=strength).applied(weight)
    expected = edited_rows(weight, inputs, wanted, list(ordinary), strength, 1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert not torch.allclose(found, weight)
    parts = [Memorized.of(x[None], m[None]) for x, m in zip(inputs, wanted, strict=True)]
    moments = ordinary.T @ ordinary / 40
    streamed = correction(sum(parts[1:], start=parts[0]), moments, strength=strength, ridge_frac=1e-3)
    torch.testing.assert_close(streamed.applied(weight), expected, rtol=1e-8, atol=1e-8)
    distance = (weight @ inputs.T - weight @ wanted.T).norm()
    left = kept_frac(weight, found, Memorized.of(inputs, wanted)) * distance
    torch.testing.assert_close(left, (found @ inputs.T - weight @ wanted.T).norm(), rtol=1e-6, atol=1e-9)


def test_one_memorized_input_shrinks_by_the_stated_factor() -> None:
    weight, x, ordinary = random(ROWS, WIDTH, seed=0), random(1, WIDTH, seed=1), random(40, WIDTH, seed=2)
    moment = ordinary.T @ ordinary / 40
    regular = moment + 1e-3 * moment.diagonal().mean() * torch.eye(WIDTH)
    for strength in (0.1, 3.0):
        solved = solve(x, ordinary, strength=strength)
        stated = 1 / (1 + strength * float(x[0] @ torch.linalg.solve(regular, x[0])))
        assert solved.shrink_frac.tolist() == pytest.approx([stated])
        torch.testing.assert_close(solved.applied(weight) @ x[0], stated * (weight @ x[0]))
        assert kept_frac(weight, solved.applied(weight), Memorized.of(x)) == pytest.approx(stated)


def test_infinite_strength_is_a_constraint() -> None:
    weight, inputs, ordinary = (
        random(ROWS, WIDTH, seed=0),
        random(4, WIDTH, seed=1),
        random(40, WIDTH, seed=2),
    )
    wanted = random(4, WIDTH, seed=3)
    after = solve(inputs, ordinary, wanted=wanted, strength=math.inf).applied(weight)
    torch.testing.assert_close(after @ inputs.T, weight @ wanted.T)
    assert kept_frac(weight, after, Memorized.of(inputs, wanted)) < 1e-9
    silent = solve(inputs, ordinary, strength=math.inf)
    assert (silent.applied(weight) @ inputs.T).abs().max() < 1e-10
    assert silent.shrink_frac.abs().max() < 1e-10


def test_ordinary_directions_that_memorized_inputs_do_not_use_are_kept_exactly() -> None:
    ordinary = random(40, WIDTH, seed=2)
    ordinary[:, 8:] = 0.0
    inputs = random(3, WIDTH, seed=1)
    inputs[:, :8] = 0.0
    weight = random(ROWS, WIDTH, seed=0)
    after = solve(inputs, ordinary, strength=10.0, ridge_frac=1e-6).applied(weight)
    torch.testing.assert_close(after @ ordinary.T, weight @ ordinary.T, rtol=0, atol=1e-12)
    assert drift_frac(weight, after, ordinary.T @ ordinary / 40) < 1e-12
    assert kept_frac(weight, after, Memorized.of(inputs)) < 1e-4


def test_more_strength_keeps_less_memory_and_moves_ordinary_values_more() -> None:
    weight, inputs, ordinary = (
        random(ROWS, WIDTH, seed=0),
        random(2, WIDTH, seed=1),
        random(40, WIDTH, seed=2),
    )
    moment = ordinary.T @ ordinary / 40
    results = [
        solve(inputs, ordinary, strength=s).applied(weight) for s in (0.0, 0.01, 0.1, 1.0, 10.0, math.inf)
    ]
    kept = [kept_frac(weight, after, Memorized.of(inputs)) for after in results]
    drift = [drift_frac(weight, after, moment) for after in results]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1.0 and kept[-1] < 1e-9
    assert drift == sorted(drift) and drift[0] == 0.0


def test_the_change_has_low_rank_and_leaves_no_zero_row() -> None:
    weight, inputs, ordinary = (
        random(ROWS, WIDTH, seed=0),
        random(2, WIDTH, seed=1),
        random(40, WIDTH, seed=2),
    )
    doubled = torch.cat([inputs, inputs])
    for tokens in (inputs, doubled):
        solved = solve(tokens, ordinary, strength=5.0)
        after = solved.applied(weight)
        assert solved.rank == 2
        assert int(torch.linalg.matrix_rank(after - weight)) == 2
        assert bool((after != 0).any(1).all())


def test_no_strength_changes_no_bit_and_rounding_happens_once() -> None:
    weight, inputs, ordinary = (
        random(ROWS, WIDTH, seed=0),
        random(3, WIDTH, seed=1),
        random(40, WIDTH, seed=2),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        stored = weight.to(dtype)
        assert torch.equal(solve(inputs, ordinary, strength=0.0).applied(stored), stored)
        solved = solve(inputs, ordinary)
        after = solved.applied(stored)
        assert after.dtype == dtype
        assert torch.equal(after, solved.applied(stored.double()).to(dtype))


def test_bad_settings_are_refused() -> None:
    inputs, ordinary = random(2, WIDTH, seed=1), random(40, WIDTH, seed=2)
    for strength, ridge in ((-1.0, 1e-3), (math.nan, 1e-3), (1.0, 0.0), (1.0, math.inf)):
        with pytest.raises(ConfigError, match="expected strength >= 0 and ridge > 0"):
            solve(inputs, ordinary, strength=strength, ridge_frac=ridge)
    with pytest.raises(ConfigError, match="second moments are zero"):
        solve(inputs, torch.zeros_like(ordinary))
    with pytest.raises(ShapeMismatch, match="do not fit together"):
        solve(inputs, ordinary[:, :4])


def moments(states: Tensor, attended: Tensor, *, batch: int = 2) -> SecondMoments:
    total = SecondMoments.empty("text/x")
    for start in range(0, len(states), batch):
        names = [f"caption {i}" for i in range(start, min(start + batch, len(states)))]
        total = total.updated(states[start : start + batch], attended[start : start + batch], names)
    return total


def test_moments_are_those_of_all_attended_tokens_however_they_are_streamed() -> None:
    states = random(5, 4, WIDTH, seed=4)
    attended = torch.ones((5, 4), dtype=torch.bool)
    attended[:3, 2] = False
    attended[:, 3] = False
    total = moments(states, attended)
    tokens = torch.stack([states[i, t] for i in range(5) for t in range(4) if attended[i, t]])
    torch.testing.assert_close(total.mean_product, tokens.T @ tokens / len(tokens))
    assert (total.num_captions, total.num_tokens) == (5, len(tokens))
    torch.testing.assert_close(total.position_means[0], states[:, 0].mean(0))
    torch.testing.assert_close(total.position_means[2], states[3:, 2].mean(0))
    torch.testing.assert_close(total.position_means[3], tokens.mean(0))
    for batch in (1, 5):
        again = moments(states, attended, batch=batch)
        torch.testing.assert_close(again.products, total.products)
        assert again.digest == total.digest


def test_moments_survive_a_file_and_shards_add_up(tmp_path: Path) -> None:
    states, attended = random(4, 3, WIDTH, seed=5), torch.ones((4, 3), dtype=torch.bool)
    total = moments(states, attended)
    again = load_second_moments(total.save(tmp_path / "moments.safetensors"))
    assert torch.equal(again.products, total.products) and torch.equal(again.sums, total.sums)
    assert (again.text_id, again.num_captions, again.digest) == ("text/x", 4, total.digest)
    united = moments(states[:2], attended[:2]).merged(moments(states[2:], attended[2:]))
    torch.testing.assert_close(united.products, total.products)
    with pytest.raises(ConfigError, match="different text encoders"):
        total.merged(SecondMoments.empty("text/y"))
    with pytest.raises(ShapeMismatch, match="cannot be added"):
        total.updated(states[:, :2], attended[:, :2], ["a", "b", "c", "d"])


def test_files_that_are_no_moments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="cannot read second moments from"):
        load_second_moments(tmp_path / "none")
    whole = moments(random(2, 3, WIDTH, seed=5), torch.ones((2, 3), dtype=torch.bool)).save(tmp_path / "m")
    (tmp_path / "torn").write_bytes(whole.read_bytes()[:100])
    with pytest.raises(FileFormatError, match="cannot read second moments"):
        load_second_moments(tmp_path / "torn")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(FileFormatError, match="not a unmemorize.moments file"):
        load_second_moments(tmp_path / "other")
