"""Which earlier state a run of `RepresentationSimilarity` resumes, and what keeps it from doing so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback

from lightning_interp.data.probe import Probe
from lightning_interp.similarity import Pooling
from lightning_interp.similarity.activations import Activations
from lightning_interp.similarity.representation import Form
from lightning_interp.storage.snapshots import snapshot_from_state


def restored_state(callback: Callback, callbacks: Sequence[Callback], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state with which a callback resumes; empty where there is none.

    It is the state saved under its own key. Where its arguments, and so its key, have changed since, it is one of the
    states of its class that no callback has the key of, in the callbacks' order.

    Args:
        callback: the one that resumes.
        callbacks: all of the trainer's.
        saved: the checkpoint's states by key.
    """
    if callback.state_key in saved:
        return dict(saved[callback.state_key])
    current_keys = {c.state_key for c in callbacks}
    free_keys = [key for key in saved if key.startswith(type(callback).__qualname__) and key not in current_keys]
    changed = [c for c in callbacks if type(c) is type(callback) and c.state_key not in saved]
    index = next((i for i, c in enumerate(changed) if c is callback), len(free_keys))
    return dict(saved[free_keys[index]]) if index < len(free_keys) else {}


def reason_not_to_resume(
    earlier: Mapping[str, Any], probe: Probe, activations: Activations, pooling: Pooling, form: Form
) -> str:
    """Say what keeps a run from resuming an earlier one's snapshots; empty if nothing does.

    Args:
        earlier: the earlier run's state.
        probe: the samples now.
        activations: the layers now.
        pooling: what becomes of maps and sequences now.
        form: what the measures need of a layer now.
    """
    if earlier["fingerprint"] != probe.fingerprint:
        return "its probe's samples differ from those of the run that it resumes"
    for choice in ("maps", "tokens"):
        if (before := earlier.get(choice, getattr(pooling, choice))) != getattr(pooling, choice):
            return f"its {choice}= differs from that of the run that it resumes, {before!r}"
    initial = snapshot_from_state(earlier["initial"]).layers
    labels = [activations.label(call) for call in activations.widths()]
    if not set(labels) <= set(initial):
        return "its layers differ from those of the run that it resumes"
    if form != "gram" and not all(initial[label].factorable for label in labels):
        return "its measures need more of the initial network than the run that it resumes has stored"
    return ""
