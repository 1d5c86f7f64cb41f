"""Files of tensors: what is written comes back, and what is not ours is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unmemorize.errors import FileFormatError, RunFolderError
from unmemorize.tensor_files import read_tensors, write_tensors

FORMAT = {"format": "unmemorize.example", "version": 2}


def test_tensors_and_header_come_back(tmp_path: Path) -> None:
    wide = torch.arange(6, dtype=torch.float64).view(2, 3)
    tensors = {"strided": wide.t(), "shared": wide, "half": torch.ones(2, dtype=torch.bfloat16)}
    path = write_tensors(
        tmp_path / "a" / "b.safetensors", tensors, **FORMAT, header={"count": 3, "names": ["é"]}
    )
    header, found = read_tensors(path, **FORMAT, what="examples")
    assert header["count"] == 3 and header["names"] == ["é"] and header["format_version"] == 2
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    assert [file.name for file in path.parent.iterdir()] == ["b.safetensors"]


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "x", {"a": torch.zeros(1)}, **FORMAT, header={})
    again = "make the examples again"
    with pytest.raises(FileFormatError, match=f"of version 3 \\(found 'unmemorize.example' 2\\); {again}"):
        read_tensors(path, format="unmemorize.example", version=3, what="examples")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain")
    with pytest.raises(FileFormatError, match=f"found None None\\); {again}"):
        read_tensors(tmp_path / "plain", **FORMAT, what="examples")
    for text in ("[]", "{", '"word"'):
        save_file({"a": torch.zeros(1)}, tmp_path / "odd", metadata={"unmemorize": text})
        with pytest.raises(FileFormatError, match="cannot read examples from .* or make it again"):
            read_tensors(tmp_path / "odd", **FORMAT, what="examples")
    (tmp_path / "torn").write_bytes(path.read_bytes()[:-1])
    for name in ("torn", "missing"):
        with pytest.raises(FileFormatError, match="cannot read examples from .* or make it again"):
            read_tensors(tmp_path / name, **FORMAT, what="examples")


def test_nothing_is_left_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="free space or choose another folder"):
        write_tensors(tmp_path / "file" / "x", {"a": torch.zeros(1)}, **FORMAT, header={})
