"""Which weights matter: importance scores, and the subsets that they give."""

from peftkern.select.refining import Refined, refine
from peftkern.select.scores import Scores
from peftkern.select.scoring import importance
from peftkern.select.subset import Selection, threshold, top_k

__all__ = ["Refined", "Scores", "Selection", "importance", "refine", "threshold", "top_k"]
