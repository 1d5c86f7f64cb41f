"""A comparison of training methods: corpus in, run folder with one model per method and seed out.

All methods of a seed start from the same weights and see the same documents in the same order, apart from the
repetitions they leave out. Started again, the command continues where it stopped; a folder that holds another run is
refused. What one training does is in `loop.py`, what tells methods apart in `methods.py`, what the folder holds in
`runs.py`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unmemorize.corpus import Document, Mixture, mix, read_corpus
from unmemorize.errors import ConfigError, ModelNotSupported, RunFolderError
from unmemorize.files import parse_json, read_json, write_atomic, write_json
from unmemorize.isolate.engine import make_accelerator
from unmemorize.isolate.language import grow, plan_sinks
from unmemorize.isolate.loop import (
    TRAINING_FILE,
    Job,
    TrainedRun,
    read_training,
    train_method,
)
from unmemorize.isolate.methods import Method, parse_method
from unmemorize.isolate.packing import Pair, Row, pack
from unmemorize.isolate.plan import SinkPlan
from unmemorize.isolate.runs import (
    CONFIG_FILE,
    EXAMPLES_FILE,
    RUN_FORMAT,
    RUN_VERSION,
    TOKENIZER_FOLDER,
    environment,
    model_folder,
    read_run,
    refuse_other_run,
    trained_runs,
)
from unmemorize.isolate.settings import PRESETS, ModelSettings, RecordSettings, TrainSettings
from unmemorize.isolate.steps import require_packing
from unmemorize.models.base import quiet_transformers
from unmemorize.models.language import load
from unmemorize.records import Progress, ProgressCallback
from unmemorize.tokenizer import encode_documents, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["build_model", "environment", "model_folder", "read_run", "train", "trained_runs"]

_Tokens = tuple[int, ...]


def train(
    settings: TrainSettings, out: str | Path, progress: ProgressCallback | None = None
) -> list[TrainedRun]:
    """Train every method with every seed, or the ones that are still missing.

    Args:
        settings: what to compare.
        out: the run folder; made if missing.
        progress: called with steps done, loss, tokens per second and time left.

    Returns:
        One finished training per method and seed; seeds outside, methods inside.

    Raises:
        ConfigError, DataError: if settings or corpus cannot be used; nothing is written then.
        RunFolderError: if `out` holds another run, or cannot be written.
        FileFormatError, CheckpointMismatch: if an unfinished training is damaged or another one.
    """
    out = Path(out)
    accelerator = make_accelerator(settings.records, device=settings.device, folder=out)
    refuse_other_run(out, settings.to_json())
    material = _prepare(settings, out, progress)
    if not (out / CONFIG_FILE).is_file():
        _check_plans(material)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_run(settings, out, material)
    accelerator.wait_for_everyone()
    pairs = [(seed, method) for seed in settings.seeds for method in material.methods]
    return [
        _train_one(material, out, method, seed, accelerator, progress, f"{number} of {len(pairs)}")
        for number, (seed, method) in enumerate(pairs, start=1)
    ]


def build_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the model a training starts from: random weights by seed, or the weights of a checkpoint.

    Args:
        settings: says which.
        tokenizer: gives the vocabulary's size and the special tokens.
        seed: seed of random weights; the global generator is left as it was.

    Raises:
        ModelNotSupported: if there is no such preset, config or checkpoint.
        ConfigError: if rows are longer than the model's context, its vocabulary is smaller than the tokenizer's, or it
            does not keep packed documents apart.
    """
    if settings.model in PRESETS or settings.model.endswith(".json"):
        model = _random_model(settings.model, tokenizer, seed)
    else:
        model = load(settings.model, dtype=torch.float32, run_check=False)
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < settings.length_tokens:
        raise ConfigError(
            f"length_tokens is {settings.length_tokens}, the context of {settings.model} is {context}; use shorter rows"
        )
    if len(tokenizer) > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, {settings.model} knows "
            f"{config.vocab_size}; use its own tokenizer"
        )
    if settings.rows == "packed":
        require_packing(model)
    model.train()
    return model


