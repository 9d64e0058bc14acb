"""The queue of runs: failures, deaths, interrupts, and two queues on one folder."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from largemargin.lab.errors import LabError, NotDone
from largemargin.lab.queue import local, plan
from largemargin.lab.queue import runs as queue
from largemargin.lab.queue.attempt import Job, Outcome, printed_into
from largemargin.lab.queue.locks import Lock
from largemargin.lab.queue.runs import run_all, threads_note
from largemargin.lab.results import result_of
from largemargin.lab.run.recipe import Recipe

RECIPES = [Recipe(loss="softmax", seed=seed, epochs=2) for seed in range(3)]
PATIENCE = 60  # seconds
pytestmark = pytest.mark.usefixtures("forked_workers")


def run(runs, work, recipes=RECIPES, jobs=1, **options):
    heard = []
    records = run_all(recipes, runs, jobs, lambda recipe, epoch: heard.append((recipe.seed, epoch)), work=f"lab_work:{work}", **options)
    return records, heard


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def attempts(runs, recipe):
    return [float(line) for line in (runs / f"attempts-{recipe.id}").read_text().split()]


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def of_few_samples(folder):
    """The runs, on a data set that a new process reads quickly."""
    path = folder / "few.npz"
    np.savez(path, x=np.eye(4), y=[0, 1, 0, 1], split=["train", "train", "test", "test"])
    return [dataclasses.replace(recipe, data=str(path)) for recipe in RECIPES]


def command(runs, recipes, jobs):
    """The queue in a process of its own, as the command line is, with processes as users have them."""
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from largemargin.lab.queue.runs import run_all
from largemargin.lab.run.recipe import Recipe
if __name__ == "__main__":
    recipes = [Recipe(**fields) for fields in {[vars(recipe) for recipe in recipes]!r}]
    run_all(recipes, Path({str(runs)!r}), {jobs}, lambda *_: None, work="lab_work:lasts")
"""
    script = runs.parent / "queue_of_lasts.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def test_runs_are_done_once_in_order_with_their_options(tmp_path):
    records, heard = run(tmp_path, "finish", [*RECIPES, RECIPES[0]], jobs=2, tensorboard=True)
    assert [record.recipe.seed for record in records] == [0, 1, 2, 0]
    assert sorted(heard) == [(seed, epoch) for seed in range(3) for epoch in (1, 2)]
    assert all(record.environment["options"] == {"tensorboard": True} and record.num_train > 1000 for record in records)
    assert len({record.environment["process"] for record in records}) <= 2
    again, heard = run(tmp_path, "nosuch")
    assert again == records[:3] and not heard
    for recipe in RECIPES:  # neither lock nor log nor error stays
        assert [path.name for path in (tmp_path / recipe.id).iterdir()] == ["result.json"]


def test_a_failed_run_is_tried_again_after_the_others(tmp_path):
    records, heard = run(tmp_path, "fails_once")
    assert len(records) == 3 and [seed for seed, epoch in heard if epoch == 2] == [1, 2, 0]
    assert len(attempts(tmp_path, RECIPES[0])) == 2
    log = (tmp_path / RECIPES[0].id / "log.txt").read_text()
    assert log.startswith("--- 20") and "said before" in log and "said by a child" in log and "ValueError: the first time" in log
    assert not (tmp_path / RECIPES[0].id / "error.txt").exists()


def test_a_run_that_fails_twice_is_named_and_the_others_are_kept(tmp_path):
    with pytest.raises(LabError, match=f"1 of 3 runs could not be done: ValueError: every time .*{RECIPES[0].id}"):
        run(tmp_path, "fails")
    assert len(attempts(tmp_path, RECIPES[0])) == 2
    assert "Traceback" in (tmp_path / RECIPES[0].id / "error.txt").read_text()
    assert (tmp_path / RECIPES[0].id / "log.txt").read_text().count("every time") >= 2
    assert all(result_of(recipe, tmp_path) for recipe in RECIPES[1:])


