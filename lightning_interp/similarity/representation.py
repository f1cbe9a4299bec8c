"""One layer's output on n samples, and what every measure computes from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_interp.similarity.symmetric_product import symmetric_product

Form = Literal["gram", "scores", "features"]
FORMS: tuple[Form, ...] = get_args(Form)
Derived = TypeVar("Derived")


@dataclass(frozen=True, eq=False)
class Representation:
    """One layer's output on n samples, in one of three forms; each gives those after it in this list.

    "features": the activations X themselves, `(n, d)`, not centred. "scores": U S of the centred features' thin
    singular value decomposition U S Vᵀ, `(n, r)`: all but the rotation V of the neurons. "gram": the `(n, n)` Gram
    matrix U S² Uᵀ of the centred features, up to a common factor where it is in half precision, in which it serves
    centred kernel alignment alone. What is derived is in float64, and cached as long as this object lives.

    Args:
        values: the numbers.
        form: what they are.
        width: number of neurons d.
        sketch: where the Gram matrix is an estimate from a random sketch, its number of columns; else 0.
        signs: which random signs the sketch was made with.
    """

    values: Float[Tensor, "n k"]
    form: Form
    width: int
    sketch: int = 0
    signs: int = 0
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.values.shape[0]

    @property
    def features(self) -> Float[Tensor, "n d"] | None:
        """The activations; None where they were not kept."""
        return self.values if self.form == "features" else None

    @property
    def factorable(self) -> bool:
        """Whether singular vectors can be computed: not from a Gram matrix in half precision, nor from a sketch's."""
        return self.form != "gram" or (self.values.dtype != torch.float16 and not self.sketch)

    @cached_property
    def gram(self) -> Float[Tensor, "n n"]:
        """X Xᵀ of the centred features."""
        return double(self._gram)

    @property
    def u(self) -> Float[Tensor, "n r"]:
        """Left singular vectors of the centred features: orthonormal columns."""
        return self._factors[0]

    @property
    def s(self) -> Float[Tensor, " r"]:
        """Singular values above rounding error, descending, in the features' unit; empty for a constant layer."""
        return self._factors[1]

    @property
    def rank(self) -> int:
        """Number of singular values above rounding error."""
        return self.s.shape[0]

    @cached_property
    def slim(self) -> Float[Tensor, "n k"] | None:
        """A centred matrix of far fewer columns than samples with the same Gram matrix; None where there is none."""
        if self.form == "gram" or 4 * self.values.shape[1] > self.n:
            return None
        return double(centre(self.values) if self.form == "features" else self.values)

    def reduced(self, form: Form) -> Representation:
        """Return the smallest representation that still gives `form`: narrow layers stay features."""
        longest = self.n // 4 if form == "gram" else self.n
        if self.form == form or (self.form == "features" and (form == "features" or self.width <= longest)):
            return self
        if form == "gram":
            return Representation(self._gram, "gram", self.width, self.sketch, self.signs)
        return Representation((self.u * self.s).float(), "scores", self.width)

    def shuffled(self, order: Int[Tensor, " n"]) -> Representation:
        """Return the same layer with its samples in another order."""
        if not self.factorable:
            return replace(self, values=self.values[order][:, order])
        shuffled = Representation((self.u * self.s)[order], "scores", self.width)
        if self.form == "features":
            shuffled = Representation(self.values[order], "features", self.width)
        shuffled.__dict__["_factors"] = self.u[order], self.s  # the same but for the order: no need to decompose again
        return shuffled

    def derived(self, key: Hashable, make: Callable[[Representation], Derived]) -> Derived:
        """Return what a measure computes from this layer alone, computed once and cached under `key`."""
        if key not in self._derived:
            self._derived[key] = make(self)
        return self._derived[key]

    @property
    def _gram(self) -> Float[Tensor, "n n"]:
        if self.form == "gram":
            return recentred(self.values) if self.values.dtype == torch.float16 else self.values
        return gram(centre(self.values)) if self.form == "features" else symmetric_product(self.values)

    @cached_property
    def _factors(self) -> tuple[Float[Tensor, "n r"], Float[Tensor, " r"]]:
        if not self.factorable:
            raise ValueError(
                "representation: expected one that gives singular vectors, got a Gram matrix in half precision or of a"
                " sketch, which is all that a run keeps whose measures are kinds of linear CKA"
            )
        if self.form == "scores":
            scores = double(self.values)
            lengths = scores.norm(dim=0)
            return scores / lengths, lengths
        half = self.values.dtype in (torch.float16, torch.bfloat16)
        eps = torch.finfo(torch.float32 if half else self.values.dtype).eps
        # Rounding of n features moves singular values by less than √n eps of the largest; rounding of a sum of their
        # products moves eigenvalues by up to three eps of the largest.
        rounding = self.n**0.5 * eps
        if self.form == "features" and 2 * self.width <= self.n:
            return _svd_factors(centre(self.values), rounding)
        exact = self.form == "features" and (self.width <= self.n or self.values.is_cuda)
        return _eigen_factors(self.gram, rounding**2 if exact else 10 * eps)


def prepare(features: Float[Tensor, "n d"]) -> Representation:
    """Return `(n, d)` features as a layer for measures to compare; what they need of it is computed once.

    Raises:
        ValueError: features are not `(n ≥ 2, d ≥ 1)` floating point numbers, or not finite.
    """
    check_features(features)
    return Representation(features.detach(), "features", features.shape[1])


def from_gram(gram: Float[Tensor, "n n"], width: int) -> Representation:
    """Return the representation whose centred features have this Gram matrix X Xᵀ.

    Args:
        gram: of columns centred before the product; a product of uncentred float32 features has lost digits.
        width: number of neurons d.
    """
    return Representation(gram, "gram", width)


def centre(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Subtract each column's mean, in the features' own precision (half goes to float32).

    The first row is subtracted before the mean, so that a large common offset costs no digits.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    shifted = features - features[:1]
    return shifted.sub_(shifted.mean(0, keepdim=True))


def gram(centred: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Return X Xᵀ: in float64 where d ≤ n, and on CUDA, whose float32 products may be of TensorFloat-32.

    Wider layers stay in their own precision: float32 is exact to 1e-9 for CKA and 1e-7 for SVCCA, unless single samples
    are hundreds of times longer than the others.
    """
    exact = centred.shape[1] <= centred.shape[0] or centred.device.type == "cuda"
    return symmetric_product(double(centred) if exact else centred)


def recentred(gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Return H K H in float64: the Gram matrix of the same features after centring."""
    gram = double(gram)
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; on the CPU where its device has none."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def check_features(features: Tensor, name: str = "features", fewest: int = 2) -> None:
    """Raise a ValueError unless these are features that a measure can compare."""
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


def _svd_factors(centred: Float[Tensor, "n d"], rounding: float) -> tuple[Tensor, Tensor]:
    u, s, _ = torch.linalg.svd(double(centred), full_matrices=False)
    keep = s > rounding * s[0]
    return u[:, keep], s[keep]


def _eigen_factors(gram: Float[Tensor, "n n"], rounding: float) -> tuple[Tensor, Tensor]:
    eigenvalues, vectors = torch.linalg.eigh(gram)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    noise = max(rounding, gram.shape[0] * torch.finfo(torch.float64).eps)
    keep = eigenvalues > noise * eigenvalues[0].clamp(min=0)
    return vectors[:, keep].contiguous(), eigenvalues[keep].sqrt()
