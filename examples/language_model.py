"""A language model whose logits are never held: the linear head and the loss in one call.

    python examples/language_model.py

Half a minute on two cores. The text is the help of Python itself (125 000 words and signs, 4200 of them different); the model is one
causal layer of a transformer. A step predicts 8192 words, whose logits are 137 MB in the plain way, and as many again for their
gradient. Memory is what is saved; the margin does not help here: with lam=0 the same run ends about 0.1 nats lower.
"""

import re
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largemargin import large_margin_cross_entropy, linear_large_margin_cross_entropy

LENGTH, WIDTH = 64, 64


class Model(nn.Module):
    """Features of each word from those before it, and the classifier that is to be used on them."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_words)

    def forward(self, input: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        features = self.words(input) + self.positions.weight
        normed: Tensor = self.norm(self.layer(features, src_mask=mask, is_causal=True))
        return normed


def plain_loss(head: nn.Linear, features: Tensor, target: Tensor, lam: float) -> Tensor:
    return large_margin_cross_entropy(head(features).flatten(0, 1), target.flatten(), lam=lam)


def linear_loss(head: nn.Linear, features: Tensor, target: Tensor, lam: float) -> Tensor:
    return linear_large_margin_cross_entropy(features, head.weight, target, linear_bias=head.bias, lam=lam)


def one_step(loss_of: Callable[..., Tensor], *arguments: object) -> tuple[float, int]:
    """The loss, and the most bytes that torch holds for it and its gradients."""
    held = peak = 0
    with torch.profiler.profile(profile_memory=True) as profiler:
        loss = loss_of(*arguments)
        loss.backward()
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return loss.item(), peak


def windows(text: Tensor, num_windows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces of the text, and the same one word on."""
    starts = torch.randint(len(text) - LENGTH, (num_windows, 1), generator=generator)
    pieces = text[starts + torch.arange(LENGTH + 1)]
    return pieces[:, :-1], pieces[:, 1:]


def main(lam: float = 0.3, num_steps: int = 60) -> dict[str, float]:
    words = re.findall(r"\w+|[^\w\s]|\n", "\n".join(topics[name] for name in sorted(topics)))
    vocabulary = {word: i for i, word in enumerate(sorted(set(words)))}
    text = torch.tensor([vocabulary[word] for word in words])
    train_text, test_text = text[: -len(text) // 10], text[-len(text) // 10 :]
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Model(len(vocabulary))
    found: dict[str, float] = {}

    input, target = windows(train_text, 128, generator)
    features = model(input).detach().requires_grad_()
    for name, loss_of in [("plain", plain_loss), ("linear", linear_loss)]:
        found[f"{name} loss"], peak = one_step(loss_of, model.head, features, target, lam)
        found[f"{name} MB"] = peak / 1e6
        print(f"{name:7} head: loss {found[f'{name} loss']:.4f}, {found[f'{name} MB']:.0f} MB in a step")
    model.zero_grad()

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(num_steps):
        input, target = windows(train_text, 128, generator)
        loss = linear_loss(model.head, model(input), target, lam=lam)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == num_steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")

    shares = (torch.bincount(train_text, minlength=len(vocabulary)) + 1) / (len(train_text) + len(vocabulary))
    input, target = windows(test_text, 64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        found["nll"] = F.cross_entropy(model.head(model(input)).flatten(0, 1), target.flatten()).item()
    found["nll of frequencies"] = F.nll_loss(shares.log().expand(target.numel(), -1), target.flatten()).item()
    print(f"nats a word on other pages: {found['nll']:.2f}; from the frequencies of words alone {found['nll of frequencies']:.2f}")
    return found


if __name__ == "__main__":
    main()
