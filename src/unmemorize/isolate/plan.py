"""Plans: which sinks an id owns. Computed from a seed, never stored, and the same everywhere.

Scheme `keyed` (default) draws exactly k of the P sinks of a site for every id (`drawing.py`). Scheme `disjoint` gives
every registered source a slice of its own. Scheme `published` is the hash of the MemSinks release, whose defects are
refused unless asked for.

Source: MemSinks, arXiv 2507.09937; schemes `keyed` and `disjoint` are ours.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from unmemorize.errors import ConfigError, FileFormatError, IdError, PoolExhausted
from unmemorize.files import read_json, write_json
from unmemorize.ids import ID_MAX
from unmemorize.isolate.drawing import draw, mix, published_mask, require_ids, require_sound_published_ids
from unmemorize.neurons import NeuronSet, Side, Site

PLAN_FORMAT = "unmemorize.plan"
PLAN_VERSION = 1

Scheme = Literal["keyed", "disjoint", "published"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkSettings:
    """How sinks are laid out. Defaults are the paper's (MemSinks, section 5: g 0.7, p 0.3) under our keyed hash."""

    scheme: Scheme = "keyed"
    """keyed, disjoint or published."""
    share_frac: float = 0.7
    """Share of the existing neurons of a site that stay always on, 0..1; the rest is carved into the pool."""
    grown: int = 0
    """Fresh sinks per site in addition, appended by `grow`."""
    active_frac: float | None = 0.3
    """Share of the pool that an id owns, 0..1; give this or `sinks_per_id`."""
    sinks_per_id: int | None = None
    """Number of sinks per id and site; give this or `active_frac`."""
    per_layer: bool = False
    """Whether an id owns different sinks in different layers. The paper uses the same everywhere."""
    layers: tuple[int, ...] | None = None
    """Layers that get sinks, counted from 0; all by default."""
    seed: int = 0
    """Seed of the keyed hash."""
    id_bits: Literal[32, 64] = 64
    """Integer width of the published hash; 32 reproduces the collapse to 65,536 masks."""
    allow_degenerate: bool = False
    """Whether the published scheme may be given ids for which its hash breaks down."""

    def __post_init__(self) -> None:
        if self.scheme not in ("keyed", "disjoint", "published"):
            raise ConfigError(f"unknown scheme {self.scheme!r}; expected keyed, disjoint or published")
        if not 0.0 <= self.share_frac <= 1.0:
            raise ConfigError(
                f"share_frac is {self.share_frac}, expected 0 to 1; give the share of neurons always on"
            )
        if self.grown < 0:
            raise ConfigError(f"grown is {self.grown}, expected 0 or more fresh sinks per site")
        if self.share_frac == 1.0 and self.grown == 0:
            raise ConfigError(
                "share_frac 1 without grown sinks leaves no pool; lower share_frac or set grown"
            )
        if (self.active_frac is None) == (self.sinks_per_id is None):
            raise ConfigError("give either active_frac or sinks_per_id, not both and not neither")
        if self.active_frac is not None and not 0.0 < self.active_frac <= 1.0:
            raise ConfigError(f"active_frac is {self.active_frac}, expected above 0 and at most 1")
        if self.sinks_per_id is not None and self.sinks_per_id < 1:
            raise ConfigError(f"sinks_per_id is {self.sinks_per_id}, expected 1 or more")
        if self.id_bits not in (32, 64):
            raise ConfigError(f"id_bits is {self.id_bits}, expected 32 or 64")
        if self.scheme == "published" and (self.active_frac is None or self.per_layer):
            raise ConfigError(
                "the published scheme draws each sink with active_frac, alike in all layers; "
                "drop sinks_per_id and per_layer, or use scheme keyed"
            )


