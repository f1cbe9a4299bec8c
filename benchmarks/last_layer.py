"""Do scores of all layers agree with retraining of the last one? `python -m benchmarks.last_layer`.

The networks of `benchmarks.influence`. For each estimator the most helpful and the most harmful sample of the first six
queries are left out and the last layer retrained (`LastLayer`), as in the spot check of `DataInfluence`; then the same
for 60 random samples and all 100 queries.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from benchmarks.influence_data import Case, adam_mlp, sgd_mlp
from lightning_interp.influence import (
    EKFAC,
    GaussNewton,
    IdentityCurvature,
    InfluenceFunction,
    LastLayer,
    Retrained,
    leave_one_out,
)

QUERIES, RANDOM = 6, 60


def estimators(case: Case, layer: str) -> dict[str, InfluenceFunction]:
    return {
        "Gauss–Newton, 1,024 columns": InfluenceFunction(GaussNewton(columns=1024), case.trained),
        "Gauss–Newton of the last layer": InfluenceFunction(GaussNewton(), case.trained, layers=[layer]),
        "EK-FAC": InfluenceFunction(EKFAC()),
        "gradient dot product": InfluenceFunction(IdentityCurvature(), 1.0),
    }


def strongest(scores: Tensor) -> list[tuple[int, int]]:
    return [(q, int(pick(scores[q]))) for q in range(QUERIES) for pick in (torch.argmax, torch.argmin)]


def row(name: str, scores: Tensor, last: LastLayer, positions: list[int], moved: Tensor) -> str:
    """Return correlations of centred scores with retraining, of the strongest and of random samples."""
    centred = scores.double() - scores.double().mean(1, keepdim=True)
    pairs = strongest(scores)
    left_out = sorted({position for _, position in pairs})
    alone = leave_one_out(last.retrain, last.losses, last.n, left_out)
    predicted, actual = zip(
        *((float(centred[q, i]), float(alone[q, left_out.index(i)])) for q, i in pairs), strict=True
    )
    signs = sum(p * a > 0 for p, a in zip(predicted, actual, strict=True))
    every = Retrained(centred[:, positions], moved)
    strong = f"{statistics.correlation(predicted, actual):.2f}, {signs} of {len(pairs)} signs"
    return f"| {name} | {strong} | {every.pearson:.2f}, Spearman {every.spearman:.2f} |"


def main() -> None:
    torch.set_num_threads(1)
    for title, case in (("SGD", sgd_mlp()), ("Adam", adam_mlp())):
        last = LastLayer.of(case.net, case.train, case.query, damping=case.trained)
        positions = torch.randperm(last.n, generator=torch.Generator().manual_seed(0))[:RANDOM].tolist()
        started = time.perf_counter()
        actual = leave_one_out(last.retrain, last.losses, last.n, positions)
        seconds = (time.perf_counter() - started) / (RANDOM + 1)
        print(f"\n{title}: {seconds * 1e3:.0f} ms a retraining\n")
        print("| scores | strongest: r | random: r |\n|---|---|---|")
        for name, estimator in estimators(case, last.name).items():
            print(row(name, estimator(case.net, case.train, case.query).scores, last, positions, actual))


if __name__ == "__main__":
    main()
