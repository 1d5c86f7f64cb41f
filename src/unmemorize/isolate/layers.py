"""Computing a layer with sinks: masked for every site, and gathered for the MLPs of language models.

For a token of document d with hidden neurons h, shared neurons 0 .. S-1 and sinks S .. F-1:

    out = W_down[:, shared] h[shared] + sum over sinks s owned by d of W_down[:, s] h[s]

*Masked* computes all F neurons and multiplies the ones that are not owned by 0, after the non-linearity (after
gate x up) and before the last projection. It serves every state, every scheme and every architecture.
*Gathered* computes only the shared and the owned neurons: the projections are replaced by ones that pick their rows
per document, and the model's own MLP code runs between them at the smaller width. Same numbers up to the order of
summation, and the time does not grow with the pool.

What a micro-batch needs is a payload, made once per forward pass and carried by `gates.conditioned`.

Source: MemSinks, arXiv 2507.09937, section 4 (no rescaling in training); gathering is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from unmemorize.errors import ConfigError, IdError, ShapeMismatch
from unmemorize.gates import apply_gate, is_plain_linear, is_transposed
from unmemorize.isolate.plan import SinkPlan

if TYPE_CHECKING:
    from unmemorize.models.language import Mlp


@dataclass
class Gates:
    """Payload of the masked layer: one gate per distinct id, and which tokens use which.

    Attributes:
        tables: per site, shape (N, F), float32, unitless; sites that share a table hold the same tensor.
        index: which row of the tables a token uses, shape (B,) or (B, T), int64; None for row 0 everywhere.
    """

    tables: Sequence[Tensor]
    index: Tensor | None
    _first: list[int] = field(init=False)
    _expanded: dict[tuple[int, torch.dtype, torch.device], Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # The first site with the same table: a key that does not change from batch to batch, so that compiled code
        # is not compiled again for each.
        addresses = [id(table) for table in self.tables]
        self._first = [addresses.index(address) for address in addresses]

    def gate(self, site: int, like: Tensor) -> Tensor:
        """Return the gate of a site in the dtype and device of `like`: (F,), (B, 1, F) or (B, T, F).

        Raises:
            ShapeMismatch: if there are ids for other rows than `like` has.
        """
        if self.index is not None:
            require_fit(tuple(self.index.shape), like)
        key = (self._first[site], like.dtype, like.device)
        if key not in self._expanded:
            table = self.tables[site].to(device=like.device, dtype=like.dtype)
            if self.index is None:
                self._expanded[key] = table[0]
            else:
                picked = table[self.index.to(like.device)]
                self._expanded[key] = picked if self.index.dim() == 2 else picked.unsqueeze(1)
        return self._expanded[key]


@dataclass
class Rows:
    """Payload of the gathered layer: which sinks each document of the micro-batch owns.

    Attributes:
        sinks: per site, shape (N, k), int64, positions in the pool.
        present: shape (N, 1, 1), float32: 1, or 0 for tokens without an id, whose pool is off.
        slots: token number at each place of the (N, L) document layout, shape (N * L,), int64; None when every
            row of the batch is one document.
        places: inverse of `slots`: place of each token, shape (B * T,), int64; None likewise.
        ids_shape: shape of the sink ids that this was made from, (B,) or (B, T).
    """

    sinks: Sequence[Tensor]
    present: Tensor
    slots: Tensor | None
    places: Tensor | None
    ids_shape: tuple[int, ...]

    def by_document(self, tokens: Tensor) -> Tensor:
        """Lay tokens (..., D) out by document: (N, L, D); short documents are filled with other tokens."""
        require_fit(self.ids_shape, tokens)
        flat = tokens.reshape(-1, tokens.shape[-1])
        if self.slots is not None:
            flat = flat.index_select(0, self.slots)
        return flat.view(len(self.present), -1, tokens.shape[-1])

    def by_token(self, documents: Tensor, like: Tensor) -> Tensor:
        """Undo `by_document`: (N, L, K) to the leading shape of `like` with K channels."""
        flat = documents.reshape(-1, documents.shape[-1])
        if self.places is not None:
            flat = flat.index_select(0, self.places)
        return flat.view(*like.shape[:-1], documents.shape[-1])


def check_ids(ids: Tensor) -> Tensor:
    """Check sink ids of shape (B,) or (B, T): int64, 0 (no id) or more.

    Raises:
        IdError: if the dtype is narrower, or a value is negative.
        ShapeMismatch: if there are more or fewer dimensions.
    """
    if ids.dtype != torch.int64:
        raise IdError(
            f"sink_ids are {ids.dtype}, expected int64: narrower ids collide; use torch.int64 throughout"
        )
    if ids.dim() not in (1, 2):
        raise ShapeMismatch(f"sink_ids have shape {tuple(ids.shape)}, expected (batch,) or (batch, tokens)")
    if ids.numel() and int(ids.min()) < 0:
        raise IdError(f"sink id {int(ids.min())} is out of range, expected 0 (no id) to 2**63 - 1")
    return ids


def require_fit(ids_shape: tuple[int, ...], tokens: Tensor) -> None:
    """Raise `ShapeMismatch` unless ids of a shape, (B,) or (B, T), fit tokens of shape (B, T, D) or (B * T, D)."""
    lead = tokens.shape[:-1]
    if ids_shape == (1,) or ids_shape == lead[: len(ids_shape)]:
        return
    if len(lead) == 1 and (
        lead[0] == math.prod(ids_shape) or (len(ids_shape) == 1 and lead[0] % ids_shape[0] == 0)
    ):
        return
    raise ShapeMismatch(
        f"sink ids of shape {ids_shape} do not fit tokens of shape {tuple(lead)}; pass one id a row or a token"
    )


def distinct(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Split sink ids (B,) or (B, T) into distinct ids (N,) and the index of each (same shape as the ids)."""
    if ids.dim() == 1:
        return ids, torch.arange(len(ids), device=ids.device)
    rows, index = torch.unique(ids, return_inverse=True)
    return rows, index


