"""Networks, samples and real retrainings for the benchmark of influence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, rankdata
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import TensorDataset

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "data"
BATCH = 64
# SGD, momentum 0.9, rate 0.05 with cosine to 0 over 40 epochs of 23 steps: the sum of rate / (1 − momentum)
DECAY, REACH = 1e-3, 0.05 / 2 * 40 * 23 / (1 - 0.9)


@dataclass(frozen=True)
class Case:
    """A trained network, and the samples whose influence is asked for.

    Args:
        net: in eval mode.
        train: inputs and classes.
        query: inputs and classes.
        damping: weight decay and 2 / the sum of learning rates / (1 − momentum).
        share: 0.1 × the mean eigenvalue of the generalised Gauss–Newton matrix: the other usual damping.
        checkpoints: weights along the training.
        rates: learning rate at each checkpoint.
        models: networks of other seeds, `net` first.
    """

    net: nn.Module
    train: TensorDataset
    query: TensorDataset
    damping: float
    share: float
    checkpoints: Sequence[Mapping[str, Tensor]] = ()
    rates: Sequence[float] = ()
    models: Sequence[nn.Module] = ()


def mlp() -> nn.Sequential:
    net = nn.Sequential()
    net.add_module("fc1", nn.Linear(64, 64))
    net.add_module("act", nn.ReLU())
    net.add_module("fc2", nn.Linear(64, 10))
    return net.eval()


def cnn() -> nn.Sequential:
    """Return a network of 1,898 parameters for 8 × 8 pixels."""
    net = nn.Sequential()
    net.add_module("image", nn.Unflatten(1, (1, 8, 8)))
    net.add_module("conv1", nn.Conv2d(1, 8, 3, padding=1))
    net.add_module("half1", nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))
    net.add_module("conv2", nn.Conv2d(8, 16, 3, padding=1))
    net.add_module("half2", nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()))
    net.add_module("fc2", nn.Linear(64, 10))
    return net.eval()


@cache
def held(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def digits(dtype: torch.dtype = torch.float32) -> tuple[TensorDataset, TensorDataset]:
    """Return 1,437 training digits and 100 queries, 8 × 8 pixels in [0, 1]."""
    arrays = held(TESTS / "digits_logistic_regression.npz")
    train_x, test_x = (torch.tensor(arrays[key], dtype=dtype) for key in ("train_x", "test_x"))
    train_y, test_y = (torch.tensor(arrays[key]) for key in ("train_y", "test_y"))
    return TensorDataset(train_x, train_y), TensorDataset(test_x, test_y)


def trained_mlp() -> Case:
    arrays = held(HERE / "data" / "digits_mlp_models.npz")
    models = [_filled(mlp(), flat) for flat in arrays["models"]]
    checkpoints = [_filled(mlp(), flat).state_dict() for flat in arrays["checkpoints"]]
    train, query = digits()
    share = 0.1 * mean_eigenvalue(models[0], train)
    return Case(
        models[0], train, query, DECAY + 2 / REACH, share, checkpoints, arrays["checkpoint_lr"].tolist(), models
    )


def logistic_regression() -> Case:
    arrays = held(TESTS / "digits_logistic_regression.npz")
    net, weights = nn.Sequential().double().eval(), torch.tensor(arrays["weights"])
    net.add_module("fc2", nn.Linear(64, 10).double())
    net.load_state_dict({"fc2.weight": weights[:, :64], "fc2.bias": weights[:, 64]})
    decay = float(arrays["regularisation"])
    return Case(net, *digits(torch.float64), decay, decay, [net.state_dict()], [1.0], [net])


def synthetic(make: str, n: int, queries: int = 10) -> Case:
    """Return a network at its start on random pixels; `make` is "mlp" or "cnn"."""
    torch.manual_seed(0)
    net = {"mlp": mlp, "cnn": cnn}[make]()
    train, query = (TensorDataset(torch.rand(k, 64), torch.arange(k) % 10) for k in (n, queries))
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return Case(net, train, query, 1e-2, 1e-2, [weights] * 8, [0.1] * 8, [net])


def mean_eigenvalue(net: nn.Module, train: TensorDataset) -> float:
    """Return that of the generalised Gauss–Newton matrix: Σ_c p_c ‖∇ log p_c‖² over the samples and parameters."""
    weights = {name: p.detach() for name, p in net.named_parameters()}

    def chances(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        logs: Tensor = functional_call(net, weights, x[None]).log_softmax(1)[0]
        return logs

    slopes = vmap(jacrev(chances), (None, 0))(weights, train.tensors[0])
    shares = vmap(chances, (None, 0))(weights, train.tensors[0]).exp()
    total = sum(float((shares * slope.flatten(2).square().sum(2)).sum()) for slope in slopes.values())
    return total / len(train) / sum(p.numel() for p in weights.values())


def lds(scores: Tensor, losses: np.ndarray | None = None) -> float:
    """Return the linear datamodeling score against 100 retrainings on half of the samples.

    mean over queries of the Spearman correlation, over subsets, between Σ_{i in subset} score[q, i] and
    −loss[subset, q] (Park et al., TRAK, 2023, with the loss as the output).

    Args:
        scores: `(q, n)`, positive is helpful.
        losses: `(subsets, q)`; of the retrainings when None.
    """
    arrays = held(TESTS / "digits_mlp_subsets.npz")
    masks = np.unpackbits(arrays["masks"], axis=1)[:, : scores.shape[1]].astype(np.float64)
    return _spearman(masks @ scores.double().numpy().T, -(arrays["loss"] if losses is None else losses))


def ceiling() -> float:
    """Return the score of the losses of one half of the retrainings' seeds against those of the other half."""
    arrays = held(HERE / "data" / "digits_mlp_models.npz")
    return _spearman(arrays["loss_half_a"], arrays["loss_half_b"])


def leave_one_out(scores: Tensor) -> tuple[float, float]:
    """Return r and slope (actual over predicted) against 1,437 retrainings without one sample each."""
    actual = held(TESTS / "digits_logistic_regression.npz")["leave_one_out"].T.ravel()
    predicted = scores.double().numpy().ravel()
    return float(pearsonr(predicted, actual)[0]), float(np.polyfit(predicted, actual, 1)[0])


def _spearman(predicted: np.ndarray, actual: np.ndarray) -> float:
    ranks = zip(rankdata(predicted, axis=0).T, rankdata(actual, axis=0).T, strict=True)
    return float(np.mean([pearsonr(one, other)[0] for one, other in ranks]))


def _filled(net: nn.Sequential, flat: np.ndarray) -> nn.Sequential:
    """Return the network with weights from one vector: each layer's weight, then its bias."""
    nn.utils.vector_to_parameters(torch.tensor(flat), net.parameters())
    return net
