"""Gates: per-neuron multipliers at sites, at run time or in the weights. The only file that registers hooks.

    input side    W (g * h) = (W diag(g)) h
    output side   g * (W x + b) = (diag(g) W) x + g * b

so a gate that is constant can be folded into the weights with the same result. Three run-time forms:

- `capture` reads the neurons of sites and changes nothing;
- `gated` multiplies by given gates, for measuring;
- `conditioned` lets every forward pass carry its own payload (for sinks: whose sinks are open) down to the
  layers, also when activation checkpointing runs a layer again during backward. The payload travels with the
  micro-batch, never through global state, so interleaved batches cannot meet each other's gates.

Nothing here knows a model family or what the neurons mean.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unmemorize.errors import ConfigError, IdsMissing, ModelNotSupported, ShapeMismatch, SitesNotFound
from unmemorize.neurons import NeuronSet, Side, Site

_PAYLOAD = "unmemorize_payload"


def module_at(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path.

    Raises:
        SitesNotFound: if there is none; lists the paths that end alike.
    """
    try:
        return model.get_submodule(path)
    except AttributeError:
        last = path.rsplit(".", 1)[-1]
        near = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == last][:3]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise SitesNotFound(f"no module {path!r} in {type(model).__name__}{hint}") from None


def is_transposed(linear: nn.Module) -> bool:
    """Tell whether a linear layer stores its weight as (in, out), as GPT-2's `Conv1D` does."""
    return type(linear).__name__ == "Conv1D"


def is_plain_linear(linear: nn.Module) -> bool:
    """Tell whether a layer computes nothing but weight and bias in floating point: no adapter, not quantized."""
    is_known = isinstance(linear, nn.Linear) or is_transposed(linear)
    return is_known and isinstance(linear.weight, Tensor) and linear.weight.is_floating_point()


def site_width(linear: nn.Module, side: str) -> int:
    """Return the number of channels on one side of a linear layer."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0 if (side == "out") != is_transposed(linear) else 1])


def closed(neurons: NeuronSet, *, scale: float = 0.0) -> dict[Site, Tensor]:
    """Turn a neuron set into gates: `scale` at its neurons, 1 elsewhere; shape (F,) per site, float32."""
    gates: dict[Site, Tensor] = {}
    for site, chosen in neurons.indices.items():
        gate = torch.ones(site.width)
        gate[list(chosen)] = scale
        gates[site] = gate
    return gates


def apply_gate(channels: Tensor, gate: Tensor, start: int = 0) -> Tensor:
    """Multiply a slice of the last dimension by a gate, never in place and never promoting the dtype.

    Args:
        channels: shape (..., C); (B, T, C), or (B*T, C) from models that flatten.
        gate: shape (F,), (B, 1, F) or (B, T, F), unitless.
        start: first gated channel; channels start .. start + F are multiplied.

    Raises:
        ShapeMismatch: if the gate's batch, length or width does not fit.
    """
    gate = gate.to(device=channels.device, dtype=channels.dtype)
    width = gate.shape[-1]
    shape = gate.shape
    if gate.dim() == 3 and channels.dim() == 2 and shape[1] in (1, channels.shape[0] // shape[0]):
        gate = gate.expand(shape[0], channels.shape[0] // shape[0], width).reshape(-1, width)
    lead = zip(gate.shape[:-1], channels.shape[:-1], strict=False)
    if (
        start + width > channels.shape[-1]
        or gate.dim() > channels.dim()
        or any(g not in (1, c) for g, c in lead)
    ):
        raise ShapeMismatch(
            f"gate of shape {tuple(shape)} from channel {start} does not fit channels of shape "
            f"{tuple(channels.shape)}; pass one gate a row or a token"
        )
    if start == 0 and width == channels.shape[-1]:
        return channels * gate
    parts = torch.tensor_split(channels, (start, start + width), dim=-1)
    return torch.cat([parts[0], parts[1] * gate, parts[2]], dim=-1)


@contextmanager
def gated(model: nn.Module, gates: Mapping[Site, Tensor]) -> Iterator[None]:
    """Multiply neurons by gates while the block is open; nested blocks multiply.

    Args:
        model: any module that holds the sites.
        gates: site -> gate, shape (F,), (B, 1, F) or (B, T, F), unitless.

    Raises:
        SitesNotFound: if a site's path is not in the model.
    """
    with ExitStack() as stack:
        for site, gate in gates.items():
            stack.callback(
                _on_side(module_at(model, site.path), site.side, _gate_with(gate, site.start)).remove
            )
        yield


@contextmanager
def capture(model: nn.Module, sites: Sequence[Site]) -> Iterator[dict[Site, list[Tensor]]]:
    """Record the neurons of sites, one detached tensor of shape (..., F) per call of the layer."""
    record: dict[Site, list[Tensor]] = {site: [] for site in sites}
    with ExitStack() as stack:
        for site in sites:

            def keep(channels: Tensor, site: Site = site) -> Tensor:
                record[site].append(channels[..., site.start : site.start + site.width].detach())
                return channels

            stack.callback(_on_side(module_at(model, site.path), site.side, keep).remove)
        yield record


def require_closed(model: nn.Module) -> None:
    """Raise `ConfigError` if a block of this file is open on a model, since a copy would keep its hooks for ever."""
    for module in model.modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(getattr(hook, "__module__", None) == __name__ for hook in hooks):
            raise ConfigError(
                "a gate or sink block is open on this model; close it before making a folded copy"
            )


def folded(model: nn.Module, gates: Mapping[Site, Tensor]) -> nn.Module:
    """Return a copy of the model with constant gates written into its weights.

    Args:
        model: left untouched.
        gates: site -> gate of shape (F,), unitless.

    Raises:
        ConfigError: if a block of this file is open on the model, since the copy would keep its hooks for ever.
        ModelNotSupported: if a layer has an adapter or is quantized, so that its weight is not all it computes with.
    """
    require_closed(model)
    for site in gates:
        linear = module_at(model, site.path)
        if not is_plain_linear(linear):
            raise ModelNotSupported(
                f"cannot fold into {site.path}, a {type(linear).__name__}; merge its adapter or dequantize it first"
            )
    model = copy.deepcopy(model)
    with torch.no_grad():
        for site, gate in gates.items():
            linear = module_at(model, site.path)
            weight = linear.weight
            assert isinstance(weight, Tensor)
            outer = (site.side == "out") != is_transposed(linear)
            rows = weight if outer else weight.t()
            rows[site.start : site.start + site.width].mul_(gate.to(rows)[:, None])
            if site.side == "out" and isinstance(linear.bias, Tensor):
                linear.bias[site.start : site.start + site.width].mul_(gate.to(rows))
    return model


def _gate_with(gate: Tensor, start: int) -> Callable[[Tensor], Tensor]:
    return lambda channels: apply_gate(channels, gate, start)


def _on_side(linear: nn.Module, side: Side, change: Callable[[Tensor], Tensor]) -> Any:
    """Run `change` on the input or the output of a layer; returns the hook's handle."""
    if side == "in":
        return linear.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    return linear.register_forward_hook(lambda _, __, output: change(output))


