"""Find one of 512 handwritten digits among a million classes, with the classes split over the ranks of torchrun (CPU, gloo).

    torchrun --nproc-per-node 2 examples/million_classes.py

Every image is a class of its own, and nearly a million more have none: the features of a noisy copy must point to the right one. Each
rank has a share of the batch and of the classes. The network is trained under DistributedDataParallel; the classifier is a
ClassParallelLinear, whose logits are never held: a rank keeps its classes, their gradients and a tile. Needs scikit-learn for the images.
"""

import argparse
import os
import resource
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largemargin import ClassParallelLinear, gather_rows


class Embedding(nn.Module):
    """Features of length 8, whatever the image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, width))

    def forward(self, input: Tensor) -> Tensor:
        return 8 * F.normalize(self.layers(input))


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    return images + 0.1 * torch.randn(images.shape, generator=generator)


def recall(network: nn.Module, head: ClassParallelLinear, images: Tensor, k: int) -> float:
    """The share of noisy images whose own class is among the k largest of all logits."""
    queries = noisy(images, torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, classes = head.topk(network(queries), k)
    return (classes == torch.arange(len(images)).unsqueeze(1)).any(1).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-classes", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=64, help="of the features")
    parser.add_argument("--batch", type=int, default=128, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=21)
    parser.add_argument("--checkpoint", help="a folder to save to at the end; what is there already is loaded first")
    options = parser.parse_args()

    dist.init_process_group("gloo")
    group, rank, world = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None  # there is one since init_process_group
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    torch.manual_seed(0)
    pixels = torch.tensor(load_digits().data, dtype=torch.float32)
    images = ((pixels - pixels.mean(0)) / (pixels.std(0) + 1))[:512]
    network = DistributedDataParallel(Embedding(options.width))
    head = ClassParallelLinear(options.width, options.num_classes, bias=False, group=group)
    optimizer = torch.optim.SGD([{"params": network.parameters(), "lr": 0.01}, {"params": head.parameters(), "lr": 10.0}])
    print(f"rank {rank} of {world}: process {os.getpid()}, classes [{head.class_start}, {head.class_start + len(head.weight)})", flush=True)
    if options.checkpoint and os.path.exists(os.path.join(options.checkpoint, ".metadata")):
        state = {"network": network.state_dict(), "head": head.state_dict()}
        dcp.load(state, checkpoint_id=options.checkpoint)
        network.load_state_dict(state["network"])
        head.load_state_dict(state["head"])

    before = recall(network, head, images, 1)
    order = torch.Generator().manual_seed(0)  # the same on every rank: each takes its share
    own = torch.Generator().manual_seed(rank)
    started = time.perf_counter()
    for step in range(options.steps):
        labels = torch.randperm(len(images), generator=order)[: options.batch].chunk(world)[rank]
        features, targets = gather_rows(network(noisy(images[labels], own)), labels, group=group)
        loss = head.loss(features, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 5 == 0 or step == options.steps - 1):
            print(f"step {step}: loss {loss.item():.3f}, {(time.perf_counter() - started) / (step + 1):.2f} s a step", flush=True)
    after, of_five = recall(network, head, images, 1), recall(network, head, images, 5)
    if options.checkpoint:
        dcp.save({"network": network.state_dict(), "head": head.state_dict()}, checkpoint_id=options.checkpoint)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if rank == 0:
        print(f"recall at 1 of {options.num_classes} classes: {before:.1%} before, {after:.1%} after; at 5: {of_five:.1%}")
        print(f"a rank took {peak:.2f} GiB at most")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
