"""A script with a module of Lightning, turned into a comparison: the changed lines are marked.

    python examples/compare_lightning.py

A minute on two cores; needs largemargin[lab,lightning]. The data are scikit-learn's digits, and a tenth of them to train on.
"""

import sys

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from largemargin import lab  # changed


class Classifier(lightning.LightningModule):
    def __init__(self, loss):  # changed
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.loss = loss  # changed

    def training_step(self, batch, _):
        images, labels = batch
        return self.loss(self.network(images), labels)  # changed

    def predict_step(self, batch, _):
        return self.network(batch[0])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def train(run):  # changed
    run.seed_everything()  # changed
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    training = DataLoader(TensorDataset(images[:180], labels[:180]), batch_size=32, shuffle=True)
    test = DataLoader(TensorDataset(images[180:]), batch_size=256)
    trainer = lightning.Trainer(
        max_epochs=30, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    classifier = Classifier(run.loss)  # changed
    trainer.fit(classifier, training)
    return run.score(trainer.predict(classifier, test), labels[180:])  # changed


def main(out="runs/lightning", seeds=5):
    result = lab.compare(train, losses=["softmax", "large_margin"], seeds=range(seeds), out=out)  # changed
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
