"""Metrics, the sigmoid, the threshold for a balanced population, the two columns of a submission."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

import ecg_helpers as helpers

KEYS = ("accuracy", "f1", "precision", "recall", "specificity", "auroc", "ap", "leaderboard_ap")


def sample(seed, n=60, share=0.3, decimals=2):
    """Labels and overlapping probabilities, rounded so that there are ties."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) < share * n).astype(int)
    rng.shuffle(y)
    return y, np.clip(rng.normal(0.35 + 0.3 * y, 0.2), 0, 1).round(decimals)


# ------------------------------------------------------------------------------------------------
# classification_metrics
# ------------------------------------------------------------------------------------------------
def test_metrics_by_hand():
    # called AF: 0.8, 0.6; order from the highest: AF, no AF, AF, no AF, no AF
    found = helpers.classification_metrics([0, 0, 1, 1, 0], [0.1, 0.6, 0.4, 0.8, 0.2])
    assert found == pytest.approx({
        "accuracy": 3 / 5, "f1": 1 / 2, "precision": 1 / 2, "recall": 1 / 2, "specificity": 2 / 3,
        "auroc": 5 / 6, "ap": (1 + 2 / 3) / 2, "leaderboard_ap": (5 / 6 + 11 / 12) / 2}, rel=1e-12)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.71])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_equal_scikit_learn(seed, threshold):
    y, p = sample(seed)
    called, both = p > threshold, np.stack([1 - y, y], axis=1)
    expected = {"accuracy": sk.accuracy_score(y, called), "f1": sk.f1_score(y, called),
                "precision": sk.precision_score(y, called), "recall": sk.recall_score(y, called),
                "specificity": sk.recall_score(y, called, pos_label=0), "auroc": sk.roc_auc_score(y, p),
                "ap": sk.average_precision_score(y, p),
                "leaderboard_ap": sk.average_precision_score(both, np.stack([1 - p, p], axis=1), average="macro")}
    assert helpers.classification_metrics(y, p, threshold) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 0.25])
def test_tie_at_the_threshold_is_no_af(threshold):
    found = helpers.classification_metrics([0, 1, 1], [threshold, threshold, np.nextafter(threshold, 1)], threshold)
    assert (found["recall"], found["specificity"]) == (0.5, 1.0)


@pytest.mark.parametrize("seed, share", [(0, 0.3), (1, 0.1), (2, 0.5), (3, 0.8)])
def test_prevalence_equals_a_resampled_population(seed, share):
    y, p = sample(seed, share=share)
    copies = np.where(y == 1, (y == 0).sum(), (y == 1).sum())  # as many AF as no AF
    weighted = helpers.classification_metrics(y, p, prevalence=0.5)
    balanced = helpers.classification_metrics(np.repeat(y, copies), np.repeat(p, copies))
    assert weighted == pytest.approx(balanced, rel=1e-9)
    if share != 0.5:
        assert weighted["ap"] != pytest.approx(helpers.classification_metrics(y, p)["ap"], rel=1e-3)
    rare = helpers.classification_metrics(y, p, prevalence=0.1)  # one copy of AF to nine of no AF
    copies = np.where(y == 1, (y == 0).sum(), 9 * (y == 1).sum())
    assert rare == pytest.approx(helpers.classification_metrics(np.repeat(y, copies), np.repeat(p, copies)), rel=1e-9)


@pytest.mark.parametrize("prevalence", [None, 0.5])
@pytest.mark.parametrize("y, p, accuracy", [([0, 0], [0.2, 0.7], 0.5), ([1, 1, 1, 1], [0.9, 0.7, 0.6, 0.1], 0.75)])
def test_one_class_only_has_no_auroc_and_no_error(y, p, accuracy, prevalence):
    found = helpers.classification_metrics(y, p, prevalence=prevalence)
    assert all(math.isnan(found[key]) for key in ("auroc", "ap", "leaderboard_ap"))
    assert found["accuracy"] == accuracy
    assert all(math.isfinite(found[key]) for key in ("f1", "precision", "recall", "specificity"))


def test_nothing_called_af_is_zero_not_nan():
    found = helpers.classification_metrics([0, 1], [0.1, 0.2])
    assert (found["f1"], found["precision"], found["recall"], found["accuracy"]) == (0.0, 0.0, 0.0, 0.5)
    always = helpers.classification_metrics([0, 1], [0.9, 0.9])
    assert (always["accuracy"], always["f1"], always["auroc"]) == (0.5, pytest.approx(2 / 3), 0.5)


