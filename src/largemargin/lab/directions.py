"""Which way a metric is better: by its name, unless the user says otherwise."""

import re
from collections.abc import Collection

LOWER_IS_BETTER = ("error", "loss", "nll", "ece", "brier", "mae", "mse", "rmse", "perplexity")  # alone or as a suffix


def lower_is_better(metric: str, lower: Collection[str] = (), higher: Collection[str] = ()) -> bool:
    """Whether a smaller value of ``metric`` is better; ``lower`` and ``higher`` name the exceptions.

    ``val/loss``, ``test_error`` and ``ECE %`` are, ``accuracy`` is not. scikit-learn's ``neg_log_loss`` is a loss with its sign
    changed, so it is not either.
    """
    if metric in lower or metric in higher:
        return metric in lower
    words = [word.lower() for word in re.findall(r"[^\W_]+", metric)]
    return bool(words) and words[-1].endswith(LOWER_IS_BETTER) and "neg" not in words


def phrase_of(lower: bool) -> str:
    return "lower is better" if lower else "higher is better"
