"""The verbs of the command line, in the order of `--help`.

    training.py, localizing.py, memory.py    what a user may say, handed to the family that the model belongs to
    all other files                          from options to the library, by family

A verb prints nothing; `cli.py` does. Heavy libraries are imported inside the verbs, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable

from unmemorize.verbs.answers import Answer
from unmemorize.verbs.localizing import check, localize
from unmemorize.verbs.memory import audit, remove, report
from unmemorize.verbs.training import demo, ids, plan, testbed, train

__all__ = ["VERBS", "Answer"]

VERBS: dict[str, Callable[..., Answer]] = {
    "demo": demo,
    "train": train,
    "localize": localize,
    "audit": audit,
    "remove": remove,
    "report": report,
    "plan": plan,
    "check": check,
    "ids": ids,
    "testbed": testbed,
}
