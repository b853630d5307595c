"""Which weights matter: importance scores, and the subsets that they give."""

from peftkern.select.scores import Scores
from peftkern.select.scoring import importance
from peftkern.select.subset import Selection, threshold, top_k

__all__ = ["Scores", "Selection", "importance", "threshold", "top_k"]
