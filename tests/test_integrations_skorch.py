"""skorch: the classifier is a probabilistic estimator of scikit-learn."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("skorch")
sklearn_datasets = pytest.importorskip("sklearn.datasets")

from sklearn.base import clone  # noqa: E402
from sklearn.calibration import CalibratedClassifierCV, calibration_curve  # noqa: E402
from sklearn.metrics import log_loss  # noqa: E402
from sklearn.model_selection import GridSearchCV, cross_val_score  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import StandardScaler  # noqa: E402

from devices import DEVICE  # noqa: E402
from largemargin import LargeMarginCrossEntropyLoss  # noqa: E402
from largemargin.integrations.skorch import LargeMarginClassifier  # noqa: E402

DATA = sklearn_datasets.load_digits()
ORDER = np.random.default_rng(0).permutation(len(DATA.target))
X, Y = DATA.data[ORDER].astype(np.float32) / 16, DATA.target[ORDER].astype(np.int64)
pytestmark = pytest.mark.usefixtures("device")  # where the classifiers compute

TRAIN, TEST = slice(0, 600), slice(600, 1200)


class Perceptron(nn.Sequential):
    def __init__(self, num_classes=10):
        super().__init__(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes))


def classifier(**options):
    torch.manual_seed(0)
    training = {"max_epochs": 10, "lr": 0.02, "optimizer": torch.optim.Adam, "train_split": None, "verbose": 0, "device": DEVICE.type}
    return LargeMarginClassifier(Perceptron, **{**training, **options})


@pytest.fixture(scope="module")
def fitted():
    return classifier().fit(X[TRAIN], Y[TRAIN])


def test_it_learns_and_predicts_what_is_most_probable(fitted):
    assert fitted.score(X[TEST], Y[TEST]) > 0.9
    assert (fitted.predict(X[TEST]) == fitted.predict_proba(X[TEST]).argmax(1)).all()


def test_probabilities_are_the_softmax_of_the_logits(fitted):
    probabilities = fitted.predict_proba(X[TEST])
    assert probabilities.min() >= 0
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    logits = torch.tensor(fitted.decision_function(X[TEST]))
    np.testing.assert_allclose(probabilities, logits.softmax(1), atol=1e-6)
    assert logits.dtype == torch.float64  # calibration goes on with it


def test_its_loss_is_ours(fitted):
    assert type(fitted.criterion_) is LargeMarginCrossEntropyLoss
    logits, target = torch.tensor(fitted.decision_function(X[TRAIN]), device=DEVICE), torch.tensor(Y[TRAIN], device=DEVICE)
    torch.testing.assert_close(fitted.get_loss(logits, target), LargeMarginCrossEntropyLoss()(logits, target))


def test_with_two_classes_the_decision_function_is_one_number():
    two = Y < 2
    net = classifier(module__num_classes=2, criterion__hard_bias=1.0).fit(X[two], Y[two])
    decision = net.decision_function(X[two])
    assert decision.shape == (two.sum(),)
    np.testing.assert_allclose(1 / (1 + np.exp(-decision)), net.predict_proba(X[two])[:, 1], atol=1e-6)


def test_of_a_module_with_several_outputs_the_first_are_the_logits():
    class Tapped(nn.Linear):
        def forward(self, X):
            return super().forward(X), X

    class Classifier(LargeMarginClassifier):
        def get_loss(self, y_pred, y_true, *args, **kwargs):
            return super().get_loss(y_pred[0], y_true, *args, **kwargs)

    net = Classifier(Tapped(64, 10), max_epochs=1, train_split=None, verbose=0).fit(X[:100], Y[:100])
    logits = torch.tensor(net.decision_function(X[:10]))
    np.testing.assert_allclose(logits.softmax(1), net.predict_proba(X[:10]), atol=1e-6)


def test_options_of_the_loss_survive_clone_and_pickle():
    net = classifier(criterion__lam=0.7, criterion__divergence="kl_qu", device="cpu")  # whose probabilities are equal bit for bit
    for same in (clone(net), clone(net).set_params(criterion__lam=0.7)):
        same.fit(X[:100], Y[:100])
        assert (same.criterion_.lam, same.criterion_.divergence) == (0.7, "kl_qu")
    again = pickle.loads(pickle.dumps(same))
    np.testing.assert_array_equal(again.predict_proba(X[:10]), same.predict_proba(X[:10]))
    assert same.set_params(criterion__lam=0.1).criterion_.lam == 0.1


def test_grid_search_over_lam():
    search = GridSearchCV(classifier(max_epochs=3), {"criterion__lam": [0.0, 0.3]}, cv=2, scoring="neg_log_loss", error_score="raise")
    search.fit(X[TRAIN], Y[TRAIN])
    assert search.best_params_["criterion__lam"] in (0.0, 0.3)
    assert search.best_estimator_.criterion_.lam == search.best_params_["criterion__lam"]
    assert len(set(search.cv_results_["mean_test_score"])) == 2  # lam reached the loss


def test_cross_validation_in_a_pipeline():
    scores = cross_val_score(make_pipeline(StandardScaler(), classifier()), X[TRAIN], Y[TRAIN], cv=3, error_score="raise")
    assert scores.shape == (3,) and scores.min() > 0.85


@pytest.mark.parametrize("method", ["sigmoid", "temperature"])
def test_calibration_lowers_the_log_loss_of_a_large_margin(method):
    net = classifier(criterion__lam=1.0)  # sure of less than it knows
    plain = clone(net).fit(X[TRAIN], Y[TRAIN])
    calibrated = CalibratedClassifierCV(net, method=method, cv=3).fit(X[TRAIN], Y[TRAIN])
    assert log_loss(Y[TEST], calibrated.predict_proba(X[TEST])) < log_loss(Y[TEST], plain.predict_proba(X[TEST]))


def test_calibration_curve(fitted):
    of_three = fitted.predict_proba(X[TEST])[:, 3]
    shares, confidences = calibration_curve(Y[TEST] == 3, of_three, n_bins=5)
    assert len(shares) == len(confidences) >= 2 and shares[0] < 0.1 and shares[-1] > 0.9


def test_skorchs_own_classifier_takes_the_loss_too():
    from skorch import NeuralNetClassifier

    net = NeuralNetClassifier(Perceptron, criterion=LargeMarginCrossEntropyLoss, criterion__lam=0.3, max_epochs=1, verbose=0)
    probabilities = net.fit(X[:100], Y[:100]).predict_proba(X[:10])
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)


def test_without_skorch_the_install_line_is_said():
    code = "import sys; sys.modules['skorch'] = None; import largemargin.integrations.skorch"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "pip install skorch" in done.stderr.splitlines()[-1]
