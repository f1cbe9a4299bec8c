"""See what a network learns, why it answers as it does, and which training samples made it so."""

from lightning_interp.callbacks import DataInfluence, InputAttribution, RepresentationSimilarity
from lightning_interp.compare import compare
from lightning_interp.display import Display
from lightning_interp.task import Task

__all__ = ["DataInfluence", "Display", "InputAttribution", "RepresentationSimilarity", "Task", "compare"]
