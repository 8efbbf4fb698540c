"""Bootstrap over patients, intervals as text, error rates, disturbed ECGs, occlusion."""
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

import ecg_helpers as helpers

matplotlib.use("Agg")


def exams(seed=0, n=150, people=60, decimals=1):
    """Labels, logits (rounded, so that there are ties) and patients, of whom some have several exams."""
    rng = np.random.default_rng(seed)
    truth = (rng.random(n) < 0.3).astype(int)
    return truth, (2 * truth - 1 + rng.normal(0, 1.5, n)).round(decimals), rng.integers(0, people, n) * 7 + 1000


@pytest.mark.parametrize("seed, threshold", [(0, 0.0), (1, 0.4), (2, -9.0), (3, 9.0)])
def test_scores_equal_classification_metrics(seed, threshold):
    """Of the exams as they are, and of draws in which exams are there twice or not at all."""
    truth, logits, patients = exams(seed)
    weights = next(helpers.patient_draws(patients, rounds=3))
    found = np.vstack([helpers.balanced_scores(truth, logits, threshold),
                       helpers.balanced_scores(truth, logits, threshold, weights)])
    for row, times in zip(found, [np.ones(len(truth)), *weights]):
        drawn = np.repeat(np.arange(len(truth)), times.astype(int))
        p = helpers.to_probability(logits[drawn] - threshold)
        expected = helpers.classification_metrics(truth[drawn], p, prevalence=0.5)
        assert row == pytest.approx([expected[key] for key in ("auroc", "ap", "f1")], abs=1e-12)


def test_f1_at_a_threshold_equals_classification_metrics():
    truth, logits, _ = exams()
    for threshold in (-99, -1, 0.05, logits[3], 99):
        for prevalence in (0.01, 0.5):
            p = helpers.to_probability(logits - threshold)
            expected = helpers.classification_metrics(truth, p, prevalence=prevalence)["f1"]
            assert helpers.f1_at(truth, logits, threshold, prevalence) == pytest.approx(expected, abs=1e-12)


def test_patients_are_drawn_whole_and_alike():
    """All exams of a patient are drawn equally often; draws are as many patients as there are, the same each time."""
    patients = exams()[2]
    draws = np.concatenate(list(helpers.patient_draws(patients, rounds=40, block=16)))
    assert draws.shape == (40, len(patients))
    names, first = np.unique(patients, return_index=True)
    for name in names:
        assert len(np.unique(draws[:, patients == name], axis=1).T) == 1
    assert (draws[:, first].sum(axis=1) == len(names)).all()
    again = np.concatenate(list(helpers.patient_draws(patients, rounds=40, block=16)))
    assert (draws == again).all()
    assert (draws != np.concatenate(list(helpers.patient_draws(patients, rounds=40, seed=1, block=16)))).any()


def test_differences_are_paired():
    """Logits with the same ranking have differences of exactly 0 in each draw, though each AUROC varies."""
    truth, logits, patients = exams()
    one = helpers.patient_bootstrap(truth, logits, patients, rounds=50)
    other = helpers.patient_bootstrap(truth, 3 * logits + 1, patients, threshold=1.0, rounds=50)
    value, draws = helpers.difference(one, other)
    assert one[1][:, 0].std() > 0.01 and one[1].shape == (50, 3)
    assert (value == 0).all() and (draws == 0).all()
    assert helpers.score_interval(one, "balanced F1") == (one[0][2], helpers.interval(one[1][:, 2]))


def test_interval_leaves_out_draws_without_a_score():
    assert helpers.interval(np.array([np.nan, 1.0, np.nan, 3.0])) == pytest.approx((1.05, 2.95))
    assert all(math.isnan(limit) for limit in helpers.interval(np.full(4, np.nan)))
    truth, logits, patients = np.array([1, 0, 0, 0]), np.array([2.0, 1.0, 0.0, -1.0]), np.arange(4)
    value, draws = helpers.patient_bootstrap(truth, logits, patients, rounds=200)
    assert np.isnan(draws[:, 0]).any() and (value[:2] == 1).all()
    assert helpers.interval(draws[:, 0]) == (1, 1)


def test_interval_of_the_operating_point():
    truth, logits, patients = exams(n=400, people=300)
    low, high = helpers.threshold_interval(truth, logits, patients, rounds=30)
    assert low < helpers.balanced_threshold(truth, logits)[0] < high < low + 2


def test_texts():
    assert [helpers.percent(share) for share in (0, 0.0004, 0.123, 0.9996, 1, math.nan)] == [
        "0.0 %", "< 0.1 %", "12.3 %", "> 99.9 %", "> 99.9 %", "undefined"]
    assert helpers.with_interval(0.98, (0.97, 0.99)) == "0.980 (0.970 to 0.990)"
    assert helpers.with_interval(0.01, (-0.02, 0.04), "+") == "+0.010 (-0.020 to +0.040)"
    assert helpers.with_interval(math.nan, (0, 1)) == "too few"
    table = helpers.interval_table({"a": helpers.patient_bootstrap(*exams(), rounds=5)})
    assert list(table.columns) == list(helpers.SCORE_NAMES) and table.index.tolist() == ["a"]
    assert helpers.error_text(0, 30, None, "exams") == "0 of 30 exams: 0 errors in n still allow 3/n, here 10.0 %"


