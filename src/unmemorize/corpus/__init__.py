"""Corpora: documents with ids from files, and the mixture an experiment trains on. Torch-free."""

from unmemorize.corpus.documents import PYTHON_DOCS, Document, IdKind, read_corpus
from unmemorize.corpus.mixture import Mixture, MixtureSettings, mix

__all__ = ["PYTHON_DOCS", "Document", "IdKind", "Mixture", "MixtureSettings", "mix", "read_corpus"]
