"""What every family's removal shares: the manifest beside a model, and a process without this library."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import SelfCheckFailed
from unmemorize.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

    from unmemorize.neurons import NeuronSet

REMOVAL_FORMAT = "unmemorize.removal"
REMOVAL_VERSION = 1


def manifest_of(way: str, model_id: str, neurons: NeuronSet) -> dict[str, Any]:
    """Say which neurons of which model were removed and how, for `unmemorize.json`."""
    indices = {site.path: list(chosen) for site, chosen in neurons.indices.items()}
    return {"way": way, "model": model_id, "num_neurons": len(neurons), "neurons": indices}


def write_manifest(folder: Path, manifest: dict[str, Any], result: str) -> None:
    """Write `unmemorize.json`: what was done, and the fingerprint of what came out."""
    header = {"format": REMOVAL_FORMAT, "format_version": REMOVAL_VERSION}
    write_json(folder / "unmemorize.json", {**header, **manifest, "result": result})


@contextmanager
def kept_if_proved(folder: str | Path, undo: str | Path | None = None) -> Iterator[None]:
    """Take a folder that was just written, and its undo file, away again if the block that proves it does not end.

    So a removal that is interrupted in its proof can be asked for again, and no folder lies there unproved.
    """
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if undo is not None:
            Path(undo).unlink(missing_ok=True)
        raise


def in_plain_process(script: str, folder: str | Path, arguments: Sequence[str]) -> dict[str, Tensor]:
    """Run a script in a process in which `import unmemorize` fails, and return the tensors it saves.

    Args:
        script: Python code; its arguments are the folder, `arguments`, and the safetensors file to write.
        folder: a model folder.
        arguments: further arguments.

    Raises:
        SelfCheckFailed: if the script fails, so that the folder does not load without this library.
    """
    from safetensors.torch import load_file

    script = f'import sys\nsys.modules["unmemorize"] = None\n{script}'
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.safetensors"
        done = subprocess.run(
            [sys.executable, "-c", script, str(folder), *arguments, str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines()
            raise SelfCheckFailed(
                f"{folder} does not load without unmemorize: {lines[-1] if lines else 'no message'}"
            )
        return load_file(out)
