"""What a set of logits says about a classifier: error, margin, the margin hidden in the loss, calibration."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import row_stats
from ...metrics import ece as expected_calibration_error

SCORES = ("error", "margin", "rho", "ece", "nll")  # the means, as a table has them
MARGIN_EDGES = torch.linspace(-40, 40, 161)  # nats; margins beyond are counted in the outermost bins


@dataclass(frozen=True)
class Evaluation:
    """Means over the samples of a set."""

    error: float  # top-1, in percent
    nll: float  # nats
    ece: float  # percent
    margin: float  # f_y - f_c*, nats
    rho: float  # eq. (7), nats
    margin_histogram: list[int]  # counts between MARGIN_EDGES
    predicted_classes: int  # different ones
    target_classes: int


@torch.no_grad()
def evaluate(logits: Tensor, target: Tensor) -> Evaluation:
    """Evaluate logits (N, C) against class indices (N,)."""
    if not logits.is_cuda:  # other accelerators have no float64
        logits = logits.cpu()
    logits, target = logits.double(), target.to(logits.device)
    stats = row_stats(logits, target)
    predicted = logits.argmax(-1)
    wrong = (predicted != target) | logits.isnan().any(-1)  # a diverged network knows no class
    margins = stats.log_odds + stats.rho
    counts = torch.histogram(margins.clamp(-40, 40).float().cpu(), MARGIN_EDGES).hist
    return Evaluation(
        error=100 * wrong.double().mean().item(),
        nll=F.cross_entropy(logits, target).item(),
        ece=100 * expected_calibration_error(logits, target).item(),
        margin=margins.mean().item(),
        rho=stats.rho.mean().item(),
        margin_histogram=counts.long().tolist(),
        predicted_classes=len(set(predicted.tolist())),
        target_classes=len(set(target.tolist())),
    )
