"""See what a network learns, why it answers as it does, and which training samples made it so."""

from lightning_interp.callbacks import DataInfluence, InputAttribution, RepresentationSimilarity
from lightning_interp.compare import compare
from lightning_interp.data.task import Task
from lightning_interp.views.display import Display

__all__ = ["DataInfluence", "Display", "InputAttribution", "RepresentationSimilarity", "Task", "compare"]
