"""Score a finished run of the notebook against test labels, which the notebook itself never reads.

    python tests/score_run.py --work FOLDER --labels test_labels.csv [--records codesubset/test/RECORDS.txt]

Prints a Markdown table: validation figures from results.json, test figures with 95 % intervals from resampling
patients, seconds per epoch. The three experiments are scored from predictions/*.json, as the leaderboard would; the
models of the original from runs/<name>/model.pth. AP and F1 are weighted to 50 % AF, except the column "AP as it is".
"""
import argparse
import json
from pathlib import Path

import h5py
import numpy as np
import torch
from ablation import ecg, notebook_definitions

ORIGINALS = {"baseline": "ModelBaseline", "linear": "LinearModel", "four_conv": "Model"}


def test_probabilities(name, work, definitions):
    """Probability of AF of each test exam, decided at 0.5."""
    if name not in ORIGINALS:
        return np.array(json.loads((work / "predictions" / f"{name}.json").read_text())["prediction"])[:, 1]
    model = definitions[ORIGINALS[name]]()
    model.load_state_dict(torch.load(work / "runs" / name / "model.pth", weights_only=True))
    with h5py.File(work / "codesubset" / "test.h5", "r") as file:
        return ecg.to_probability(ecg.predict(model, file["tracings"], "cpu"))


def scores(y, p):
    """AUROC, AP as it is, AP and F1 weighted to 50 % AF, and the leaderboard's AP weighted so."""
    balanced = ecg.classification_metrics(y, p, prevalence=0.5)
    return np.array([balanced["auroc"], ecg.classification_metrics(y, p)["ap"], balanced["ap"], balanced["f1"],
                     balanced["leaderboard_ap"]])


def interval(y, p, patients, rounds=1000, seed=0):
    """95 % interval of `scores`, patients resampled with replacement."""
    rng, members = np.random.default_rng(seed), [np.flatnonzero(patients == name) for name in np.unique(patients)]
    draws = [np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]) for _ in range(rounds)]
    return np.quantile([scores(y[d], p[d]) for d in draws if 0 < y[d].sum() < len(d)], [0.025, 0.975], axis=0)


def shares_found(y, p, estimate, rounds=200, seed=0):
    """Share of AF that the label-shift estimate finds in these exams drawn anew: true share -> 2.5, 50, 97.5 % quantiles."""
    rng, af, rest = np.random.default_rng(seed), np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    found = {}
    for share in (y.mean(), 0.3, 0.5):
        n_af = round(share * len(y))
        draws = [estimate(p[np.concatenate([rng.choice(af, n_af), rng.choice(rest, len(y) - n_af)])]) for _ in range(rounds)]
        found[share] = np.quantile(draws, [0.025, 0.5, 0.975])
    return found


def main():
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--records", type=Path)
    options = parser.parse_args()
    labels = ecg.load_labels(options.labels, options.records or options.work / "codesubset" / "test" / "RECORDS.txt")
    y, patients = labels["AF"].to_numpy(), labels["id_patient"].to_numpy()
    results, definitions = json.loads((options.work / "results.json").read_text()), notebook_definitions()
    print(f"{len(y)} test exams, {y.sum()} AF\n")
    print("| model | validation AUROC | AP | F1 | test AUROC | AP as it is | AP | F1 | leaderboard AP | s an epoch |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, row in results.items():
        p = test_probabilities(name, options.work, definitions)
        test = [f"{v:.3f} ({a:.3f}-{b:.3f})" for v, a, b in zip(scores(y, p), *interval(y, p, patients))]
        seconds = f"{row['seconds_per_epoch']:.1f}" if row.get("seconds_per_epoch") else ""
        print(f"| `{name}` | {row['auroc']:.3f} | {row['balanced_ap']:.3f} | {row['balanced_f1']:.3f} | {' | '.join(test)} | {seconds} |")
    print("\nLabel-shift estimate from the predictions of exp3_ensemble, test exams drawn anew (200 times) at known shares of AF:\n")
    print("| true share | found: median (95 % of the draws) |\n|---|---|")
    p = test_probabilities("exp3_ensemble", options.work, definitions)
    for share, (low, middle, high) in shares_found(y, p, definitions["estimate_prevalence"]).items():
        print(f"| {share:.1%} | {middle:.1%} ({low:.1%}-{high:.1%}) |")


if __name__ == "__main__":
    main()
