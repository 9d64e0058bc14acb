"""The networks of the lab: their sizes, their two parts, and weights from files."""

import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from combinations import every
from largemargin.lab import models as recipes
from largemargin.lab._torchvision import import_torchvision
from largemargin.lab.errors import LabError
from largemargin.lab.models import NETWORKS, build, check_image, smallest_image, wide_resnet
from largemargin.lab.models.weights import weights_digest
from largemargin.lab.run.recipe import Recipe

import_torchvision()  # timm imports it, and it may not import by itself
timm = pytest.importorskip("timm")
TIMM_SMALL = ("timm:resnet10t", "timm:vit_tiny_patch16_224")


def network(name, in_channels=3, num_classes=10, **settings):
    return build(Recipe("softmax", 0, network=name, **settings), in_channels, num_classes)


def seeded(name, seed=0, **settings):
    torch.manual_seed(seed)
    return network(name, **settings)


def state(net):
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def one_line(error):
    return len(str(error.value).splitlines()) == 1


def test_the_names_are_those_of_recipes():
    assert (*NETWORKS, "timm:NAME") == recipes.NAMES


@pytest.mark.parametrize(
    ("name", "num_classes", "parameters"),
    [
        ("small", 10, 94_762),
        ("layer13", 10, 4_432_522),
        ("layer13", 100, 4_444_132),
        ("layer13_mean_teacher", 10, 3_121_802),
        ("layer13_mean_teacher", 100, 3_133_412),
        ("wrn28_10", 10, 36_479_194),
        ("wrn28_10", 100, 36_536_884),
        ("vgg16", 1000, 138_382_376),
        ("vgg16_mod", 1000, 37_719_080),
        ("mobilenet", 1000, 4_231_976),
        ("resnext50", 1000, 25_028_904),
        ("timm:resnet50", 1000, 25_557_032),
    ],
)
def test_parameters(name, num_classes, parameters):
    with torch.device("meta"):
        net = network(name, num_classes=num_classes)
    assert sum(p.numel() for p in net.parameters()) == parameters


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("name", [*NETWORKS, *TIMM_SMALL])
def test_shapes_of_both_parts(name, in_channels):
    size = 224 if "vit" in name else 64
    with torch.device("meta"):
        net = network(name, in_channels, 7)
        images = torch.empty(2, in_channels, size, size)
        features = net.features(images)
        assert features.shape == (2, net.classifier.in_features)
        assert net(images).shape == net.classifier(features).shape == (2, 7)
    assert type(net.classifier) is nn.Linear and net.classifier.bias is not None


@pytest.mark.parametrize("name", ["small", "layer13", "layer13_mean_teacher", "mobilenet", "timm:resnet10t"])
def test_logits_are_those_of_the_classifier_on_the_features(name):
    net = network(name).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(net(images), net.classifier(net.features(images)))


def test_taken_apart_and_whole_are_the_same_model():
    torch.manual_seed(0)
    whole = import_torchvision().models.resnext50_32x4d(num_classes=5).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(seeded("resnext50", num_classes=5).eval()(images), whole(images))
    torch.manual_seed(0)
    whole = timm.create_model("resnet10t", num_classes=5).eval()
    assert torch.equal(seeded("timm:resnet10t", num_classes=5).eval()(images), whole(images))


@pytest.mark.parametrize("name", ["timm:resnetv2_50", "timm:deit_tiny_distilled_patch16_224"])
def test_models_without_one_linear_classifier(name):
    net = network(name, num_classes=6)
    assert type(net.classifier) is nn.Linear and net.training
    assert net(torch.randn(1, 3, 224, 224)).shape == (1, 6)


def test_a_convolution_as_classifier_fills_the_linear_one(tmp_path):
    whole = timm.create_model("resnetv2_50", num_classes=4)
    torch.save(whole.state_dict(), tmp_path / "w.pt")
    net = network("timm:resnetv2_50", num_classes=4, weights=str(tmp_path / "w.pt"))
    assert torch.equal(net.classifier.weight, whole.head.fc.weight.flatten(1))


SCALED = ("layer13", "wrn28_10", "vgg16", "vgg16_mod", "mobilenet", "resnext50")


def sizes(name, **settings):
    """The number of channels or features of each layer's output, by the layer's name, and the groups of each convolution."""
    with torch.device("meta"):
        net = network(name, **settings)
    outputs = {key: tensor.shape[0] for key, tensor in net.state_dict().items() if key.startswith("features.") and tensor.ndim}
    return outputs, {key: module.groups for key, module in net.named_modules() if isinstance(module, nn.Conv2d)}


