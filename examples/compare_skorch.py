"""Cross-validation of scikit-learn through skorch, turned into a comparison.

    python examples/compare_skorch.py

A minute on two cores; needs largemargin[lab,skorch]. The data are the wines of scikit-learn: 178 rows of 13 chemical measurements.
The folds of a seed are the same for both losses, so they are pairs too.
"""

import sys

import torch
from sklearn.datasets import load_wine
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from skorch import NeuralNetClassifier
from torch import nn

from largemargin import lab


class Criterion(nn.Module):
    """The loss of the run, as skorch wants it."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, logits, target):
        return self.loss(logits, target)


def train(run):
    run.seed_everything()
    table, labels = load_wine(return_X_y=True)
    network = NeuralNetClassifier(
        nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, 3)),
        criterion=Criterion,
        criterion__loss=run.loss,
        optimizer=torch.optim.Adam,
        lr=1e-2,
        max_epochs=30,
        train_split=None,
        verbose=0,
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=run.seed)
    scores = cross_val_score(make_pipeline(StandardScaler(), network), table.astype("float32"), labels, cv=folds)
    return {"accuracy": 100 * scores.mean()}


def main(out="runs/skorch", seeds=5):
    result = lab.compare(train, losses=["softmax", "large_margin"], seeds=range(seeds), out=out)
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