@pytest.mark.parametrize("shape", [
    lambda a: a, lambda a: a[:, None], lambda a: a.tolist(), lambda a: a.reshape(3, -1), torch.as_tensor,
    lambda a: a.astype(np.float32)], ids=["n", "n1", "list", "3m", "tensor", "float32"])
def test_any_shape_is_taken(shape):
    y, p = sample(0, decimals=3)
    p = p.astype(np.float32).astype(float)
    expected = helpers.classification_metrics(y, p)
    assert set(KEYS) <= set(expected)
    assert helpers.classification_metrics(shape(y), shape(p)) == expected
    assert helpers.classification_metrics(y.astype(bool), shape(p)) == expected


@pytest.mark.parametrize("y, p", [
    ([0, 1], [0.5]), ([], []), ([0, 2], [0.1, 0.2]), ([0, math.nan], [0.1, 0.2]), ([0, 1], [0.1, math.nan]),
    ([0, 1], [0.1, math.inf]), ([0, 1], [-0.1, 0.5]), ([0, 1], [0.1, 1.1]), ([-1, 1], [0.1, 0.2])],
    ids=["lengths", "empty", "label 2", "label NaN", "NaN", "inf", "negative", "over one", "label -1"])
def test_bad_input_is_refused(y, p):
    with pytest.raises(ValueError, match="labels"):
        helpers.classification_metrics(y, p)


@pytest.mark.parametrize("prevalence", [0, 1, -0.2, 1.5, 50, math.nan])
def test_prevalence_that_is_no_share_is_refused(prevalence):
    with pytest.raises(ValueError, match="prevalence"):
        helpers.classification_metrics(*sample(0), prevalence=prevalence)


# ------------------------------------------------------------------------------------------------
# to_probability
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [np.float32, np.float64, int, list])
def test_sigmoid_in_float64_keeps_the_order_of_logits(dtype):
    logits = np.arange(-40, 41)
    prob = helpers.to_probability(logits.tolist() if dtype is list else logits.astype(dtype))
    assert prob.dtype == np.float64 and prob.shape == logits.shape
    assert (np.diff(prob) >= 0).all() and (np.diff(prob[logits <= 36]) > 0).all()  # float32 ties from 17 on
    np.testing.assert_allclose(prob, 1 / (1 + np.exp(-logits.astype(float))), rtol=1e-14)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(allow_nan=False), min_size=1))
def test_sigmoid_is_finite_and_monotone(logits):
    prob = helpers.to_probability(sorted(logits))
    assert ((prob >= 0) & (prob <= 1)).all() and (np.diff(prob) >= 0).all()