@pytest.mark.parametrize("name", SCALED)
def test_width_scales_all_channels(name):
    full, groups = sizes(name)
    quarter, fewer_groups = sizes(name, width=0.25)
    stem = ("features.0.", "features.1.norm1.") if name == "wrn28_10" else ()  # 16 channels at any width
    for key in full:
        assert quarter[key] == (full[key] if key.startswith(stem) else full[key] // 4), key
    assert fewer_groups == {key: number if number == 1 else number // 4 for key, number in groups.items()}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("width", [0.01, 0.13, 1.5])
def test_every_width_makes_a_network(name, width):
    with torch.device("meta"):
        net = network(name, 1, 7, width=width)
        assert net(torch.empty(2, 1, 64, 64)).shape == (2, 7)


def test_a_width_names_the_networks_of_other_papers():
    with torch.device("meta"):
        wrn28_2, half = network("wrn28_10", width=0.2), network("mobilenet", num_classes=1000, width=0.5)
    assert sum(p.numel() for p in wrn28_2.parameters()) == 1_467_610
    assert sum(p.numel() for p in half.parameters()) == 1_331_592


@pytest.mark.parametrize("name", ["vgg16", "vgg16_mod", "mobilenet", "wrn28_10", "resnext50"])
def test_first_weights_of_a_narrow_network_suit_its_own_sizes(name):
    convs = [module for module in seeded(name, width=0.25).modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 2000]
    assert len(convs) >= 10
    for conv in convs:
        kernel = conv.kernel_size[0] * conv.kernel_size[1]
        fan = kernel * (conv.in_channels // conv.groups if name == "wrn28_10" else conv.out_channels)
        expected = 0.01 if name.startswith("vgg") else (2 / fan) ** 0.5
        assert conv.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_dropout_where_it_belongs():
    with torch.device("meta"):
        net = network("wrn28_10", dropout=0.3)
        assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == 12 * [0.3]
        assert network("timm:resnet10t", dropout=0.2).features.drop_rate == 0.2


def test_mean_teacher_is_noisy_in_training_alone():
    net = network("layer13_mean_teacher")
    noise = net.features[0]
    images = torch.zeros(8, 3, 32, 32)
    assert torch.equal(noise.eval()(images), images)
    assert noise.train()(images).std().item() == pytest.approx(0.15, rel=0.05)
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]
    assert {m.negative_slope for m in net.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}


@pytest.mark.parametrize("name", ["small", "layer13", "mobilenet", "timm:resnet10t", "timm:vit_tiny_patch16_224"])
def test_the_seed_fixes_the_weights(name):
    first = state(seeded(name))
    assert same(first, state(seeded(name)))
    other = state(seeded(name, seed=1))
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"]) or not same(first, other)


def test_first_weights():
    net = network("layer13", width=0.25)
    conv = [m for m in net.modules() if isinstance(m, nn.Conv2d)][4]
    fan_out = conv.out_channels * 9
    assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert network("layer13", num_classes=1000).classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert net.classifier.bias.count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "image_size", "channels", "size"),
    [
        ("small", 32, 128, 8),
        ("layer13", 32, 128, 6),
        ("layer13_mean_teacher", 32, 128, 6),
        ("wrn28_10", 32, 640, 8),
        ("vgg16", 224, 512, 7),
        ("vgg16_mod", 224, 4096, 14),
        ("mobilenet", 224, 1024, 7),
        ("resnext50", 224, 2048, 7),
    ],
)
def test_maps_before_the_pooling(name, image_size, channels, size):
    shapes = []
    with torch.device("meta"):
        net = network(name)
        pool = next(module for module in net.modules() if isinstance(module, nn.AdaptiveAvgPool2d))
        pool.register_forward_hook(lambda module, inputs, output: shapes.append(inputs[0].shape))
        net(torch.empty(2, 3, image_size, image_size))
    assert shapes == [(2, channels, size, size)]


def test_shortcuts_of_wide_blocks():
    for channels in (4, 8):
        block = wide_resnet.Block(channels, 8, stride=1, dropout=0.0).eval()
        nn.init.zeros_(block.conv2.weight)
        images = torch.randn(2, channels, 6, 6)
        way = block.shortcut(F.relu(block.norm1(images))) if channels == 4 else images
        torch.testing.assert_close(block(images), way)


