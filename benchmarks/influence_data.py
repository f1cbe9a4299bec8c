"""Networks, samples and real retrainings for the benchmark of influence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.utils.data import TensorDataset

from lightning_interp.influence import Damping, Trajectory, linear_datamodeling_score
from lightning_interp.influence.trajectory import Path as Trained

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests" / "data"
BATCH = 64
STEPS = 40 * 23
# Momentum 0.9, rate 0.05 with cosine to 0
SGD = Trained("SGD", STEPS, rate_sum=0.05 / 2 * STEPS / (1 - 0.9), weight_decay=1e-3)


@dataclass(frozen=True)
class Case:
    """A trained network, and the samples whose influence is asked for.

    Args:
        net: in eval mode.
        train: inputs and classes.
        query: inputs and classes.
        quality: scores `(q, n)` → how well they agree with retraining.
        trained: the damping that follows from how it was trained.
        share: the other usual damping, 0.1 × the mean eigenvalue of the generalised Gauss–Newton matrix.
        checkpoints: weights along the training.
        rates: learning rate at each checkpoint.
        models: networks of other seeds, `net` first.
        batch: samples that the peers get at once.
    """

    net: nn.Module
    train: TensorDataset
    query: TensorDataset
    quality: Callable[[Tensor], float]
    trained: Damping
    share: float
    checkpoints: Sequence[Mapping[str, Tensor]] = ()
    rates: Sequence[float] = ()
    models: Sequence[nn.Module] = ()
    batch: int = BATCH

    @property
    def damping(self) -> float:
        """Return the same as one number, for those who take no other."""
        return self.trained.typical


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


def sgd_mlp() -> Case:
    """Return a linear 64→64, ReLU, linear 64→10, with 100 retrainings on half of the samples, 20 seeds each."""
    arrays, truth = held(HERE / "data" / "digits_mlp_models.npz"), held(TESTS / "digits_mlp_subsets.npz")
    models = [_filled(mlp(), flat) for flat in arrays["models"]]
    checkpoints = [_filled(mlp(), flat).state_dict() for flat in arrays["checkpoints"]]
    quality = partial(lds, truth["masks"], truth["loss"])
    trained = _damping(dict.fromkeys(dict(models[0].named_parameters()), SGD))
    rates = arrays["checkpoint_lr"].tolist()
    return _case(models[0], digits(), quality, trained, checkpoints, rates, models)


def adam_mlp(losses: str = "loss") -> Case:
    """Return the same network trained with Adam, with 50 retrainings on half of the samples, 3 or 20 seeds each."""
    arrays, net = held(TESTS / "digits_mlp_adam.npz"), mlp()
    net.load_state_dict({name: torch.tensor(arrays[name]) for name in net.state_dict()})
    rates, steps = float(arrays["rate_sum"]), int(arrays["steps"])
    roots = {name: torch.tensor(arrays[f"{name}.v"]).sqrt() + 1e-8 for name in net.state_dict()}
    trained = _damping({name: Trained("Adam", steps, rates, divisor=root) for name, root in roots.items()})
    quality = partial(lds, arrays["masks"], arrays[losses])
    return _case(net, digits(), quality, trained, [net.state_dict()], [1.0], [net])


def logistic_regression() -> Case:
    """Return one with all 1,437 retrainings without one sample; quality is r."""
    arrays = held(TESTS / "digits_logistic_regression.npz")
    net, weights = nn.Sequential().double().eval(), torch.tensor(arrays["weights"])
    net.add_module("fc2", nn.Linear(64, 10).double())
    net.load_state_dict({"fc2.weight": weights[:, :64], "fc2.bias": weights[:, 64]})
    decay = Damping(float(arrays["regularisation"]), "weight decay")
    return _case(net, digits(torch.float64), leave_one_out, decay, [net.state_dict()], [1.0], [net])


def synthetic(make: str, n: int, queries: int = 10) -> Case:
    """Return a network at its start on random pixels; `make` is "mlp" or "cnn"."""
    torch.manual_seed(0)
    net = {"mlp": mlp, "cnn": cnn}[make]()
    train, query = (TensorDataset(torch.rand(k, 64), torch.arange(k) % 10) for k in (n, queries))
    weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return Case(net, train, query, lambda scores: 0.0, Damping(1e-2, "given"), 1e-2, [weights] * 8, [0.1] * 8, [net])


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


def lds(masks: np.ndarray, losses: np.ndarray, scores: Tensor) -> float:
    """Return the linear datamodeling score of scores `(q, n)`: the mean over the queries."""
    inside = torch.from_numpy(np.unpackbits(masks, axis=1)[:, : scores.shape[1]]).bool()
    return float(linear_datamodeling_score(scores.double(), inside, torch.from_numpy(losses).double()).mean())


def ceiling() -> float:
    """Return how the losses of one half of the retrainings' seeds agree with those of the other half."""
    arrays = held(HERE / "data" / "digits_mlp_models.npz")
    halves = (arrays[f"loss_half_{which}"].T for which in "ab")
    return float(np.mean([spearmanr(first, second)[0] for first, second in zip(*halves, strict=True)]))


def leave_one_out(scores: Tensor) -> float:
    """Return r against the retrainings without one sample each."""
    actual = held(TESTS / "digits_logistic_regression.npz")["leave_one_out"].T
    return float(pearsonr(scores.double().numpy().ravel(), actual.ravel())[0])


def _filled(net: nn.Sequential, flat: np.ndarray) -> nn.Sequential:
    """Return the network with weights from one vector: each layer's weight, then its bias."""
    nn.utils.vector_to_parameters(torch.tensor(flat), net.parameters())
    return net


def _case(
    net: nn.Module,
    data: tuple[TensorDataset, TensorDataset],
    quality: Callable[[Tensor], float],
    trained: Damping,
    *runs: Any,
) -> Case:
    return Case(net, *data, quality, trained, 0.1 * mean_eigenvalue(net, data[0]), *runs)


def _damping(paths: Mapping[str, Trained]) -> Damping:
    damping = Trajectory(paths).damping()
    if damping is None:
        raise ValueError("paths: expected such that a damping follows from them")
    return damping
