"""A training step: the same numbers however it is run, and nothing in it that waits for the device."""

import contextlib
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largemargin import row_stats
from largemargin.lab import models
from largemargin.lab.data import crops
from largemargin.lab.data.images import ImageSet
from largemargin.lab.run import feeds, train, trainer
from largemargin.lab.run.cuda_graph import CudaGraph
from largemargin.lab.run.feeds import Batch, InMemory
from largemargin.lab.run.machine import start
from largemargin.lab.run.method import Method, parameter_groups
from largemargin.lab.run.methods import LOSSES
from largemargin.lab.run.optimizer import learning_rates
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.seeds import seeded
from largemargin.lab.run.step import EagerStep, GraphedStep, replaced_buffers
from largemargin.lab.stopping import Told
from measure import waiting_refused

CPU, META = torch.device("cpu"), torch.device("meta")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def recipe(loss="large_margin", **changes):
    return Recipe(**{"loss": loss, "seed": 3, "batch_size": 16, "epochs": 3, "crop_padding": 1, "flip": True, **LOSSES[loss], **changes})


def image_set(num_train=72, size=8):
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num_train + 20, 1, size, size), generator=g, dtype=torch.uint8)
    labels = torch.arange(num_train + 20) % 10
    return ImageSet(images[:num_train], labels[:num_train], images[num_train:], labels[num_train:], tuple("abcdefghij"))


def random_batches(num, size, device=CPU, pixels=8):
    g = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(size, 1, pixels, pixels, generator=g).to(device), torch.randint(10, (size,), generator=g).to(device), size)
        for _ in range(num)
    ]


def made(recipe, device=CPU, in_channels=1):
    """The method of a recipe and its step."""
    torch.manual_seed(0)
    method = Method(recipe, models.build(recipe, in_channels, 10), 100).to(device)
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.SGD(parameter_groups(recipe, method.network), lr=recipe.learning_rate, momentum=recipe.momentum, fused=fused)
    if fused:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(recipe.learning_rate, device=device)
    return method.train(), EagerStep(method, optimizer, recipe.clip_norm)


# the feed


def fed_batch_by_batch(recipe, images, epoch):
    """What a feed from memory has always given: rows, moves and copies batch by batch."""
    feed = InMemory(recipe, images, CPU)
    for step, rows in enumerate(torch.split(feeds.order_of(recipe, len(images.train_labels), epoch), recipe.batch_size)):
        g = seeded(recipe.seed, "augmentation", epoch, step)
        top, left = torch.randint(0, 2 * recipe.crop_padding + 1, (2, len(rows)), generator=g)
        mirrored = torch.rand(len(rows), generator=g) < 0.5
        padded = crops.pad(images.train_images[rows], recipe.crop_padding, feed.fill)
        height, width = images.train_images.shape[2:]
        moved = [
            image[:, t : t + height, x : x + width].flip(2) if m else image[:, t : t + height, x : x + width]
            for image, t, x, m in zip(padded, top.tolist(), left.tolist(), mirrored.tolist(), strict=True)
        ]
        yield feed.normalize(torch.stack(moved)), images.train_labels[rows]


@pytest.mark.parametrize("first_step", [0, 2, 4])
def test_the_planned_feed_is_the_feed_drawn_batch_by_batch(first_step):
    images = image_set()
    for epoch in (0, 5):
        planned = list(InMemory(recipe(), images, CPU).training(epoch, first_step))
        drawn = list(fed_batch_by_batch(recipe(), images, epoch))[first_step:]
        assert len(planned) == 5 - first_step
        for batch, (moved, target) in zip(planned, drawn, strict=True):
            assert torch.equal(batch.images, moved) and torch.equal(batch.target, target) and batch.size == len(target)


def test_both_ways_of_mirroring_are_one(rng, device):
    images, mirrored = torch.rand(9, 2, 4, 5, generator=rng).to(device), torch.arange(9, device=device) % 2
    few, all_ = crops.mirror(images, mirrored), crops.mirror_without_counting(images, mirrored)
    assert torch.equal(few, all_) and torch.equal(few[1], images[1].flip(2)) and torch.equal(few[0], images[0])


