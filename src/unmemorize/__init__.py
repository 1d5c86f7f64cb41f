"""Find, isolate and remove what a model has memorized, neuron by neuron, and prove it.

This is the only public address: names that are not listed here may move. They are imported when they are first used,
so that `import unmemorize` loads neither torch nor any other heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unmemorize.audit.language import audit_state
    from unmemorize.corpus import Document, Mixture, MixtureSettings, mix, read_corpus
    from unmemorize.errors import UnmemorizeError
    from unmemorize.gates import capture, closed, folded, gated
    from unmemorize.ids import content_id, near_duplicate_ids, source_id
    from unmemorize.isolate.language import grow, plan_sinks, sink_state, training_sinks
    from unmemorize.isolate.optimizer import isolated_optimizer
    from unmemorize.isolate.packing import SinkCollator, goldfish_labels, pack
    from unmemorize.isolate.plan import SinkPlan, SinkSettings, load_plan
    from unmemorize.isolate.planner import forecast
    from unmemorize.models.language import MlpRow, check, fingerprint, load
    from unmemorize.neurons import NeuronSet, Site, load_neurons
    from unmemorize.records import Audit, Measure, load_audit
    from unmemorize.remove.language import excise, export, fold
    from unmemorize.report import write_report

__all__ = [
    "Audit",
    "Document",
    "Measure",
    "Mixture",
    "MixtureSettings",
    "MlpRow",
    "NeuronSet",
    "SinkCollator",
    "SinkPlan",
    "SinkSettings",
    "Site",
    "UnmemorizeError",
    "audit_state",
    "capture",
    "check",
    "closed",
    "content_id",
    "excise",
    "export",
    "fingerprint",
    "fold",
    "folded",
    "forecast",
    "gated",
    "goldfish_labels",
    "grow",
    "isolated_optimizer",
    "load",
    "load_audit",
    "load_neurons",
    "load_plan",
    "mix",
    "near_duplicate_ids",
    "pack",
    "plan_sinks",
    "read_corpus",
    "sink_state",
    "source_id",
    "training_sinks",
    "write_report",
]

_HOMES = {
    "audit.language": "audit_state",
    "corpus": "Document Mixture MixtureSettings mix read_corpus",
    "errors": "UnmemorizeError",
    "gates": "capture closed folded gated",
    "ids": "content_id near_duplicate_ids source_id",
    "isolate.language": "grow plan_sinks sink_state training_sinks",
    "isolate.optimizer": "isolated_optimizer",
    "isolate.packing": "SinkCollator goldfish_labels pack",
    "isolate.plan": "SinkPlan SinkSettings load_plan",
    "isolate.planner": "forecast",
    "models.language": "MlpRow check fingerprint load",
    "neurons": "NeuronSet Site load_neurons",
    "records": "Audit Measure load_audit",
    "remove.language": "excise export fold",
    "report": "write_report",
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"unmemorize.{home}"), name)
    raise AttributeError(f"module 'unmemorize' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