@dataclass(frozen=True, slots=True)
class SinkSite:
    """Sinks at one site.

    Attributes:
        site: the whole site, shared neurons and pool.
        num_shared: neurons 0 .. num_shared - 1 are always on; the rest is the pool.
        num_sinks: sinks that an id owns here (expected number under the published scheme).
    """

    site: Site
    num_shared: int
    num_sinks: int

    def __post_init__(self) -> None:
        if not 0 <= self.num_shared < self.site.width:
            raise ConfigError(
                f"{self.site.path} has {self.site.width} neurons of which {self.num_shared} are shared: no pool; "
                "lower share_frac or grow sinks"
            )
        if not 1 <= self.num_sinks <= self.num_pool:
            raise ConfigError(
                f"an id would own {self.num_sinks} sinks of a pool of {self.num_pool} at {self.site.path}; "
                "expected 1 up to the pool's size"
            )

    @property
    def num_pool(self) -> int:
        """Number of sinks at the site."""
        return self.site.width - self.num_shared


@dataclass(frozen=True, slots=True)
class SinkPlan:
    """Id -> sinks, for every site of one architecture.

    Attributes:
        model_id: architecture the plan was made for (`models.language.signature`).
        scheme, seed, per_layer, active_frac, id_bits, allow_degenerate: as in `SinkSettings`.
        sites: where the sinks are.
        sources: registered ids in order, for the disjoint scheme; empty otherwise.
    """

    model_id: str
    scheme: Scheme
    seed: int
    sites: tuple[SinkSite, ...]
    per_layer: bool = False
    active_frac: float | None = None
    id_bits: Literal[32, 64] = 64
    allow_degenerate: bool = False
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.sites:
            raise ConfigError("a plan needs at least one site; choose layers that exist")
        if self.sources and self.scheme != "disjoint":
            raise ConfigError(
                f"a {self.scheme} plan registers no sources; every id owns sinks, use scheme disjoint"
            )
        for source in self.sources:
            if not 1 <= source <= ID_MAX:
                raise IdError(f"source id {source} is out of range, expected 1 to 2**63 - 1")
        if len(set(self.sources)) != len(self.sources):
            raise IdError("a source is registered twice; every id may appear once")
        for place in self.sites:
            if len(self.sources) * place.num_sinks > place.num_pool and self.scheme == "disjoint":
                raise PoolExhausted(
                    f"{len(self.sources)} sources of {place.num_sinks} sinks need "
                    f"{len(self.sources) * place.num_sinks} sinks, the pool at {place.site.path} has "
                    f"{place.num_pool}; grow the pool or use fewer sinks per id"
                )

    @property
    def has_exact_count(self) -> bool:
        """Whether every id owns exactly `num_sinks` sinks per site; false for the published hash."""
        return self.scheme != "published"

    @property
    def is_uniform(self) -> bool:
        """Whether one draw serves all sites: equal pools, and not different per layer."""
        sizes = {(place.num_pool, place.num_sinks) for place in self.sites}
        return len(sizes) == 1 and not self.per_layer

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that name the plan; equal for plans that give equal sinks."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def with_sources(self, ids: tuple[int, ...]) -> SinkPlan:
        """Return the plan with these ids registered after the present ones (disjoint scheme).

        Raises:
            PoolExhausted: if the pool has no slices left for them.
            IdError: if an id is out of range or named twice.
            ConfigError: if the plan's scheme is another.
        """
        return replace(self, sources=self.sources + tuple(i for i in ids if i not in set(self.sources)))

    def sinks(self, ids: Tensor, site: int = 0) -> Tensor:
        """Return the sinks that ids own at a site.

        Args:
            ids: shape (N,), int64, each in 1 .. 2**63 - 1.
            site: position in `sites`.

        Returns:
            Shape (N, num_sinks), int64, positions in the pool (0 is the first sink), distinct within a row.

        Raises:
            IdError: if an id is out of range, or unknown to a disjoint plan.
            ConfigError: under the published scheme, whose ids own varying numbers of sinks; use `mask`.
        """
        place = self.sites[site]
        require_ids(ids)
        if self.scheme == "published":
            raise ConfigError("ids own varying numbers of sinks under the published scheme; use mask()")
        if self.scheme == "disjoint":
            first = self._slots(ids) * place.num_sinks
            return first[:, None] + torch.arange(place.num_sinks, device=ids.device)
        return draw(ids, self._key(site), place.num_pool, place.num_sinks)

    def mask(self, ids: Tensor, site: int = 0) -> Tensor:
        """Return who owns what at a site: shape (N, num_pool), bool.

        Raises:
            IdError: as `sinks`; also for ids at which the published hash breaks down, unless allowed.
        """
        place = self.sites[site]
        if self.scheme == "published":
            require_ids(ids)
            assert self.active_frac is not None
            if not self.allow_degenerate:
                require_sound_published_ids(ids, self.id_bits)
            return published_mask(ids, place.num_pool, self.active_frac, id_bits=self.id_bits)
        mask = torch.zeros(len(ids), place.num_pool, dtype=torch.bool, device=ids.device)
        return mask.scatter_(1, self.sinks(ids, site), True)

    def ownership_frac(self, site: int = 0) -> Tensor:
        """Return the share of ids that own each sink of a site: shape (num_pool,), float32, 0..1."""
        place = self.sites[site]
        if self.scheme == "disjoint" and self.sources:
            return self.mask(torch.tensor(self.sources, dtype=torch.int64), site).float().mean(0)
        if self.scheme == "published":
            assert self.active_frac is not None
            return torch.full((place.num_pool,), self.active_frac)
        return torch.full((place.num_pool,), place.num_sinks / place.num_pool)

    def neurons_for(self, ids: int | list[int]) -> NeuronSet:
        """Return all sinks that one id, or any of several ids, owns."""
        wanted = torch.tensor([ids] if isinstance(ids, int) else list(ids), dtype=torch.int64)
        indices: dict[Site, tuple[int, ...]] = {}
        for number, place in enumerate(self.sites):
            owned = self.mask(wanted, number).any(0).nonzero().squeeze(1)
            indices[place.site] = tuple((owned + place.num_shared).tolist())
        return NeuronSet(self.model_id, indices)

    def pool(self) -> NeuronSet:
        """Return every sink of every site."""
        indices = {p.site: tuple(range(p.num_shared, p.site.width)) for p in self.sites}
        return NeuronSet(self.model_id, indices)

    def placebo(self, *, seed: int) -> NeuronSet:
        """Draw random shared neurons to close instead of an id's sinks, at each site as many as it owns there.

        The control of closing a pool: with an id's own sinks open, as many neurons go off, but others. Where fewer
        neurons are shared than an id owns sinks, all of them are drawn.

        Args:
            seed: seed of the draw.

        Source: ours.
        """
        generator = random.Random(seed)
        indices = {
            p.site: tuple(generator.sample(range(p.num_shared), min(p.num_sinks, p.num_shared)))
            for p in self.sites
        }
        return NeuronSet(self.model_id, indices)

    def foreign_ids(self, ids: Tensor, candidates: Tensor | None = None) -> Tensor:
        """Return another id for each id, for the placebo state.

        Args:
            ids: shape (N,), int64.
            candidates: ids to choose from, shape (M,), so that the foreign sinks are trained ones; by default the
                registered sources of a disjoint plan, else an id made from the id itself.

        Returns:
            Shape (N,), int64; never an id's own value. Deterministic.
        """
        if candidates is None and self.scheme == "disjoint":
            candidates = torch.tensor(self.sources, dtype=torch.int64, device=ids.device)
        if candidates is None:
            other = mix(ids ^ 0x5DEECE66D) & ID_MAX
            other = other % (1 << 14) + 1 if self.scheme == "published" else other.clamp(min=1)
            return torch.where(other == ids, other % 16384 + 1, other)
        candidates = torch.unique(candidates)
        if len(candidates) < 2:
            raise IdError("a foreign id needs at least two candidates; pass more ids or leave candidates out")
        chosen = (mix(ids) & ID_MAX) % len(candidates)
        clash = candidates[chosen] == ids
        return candidates[torch.where(clash, (chosen + 1) % len(candidates), chosen)]

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON (format `unmemorize.plan`), atomically."""
        sites = [{**asdict(p.site), "num_shared": p.num_shared, "num_sinks": p.num_sinks} for p in self.sites]
        value: dict[str, Any] = {"format": PLAN_FORMAT, "format_version": PLAN_VERSION}
        value |= {name: getattr(self, name) for name in _PLAN_FIELDS}
        return write_json(
            path, {**value, "sources": list(self.sources), "sites": sites, "digest": self.digest}
        )

    def _key(self, site: int) -> int:
        place = self.sites[site]
        where = f"{site}" if self.per_layer else ""
        text = f"unmemorize.keyed.1:{self.seed}:{where}:{place.num_pool}:{place.num_sinks}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)

    def _slots(self, ids: Tensor) -> Tensor:
        registered = torch.tensor(self.sources, dtype=torch.int64, device=ids.device)
        order = registered.argsort()
        ranked = registered[order]
        place = torch.searchsorted(ranked, ids).clamp(max=max(len(ranked) - 1, 0))
        if len(ids) and (not len(ranked) or not torch.equal(ranked[place], ids)):
            unknown = [i for i in ids.tolist() if i not in set(self.sources)][:3]
            raise IdError(
                f"ids {unknown} are not registered in this disjoint plan; register them with with_sources"
            )
        return order[place]


_PLAN_FIELDS = ("model_id", "scheme", "seed", "per_layer", "active_frac", "id_bits", "allow_degenerate")


def make_plan(
    sites: list[Site], original_widths: list[int], model_id: str, settings: SinkSettings
) -> SinkPlan:
    """Lay a plan over sites.

    Args:
        sites: the sites as they are, grown sinks included.
        original_widths: their widths before growing.
        model_id: architecture signature.
        settings: the layout.

    Raises:
        ConfigError: if a layer does not exist, or a pool is smaller than the sinks an id should own.
    """
    layers = tuple(range(len(sites))) if settings.layers is None else settings.layers
    if not layers or any(not 0 <= layer < len(sites) for layer in layers) or len(set(layers)) != len(layers):
        raise ConfigError(
            f"layers {list(layers)} do not fit a model of {len(sites)} layers; count from 0, each once"
        )
    places: list[SinkSite] = []
    for layer in sorted(layers):
        num_shared = int(original_widths[layer] * settings.share_frac)
        num_pool = sites[layer].width - num_shared
        wanted = settings.sinks_per_id
        if wanted is None:
            assert settings.active_frac is not None
            wanted = max(1, round(num_pool * settings.active_frac))
        places.append(SinkSite(sites[layer], num_shared, wanted))
    return SinkPlan(
        model_id=model_id,
        scheme=settings.scheme,
        seed=settings.seed,
        sites=tuple(places),
        per_layer=settings.per_layer,
        active_frac=None if settings.active_frac is None else float(settings.active_frac),
        id_bits=settings.id_bits,
        allow_degenerate=settings.allow_degenerate,
    )


class _SinkSiteRecord(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    path: str
    side: Side
    width: int
    start: int
    num_shared: int
    num_sinks: int


class PlanFile(BaseModel):
    """The schema of a plan file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["unmemorize.plan"]
    format_version: Literal[1]
    model_id: str
    scheme: Scheme
    seed: int
    per_layer: bool
    active_frac: float | None
    id_bits: Literal[32, 64]
    allow_degenerate: bool
    sources: list[int]
    sites: list[_SinkSiteRecord]
    digest: str


def load_plan(path: str | Path) -> SinkPlan:
    """Read a plan saved by `SinkPlan.save`.

    Raises:
        FileFormatError: if the file is missing, torn, of another version, or changed since it was written.
    """
    value = read_json(path, format=PLAN_FORMAT, version=PLAN_VERSION)
    try:
        record = PlanFile.model_validate(value)
        sites = tuple(
            SinkSite(Site(s.path, s.side, s.width, s.start), s.num_shared, s.num_sinks) for s in record.sites
        )
        fields = {name: getattr(record, name) for name in _PLAN_FIELDS}
        plan = SinkPlan(sites=sites, sources=tuple(record.sources), **fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(f"{path} does not fit the plan format at {place}: {first['msg']}") from error
    except (ConfigError, IdError) as error:
        raise FileFormatError(f"{path} holds an impossible plan: {error}") from error
    if plan.digest != record.digest:
        raise FileFormatError(
            f"{path} was changed after it was written (digest {plan.digest}, file says {record.digest}); "
            "use the original plan"
        )
    return plan
