"""Two processes train as one: gradients under DDP and FSDP2 equal those of a single process."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.tiny import tiny_model, tokens
from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.optimizer import isolated_optimizer
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.models.language import find_mlps

NUM_PROCESSES = 2
TOKENS = tokens(2 * NUM_PROCESSES, 6)
IDS = torch.tensor([[5] * 6, [9, 9, 9, 0, 0, 0], [5] * 6, [11] * 3 + [2**40] * 3])
LATER_IDS = torch.full((4, 6), 77)
COMPUTES = ("masked", "gathered")
KINDS = ("ddp", "fsdp2")


def planned() -> tuple[Any, SinkPlan]:
    model = tiny_model("llama")
    return model, plan_sinks(model, SinkSettings(share_frac=0.5, active_frac=None, sinks_per_id=3))


def two_steps(model: Any, inner: Any, plan: SinkPlan, compute: Any, rows: slice) -> dict[str, torch.Tensor]:
    """Train on IDS, then on LATER_IDS; return losses, first gradients and final weights, whole."""
    optimizer = torch.optim.AdamW(inner.parameters(), lr=0.01, weight_decay=0.1, foreach=False)
    result: dict[str, torch.Tensor] = {}
    with training_sinks(inner, plan, compute=compute), isolated_optimizer(optimizer, inner, plan):
        for step, ids in enumerate((IDS, LATER_IDS)):
            optimizer.zero_grad()
            loss = model(
                input_ids=TOKENS[rows], labels=TOKENS[rows], sink_ids=ids[rows], use_cache=False
            ).loss
            loss.backward()
            result[f"loss {step}"] = loss.detach()
            for name, parameter in inner.named_parameters():
                if step == 0:
                    result[f"gradient {name}"] = whole(parameter.grad).clone()
                result[f"before {name}"] = whole(parameter.detach()).clone()
            optimizer.step()
    for name, parameter in inner.named_parameters():
        result[f"after {name}"] = whole(parameter.detach()).clone()
    return result


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def worker(rank: int, folder: Path) -> None:
    """Train in every way, one after the other, as one of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=NUM_PROCESSES
    )
    for kind in KINDS:
        for compute in COMPUTES:
            model, plan = planned()
            wrapped = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else sharded(model)
            result = two_steps(wrapped, model, plan, compute, slice(2 * rank, 2 * rank + 2))
            torch.save(result, folder / f"{kind} {compute} {rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def sharded(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (NUM_PROCESSES,))
    for mlp in find_mlps(model):
        fully_shard(mlp.layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the processes; every rank leaves a file for each way of training."""
    folder = tmp_path_factory.mktemp("distributed")
    code = "import sys, pathlib, tests.cells.test_distributed as t; t.worker(int(sys.argv[1]), pathlib.Path(sys.argv[2]))"
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(rank), str(folder)],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
        )
        for rank in range(NUM_PROCESSES)
    ]
    errors = [process.communicate(timeout=110)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0] * NUM_PROCESSES, errors
    return folder


@functools.cache
def single(compute: str) -> dict[str, torch.Tensor]:
    """One process: the mean of the two halves' losses, as data-parallel averaging has it."""

    class Halves(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, **inputs: Any) -> Any:
            use_cache = inputs.pop("use_cache")
            halves = [{k: v[i : i + 2] for k, v in inputs.items()} for i in (0, 2)]
            outputs = [self.model(**half, use_cache=use_cache) for half in halves]
            outputs[0].loss = (outputs[0].loss + outputs[1].loss) / 2
            return outputs[0]

    model, plan = planned()
    return two_steps(Halves(model), model, plan, compute, slice(None))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, compute: Any, folder: Path) -> None:
    results = [torch.load(folder / f"{kind} {compute} {rank}.pt") for rank in range(NUM_PROCESSES)]
    expected = single(compute)
    losses = [torch.stack([result[f"loss {step}"] for result in results]).mean() for step in range(2)]
    torch.testing.assert_close(losses, [expected["loss 0"], expected["loss 1"]], atol=1e-5, rtol=0)
    for name, tensor in expected.items():
        if not name.startswith("loss"):
            atol = 1e-6 if name.startswith("gradient") else 2e-4
            for result in results:
                torch.testing.assert_close(
                    result[name], tensor, atol=atol, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
                )
    require_isolation(results[0])


def require_isolation(result: dict[str, torch.Tensor]) -> None:
    """Sinks that only the first batch used did not move in the second step."""
    model, plan = planned()
    first = plan.neurons_for([5, 9, 11, 2**40]) - plan.neurons_for(77)
    assert len(first) > 0
    for mlp in find_mlps(model):
        chosen = list(first.indices[mlp.site])
        name = mlp.site.path + ".weight"
        before, after = result[f"before {name}"], result[f"after {name}"]
        assert torch.equal(after[:, chosen], before[:, chosen])
        assert not torch.equal(after, before)
        for path in mlp.up_paths:
            before, after = result[f"before {path}.weight"], result[f"after {path}.weight"]
            assert torch.equal(after[chosen], before[chosen])
