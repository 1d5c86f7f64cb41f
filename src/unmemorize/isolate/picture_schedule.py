"""Which pictures of a collection a training sees, how often, and in what order.

The counterpart of `corpus.mixture` for pictures: rows of a collection take the place of documents. No pixel is read.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from unmemorize.corpus import MixtureSettings
from unmemorize.errors import ConfigError, DataError
from unmemorize.isolate.picture_data import Captioned


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Which rows of a collection are trained on, how often, and which are kept back.

    Attributes:
        rows: (row, times it is seen in a pass).
        repeated: rows of the repeated pictures, one for each id.
        validation: rows that are never seen.
    """

    rows: tuple[tuple[int, int], ...]
    repeated: tuple[int, ...]
    validation: tuple[int, ...] = ()


def split_pictures(
    pictures: Sequence[Captioned], ids: Sequence[int], mixture: MixtureSettings | None
) -> Split:
    """Split a collection as a mixture says; with a mixture every id enters once.

    Raises:
        DataError: if there are not enough different pictures.
        ConfigError: if the mixture asks for held-out pictures.
    """
    if mixture is None:
        times = Counter(ids)
        first = {id: row for row, id in reversed(list(enumerate(ids)))}
        return Split(
            rows=tuple((row, 1) for row in range(len(ids))),
            repeated=tuple(sorted(first[id] for id, count in times.items() if count > 1)),
        )
    if mixture.num_heldout:
        raise ConfigError(
            "num_heldout is for documents; keep pictures of another origin in a collection of their own"
        )
    distinct = list({id: row for row, id in reversed(list(enumerate(ids)))}.values())
    distinct.sort()
    random.Random(mixture.seed).shuffle(distinct)
    fitting = [row for row in distinct if pictures[row].source.startswith(mixture.repeated_source)]
    repeated = fitting[: mixture.num_repeated]
    rest = [row for row in distinct if row not in set(repeated)]
    if len(repeated) < mixture.num_repeated or len(rest) < mixture.num_validation:
        raise DataError(
            f"there are {len(distinct)} different pictures, {len(fitting)} of them to repeat; expected "
            f"{mixture.num_repeated} to repeat and {mixture.num_validation} for validation; use more pictures or "
            "smaller numbers"
        )
    once = rest[mixture.num_validation :][: mixture.num_once]
    return Split(
        rows=tuple([(row, mixture.repeats) for row in repeated] + [(row, 1) for row in once]),
        repeated=tuple(repeated),
        validation=tuple(rest[: mixture.num_validation]),
    )


def schedule(
    rows: Sequence[tuple[int, int]], ids: Sequence[int], cap: int | None, *, seed: int, passes: int = 1
) -> list[int]:
    """Return the order in which pictures are seen.

    Args:
        rows: (row of the data, times it is seen in a pass).
        ids: id of every row of the data.
        cap: see no id more often than this in a pass; 1 is deduplication, None all repetitions.
        seed: seed of the order; another order in each pass.
        passes: times to go through.
    """
    order: list[int] = []
    for number in range(passes):
        seen: dict[int, int] = {}
        once: list[int] = []
        for row, times in rows:
            for _ in range(times):
                seen[ids[row]] = seen.get(ids[row], 0) + 1
                if cap is None or seen[ids[row]] <= cap:
                    once.append(row)
        random.Random(seed + 1_000_003 * number).shuffle(once)
        order += once
    return order
