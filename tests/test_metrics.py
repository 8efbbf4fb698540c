"""Metrics against scikit-learn, the operating point, the columns of a submission, the bootstrap over patients."""
import json
import math

import numpy as np
import pytest
import torch
from scipy.special import expit, logit
from sklearn import metrics as sk

import ecg_helpers as helpers


def scored(n=400, share=0.3, seed=0, steps=None):
    """Labels and probabilities of a fair classifier; `steps`: rounded to so many values, with many ties."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) < share * n).astype(int)
    p = expit(rng.normal(2 * y - 1.5, 1.2))
    return y, np.round(p * steps) / steps if steps else p


# ---- Metrics ----
@pytest.mark.parametrize("prevalence", [None, 0.07, 0.5])
@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize("steps", [None, 8], ids=["distinct", "ties"])
def test_metrics_are_those_of_scikit_learn(prevalence, threshold, steps):
    y, p = scored(steps=steps)
    weight = np.ones(len(y))
    if prevalence:
        weight = np.where(y == 1, prevalence / sum(y == 1), (1 - prevalence) / sum(y == 0))
    found = helpers.classification_metrics(y[:, None], p[:, None], threshold, prevalence)
    af = p > threshold
    ap = [sk.average_precision_score(truth, score, sample_weight=weight) for truth, score in ((y, p), (1 - y, 1 - p))]
    expected = {"accuracy": sk.accuracy_score(y, af, sample_weight=weight),
                "f1": sk.f1_score(y, af, sample_weight=weight),
                "auroc": sk.roc_auc_score(y, p, sample_weight=weight), "ap": ap[0], "leaderboard_ap": np.mean(ap)}
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert all(type(value) is float for value in found.values())


def test_leaderboard_ap_is_the_macro_average_over_both_classes():
    y, p = scored()
    expected = sk.average_precision_score(np.eye(2)[y], np.column_stack([1 - p, p]), average="macro")
    assert helpers.classification_metrics(y, p)["leaderboard_ap"] == pytest.approx(expected, abs=1e-12)


def test_a_tie_with_the_threshold_is_no_af():
    found = helpers.classification_metrics([1, 0, 1, 0], [0.5, 0.5, 0.6, 0.1])
    assert found["accuracy"] == 0.75 and found["f1"] == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("label", [0, 1])
def test_metrics_of_one_class_only(label):
    found = helpers.classification_metrics([label] * 3, [0.2, 0.7, 0.9], prevalence=0.5)
    assert found["accuracy"] == pytest.approx([1 / 3, 2 / 3][label])
    assert all(math.isnan(found[name]) for name in ("auroc", "ap", "leaderboard_ap"))


@pytest.mark.parametrize("y, p", [([0, 1], [0.5]), ([], []), ([0, 2], [0.1, 0.2]), ([0, 1], [0.1, np.nan]),
                                  ([0, 1], [-3.0, 4.0])], ids=["lengths", "empty", "label 2", "NaN", "logits"])
def test_metrics_refuse_what_is_no_probability(y, p):
    with pytest.raises(ValueError, match="probabilities"):
        helpers.classification_metrics(y, p)


# ---- Operating point ----
def gaussians(share, n=40_000, low=-1.5, high=0.5, spread=1.0, seed=0):
    """Logits of two classes with equal spread: the best balanced decision is the midpoint of the means."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) < share * n).astype(int)
    return y, rng.normal(np.where(y == 1, high, low), spread)


@pytest.mark.parametrize("share", [0.07, 0.3, 0.8])
@pytest.mark.parametrize("low, high, spread", [(-1.5, 0.5, 1.0), (200.0, 800.0, 300.0)], ids=["usual", "wide"])
def test_the_calibration_of_simulated_logits_is_recovered(share, low, high, spread):
    threshold, scale = helpers.balanced_threshold(*gaussians(share, low=low, high=high, spread=spread))
    assert threshold == pytest.approx((low + high) / 2, abs=0.05 * spread)
    assert scale == pytest.approx((high - low) / spread**2, rel=0.05), "the slope of the log-odds"
    assert type(threshold) is type(scale) is float


