"""Similarity of feature sets: measures on `(n, d)` tensors, and on layers prepared once."""

from lightning_interp.similarity.cca import CCA, SVCCA, CanonicalDirections, r_squared_null
from lightning_interp.similarity.cka import CKA, cka_null, cka_standard_error
from lightning_interp.similarity.kernels import LinearKernel, RBFKernel
from lightning_interp.similarity.matrix import AnyMeasure, Measure, matrix
from lightning_interp.similarity.mutual_knn import MutualKNN
from lightning_interp.similarity.pooling import Maps, Pooling, Tokens
from lightning_interp.similarity.procrustes import Procrustes
from lightning_interp.similarity.pwcca import PWCCA
from lightning_interp.similarity.representation import from_gram, prepare
from lightning_interp.similarity.significance import chance, permutation_null, standard_error
from lightning_interp.similarity.streaming import StreamingCKA

Reading = Pooling  # its name in earlier versions

__all__ = [
    "CCA",
    "CKA",
    "PWCCA",
    "SVCCA",
    "AnyMeasure",
    "CanonicalDirections",
    "LinearKernel",
    "Maps",
    "Measure",
    "MutualKNN",
    "Pooling",
    "Procrustes",
    "RBFKernel",
    "Reading",
    "StreamingCKA",
    "Tokens",
    "chance",
    "cka_null",
    "cka_standard_error",
    "from_gram",
    "matrix",
    "permutation_null",
    "prepare",
    "r_squared_null",
    "standard_error",
]
