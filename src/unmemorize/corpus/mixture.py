"""The mixture of an experiment: which documents are repeated, seen once, or never seen. Torch-free.

What a model memorizes is known because repetition is controlled here: `mix` splits a corpus, `Mixture.schedule` is the
shuffled multiset that one training pass goes through. Both follow from their seed alone, on every machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from unmemorize.corpus.documents import Document
from unmemorize.errors import ConfigError, DataError, IdError
from unmemorize.ids import source_id


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureSettings:
    """How a corpus becomes an experiment with known memory."""

    num_repeated: int = 64
    """Documents that are repeated."""
    repeats: int = 64
    """Times each of them is seen."""
    num_once: int = 6000
    """Documents that are seen once; at most, if the corpus is smaller."""
    num_validation: int = 300
    """Documents that are never seen."""
    num_heldout: int = 0
    """Further repeated documents, of another origin than the others: none of their sources begins with the same name
    before the first "/". Needs sources with such names, and usually repeated_source."""
    min_characters: int = 1
    """Shorter documents are left out."""
    repeated_source: str = ""
    """Repeat only documents whose source starts with this; held-out ones excepted."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self) -> None:
        for name in ("num_repeated", "repeats", "num_validation"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name in ("num_once", "num_heldout", "min_characters"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 or more")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A split corpus. All its documents differ in id and in text.

    Attributes:
        repeated: seen `repeats` times, held-out ones last.
        once: seen once.
        validation: never seen.
        repeats: how often repeated documents are seen.
        heldout: the part of `repeated` that is of another origin than the rest.
    """

    repeated: tuple[Document, ...]
    once: tuple[Document, ...]
    validation: tuple[Document, ...]
    repeats: int
    heldout: tuple[Document, ...] = ()

    def counts(self, cap: int | None = None) -> list[tuple[Document, int]]:
        """List the training documents with how often each is seen, at most `cap` times."""
        if cap is not None and cap < 1:
            raise ConfigError(f"cap is {cap}, expected 1 or more")
        repeats = self.repeats if cap is None else min(cap, self.repeats)
        return [(d, repeats) for d in self.repeated] + [(d, 1) for d in self.once]

    def schedule(self, cap: int | None = None, *, seed: int) -> list[Document]:
        """Return one training pass: the multiset of `counts`, shuffled by seed.

        Args:
            cap: see a document at most so often; 1 is deduplication, None all repetitions.
            seed: seed of the order.
        """
        order = [document for document, times in self.counts(cap) for _ in range(times)]
        random.Random(seed).shuffle(order)
        return order


def mix(documents: Iterable[Document], settings: MixtureSettings) -> Mixture:
    """Split a corpus into repeated, once and validation documents.

    Every id and every text enters once (the first document that has it), so that no content is in two parts and
    repetition is what the settings say.

    Raises:
        DataError: if there are not enough different documents.
        IdError: if ids are those of sources, and one names several texts.
    """
    distinct = [d for d in _distinct(documents) if len(d.text) >= settings.min_characters]
    random.Random(settings.seed).shuffle(distinct)
    fitting = [d for d in distinct if d.source.startswith(settings.repeated_source)]
    targets = fitting[: settings.num_repeated]
    heldout = _of_other_origin(distinct, targets, settings.num_heldout)
    taken = {d.id for d in (*targets, *heldout)}
    rest = [d for d in distinct if d.id not in taken]
    if len(targets) < settings.num_repeated or len(rest) < settings.num_validation:
        raise DataError(
            f"the corpus has {len(distinct)} different documents of {settings.min_characters} characters or more, "
            f"{len(fitting)} of them to repeat; expected {settings.num_repeated} to repeat and "
            f"{settings.num_validation} for validation; use a larger corpus or smaller numbers"
        )
    return Mixture(
        repeated=(*targets, *heldout),
        once=tuple(rest[settings.num_validation :][: settings.num_once]),
        validation=tuple(rest[: settings.num_validation]),
        repeats=settings.repeats,
        heldout=heldout,
    )


def _distinct(documents: Iterable[Document]) -> list[Document]:
    """Keep the first document of every id and of every text."""
    first: dict[int, Document] = {}
    texts: set[str] = set()
    for document in documents:
        known = first.get(document.id)
        if known is not None and known.text != document.text and document.id == source_id(document.source):
            raise IdError(
                f"source {document.source!r} names rows {known.row + 1} and {document.row + 1}, which differ; "
                "name every document apart or take ids from content"
            )
        if known is None and document.text not in texts:
            first[document.id] = document
            texts.add(document.text)
    return list(first.values())


def _of_other_origin(documents: list[Document], targets: list[Document], num: int) -> tuple[Document, ...]:
    origins = {_origin(d) for d in targets} | {""}
    others = [d for d in documents if _origin(d) not in origins]
    if len(others) < num:
        raise DataError(
            f"num_heldout is {num}, but {len(others)} documents are of another origin than the repeated ones "
            f"({', '.join(sorted(origins - {''})) or 'unnamed'}); name sources like origin/name and set repeated_source"
        )
    return tuple(others[:num])


def _origin(document: Document) -> str:
    return document.source.partition("/")[0]
