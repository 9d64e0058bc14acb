"""Which way a metric is better: by its name, unless the user says otherwise."""

import re
from collections.abc import Collection

LOWER_IS_BETTER = ("error", "loss", "nll", "ece", "brier", "mae", "mse", "rmse", "perplexity")  # alone or as a suffix
RATES_OF_ERROR = ("wer", "cer", "eer")  # whole words
OF_RESULTS = ("test_rho",)  # a column of results.csv whose name alone does not say it
SAYS_WHERE = ("rate", "train", "val", "valid", "validation", "test", "eval", "mean", "avg")  # at the end of a name, where they do not count


def lower_is_better(metric: str, lower: Collection[str] = (), higher: Collection[str] = ()) -> bool:
    """Whether a smaller value of ``metric`` is better; ``lower`` and ``higher`` name the exceptions.

    ``val/loss``, ``test_error``, ``error_rate`` and ``ECE %`` are, ``accuracy`` is not. scikit-learn's ``neg_log_loss`` is a loss with its
    sign changed, so it is not either.
    """
    if metric in lower or metric in higher:
        return metric in lower
    if metric in OF_RESULTS:
        return True
    words = [word.lower() for word in re.findall(r"[^\W_]+", metric)]
    while words and words[-1] in SAYS_WHERE:
        words.pop()
    return bool(words) and (words[-1].endswith(LOWER_IS_BETTER) or words[-1] in RATES_OF_ERROR) and "neg" not in words


def phrase_of(lower: bool) -> str:
    return "lower is better" if lower else "higher is better"
