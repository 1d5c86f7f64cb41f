"""INJ: a language model that has learned one text in neurons that we chose, and how well localizers find them.

A few neurons are drawn at random over all layers. The vectors that they write (their columns of the MLP's last
projection) are trained on one text until the model recites it; nothing else moves, by one bit. Where the memory sits
is then known, up to one thing: the optimizer may have made little use of some of the neurons it was given.

    recall at k % = |drawn neurons among the k % of highest score of each layer| / |drawn neurons|

Random scores reach k % on average. The loss is that of the suffix alone, so a short prefix gives the published setting,
in which a whole definition is learned.

Source: Chang, Thomason and Jia 2024 (INJ): one text per example with the example's number as seed, Adam, learning rate
0.01 at 1 % and 0.05 at 0.1 %, until the loss is below 0.05, at most 200 updates.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from unmemorize.corpus.memorized import MemorizedExample
from unmemorize.errors import ConfigError, DataError, ModelNotSupported
from unmemorize.gates import is_plain_linear, is_transposed, module_at
from unmemorize.localize.neuron_scores import NeuronScores
from unmemorize.localize.suffix import device_of, frozen, make_batch, require_fitting, suffix_losses
from unmemorize.models.language import ROWS, MlpRow, find_mlps, signature
from unmemorize.neurons import NeuronSet, Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectSettings:
    """How a text is injected.

    Attributes:
        share_frac: neurons that may learn, of all neurons, 0 to 1.
        learning_rate: of Adam.
        loss_nats: mean loss per suffix token at which injection stops, nats.
        max_steps: most updates.
        seed: seed of the draw of neurons.
        is_norm_kept: whether every vector keeps its norm while it learns, so that it cannot be found by it (ours).
    """

    share_frac: float = 0.01
    learning_rate: float = 0.01
    loss_nats: float = 0.05
    max_steps: int = 400
    seed: int = 0
    is_norm_kept: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 < self.share_frac <= 1:
            raise ConfigError(f"share_frac is {self.share_frac}, expected above 0 and at most 1")
        if not (self.learning_rate > 0 and self.loss_nats > 0 and self.max_steps >= 1):
            raise ConfigError(
                f"learning rate {self.learning_rate}, loss {self.loss_nats} nats and {self.max_steps} steps; expected "
                "numbers above 0"
            )


@dataclass(frozen=True, slots=True)
class Injected:
    """A model that has learned one text in known neurons.

    Attributes:
        model: a copy of the model that was given.
        neurons: the neurons that could learn; the model's signature as model id.
        loss_nats: mean loss per suffix token reached, nats.
        steps: updates made.
        is_learned: whether the loss fell below the one asked for.
    """

    model: PreTrainedModel
    neurons: NeuronSet
    loss_nats: float
    steps: int
    is_learned: bool


def random_base(
    model_type: str = "llama",
    *,
    hidden_width: int = 64,
    num_neurons: int = 2048,
    num_layers: int = 2,
    vocabulary: int = 64,
    seed: int = 0,
) -> PreTrainedModel:
    """Build a small model of seeded random weights that a text can be injected into, in evaluation mode.

    Library initializers make logits so small that no change of an MLP could make a model sure of a token; here they are
    of order one. The norms of what neurons write are spread as in trained models (log-normal, sigma 0.7): with equal
    norms the few columns that grow while they learn would be found by their norm alone, without looking at the text.

    Args:
        model_type: a key of the site table whose config takes the usual names.
        hidden_width: width of the residual stream.
        num_neurons: neurons of every layer's MLP.
        num_layers: decoder layers.
        vocabulary: tokens.
        seed: seed of all weights; the global generator is left as it was.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type,
        **{
            "vocab_size": vocabulary,
            "hidden_size": hidden_width,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            ROWS[model_type].width_key: num_neurons,
        },
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and (".layers." in name or ".h." in name):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.get_input_embeddings().weight.normal_(0, 1)
        if not config.tie_word_embeddings:
            model.get_output_embeddings().weight.normal_(0, 0.4)
        for mlp in find_mlps(model):
            columns = _column_view(model, mlp.site)
            columns.mul_(torch.exp(0.7 * torch.randn(len(columns)))[:, None])
    return cast("PreTrainedModel", model.train(False))