def pool_gates(plan: SinkPlan, owners: Tensor, *, shared_scale: float = 1.0) -> list[Tensor]:
    """Return per-site gates that open the sinks of each owner and no others.

    Args:
        plan: the plan.
        owners: shape (N,), int64; 0 opens no sinks.
        shared_scale: multiplier of shared neurons, unitless.

    Returns:
        Per site shape (N, F), float32; the same tensor object for all sites of a uniform plan.
    """
    present = owners > 0
    # One draw serves all sites of a uniform plan, also where their widths differ.
    common = plan.mask(owners[present]).to(torch.float32) if plan.is_uniform else None

    def table(number: int) -> Tensor:
        place = plan.sites[number]
        gates = torch.zeros(len(owners), place.site.width, dtype=torch.float32, device=owners.device)
        gates[:, : place.num_shared] = shared_scale
        owned = plan.mask(owners[present], number).to(torch.float32) if common is None else common
        gates[present, place.num_shared :] = owned
        return gates

    return _per_site(plan, table)


def _per_site(plan: SinkPlan, make: Callable[[int], Tensor]) -> list[Tensor]:
    """Make a tensor for every site; sites that are alike get the same one."""
    first = make(0)
    is_alike = plan.is_uniform and len({place.site.width for place in plan.sites}) == 1
    return [first if is_alike or number == 0 else make(number) for number in range(len(plan.sites))]


def masked_payload(plan: SinkPlan, ids: Tensor) -> Gates:
    """Return the masked layer's payload for sink ids of shape (B,) or (B, T)."""
    owners, index = distinct(check_ids(ids))
    return Gates(pool_gates(plan, owners), index)


def gathered_payload(plan: SinkPlan, ids: Tensor) -> Rows:
    """Return the gathered layer's payload for sink ids of shape (B,) or (B, T).

    Raises:
        ConfigError: if ids of the plan own varying numbers of sinks (published scheme).
    """
    if not plan.has_exact_count:
        raise ConfigError("the published scheme has no fixed number of sinks per id; use compute='masked'")
    owners, index = distinct(check_ids(ids))
    present = owners > 0

    def owned(number: int) -> Tensor:
        sinks = torch.zeros(
            len(owners), plan.sites[number].num_sinks, dtype=torch.int64, device=owners.device
        )
        sinks[present] = plan.sinks(owners[present], number)
        return sinks

    sinks = _per_site(plan, owned)
    is_present = present.to(torch.float32).view(-1, 1, 1)
    if index.dim() == 1:
        return Rows(sinks, is_present, None, None, tuple(ids.shape))
    slots, places = _layout(index.reshape(-1), len(owners))
    return Rows(sinks, is_present, slots, places, tuple(ids.shape))


def _layout(index: Tensor, num_documents: int) -> tuple[Tensor, Tensor]:
    """Place tokens in a (documents, longest) layout; returns slots and places as in `Rows`."""
    counts = torch.bincount(index, minlength=num_documents)
    longest = int(counts.max())
    order = torch.argsort(index, stable=True)
    starts = counts.cumsum(0) - counts
    ranked = index[order]
    within = torch.arange(len(index), device=index.device) - starts[ranked]
    places = torch.empty_like(index)
    places[order] = ranked * longest + within
    slots = torch.zeros(num_documents * longest, dtype=torch.int64, device=index.device)
    slots[places] = torch.arange(len(index), device=index.device)
    return slots, places


