"""What CONTRIBUTING.md adds to the lab: a data set, a network and a method, each by an entry of a table and one function."""

import math
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("accelerate")

from largemargin.lab import data, models
from largemargin.lab.data import SETS
from largemargin.lab.data.images import ImageSet
from largemargin.lab.models import NETWORKS
from largemargin.lab.run import losses
from largemargin.lab.run.methods import LOSSES, METHODS
from largemargin.lab.run.recipe import Recipe
from largemargin.lab.run.train import train

PAGE = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text()
LOSS, _, READS, DATA_SET, MAKES, NETWORK, METHOD = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def file(monkeypatch):
    """Puts a file of the page into a room."""

    def put(room, name, source):
        module = types.ModuleType(f"{room.__name__}.{name}")
        exec(source, module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(room, name, module, raising=False)

    return put


@pytest.fixture(autouse=True)
def tables(monkeypatch):
    """As they were, after each test."""
    for table in (SETS, NETWORKS, METHODS, LOSSES):
        for name in ("stripes", "tiny", "huberized_cross_entropy"):
            monkeypatch.setitem(table, name, None)
            del table[name]
    monkeypatch.setattr(losses, "huberized", None, raising=False)


def test_a_data_set_of_the_page_is_trained_on(file, tmp_path):
    file(data, "stripes", READS)
    exec(DATA_SET, {})
    images, known = data.load("stripes", "data", 32), SETS["stripes"]
    assert isinstance(images, ImageSet)
    assert (len(images.train_labels), len(images.test_labels), len(images.classes)) == (known.training, known.test, known.classes)
    assert images.train_images.shape[-1] == known.pixels and data.suited_to("stripes") == {"epochs": 5}
    record = train(Recipe("softmax", 0, data="stripes", **data.suited_to("stripes")), images, tmp_path)
    assert record["test"]["error"] == 0 and record["classes"] == ["lying", "standing"]


def test_a_network_of_the_page_is_trained(file, tmp_path):
    file(models, "tiny", MAKES)
    exec(NETWORK, {})
    record = train(Recipe("softmax", 0, network="tiny", epochs=1), data.load("digits", "data", 32), tmp_path)
    assert record["recipe"]["network"] == "tiny" and 0 < record["test"]["error"] < 100


def test_a_method_of_the_page_is_trained_with(monkeypatch, tmp_path):
    names: dict[str, Any] = {}
    exec(LOSS, names)
    exec(METHOD, names)
    settings = METHODS["huberized_cross_entropy"].settings
    monkeypatch.setitem(LOSSES, "huberized_cross_entropy", dict(settings))
    recipe = Recipe("huberized_cross_entropy", 0, epochs=1, **settings)
    record = train(recipe, data.load("digits", "data", 32), tmp_path)
    assert recipe.loss_label == "huberized cross entropy ρ=10" and 0 < record["epochs"][0]["train_loss"] < 1 + math.log(10)


def test_every_entry_of_a_table_names_what_is_there():
    for room, entries in ((data, {name: known.read for name, known in SETS.items()}), (models, {n: k.make for n, k in NETWORKS.items()})):
        for name, entry in entries.items():
            file, _, function = entry.partition(":")
            assert re.search(rf"^def {function}\(", (Path(room.__file__).parent / f"{file}.py").read_text(), re.MULTILINE), name
    for word, known in METHODS.items():
        assert callable(getattr(losses, known.loss)) and callable(getattr(losses, known.head)) and known.source, word
