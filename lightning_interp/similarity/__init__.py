"""Similarity of feature sets: measures on `(n, d)` tensors, and on layers prepared once."""

from lightning_interp.similarity.cca import CCA, SVCCA
from lightning_interp.similarity.cka import CKA
from lightning_interp.similarity.kernel import LinearKernel, RBFKernel
from lightning_interp.similarity.matrix import Measure, matrix
from lightning_interp.similarity.procrustes import Procrustes
from lightning_interp.similarity.representation import from_gram, prepare

__all__ = [
    "CCA",
    "CKA",
    "SVCCA",
    "LinearKernel",
    "Measure",
    "Procrustes",
    "RBFKernel",
    "from_gram",
    "matrix",
    "prepare",
]
