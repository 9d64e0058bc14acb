"""What lies behind a difference, on predictions whose answers are counted by hand."""

import numpy as np
import pytest

from largemargin.lab.comparison import evidence
from largemargin.lab.errors import LabError
from largemargin.lab.predictions import Predictions, same_samples

LABELS = np.array([0, 0, 1, 1, 2])


def said(*classes, confidence=4.0):
    return Predictions(confidence * np.eye(3)[list(classes)], LABELS, np.arange(5))


BASELINE = (said(0, 1, 1, 0, 2), said(0, 1, 1, 0, 1))
METHOD = (said(0, 0, 1, 0, 2), said(0, 0, 2, 1, 2))


def test_the_error_of_each_class():
    assert evidence.class_errors(BASELINE).tolist() == [50, 50, 50]
    assert evidence.class_errors(METHOD).tolist() == [0, 50, 0]


def test_a_class_without_samples_has_no_error():
    run = Predictions(np.eye(4)[[0, 1]], np.array([0, 1]), np.arange(2))
    assert np.isnan(evidence.class_errors([run])[2:]).all()


def test_the_mean_of_class_errors_by_size_is_the_error():
    rng = np.random.default_rng(0)
    runs = [Predictions(rng.normal(size=(50, 3)), rng.integers(0, 3, 50), np.arange(50))]
    sizes = np.bincount(runs[0].labels)
    assert (evidence.class_errors(runs) * sizes).sum() / 50 == pytest.approx(100 * runs[0].wrong.mean())


def test_the_majority_error():
    assert evidence.majority_error(LABELS) == pytest.approx(60)


def test_confusions_that_changed_come_first_by_how_much():
    found = evidence.changed_confusions(BASELINE, METHOD)
    assert [(c.label, c.predicted, c.baseline, c.method) for c in found] == [
        (0, 1, 1.0, 0.0),
        (1, 0, 1.0, 0.5),
        (1, 2, 0.0, 0.5),
        (2, 1, 0.5, 0),
    ]
    assert evidence.changed_confusions(BASELINE, METHOD, most=1) == found[:1]
    assert evidence.changed_confusions(BASELINE, BASELINE) == []


def test_disagreements_name_the_sample_and_what_it_was_taken_for():
    gained, lost = evidence.disagreements(BASELINE, METHOD)
    assert [(d.index, d.label, d.baseline_right, d.method_right, d.taken_for) for d in gained] == [(1, 0, 0, 2, 1)]
    assert lost == []
    assert evidence.disagreements(METHOD, BASELINE)[1] == [evidence.Disagreement(1, 0, 2, 0, 1)]


def test_reliability_holds_every_sample_once():
    found = evidence.reliability(BASELINE)
    assert found.share.sum() == pytest.approx(1)
    full = found.share > 0
    assert (found.accuracy[full] * found.share[full]).sum() == pytest.approx(1 - np.mean([run.wrong for run in BASELINE]))
    certain = evidence.reliability([said(0, 0, 1, 1, 2, confidence=1000.0)])
    assert certain.confidence[-1] == certain.accuracy[-1] == certain.share[-1] == 1


def test_paired_outcomes_have_the_difference_of_the_errors_as_their_mean():
    outcomes = evidence.paired_outcomes(BASELINE, METHOD)
    assert outcomes.shape == (2, 5)
    errors = [np.array([100 * run.wrong.mean() for run in runs]) for runs in (METHOD, BASELINE)]
    assert outcomes.mean(1) == pytest.approx(errors[0] - errors[1])


def test_predictions_come_back_from_their_file(tmp_path):
    BASELINE[0].save(tmp_path / "p.npz")
    found = Predictions.load(tmp_path / "p.npz")
    assert same_samples([found, BASELINE[0]]) and (found.logits == BASELINE[0].logits).all()


def test_large_logits_are_kept_in_half_precision(tmp_path, monkeypatch):
    monkeypatch.setattr("largemargin.lab.predictions.HALF_ABOVE", 10)
    BASELINE[0].save(tmp_path / "p.npz")
    assert Predictions.load(tmp_path / "p.npz").logits.dtype == np.float16


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x05\x06" + 18 * b"\0"])
def test_a_file_that_holds_no_predictions_is_refused(content, tmp_path):
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(LabError, match="does not hold the predictions"):
        Predictions.load(tmp_path / "p.npz")


def test_a_pickle_is_never_read(tmp_path):
    np.savez(tmp_path / "p.npz", logits=np.eye(2), labels=np.array([0, {}], dtype=object), ids=np.arange(2), predicted=np.arange(2))
    with pytest.raises(LabError, match="does not hold the predictions"):
        Predictions.load(tmp_path / "p.npz")


def test_other_samples_are_not_the_same():
    shuffled = Predictions(BASELINE[0].logits, LABELS, np.arange(5)[::-1])
    assert same_samples(BASELINE) and not same_samples([BASELINE[0], shuffled])
