"""Checkpoints: the round trip is exact, a folder is complete or absent, and a wrong one is refused by name."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from unmemorize.errors import CheckpointMismatch, FileFormatError, RunFolderError
from unmemorize.isolate.checkpoints import Standing, load_checkpoint, newest_checkpoint, write_checkpoint

IDENTITY = {"settings": "a", "data": "b", "plan": "none"}


class Tied(torch.nn.Module):
    """A model with a tied weight and a buffer."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(5, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.zeros(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def made(seed: int = 0, steps: int = 3, width: int = 3) -> tuple[Tied, torch.optim.AdamW]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Tied(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        advance(model, optimizer, step)
    return model, optimizer


def advance(model: Tied, optimizer: torch.optim.AdamW, step: int) -> None:
    model(torch.tensor([step % 5])).logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.count += 1


def written(folder: Path) -> Path:
    model, optimizer = made()
    return write_checkpoint(folder, model, optimizer, Standing(step=3, tokens=30, train_s=1.5), IDENTITY)


def test_training_continues_bit_for_bit(tmp_path: Path) -> None:
    straight, straight_optimizer = made(steps=6)
    path = written(tmp_path)
    model, optimizer = made(seed=1, steps=0)
    standing = load_checkpoint(path, model, optimizer, IDENTITY)
    assert standing == Standing(step=3, tokens=30, train_s=1.5)
    for step in range(3, 6):
        advance(model, optimizer, step)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert model.head.weight is model.embed.weight
    assert float(straight_optimizer.state[straight.norm.weight]["step"]) == 6
    assert float(optimizer.state[model.norm.weight]["step"]) == 6


def test_a_loaded_optimizer_keeps_its_own_settings(tmp_path: Path) -> None:
    path = written(tmp_path)
    model, _ = made(steps=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    load_checkpoint(path, model, optimizer, IDENTITY)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_only_the_newest_complete_checkpoint_stays(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / ".partial-00000009").mkdir()
    model, optimizer = made(steps=4)
    newest = write_checkpoint(tmp_path, model, optimizer, Standing(step=10), IDENTITY)
    assert newest_checkpoint(tmp_path) == newest
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]
    assert sorted(path.name for path in newest.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


def test_a_half_written_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / ".partial-00000003").mkdir()
    assert newest_checkpoint(tmp_path) is None
    assert newest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damage_is_named_and_changes_nothing(tmp_path: Path, name: str, damage: str) -> None:
    path = written(tmp_path)
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes(data[:-7] if damage == "truncated" else data)
    model, optimizer = made(seed=1, steps=0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(FileFormatError) as caught:
        load_checkpoint(path, model, optimizer, IDENTITY)
    assert name in str(caught.value)
    assert f"delete {path} to start this model over" in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert not optimizer.state


def test_a_torn_state_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text[: len(text) // 2])
    with pytest.raises(FileFormatError, match="state.json is not complete JSON"):
        load_checkpoint(path, *made(), IDENTITY)


@pytest.mark.parametrize("gone", ["step", "identity"])
def test_a_state_file_without_a_field_is_named(tmp_path: Path, gone: str) -> None:
    path = written(tmp_path)
    state = json.loads((path / "state.json").read_text())
    del state[gone]
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(FileFormatError, match=gone):
        load_checkpoint(path, *made(), IDENTITY)


@pytest.mark.parametrize("part", ["settings", "data", "plan"])
def test_a_checkpoint_of_another_training_is_refused_by_part(tmp_path: Path, part: str) -> None:
    path = written(tmp_path)
    with pytest.raises(CheckpointMismatch, match=f"belongs to another training: {part} is"):
        load_checkpoint(path, *made(), {**IDENTITY, part: "other"})


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(CheckpointMismatch, match="belongs to another model: embed.weight differs"):
        load_checkpoint(path, *made(width=4), IDENTITY)
    linear = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointMismatch, match="belongs to another model: bias differs"):
        load_checkpoint(path, linear, torch.optim.AdamW(linear.parameters()), IDENTITY)  # type: ignore[arg-type]


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = written(tmp_path)

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RunFolderError, match="No space left on device; free space"):
        write_checkpoint(tmp_path, *made(steps=4), Standing(step=4), IDENTITY)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path) == older
    load_checkpoint(older, *made(), IDENTITY)
    write_checkpoint(tmp_path, *made(steps=4), Standing(step=4), IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTEMPTY])
def test_two_trainings_in_one_folder_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def taken(self: Path, target: Path) -> Path:
        raise OSError(code, "it went", str(self))

    monkeypatch.setattr(Path, "replace", taken)
    with pytest.raises(RunFolderError, match="it went; another process seems to write there too; let one"):
        write_checkpoint(tmp_path, *made(steps=4), Standing(step=4), IDENTITY)


def test_a_file_in_place_of_the_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write a checkpoint to .*; free space or choose"):
        write_checkpoint(tmp_path / "file", *made(), Standing(step=1), IDENTITY)