# ------------------------------------------------------------------------------------------------
# balanced_threshold
# ------------------------------------------------------------------------------------------------
def gaussians(share, n=40_000, low=-1.5, high=0.5, spread=1.0, seed=0):
    """Logits of two classes with equal spread: the best balanced decision is the midpoint of the means."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) < share * n).astype(int)
    return y, rng.normal(np.where(y == 1, high, low), spread)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("low, high, spread", [(-1.5, 0.5, 1.0), (2.0, 8.0, 3.0)])
def test_balanced_threshold_is_the_midpoint_whatever_the_share(share, low, high, spread):
    y, z = gaussians(share, low=low, high=high, spread=spread)
    threshold, scale = helpers.balanced_threshold(y, z)
    assert threshold == pytest.approx((low + high) / 2, abs=0.05 * spread)
    assert scale == pytest.approx((high - low) / spread**2, rel=0.05)  # the slope of the log-odds
    assert type(threshold) is type(scale) is float


@pytest.mark.parametrize("prevalence", [0.2, 0.5, 0.7])
def test_balanced_threshold_for_another_prevalence(prevalence):
    threshold, _ = helpers.balanced_threshold(*gaussians(0.3), prevalence=prevalence)
    best = -0.5 - math.log(prevalence / (1 - prevalence)) / 2  # midpoint, moved by the prior's log-odds / slope
    assert threshold == pytest.approx(best, abs=0.05)


def test_threshold_reaches_the_best_balanced_f1_and_calibrates():
    y, z = gaussians(0.3)
    threshold, scale = helpers.balanced_threshold(y, z)

    def balanced_f1(at):
        return helpers.classification_metrics(y, z > at, prevalence=0.5)["f1"]
    assert balanced_f1(threshold) > balanced_f1(0.0) + 0.02
    y, z = gaussians(0.5, seed=1)  # other exams of a balanced population
    p = helpers.submission_probabilities(z, threshold, scale)[:, 1]
    for low in np.arange(0.1, 0.9, 0.2):
        inside = (p > low) & (p < low + 0.2)
        assert y[inside].mean() == pytest.approx(p[inside].mean(), abs=0.03)


@pytest.mark.parametrize("make", [np.zeros_like, lambda z: np.full_like(z, 3.0), lambda z: -z],
                         ids=["zero", "constant", "inverted"])
def test_logits_without_information_are_left_as_they_are(make):
    y, z = gaussians(0.3, n=400)
    assert helpers.balanced_threshold(y, make(z)) == (0.0, 1.0)


def test_perfect_separation_gives_a_threshold_between_the_classes():
    y, z = np.array([0, 0, 0, 1, 1]), np.array([-3.0, -2.5, -1.0, 2.0, 4.0])
    threshold, scale = helpers.balanced_threshold(y, z)
    assert -1 < threshold < 2 and 0 < scale < math.inf


@pytest.mark.parametrize("y, z", [([0, 0], [1.0, 2.0]), ([0, 1], [1.0, math.nan]), ([0, 1, 1], [1.0, 2.0])],
                         ids=["one class", "NaN", "lengths"])
def test_balanced_threshold_refuses_bad_input(y, z):
    with pytest.raises(ValueError):
        helpers.balanced_threshold(y, z)


# ------------------------------------------------------------------------------------------------
# submission_probabilities
# ------------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(logits=st.lists(st.integers(-80, 80), min_size=4, max_size=40), threshold=st.integers(-12, 12),
       scale=st.sampled_from([0.5, 1.0, 1.4]), data=st.data())
def test_submission_keeps_auroc_and_ap_and_moves_the_decision(logits, threshold, scale, data):
    z, threshold = np.array(logits) / 4, threshold / 4
    y = np.array(data.draw(st.lists(st.integers(0, 1), min_size=len(z) - 2, max_size=len(z) - 2)) + [0, 1])
    table = helpers.submission_probabilities(z, threshold, scale)
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-15)
    np.testing.assert_array_equal(table[:, 1] > 0.5, z > threshold)
    np.testing.assert_array_equal(table.argmax(axis=1), z > threshold)  # as the leaderboard decides
    for score in (sk.roc_auc_score, sk.average_precision_score):
        assert score(y, table[:, 1]) == pytest.approx(score(y, z), abs=1e-12)
        assert score(1 - y, table[:, 0]) == pytest.approx(score(1 - y, -z), abs=1e-12)


@pytest.mark.parametrize("threshold, scale", [(0.0, 1.0), (-1.37, 0.4), (math.pi, 11.0)])
def test_threshold_becomes_exactly_one_half(threshold, scale):
    around = [np.nextafter(threshold, -9), threshold, np.nextafter(threshold, 9)]
    table = helpers.submission_probabilities(around, threshold, scale)
    assert table[1].tolist() == [0.5, 0.5]
    assert table[0, 1] <= 0.5 <= table[2, 1]
    np.testing.assert_allclose(helpers.submission_probabilities([threshold + 2 / scale], threshold, scale)[0, 1],
                               1 / (1 + math.exp(-2)), rtol=1e-12)


@pytest.mark.parametrize("shape", [lambda z: z[:, None], lambda z: z.tolist(), torch.as_tensor],
                         ids=["n1", "list", "tensor"])
def test_submission_takes_any_shape(shape):
    z = np.linspace(-3, 3, 7)
    expected = helpers.submission_probabilities(z, 0.3)
    np.testing.assert_array_equal(helpers.submission_probabilities(shape(z), 0.3), expected)


@pytest.mark.parametrize("extreme", [40.0, 1e3, 1e300, math.inf])
def test_extreme_logits_stay_finite(extreme):
    table = helpers.submission_probabilities([-extreme, extreme], 1.5, 20.0)
    assert np.isfinite(table).all() and table.tolist() == pytest.approx(np.array([[1, 0], [0, 1]]), abs=1e-12)


def test_certain_exams_are_not_tied_in_either_column():
    """1 - p would be 0 for every logit over 37."""
    table = helpers.submission_probabilities(np.arange(-700, 701.0))
    assert (np.diff(table[table[:, 1] < 0.5, 1]) > 0).all() and (np.diff(table[table[:, 0] < 0.5, 0]) < 0).all()
    assert table[-1, 0] == pytest.approx(math.exp(-700), rel=1e-9)


def test_float32_logits_keep_their_order():
    """float32 minus a threshold near 1 would tie logits that differ by less than 6e-8."""
    z = np.array([1e-9, 3e-9, 2e-9, 1.0], dtype=np.float32)
    table = helpers.submission_probabilities(z, threshold=1.0)
    assert table.dtype == np.float64
    assert np.argsort(table[:, 1]).tolist() == np.argsort(z).tolist() and len(np.unique(table[:, 1])) == 4