def masked(payload_of: Callable[[], Gates | Rows], site: int, start: int = 0) -> Callable[[Tensor], Tensor]:
    """Return the change of a layer's input or output that closes foreign sinks; the site begins at channel `start`."""

    def change(channels: Tensor) -> Tensor:
        gates = payload_of()
        assert isinstance(gates, Gates)
        return apply_gate(channels, gates.gate(site, channels), start)

    return change


def gathered_forwards(
    mlp: Mlp, num_shared: int, site: int, payload_of: Callable[[], Gates | Rows]
) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return replacements for the projections of one MLP that compute shared and owned neurons only.

    Args:
        mlp: the MLP; its own code runs between the replaced projections, at width S + k.
        num_shared: S, shared neurons of the site.
        site: position of the site in the plan.
        payload_of: returns the payload of the current micro-batch; given gates instead of rows (evaluation without
            ids), the projections compute all neurons and the gates close the pool.

    Raises:
        ConfigError: if a projection is not a plain linear layer, so that replacing it would bypass what it adds.
    """
    for linear in (*mlp.up, mlp.down):
        if not is_plain_linear(linear):
            raise ConfigError(
                f"a projection of {mlp.site.path} is a {type(linear).__name__}, which gathering would bypass; "
                "use compute='masked'"
            )
    width = mlp.site.width
    starts = (0, width) if mlp.is_fused else (0,)
    forwards: dict[nn.Module, Callable[[Tensor], Tensor]] = {}
    for linear in mlp.up:
        forwards[linear] = _gathered_up(linear, starts, width, num_shared, site, payload_of)
    forwards[mlp.down] = _gathered_down(mlp.down, num_shared, site, payload_of)
    return forwards


def _gathered_up(
    linear: nn.Module,
    starts: tuple[int, ...],
    width: int,
    num_shared: int,
    site: int,
    payload_of: Callable[[], Gates | Rows],
) -> Callable[[Tensor], Tensor]:
    transposed = is_transposed(linear)

    def forward(tokens: Tensor) -> Tensor:
        rows = payload_of()
        if isinstance(rows, Gates):
            return type(linear).forward(linear, tokens)  # type: ignore[no-any-return]
        weight, bias = _parameters(linear)
        weight = weight.t() if transposed else weight
        documents = rows.by_document(tokens)
        parts: list[Tensor] = []
        for start in starts:
            pool = slice(start + num_shared, start + width)
            kept = slice(start, start + num_shared)
            parts.append(functional.linear(tokens, weight[kept], None if bias is None else bias[kept]))
            owned = torch.bmm(documents, _pick(weight[pool], rows.sinks[site]).transpose(1, 2))
            if bias is not None:
                # Autocast hands out products in half precision but leaves the bias alone; the sum must not promote.
                owned = owned + bias[pool][rows.sinks[site]].unsqueeze(1).to(owned.dtype)
            parts.append(rows.by_token(owned, tokens))
        return torch.cat(parts, dim=-1)

    return forward


def _gathered_down(
    linear: nn.Module, num_shared: int, site: int, payload_of: Callable[[], Gates | Rows]
) -> Callable[[Tensor], Tensor]:
    transposed = is_transposed(linear)

    def forward(hidden: Tensor) -> Tensor:
        rows = payload_of()
        if isinstance(rows, Gates):
            gated = apply_gate(hidden, rows.gate(site, hidden))
            return type(linear).forward(linear, gated)  # type: ignore[no-any-return]
        weight, bias = _parameters(linear)
        columns = weight if transposed else weight.t()
        out = functional.linear(hidden[..., :num_shared], columns[:num_shared].t(), bias)
        owned = rows.by_document(hidden[..., num_shared:]) * rows.present.to(hidden.dtype)
        return out + rows.by_token(torch.bmm(owned, _pick(columns[num_shared:], rows.sinks[site])), out)

    return forward


def _pick(rows: Tensor, sinks: Tensor) -> Tensor:
    """Pick rows (P, D) by sinks (N, k): (N, k, D)."""
    return rows.index_select(0, sinks.reshape(-1)).view(*sinks.shape, rows.shape[-1])


def _parameters(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    return weight, bias if isinstance(bias, Tensor) else None
