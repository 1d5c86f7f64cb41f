"""With a cap on shared learning, later sightings of a document teach its sinks alone (language models).

For pictures see the end of `test_train_diffusion.py`; for several processes `test_accelerate.py`.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.cells.test_train import settings as run_settings
from tests.tiny import VOCABULARY, tiny_model
from unmemorize.cli import main
from unmemorize.corpus import MixtureSettings
from unmemorize.errors import ConfigError
from unmemorize.isolate import loop
from unmemorize.isolate.language import plan_sinks, training_sinks
from unmemorize.isolate.loop import Job, train_method
from unmemorize.isolate.methods import MethodSettings, parse_method
from unmemorize.isolate.optimizer import pool_slices
from unmemorize.isolate.packing import Pair, Row, pack, pack_numbered, spread, to_batch
from unmemorize.isolate.plan import SinkPlan, SinkSettings
from unmemorize.isolate.settings import OptimizationSettings, RecordSettings
from unmemorize.isolate.steps import count_labels, loss_sum
from unmemorize.models.language import load
from unmemorize.records import load_audit

CARVED = SinkSettings(share_frac=0.5, active_frac=None, sinks_per_id=3)
PLAIN = OptimizationSettings(batch_rows=3, learning_rate=1e-2, weight_decay=0.0, clip_norm=None)


def documents(*, num_ids: int = 4, has_others: bool = True) -> list[Pair]:
    """Forty-two documents in random order: ids 1 to num_ids several times each, and a third of them without an id."""
    draw = random.Random(0)
    texts = {id: tuple(draw.randrange(3, VOCABULARY) for _ in range(3 + 2 * id)) for id in range(num_ids + 1)}
    made = []
    for number in range(42):
        id = 1 + number % num_ids
        if has_others and number % 3 == 0:
            made.append((tuple(draw.randrange(3, VOCABULARY) for _ in range(4 + number % 5)), 0))
        else:
            made.append((texts[id], id))
    draw.shuffle(made)
    return made


def job(
    folder: Path,
    cap: int | None,
    rows: Sequence[Row],
    *,
    family: str = "llama",
    text: str = "",
    **changes: Any,
) -> Job:
    settings = MethodSettings(sinks=CARVED, shared_cap=cap)
    method = parse_method(f"sinks{text}", settings)
    model = tiny_model(family)
    made = Job(
        model=model,
        rows=rows,
        method=method,
        plan=plan_sinks(model, CARVED),
        optimization=PLAIN,
        folder=folder,
    )
    return replace(made, **changes)


def pool_of(model: nn.Module, plan: SinkPlan) -> dict[str, torch.Tensor]:
    """Which elements of each parameter belong to sinks, by name; parameters without any are left out."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, torch.Tensor] = {}
    for parameter, axis, part in pool_slices(model, plan):
        mask = masks.setdefault(names[id(parameter)], torch.zeros_like(parameter, dtype=torch.bool))
        mask.narrow(axis, part.start, part.stop - part.start).fill_(True)
    return masks