@pytest.mark.parametrize("prevalence", [0.2, 0.5, 0.7])
def test_another_prevalence_moves_the_threshold_by_the_log_odds_of_the_prior(prevalence):
    threshold, _ = helpers.balanced_threshold(*gaussians(0.3), prevalence=prevalence)
    assert threshold == pytest.approx(-0.5 - logit(prevalence) / 2, abs=0.05)


@pytest.mark.parametrize("share, n", [(0.07, 300), (0.5, 300), (0.4, 5)])
@pytest.mark.parametrize("distance", [12, 60])
def test_separable_classes_have_a_finite_slope_and_a_threshold_between_them(share, n, distance):
    y, z = gaussians(share, n=n, low=-distance / 2, high=distance / 2)
    threshold, scale = helpers.balanced_threshold(y, z)
    p = expit(scale * (z - threshold))
    assert z[y == 0].max() < threshold < z[y == 1].min() and 1e-9 < p.min() and p.max() < 1 - 1e-9


@pytest.mark.parametrize("outlier", [1e6, -1e6, 1e300])
@pytest.mark.parametrize("label", [0, 1])
def test_one_logit_of_a_million_does_not_decide_for_all(outlier, label):
    y, z = gaussians(0.3, n=240)
    before, scale = helpers.balanced_threshold(y, z)
    z[np.flatnonzero(y == label)[0]] = outlier
    threshold, less = helpers.balanced_threshold(y, z)
    assert threshold == pytest.approx(before, abs=0.35) and less > 0.05 * scale


@pytest.mark.parametrize("make", [np.zeros_like, lambda z: np.full_like(z, 3.0), lambda z: -z],
                         ids=["zero", "constant", "inverted"])
def test_logits_without_information_are_left_as_they_are(make):
    y, z = gaussians(0.3, n=400)
    assert helpers.balanced_threshold(y, make(z)) == (0.0, 1.0)


@pytest.mark.parametrize("y, z", [([0, 0], [1.0, 2.0]), ([0, 1], [1.0, math.nan]), ([0, 1, 1], [1.0, 2.0])],
                         ids=["one class", "NaN", "lengths"])
def test_the_operating_point_refuses_bad_input(y, z):
    with pytest.raises(ValueError):
        helpers.balanced_threshold(y, z)