# nothing waits for the device: the meta device has no values to wait for


class Copies(TorchDispatchMode):
    """Notes the operations that see tensors of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            self.seen.append(str(func))
        return result


@pytest.fixture
def autocast_on_meta(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # torch knows none for this device


@pytest.mark.parametrize(("loss", "network"), [*((loss, "small") for loss in LOSSES), ("large_margin", "layer13_mean_teacher")])
def test_a_step_reads_nothing_from_the_device_and_copies_nothing_to_it(loss, network, autocast_on_meta):
    _, step = made(recipe(loss, network=network, clip_norm=1.0, channels_last=True), META)
    (batch,) = random_batches(1, 16, META, pixels=12)
    with Copies() as copies:
        for _ in range(2):
            assert step.run(batch).is_meta
    assert not copies.seen


def test_the_guard_against_waiting_notices_it():
    with pytest.raises(RuntimeError), Copies():
        torch.ones(3, device=META).sum().item()
    with Copies() as copies:
        torch.ones(3).to(META)
    assert copies.seen


def test_an_epoch_is_copied_to_the_device_at_once():
    feed = InMemory(recipe(), image_set(), META)
    with Copies() as copies:
        for epoch in range(3):
            assert [len(batch.target) for batch in feed.training(epoch)] == [16, 16, 16, 16, 8]
    assert copies.seen == ["aten._to_copy.default"] * 3


# a step from a graph


class Replayed:
    """Stands in for a CUDA graph without a GPU: a replay runs the function that was recorded."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error
        self.calls: list[str] = []

    def warm_up(self, function):
        self.calls.append("warm up")
        return function()

    def record(self, function):
        self.calls.append("record")
        if self.error is not None:
            raise RuntimeError(self.error)
        self.function, self.result = function, torch.empty(5, dtype=torch.float64)
        return self.result

    def seed(self, seed):
        torch.manual_seed(seed)

    def replay(self):
        self.calls.append("replay")
        self.result.copy_(self.function())


def assert_equal_states(one, other):
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_from_static_buffers_is_the_plain_step(loss):
    said: list[str] = []
    plain_method, plain = made(recipe(loss, network="layer13_mean_teacher", width=1.0)) if loss == "softmax" else made(recipe(loss))
    method, step = made(recipe(loss, network="layer13_mean_teacher", width=1.0)) if loss == "softmax" else made(recipe(loss))
    graph = Replayed()
    graphed = GraphedStep(step, 16, graph, said.append)
    pixels = 12 if loss == "softmax" else 8
    batches = [*random_batches(5, 16, pixels=pixels), *random_batches(1, 7, pixels=pixels), *random_batches(2, 16, pixels=pixels)]
    for seed, batch in enumerate(batches):
        assert torch.equal(plain(batch, seed), graphed(batch, seed))
    assert_equal_states(plain_method, method)
    assert graph.calls == ["warm up"] * 3 + ["record"] + ["replay"] * 4 and not said


class ReplacesItsState(torch.nn.CrossEntropyLoss):
    """A loss that assigns a new tensor to its buffer in every forward pass."""

    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, input, target):
        self.count = self.count + 1
        return super().forward(input, target)


def test_a_loss_that_replaces_its_state_runs_eagerly_and_says_so():
    said: list[str] = []
    (plain_method, plain), (method, step) = made(recipe()), made(recipe())
    plain_method.criterion, method.criterion = ReplacesItsState(), ReplacesItsState()
    graph = Replayed()
    graphed = GraphedStep(step, 16, graph, said.append)
    for seed, batch in enumerate(random_batches(6, 16)):
        assert torch.equal(plain(batch, seed), graphed(batch, seed))
    assert_equal_states(plain_method, method)
    assert graph.calls == ["warm up"] and len(said) == 1 and "replaces its state (criterion.count)" in said[0]


