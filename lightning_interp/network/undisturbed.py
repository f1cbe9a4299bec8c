"""Run a network without disturbing it: hooks in a context, and its state restored on every way out."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_interp.data.batch import tensors


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode, and restore it afterwards.

    Not restored: what a forward keeps in plain attributes, such as counters or the states of metrics.

    Restored on every way out: the state of each random number generator (torch on every device in use,
    NumPy, Python), each submodule's `training` flag, each parameter's `requires_grad` and `.grad`, and each
    buffer's values. Forwards inside run eagerly, since hooks never fire in code compiled before them.
    """
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    parameters = [(p, p.requires_grad, p.grad) for p in module.parameters()]
    with _random_state_restored(), _buffers_restored(module), _eager(), _plain_attention():
        try:
            for submodule, _ in modes:
                submodule.training = False
            yield
        finally:
            for submodule, training in modes:
                submodule.training = training
            for parameter, requires_grad, grad in parameters:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad


@contextlib.contextmanager
def differentiable(module: nn.Module) -> Iterator[None]:
    """Open `undisturbed` with gradients on, even where the caller is under `no_grad` or in inference mode.

    Tensors made in inference mode must be cloned inside. Recurrent layers run without cuDNN, which refuses a
    backward in eval mode.
    """
    recurrent = any(isinstance(submodule, nn.RNNBase) for submodule in module.modules())
    cudnn = torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext()
    with undisturbed(module), torch.inference_mode(False), torch.enable_grad(), cudnn:
        yield


@contextlib.contextmanager
def explaining(module: nn.Module) -> Iterator[None]:
    """Open `differentiable` for gradients of inputs and activations alone: none flows into parameters."""
    with differentiable(module):
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        yield


@contextlib.contextmanager
def hooked(module: nn.Module, layers: Sequence[str], hook: Callable[[str, nn.Module, Any, Any], Any]) -> Iterator[None]:
    """Call `hook(layer, submodule, inputs, output)` after each named layer's forward.

    What the hook returns, unless None, replaces the layer's output, as with torch's own forward hooks.
    """
    handles = []
    try:
        # Inside the `try`, so that an unknown name leaves no earlier hook behind.
        for layer in layers:
            submodule = module.get_submodule(layer)
            handles.append(submodule.register_forward_hook(_with_name(hook, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def capture(
    module: nn.Module, layers: Sequence[str], extract: Callable[[str, int, Tensor], Any]
) -> Iterator[dict[str, list[Any]]]:
    """Collect `extract(layer, call, output)` of each call of each named layer during one forward.

    The first tensor of a tuple or dict output is taken; a layer that gives none collects nothing. `extract`
    must copy what it returns: a later in-place operation may overwrite the output.

    Yields:
        layer → list with one entry per call; layers in the order of their first call, uncalled ones absent.
    """
    by_layer: dict[str, list[Any]] = {}

    def hook(layer: str, _: nn.Module, __: Any, output: Any) -> None:
        tensor = next(tensors(output), None)
        if tensor is not None:
            calls = by_layer.setdefault(layer, [])
            calls.append(extract(layer, len(calls), tensor.detach()))

    with hooked(module, layers, hook):
        yield by_layer


def _with_name(hook: Callable[[str, nn.Module, Any, Any], Any], layer: str) -> Callable[[nn.Module, Any, Any], Any]:
    return lambda module, inputs, output: hook(layer, module, inputs, output)


@contextlib.contextmanager
def _random_state_restored() -> Iterator[None]:
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Reading the state of a device that is not in use would initialise it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


@contextlib.contextmanager
def _buffers_restored(module: nn.Module) -> Iterator[None]:
    """Restore each buffer's object and values, also where a forward assigns a new tensor to its name."""
    buffers = [
        (submodule, name, buffer, buffer.detach().clone())
        for submodule in module.modules()
        for name, buffer in submodule._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for submodule, name, buffer, values in buffers:
                # Only where it changed: any write raises the buffer's version, which fails a backward still to come.
                if not _values_equal(buffer, values):
                    buffer.copy_(values)
                submodule._buffers[name] = buffer


def _values_equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach(), b)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Keep transformer layers off their inference path, which skips submodules and hands on nested tensors."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Run compiled modules eagerly; nothing can be compiled where torch._dynamo was never imported."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
