"""The three callbacks: thin shells around the rooms."""

from lightning_interp.callbacks.attribution import InputAttribution
from lightning_interp.callbacks.influence import DataInfluence
from lightning_interp.callbacks.similarity import RepresentationSimilarity

__all__ = ["DataInfluence", "InputAttribution", "RepresentationSimilarity"]