@pytest.mark.parametrize(("error", "reason"), [("operation not permitted\nand more", "(operation not permitted)"), ("", "(RuntimeError)")])
def test_where_the_capture_fails_the_run_goes_on_eagerly_and_says_so_once(error, reason):
    said: list[str] = []
    (plain_method, plain), (method, step) = made(recipe()), made(recipe())
    graphed = GraphedStep(step, 16, Replayed(error), said.append)
    for seed, batch in enumerate(random_batches(8, 16)):
        assert torch.equal(plain(batch, seed), graphed(batch, seed))
    assert_equal_states(plain_method, method)
    (message,) = said
    assert message.endswith(reason)


def test_an_error_of_the_step_itself_is_raised():
    _, step = made(recipe())
    graphed = GraphedStep(step, 16, Replayed(), print)
    (batch,) = random_batches(1, 16)
    with pytest.raises(IndexError):
        graphed(batch._replace(target=batch.target + 100), 0)


def test_buffers_that_are_written_in_place_are_not_replaced():
    module = torch.nn.BatchNorm2d(1)
    before = dict(module.named_buffers())
    module(torch.rand(4, 1, 2, 2))
    assert not replaced_buffers(before, module)
    module.running_mean = module.running_mean + 1
    assert replaced_buffers(before, module) == ["running_mean"]


# a run on the CPU, which is equal bit for bit


