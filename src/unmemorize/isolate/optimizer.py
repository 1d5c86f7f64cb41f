"""Rows that are off do not move: keep an optimizer from touching sinks that received no gradient.

AdamW moves a weight whose gradient is zero, by stale momentum and by weight decay, so a sink would drift while its
owners are not in the batch. `isolated_optimizer` takes a copy of the pool before each step and puts back every
element whose gradient was exactly zero: weight and moments stay bit-identical. Because the test is the gradient
itself, it holds under accumulation, clipping and data-parallel averaging (a sink that any rank used has a gradient
on all ranks), for parameters sharded over ranks (each looks after the part it holds), and for any optimizer with
element-wise state.

The same copy gives sinks a learning rate of their own although they share a tensor with shared neurons, and keeps
the shared neurons of such a tensor still where only sinks (and adapters) are to train.
Source: ours; the drift is named in the fact sheets of MemSinks ports and of SGTM (arXiv 2512.05648).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError
from unmemorize.isolate.plan import SinkPlan

_FAMILIES = ("diffusion", "language")


def pool_slices(model: nn.Module, plan: SinkPlan, row: Any = None) -> list[tuple[nn.Parameter, int, slice]]:
    """List the parts of a model's parameters that belong to sinks, whichever family the plan is for.

    Returns:
        (parameter, axis, slice) triples: what makes the sinks (rows, with their biases) and what reads them (columns).
    """
    family = plan.model_id.partition("/")[0]
    if family not in _FAMILIES:
        raise ConfigError(
            f"the plan is for {plan.model_id}, expected a model of family {' or '.join(_FAMILIES)}; "
            "use a plan made by plan_sinks"
        )
    # By name, because the families do not know each other and this file serves both.
    slices = import_module(f"unmemorize.isolate.{family}").pool_slices(model, plan, row)
    return cast("list[tuple[nn.Parameter, int, slice]]", slices)


@contextmanager
def isolated_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    plan: SinkPlan,
    *,
    sink_learning_rate_scale: float = 1.0,
    freeze_shared: bool = False,
    row: Any = None,
) -> Iterator[None]:
    """While the block is open, `optimizer.step()` leaves sinks without gradient bit-identical.

    Args:
        optimizer: any optimizer over the model's parameters whose state is element-wise (SGD, Adam, AdamW, ...).
        model: the model, unwrapped.
        plan: the plan.
        sink_learning_rate_scale: multiplier of the step that a sink takes, weight decay included; above 0.
        freeze_shared: keep shared neurons bit-identical where they share a tensor with sinks, whatever their gradient,
            for fine-tuning that trains sinks and adapters only. Parameters without sinks are the caller's:
            `requires_grad_(False)`.
        row: site table row, for an architecture that the table does not know.

    Raises:
        ConfigError: if the scale is not positive, or the optimizer holds none of the model's sinks.
    """
    if not sink_learning_rate_scale > 0:
        raise ConfigError(f"sink_learning_rate_scale is {sink_learning_rate_scale}, expected above 0")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has no hooks of its own
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = [
        (parameter, axis, _held_here(parameter, axis, pool))
        for parameter, axis, pool in pool_slices(model, plan, row)
        if id(parameter) in held
    ]
    if not parts:
        raise ConfigError(
            "the optimizer holds none of this model's sinks; build it from this model's parameters"
        )
    before: list[list[Tensor]] = []
    wholes = list({id(p): p for p, _, _ in parts}.values()) if freeze_shared else []
    whole_before: dict[int, list[Tensor]] = {}

    def tensors(parameter: nn.Parameter) -> list[Tensor]:
        state = optimizer.state.get(parameter, {})
        moments = [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
        return [_local(tensor) for tensor in (parameter.data, *moments)]

    def remember(*_: object) -> None:
        before[:] = [
            [t.narrow(axis, s.start, s.stop - s.start).clone() for t in tensors(parameter)]
            for parameter, axis, s in parts
        ]
        whole_before.update({id(p): [t.clone() for t in tensors(p)] for p in wholes})

    def put_back(*_: object) -> None:
        for (parameter, axis, s), old in zip(parts, before, strict=True):
            if parameter.grad is None:
                continue
            still = _local(parameter.grad).narrow(axis, s.start, s.stop - s.start) == 0
            for number, tensor in enumerate(tensors(parameter)):
                now = tensor.narrow(axis, s.start, s.stop - s.start)
                # Moments that did not exist before the step start at zero.
                was = old[number] if number < len(old) else torch.zeros_like(now)
                if number == 0 and sink_learning_rate_scale != 1.0:
                    now.copy_(torch.lerp(was, now, sink_learning_rate_scale))
                now.copy_(torch.where(still, was, now))
        before.clear()
        for whole in wholes:
            kept = whole_before[id(whole)]
            for number, tensor in enumerate(tensors(whole)):
                was = kept[number] if number < len(kept) else torch.zeros_like(tensor)
                for axis, s in ((axis, s) for parameter, axis, s in parts if parameter is whole):
                    size = s.stop - s.start
                    was.narrow(axis, s.start, size).copy_(tensor.narrow(axis, s.start, size))
                tensor.copy_(was)
        whole_before.clear()

    handles = [optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _local(tensor: Any) -> Tensor:
    """Return the part of a tensor that this process holds, as a view: all of it unless it is sharded."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "placements") else tensor
    return local


def _held_here(parameter: nn.Parameter, axis: int, pool: slice) -> slice:
    """Return where a slice of a parameter lies in the part that this process holds; empty if it lies elsewhere."""
    data: Any = parameter.data
    if not hasattr(data, "placements"):
        return pool
    from torch.distributed.tensor import distribute_tensor

    numbers = torch.arange(data.shape[axis], device=data.device)
    numbers = numbers.view([-1 if dim == axis else 1 for dim in range(data.dim())]).expand(data.shape)
    # The same cut as the parameter's, made from numbers that every process knows, so that nothing is sent.
    mine = _local(distribute_tensor(numbers, data.device_mesh, data.placements, src_data_rank=None))
    if not mine.numel():
        return slice(0, 0)
    mine = mine.movedim(axis, 0).flatten(1)[:, 0] if data.dim() > 1 else mine
    inside = ((mine >= pool.start) & (mine < pool.stop)).nonzero()
    return slice(int(inside.min()), int(inside.max()) + 1) if len(inside) else slice(0, 0)