def test_what_the_user_must_mend_is_not_tried_again(tmp_path):
    with pytest.raises(LabError, match="--lam 3: mend it"):
        run(tmp_path, "refuses", RECIPES[:1])
    assert len(attempts(tmp_path, RECIPES[0])) == 1


def test_data_other_than_planned_are_refused(tmp_path):
    with pytest.raises(LabError, match=r"1 of 1 run .*digest.*planned for 0123456789ab"):
        run(tmp_path, "finish", [Recipe(loss="softmax", seed=0, data_digest="0123456789ab")])


def test_a_killed_process_is_replaced_and_its_run_done_again(tmp_path):
    records, _ = run(tmp_path, "is_killed", jobs=2)
    assert len(records) == 3 and len(attempts(tmp_path, RECIPES[0])) == 2
    assert "SIGKILL" in (tmp_path / RECIPES[0].id / "log.txt").read_text()


def test_a_run_whose_process_dies_twice_is_given_up(tmp_path):
    with pytest.raises(LabError, match=r"1 of 1 run could not be done: the process of this run died.*SIGSEGV"):
        run(tmp_path, "segfaults", RECIPES[:1])
    assert len(attempts(tmp_path, RECIPES[0])) == 2


@pytest.mark.parametrize(("sent", "jobs"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_an_interrupt_leaves_checkpoints_and_the_same_command_goes_on(sent, jobs, tmp_path):
    runs, recipes = tmp_path / "runs", of_few_samples(tmp_path)
    process = command(runs, recipes, jobs)
    wait_for(lambda: len(list(runs.glob("*/started"))) == jobs or process.poll() is not None)
    workers = [json.loads(path.read_text()) for path in runs.glob("*/started")]
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0 and "KeyboardInterrupt" in error
    assert len(list(runs.glob("*/checkpoint.pt"))) == jobs
    assert not any(is_running(worker) for worker in workers)
    (runs / "go").touch()
    records, _ = run(runs, "lasts", recipes)
    assert len(records) == 3


def test_no_process_trains_on_when_the_parent_is_killed(tmp_path):
    runs = tmp_path / "runs"
    process = command(runs, of_few_samples(tmp_path), jobs=1)
    wait_for(lambda: list(runs.glob("*/started")) or process.poll() is not None)
    (worker,) = [json.loads(path.read_text()) for path in runs.glob("*/started")]
    process.kill()
    process.communicate(timeout=PATIENCE)
    wait_for(lambda: not is_running(worker))
    assert len(list(runs.glob("*/checkpoint.pt"))) == 1


def test_two_queues_on_one_folder_do_each_run_once(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "HELD_SECONDS", 0.2)
    said: tuple[list[str], list[str]] = [], []
    with ThreadPoolExecutor() as pool:
        try:
            queues = []
            for messages, started in zip(said, (2, 3), strict=True):  # two runs of one queue, the third of the other
                queues.append(pool.submit(run, tmp_path, "lasts", jobs=2, on_message=messages.append))
                wait_for(lambda started=started: len(list(tmp_path.glob("*/started"))) == started)
        finally:
            (tmp_path / "go").touch()
    assert [len(queue.result()[0]) for queue in queues] == [3, 3]
    assert [(tmp_path / f"times-{recipe.id}").read_text() for recipe in RECIPES] == ["done\n"] * 3
    assert all(sum("another process" in line for line in messages) <= 1 for messages in said)
    assert not list(tmp_path.glob("*/lock"))


def test_a_run_that_another_process_does_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "HELD_SECONDS", 0.2)
    recipe = RECIPES[0]
    lock = Lock.take(tmp_path / recipe.id)
    messages: list[str] = []
    looks: list[str] = []
    ended = plan.Plan.ended

    def release_at_the_second_look(self, recipe, outcome):
        ended(self, recipe, outcome)
        looks.append(outcome.kind)
        if len(looks) == 2:
            lock.__exit__()

    monkeypatch.setattr(plan.Plan, "ended", release_at_the_second_look)
    records, _ = run(tmp_path, "finish", [recipe], on_message=messages.append)
    assert looks == ["held", "held", "done"]
    assert len(records) == 1 and len(messages) == 1 and recipe.id in messages[0]


def test_a_lock_is_of_one_holder_and_leaves_nothing(tmp_path):
    with Lock.take(tmp_path):
        assert Lock.take(tmp_path) is None
    assert not list(tmp_path.iterdir())
    with Lock.take(tmp_path):
        pass


def test_many_threads_never_hold_a_lock_together(tmp_path):
    inside: list[Any] = []
    together: list[Any] = []
    taken: list[Any] = []

    def work():
        while len(taken) < 300:
            if (lock := Lock.take(tmp_path)) is not None:
                with lock:
                    inside.append(1)
                    together.append(len(inside))
                    inside.pop()
                    taken.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1}