def plain_run(recipe, images):
    """The training loop in its shortest form, and what an epoch's rows say of its batches."""
    torch.manual_seed(seeded(recipe.seed, "weights").initial_seed())
    network = models.build(recipe, 1, 10)
    num_steps = -(-len(images.train_labels) // recipe.batch_size)
    method = Method(recipe, network, recipe.epochs * num_steps)
    optimizer = torch.optim.SGD(parameter_groups(recipe, network), lr=recipe.learning_rate, momentum=recipe.momentum)
    rows = []
    for epoch in range(recipe.epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(recipe)[epoch] * group["factor"]
        method.train()
        totals, shares = [0.0] * 4, []
        for step, (moved, target) in enumerate(fed_batch_by_batch(recipe, images, epoch)):
            torch.manual_seed(seeded(recipe.seed, "layers", epoch, step, 0).initial_seed())
            made = method(moved, target, len(target))
            made.logits.retain_grad()
            optimizer.zero_grad()
            made.loss.backward()
            optimizer.step()
            stats = row_stats(made.plain.detach(), target)
            errors = (made.plain.argmax(-1) != target).sum()
            of_batch = torch.stack([made.loss.detach() * len(target), errors, stats.rho.sum(), (stats.log_odds + stats.rho).sum()])
            totals = [total + value for total, value in zip(totals, of_batch.double().tolist(), strict=True)]
            shares.append((made.logits.grad != 0).double().mean().item())
        rows.append([*(total / len(images.train_labels) for total in totals), shares[0]])
    return rows, network


@pytest.mark.parametrize("loss", ["softmax", "large_margin", "noisy_softmax", "gaussian_mixture", "center_large_margin"])
def test_a_run_on_the_cpu_is_bit_for_bit_the_plain_loop(loss, tmp_path):
    networks = []
    record = train.train(recipe(loss), image_set(), tmp_path, on_end=lambda network, feed: networks.append(network))
    rows, network = plain_run(recipe(loss), image_set())
    names = ("train_loss", "train_error", "train_rho", "train_margin", "gradient_share")
    for epoch, row in zip(record["epochs"], rows, strict=True):
        row[1] *= 100
        assert [epoch[name] for name in names] == row
    assert_equal_states(networks[0], network)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_where_compilation_fails_the_run_goes_on_without_it_and_says_so_once(where, tmp_path, monkeypatch):
    def broken(graph, inputs):
        if where == "forward":
            raise ValueError("no such instruction\nand more")

        class Fails(torch.autograd.Function):
            @staticmethod
            def forward(ctx, result):
                return result.clone()

            @staticmethod
            def backward(ctx, gradient):
                raise RuntimeError("no such instruction\nand more")

        return lambda *args: [Fails.apply(result) for result in graph(*args)]

    torch.compiler.reset()
    monkeypatch.setattr(
        torch, "compile", lambda function, backend, dynamic, compile=torch.compile: compile(function, backend=broken, dynamic=dynamic)
    )
    monkeypatch.setattr(torch.compiler, "list_backends", lambda **_: ["broken"])
    said: list[str] = []
    compiled = train.train(recipe(compile="broken"), image_set(), tmp_path / "compiled", on_message=said.append)
    plain = train.train(recipe(), image_set(), tmp_path / "plain")
    assert compiled["epochs"] == plain["epochs"]
    (message,) = said
    assert "no such instruction" in message and "and more" not in message


# with a GPU


@contextlib.contextmanager
def deterministic():
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@needs_gpu
@pytest.mark.parametrize(
    ("loss", "network"),
    [
        *((loss, "layer13") for loss in LOSSES),
        ("softmax", "layer13_mean_teacher"),  # which draws random numbers
        ("large_margin", "layer13_mean_teacher"),
    ],
)
def test_graph_and_eager_agree_over_50_steps(loss, network, tmp_path):
    one = recipe(loss, network=network, device="cuda", epochs=10, batch_size=32, **({"width": 0.25} if network == "layer13" else {}))
    states: list[dict[str, Tensor]] = []
    messages: list[str] = []
    for graph in (True, False):
        accelerator = start(one)
        with deterministic():
            folder = tmp_path / str(graph)
            run = trainer.Run(one, image_set(160, 12), folder, accelerator, Told(), graph=graph, on_message=messages.append)
            for epoch in range(10):
                run.train_epoch()
                run.progress.epoch, run.progress.step = epoch + 1, 0
        recorded = isinstance(run.step, GraphedStep) and run.step.static is not None
        assert recorded == graph
        states.append({name: value.double().cpu() for name, value in run.method.state_dict().items()})
    assert not messages
    for name, value in states[0].items():
        assert (value - states[1][name]).abs().max() <= 1e-4 * (1 + value.abs().max()), name


@needs_gpu
def test_a_run_from_a_graph_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    one = recipe(device="cuda", epochs=6, network="layer13_mean_teacher", learning_rate=0.01)
    epochs = []

    def stop(row):
        if row["epoch"] == 3:
            raise KeyboardInterrupt

    unbroken = train.train(one, image_set(160, 12), tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        train.train(one, image_set(160, 12), tmp_path / "broken", stop)
    resumed = train.train(one, image_set(160, 12), tmp_path / "broken", lambda row: epochs.append(row["epoch"]))
    assert epochs == [4, 5, 6]
    for ours, theirs in zip(resumed["epochs"], unbroken["epochs"], strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-2)


@needs_gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_on_a_gpu_does_not_synchronise(loss):
    device = torch.device("cuda")
    _, step = made(recipe(loss, precision="bfloat16", channels_last=True, clip_norm=1.0), device)
    feed = InMemory(recipe(loss), image_set(), device)
    for batch in feed.training(0):
        step(batch, 0)  # compiles
    with waiting_refused():
        counted = [step(batch, 1) for batch in itertools.islice(feed.training(1), 3)]
    assert torch.stack(counted).isfinite().all()


@needs_gpu
def test_a_capture_that_fails_leaves_the_process_as_it_was():
    device = torch.device("cuda")
    _, step = made(recipe(network="layer13_mean_teacher"), device)
    batches = random_batches(3, 16, device, pixels=12)
    step(batches[0], 0)
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        CudaGraph(device).record(lambda: step.run(batches[0]).sum().item())
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()
    first = step(batches[1], 1)  # draws noise
    assert first.isfinite().all()
    graphed = GraphedStep(step, 16, CudaGraph(device), pytest.fail)
    for seed in range(5):
        graphed(batches[2], seed)
    assert graphed.static is not None
