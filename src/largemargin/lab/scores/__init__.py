"""Scores of runs that were made anywhere, and the verdicts on them."""
