"""Casts of a module leave the metrics inside it alone: sums stay float64, however they are cast, and devices still move."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from combinations import every
from largemargin import metrics
from largemargin.lab._torchvision import import_torchvision
from largemargin.metrics import MarginMetrics

CASTS = {
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(float16)": lambda module: module.to(torch.float16),
    "to(float32)": lambda module: module.to(torch.float32),
    "to(float64)": lambda module: module.to(torch.float64),
    "to(device, dtype)": lambda module: module.to("cpu", torch.bfloat16),
    "to(tensor)": lambda module: module.to(torch.zeros(1, dtype=torch.bfloat16)),
    "bfloat16()": nn.Module.bfloat16,
    "half()": nn.Module.half,
    "float()": nn.Module.float,
    "double()": nn.Module.double,
    "type(bfloat16)": lambda module: module.type(torch.bfloat16),
    "there and back": lambda module: module.half().float(),
    "_apply": lambda module: module._apply(lambda tensor: tensor.bfloat16()),
}
SET_DTYPE = {"set_dtype": lambda metric: metric.set_dtype(torch.bfloat16)}  # of a metric alone


def torchmetric(**options):
    import_torchvision()  # torchmetrics imports it, and it may not import by itself
    pytest.importorskip("torchmetrics")
    return metrics.as_torchmetric(**options)


def in_a_collection(**options):
    import_torchvision()
    torchmetrics = pytest.importorskip("torchmetrics")
    return torchmetrics.MetricCollection([metrics.as_torchmetric(**options)])


METRICS: dict[str, Callable[..., Any]] = {
    "MarginMetrics": MarginMetrics,
    "as_torchmetric": torchmetric,
    "MetricCollection": in_a_collection,
}


def batches(rng: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """25 batches of 256 rows, more than half precision can count."""
    return [(torch.randn(256, 7, generator=rng), torch.randint(7, (256,), generator=rng)) for _ in range(25)]


def holding(metric):
    module = nn.Sequential(nn.Linear(3, 3))
    module.metric = metric
    return module


def figures(metric) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


@every("cast", CASTS)
@pytest.mark.parametrize("kind", METRICS)
def test_a_cast_of_the_module_changes_no_figure(kind, cast, rng):
    plain, module = METRICS[kind](top_k=2), holding(METRICS[kind](top_k=2))
    for i, (logits, target) in enumerate(batches(rng)):
        if i in (0, 10):  # before the first row, and with sums in it
            module = CASTS[cast](module)
        plain.update(logits, target)
        module.metric.update(logits, target)
    assert figures(module.metric) == figures(plain)
    assert figures(plain)["rows"] == 6400


@every("cast", [*CASTS, *SET_DTYPE])
def test_the_sums_stay_float64_through_reset_copy_and_pickle(cast, rng):
    metric = {**CASTS, **SET_DTYPE}[cast](torchmetric())
    logits, target = batches(rng)[0]
    metric(logits, target)
    for same in (metric, metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert same.sums.dtype == torch.float64
        assert {value.dtype for value in same.compute().values()} == {torch.float64}
    metric.reset()
    assert metric.sums.dtype == torch.float64
    metric.update(logits, target)
    assert metric.compute()["rows"] == 256


@pytest.mark.parametrize("move", [lambda metric: metric.to("meta"), lambda metric: metric.to("meta", torch.bfloat16)])
def test_devices_still_move(move):
    module = move(holding(torchmetric()))
    assert module.metric.sums.device.type == "meta" and module.metric.sums.dtype == torch.float64
    assert module.metric.device.type == "meta"
    module.metric.reset()
    assert module.metric.sums.device.type == "meta"


@pytest.mark.parametrize("kind", METRICS)
def test_half_precision_by_default_changes_no_figure(kind, rng):
    stream, before = batches(rng), torch.get_default_dtype()
    plain = METRICS[kind](top_k=2)
    for batch in stream:
        plain.update(*batch)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does while a module of precision bf16-true steps
    try:
        metric = METRICS[kind](top_k=2)
        for batch in stream:
            metric.update(*batch)
        assert figures(metric) == figures(plain)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", METRICS)
def test_a_metric_of_inference_mode_goes_on_outside_of_it(kind, rng):
    stream, plain = batches(rng), METRICS[kind](top_k=2)
    with torch.inference_mode():
        metric = METRICS[kind](top_k=2)
        metric.update(*stream[0])
        metric.reset()
        metric.update(*stream[1])
    for batch in stream[2:]:
        metric.update(*batch)
    for batch in stream[1:]:
        plain.update(*batch)
    assert figures(metric) == figures(plain)


def test_metrics_of_one_setting_merge(rng):
    stream, whole, part = batches(rng), torchmetric(top_k=2), torchmetric(top_k=2)
    for batch in stream:
        whole.update(*batch)
    for batch in stream[:9]:
        part.update(*batch)
    rest = pickle.loads(pickle.dumps(torchmetric(top_k=2)))
    for batch in stream[9:]:
        rest.update(*batch)
    part.merge_state(rest)
    assert figures(part) == pytest.approx(figures(whole), rel=1e-12)
    with pytest.raises(ValueError, match="TorchMetric"):
        part.merge_state(torchmetric(top_k=3))


def test_a_checkpoint_that_was_cast_loads_as_float64(rng):
    metric, loaded = torchmetric(), torchmetric()
    for each in (metric, loaded):
        each.persistent(True)
    metric.update(*batches(rng)[0])
    loaded.load_state_dict({name: value.bfloat16() for name, value in metric.state_dict().items()})
    assert loaded.sums.dtype == torch.float64
