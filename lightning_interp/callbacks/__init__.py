"""The three Lightning callbacks, which apply the package to a training run."""

from lightning_interp.callbacks.attribution.callback import InputAttribution
from lightning_interp.callbacks.influence.callback import DataInfluence
from lightning_interp.callbacks.similarity.callback import RepresentationSimilarity

__all__ = ["DataInfluence", "InputAttribution", "RepresentationSimilarity"]
