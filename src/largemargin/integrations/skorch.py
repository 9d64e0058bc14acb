"""A network with the large-margin loss as a scikit-learn estimator, by skorch."""

from typing import Any

import numpy as np

from largemargin import LargeMarginCrossEntropyLoss

try:
    from skorch import NeuralNetClassifier  # type: ignore[import-not-found, import-untyped, unused-ignore]
except ModuleNotFoundError as error:
    if error.name != "skorch":  # it is installed, but lacks another package
        raise
    raise ImportError("largemargin.integrations.skorch needs skorch; install it with: pip install skorch") from error


class LargeMarginClassifier(NeuralNetClassifier):  # type: ignore[misc, unused-ignore]
    """skorch's ``NeuralNetClassifier`` with :class:`.LargeMarginCrossEntropyLoss`, and the logits as ``decision_function``.

    The module gives logits, and ``predict_proba`` is their softmax. ``criterion__lam``, ``criterion__hard_bias`` and so on are options of
    the loss, also in a parameter search. As in skorch, features are float32 and labels are 0, ..., C - 1 in int64.

    Example:
        >>> import torch
        >>> from largemargin.integrations.skorch import LargeMarginClassifier  # doctest: +SKIP
        >>> classifier = LargeMarginClassifier(torch.nn.Linear(64, 10), criterion__lam=0.3)  # doctest: +SKIP
        >>> classifier.fit(features, labels).predict_proba(features)  # doctest: +SKIP
    """

    def __init__(self, module: Any, *args: Any, criterion: Any = LargeMarginCrossEntropyLoss, **kwargs: Any) -> None:
        super().__init__(module, *args, criterion=criterion, **kwargs)

    def decision_function(self, X: Any) -> np.ndarray[Any, Any]:
        """The float64 logits, shape (N, C); for two classes their difference, shape (N,), as in scikit-learn."""
        batches = [logits[0] if isinstance(logits, tuple) else logits for logits in self.forward_iter(X, training=False)]
        logits = np.concatenate([batch.double().numpy() for batch in batches])
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits
