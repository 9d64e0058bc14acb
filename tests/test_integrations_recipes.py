"""The recipes of docs/integrations.md for frameworks that need no module of ours: each runs as it is written, and gives our loss."""

import importlib.util
import re
from pathlib import Path

import pytest

import forked

PAGE = Path(__file__).parent.parent / "docs" / "integrations.md"
BEFORE = """
import contextlib, warnings
from largemargin.lab._torchvision import import_torchvision
with contextlib.suppress(ImportError):
    import_torchvision()
warnings.simplefilter("ignore")
"""

# what must hold after the recipe has run, by its own names
MONAI = """
from largemargin import large_margin_cross_entropy
torch.testing.assert_close(value, dice_and_margin.dice(volumes, labels) + large_margin_cross_entropy(volumes, labels[:, 0]))
hot = torch.nn.functional.one_hot(labels[:, 0], 4).movedim(-1, 1)  # targets that are one-hot already
of_hot = DiceCELoss(softmax=True)
of_hot.cross_entropy = dice_and_margin.cross_entropy
torch.testing.assert_close(of_hot(volumes, hot), value)
"""
KERAS = """
import torch
logits = torch.as_tensor(network.predict(rows, verbose=0))
losses = large_margin_cross_entropy(logits, torch.as_tensor(labels), lam=0.3, reduction="none")
assert abs(network.evaluate(rows, labels, verbose=0)[0] - losses.mean().item()) < 1e-5
for shaped in (labels.reshape(-1, 1), labels.astype("uint8"), labels.astype("float32")):
    assert abs(network.evaluate(rows, shaped, verbose=0)[0] - losses.mean().item()) < 1e-5
weights = (labels == 1).astype("float32")
weighted = network.evaluate(rows, labels, sample_weight=weights, verbose=0)[0]
total = (losses * torch.as_tensor(weights)).sum().item()
assert min(abs(weighted - total / count) for count in (len(labels), weights.sum())) < 1e-4  # by the version of Keras
"""
SENTENCE_TRANSFORMERS = """
from largemargin import large_margin_cross_entropy
logits = of_pairs(sentences, None)[1]
target = torch.tensor([0, 2])
torch.testing.assert_close(of_pairs(sentences, target), large_margin_cross_entropy(logits, target, lam=0.3))
assert of_pairs.classifier.weight.grad.norm() > 0
assert all(parameter.grad.norm() > 0 for parameter in encoder.parameters())
"""
OPACUS = """
from opacus import GradSampleModule
from largemargin import LinearLargeMarginCrossEntropyLoss, large_margin_cross_entropy

class Fused(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.criterion = LinearLargeMarginCrossEntropyLoss(8, 5)
    def forward(self, input, target):
        return self.criterion(input, target)

input, target = torch.randn(16, 8), torch.arange(16) % 5
for make, loss_of in (
    (lambda: torch.nn.Linear(8, 5), lambda model: criterion(model(input), target)),
    (Fused, lambda model: model(input, target)),
):
    torch.manual_seed(0)
    model = GradSampleModule(make())
    loss_of(model).backward()
    weight, bias = model.parameters()
    for i in range(16):
        alone = torch.autograd.grad(large_margin_cross_entropy(input[i : i + 1] @ weight.t() + bias, target[i : i + 1]), weight)[0]
        torch.testing.assert_close(weight.grad_sample[i], alone)
"""
TRL = """
assert LargeMarginTrainer.compute_loss is transformers.Trainer.compute_loss
"""
RECIPES = {
    "MONAI": ("monai", MONAI),
    "Keras": ("keras", KERAS),
    "sentence-transformers": ("sentence_transformers", SENTENCE_TRANSFORMERS),
    "Opacus": ("opacus", OPACUS),
    "TRL": ("trl", TRL),
    "fastai": ("fastai", ""),
}


def recipe(section: str) -> str:
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


@pytest.mark.xdist_group("recipes")  # one worker starts the server that forks their processes
@pytest.mark.parametrize("section", RECIPES)
def test_a_recipe_gives_the_loss_of_the_library(section, tmp_path, monkeypatch):
    package, check = RECIPES[section]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"without {package}")
    code = "\n".join([BEFORE, recipe(section), check])
    monkeypatch.chdir(tmp_path)
    forked.assert_runs(code, patience=300)
