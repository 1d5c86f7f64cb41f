"""What the families' model files share: names of models, the self-check of a site table, and quiet loading.

A model's name is its architecture with the widths of its sites ("language/llama-1a2b3c4d-*", valid for any weights)
or, with a digest of the weights in place of the star, exactly one checkpoint. Nothing here knows an architecture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmemorize.errors import NeuronSetMismatch
from unmemorize.gates import closed, folded, gated
from unmemorize.neurons import NeuronSet, Site, same_model


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Outcome of one self-check: its name, whether it held, and the numbers."""

    name: str
    passed: bool
    detail: str


def signature_of(family: str, kind: str, sites: Sequence[Site]) -> str:
    """Name an architecture with the widths of its sites; ends in "-*"."""
    text = ";".join(f"{s.path}:{s.side}:{s.start}:{s.width}" for s in sites)
    return f"{family}/{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}-*"


def fingerprint_of(signature: str, model: nn.Module) -> str:
    """Complete a signature with a digest of the weights (names, shapes, dtypes, values)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
    return signature[:-1] + digest.hexdigest()[:16]


def require_match(neurons: NeuronSet, signature: str, fingerprint: Callable[[], str]) -> None:
    """Raise `NeuronSetMismatch` unless a set fits; the weights are only read if the set names them."""
    if same_model(neurons.model_id, signature) and neurons.model_id.endswith("-*"):
        return
    ours = fingerprint()
    if not same_model(neurons.model_id, ours):
        raise NeuronSetMismatch(
            f"the neuron set was made for {neurons.model_id}, this model is {ours}; "
            "use the model it was made for, or make the set again"
        )


def gate_checks(
    model: nn.Module, sites: Sequence[Site], forward: Callable[[nn.Module], Tensor], model_id: str
) -> list[CheckResult]:
    """Prove that gates at the sites do what gates should.

    Args:
        model: the module that holds the sites, in evaluation mode.
        sites: all sites of its table row.
        forward: module -> its output on one fixed small input, any shape, float32.
        model_id: the model's signature.

    Returns:
        Four results: sites exist; a gate of ones is the identity (bit for bit); a gate of zeros at any single site
        changes the output; the gate at run time equals the folded weights (largest difference at most 1e-4 of the
        largest output in float32, 2e-2 in half precisions).
    """
    results = [CheckResult("sites exist", True, f"{len(sites)} sites, {sum(s.width for s in sites)} neurons")]
    plain = forward(model)
    with gated(model, {site: torch.ones(site.width) for site in sites}):
        difference = (forward(model) - plain).abs().max().item()
    results.append(CheckResult("ones are the identity", difference == 0.0, f"difference {difference:.3g}"))

    unmoved: list[str] = []
    for site in sites:
        with gated(model, {site: torch.zeros(site.width)}):
            if torch.equal(forward(model), plain):
                unmoved.append(site.path)
    results.append(
        CheckResult("zeros are not", not unmoved, f"no effect at {', '.join(unmoved) or 'no site'}")
    )

    half = NeuronSet(model_id, {site: tuple(range(0, site.width, 2)) for site in sites})
    with gated(model, closed(half)):
        at_run_time = forward(model)
    difference = (forward(folded(model, closed(half))) - at_run_time).abs().max().item()
    is_full = all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point())
    allowed = (1e-4 if is_full else 2e-2) * max(1.0, plain.abs().max().item())
    results.append(
        CheckResult("gate equals fold", difference <= allowed, f"{difference:.3g} <= {allowed:.3g}")
    )
    return results


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports for a while; its settings are restored."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
