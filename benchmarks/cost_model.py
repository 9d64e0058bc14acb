"""What a step of each loss costs a rank: bytes held, bytes sent, FLOP, bytes moved, and the seconds that these take on a cluster.

A step is the forward and backward pass of a linear classifier and its loss. Counts follow from the algorithms, and tests compare them with
what real ranks hold and send. Seconds are counts over three measured or assumed rates: of FLOP, of memory, of links. Nothing overlaps.
docs/scaling.md explains the model in words.
"""

import math
from typing import Literal, NamedTuple

from largemargin.rows import tiles

STATISTICS = 6  # float32 numbers a row that ranks exchange
MERGED = 45  # bytes a row and rank that it takes to merge them: 6 numbers received, 5 made of them, and a flag


class Problem(NamedTuple):
    """One loss on a mesh: ``class_ranks`` ranks share the classes and the rows, ``data_ranks`` such groups average their gradients."""

    rows: int  # of a group
    width: int
    classes: int
    class_ranks: int = 1
    data_ranks: int = 1
    fused: bool = True  # False holds the logits; on one rank of classes it is F.cross_entropy of F.linear
    itemsize: int = 4  # bytes of a number of features and classifier: 4, or 2 on a GPU
    tile: int = tiles.TILE  # numbers in a tile; on a CPU it has at least half the classifier's

    @property
    def classes_here(self) -> int:
        return -(-self.classes // self.class_ranks)

    @property
    def logits_here(self) -> int:
        return self.rows * self.classes_here

    @property
    def parameters_here(self) -> int:
        return self.classes_here * self.width

    @property
    def is_in_place(self) -> bool:
        """Whether the memory of the classifier's gradient holds the logits."""
        return self.fused and self.itemsize == 4 and self.rows <= self.width and self.logits_here > self.tile

    @property
    def num_tiles(self) -> int:
        if not self.fused or self.is_in_place:
            return 1
        most = max(self.tile, self.parameters_here // 2) if self.itemsize == 4 else self.tile
        return max(1, -(-self.rows // max(1, most // self.classes_here)))

    @property
    def num_products(self) -> int:
        """Ranks need the statistics of all rows before any gradient, so they compute the logits of several tiles twice."""
        return 4 if self.class_ranks > 1 and self.num_tiles > 1 else 3

    @property
    def accumulator(self) -> int:
        """Bytes of a number of a gradient while it is summed up."""
        return 4 if self.fused else self.itemsize


def held(problem: Problem) -> int:
    """The most bytes that a rank holds: features, classifier, their gradients, and what else the step takes."""
    numbers = problem.rows * problem.width + problem.parameters_here
    leaves, gradients = problem.itemsize * numbers, problem.accumulator * numbers
    statistics = MERGED * problem.class_ranks * problem.rows if problem.class_ranks > 1 else 0
    if not problem.fused:
        logits = problem.itemsize * problem.logits_here
        copies = 3 if problem.class_ranks == 1 else 2  # F.cross_entropy holds log-probabilities and two gradients
        return leaves + max(logits + statistics, copies * logits, logits + gradients)
    if problem.is_in_place:
        workspace = 4 * problem.tile
    else:
        of_a_logit = 4 if problem.itemsize == 4 else 4 + problem.itemsize  # and its gradient in half precision
        workspace = of_a_logit * -(-problem.rows // problem.num_tiles) * problem.classes_here
    rounded = 0 if problem.itemsize == 4 else problem.itemsize * numbers  # the gradients that the caller gets
    return leaves + gradients + max(workspace + statistics, rounded)


class Exchange(NamedTuple):
    """One collective: every rank of the group gives ``payload`` bytes."""

    kind: Literal["all_gather", "all_reduce"]
    over: Literal["classes", "data"]
    payload: int

    def sent(self, ranks: int) -> float:
        """Bytes that each of the ranks sends by a ring."""
        return self.payload * (ranks - 1) * (1.0 if self.kind == "all_gather" else 2 / ranks)


def exchanges(problem: Problem) -> list[Exchange]:
    """The collectives of a step, in their order; every rank starts with its own share of the rows."""
    found: list[Exchange] = []
    if problem.class_ranks > 1:
        own = problem.rows // problem.class_ranks
        features = Exchange("all_gather", "classes", problem.itemsize * own * problem.width)
        found += [Exchange("all_gather", "classes", 2 * 8), features, Exchange("all_gather", "classes", 8 * own)]  # gather_rows
        if problem.fused:
            found.append(Exchange("all_gather", "classes", 7 * 8))  # sizes, and a checksum of the labels
        found.append(Exchange("all_gather", "classes", 4 * STATISTICS * problem.rows))
        found.append(Exchange("all_reduce", "classes", problem.accumulator * problem.rows * problem.width))
    if problem.data_ranks > 1:
        found.append(Exchange("all_reduce", "data", problem.itemsize * problem.parameters_here))
    return found


def ranks_of(problem: Problem, exchange: Exchange) -> int:
    return problem.class_ranks if exchange.over == "classes" else problem.data_ranks


def sent(problem: Problem) -> float:
    """The bytes that a rank sends in a step."""
    return sum(exchange.sent(ranks_of(problem, exchange)) for exchange in exchanges(problem))


def flop(problem: Problem) -> int:
    """Of the products; a logit's exponentials are few beside them."""
    return 2 * problem.num_products * problem.logits_here * problem.width


def moved_by_products(problem: Problem) -> int:
    """The bytes that products read and write: each tile reads the classifier, and adds to its gradient.

    In half precision one more product sums the classifier over the classes.
    """
    times_logits = problem.num_products - 2
    of_a_parameter = problem.num_tiles * (problem.itemsize * (times_logits + 1) + 2 * problem.accumulator) - problem.accumulator
    if problem.fused and problem.itemsize < 4:
        of_a_parameter += problem.itemsize
    of_a_logit = problem.accumulator * times_logits + 2 * problem.itemsize
    return of_a_parameter * problem.parameters_here + of_a_logit * problem.logits_here


def moved_by_loss(problem: Problem) -> int:
    """The bytes that the loss itself reads and writes, and the scaling and rounding of gradients in half precision."""
    if not problem.fused:
        return (6 if problem.class_ranks == 1 else 3) * problem.itemsize * problem.logits_here
    finish = 0 if problem.itemsize == 4 else 3 * 8 + 4 + problem.itemsize  # three products in place, and a copy
    return (4 + 4 + problem.itemsize) * problem.logits_here + finish * problem.parameters_here


class Cluster(NamedTuple):
    """What GPUs, or the processes of one machine, achieve: FLOP and bytes a second."""

    flop: float
    memory: float
    inside: float  # bytes a second that a rank sends to another one of its machine
    between: float  # and over the network
    ranks_a_machine: int = 8
    latency_inside: float = 0.0  # seconds of a message
    latency_between: float = 0.0


def seconds(problem: Problem, cluster: Cluster) -> dict[str, float]:
    """The parts of the time of a step, one after the other."""
    parts = {
        "products": max(flop(problem) / cluster.flop, moved_by_products(problem) / cluster.memory),
        "loss": moved_by_loss(problem) / cluster.memory,
        "classes": 0.0,
        "data": 0.0,
    }
    for exchange in exchanges(problem):
        parts[exchange.over] += seconds_of(exchange, problem, cluster)
    return parts


def seconds_of(exchange: Exchange, problem: Problem, cluster: Cluster) -> float:
    """The latency of its messages, and its bytes over the slowest link: neighbouring ranks share the classes."""
    ranks = ranks_of(problem, exchange)
    stride = 1 if exchange.over == "classes" else problem.class_ranks
    together = max(1, min(ranks, cluster.ranks_a_machine // stride))  # ranks of the group in one machine
    machines = ranks / together
    # a machine has a network link for each of its ranks, and the group uses those of its own
    rate = cluster.inside if machines == 1 else min(cluster.inside, cluster.between * together)
    if exchange.kind == "all_gather":  # a ring
        latency = (ranks - machines) * cluster.latency_inside + (machines if machines > 1 else 0) * cluster.latency_between
    else:  # a tree, up and down
        latency = 2 * (math.log2(together) * cluster.latency_inside + math.log2(machines) * cluster.latency_between)
    return latency + exchange.sent(ranks) / rate


# an H100 SXM has 989 TFLOP/s in bfloat16, 3.35 TB/s of memory, 450 GB/s of NVLink each way and 50 GB/s of InfiniBand; we assume that half
# of the first is achieved, and four fifths of the others
H100 = Cluster(0.5 * 989e12, 0.8 * 3.35e12, 0.8 * 450e9, 0.8 * 50e9, latency_inside=2e-6, latency_between=5e-6)
H100_BYTES = 80e9
ADAMW_HELD = 12  # bytes a parameter of half precision: a float32 copy and two float32 moments
ADAMW_MOVED = 28  # reads and writes these and the parameter, reads the gradient


def held_in_training(problem: Problem) -> int:
    return held(problem) + ADAMW_HELD * problem.parameters_here


def seconds_in_training(problem: Problem, cluster: Cluster) -> dict[str, float]:
    return {**seconds(problem, cluster), "AdamW": ADAMW_MOVED * problem.parameters_here / cluster.memory}


def meshes(rows_a_rank: int, width: int, classes: int, ranks: int, *, fused: bool = True, tile: int = tiles.TILE_OF_GPU) -> list[Problem]:
    """The ways to split so many GPUs into ranks of classes and ranks of data, by powers of two; numbers are bfloat16."""
    sizes = [2**i for i in range(int(math.log2(ranks)) + 1)]
    return [Problem(rows_a_rank * size, width, classes, size, ranks // size, fused, 2, tile) for size in sizes]


def best(problems: list[Problem], cluster: Cluster, capacity: float) -> Problem | None:
    """The fastest that fits."""
    fitting = [problem for problem in problems if held_in_training(problem) <= capacity]
    return min(fitting, key=lambda problem: sum(seconds_in_training(problem, cluster).values()), default=None)
