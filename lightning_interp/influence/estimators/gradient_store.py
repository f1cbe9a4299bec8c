"""Projected training gradients in a folder, so that later queries cost no pass over the training data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_interp.atomic import atomic_write
from lightning_interp.data.samples import Samples
from lightning_interp.data.task import Task
from lightning_interp.influence.curvature import IdentityCurvature, Shift
from lightning_interp.influence.curvature.projected import ProjectedInverse
from lightning_interp.influence.estimators.fitted import FittedInfluence, accumulate, check_finite
from lightning_interp.influence.estimators.influence_function import InfluenceFunction
from lightning_interp.influence.gradients.projection import Projection
from lightning_interp.influence.results import Influence
from lightning_interp.influence.scores.top_k import AllScores, ScoreColumns, TopScores
from lightning_interp.network.undisturbed import differentiable
from lightning_interp.progress import Progress, quiet

HEAD = "gradients.safetensors"
STORE_FORMAT = 1  # another number is refused
ROWS_READ_AT_ONCE = 4096  # 8 MB of float32 for 512 numbers each
NOTE = "training gradients were read from a store, in half precision"


@dataclass(frozen=True, eq=False)
class GradientStore:
    """Training gradients projected to k numbers each, the curvature between them, and a hash of their weights.

    In the folder: `gradients-<key>.npy`, float16, mapped into memory, each row divided by its largest entry; and
    `gradients.safetensors`, written last, with those entries, the curvature and the facts. The key is a hash of the
    weights, the projection, the damping, the curvature and the number of training samples.

    Args:
        folder: where it is.
        facts: the head's metadata.
        held: the head's tensors: `matrix` `(k, k)`, `scales` `(n,)`, `targets` `(n, ...)`, `ids` `(n,)`, and the
            damping of each block that has one per parameter.
    """

    folder: Path
    facts: Mapping[str, Any]
    held: Mapping[str, Tensor]

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> GradientStore:
        """Read the head; gradients are read when they are needed.

        Raises:
            FileNotFoundError: there is no store in the folder.
            ValueError: it is of another format.
        """
        path = Path(folder) / HEAD
        if not path.is_file():
            raise FileNotFoundError(f"folder: expected a gradient store, got {os.fspath(folder)!r} without {HEAD}")
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("facts", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        if facts.get("format") != STORE_FORMAT:
            raise ValueError(f"folder: expected a gradient store of format {STORE_FORMAT}, got {facts.get('format')}")
        return cls(Path(folder), facts, tensors)

    def __len__(self) -> int:
        return int(self.facts["n"])

    def __call__(
        self,
        model: nn.Module,
        query: Any,
        task: Task = Task(),
        candidates: Sequence[int] | None = None,
        top_k: int | None = None,
        progress: Progress = quiet,
    ) -> Influence:
        """Score training samples for each query from the stored gradients; only the queries are read.

        Args:
            model: with the weights that the gradients are of.
            query: dataset or loader of the samples whose losses are explained.
            task: the one with which the gradients were stored.
            candidates: indices in the training set to score; all when None.
            top_k: keep only so many of each query's most helpful, harmful and surprisingly helpful samples.
            progress: shows how far it got.

        Raises:
            ValueError: the weights are others, there are no queries, or other parameters are covered.
            FloatingPointError: gradients or scores are not finite.
        """
        self._check(model)
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: expected a number from 1, got {top_k}")
        queries = self._project_queries(model, Samples.of(query), task, progress)
        indices = torch.arange(len(self)) if candidates is None else torch.tensor(list(candidates), dtype=torch.long)
        if not len(indices) or not bool(((indices >= 0) & (indices < len(self))).all()):
            raise ValueError(f"candidates: expected indices below {len(self)} (the training samples), got {candidates}")
        columns, mean = self._score(queries, indices, top_k)
        note = f"{len(indices):,} of {len(self):,} training samples were scored; the others are not in the ranking"
        return Influence(
            scores=columns.scores,
            train_ids=self.held["ids"][indices[columns.positions]],
            train_targets=columns.targets,
            query_targets=queries.targets,
            query_losses=queries.losses,
            notes=(*([note] if len(indices) < len(self) else []), *self.facts["notes"], NOTE),
            places=columns.positions,
            scored=len(indices),
            mean=mean,
            **self.facts["record"] | {"covered": tuple(self.facts["record"]["covered"])},
        )

    def _score(self, queries: _ProjectedQueries, indices: Tensor, top_k: int | None) -> tuple[ScoreColumns, Tensor]:
        count = len(queries.gradients)
        keeper = TopScores(top_k, queries.targets) if top_k is not None else AllScores(count, len(indices))
        solved = self.inverse.solve(queries.gradients).float() / len(self)
        total = torch.zeros(count)
        for chunk in indices.split(ROWS_READ_AT_ONCE):
            scores = check_finite(solved @ self.rows(chunk).T, "scores")
            keeper.add(scores, self.held["targets"][chunk])
            total += scores.sum(1)
        return keeper.columns(), total / len(indices)

    def self_influence(self) -> Float[Tensor, " n"]:
        """Return ∇ℓ_iᵀ (H + Λ)⁻¹ ∇ℓ_i / n of every training sample; no sample is read."""
        chunks = (self.rows(chunk) for chunk in torch.arange(len(self)).split(ROWS_READ_AT_ONCE))
        return torch.cat([(rows * self.inverse.solve(rows).float()).sum(1) / len(self) for rows in chunks])

    def rows(self, indices: Tensor) -> Float[Tensor, "m k"]:
        """Return the projected gradients of some training samples."""
        scaled = torch.from_numpy(self._mapped[indices.numpy()].astype(np.float32))
        return scaled * self.held["scales"][indices, None]

    @cached_property
    def inverse(self) -> ProjectedInverse:
        """The damped curvature between projected gradients."""
        projection = Projection(self.facts["dim"], self.facts["seed"])
        numbers: dict[str, float | None] | None = self.facts["shift"]
        spread: Shift | None = None
        if numbers is not None:
            spread = {b: self.held[f"shift/{b}"] if lam is None else lam for b, lam in numbers.items()}
        return ProjectedInverse(projection, self.held["matrix"], self.facts["added"], spread)

    @cached_property
    def _mapped(self) -> NDArray[np.float16]:
        return np.load(self.folder / _file(self.facts["key"]), mmap_mode="r")

    def _check(self, model: nn.Module) -> None:
        if weights_key(model) != self.facts["weights"]:
            raise ValueError(
                f"model: expected the weights whose gradients are in {os.fspath(self.folder)!r}, got others; load those"
                " weights, or store the gradients of these"
            )

    def _project_queries(self, model: nn.Module, query: Samples, task: Task, progress: Progress) -> _ProjectedQueries:
        if not len(query):
            raise ValueError("query: expected samples, got none")
        task = dataclasses.replace(task, kind=task.kind or self.facts["kind"])
        reader = InfluenceFunction(IdentityCurvature(), 1.0).prepare(model, query, task, progress).reader
        blocks = self.facts["blocks"]
        if missing := set(blocks) - set(reader.coverage.blocks):
            raise ValueError(f"query: expected gradients of {', '.join(sorted(missing))}, got none")
        gradients, targets, losses = [], [], []
        with differentiable(model):
            for batch in reader.per_sample_gradients(query, "queries"):
                rows = batch.loss_gradients()
                projected = self.inverse.project({block: rows[block] for block in blocks})
                gradients.append(check_finite(projected, "query gradients").cpu())
                targets.append(batch.targets.detach().cpu())
                losses.append(batch.losses.detach().cpu())
        return _ProjectedQueries(torch.cat(gradients), torch.cat(targets), torch.cat(losses))


class _ProjectedQueries(NamedTuple):
    """Of the queries: projected gradients, targets, losses."""

    gradients: Tensor
    targets: Tensor
    losses: Tensor


def stored(fitted: FittedInfluence, folder: str | os.PathLike[str]) -> GradientStore:
    """Write the projected gradients of all training samples, in one pass; none where they are stored already.

    A process that is killed at any moment leaves the store that was there before, or none, or this one.

    Args:
        fitted: by `InfluenceFunction(ProjectedGaussNewton(...)).fit(model, train)`.
        folder: made if it is not there; another store in it is replaced.

    Raises:
        ValueError: the curvature is not a projected one.
        FloatingPointError: gradients are not finite.
    """
    inverse = fitted.inverse
    if not isinstance(inverse, ProjectedInverse):
        raise ValueError(f"fitted: expected ProjectedGaussNewton(...) as its curvature, got {fitted.curvature!r}")
    home, weights = Path(folder), weights_key(fitted.coverage.model)
    key = _key(fitted, inverse, weights)
    if (home / HEAD).is_file():
        existing = GradientStore.open(home)
        if existing.facts["key"] == key:
            return existing
    home.mkdir(parents=True, exist_ok=True)
    with atomic_write(home / _file(key)) as path:
        tensors, norm = _write_gradients(fitted, inverse, path)
    spread = {block: lam for block, lam in (inverse.shift or {}).items() if isinstance(lam, Tensor)}
    tensors |= {f"shift/{block}": lam.cpu().contiguous() for block, lam in spread.items()}
    facts = _facts(fitted, inverse, norm) | {"key": key, "weights": weights}
    with atomic_write(home / HEAD) as path:
        save_file(tensors, path, {"facts": json.dumps(facts)})
    for old in home.glob("gradients-*.npy"):
        if old.name != _file(key):
            old.unlink()
    return GradientStore.open(home)


def weights_key(model: nn.Module) -> str:
    """Return a hash of a network's parameters and buffers: their names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            _digest(digest, name, value)
    return digest.hexdigest()


