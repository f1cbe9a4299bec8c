"""A layer prepared for comparison: centred features, reduced to what rotations leave unchanged."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.records import Representation


def prepare(features: Float[Tensor, "n d"]) -> Representation:
    """Centre the columns of `(n, d)` features and return their left singular vectors and values.

    Where d exceeds half of n, the n × n Gram matrix of the centred features is decomposed instead of the features;
    where d exceeds n, it is taken in their own precision: exact to 1e-9 for CKA and 1e-7 for SVCCA from float32.

    Raises:
        ValueError: features are not `(n ≥ 2, d ≥ 1)` floating point numbers, or not finite.
    """
    check_features(features)
    centred = centre(features)
    if 2 * features.shape[1] > features.shape[0]:
        return from_gram(gram(centred), features.shape[1])
    u, s, _ = torch.linalg.svd(double(centred), full_matrices=False)
    keep = s > max(features.shape) * torch.finfo(centred.dtype).eps * s[0]
    return Representation(u[:, keep], s[keep], features.shape[1])


def gram(centred: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Return X Xᵀ: in float64 where d ≤ n, and on CUDA, whose float32 products may be of TensorFloat-32."""
    exact = centred.shape[1] <= centred.shape[0] or centred.device.type == "cuda"
    centred = double(centred) if exact else centred
    return centred @ centred.T


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; on the CPU where its device has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def from_gram(gram: Float[Tensor, "n n"], width: int) -> Representation:
    """Return the representation whose centred features have this Gram matrix X Xᵀ.

    Args:
        gram: of columns centred before the product; a product of uncentred float32 features has lost digits.
        width: number of neurons d.
    """
    eigenvalues, vectors = torch.linalg.eigh(double(gram))
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    noise = max(torch.finfo(gram.dtype).eps, gram.shape[0] * torch.finfo(torch.float64).eps)
    keep = eigenvalues > noise * eigenvalues[0].clamp(min=0)
    return Representation(vectors[:, keep].contiguous(), eigenvalues[keep].sqrt(), width)


def centre(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Subtract each column's mean, taken in float64, in the features' own precision (half goes to float32).

    The first row is taken off before the mean, so that a large common offset costs no digits.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    shifted = features - features[:1]
    sums = torch.float32 if features.device.type == "mps" else torch.float64
    return shifted - shifted.mean(0, keepdim=True, dtype=sums).to(features.dtype)


def check_features(features: Tensor, name: str = "features", fewest: int = 2) -> None:
    """Raise a ValueError that says what a measure needs, if these are not features."""
    if features.ndim != 2 or features.shape[0] < fewest or features.shape[1] < 1:
        raise ValueError(f"{name}: expected (n, d) with n ≥ {fewest} and d ≥ 1, got shape {tuple(features.shape)}")
    if not features.is_floating_point():
        raise ValueError(f"{name}: expected floating point numbers, got {features.dtype}")
    if not bool(features.isfinite().all()):
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def same_samples(x: Representation, y: Representation) -> None:
    """Raise a ValueError unless both were taken from the same number of samples."""
    if x.n != y.n:
        raise ValueError(f"y: expected {x.n} samples as x has, got {y.n}")
