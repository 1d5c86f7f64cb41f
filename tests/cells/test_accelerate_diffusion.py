"""Two processes under DDP (gloo) train the denoiser that one process trains with the same global batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny_diffusion import tiny_pipeline
from unmemorize.isolate.diffusion import grow, plan_sinks
from unmemorize.isolate.methods import MethodSettings, parse_method
from unmemorize.isolate.picture_data import encode_pictures
from unmemorize.isolate.picture_loop import PictureJob, train_pictures
from unmemorize.isolate.plan import SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.isolate.sink_files import load_with_sinks
from unmemorize.models.denoising import denoiser_of

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@dataclass(frozen=True)
class Drawn:
    caption: str
    pixels: np.ndarray
    name: str = ""
    source: str = ""


def job(folder: Path) -> PictureJob:
    """Batches of 3 do not split evenly, and the last one is short."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 64, 64, 3), dtype=np.uint8)
    sinks = SinkSettings(share_frac=1.0, grown=16, active_frac=None, sinks_per_id=4)
    pipe = grow(tiny_pipeline("pixart"), 16)
    data = encode_pictures(pipe, [Drawn("a red cat", picture) for picture in pixels])
    return PictureJob(
        pipe=pipe,
        data=data,
        order=[0, 1, 2, 0, 3, 4, 0, 5],
        sink_ids=[data.ids[0], 0, 0, data.ids[3], 0, 0, 0],
        validation=[6],
        method=parse_method("sinks", MethodSettings(sinks=sinks, compute="masked")),
        plan=plan_sinks(pipe, sinks),
        optimization=OptimizationSettings(batch_rows=3, micro_rows=1, learning_rate=1e-3),
        records=RecordSettings(log_every_steps=1),
        folder=folder / "sinks",
    )


def main(folder: Path) -> None:
    """What every process runs."""
    torch.set_num_threads(1)
    train_pictures(job(folder))


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from pathlib import Path; from tests.cells.test_accelerate_diffusion import main;"
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
            [sys.executable, "-c", code, str(tmp_path / "two")],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    alone = job(tmp_path / "one")
    start = {name: tensor.clone() for name, tensor in denoiser_of(alone.pipe).state_dict().items()}
    train_pictures(replace(alone, optimization=replace(alone.optimization, micro_rows=None)))
    pipes = [load_with_sinks(tmp_path / name / "sinks" / "pipeline")[0] for name in ("one", "two")]
    ours, theirs = (denoiser_of(pipe).state_dict() for pipe in pipes)
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, atol=5e-5, rtol=1e-3)
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in ours.items()) > 1e-3