def test_first_weights_and_eps_of_vgg():
    net = network("vgg16_mod")
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)} == {1e-4}
    for module in [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
        assert module.weight.std().item() == pytest.approx(0.01, rel=0.1) and module.bias.count_nonzero() == 0


@pytest.mark.parametrize("name", NETWORKS)
def test_smallest_image(name):
    size = smallest_image(name)
    with torch.device("meta"):
        net = network(name)
        assert net(torch.empty(2, 3, size, size)).shape == (2, 10)
        if size > 1:
            with pytest.raises(RuntimeError):
                net(torch.empty(2, 3, size - 1, size - 1))
    check_image(name, size)


def test_check_image():
    with pytest.raises(LabError, match=r"layer13 takes images from 12 pixels, and these have 8") as error:
        check_image("layer13", 8)
    assert one_line(error)
    assert smallest_image("timm:resnet10t") == 1
    check_image("timm:resnet10t", 32)
    assert smallest_image("timm:vit_tiny_patch16_224") == 224
    check_image("timm:vit_tiny_patch16_224", 224)
    for size in (32, 256):
        with pytest.raises(LabError, match=f"takes only images of 224 pixels, and these have {size}"):
            check_image("timm:vit_tiny_patch16_224", size)


@every(
    "settings, message",
    [
        ({"network": "leyer13"}, "did you mean layer13"),
        ({"network": "timm:resnet5"}, "close to it: .*resnet50"),
        ({"network": "timm:resnet50.never"}, "not a model of timm"),
        ({"network": "timm:hf-hub:someone/something"}, "not a model of timm"),
        ({"network": "timm:gemma4_vit_167m_enc"}, "not made for classification"),
        ({"network": "small", "width": 0.5}, "width 0.5"),
        ({"network": "layer13_mean_teacher", "width": 0.5}, "width 0.5"),
        ({"network": "layer13", "width": 0.0}, "above 0"),
        ({"network": "layer13", "dropout": 0.5}, "dropout 0.5"),
        ({"network": "wrn28_10", "dropout": 1.0}, "below 1"),
        ({"network": "timm:resnet10t", "width": 2.0}, "width 2"),
    ],
)
def test_errors_of_settings(settings, message):
    with pytest.raises(LabError, match=message) as error:
        build(Recipe("softmax", 0, **settings), 3, 10)
    assert one_line(error)


def test_timm_is_asked_for_where_it_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    build(Recipe("softmax", 0, network="small"), 1, 2)
    with pytest.raises(LabError) as error:
        build(Recipe("softmax", 0, network="timm:resnet10t"), 1, 2)
    assert str(error.value).endswith(
        "needs timm, which is not installed; install it with: pip install 'largemargin[timm]', or pip install -e '.[timm]' in a clone"
    )


# weights from files


def save(tensors, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return str(path)


@pytest.mark.parametrize("file", ["w.safetensors", "w.pt", "w.pth"])
@pytest.mark.parametrize("name", ["small", "timm:resnet10t", "timm:densenet121"])
def test_own_weights_round_trip(tmp_path, name, file):
    saved = state(seeded(name))
    path = save(saved, tmp_path / file)
    assert not same(saved, state(seeded(name, seed=1)))
    assert same(saved, state(seeded(name, seed=1, weights=path)))


@pytest.mark.parametrize("name", ["resnext50", "timm:resnet10t", "timm:densenet121", "timm:convnext_atto"])
def test_weights_of_the_plain_model(tmp_path, name):
    torch.manual_seed(0)
    whole = import_torchvision().models.resnext50_32x4d() if name == "resnext50" else timm.create_model(name.removeprefix("timm:"))
    path = save(whole.state_dict(), tmp_path / "w.pt")
    images = torch.randn(2, 3, 64, 64)
    full = seeded(name, seed=1, num_classes=1000, weights=path).eval()
    assert torch.equal(full(images), whole.eval()(images))
    other = seeded(name, seed=1, num_classes=5, weights=path).eval()
    assert torch.equal(other.features(images), full.features(images))
    assert torch.equal(other.classifier.weight, seeded(name, seed=1, num_classes=5).classifier.weight)


@every("wrap", ["state_dict", "model", "network", "module.", "_orig_mod.", "module._orig_mod.", "counters", "no classifier"])
def test_accepted_forms(tmp_path, wrap):
    saved = state(seeded("small"))
    form: dict[str, Any]
    if wrap.endswith("."):
        form = OrderedDict((wrap + key, tensor) for key, tensor in saved.items())
    elif wrap == "counters":
        form = {key: tensor for key, tensor in saved.items() if not key.endswith("num_batches_tracked")}
    elif wrap == "no classifier":
        form = {key: tensor for key, tensor in saved.items() if not key.startswith("classifier")}
    else:
        form = {wrap: saved, "epoch": 3}
    loaded = state(seeded("small", seed=1, weights=save(form, tmp_path / "w.pt")))
    if wrap == "no classifier":
        fresh = seeded("small", seed=1).classifier
        assert torch.equal(loaded["classifier.weight"], fresh.weight) and torch.equal(
            loaded["features.0.weight"], saved["features.0.weight"]
        )
    else:
        assert same(loaded, saved)


def test_errors_of_weights(tmp_path):
    good = state(network("small"))

    def message(path):
        with pytest.raises(LabError) as error:
            network("small", weights=str(path))
        assert one_line(error) and "weights" in str(error.value)
        return str(error.value)

    assert "is not a file" in message(tmp_path / "none.pt")
    assert "is not a file" in message(tmp_path)
    (tmp_path / "w.txt").write_text("weights")
    assert "ends in .txt" in message(tmp_path / "w.txt")
    for name in ("w.pt", "w.pth", "w.safetensors"):
        for content in (b"", b"no weights", bytes(range(256)) * 4):
            (tmp_path / name).write_bytes(content)
            assert "broken" in message(tmp_path / name)
    for name in ("whole.pt", "whole.safetensors"):
        whole = Path(save(good, tmp_path / name))
        whole.write_bytes(whole.read_bytes()[:5000])
        assert "broken" in message(whole)
    assert "no state dict" in message(save([1, 2], tmp_path / "list.pt"))
    assert "no state dict" in message(save({"epoch": 3}, tmp_path / "number.pt"))
    assert "missing features.0.weight;" in message(save({k: v for k, v in good.items() if k != "features.0.weight"}, tmp_path / "a.pt"))
    assert "unexpected more;" in message(save({**good, "more": torch.zeros(1)}, tmp_path / "b.pt"))
    assert "(32, 1, 3, 3) for (32, 3, 3, 3)" in message(save(state(network("small", in_channels=1)), tmp_path / "c.pt"))
    many = message(save({"other": torch.zeros(1)}, tmp_path / "d.pt"))
    assert "features.0.weight, features.1.weight, features.1.bias and" in many


def test_weights_digest(tmp_path):
    (tmp_path / "w.pt").write_bytes(b"abc")
    assert weights_digest(tmp_path / "w.pt") == "ba7816bf8f01"
    with pytest.raises(LabError, match="cannot be read"):
        weights_digest(tmp_path / "none.pt")


def test_weights_may_lie_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    saved = state(seeded("small", seed=0))
    path = save(saved, tmp_path / "w.pt")
    assert weights_digest("~/w.pt") == weights_digest(path)
    assert same(saved, state(seeded("small", seed=1, weights="~/w.pt")))


# the ways an engine runs them


@pytest.mark.parametrize(
    "name", ["small", "layer13", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layer13_mean_teacher", "timm:resnet10t"))]
)
def test_channels_last_autocast_and_compile(name, device):
    settings = {"width": 0.125} if name == "layer13" else {}
    net = seeded(name, **settings).to(device)
    images = torch.randn(4, 3, 32, 32).to(device)
    expected = net.eval()(images)
    scale = expected.abs().max().item()
    net.to(memory_format=torch.channels_last)
    last = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(last), expected, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(last), expected, rtol=0, atol=1e-4 * scale)
    with torch.autocast(device.type, torch.bfloat16):
        logits = net(last)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.1 * scale)
    net.train()
    with torch.autocast(device.type, torch.bfloat16):
        loss = F.cross_entropy(torch.compile(net, backend="aot_eager")(last).float(), torch.arange(4, device=device))
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, "timm:resnet18"])
def test_two_steps_at_full_size(name, device):
    cifar = name in ("small", "layer13", "layer13_mean_teacher", "wrn28_10")
    net = seeded(name, num_classes=10 if cifar else 1000).to(device)
    images = torch.randn(2, 3, *(2 * [32 if cifar else 224])).to(device)
    before = state(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), torch.tensor([0, 1], device=device))
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    after = net.state_dict()
    assert [key for key, _ in net.named_parameters() if torch.equal(before[key], after[key])] == []
