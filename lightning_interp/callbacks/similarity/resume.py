"""How a run of `RepresentationSimilarity` goes on with the snapshots of an earlier one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lightning_interp.callbacks.similarity.arguments import OWNER
from lightning_interp.data.probe import Probe
from lightning_interp.similarity import Pooling
from lightning_interp.similarity.activations import Activations
from lightning_interp.similarity.representation import Form
from lightning_interp.storage.folder import Folder
from lightning_interp.storage.snapshots import SnapshotStore, new_store, open_store, snapshot_from_state


def restored_state(callback: Callback, callbacks: Sequence[Callback], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state that a callback goes on with; empty where there is none.

    That of its own key; else, its arguments being others now, one of its kind that nobody else claims: the first such
    callback gets the first.

    Args:
        callback: the one that asks.
        callbacks: all of the trainer's.
        saved: the checkpoint's states by key.
    """
    if callback.state_key in saved:
        return dict(saved[callback.state_key])
    claimed = {other.state_key for other in callbacks}
    free = [key for key in saved if key.startswith(type(callback).__qualname__) and key not in claimed]
    asking = [other for other in callbacks if type(other) is type(callback) and other.state_key not in saved]
    place = next((i for i, other in enumerate(asking) if other is callback), len(free))
    return dict(saved[free[place]]) if place < len(free) else {}


def reason_not_to_resume(
    earlier: Mapping[str, Any], probe: Probe, watched: Activations, reading: Pooling, form: Form
) -> str:
    """Say what keeps a run from going on with an earlier one's snapshots; empty if nothing does.

    Args:
        earlier: the earlier run's state; empty where there is none.
        probe: the samples now.
        watched: the layers now.
        reading: what is made of maps and sequences now.
        form: what the measures need of a layer now.
    """
    if not earlier:
        return ""
    if earlier["fingerprint"] != probe.fingerprint:
        return "its probe's samples differ from those of the run that it goes on with"
    for choice in ("maps", "tokens"):
        if (before := earlier.get(choice, getattr(reading, choice))) != getattr(reading, choice):
            return f"its {choice}= differs from that of the run that it goes on with, {before!r}"
    initial = snapshot_from_state(earlier["initial"]).layers
    if not set(map(watched.label, watched.widths())) <= set(initial):
        return "its layers differ from those of the run that it goes on with"
    kept = [initial[watched.label(call)] for call in watched.widths()]
    if form != "gram" and not all(layer.factorable for layer in kept):
        return "its measures need more of the initial network than the run that it goes on with has kept for its own"
    return ""


def resumed(folder: Folder, facts: dict[str, Any], step: int, earlier: Mapping[str, Any]) -> SnapshotStore:
    """Take over the initial reference, and the history up to the checkpoint's step if it is still there."""
    initial = snapshot_from_state(earlier["initial"])
    before = Folder(earlier["folder"])
    history = open_store(before) if before.exists("manifest.json") else None
    if history is not None and before == folder:
        history.forget_after(step)
        return history
    store = new_store(folder, facts)
    store.append(initial)
    if history is None:
        rank_zero_warn(f"{OWNER}: the snapshots before step {step} are gone from {before.path}")
    else:
        store.adopt(history.read(s) for s in history.steps if initial.step < s <= step)
    return store
