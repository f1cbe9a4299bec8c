"""The three callbacks: thin shells around the rooms."""

from lightning_interp.callbacks.attribution.callback import InputAttribution
from lightning_interp.callbacks.influence.callback import DataInfluence
from lightning_interp.callbacks.similarity.callback import RepresentationSimilarity

__all__ = ["DataInfluence", "InputAttribution", "RepresentationSimilarity"]