# ---- The two columns of a submission ----
LOGITS = {
    "usual": np.random.default_rng(0).normal(0, 5, 6000),
    "saturated": np.linspace(30, 900, 6000),
    "saturated below": np.linspace(-1e300, -60, 6000),
    "nearly equal": 1 + np.arange(6000) * np.spacing(1.0),
    "tiny": np.arange(-3000, 3000) * 5e-324,
    "both ends": np.r_[-math.inf, np.linspace(-80, 80, 5998), math.inf],
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("threshold, scale", [(0.0, 1.0), (-1.37, 0.4), (1.0, 13.6), (0.0, 1e-300)])
@pytest.mark.parametrize("what", LOGITS)
def test_different_logits_are_different_probabilities_on_the_right_side_of_one_half(what, threshold, scale):
    z = np.sort(LOGITS[what])
    table = helpers.submission_probabilities(z, threshold, scale)
    assert table.shape == (6000, 2) and table.dtype == np.float64
    assert (np.diff(table[:, 1]) > 0).all() and (np.diff(table[:, 0]) < 0).all()
    assert np.array_equal(table[:, 1] > 0.5, z > threshold)
    assert np.array_equal(table.argmax(axis=1), z > threshold), "as the leaderboard decides"
    assert ((table > 0) & (table < 1)).all() and np.allclose(table.sum(axis=1), 1, rtol=0, atol=1e-12)
    assert np.array_equal(json.loads(json.dumps(table.tolist())), table), "as it is sent"
    y = np.random.default_rng(1).random(6000) < np.linspace(0.2, 0.8, 6000)
    ranks = np.arange(6000)
    for score in (sk.roc_auc_score, sk.average_precision_score):
        assert score(y, table[:, 1]) == score(y, ranks) and score(~y, table[:, 0]) == score(~y, -ranks)


def test_equal_logits_are_equal_probabilities_and_any_shape_will_do():
    z = np.array([0.3, -2.0, 0.3, 4.0], dtype=np.float32)
    table = helpers.submission_probabilities(z, threshold=float(z[0]))
    assert table[0].tolist() == table[2].tolist() == [0.5, 0.5]
    assert np.allclose(table[:, 1], expit(z - z[0]), atol=1e-8)
    for same in (z[:, None], z.tolist(), torch.as_tensor(z)):
        assert np.array_equal(helpers.submission_probabilities(same, float(z[0])), table)


@pytest.mark.parametrize("given", [([math.nan, 1.0],), ([1.0], math.inf), ([1.0], 0.0, 0.0), ([1.0], 0.0, -1.0),
                                   ([1.0], 0.0, math.nan)], ids=str)
def test_a_submission_refuses_what_has_no_probability(given):
    with pytest.raises(ValueError):
        helpers.submission_probabilities(*given)


# ---- Bootstrap over patients ----
def expected_scores(y, z, threshold):
    share = np.mean(y)
    weight = np.where(y == 1, 0.5 / share, 0.5 / (1 - share))
    return [sk.roc_auc_score(y, z), sk.average_precision_score(y, z, sample_weight=weight),
            sk.f1_score(y, z > threshold, sample_weight=weight)]


@pytest.fixture(scope="module")
def cohort():
    """Labels, logits with ties, and patients of one to four exams."""
    y, p = scored(n=300, steps=40, seed=3)
    order = np.random.default_rng(1).permutation(300)
    return y[order], logit(np.clip(p, 0.001, 0.999))[order], np.random.default_rng(2).integers(0, 120, 300)


@pytest.mark.parametrize("threshold", [0.0, -1.0])
def test_the_scores_are_those_of_scikit_learn_also_of_a_draw(cohort, threshold):
    y, z, patients = cohort
    found, draws = helpers.patient_bootstrap(y, z, patients, threshold, rounds=300)
    assert found == pytest.approx(expected_scores(y, z, threshold), abs=1e-12)
    assert draws.shape == (300, 3)
    assert draws.mean(axis=0) == pytest.approx(found, abs=0.02) and (draws.std(axis=0) > 0.005).all()
    times = np.random.default_rng(5).integers(0, 4, (2, 300)).astype(float)
    for count in times:
        drawn = np.repeat(np.arange(300), count.astype(int))
        scores = helpers.balanced_scores(y, z, threshold, count)
        assert scores == pytest.approx(expected_scores(y[drawn], z[drawn], threshold), abs=1e-12)


def test_equal_exams_meet_equal_draws_and_patients_stay_together(cohort):
    y, z, patients = cohort
    draws = helpers.patient_bootstrap(y, z, patients, rounds=260)[1]
    assert np.array_equal(draws, helpers.patient_bootstrap(y, z, patients, rounds=260)[1])
    assert np.array_equal(draws[:, 0], helpers.patient_bootstrap(y, 2 * z, patients + 7, rounds=260)[1][:, 0])
    twice = helpers.patient_bootstrap(np.tile(y, 2), np.tile(z, 2), np.tile(patients, 2), rounds=260)[1]
    np.testing.assert_allclose(twice, draws, atol=1e-12, err_msg="copies of exams within patients tell nothing new")


@pytest.mark.filterwarnings("error")
def test_a_draw_of_one_class_is_nan():
    _, draws = helpers.patient_bootstrap([0, 1], [0.1, 0.2], [1, 2], rounds=50)
    assert np.isnan(draws[:, 0]).any() and (draws[~np.isnan(draws[:, 0]), 0] == 1).all()
