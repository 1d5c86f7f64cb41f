"""A training that is stopped anywhere and started again ends with the weights of one that ran through."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors_torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.tiny import tiny_model
from unmemorize.errors import CheckpointMismatch, FileFormatError, RunFolderError
from unmemorize.files import read_json_lines
from unmemorize.isolate import checkpoints
from unmemorize.isolate.language import plan_sinks
from unmemorize.isolate.loop import Job, train_method
from unmemorize.isolate.methods import MethodSettings, parse_method
from unmemorize.isolate.packing import pack
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.records import Progress

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it, only `finally` blocks run."""


def job(folder: Path, *, method: str = "sinks", every: int | None = 1, seed: int = 0) -> Job:
    """A model with dropout, 12 steps, a checkpoint after every step."""
    draw = random.Random(0)
    documents = [(tuple(draw.randrange(3, 64) for _ in range(8)), i % 4) for i in range(72)]
    chosen = parse_method(method, MethodSettings(sinks=SinkSettings(share_frac=0.5, active_frac=0.3)))
    model = tiny_model("gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    return Job(
        model=model,
        rows=pack(documents, 24),
        validation=pack(documents[:3], 24),
        method=chosen,
        plan=plan_sinks(model, chosen.settings.sinks) if chosen.has_pool else None,
        seed=seed,
        optimization=OptimizationSettings(batch_rows=2, learning_rate=1e-2, weight_decay=0.1),
        records=RecordSettings(log_every_steps=1, checkpoint_every_steps=every),
        folder=folder,
        identity={"settings": "s", "data": "d"},
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight")
    train_method(job(folder, every=None))
    return load_file(folder / "model.safetensors")


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    rows = read_json_lines(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert not (folder / "checkpoint").exists()
    assert not list(folder.glob(".*"))


def test_a_killed_process_continues_bit_for_bit(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1);"
        "from tests.cells.test_resume import job; from unmemorize.isolate.loop import train_method;"
        "train_method(job(Path(sys.argv[1])), progress=lambda p: (print(p.done, flush=True), sys.stdin.readline()))"
    )
    last, reached = random.SystemRandom().randint(2, 8), 0  # the first checkpoint follows step 1
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None and process.stdin is not None
        for line in process.stdout:
            reached = int(line)
            process.stdin.write(
                "\n"
            )  # it may go on to its next step, and waits there, however late the signal comes
            process.stdin.flush()
            if reached == last:
                process.send_signal(signal.SIGKILL)
                break
        process.wait()
    assert process.returncode == -signal.SIGKILL, f"ended by itself at step {reached}"
    assert not (tmp_path / "training.json").exists()
    assert (tmp_path / "checkpoint").is_dir()
    train_method(job(tmp_path))
    assert_same(tmp_path, expected)


@pytest.mark.parametrize("count", [1, 2, 3, 8, 21])
@pytest.mark.parametrize("place", ["replace", "fsync", "save_file"])
def test_an_end_at_any_write_is_survived(
    tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch, place: str, count: int
) -> None:
    owner = {"replace": Path, "fsync": os, "save_file": safetensors_torch}[place]
    original, calls = getattr(owner, place), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == count:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, place, counted)
    every = 1 if count < 20 else 6
    try:
        train_method(job(tmp_path, every=every))
    except Killed:
        assert calls == count
    monkeypatch.undo()
    train_method(job(tmp_path, every=every))
    assert_same(tmp_path, expected)


@pytest.mark.parametrize("method", ["standard", "gradient-masking", "sinks:shared_cap=7"])
def test_other_methods_continue_too(tmp_path: Path, method: str) -> None:
    train_method(job(tmp_path / "straight", method=method, every=None))

    def stop(event: Progress) -> None:
        if event.done == 7:
            raise Killed

    with pytest.raises(Killed):
        train_method(job(tmp_path / "cut", method=method, every=3), progress=stop)
    assert [path.name for path in (tmp_path / "cut" / "checkpoint").iterdir()] == ["step-00000006"]
    train_method(job(tmp_path / "cut", method=method, every=3))
    assert_same(tmp_path / "cut", load_file(tmp_path / "straight" / "model.safetensors"))


def test_ctrl_c_writes_a_checkpoint_on_the_way_out(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    # A shell that starts this in the background has Ctrl-C ignored; here it has to arrive.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(event: Progress) -> None:
        if event.done == 5:
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            train_method(job(tmp_path, every=None), progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000005"]
    train_method(job(tmp_path, every=None))
    assert_same(tmp_path, expected)


def test_ctrl_c_while_weights_change_keeps_the_checkpoint_before(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    calls = 0

    def interrupt(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    hook = register_optimizer_step_post_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_method(job(tmp_path, every=2))
    finally:
        hook.remove()
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-00000002"]
    train_method(job(tmp_path, every=2))
    assert_same(tmp_path, expected)


def stopped(folder: Path) -> Path:
    """Leave an unfinished training; returns its checkpoint."""

    def stop(event: Progress) -> None:
        if event.done == 3:
            raise Killed

    with pytest.raises(Killed):
        train_method(job(folder), progress=stop)
    return folder / "checkpoint" / "step-00000002"


def test_a_damaged_checkpoint_is_named_and_can_be_deleted(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    checkpoint = stopped(tmp_path)
    with (checkpoint / "model.safetensors").open("r+b") as stream:
        stream.truncate(100)
    with pytest.raises(FileFormatError, match="model.safetensors is corrupted or truncated; delete .*step-0"):
        train_method(job(tmp_path))
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    train_method(job(tmp_path))
    assert_same(tmp_path, expected)


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path)
    with pytest.raises(CheckpointMismatch, match="settings is s there and t here"):
        train_method(replace(job(tmp_path), identity={"settings": "t", "data": "d"}))
    made = job(tmp_path)
    other = plan_sinks(made.model, SinkSettings(share_frac=0.5, active_frac=0.3, seed=1))
    with pytest.raises(CheckpointMismatch, match="belongs to another training: plan is"):
        train_method(replace(made, plan=other))
    with pytest.raises(CheckpointMismatch, match="belongs to another model"):
        train_method(replace(made, model=tiny_model("gpt2", n_layer=2, n_embd=32)))


def test_a_finished_training_of_another_kind_is_refused(tmp_path: Path) -> None:
    train_method(job(tmp_path, every=None))
    with pytest.raises(CheckpointMismatch, match="holds another training: data is d there and e here"):
        train_method(replace(job(tmp_path), identity={"settings": "s", "data": "e"}))
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(FileFormatError, match="training.json is not complete JSON"):
        train_method(job(tmp_path))


def test_a_full_disk_is_explained_and_continued_from(
    tmp_path: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_sync", full)
        with pytest.raises(RunFolderError, match="No space left on device; free space"):
            train_method(job(tmp_path))
    train_method(job(tmp_path))
    assert_same(tmp_path, expected)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot write"):
        train_method(replace(job(tmp_path), folder=tmp_path / "file"))