def test_the_plan_ends(tmp_path):
    """Whatever the outcomes, a run is taken twice at most, and held ones are asked for again."""
    plan = queue.Plan(RECIPES[:2])
    first, second = plan.take(), plan.take()
    assert plan.take() is None and plan.unfinished
    plan.ended(first, Outcome("failed", "a"))
    plan.ended(second, Outcome("refused", "b"))
    assert plan.take() == first and plan.take() is None
    plan.ended(first, Outcome("failed", "c"))
    assert not plan.unfinished and plan.reasons == {first.id: "c", second.id: "b"}


def test_a_quiet_run_leaves_no_log(tmp_path):
    with printed_into(tmp_path / "log.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_the_note_on_threads():
    assert threads_note(RECIPES, 1) is None
    note = threads_note([Recipe(loss="softmax", seed=seed, threads=10_000) for seed in range(3)], 5)
    assert note is not None and "3 runs" in note and len(note.splitlines()) == 1
    assert threads_note([Recipe(loss="softmax", seed=0, threads=10_000, device="cuda")], 5) is None


@pytest.mark.parametrize("sent", [None, pickle.dumps("a function")], ids=["a process for many runs", "a process for each"])
def test_runs_are_spread_over_the_gpus(sent, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 2)
    recipes = [dataclasses.replace(recipe, device="cuda") for recipe in RECIPES]
    records, _ = run(tmp_path, "sees", recipes, jobs=2, sent=sent)
    assert {record.environment["gpu"] for record in records} == {"3", "5"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3,5"
    assert local.gpus_of("cuda:1") == [] and local.least_used(["3"], []) is None


def test_a_reason_is_one_line_and_its_whole_text_is_in_the_folder(tmp_path):
    with pytest.raises(NotDone) as caught:
        run(tmp_path, "says_much", RECIPES[:1])
    (reason,) = caught.value.reasons.values()
    assert reason.startswith("ValueError: the first line and the second line word word") and len(reason) <= 400 and "\n" not in reason
    assert "the first line\n and the second line" in (tmp_path / RECIPES[0].id / "error.txt").read_text()
    with pytest.raises(LabError, match=r"1 of 1 run could not be done: --lam 3: mend it \(whole text"):
        run(tmp_path, "refuses", RECIPES[:1])


def test_an_unknown_executor_is_refused(tmp_path):
    with pytest.raises(LabError, match="--executor nosuch"):
        run_all(RECIPES, tmp_path, 1, lambda *_: None, "nosuch")


def test_a_job_is_frozen(tmp_path):
    job: Any = Job(tmp_path, "a:b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        job.work = "c:d"


def test_without_ray_the_install_line_is_printed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LabError, match=r"pip install 'largemargin\[ray\]'"):
        run_all(RECIPES, tmp_path, 1, lambda *_: None, "ray")