def _key(fitted: FittedInfluence, inverse: ProjectedInverse, weights: str) -> str:
    digest = hashlib.sha256(weights.encode())
    facts = _facts(fitted, inverse, 0.0)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    _digest(digest, "matrix", inverse.matrix)
    for block, lam in (inverse.shift or {}).items():
        if isinstance(lam, Tensor):
            _digest(digest, block, lam)
    return digest.hexdigest()[:32]


def _digest(digest: hashlib._Hash, name: str, value: Tensor) -> None:
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _facts(fitted: FittedInfluence, inverse: ProjectedInverse, gradient_norm: float) -> dict[str, Any]:
    """Return the metadata of a store, in types that JSON has; None for a block whose damping differs by parameter."""
    shift = inverse.shift
    numbers = None if shift is None else {b: None if isinstance(lam, Tensor) else lam for b, lam in shift.items()}
    origin = () if fitted.damping.origin == "given" else (f"damping: {fitted.damping.origin}",)
    return {
        "format": STORE_FORMAT,
        "n": len(fitted.train),
        "dim": inverse.projection.dim,
        "seed": inverse.projection.seed,
        "added": inverse.added,
        "shift": numbers,
        "blocks": list(fitted.coverage.blocks),
        "kind": fitted.coverage.task.kind,
        "notes": [*origin, *fitted.notes],
        "record": {
            "method": f"influence function, {fitted.curvature!r}",
            "damping": fitted.damping.typical,
            "covered": list(fitted.coverage.parameter_sizes),
            "left_out": dict(fitted.coverage.left_out),
            "covered_elements": fitted.coverage.size,
            "gradient_norm": gradient_norm,
            "curvature_n": fitted.fitted.n,
        },
    }


