"""Similarity of feature sets: measures on `(n, d)` tensors, and on layers prepared once."""

from lightning_interp.similarity.cca import SVCCA
from lightning_interp.similarity.cka import CKA
from lightning_interp.similarity.matrix import Measure, matrix
from lightning_interp.similarity.representation import from_gram, prepare

__all__ = ["CKA", "SVCCA", "Measure", "from_gram", "matrix", "prepare"]
