"""The harness' task folder: files, scores, and what is left out; with the harness itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from unmemorize.audit.examples import Example
from unmemorize.audit.lm_eval import write_harness_tasks
from unmemorize.errors import ConfigError, DataError, RunFolderError
from unmemorize.tokenizer import train_tokenizer

TEXTS = [
    "the cat sat on the mat and looked at the moon over the hill",
    "a dog barks at night because the moon is made of green cheese",
    "rain falls on the old house while the birds sing in the trees",
]


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    return train_tokenizer(TEXTS * 4, 300, tmp_path_factory.mktemp("tokenizer"))


def example(tokenizer, number: int, group: str) -> Example:
    tokens = tokenizer(TEXTS[number], add_special_tokens=False)["input_ids"]
    return Example(name=f"{group}-{number}", group=group, tokens=tuple(tokens))


@pytest.fixture
def written(tokenizer, tmp_path: Path):
    examples = [
        example(tokenizer, 0, "target"),
        example(tokenizer, 1, "target"),
        example(tokenizer, 2, "ordinary"),
    ]
    lengths = usable_lengths(tokenizer)
    tasks = write_harness_tasks(examples, tokenizer, tmp_path / "tasks", name="mine", **lengths)
    return tasks, lengths


def usable_lengths(tokenizer) -> dict[str, int]:
    """A prefix that ends at a word for every text, so that both halves are encoded alike."""
    return {"prefix_tokens": 8, "suffix_tokens": 6}


def scores(folder: Path):
    spec = importlib.util.spec_from_file_location("scores", folder / "scores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_group_has_two_tasks_that_name_its_texts(written, tokenizer) -> None:
    tasks, lengths = written
    assert tasks.tasks == (
        "mine_target_verbatim",
        "mine_target_suffix",
        "mine_ordinary_verbatim",
        "mine_ordinary_suffix",
    )
    assert tasks.num_examples == {"target": 2, "ordinary": 1}
    assert tasks.num_excluded == {"target": 0, "ordinary": 0}
    for name in tasks.tasks:
        task = yaml.load((tasks.folder / f"{name}.yaml").read_text(), Loader=_Loader)
        kind = name.rsplit("_", 1)[1]
        assert (task["task"], task["tag"]) == (name, "mine")
        assert task["process_results"] == f"!function scores.{kind}"
        assert task["output_type"] == {"verbatim": "generate_until", "suffix": "loglikelihood"}[kind]
        (data,) = task["dataset_kwargs"]["data_files"].values()
        for line in Path(data).read_text().splitlines():
            row = json.loads(line)
            prefix = tokenizer(row["prefix"])["input_ids"]
            whole = tokenizer(row["prefix"] + row["suffix"])["input_ids"]
            assert len(prefix) == lengths["prefix_tokens"]
            assert whole[: len(prefix)] == prefix
            assert len(whole) == sum(lengths.values())
    assert task["metric_list"][1] == {
        "metric": "nats_per_token",
        "aggregation": "mean",
        "higher_is_better": False,
    }


def test_the_scores_are_those_of_the_audit(written) -> None:
    module = scores(written[0].folder)
    doc = {"suffix": " on the mat", "num_suffix_tokens": 4}
    assert module.verbatim(doc, [" on the mat, yes"])["exact"] == 1.0
    assert module.verbatim(doc, ["on the mat"])["exact"] == 1.0
    half = module.verbatim(doc, [" on the cat"])
    assert half == {"exact": 0.0, "matched_prefix_frac": 7 / 10, "equal_frac": 9 / 10}
    assert module.verbatim(doc, [""]) == {"exact": 0.0, "matched_prefix_frac": 0.0, "equal_frac": 0.0}
    assert module.suffix(doc, [(-6.0, True)]) == {"acc": 1.0, "nats_per_token": 1.5}


def test_examples_that_would_be_other_tokens_are_left_out_and_counted(tokenizer, tmp_path: Path) -> None:
    usual = example(tokenizer, 0, "target")
    letters = tuple(tokenizer.convert_tokens_to_ids(list("thecatsatonthemat")))
    broken = Example(name="spelled", group="target", tokens=letters)
    short = Example(name="short", group="target", tokens=usual.tokens[:9])
    tasks = write_harness_tasks(
        [usual, broken, short], tokenizer, tmp_path / "tasks", name="mine", **usable_lengths(tokenizer)
    )
    assert (tasks.num_examples, tasks.num_excluded) == ({"target": 1}, {"target": 2})
    with pytest.raises(DataError, match="no example keeps its 8 \\+ 6 tokens"):
        write_harness_tasks([broken], tokenizer, tmp_path / "none", name="mine", **usable_lengths(tokenizer))
    assert not (tmp_path / "none").exists()


def test_bad_names_lengths_and_folders_are_refused(written, tokenizer, tmp_path: Path) -> None:
    one = [example(tokenizer, 0, "target")]
    with pytest.raises(ConfigError, match="task name 'my task' cannot be used"):
        write_harness_tasks(one, tokenizer, tmp_path / "x", name="my task")
    with pytest.raises(ConfigError, match=r"lengths are \(0, 6\), expected 1 token or more each"):
        write_harness_tasks(one, tokenizer, tmp_path / "x", name="mine", prefix_tokens=0, suffix_tokens=6)
    with pytest.raises(RunFolderError, match="already holds something"):
        write_harness_tasks(one, tokenizer, written[0].folder, name="mine")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default")
def test_the_harness_runs_the_folder_and_agrees_with_the_audit(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from unmemorize.audit.language import extract
    from unmemorize.isolate.initial_model import build_model
    from unmemorize.isolate.settings import ModelSettings

    made = train_tokenizer(TEXTS * 4, 300, tmp_path / "tokenizer")
    model = build_model(ModelSettings(length_tokens=64, rows="padded"), made, 0)
    examples = [example(made, number, "target") for number in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):  # the third text is not learned
        for one in examples[:2]:
            tokens = torch.tensor([one.tokens])
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    tasks = write_harness_tasks(examples, made, tmp_path / "tasks", name="mine", **usable_lengths(made))
    assert tasks.num_examples == {"target": 3}
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=made, batch_size=2),
        tasks=[tasks.tag],
        task_manager=TaskManager(include_path=str(tasks.folder)),
        bootstrap_iters=0,
    )["results"]
    ours = extract(model, [one.tokens for one in examples], 8, 6)
    assert found["mine_target_verbatim"]["exact,none"] == pytest.approx(ours.scores.is_exact.mean())
    assert 0.6 < ours.scores.is_exact.mean() < 0.7
    with torch.no_grad():
        nats = 0.0
        for one in examples:
            scores_TV = model(torch.tensor([one.tokens[:14]])).logits[0].log_softmax(-1)
            nats -= sum(float(scores_TV[t - 1, one.tokens[t]]) for t in range(8, 14)) / 6
    assert found["mine_target_suffix"]["nats_per_token,none"] == pytest.approx(nats / 3, rel=1e-3)
    forced = ours.scores.teacher_forced_accuracy_frac == 1
    assert found["mine_target_suffix"]["acc,none"] == pytest.approx(forced.mean())
