"""Long passages that two collections of text share: the check that ordinary text is not the text to be removed.

Two texts share a passage if 13 words in a row are the same, without regard to case (a shorter text: all its words).
Thirteen is what Brown et al. 2020 took for overlap of training and test text. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from unmemorize.errors import ConfigError, DataError

NUM_WORDS = 13


def require_no_passage(
    targets: Sequence[str], ordinary: Sequence[str], *, num_words: int = NUM_WORDS
) -> None:
    """Check that no ordinary text repeats a passage of a target.

    Args:
        targets: texts that are to go.
        ordinary: texts that stand for everything else.
        num_words: words in a row that count as a passage.

    Raises:
        ConfigError: if a passage has no words.
        DataError: if a passage is in both; the message shows where.
    """
    found = list(shared_passages(targets, ordinary, num_words=num_words))
    if found:
        number, owner, passage = found[0]
        which = ", ".join(str(number + 1) for number, *_ in found[:10]) + (" ..." if len(found) > 10 else "")
        raise DataError(
            f"{len(found)} of {len(ordinary)} ordinary texts share a passage with a target (numbers {which}; "
            f"{number + 1} shares {passage[:60]!r} with target {owner + 1}); take them out, or the edit is measured "
            "against what it removes"
        )


def shared_passages(
    targets: Sequence[str], ordinary: Sequence[str], *, num_words: int = NUM_WORDS
) -> Iterator[tuple[int, int, str]]:
    """Yield for each ordinary text that repeats a passage of a target: its number, the target's, and the passage.

    Raises:
        ConfigError: if a passage has no words.
    """
    if num_words < 1:
        raise ConfigError(f"num_words is {num_words}, expected 1 or more")
    owners = {
        passage: number for number, text in enumerate(targets) for passage in _passages(text, num_words)
    }
    lengths = sorted({len(passage) for passage in owners})
    for number, text in enumerate(ordinary):
        words = tuple(text.lower().split())
        passages = (
            words[start : start + length] for length in lengths for start in range(len(words) - length + 1)
        )
        found = next((passage for passage in passages if passage in owners), None)
        if found is not None:
            yield number, owners[found], " ".join(found)


def _passages(text: str, num_words: int) -> Iterator[tuple[str, ...]]:
    words = tuple(text.lower().split())
    length = min(num_words, len(words))
    if length:
        yield from (words[start : start + length] for start in range(len(words) - length + 1))
