"""Leave-one-out leverage: a sample that is left out takes its own curvature with it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_interp.data.task import Task
from lightning_interp.influence.curvature.curvature import Gradients, Inverse, Scorer
from lightning_interp.influence.gradients.factored import concatenate_positions
from lightning_interp.influence.gradients.ggn_columns import hessian_root
from lightning_interp.influence.gradients.per_sample import PerSampleGradients


def leverage_scores(
    trace: PerSampleGradients, rows: Gradients, scorer: Scorer, inverse: Inverse, task: Task, n: int
) -> Float[Tensor, "q m"]:
    """Return ∇ℓ_qᵀ (A − C_i C_iᵀ / n)⁻¹ ∇ℓ_i for each sample i of a batch, A = H + Λ and C_i its own columns.

    By Woodbury's identity ∇ℓ_qᵀ A⁻¹ ∇ℓ_i + ∇ℓ_qᵀ A⁻¹ C_i (nI − C_iᵀ A⁻¹ C_i)⁻¹ C_iᵀ A⁻¹ ∇ℓ_i, of which every inner
    product is asked of A⁻¹. One more backward for each output but one, and as many inner products squared.

    Reference: Pregibon, Logistic Regression Diagnostics, 1981; Koh et al., On the Accuracy of Influence Functions for
    Measuring Group Effects, 2019.

    Args:
        trace: of the batch, its graph kept.
        rows: gradients of its losses.
        scorer: gradients → ∇ℓ_qᵀ A⁻¹ of them.
        inverse: A⁻¹.
        task: whose loss is curved.
        n: number of training samples.

    Raises:
        FloatingPointError: a sample holds all of the curvature somewhere: damping is too small.
    """
    root = hessian_root(trace.outputs, trace.targets, task)
    samples = torch.arange(len(trace), device=root.norms.device)
    columns = []
    for place in range(root.norms.shape[1]):
        column = root.column(samples, torch.full_like(samples, place)).reshape(trace.outputs.shape)
        columns.append(trace.output_gradients(column, keep_graph=True))
    own = torch.stack([inverse.squares(column) for column in columns], dim=1)
    asked = torch.stack([scorer(column) for column in columns], dim=2)
    with_loss = torch.stack([_between(inverse, column, rows) for column in columns], dim=1)
    inside = torch.diag_embed(own)
    for i, left in enumerate(columns):
        for j, right in enumerate(columns[:i]):
            inside[:, i, j] = inside[:, j, i] = _between(inverse, left, right)
    left_over = n * torch.eye(len(columns)).to(inside) - inside
    solved, failed = torch.linalg.solve_ex(left_over, with_loss)
    if bool(failed.any()):
        raise FloatingPointError("leverage: a sample holds all of the curvature in a direction; pass a larger damping=")
    return scorer(rows) + torch.einsum("qmk,mk->qm", asked, solved)


def _between(inverse: Inverse, left: Gradients, right: Gradients) -> Tensor:
    """Return gᵀ A⁻¹ h of each sample, from the squares of g, h and their sum."""
    both = {block: concatenate_positions([row, right[block]]) for block, row in left.items()}
    return (inverse.squares(both) - inverse.squares(left) - inverse.squares(right)) / 2
