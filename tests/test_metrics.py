"""Metrics, the sigmoid, the threshold for a balanced population, the columns of a submission, what its score tells."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
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
    # predicted AF: 0.8, 0.6; order from the highest: AF, no AF, AF, no AF, no AF
    found = helpers.classification_metrics([0, 0, 1, 1, 0], [0.1, 0.6, 0.4, 0.8, 0.2])
    assert found == pytest.approx({
        "accuracy": 3 / 5, "f1": 1 / 2, "precision": 1 / 2, "recall": 1 / 2, "specificity": 2 / 3,
        "auroc": 5 / 6, "ap": (1 + 2 / 3) / 2, "leaderboard_ap": (5 / 6 + 11 / 12) / 2}, rel=1e-12)
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("seed, threshold", [(0, 0.5), (1, 0.3), (2, 0.71)])
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


@pytest.mark.parametrize("prevalence", [0, 1, -0.2, 50, math.nan])
def test_prevalence_that_is_no_share_is_refused(prevalence):
    with pytest.raises(ValueError, match="prevalence"):
        helpers.classification_metrics(*sample(0), prevalence=prevalence)


def test_exam_weights_make_the_prevalence_and_leave_the_sum():
    y = np.repeat([0, 1, 0], [5, 3, 2])
    weights = helpers.exam_weights(y, 0.5)
    assert weights[y == 1].sum() == pytest.approx(weights[y == 0].sum()) and weights.sum() == pytest.approx(10)
    assert helpers.exam_weights(y, 0.1)[y == 1].sum() == pytest.approx(1)
    for one_class_or_none in (helpers.exam_weights(y), helpers.exam_weights(np.ones(10), 0.5)):
        assert one_class_or_none.tolist() == [1.0] * 10


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


@pytest.mark.parametrize("share", [0.07, 0.3, 0.5, 0.8])
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


def platt(y, z, prevalence=0.5):
    """Threshold and scale of Platt's fit, by general minimisation."""
    target = np.where(y == 1, (sum(y == 1) + 1) / (sum(y == 1) + 2), 1 / (sum(y == 0) + 2))
    weight = np.where(y == 1, prevalence / np.mean(y == 1), (1 - prevalence) / np.mean(y == 0))

    def loss(line):
        logit = line[0] * z + line[1]
        return np.mean(weight * (np.logaddexp(0, logit) - target * logit))
    slope, intercept = minimize(loss, [0.1, 0.0], method="BFGS", options={"gtol": 1e-8}).x
    return -intercept / slope, slope


@pytest.mark.parametrize("share", [0.07, 0.3, 0.5])
@pytest.mark.parametrize("distance, n", [(2, 300), (12, 240), (12, 2000), (60, 240)])
def test_calibration_is_platts_with_smoothed_targets(share, distance, n):
    """Also where the classes separate perfectly: a plain logistic regression has no finite slope there."""
    y, z = gaussians(share, n=n, low=-distance / 2, high=distance / 2)
    threshold, scale = helpers.balanced_threshold(y, z)
    expected = platt(y, z)
    assert threshold == pytest.approx(expected[0], abs=1e-3 * distance) and scale == pytest.approx(expected[1], rel=1e-3)
    p = helpers.to_probability(scale * (z - threshold))
    assert 1e-9 < p.min() and p.max() < 1 - 1e-9
    if distance > 10:
        assert z[y == 0].max() < threshold < z[y == 1].min()


def test_a_handful_of_separated_exams():
    y, z = np.array([0, 0, 0, 1, 1]), np.array([-3.0, -2.5, -1.0, 2.0, 4.0])
    threshold, scale = helpers.balanced_threshold(y, z)
    assert -1 < threshold < 2 and 0.2 < scale < 2


