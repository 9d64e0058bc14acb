"""The queue on a Ray cluster of two nodes, started here."""

import json
from pathlib import Path
from typing import Any

import pytest

from largemargin import lab
from largemargin.lab.errors import LabError
from largemargin.lab.queue.runs import run_all
from largemargin.lab.run.recipe import Recipe

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # its own, of many kinds

RECIPES = [Recipe(loss="softmax", seed=seed, epochs=1) for seed in range(4)]


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    sizes = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the nodes: lab_work is here
        nodes = Cluster(initialize_head=True, head_node_args={**sizes, "include_dashboard": False})
        nodes.add_node(**sizes)
        ray.init(address=nodes.address, include_dashboard=False, log_to_driver=False)
        yield nodes
        ray.shutdown()
        nodes.shutdown()


def same_in_every_place(record):
    places = ("seconds", "environment", "images_per_second")
    return {name: value for name, value in vars(record).items() if name not in places}


def test_both_nodes_work_and_what_fails_once_is_done_again(cluster, tmp_path):
    runs, attempts = tmp_path / "runs", tmp_path / "attempts"
    attempts.mkdir()
    heard = []
    records = run_all(
        RECIPES, runs, 2, lambda recipe, _: heard.append(recipe.seed), "ray", work="lab_work:on_node", attempts=str(attempts), shared=True
    )
    assert [record.scores["error"] for record in records] == [0, 1, 2, 3]
    assert sorted(heard) == [0, 1, 2, 3]
    assert len({record.environment["node"] for record in records}) == 2
    assert len((attempts / RECIPES[0].id).read_text().splitlines()) == 2
    assert "the first time" in (runs / RECIPES[0].id / "log.txt").read_text()
    assert sorted(path.name for path in runs.iterdir()) == sorted(recipe.id for recipe in RECIPES)  # no token
    for recipe in RECIPES[1:]:
        assert sorted(path.name for path in (runs / recipe.id).iterdir()) == ["metrics.csv", "result.json"]
        assert json.loads((runs / recipe.id / "result.json").read_text())["environment"]["folder"] == str(runs / recipe.id)


def test_nodes_without_the_folder_send_their_files(cluster, tmp_path, monkeypatch):
    from largemargin.lab.queue import ray as ray_cluster

    attempts = tmp_path / "attempts"
    attempts.mkdir()
    runs = tmp_path / "runs"
    token = ray_cluster._token
    monkeypatch.setattr(ray_cluster, "_token", lambda runs: token(tmp_path / "elsewhere"))
    records = run_all(RECIPES[:2], runs, 1, lambda *_: None, "ray", work="lab_work:on_node", attempts=str(attempts), shared=False)
    for recipe, record in zip(RECIPES, records, strict=False):
        folder = runs / recipe.id
        assert not record.environment["folder"].startswith(str(tmp_path))
        assert (folder / "metrics.csv").read_text() == "epoch\n1\n"
        assert not (folder / "error.txt").exists() and not (folder / "lock").exists()
    assert "the first time" in (runs / RECIPES[0].id / "log.txt").read_text()


def test_a_killed_task_is_given_up_after_the_second_time(cluster, tmp_path):
    with pytest.raises(LabError, match="1 of 1 run could not be done: the task of this run died"):
        run_all(RECIPES[:1], tmp_path, 1, lambda *_: None, "ray", work="lab_work:is_killed", times=5)
    assert len((tmp_path / f"attempts-{RECIPES[0].id}").read_text().split()) == 2


def test_records_are_those_of_the_local_executor(cluster, tmp_path):
    recipes = RECIPES[:2]
    local = run_all(recipes, tmp_path / "local", 1, lambda *_: None)
    remote = run_all(recipes, tmp_path / "ray", 1, lambda *_: None, "ray")
    assert [same_in_every_place(record) for record in local] == [same_in_every_place(record) for record in remote]


def test_a_function_of_the_users_own_travels_to_the_nodes(cluster, tmp_path):
    space: dict[str, Any] = {}
    exec("import os\ndef train(run): return {'error': 1.0 + run.seed, 'process': os.getpid()}", space)
    result = lab.compare(space["train"], ["softmax"], seeds=[0, 1], out=tmp_path, device="cpu", executor="ray", quiet=True)
    records = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/result.json")]
    assert sorted(record["scores"]["error"] for record in records) == [1.0, 2.0] and not result.failures
    assert len({record["scores"]["process"] for record in records}) == 2  # each has a process of its own


def test_an_interrupt_cancels_the_tasks_and_leaves_their_checkpoints(cluster, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(RECIPES[:1], tmp_path, 1, interrupt, "ray", work="lab_work:lasts")
    assert (tmp_path / RECIPES[0].id / "checkpoint.pt").is_file()
    assert len(run_all(RECIPES[:1], tmp_path, 1, lambda *_: None, "ray", work="lab_work:lasts")) == 1


@pytest.mark.parametrize(
    ("field", "value", "said"), [("threads", 64, "64 CPUs"), ("device", "cuda:1", "device cuda"), ("device", "cuda", "GPU")]
)
def test_what_no_node_can_do_is_refused(cluster, field, value, said, tmp_path):
    with pytest.raises(LabError, match=said):
        run_all([Recipe(loss="softmax", seed=0, **{field: value})], tmp_path, 1, lambda *_: None, "ray")
    assert not list(tmp_path.rglob("lock"))