def weights(made: Job) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def recorded(made: Job) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Train, and return weights and gradients as they were when each step was taken."""
    seen = []

    def keep(*_: object) -> None:
        gradients = {name: p.grad.clone() for name, p in made.model.named_parameters() if p.grad is not None}
        seen.append((weights(made), gradients))

    handle = register_optimizer_step_pre_hook(keep)
    try:
        train_method(made)
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_with_cap_0_shared_weights_stay_and_sinks_learn(tmp_path: Path, family: str) -> None:
    made = job(tmp_path, 0, pack(documents(has_others=False), 24), family=family)
    before, pool = weights(made), pool_of(made.model, made.plan)
    steps = recorded(made)
    for name, after in weights(made).items():
        shared = ~pool.get(name, torch.zeros_like(after, dtype=torch.bool))
        assert torch.equal(after[shared], before[name][shared]), name
        if name in pool:
            assert (after != before[name]).any(), name
    assert len(steps) == made.num_steps > 3
    for _, gradients in steps:
        assert gradients.keys() == before.keys(), "shared weights get zeros, so that moments go on"


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_cap_that_is_never_reached_changes_nothing(tmp_path: Path, layout: str) -> None:
    made = documents()
    most = max(Counter(id for _, id in made if id).values())
    rows: Sequence[Row] = pack(made, 24) if layout == "packed" else [[document] for document in made]
    free, never, reached = (job(tmp_path / str(cap), cap, rows) for cap in (None, most, most - 1))
    for one in (free, never, reached):
        train_method(replace(one, optimization=OptimizationSettings(batch_rows=3, learning_rate=1e-2)))
    plain = weights(free)
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights(never).items())
    assert any(not torch.equal(plain[name], tensor) for name, tensor in weights(reached).items())


@pytest.mark.parametrize(
    ("family", "text", "layout"),
    [
        ("llama", "", "packed"),
        ("llama", ":compute=masked", "padded"),
        ("gpt2", ":compute=masked", "packed"),
        ("phi3", "", "padded"),
        ("opt", "", "packed"),
    ],
)
def test_gradients_are_sums_over_documents_each_to_what_it_may_teach(
    tmp_path: Path, family: str, text: str, layout: str
) -> None:
    middle: Sequence[Row] = (
        pack(documents(), 24) if layout == "packed" else [[document] for document in documents()]
    )
    other, often = ([next(pair for pair in documents() if pair[1] == id)] for id in (0, 1))
    rows = [*[other] * 3, *middle[: len(middle) // 3 * 3], *[often] * 3]
    made = job(tmp_path, 2, rows, family=family, text=text)
    pool = pool_of(made.model, made.plan)
    steps = recorded(made)
    counts: Counter[int] = Counter()
    kinds: set[tuple[bool, ...]] = set()
    for step, (found, gradients) in enumerate(steps):
        model = tiny_model(family)
        model.load_state_dict(found, strict=False)
        batch_rows = rows[step * 3 : (step + 1) * 3]
        num_labels = count_labels(to_batch(batch_rows)["labels"])
        expected = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        lates = []
        for document in (document for row in batch_rows for document in row):
            counts[document[1]] += 1
            is_late = document[1] > 0 and counts[document[1]] > 2
            lates.append(is_late)
            with training_sinks(model, made.plan):
                loss = loss_sum(model, to_batch([[document]]), has_sinks=True) / num_labels
            parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            for name, part in zip(expected, parts, strict=True):
                if part is None or (is_late and name not in pool):
                    continue
                expected[name] += part * pool[name] if is_late else part
        kinds.add((any(lates), all(lates)))
        for name, tensor in expected.items():
            torch.testing.assert_close(gradients[name], tensor, atol=1e-6, rtol=1e-4, msg=f"{step} {name}")
    assert kinds == {(False, False), (True, False), (True, True)}, "batches of every kind were compared"


def test_only_what_has_labels_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def counted(model: Any, batch: dict[str, torch.Tensor], *, has_sinks: bool) -> torch.Tensor:
        sizes.append(len(batch["labels"]))
        return loss_sum(model, batch, has_sinks=has_sinks)

    monkeypatch.setattr(loop, "loss_sum", counted)
    own, other = ((3, 4, 5, 6), 1), ((7, 8, 9), 0)
    # Steps: early, mixed (row 2 holds both kinds), late, and one without a label that is late.
    rows = [[other], [own], [own, other], [own], [own], [own], [other], [((5,), 1), ((6, 7), 0)]]
    train_method(job(tmp_path, 1, rows, optimization=replace(PLAIN, batch_rows=2)))
    assert sizes == [2, 2, 1, 2, 2]
    sizes.clear()
    micro = replace(PLAIN, batch_rows=2, micro_rows=1)
    train_method(job(tmp_path / "micro", 1, rows, optimization=micro))
    assert sizes == [1] * 9


def test_a_document_in_pieces_is_one_sighting_and_others_have_no_cap() -> None:
    long, short = (tuple(range(3, 13)), 1), ((20, 21), 0)
    rows, numbers = pack_numbered([short, long, short, long, ((9, 9, 9), 2)], 4, long="split")
    assert rows == pack([short, long, short, long, ((9, 9, 9), 2)], 4, long="split")
    # The last piece of the first long document fills up the first row.
    assert numbers == [[0, 1], [1], [1], [2, 3], [3], [3], [4]]
    method = parse_method("sinks:shared_cap=1")
    late = [[False, False], [False], [False], [False, True], [True], [True], [False]]
    assert method.late(rows, numbers) == late
    assert spread(rows[3:4], late[3:4]).tolist() == [[False, False, True, True]]
    assert method.late(rows) != late, "without numbers every piece is a sighting"
    everything = parse_method("sinks:shared_cap=0").late(rows, numbers)
    assert everything == [[id > 0 for _, id in row] for row in rows]
    for name in ("sinks", "gradient-masking:shared_cap=0", "standard:shared_cap=0"):
        assert not any(any(row) for row in parse_method(name).late(rows, numbers)), name


def test_the_first_sighting_is_the_first_in_training_order(tmp_path: Path) -> None:
    rows, numbers = pack_numbered(documents(), 24)
    late = parse_method("sinks:shared_cap=2").late(rows, numbers)
    counts: Counter[int] = Counter()
    for row, flags in zip(rows, late, strict=True):
        for (_, id), flag in zip(row, flags, strict=True):
            counts[id] += 1
            assert flag == (id > 0 and counts[id] > 2)
    with pytest.raises(ConfigError, match="numbers and rows differ in layout; take both from pack_numbered"):
        job(tmp_path, 2, rows, numbers=numbers[1:])


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("end", [2, 4])
def test_a_stopped_training_continues_bit_for_bit(tmp_path: Path, end: int) -> None:
    records = RecordSettings(log_every_steps=1, checkpoint_every_steps=1)
    rows, numbers = pack_numbered(documents(), 12, long="split")
    changes: dict[str, Any] = {
        "records": records,
        "numbers": numbers,
        "optimization": OptimizationSettings(batch_rows=3),
    }
    straight, cut = (job(tmp_path / name, 2, rows, family="opt", **changes) for name in ("straight", "cut"))
    train_method(straight)

    def stop(event: Any) -> None:
        if event.done == end:
            raise Killed

    with pytest.raises(Killed):
        train_method(cut, progress=stop)
    again = job(tmp_path / "cut", 2, rows, family="opt", **changes)
    train_method(again)
    expected = weights(straight)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(again).items())


def test_the_command_line_trains_audits_and_removes_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    methods, run = ("standard", "sinks", "sinks:shared_cap=1"), tmp_path / "run"
    mixture = MixtureSettings(num_repeated=6, repeats=3, num_once=12, num_validation=6)
    chosen = run_settings(tmp_path, methods=("standard",), mixture=mixture)
    (tmp_path / "run.json").write_text(json.dumps(chosen.to_json()))
    words = [
        "train",
        "--config",
        str(tmp_path / "run.json"),
        "--methods",
        " ".join(methods),
        "--out",
        str(run),
    ]
    assert main(words) == 0
    folder = run / "models" / "sinks-shared_cap-1-seed0"
    assert folder.is_dir() and (run / "models" / "sinks-seed0").is_dir()
    assert main(["audit", str(run)]) == 0
    audit = load_audit(run / "audit.json")
    assert [result.method for result in audit.methods] == list(methods)
    free, capped = (result.seeds[0] for result in audit.methods[1:])
    assert [state.state for state in capped.states] == ["off", "own", "foreign", "all", "exclude", "placebo"]
    assert [one.settings["shared_cap"] for one in audit.methods[1:]] == [None, 1]
    losses = [result.repeated_loss_nats.value for result in (free, capped)]
    assert None not in losses and losses[0] != losses[1]
    assert (
        audit.methods[2].label
        == "sinks (8 grown, 3 each, for repeated, shared neurons learn from 1 sighting)"
    )
    assert main(["report", str(run), "--output", str(tmp_path / "report.html")]) == 0
    assert "sinks shared_cap=1" in (tmp_path / "report.html").read_text("utf-8")
    assert main(["remove", str(folder), "--out", str(tmp_path / "plain")]) == 0
    assert load(tmp_path / "plain").config.intermediate_size == 24