@pytest.mark.parametrize("n, share", [(50, 0.16), (240, 0.07), (240, 0.3), (240, 0.5), (2000, 0.07)])
@pytest.mark.parametrize("logit", [1e6, -1e6, 1e300, -1e300])
@pytest.mark.parametrize("label", [0, 1])
def test_one_logit_of_a_million_does_not_decide_for_all(n, share, logit, label):
    y, z = gaussians(share, n=n)
    before, scale = helpers.balanced_threshold(y, z)
    z[np.flatnonzero(y == label)[0]] = logit
    threshold, less = helpers.balanced_threshold(y, z)
    assert (threshold, less) != (0.0, 1.0)  # what the function answers where it gives up
    assert threshold == pytest.approx(before, abs=0.35) and less > 0.05 * scale


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("factor", [1e-150, 1e-30, 1e30, 1e300])
def test_logits_of_any_size_have_a_finite_calibration(factor):
    y, z = gaussians(0.3, n=100)
    threshold, scale = helpers.balanced_threshold(y, factor * z)
    assert math.isfinite(threshold) and 0 < scale < math.inf


@pytest.mark.parametrize("y, z", [([0, 0], [1.0, 2.0]), ([0, 1], [1.0, math.nan]), ([0, 1], [1.0, math.inf]),
                                  ([0, 1, 1], [1.0, 2.0])], ids=["one class", "NaN", "infinite", "lengths"])
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


NASTY = [0.0, -0.0, 5e-324, -5e-324, 1e-300, 1e-17, 1.0, np.nextafter(1, 2), 20.0, np.nextafter(20, 21), 36.7, 37.0, 700.0,
         1e16, 1e300, np.finfo(float).max, math.inf]
nasty = st.sampled_from(NASTY + [-value for value in NASTY]) | st.floats(allow_nan=False) | st.floats(-50, 50)


@pytest.mark.filterwarnings("error")
@settings(max_examples=300, deadline=None)
@given(logits=st.lists(nasty, min_size=1, max_size=60), threshold=nasty.filter(math.isfinite),
       scale=st.sampled_from([1e-300, 1e-3, 0.4, 1.0, 13.6, 1e6, 1e300]), data=st.data())
@example(logits=[-math.inf, *NASTY[::-1], *range(-60, 60)], threshold=0.0, scale=1.0, data=None)
@example(logits=np.linspace(30, 900, 16_000).tolist(), threshold=0.0, scale=1.0, data=None)
@example(logits=np.linspace(60, 90, 70_000).tolist(), threshold=0.0, scale=1.0, data=None)
@example(logits=np.cumsum(np.full(2000, 1e-16)).tolist(), threshold=1.0, scale=1.4, data=None)
@example(logits=[np.nextafter(math.pi, 9), math.pi, np.nextafter(math.pi, -9)], threshold=math.pi, scale=11.0, data=None)
def test_different_logits_are_different_probabilities(logits, threshold, scale, data):
    """Strictly monotone in both columns, however large, small or near to each other the logits are."""
    if data and data.draw(st.booleans()):  # a threshold among the logits
        threshold = next((value for value in logits if math.isfinite(value)), threshold)
    z = np.array(logits, dtype=float)
    z = np.concatenate([z, np.nextafter(z, 0), z[:3]])  # neighbouring floats, and equal ones
    table = helpers.submission_probabilities(z, threshold, scale)
    assert table.dtype == np.float64 and table.shape == (len(z), 2)
    values, first, place = np.unique(z, return_index=True, return_inverse=True)
    for column, sign in ((1, 1), (0, -1)):
        assert (sign * np.diff(table[first, column]) > 0).all()
        assert len(np.unique(table[:, column])) == len(values)
    np.testing.assert_array_equal(table, table[first][place])
    np.testing.assert_array_equal(np.sign(table[:, 1] - 0.5), np.sign((z > threshold) * 1.0 - (z < threshold)))
    np.testing.assert_array_equal(table.argmax(axis=1), z > threshold)  # as the leaderboard decides
    assert ((table > 0) & (table < 1)).all() and np.abs(np.log(table[:, 1] / table[:, 0])).max() < 30
    np.testing.assert_allclose(table.sum(axis=1), 1, atol=1e-9)
    np.testing.assert_array_equal(json.loads(json.dumps(table.tolist())), table)  # as it is sent