def draw_neurons(
    model: PreTrainedModel, share_frac: float, seed: int, row: MlpRow | None = None
) -> NeuronSet:
    """Draw neurons evenly over all layers; at least one."""
    places = [(mlp.site, index) for mlp in find_mlps(model, row) for index in range(mlp.site.width)]
    drawn = random.Random(seed).sample(places, max(1, round(share_frac * len(places))))
    indices: dict[Site, list[int]] = {}
    for site, index in drawn:
        indices.setdefault(site, []).append(index)
    return NeuronSet(signature(model, row), {site: tuple(chosen) for site, chosen in indices.items()})


def inject(
    model: PreTrainedModel,
    example: MemorizedExample,
    settings: InjectSettings | None = None,
    *,
    row: MlpRow | None = None,
) -> Injected:
    """Teach a copy of a model one text, in a few neurons drawn at random.

    Args:
        model: left untouched.
        example: the text; the loss counts its suffix.
        settings: by default those of the published benchmark at 1 %, but for up to 400 updates instead of 200.
        row: site table row, for an architecture that the table does not know.

    Raises:
        DataError: if the model cannot read the example.
        ModelNotSupported: if a layer is quantized or has an adapter, so that its columns cannot be trained.
    """
    settings = settings or InjectSettings()
    require_fitting(model, [example])
    neurons = draw_neurons(model, settings.share_frac, settings.seed, row)
    changed = copy.deepcopy(model)
    columns = {site: _column_view(changed, site) for site in neurons.indices}
    chosen = {
        site: torch.tensor(indices, device=columns[site].device) for site, indices in neurons.indices.items()
    }
    learned = [columns[site].detach()[chosen[site]].float().requires_grad_() for site in chosen]
    norms = [part.detach().norm(dim=1, keepdim=True) for part in learned]
    optimizer = torch.optim.Adam(learned, lr=settings.learning_rate)
    batch = make_batch([example], device_of(changed))
    loss, step = math.inf, 0
    with frozen(changed):
        weights = [cast("Tensor", module_at(changed, site.path).weight) for site in chosen]
        for step in range(settings.max_steps + 1):
            for weight in weights:
                weight.requires_grad_()
            total = suffix_losses(changed, batch).sum()
            loss = float(total.detach())
            if loss < settings.loss_nats or step == settings.max_steps:
                break
            gradients = torch.autograd.grad(total, weights)
            for part, site, gradient in zip(learned, chosen, gradients, strict=True):
                rows = gradient if is_transposed(module_at(changed, site.path)) else gradient.t()
                part.grad = rows[site.start :][chosen[site]].float()
            optimizer.step()
            with torch.no_grad():
                for part, norm, site in zip(learned, norms, chosen, strict=True):
                    if settings.is_norm_kept:
                        part.mul_(norm / part.norm(dim=1, keepdim=True))
                    columns[site][chosen[site]] = part.to(columns[site].dtype)
    return Injected(changed, neurons, loss, step, loss < settings.loss_nats)


def _column_view(model: PreTrainedModel, site: Site) -> Tensor:
    """Return a view of the vectors that a site's neurons write, shape (F, width of the output)."""
    linear = module_at(model, site.path)
    if not is_plain_linear(linear):
        raise ModelNotSupported(
            f"cannot train columns of {site.path}, a {type(linear).__name__}; merge its adapter or dequantize it first"
        )
    weight = cast("Tensor", linear.weight).data
    return (weight if is_transposed(linear) else weight.t())[site.start : site.start + site.width]


@dataclass(frozen=True, slots=True)
class Recall:
    """Recall of a method over texts: mean and standard error, both fractions from 0 to 1, and number of texts."""

    mean_frac: float
    standard_error_frac: float
    num: int


def recall(scores: NeuronScores, truth: NeuronSet, share_frac: float) -> float:
    """Return the share of the true neurons among the best of each layer, 0 to 1."""
    return len(scores.top(share_frac) & truth) / len(truth)


def summarized(values: Sequence[float]) -> Recall:
    """Return mean and standard error of recalls over texts.

    Raises:
        DataError: if there are fewer than two.
    """
    if len(values) < 2:
        raise DataError(f"{len(values)} recall values have no standard error; inject at least two texts")
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Recall(mean, math.sqrt(variance / len(values)), len(values))