def _random_model(source: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    try:
        described = PRESETS[source] if source in PRESETS else parse_json(Path(source).read_text("utf-8"))
        kind = described["model_type"]
        rest = {name: value for name, value in described.items() if name != "model_type"}
        config = AutoConfig.for_model(kind, **{**rest, **special})
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelNotSupported(
            f"{source} does not describe a causal language model ({type(error).__name__}: {error}); "
            "pass a preset, a config.json, or a checkpoint"
        ) from error
    return model


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Material:
    """What all trainings of a run share, in memory."""

    settings: TrainSettings
    methods: tuple[Method, ...]
    mixture: Mixture
    tokenizer: PreTrainedTokenizerBase
    tokens: dict[int, _Tokens]
    digest: str

    @property
    def repeated_ids(self) -> frozenset[int]:
        return frozenset(document.id for document in self.mixture.repeated)


def _prepare(settings: TrainSettings, out: Path, progress: ProgressCallback | None) -> _Material:
    """Read and split the corpus and tokenize it once; writes nothing into the run folder."""
    tell = progress or (lambda _: None)
    corpus = settings.corpus
    tell(Progress("read", 0, 3, "", str(corpus.path)))
    documents = read_corpus(
        corpus.path,
        text_column=corpus.text_column,
        source_column=corpus.source_column,
        ids=corpus.ids,
        limit=corpus.limit,
    )
    mixture = mix(documents, settings.mixture)
    tell(Progress("tokenize", 1, 3, "", f"{len(documents):,} documents"))
    tokenizer = _tokenizer(settings.model, out, mixture)
    used = [*mixture.repeated, *mixture.once, *mixture.validation]
    encoded = encode_documents(tokenizer, [d.text for d in used], settings.model.length_tokens)
    tell(Progress("tokenize", 3, 3, "", f"{sum(map(len, encoded)):,} tokens"))
    digest = hashlib.sha256()
    for document, tokens in zip(used, encoded, strict=True):
        digest.update(repr((document.id, tokens)).encode())
    return _Material(
        settings=settings,
        methods=tuple(parse_method(name, settings.method) for name in settings.methods),
        mixture=mixture,
        tokenizer=tokenizer,
        tokens=dict(zip((document.id for document in used), encoded, strict=True)),
        digest=digest.hexdigest()[:16],
    )


def _tokenizer(settings: ModelSettings, out: Path, mixture: Mixture) -> PreTrainedTokenizerBase:
    """Load the run's own tokenizer if it has one already, else the one that is named, else train one."""
    if (out / TOKENIZER_FOLDER).is_dir():
        return load_tokenizer(out / TOKENIZER_FOLDER)
    is_random = settings.model in PRESETS or settings.model.endswith(".json")
    if settings.tokenizer is not None or not is_random:
        return load_tokenizer(settings.tokenizer or settings.model)
    texts = [document.text for document in (*mixture.repeated, *mixture.once)]
    with tempfile.TemporaryDirectory() as folder:
        return train_tokenizer(texts, settings.vocabulary_size, folder)


def _write_run(settings: TrainSettings, out: Path, material: _Material) -> None:
    """Write what comes before the models; a run that is continued keeps what it has."""
    parts = {name: getattr(material.mixture, name) for name in ("repeated", "once", "validation")}
    data = {f"num_{name}": len(part) for name, part in parts.items()} | {"digest": material.digest}
    if (out / CONFIG_FILE).is_file():
        theirs = read_json(out / CONFIG_FILE, format=RUN_FORMAT, version=RUN_VERSION).get("data")
        if theirs != data:
            raise RunFolderError(
                f"{out} was trained on another corpus at {settings.corpus.path}; choose another folder"
            )
    else:
        config = {
            "format": RUN_FORMAT,
            "format_version": RUN_VERSION,
            "kind": "training",
            "family": "language",
        }
        config |= {"settings": settings.to_json(), "data": data, "environment": environment()}
        write_json(out / CONFIG_FILE, config)
    if not (out / TOKENIZER_FOLDER).is_dir():
        _save_tokenizer(material.tokenizer, out)
    if not (out / EXAMPLES_FILE).is_file():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in _examples(material)]
        write_atomic(out / EXAMPLES_FILE, "".join(lines))


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    partial = out / ".tokenizer.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        tokenizer.save_pretrained(str(partial))
        partial.replace(out / TOKENIZER_FOLDER)
    except OSError as error:
        raise RunFolderError(
            f"cannot write the tokenizer to {out}: {error.strerror or error}; free space or choose another folder"
        ) from error