# Carrying a payload from a model's call to its layers. Three routes exist because no single one reaches a layer that
# runs again during backward everywhere: (1) transformers hands unknown keyword arguments to every decoder layer, and
# torch's own checkpoint wrappers call the layer again with them (the layer inside a wrapper is hooked, and the wrapper
# is handed the payload); (2) models that drop keyword arguments (GPT-Neo, diffusers) read the call that is under way;
# (3) transformers' built-in checkpointing runs the layer's *inner* forward again, where no hook of the layer fires, so
# the checkpoint function itself is wrapped to put the payload back.


@dataclass
class _Slot:
    """Where one layer finds the payload of the micro-batch it is computing."""

    payload: Any = None


class Conditioning:
    """The live end of `conditioned`: which payload each layer is computing with."""

    def __init__(self, num_layers: int) -> None:
        self._slots = [_Slot() for _ in range(num_layers)]
        self._current: Any = None
        self._is_open = True

    def require_open(self) -> None:
        """Raise `IdsMissing` if the block is closed, so that a layer that runs again would run without its payload."""
        if not self._is_open:
            raise IdsMissing(
                "backward recomputed a checkpointed layer after its block was closed; call backward inside the block"
            )

    def payload(self, layer: int) -> Any:
        """Return the payload of the micro-batch that a layer is computing right now.

        Raises:
            IdsMissing: if the layer runs outside a call of the model, so that no payload can be known.
        """
        payload = self._slots[layer].payload
        if payload is None:
            raise IdsMissing(
                f"layer {layer} ran outside a call of its model, so its gate is unknown; call the whole model, and run "
                "backward inside the block"
            )
        return payload


