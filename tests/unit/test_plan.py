"""Plans: who owns which sinks. Pinned by a golden file, a literal reference, published digests, and statistics."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.reference import keyed_plan
from unmemorize.errors import ConfigError, FileFormatError, IdError, PoolExhausted
from unmemorize.isolate.drawing import draw, published_mask
from unmemorize.isolate.plan import SinkPlan, SinkSettings, load_plan, make_plan
from unmemorize.neurons import Site

MODEL = "language/llama-1a2b3c4d-*"
ID_MAX = 2**63 - 1


def plan_of(
    widths: tuple[int, ...] = (40, 40), originals: tuple[int, ...] | None = None, **settings: Any
) -> SinkPlan:
    sites = [Site(f"layers.{number}.down", "in", width) for number, width in enumerate(widths)]
    if "sinks_per_id" in settings:
        settings.setdefault("active_frac", None)
    return make_plan(sites, list(originals or widths), MODEL, SinkSettings(**settings))


def ids_of(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


# keyed: pinned


def test_golden_file_is_what_the_reference_draws() -> None:
    assert json.loads(keyed_plan.GOLDEN.read_text()) == keyed_plan.cases()


def test_plans_equal_the_golden_file() -> None:
    cases = json.loads(keyed_plan.GOLDEN.read_text())
    assert len(cases) == 200
    for case in cases:
        is_per_layer = case["site"] is not None
        plan = plan_of(
            (case["pool"],) * (1 + (case["site"] or 0)),
            share_frac=0.0,
            sinks_per_id=case["k"],
            seed=case["seed"],
            per_layer=is_per_layer,
        )
        assert plan.sinks(ids_of(case["id"]), case["site"] or 0).tolist() == [case["sinks"]], case


@given(
    st.integers(1, ID_MAX),
    st.integers(-(2**63), 2**64),
    st.integers(1, 60).flatmap(lambda pool: st.tuples(st.just(pool), st.integers(1, pool))),
)
def test_plans_equal_the_reference(id: int, seed: int, sizes: tuple[int, int]) -> None:
    pool, k = sizes
    plan = plan_of((pool,), share_frac=0.0, sinks_per_id=k, seed=seed)
    sinks = plan.sinks(ids_of(id)).tolist()[0]
    assert sinks == keyed_plan.draw(seed, id, None, pool, k)
    assert len(set(sinks)) == k and min(sinks) >= 0 and max(sinks) < pool
    assert plan.mask(ids_of(id)).nonzero()[:, 1].tolist() == sorted(sinks)


# keyed: sound


def chi_square_z(observed: torch.Tensor, expected: torch.Tensor, freedom: int) -> float:
    """Distance of a chi-square statistic from its mean, in standard deviations."""
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("start", [1, 2**40, ID_MAX - 19_999])
def test_every_sink_is_equally_likely(start: int) -> None:
    num_ids, pool, k = 20_000, 200, 20
    plan = plan_of((pool,), share_frac=0.0, sinks_per_id=k, seed=7)
    counts = plan.mask(start + torch.arange(num_ids)).sum(0).double()
    expected = torch.full((pool,), num_ids * k / pool, dtype=torch.float64)
    # k draws without replacement are negatively correlated, which shrinks the statistic by (pool - k) / (pool - 1).
    shrink = math.sqrt((pool - k) / (pool - 1))
    assert abs(chi_square_z((counts - expected) / shrink + expected, expected, pool - 1)) < 4
    assert counts.sum() == num_ids * k


@pytest.mark.parametrize(
    "partner", ["next id", "twice the id", "three times the id", "another seed", "another layer"]
)
def test_overlap_of_two_ids_is_hypergeometric(partner: str) -> None:
    num_pairs, pool, k = 20_000, 60, 12
    plan = plan_of((pool, pool), share_frac=0.0, sinks_per_id=k, seed=3, per_layer=True)
    other, site = plan, 0
    first = 1 + 2 * torch.arange(num_pairs)
    second = first
    if partner == "next id":
        second = first + 1
    elif partner == "twice the id":
        second = first * 2
    elif partner == "three times the id":
        second = first * 3
    elif partner == "another seed":
        other = plan_of((pool, pool), share_frac=0.0, sinks_per_id=k, seed=4, per_layer=True)
    else:
        site = 1
    shared = (plan.mask(first) & other.mask(second, site)).sum(1)
    observed = torch.bincount(shared, minlength=k + 1).double()
    total = math.comb(pool, k)
    weights = [math.comb(k, n) * math.comb(pool - k, k - n) / total for n in range(k + 1)]
    expected = torch.tensor(weights, dtype=torch.float64) * num_pairs
    tail = int((expected >= 5).nonzero().max())  # lump rare large overlaps together
    observed = torch.cat([observed[:tail], observed[tail:].sum().view(1)])
    expected = torch.cat([expected[:tail], expected[tail:].sum().view(1)])
    assert abs(chi_square_z(observed, expected, tail)) < 4


def test_all_subsets_of_a_small_pool_are_equally_likely() -> None:
    num_ids, pool, k = 40_000, 6, 3
    masks = plan_of((pool,), share_frac=0.0, sinks_per_id=k, seed=1).mask(1 + torch.arange(num_ids))
    numbers = (masks * 2 ** torch.arange(pool)).sum(1)
    counts = torch.bincount(numbers, minlength=2**pool).double()
    subsets = counts[counts > 0]
    assert len(subsets) == math.comb(pool, k)
    assert abs(chi_square_z(subsets, torch.full_like(subsets, num_ids / len(subsets)), len(subsets) - 1)) < 4


def test_draws_do_not_depend_on_the_batch_or_the_default_dtype() -> None:
    plan = plan_of((400,), sinks_per_id=9, seed=2)
    ids = torch.randint(1, ID_MAX, (50,), generator=torch.Generator().manual_seed(0))
    together = plan.sinks(ids)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(plan.sinks(ids[order]), together[order])
    assert torch.equal(torch.cat([plan.sinks(i.view(1)) for i in ids]), together)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(plan.sinks(ids), together)
    finally:
        torch.set_default_dtype(torch.float32)
    assert plan.sinks(ids[:0]).shape == (0, 9)
    assert torch.equal(plan.sinks(ids.repeat(2)), together.repeat(2, 1))


def test_sinks_agree_across_layers_unless_per_layer() -> None:
    ids = torch.arange(1, 100)
    alike = plan_of(sinks_per_id=5)
    assert alike.is_uniform and torch.equal(alike.sinks(ids, 0), alike.sinks(ids, 1))
    varied = plan_of(sinks_per_id=5, per_layer=True)
    assert not varied.is_uniform and not torch.equal(varied.sinks(ids, 0), varied.sinks(ids, 1))


def test_unequal_pools_are_not_uniform() -> None:
    plan = plan_of((40, 60), share_frac=0.5, active_frac=0.5)
    assert not plan.is_uniform
    assert [place.num_sinks for place in plan.sites] == [10, 15]


@pytest.mark.parametrize("function", ["sinks", "mask"])
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([1, 0]), "id 0 is out of range, expected 1 to 2\\*\\*63 - 1; 0 means no id"),
        (torch.tensor([-5]), "id -5 is out of range"),
        (torch.tensor([1], dtype=torch.int32), r"ids are torch.int32 of shape \(1,\), expected int64"),
        (torch.tensor([1.0]), "ids are torch.float32"),
        (torch.tensor([[1]]), r"of shape \(1, 1\), expected int64 of shape \(N,\)"),
    ],
)
def test_impossible_ids_are_refused(function: str, ids: torch.Tensor, message: str) -> None:
    for scheme in ("keyed", "published"):
        plan = plan_of(scheme=scheme)
        if (function, scheme) != ("sinks", "published"):
            with pytest.raises(IdError, match=message):
                getattr(plan, function)(ids)


# disjoint


def test_disjoint_sources_own_consecutive_slices_in_their_order() -> None:
    plan = plan_of((40, 40), share_frac=0.5, sinks_per_id=6, scheme="disjoint").with_sources((99, 5, ID_MAX))
    assert plan.sinks(ids_of(5, 99, ID_MAX, 5)).tolist() == [
        list(range(6, 12)),
        list(range(6)),
        list(range(12, 18)),
        list(range(6, 12)),
    ]
    assert (plan.mask(ids_of(99, 5, ID_MAX)).sum(0) <= 1).all()
    assert plan.with_sources((5,)) == plan


def test_a_pool_runs_out_of_slices() -> None:
    plan = plan_of((40, 24), share_frac=0.5, sinks_per_id=6, scheme="disjoint").with_sources((1, 2))
    with pytest.raises(
        PoolExhausted,
        match="3 sources of 6 sinks need 18 sinks, the pool at layers.1.down has 12; grow the pool or use fewer",
    ):
        plan.with_sources((3,))


def test_unknown_sources_are_errors() -> None:
    plan = plan_of(sinks_per_id=2, scheme="disjoint")
    with pytest.raises(IdError, match=r"ids \[7\] are not registered in this disjoint plan; register them"):
        plan.sinks(ids_of(7))
    plan = plan.with_sources((3, 9))
    for unknown in (1, 5, 10, ID_MAX):
        with pytest.raises(IdError, match=rf"ids \[{unknown}\] are not registered"):
            plan.neurons_for([3, unknown])


def test_sources_must_be_distinct_ids_of_a_disjoint_plan() -> None:
    plan = plan_of(sinks_per_id=2, scheme="disjoint")
    with pytest.raises(IdError, match="registered twice"):
        plan.with_sources((3, 3))
    for wrong in (0, -1, 2**63):
        with pytest.raises(IdError, match=rf"source id {wrong} is out of range"):
            plan.with_sources((wrong,))
    with pytest.raises(ConfigError, match="a keyed plan registers no sources"):
        plan_of().with_sources((3,))


# published


def digest(mask: torch.Tensor) -> str:
    return hashlib.sha256(mask.to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()


def test_published_digest_of_the_paper_setting() -> None:
    mask = published_mask(torch.arange(1, 201), 2458, 0.3)
    assert digest(mask) == "dda2a73666839742070d29f4835110aa4cd5639345dbbb4a7fbd7bbc25c765e8"


@pytest.mark.parametrize(
    ("id_bits", "expected"),
    [
        (32, "1829a9d3c1ecd8f3efd8b3075f443f2e6d11ae0931b6d155814a69fa77c87d35"),
        (64, "abf435210c49c7cb051dc522b69a3ecd58fb42136a3e6b9d42f11a65c8e7b1b2"),
    ],
)
def test_published_digests_of_both_id_widths(id_bits: Any, expected: str) -> None:
    assert digest(published_mask(torch.arange(49_152, 50_152), 7692, 0.013, id_bits=id_bits)) == expected


def test_published_counts_and_first_sinks() -> None:
    mask = published_mask(ids_of(1, 2, 3), 1229, 0.3)
    assert mask.sum(1).tolist() == [367, 362, 373]
    assert mask[0].nonzero().squeeze(1)[:8].tolist() == [0, 9, 13, 15, 17, 18, 20, 25]


def test_published_defects_are_what_the_release_has() -> None:
    assert published_mask(ids_of(0), 300, 0.01).all()
    always = published_mask(torch.arange(1, 19_661), 1, 0.3)
    assert always.all() and not published_mask(ids_of(19_661), 1, 0.3).any()
    low = torch.arange(1, 40)
    assert torch.equal(published_mask(low, 300, 0.3), published_mask(low, 300, 0.3, id_bits=32))
    edge = ids_of(32_767, 32_768)
    same = (published_mask(edge, 300, 0.3) == published_mask(edge, 300, 0.3, id_bits=32)).all(1)
    assert same.tolist() == [True, False]
    assert published_mask(ids_of(65_536), 300, 0.3, id_bits=32).all()
    assert torch.equal(
        published_mask(low, 300, 0.3, id_bits=32), published_mask(low + 65_536 * 3, 300, 0.3, id_bits=32)
    )
    covered = published_mask(torch.arange(1, 21), 2458, 0.3).any(0)
    assert covered.double().mean() > 0.94


@pytest.mark.parametrize(
    ("id", "id_bits"),
    [(2**47, 64), (4294967291, 64), (3 * 4294967291, 64), (ID_MAX, 64), (2**15, 32), (65_536, 32)],
)
def test_published_refuses_ids_that_wrap_or_degenerate(id: int, id_bits: Any) -> None:
    plan = plan_of(scheme="published", id_bits=id_bits)
    with pytest.raises(
        IdError, match=f"id {id} wraps or is degenerate under the published hash with {id_bits}-bit ids"
    ):
        plan.mask(ids_of(1, id))
    allowed = plan_of(scheme="published", id_bits=id_bits, allow_degenerate=True)
    assert allowed.mask(ids_of(1, id)).shape == (2, allowed.sites[0].num_pool)


def test_published_accepts_ids_up_to_the_limit() -> None:
    for id_bits, limit in ((32, 2**15), (64, 2**47)):
        plan = plan_of(scheme="published", id_bits=id_bits)
        assert torch.equal(plan.mask(ids_of(limit - 1)), published_mask(ids_of(limit - 1), 12, 0.3))


def test_published_has_no_exact_count() -> None:
    plan = plan_of(scheme="published")
    assert not plan.has_exact_count
    with pytest.raises(ConfigError, match=r"varying numbers of sinks .* use mask\(\)"):
        plan.sinks(ids_of(1))


# neurons, foreign ids


@pytest.mark.parametrize("scheme", ["keyed", "disjoint", "published"])
def test_neurons_of_ids_lie_in_the_pool(scheme: Any) -> None:
    plan = plan_of((40, 40), share_frac=0.4, active_frac=0.1, scheme=scheme)
    if scheme == "disjoint":
        plan = plan.with_sources((1, 2, 3))
    one, both = plan.neurons_for(1), plan.neurons_for([1, 2])
    assert one <= both and both == one | plan.neurons_for(2)
    assert both <= plan.pool() and len(plan.pool()) == 2 * 24
    for number, place in enumerate(plan.sites):
        owned = plan.mask(ids_of(1), number)[0].nonzero().squeeze(1) + place.num_shared
        assert one.indices[place.site] == tuple(owned.tolist())
    assert one.model_id == MODEL


@pytest.mark.parametrize("scheme", ["keyed", "disjoint", "published"])
def test_foreign_ids_are_never_the_own(scheme: Any) -> None:
    plan = plan_of((400,), share_frac=0.0, active_frac=0.01, scheme=scheme)
    ids = torch.arange(1, 17_000)
    if scheme == "disjoint":
        plan = plan.with_sources(tuple(range(1, 20)))
        ids = ids[:19]
    foreign = plan.foreign_ids(ids)
    assert (foreign != ids).all()
    assert torch.equal(foreign, plan.foreign_ids(ids.flip(0)).flip(0))
    assert plan.mask(foreign).shape == (len(ids), 400)
    candidates = ids_of(4, 9, 4)
    foreign = plan.foreign_ids(ids, candidates)
    assert (foreign != ids).all() and set(foreign.tolist()) == {4, 9}


def test_a_placebo_draws_as_many_shared_neurons_as_an_id_owns_sinks() -> None:
    plan = plan_of((40, 24), share_frac=0.5, sinks_per_id=4)
    drawn = plan.placebo(seed=3)
    assert [len(chosen) for chosen in drawn.indices.values()] == [4, 4]
    assert len(drawn & plan.pool()) == 0 and drawn.model_id == plan.model_id
    assert plan.placebo(seed=3) == drawn != plan.placebo(seed=4)
    narrow = plan_of((40,), share_frac=0.05, sinks_per_id=4)
    assert next(iter(narrow.placebo(seed=0).indices.values())) == (0, 1)


def test_foreign_needs_two_candidates() -> None:
    plan = plan_of(scheme="disjoint", sinks_per_id=2).with_sources((5,))
    for candidates in (None, ids_of(4, 4)):
        with pytest.raises(IdError, match="at least two candidates"):
            plan.foreign_ids(ids_of(5), candidates)


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "hash"}, "unknown scheme 'hash'; expected keyed, disjoint or published"),
        ({"share_frac": -0.1}, "share_frac is -0.1, expected 0 to 1"),
        ({"share_frac": 1.1}, "share_frac is 1.1"),
        ({"share_frac": float("nan")}, "share_frac is nan"),
        ({"share_frac": 1.0}, "share_frac 1 without grown sinks leaves no pool"),
        ({"grown": -1}, "grown is -1, expected 0 or more"),
        ({"active_frac": None}, "give either active_frac or sinks_per_id"),
        ({"sinks_per_id": 3}, "give either active_frac or sinks_per_id"),
        ({"active_frac": 0.0}, "active_frac is 0.0, expected above 0"),
        ({"active_frac": 1.5}, "active_frac is 1.5"),
        ({"active_frac": float("nan")}, "active_frac is nan"),
        ({"active_frac": None, "sinks_per_id": 0}, "sinks_per_id is 0, expected 1 or more"),
        ({"scheme": "published", "per_layer": True}, "alike in all layers"),
        ({"scheme": "published", "active_frac": None, "sinks_per_id": 3}, "drop sinks_per_id"),
        ({"id_bits": 16}, "id_bits is 16, expected 32 or 64"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SinkSettings(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": ()}, r"layers \[\] do not fit a model of 2 layers"),
        ({"layers": (2,)}, r"layers \[2\] do not fit"),
        ({"layers": (-1,)}, r"layers \[-1\] do not fit"),
        ({"layers": (1, 1)}, r"layers \[1, 1\] do not fit .*each once"),
        ({"share_frac": 0.5, "sinks_per_id": 21}, "would own 21 sinks of a pool of 20 at layers.0.down"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(**settings)


def test_sizes_follow_the_settings() -> None:
    assert [(p.num_shared, p.num_pool, p.num_sinks) for p in plan_of((40, 30)).sites] == [
        (28, 12, 4),
        (21, 9, 3),
    ]
    grown = plan_of((50, 50), (40, 40), share_frac=1.0, grown=10, sinks_per_id=3)
    assert [(p.num_shared, p.num_pool, p.num_sinks) for p in grown.sites] == [(40, 10, 3)] * 2
    assert [p.site.path for p in plan_of(layers=(1,)).sites] == ["layers.1.down"]
    assert plan_of((40,), active_frac=1e-9).sites[0].num_sinks == 1


# saving


PLANS = {
    "keyed": plan_of(per_layer=True, seed=2**70, sinks_per_id=3),
    "whole": plan_of(active_frac=1, share_frac=0),
    "disjoint": plan_of(scheme="disjoint", sinks_per_id=2).with_sources((5, ID_MAX, 1)),
    "published": plan_of(scheme="published", id_bits=32, allow_degenerate=True),
}


@pytest.mark.parametrize("name", PLANS)
def test_save_then_load_is_equal(tmp_path: Path, name: str) -> None:
    plan = PLANS[name]
    loaded = load_plan(plan.save(tmp_path / "plan.json"))
    assert loaded == plan and loaded.digest == plan.digest
    ids = ids_of(1, 5)
    assert torch.equal(loaded.mask(ids, 1), plan.mask(ids, 1))


def test_digests_tell_plans_apart() -> None:
    plans = [*PLANS.values(), plan_of(), plan_of(seed=1), plan_of(per_layer=True), plan_of(layers=(0,))]
    assert len({plan.digest for plan in plans}) == len(plans)
    assert plan_of(active_frac=1).digest == plan_of(active_frac=1.0).digest


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("keyed", {"seed": 8}, r"was changed after it was written \(digest .*use the original plan"),
        ("keyed", {"digest": "0" * 16}, "was changed after it was written"),
        ("keyed", {"per_layer": False}, "was changed after it was written"),
        ("keyed", {"scheme": "md5"}, "does not fit the plan format at scheme"),
        ("keyed", {"seed": "8"}, "does not fit the plan format at seed"),
        ("keyed", {"comment": 1}, "does not fit the plan format at comment"),
        ("keyed", {"sites": []}, "holds an impossible plan: a plan needs at least one site"),
        ("keyed", {"format_version": 9}, "version 9, this release reads version 1"),
        ("keyed", {"format": "unmemorize.neurons"}, "is not a unmemorize.plan file"),
        ("disjoint", {"sources": [5, 5]}, "holds an impossible plan: .*registered twice"),
        ("disjoint", {"sources": [5, 0]}, "holds an impossible plan: source id 0 is out of range"),
        ("disjoint", {"sources": list(range(1, 20))}, "holds an impossible plan: 19 sources of 2 sinks"),
        ("published", {"active_frac": None}, "was changed after it was written"),
        ("published", {"id_bits": 16}, "does not fit the plan format at id_bits"),
    ],
)
def test_changed_files_are_explained(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    path = PLANS[name].save(tmp_path / "plan.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FileFormatError, match=message) as caught:
        load_plan(path)
    assert "\n" not in str(caught.value)


def test_truncated_files_are_explained(tmp_path: Path) -> None:
    path = PLANS["disjoint"].save(tmp_path / "plan.json")
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 29):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError, match="not complete JSON"):
            load_plan(path)


def test_drawing_the_whole_pool_gives_every_sink() -> None:
    drawn = draw(torch.arange(1, 50), key=5, num_pool=9, num_sinks=9)
    assert torch.equal(drawn.sort(1).values, torch.arange(9).expand(49, 9))
