"""Texts in a training loop of your own: which loss is better, by lab.compare.

    python examples/compare_texts.py

A minute on two cores; needs largemargin[lab]. The texts are sentences from the docstrings of installed packages, and the classes are the
packages. A bag of word embeddings is a weak reader, and a fifth of the labels is wrong: there a margin may help.
"""

import importlib
import inspect
import re
import sys
import zlib

import torch
from torch import Tensor, nn

from largemargin import lab

MODULES = {
    "numpy": ("numpy", "numpy.linalg", "numpy.fft", "numpy.random"),
    "scipy": ("scipy.stats", "scipy.signal", "scipy.optimize", "scipy.special", "scipy.interpolate"),
    "sklearn": ("sklearn.metrics", "sklearn.linear_model", "sklearn.cluster", "sklearn.preprocessing", "sklearn.ensemble"),
    "torch": ("torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.distributions"),
}
WORDS, LENGTH = 4096, 24  # the size of the vocabulary, to which words are hashed, and of a text


def texts_of(modules: tuple[str, ...]) -> list[list[int]]:
    """The words of each sentence, as numbers from 1 on."""
    found = set()
    for name in modules:
        for thing in vars(importlib.import_module(name)).values():
            text = inspect.getdoc(thing) if callable(thing) else None
            for sentence in re.split(r"\.\s", text or "")[:6]:
                words = re.findall(r"[a-z]{2,}", sentence.lower())
                if len(words) >= 6:
                    found.add(tuple(1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in words[:LENGTH]))
    return [list(words) for words in sorted(found)]


def load() -> tuple[Tensor, Tensor]:
    """Texts (N, LENGTH), padded with 0, and labels (N,), the same number of each class, in a fixed random order."""
    of_class = [texts_of(modules) for modules in MODULES.values()]
    smallest = min(map(len, of_class))
    order = torch.Generator().manual_seed(0)
    rows = [
        (words, label)
        for label, texts in enumerate(of_class)
        for words in (texts[i] for i in torch.randperm(len(texts), generator=order)[:smallest])
    ]
    shuffled = [rows[i] for i in torch.randperm(len(rows), generator=order)]
    texts = torch.tensor([words + [0] * (LENGTH - len(words)) for words, _ in shuffled])
    return texts, torch.tensor([label for _, label in shuffled])


def train(run):
    run.seed_everything()
    texts, labels = load()
    num_train = len(labels) * 2 // 3
    noisy, wrong = labels[:num_train].clone(), torch.rand(num_train) < 0.2
    noisy[wrong] = torch.randint(len(MODULES), (int(wrong.sum()),))
    model = nn.Sequential(nn.EmbeddingBag(WORDS, 32, padding_idx=0), nn.ReLU(), nn.Linear(32, len(MODULES)))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(10):
        for rows in torch.randperm(num_train).split(64):
            loss = run.loss(model(texts[rows]), noisy[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        run.log(epoch=epoch, loss=loss.item())
    with torch.no_grad():
        return run.score(model(texts[num_train:]), labels[num_train:])


def main(out="runs/texts", seeds=5):
    result = lab.compare(train, losses=["softmax", "label_smoothing", "large_margin"], seeds=range(seeds), out=out)
    print(result)
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
