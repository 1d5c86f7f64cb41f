"""Two processes under DDP (gloo) end with the weights of one process with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import tiny_model
from unmemorize.isolate.language import plan_sinks
from unmemorize.isolate.loop import Job, train_method
from unmemorize.isolate.methods import MethodSettings, parse_method
from unmemorize.isolate.packing import pack
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings

ROOT = Path(__file__).parents[2]
METHODS = ("sinks", "gradient-masking", "sinks:shared_cap=2")


def job(folder: Path, method: str) -> Job:
    """Rows with different numbers of labels; batches of 5 do not split evenly, and the last one is short."""
    documents = [(tuple(range(3, 6 + 2 * (i % 7))), i % 4) for i in range(21)]
    chosen = parse_method(method, MethodSettings(sinks=SinkSettings(share_frac=0.5, active_frac=0.3)))
    model = tiny_model()
    return Job(
        model=model,
        rows=pack(documents, 20),
        validation=pack(documents[:4], 20),
        method=chosen,
        plan=plan_sinks(model, chosen.settings.sinks) if chosen.has_pool else None,
        optimization=OptimizationSettings(batch_rows=5, micro_rows=2, learning_rate=1e-3),
        records=RecordSettings(log_every_steps=1),
        folder=folder / method,
    )


def main(folder: Path) -> None:
    """What every process runs."""
    torch.set_num_threads(1)
    for method in METHODS:
        train_method(job(folder, method))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from pathlib import Path; from tests.cells.test_accelerate import main;"
        "main(Path(sys.argv[1]));"
        "import torch.distributed as d; assert d.get_world_size() == 2; d.destroy_process_group()"
    )
    shared = {
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_does(two_processes: Path, tmp_path: Path, method: str) -> None:
    torch.set_num_threads(1)
    alone = job(tmp_path, method)
    train_method(replace(alone, optimization=replace(alone.optimization, micro_rows=None)))
    ours, theirs = (load_file(folder / method / "model.safetensors") for folder in (tmp_path, two_processes))
    start = job(tmp_path, method).model.state_dict()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=5e-5, rtol=1e-3)
    moved = max(float((tensor - start[name]).abs().max()) for name, tensor in ours.items())
    assert moved > 1e-3


def test_metrics_are_those_of_the_global_batch(two_processes: Path, tmp_path: Path) -> None:
    from unmemorize.files import read_json_lines

    train_method(job(tmp_path, "sinks"))
    ours, theirs = (
        read_json_lines(folder / "sinks" / "metrics.jsonl") for folder in (tmp_path, two_processes)
    )
    assert [row["tokens"] for row in ours] == [row["tokens"] for row in theirs]
    for name in ("train_loss_nats", "validation_loss_nats"):
        assert [row[name] for row in theirs] == pytest.approx([row[name] for row in ours], rel=1e-4)
