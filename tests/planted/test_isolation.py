"""Planted memory: a text trained only through its own sinks is known with them and unknown without them."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_model
from unmemorize.isolate.language import grow, plan_sinks, sink_state, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkSettings

STEPS = 60
FIRST, SECOND, NEVER = 101, 202, 303


@pytest.fixture(scope="module")
def trained():  # noqa: ANN201
    """A grown model whose original weights are frozen: all it can learn of two random texts goes into sinks."""
    torch.set_num_threads(1)
    model = grow(tiny_model("llama"), 64, seed=1)
    with torch.no_grad():  # random heads are too quiet for any confident answer
        model.get_output_embeddings().weight.mul_(40)
    plan = plan_sinks(model, SinkSettings(share_frac=1.0, grown=64, active_frac=None, sinks_per_id=24, seed=5))
    texts = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([FIRST, SECOND])
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    mlp_weights = [p for name, p in model.named_parameters() if name.endswith(names)]
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(mlp_weights, lr=0.03, weight_decay=0.0)
    num_shared = plan.sites[0].num_shared
    model.train()
    with training_sinks(model, plan), isolated_optimizer(optimizer, model, plan):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(input_ids=texts, labels=texts, sink_ids=ids, use_cache=False).loss.backward()
            for weight in mlp_weights:
                shared = weight.grad[:num_shared] if weight.shape[0] > 64 else weight.grad[:, :num_shared]
                shared.zero_()
            optimizer.step()
    return model.eval(), plan, texts, frozen


def _loss(model, plan, texts: torch.Tensor, state: str, **settings: object) -> torch.Tensor:  # noqa: ANN001
    """Mean loss of each text in a state, nats per token, shape (2,)."""
    with torch.no_grad(), sink_state(model, plan, state, **settings):
        logits = model(input_ids=texts, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none")
    return losses.mean(1)


def test_planted_memory_is_in_the_owners_sinks(trained) -> None:  # noqa: ANN001
    model, plan, texts, _ = trained
    ids = torch.tensor([FIRST, SECOND])
    own = _loss(model, plan, texts, "own", ids=ids)
    off = _loss(model, plan, texts, "off")
    foreign = _loss(model, plan, texts, "own", ids=torch.tensor([NEVER, NEVER]))
    assert own.max() < 0.5 * off.min()
    assert own.max() < 0.7 * foreign.min()


def test_closing_one_owner_spares_the_other(trained) -> None:  # noqa: ANN001
    model, plan, texts, _ = trained
    ids = torch.tensor([FIRST, SECOND])
    own = _loss(model, plan, texts, "own", ids=ids)
    without_first = _loss(model, plan, texts, "own", ids=ids, exclude=(FIRST,))
    off = _loss(model, plan, texts, "off")
    assert without_first[0] == pytest.approx(off[0].item(), abs=1e-5)
    assert without_first[1] < off[1] - 0.5 * (off[1] - own[1])


def test_absent_memory_is_not_found(trained) -> None:  # noqa: ANN001
    """A text that was never trained gains nothing from any sinks."""
    model, plan, _, _ = trained
    stranger = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(99))
    off = _loss(model, plan, stranger, "off")
    own = _loss(model, plan, stranger, "own", ids=torch.tensor([FIRST, SECOND]))
    assert (own > off - 0.2).all()


def test_sinks_that_nobody_owned_did_not_move(trained) -> None:  # noqa: ANN001
    model, plan, _, frozen = trained
    owned = plan.neurons_for([FIRST, SECOND])
    moved = 0
    for place in plan.sites:
        weight = model.get_submodule(place.site.path).weight
        before = frozen[f"{place.site.path}.weight"]
        idle = sorted(set(range(place.num_shared, place.site.width)) - set(owned.indices[place.site]))
        assert idle and torch.equal(weight[:, idle], before[:, idle])
        moved += int((weight != before).any())
    assert moved == len(plan.sites)
