"""Scores of every removal for every example of a query: which training samples made this prediction what it is."""

from lightning_acc.scoring.matrices.compute import final_values, score_matrix, worst_examples
from lightning_acc.scoring.matrices.matrix import ScoreMatrix

__all__ = ["ScoreMatrix", "final_values", "score_matrix", "worst_examples"]
