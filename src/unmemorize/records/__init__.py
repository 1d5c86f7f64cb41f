"""What an audit says, as data: the models behind `audit.json`. Torch-free.

The report, the explorer and every downstream tool read these and nothing else, so a report can be made
again years later without a model. Each figure is a `Measure`: a value with its 95 % interval and sample
count, or a refusal with its reason, never a bare number. Formats are described in docs/formats.md.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from unmemorize.errors import FileFormatError
from unmemorize.files import read_json
from unmemorize.records.base import AUDIT_FORMAT, AUDIT_VERSION, Group, Measure, Progress, ProgressCallback
from unmemorize.records.neurons import (
    Agreement,
    DeletionPoint,
    LocalizedMethod,
    NeuronAudit,
    NeuronSearch,
    NeuronSelection,
    NeuronState,
    TextLocalization,
)
from unmemorize.records.pictures import (
    LocalizedPrompt,
    PictureAudit,
    PictureGroup,
    PicturePrompt,
    PictureState,
    Similarity,
    SiteNeurons,
)
from unmemorize.records.training import (
    Audit,
    Continuation,
    CurvePoint,
    DocumentResult,
    Extraction,
    GroupResult,
    MethodResult,
    MethodSummary,
    SeedResult,
    StateName,
    StateResult,
)

__all__ = [
    "AUDIT_FORMAT",
    "AUDIT_VERSION",
    "Agreement",
    "Audit",
    "Continuation",
    "CurvePoint",
    "DeletionPoint",
    "DocumentResult",
    "Extraction",
    "Group",
    "GroupResult",
    "LocalizedMethod",
    "LocalizedPrompt",
    "Measure",
    "MethodResult",
    "MethodSummary",
    "NeuronAudit",
    "NeuronSearch",
    "NeuronSelection",
    "NeuronState",
    "PictureAudit",
    "PictureGroup",
    "PicturePrompt",
    "PictureState",
    "Progress",
    "ProgressCallback",
    "SeedResult",
    "Similarity",
    "SiteNeurons",
    "StateName",
    "StateResult",
    "TextLocalization",
    "load_any_audit",
    "load_audit",
]


def load_any_audit(path: str | Path) -> Audit | PictureAudit | NeuronAudit:
    """Read and validate an `audit.json` of any kind.

    Raises:
        FileFormatError: if the file is missing, torn, of another version, or does not fit the schema.
    """
    value = read_json(path, format=AUDIT_FORMAT, version=AUDIT_VERSION)
    kinds: dict[str, type[PictureAudit | NeuronAudit]] = {"pictures": PictureAudit, "neurons": NeuronAudit}
    kind = kinds.get(str(value.get("kind")), Audit)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise FileFormatError(f"{path} does not fit the audit format at {place}: {first['msg']}") from error


def load_audit(path: str | Path) -> Audit:
    """Read and validate the `audit.json` of language models.

    Raises:
        FileFormatError: if the file is missing, torn, of another version or family, or does not fit the schema.
    """
    audit = load_any_audit(path)
    if not isinstance(audit, Audit):
        raise FileFormatError(f"{path} is the audit of {audit.kind}; read it with load_any_audit")
    return audit
