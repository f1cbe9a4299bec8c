"""Two processes that share the samples say what one says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from lightning_interp.influence import EKFAC, KFAC, ConjugateGradient, GaussNewton, InfluenceFunction, LiSSA
from lightning_interp.influence.gradients.distributed import Distributed, OtherRankError, Ranks, SingleProcess
from tests.ranks import run_on_two_ranks


def answers(ranks: Ranks) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    train = TensorDataset(torch.randn(31, 6).double(), torch.arange(31) % 3)
    query = TensorDataset(torch.cat([torch.randn(3, 6).double(), train.tensors[0][7:8]]), torch.tensor([0, 1, 2, 1]))
    found: dict[str, torch.Tensor] = {}
    curvatures = {"ekfac": EKFAC(1000), "all": EKFAC(None), "columns": GaussNewton(1000), "kfac": KFAC(1000)}
    iterative = {"solved": ConjugateGradient(60, 1e-10), "series": LiSSA(9)}
    for name, curvature in {**curvatures, **iterative}.items():
        fitted = InfluenceFunction(curvature, damping=0.1).fit(net, train, ranks=ranks)
        whole, top = fitted(query, check=True), fitted(query, top_k=2)
        assert whole.duplicates == {3: (7,)}
        assert whole.train_ids.tolist() == list(range(31))
        found |= {
            f"{name} scores": whole.scores,
            f"{name} helpful": torch.cat(top.helpful(2)),
            f"{name} mean": whole.mean,
        }
        if name not in iterative:
            found[f"{name} itself"] = fitted.self_influence().scores
        found[f"{name} gradient"] = torch.tensor(whole.gradient_norm)
    return found


def one_of_two(rank: int, folder: str) -> None:
    ranks = Distributed()
    torch.save(answers(ranks), f"{folder}/{rank}.pt")
    if rank == 0:
        ranks.report_failure("it is ill")
    else:
        with pytest.raises(OtherRankError, match="rank 0 failed: it is ill"):
            ranks.gather(1)
    assert ranks.gather(rank) == [0, 1]


def test_two_ranks_say_what_one_says(tmp_path: Path) -> None:
    expected = answers(SingleProcess())
    run_on_two_ranks(one_of_two, tmp_path)
    for rank in (0, 1):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(found[name].double(), values.double(), rtol=1e-9), (rank, name)