def test_float32_logits_keep_their_order():
    """float32 minus a threshold near 1 would tie logits that differ by less than 6e-8."""
    z = np.array([1e-9, 3e-9, 2e-9, 1.0], dtype=np.float32)
    table = helpers.submission_probabilities(z, threshold=1.0)
    assert np.argsort(table[:, 1]).tolist() == np.argsort(z).tolist() and len(np.unique(table[:, 1])) == 4


@pytest.mark.parametrize("given", [([math.nan, 1.0],), ([1.0], math.inf), ([1.0], math.nan), ([1.0], 0.0, 0.0),
                                   ([1.0], 0.0, -1.0), ([1.0], 0.0, math.inf), ([1.0], 0.0, math.nan)], ids=str)
def test_submission_refuses_what_has_no_probability(given):
    with pytest.raises(ValueError, match="NaN|finite"):
        helpers.submission_probabilities(*given)


# ------------------------------------------------------------------------------------------------
# estimate_prevalence, published_tells
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0.07, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("assumed", [0.5, 0.3])
def test_prevalence_of_exams_without_labels(share, assumed):
    threshold, scale = helpers.balanced_threshold(*gaussians(0.3), prevalence=assumed)
    _, z = gaussians(share, seed=1)
    probability = helpers.to_probability(scale * (z - threshold))
    assert helpers.estimate_prevalence(probability, assumed) == pytest.approx(share, abs=0.02)


def published(tp, fp, fn, tn):
    """What the leaderboard shows, what the submission itself tells, and the truth."""
    counts = tp + fp + fn + tn
    f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0
    truth = {"prevalence": (tp + fn) / counts}
    if tp + fn:
        truth["recall"] = tp / (tp + fn)
    if tp + fp:
        truth["precision"] = tp / (tp + fp)
    return (float(f"{(tp + tn) / counts:.3f}"), float(f"{f1:.3f}"), tp + fp, counts), truth


@settings(max_examples=200, deadline=None)
@given(st.tuples(*[st.integers(0, 3000)] * 4).filter(any))
@example((3000, 0, 0, 3000))
@example((0, 0, 3000, 3000))
@example((0, 10, 10, 0))
@example((7, 0, 0, 0))
def test_the_interval_of_a_published_score_holds_the_truth(counts):
    score, truth = published(*counts)
    found = helpers.published_tells(*score)
    assert set(found) == {"recall", "precision", "prevalence"}
    for name, true in truth.items():
        value, low, high = found[name]
        assert 0 <= low <= value <= high <= 1 and low - 1e-12 <= true <= high + 1e-12


def test_a_published_score_tells_prevalence_and_recall_closely():
    """The course's test set at a good score: 6,000 exams, half of them AF."""
    score, truth = published(tp=2820, fp=150, fn=180, tn=2850)
    found = helpers.published_tells(*score)
    assert score[:2] == (0.945, 0.945)
    for name, width in (("recall", 0.04), ("precision", 0.04), ("prevalence", 0.04)):
        value, low, high = found[name]
        assert value == pytest.approx(truth[name], abs=0.02) and high - low < width
    assert all(type(number) is float for triple in found.values() for number in triple)


def test_a_perfect_score_and_a_score_of_another_file():
    found = helpers.published_tells(1.0, 1.0, 3000, 6000)
    assert [found[name][0] for name in ("recall", "precision", "prevalence")] == [1.0, 1.0, 0.5]
    for score in ((0.9, 0.2, 3000, 6000), (0.945, 0.945, 600, 6000)):
        with pytest.raises(ValueError, match="another file"):
            helpers.published_tells(*score)