def _examples(material: _Material) -> list[dict[str, Any]]:
    """List the documents an audit measures; `repeats` is how often plain training saw them."""
    mixture, rows = material.mixture, []
    targets = mixture.repeated[: len(mixture.repeated) - len(mixture.heldout)]
    groups = (
        ("target", targets, mixture.repeats),
        ("heldout", mixture.heldout, mixture.repeats),
        ("ordinary", mixture.validation, 0),
    )
    for group, documents, repeats in groups:
        for number, document in enumerate(documents):
            row: dict[str, Any] = {
                "name": f"{group}-{number:04d}",
                "group": group,
                "source": document.source,
                "repeats": repeats,
                "id": document.id,
                "num_tokens": len(material.tokens[document.id]),
            }
            rows.append(row | ({"text": document.text} if material.settings.records.keep_text else {}))
    return rows


def _check_plans(material: _Material) -> None:
    """Build what every method would train, so that a plan that cannot be made stops the command before it writes."""
    model = build_model(material.settings.model, material.tokenizer, material.settings.seeds[0])
    for method in material.methods:
        _with_plan(material, method, model, 0)


def _with_plan(
    material: _Material, method: Method, model: PreTrainedModel, seed: int
) -> tuple[PreTrainedModel, SinkPlan | None]:
    """Give a model the pool of a method that has one: grown where the settings say so, else carved."""
    if not method.has_pool:
        return model, None
    sinks = method.settings.sinks
    if sinks.grown:
        model = grow(model, sinks.grown, seed=seed).train()
    plan = plan_sinks(model, sinks)
    if plan.scheme == "disjoint":
        documents = (document for document, _ in material.mixture.counts(method.cap))
        owners = {method.sink_id(document.id, material.repeated_ids) for document in documents}
        plan = plan.with_sources(tuple(sorted(owners - {0})))
    return model, plan


def _rows(material: _Material, documents: Sequence[Document], method: Method | None = None) -> list[Row]:
    """Lay documents out in rows, with the ids that a method gives them (0 for evaluation)."""
    repeated = material.repeated_ids
    pairs: list[Pair] = [
        (material.tokens[d.id], 0 if method is None else method.sink_id(d.id, repeated)) for d in documents
    ]
    if material.settings.model.rows == "padded":
        return [[pair] for pair in pairs]
    return list(pack(pairs, material.settings.model.length_tokens))


def _train_one(
    material: _Material,
    out: Path,
    method: Method,
    seed: int,
    accelerator: Accelerator,
    progress: ProgressCallback | None,
    place: str,
) -> TrainedRun:
    settings, mixture = material.settings, material.mixture
    folder = model_folder(out, method.name, seed)
    trained = replace(settings, methods=(method.name,), seeds=(seed,), records=RecordSettings())
    identity = {
        "settings": _digest(json.dumps(trained.to_json(), sort_keys=True)),
        "data": material.digest,
    }
    if (folder / TRAINING_FILE).is_file():
        return read_training(folder, identity)
    schedule = [
        document
        for number in range(settings.optimization.passes)
        for document in mixture.schedule(method.cap, seed=seed + 1_000_003 * number)
    ]
    model = build_model(settings.model, material.tokenizer, seed)
    model, plan = _with_plan(material, method, model, seed)
    job = Job(
        model=model,
        rows=_rows(material, schedule, method),
        validation=_rows(material, mixture.validation),
        repeated=_rows(material, mixture.repeated),
        method=method,
        plan=plan,
        seed=seed,
        optimization=settings.optimization,
        records=settings.records,
        folder=folder,
        identity=identity,
        tokenizer=material.tokenizer,
        title=f"{method.name}, seed {seed} ({place})",
    )
    if settings.records.tracker is not None:
        accelerator.init_trackers(folder.name)
    run = train_method(job, accelerator=accelerator, progress=progress)
    for tracker in accelerator.trackers if settings.records.tracker is not None else ():
        tracker.finish()
    return run


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
