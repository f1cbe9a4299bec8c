"""Similarity of feature sets: measures on `(n, d)` tensors, and on layers prepared once."""

from lightning_interp.similarity.cca import CCA, SVCCA
from lightning_interp.similarity.cka import CKA
from lightning_interp.similarity.kernel import LinearKernel, RBFKernel
from lightning_interp.similarity.matrix import Measure, matrix
from lightning_interp.similarity.null import cka_null, cka_standard_error, permutation_null, r_squared_null
from lightning_interp.similarity.procrustes import Procrustes
from lightning_interp.similarity.pwcca import PWCCA
from lightning_interp.similarity.representation import from_gram, prepare
from lightning_interp.similarity.streaming import StreamingCKA

__all__ = [
    "CCA",
    "CKA",
    "PWCCA",
    "SVCCA",
    "LinearKernel",
    "Measure",
    "Procrustes",
    "RBFKernel",
    "StreamingCKA",
    "cka_null",
    "cka_standard_error",
    "from_gram",
    "matrix",
    "permutation_null",
    "prepare",
    "r_squared_null",
]