def test_error_rates_and_screening_by_hand():
    """Recall 0.95 and a false positive rate of 0.05 make a PPV of 0.16 at 1 % prevalence."""
    truth = np.repeat([1, 0], [20, 100])
    predicted = np.concatenate([np.arange(20) > 0, np.arange(100) < 5])
    rates, draws = helpers.class_rates(truth, predicted, np.arange(120), rounds=20)
    assert rates.tolist() == [0.95, 0.05] and draws.shape == (20, 2)
    found = helpers.screening_values(*rates, prevalence=0.01)
    assert found["PPV"] == pytest.approx(0.0095 / 0.059) and found["missed AF per 10,000"] == pytest.approx(5)
    row = helpers.screening_row(truth, np.where(truth, 1.0, -1.0), np.arange(120), 0.0, 0.01)
    assert row["specificity"].startswith("at least 97.0 %")  # no false positive: the rule of three


def test_reliability_by_hand():
    """20 AF and 20 other exams: two bins of equal weight, 2 of 20 AF in the lower, 18 of 20 in the upper one."""
    p = np.repeat([0.2, 0.7], 20)
    truth = np.r_[np.arange(20) < 2, np.arange(20) < 18].astype(int)
    table = helpers.reliability_table(truth, p)
    assert table[["exams", "AF"]].to_numpy().tolist() == [[20, 2], [20, 18]]
    assert table["predicted"].tolist() == pytest.approx([0.2, 0.7])
    assert table["observed"].tolist() == pytest.approx([0.1, 0.9]), "half have AF: nothing to reweight"
    assert table["low"][0] == pytest.approx(0.0279, abs=1e-3) and table["high"][0] == pytest.approx(0.301, abs=1e-3)


def test_reliability_reweights_to_half():
    """One AF exam in three, all with p = 0.5: the observed share at 50 % prevalence is a half."""
    truth = (np.arange(90) % 3 == 0).astype(int)
    table = helpers.reliability_table(truth, np.full(90, 0.5))
    balanced = np.average(table["observed"], weights=table["exams"])
    assert balanced == pytest.approx(0.5, abs=0.03) and (table["low"] < 0.5).all() and (table["high"] > 0.5).all()


def test_prior_shift_and_subgroups():
    assert helpers.prior_shift(1.0, 1.0, 0.3) == pytest.approx(1 + math.log(7 / 3))
    assert helpers.prior_shift(-2.0, 0.5, 0.5) == -2
    labels = pd.DataFrame({"age": [49.9, 50, 79, 80, np.nan], "sex": ["F", "M", np.nan, "F", "M"]})
    found = {name: rows.tolist() for name, rows in helpers.subgroups(labels).items()}
    assert found == {"all": [0, 1, 2, 3, 4], "under 50": [0], "50 to 64": [1], "65 to 79": [2], "80 and older": [3],
                     "women": [0, 3], "men": [1, 4]}


@pytest.mark.parametrize("name", helpers.DISTURBANCES)
def test_disturbances(name):
    """Deterministic in the seed, same shape and type, padding stays zero, the exams given are left as they are."""
    x = torch.randn(3, helpers.N_SAMPLES, 8)
    x[:, :200] = 0
    before = x.clone()
    torch.manual_seed(1)
    first = helpers.disturb(x, name)
    torch.manual_seed(2)
    assert torch.equal(first, helpers.disturb(x, name)) and torch.equal(x, before)
    assert first.shape == x.shape and first.dtype == x.dtype and not first[:, :200].any()
    assert torch.equal(first, x) == (name == "undisturbed")


def test_mean_score_drop_and_worst_disturbance():
    values = {"undisturbed": 0.9, "a": 0.8, "b": 0.6}
    results = {name: (np.full(3, value), np.full((4, 3), value)) for name, value in values.items()}
    value, draws = helpers.mean_score_drop(results)
    assert value == pytest.approx([0.2] * 3) and draws == pytest.approx(np.full((4, 3), 0.2))
    assert helpers.worst_disturbance(results, "AUROC") == "b"


def test_occlusion_finds_a_known_window():
    class Known(torch.nn.Module):  # looks at lead II between 4.0 and 4.5 s and at nothing else
        def forward(self, x):
            return x[:, 1600:1800, 1].mean(dim=1, keepdim=True)

    times, falls = helpers.occlusion(Known(), torch.ones(helpers.N_SAMPLES, 8), "cpu")
    assert times[falls.argmax()] == 4.25 and falls.max() == 1
    assert (falls[np.abs(times - 4.25) > 0.5] == 0).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recall, rate, undefined", [(1.0, 1.0, "NPV"), (0.0, 0.0, "PPV")])
def test_screening_without_alarms_or_without_all_clear(recall, rate, undefined):
    """Where all exams are predicted alike, one value is undefined, and no warning says so."""
    values = helpers.screening_values(np.float64(recall), np.float64(rate), 0.01)
    assert np.isnan(values[undefined]) and np.isfinite(values["missed AF per 10,000"])