def _write_gradients(fitted: FittedInfluence, inverse: ProjectedInverse, path: Path) -> tuple[dict[str, Tensor], float]:
    """Write the gradients into a file; return the head's tensors, and the norm of the mean gradient."""
    n, start = len(fitted.train), 0
    file = np.lib.format.open_memmap(path, "w+", np.float16, (n, inverse.projection.dim))
    scales, targets = [], []
    total: dict[str, Tensor] = {}
    with differentiable(fitted.coverage.model):
        for batch in fitted.reader.per_sample_gradients(fitted.train, "storing training gradients"):
            rows = batch.loss_gradients()
            projected = check_finite(inverse.project(rows).cpu().float(), "training gradients")
            # Half precision has no gradients below 6e-8: each row is scaled by its own largest entry.
            scale = projected.abs().amax(1).clamp(min=torch.finfo(projected.dtype).tiny)
            file[start : start + len(projected)] = (projected / scale[:, None]).half().numpy()
            start += len(projected)
            scales.append(scale)
            targets.append(batch.targets.detach().cpu())
            for block, row in rows.items():
                accumulate(total, block, row.sum())
    file.flush()
    tensors = {"matrix": inverse.matrix, "scales": torch.cat(scales), "targets": torch.cat(targets).contiguous()}
    norm = sum(float((sums / n).double().square().sum()) for sums in total.values()) ** 0.5
    return tensors | {"ids": torch.tensor(fitted.train.ids)}, norm


def _file(key: str) -> str:
    return f"gradients-{key}.npy"