@contextmanager
def conditioned(
    model: nn.Module,
    layers: Sequence[nn.Module],
    *,
    key: str,
    encode: Callable[[Tensor | None, bool], Any],
) -> Iterator[Conditioning]:
    """Give every call of the model a payload that its layers can ask for, also during recomputation.

    Args:
        model: the module that users call; it may receive `key=` as a keyword argument.
        layers: the modules that are checkpointed as a unit (decoder layers), in order.
        key: name of the keyword argument, taken out before the model sees it.
        encode: (value of the argument or None, whether the model is in training mode) -> payload.

    Raises:
        IdsMissing: from `encode`, or when backward recomputes a layer after the block was closed.
        ConfigError: if another such block is open on the model.
    """
    if _PAYLOAD in model.__dict__:
        raise ConfigError(
            "sinks are already attached to this model; close the open block first (in evaluation mode a training block "
            "already runs with the pool off, or with the sinks of the call's ids)"
        )
    state = Conditioning(len(layers))
    inner_layers = [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in layers]
    parameters = inspect.signature(model.forward).parameters.values()
    hands_down = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)

    def enter_model(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        state._current = encode(kwargs.pop(key, None), module.training)
        for layer, slot in zip(inner_layers, state._slots, strict=True):
            _keep_payload_in_checkpoints(layer, slot, state)
        if hands_down:
            kwargs[_PAYLOAD] = state._current
        return args, kwargs

    def leave_model(*_: Any) -> None:
        state._current = None

    with ExitStack() as stack:
        model.__dict__[_PAYLOAD] = True
        stack.callback(model.__dict__.pop, _PAYLOAD)
        stack.callback(model.register_forward_pre_hook(enter_model, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(leave_model, always_call=True).remove)
        for layer, inner in zip(layers, inner_layers, strict=True):
            if inner is not layer:
                hand_down, guard = _wrapper_hooks(state)
                stack.callback(layer.register_forward_pre_hook(hand_down, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(guard).remove)
        for layer, slot in zip(inner_layers, state._slots, strict=True):
            enter, leave = _layer_hooks(slot, state)
            stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(leave, always_call=True).remove)
            stack.callback(_restore_checkpoints, layer)
        try:
            yield state
        finally:
            state._is_open = False


def _layer_hooks(slot: _Slot, state: Conditioning) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kwargs = dict(kwargs)
        payload = kwargs.pop(_PAYLOAD, state._current)
        if payload is not None:
            slot.payload = payload
        return args, kwargs

    def leave(*_: Any) -> None:
        slot.payload = None

    return enter, leave


def _wrapper_hooks(state: Conditioning) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Hooks of torch's checkpoint wrapper: hand the payload to what it will run again, and insist on an open block."""

    def hand_down(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {_PAYLOAD: state._current, **kwargs}

    def guard(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: state.require_open())

    return hand_down, guard


def _keep_payload_in_checkpoints(layer: nn.Module, slot: _Slot, state: Conditioning) -> None:
    """Wrap the layer's checkpoint function, if it has one, so that a second run meets the first run's payload."""
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    if checkpoint is None or hasattr(checkpoint, "unmemorize_inner"):
        return

    def checkpoint_with_payload(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        payload = slot.payload if slot.payload is not None else state._current

        def run(*inner: Any, **inner_kwargs: Any) -> Any:
            state.require_open()
            before, slot.payload = slot.payload, payload
            try:
                return function(*inner, **inner_kwargs)
            finally:
                slot.payload = before

        return checkpoint(run, *args, **kwargs)

    checkpoint_with_payload.unmemorize_inner = checkpoint  # type: ignore[attr-defined]
    layer._gradient_checkpointing_func = checkpoint_with_payload  # type: ignore[assignment]


def _restore_checkpoints(layer: nn.Module) -> None:
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    inner = getattr(checkpoint, "unmemorize_inner", None)
    if inner is not None:
        layer._gradient_checkpointing_func = inner


@contextmanager
def changed_inputs(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Pass the first input of each module through a function while the block is open."""
    with ExitStack() as stack:
        for module, change in changes.items():
            stack.callback(_on_side(module, "in", change).remove)
        yield


@contextmanager
def changed_outputs(changes: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Pass the output of each module through a function while the block is open."""
    with ExitStack() as stack:
        for module, change in changes.items():
            stack.callback(_on_side(module, "out", change).remove)
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Compute modules by other functions while the block is open; parameters and state-dict keys stay."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            before = module.__dict__.get("forward")
            module.forward = forward
            stack.callback(_restore_forward, module, before)
        yield


def _restore_forward(module: nn.Module, before: Any) -> None:
    if before is None:
        del module.forward
    else:
        module.forward = before


class _FirstCall(Exception):
    """Carries the arguments of a call out of the code that made it."""


def first_arguments(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what `run` hands to a module's first call; the call is not made and `run` does not finish.

    Raises:
        SitesNotFound: if `run` finishes without calling the module.
    """

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _FirstCall(args, kwargs)

    handle = module.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        run()
    except _FirstCall as call:
        return call.args[0], call.args[1]
    finally:
        handle.remove()
    raise SitesNotFound(f"{type(module).__name__} was never called; pass the pipeline that uses it")
