"""Claim: errors against float64 are within a rounding of the reference's, and for confident predictions far smaller than torch's."""

import torch
import torch.nn.functional as F

from common import LAM, machine, options, refuse_if_wrong, write
from largemargin import large_margin_cross_entropy

LEADS = (0, 8, 12, 16, 20, 50, 80)
OFFSETS = (0, 1e2, 1e4, 1e5)
EPS = torch.finfo(torch.float32).eps


def measure(logits: torch.Tensor, lam: float) -> dict[str, dict[str, float]]:
    """The relative error of loss and target gradient, and the error of the gradient in units of eps, worst over the rows."""
    target = torch.zeros(len(logits), dtype=torch.long)
    exact = logits.double().requires_grad_()
    truth = large_margin_cross_entropy(exact, target, lam=lam, reduction="none", backend="reference")
    (gradient_truth,) = torch.autograd.grad(truth.sum(), exact)
    truth = truth.detach()
    found = {}
    for name in ("cpu", "reference", "torch") if lam == 0 else ("cpu", "reference"):
        leaf = logits.clone().requires_grad_()
        if name == "torch":
            losses = F.cross_entropy(leaf, target, reduction="none")
        else:
            losses = large_margin_cross_entropy(leaf, target, lam=lam, reduction="none", backend=name)  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
        losses = losses.detach()
        found[name] = {
            "loss, relative": float(((losses - truth) / truth).abs().max()),
            "target gradient, relative": float(((gradient - gradient_truth) / gradient_truth)[:, 0].abs().max()),
            "gradient, in eps": float((gradient - gradient_truth).abs().max() / EPS),
        }
    return found


def main() -> None:
    """Measure rows of 1,000 classes with growing leads of the target and growing common offsets."""
    chosen = options(__doc__)
    if not chosen.quick:
        refuse_if_wrong()
    # multiples of 1/128 below 2^17 + 64: float32 holds them at every offset
    others = (torch.randn(64, 999, generator=torch.Generator().manual_seed(0)) * 128).round() / 128
    ordinary = (torch.randn(64, 1, generator=torch.Generator().manual_seed(1)) * 128).round() / 128
    rows = []
    for lam in (0.0, LAM):
        for lead in LEADS:
            top = ((others.logsumexp(1, keepdim=True) + lead) * 128).round() / 128
            rows.append({"lam": lam, "target": f"leads by {lead} nats", "offset": 0, **measure(torch.cat([top, others], 1), lam)})
        for offset in OFFSETS:
            rows.append({"lam": lam, "target": "is any class", "offset": offset, **measure(torch.cat([ordinary, others], 1) + offset, lam)})
    for row in rows:
        print({key: value if not isinstance(value, dict) else {k: f"{v:.1e}" for k, v in value.items()} for key, value in row.items()})
    write("accuracy", {"claim": __doc__.splitlines()[0], "machine": machine(), "rows": rows}, chosen.out)


if __name__ == "__main__":
    main()
