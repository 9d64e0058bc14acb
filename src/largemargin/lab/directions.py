"""Which way a metric is better: by its name, unless the user says otherwise."""

import re
from collections.abc import Collection

LOWER_IS_BETTER = ("error", "loss", "nll", "ece", "brier", "mae", "mse", "rmse", "perplexity")  # alone or as a suffix
NEVER_NEGATIVE = ("error", "ece", "brier", "mae", "mse", "rmse", "perplexity")
SHARES = ("accuracy", "acc", "f1", "auc", "auroc", "precision", "recall", "iou", "dice")  # from 0 to 1, or in percent
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
    words = _words_of(metric)
    return bool(words) and (words[-1].endswith(LOWER_IS_BETTER) or words[-1] in RATES_OF_ERROR) and "neg" not in words


def room(metric: str, mean: float, lower: bool) -> float | None:
    """The most that a score can be better than ``mean``: an error cannot fall below 0, a share not rise above 1 or 100; None: not known."""
    last = (_words_of(metric) or [""])[-1]
    if lower:
        left = mean if last.endswith(NEVER_NEGATIVE) or last in RATES_OF_ERROR else -1.0
    else:
        left = (1.0 if mean <= 1 else 100.0) - mean if last.endswith(SHARES) else -1.0
    return left if left >= 0 else None


def _words_of(metric: str) -> list[str]:
    """In lower case, without those at the end that say where it was measured."""
    words = [word.lower() for word in re.findall(r"[^\W_]+", metric)]
    while words and words[-1] in SAYS_WHERE:
        words.pop()
    return words


def phrase_of(lower: bool) -> str:
    return "lower is better" if lower else "higher is better"
