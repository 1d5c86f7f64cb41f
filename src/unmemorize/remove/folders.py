"""What every family's removal shares: a model folder that appears whole, and a process without this library."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import RunFolderError, SelfCheckFailed
from unmemorize.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

REMOVAL_FORMAT = "unmemorize.removal"
REMOVAL_VERSION = 1


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Give a place to write to, and move it to its destination when the block has ended without an error.

    Raises:
        RunFolderError: if the destination holds something, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} already holds something; choose a new folder or empty it")
    partial: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".partial"))
        yield partial
        partial.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
        partial = None
    except OSError as error:
        raise RunFolderError(
            f"cannot write {folder}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def write_manifest(folder: Path, manifest: dict[str, Any], result: str) -> None:
    """Write `unmemorize.json`: what was done, and the fingerprint of what came out."""
    header = {"format": REMOVAL_FORMAT, "format_version": REMOVAL_VERSION}
    write_json(folder / "unmemorize.json", {**header, **manifest, "result": result})


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
