"""Files of tensors of ours: safetensors with a checked JSON header, written whole or not at all. Data only.

    metadata = {"unmemorize": {"format": ..., "format_version": ..., and what the format adds}}

Weights of models are not handled here; their own libraries write them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unmemorize.errors import FileFormatError
from unmemorize.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

_KEY = "unmemorize"


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, format: str, version: int, header: Mapping[str, Any]
) -> Path:
    """Write tensors and their header as one file.

    Args:
        path: destination; missing parent folders are made.
        tensors: name -> tensor of any shape and dtype; strided ones are copied.
        format: name of the format.
        version: its version.
        header: whatever else JSON can store.

    Raises:
        RunFolderError: if the file cannot be written.
    """
    from safetensors.torch import save

    value = {"format": format, "format_version": version, **header}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return write_atomic(path, save(plain, metadata={_KEY: json.dumps(value, allow_nan=False)}))


def read_tensors(
    path: str | Path, *, format: str, version: int, what: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read header and tensors of a file written by `write_tensors`.

    Args:
        path: the file.
        format: name of the format.
        version: the version that is read.
        what: what the file holds, for messages ("activation statistics").

    Raises:
        FileFormatError: if the file is missing, torn, or of another format or version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get(_KEY, "{}"))
            found = (header.get("format"), header.get("format_version"))
            is_ours = found == (format, version)
            names = list(stream.keys()) if is_ours else []
            tensors = {name: stream.get_tensor(name) for name in names}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise FileFormatError(
            f"cannot read {what} from {path} ({error}); pass the right file, or make it again"
        ) from error
    if not is_ours:
        raise FileFormatError(
            f"{path} is not a {format} file of version {version} (found {found[0]!r} {found[1]!r}); "
            f"make the {what} again"
        )
    return header, tensors
