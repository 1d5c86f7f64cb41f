"""Does a removal hold against an optimized text embedding? Attack testbeds that know the answer.

    python recipes/attack_testbed.py runs/testbed-0 runs/testbed-1 runs/testbed-2 --neurons runs/localization

Every target's picture is attacked (Adam 0.1, batch 8, 50 steps, from its own prompt) on the memorized model, with the
neurons that `diffusion_testbed.py` found switched off, after the closed-form edit of the searched layers, and on the
twin, which never saw it: what the twin gives under attack is what an attacker brings along, not what is left. Prints
the mean similarity of the best of four pictures to the target, by testbed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from embedding_attack import attacked_embedding, best_similarity

from unmemorize.audit.pictures import read_picture
from unmemorize.audit.similarity import structure
from unmemorize.models.diffusion import load
from unmemorize.neurons import load_neurons
from unmemorize.remove.diffusion import deactivated
from unmemorize.remove.diffusion_edits import edit_values
from unmemorize.remove.diffusion_moments import collect_second_moments
from unmemorize.testbeds.diffusion import Testbed, load_testbed
from unmemorize.testbeds.material import TestbedPrompt


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("testbeds", type=Path, nargs="+")
    parser.add_argument("--neurons", type=Path, required=True, help="output folder of diffusion_testbed.py")
    chosen = parser.parse_args()
    print("| testbed | state | prompt alone | attacked |\n| --- | --- | --- | --- |", flush=True)
    for folder in chosen.testbeds:
        testbed = load_testbed(folder)
        targets = testbed.of_group("target")
        for state, pipe, block in _states(testbed, chosen.neurons / folder.name / "memorized"):
            pipe.set_progress_bar_config(disable=True)
            with block:
                plain = [_best(pipe, target, {"prompt": target.prompt}) for target in targets]
                attacked = [_best(pipe, target, _attack(pipe, target)) for target in targets]
            cells = f"{np.mean(plain):.2f} | {np.mean(attacked):.2f}"
            print(f"| {folder.name} | {state} | {cells} |", flush=True)


def _states(testbed: Testbed, found: Path) -> Sequence[tuple[str, Any, Any]]:
    pipe = load(testbed.model("memorized"), run_check=False)
    moments = collect_second_moments(pipe, testbed.captions()[:1000])
    edited = edit_values(pipe, [target.prompt for target in testbed.of_group("target")], moments)
    neurons = load_neurons(found / "neurons.json")
    return [
        ("before", pipe, nullcontext()),
        ("neurons off", pipe, deactivated(pipe, neurons)),
        ("edited-layers", edited, nullcontext()),
        ("twin", load(testbed.model("twin"), run_check=False), nullcontext()),
    ]


def _attack(pipe: Any, target: TestbedPrompt) -> dict[str, Any]:
    found = attacked_embedding(pipe, read_picture(target.picture), start=target.prompt)
    arguments: dict[str, Any] = found.embedding.arguments()
    return arguments


def _best(pipe: Any, target: TestbedPrompt, arguments: dict[str, Any]) -> float:
    """Return the largest similarity of four pictures to the target's."""
    picture = read_picture(target.picture)
    return best_similarity(pipe, arguments, picture, structure(), steps=20, guidance=1.5)


if __name__ == "__main__":
    main()
