"""Score a finished run of the notebook against test labels, which the notebook itself never reads.

    python tests/tools/score_run.py --work FOLDER --labels test_labels.csv [--records RECORDS.txt]

FOLDER: where the run wrote results.json (for demo data its demo/). Prints a Markdown table: validation
figures from results.json, test figures with 95 % intervals from resampling patients, seconds per epoch.
Experiments are scored from predictions/*.json, as the leaderboard would; models without a file there from the
weights of their run. AP and F1 are reweighted to 50 % prevalence, except the column "AP as it is".
"""

import argparse
import json
from pathlib import Path

import h5py
import notebook_source
import numpy as np
import torch

import ecg_helpers as ecg

CLASSES = {
    "baseline": "ModelBaseline",
    "linear": "LinearModel",
    "four_conv": "Model",
}  # models without a submission
HEADER = """\
| model | validation AUROC | AP | F1 | test AUROC | AP as it is | AP | F1 | leaderboard AP | s per epoch |
|---|---|---|---|---|---|---|---|---|---|"""


def test_probabilities(name, row, work):
    """Probability of AF of each test exam, operating point 0.5; None where the run left neither file nor known
    weights.
    """
    file = work / "predictions" / f"{name}.json"
    if file.exists():
        return np.array(json.loads(file.read_text(encoding="utf-8"))["prediction"])[:, 1]
    if name not in CLASSES or not row.get("run"):
        return None
    model = notebook_source.definitions(CLASSES[name])[CLASSES[name]]()
    weights = work / row["run"] / "model.pth"
    try:
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except RuntimeError:
        other = f"{weights} was made by another {CLASSES[name]} than the notebook's: run it again"
        raise SystemExit(other) from None
    with h5py.File(work / "codesubset" / "test.h5", "r") as tracings:
        return ecg.to_probability(ecg.predict(model, tracings["tracings"], "cpu"))


def scores(y, p):
    """AUROC, AP as it is, AP and F1 at 50 % prevalence, and the leaderboard's AP at 50 %."""
    balanced = ecg.classification_metrics(y, p, prevalence=0.5)
    as_it_is = ecg.classification_metrics(y, p)["ap"]
    return np.array([balanced["auroc"], as_it_is, balanced["ap"], balanced["f1"], balanced["leaderboard_ap"]])


def intervals(y, p, patients, rounds):
    """95 % intervals of `scores`, (2, 5): patients resampled with replacement, as in the notebook."""
    values = []
    for block in ecg.patient_draws(patients, rounds, seed=0):
        for times in block.astype(int):
            exams = np.repeat(np.arange(len(y)), times)
            if 0 < y[exams].sum() < len(exams):
                values.append(scores(y[exams], p[exams]))
    return np.quantile(values, [0.025, 0.975], axis=0)


def figure(value, digits=3):
    """A number as text; nothing where there is none."""
    return "" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"


def table_line(name, row, y, p, patients, rounds):
    """One line of the table."""
    validation = [figure(row.get(key)) for key in ("auroc", "balanced_ap", "balanced_f1")]
    test = ["no weights"] * 5
    if p is not None:
        low, high = intervals(y, p, patients, rounds)
        test = [f"{value:.3f} ({a:.3f}-{b:.3f})" for value, a, b in zip(scores(y, p), low, high)]
    seconds = figure(row.get("seconds_per_epoch"), 1)
    return f"| {' | '.join([f'`{name}`', *validation, *test, seconds])} |"


def estimated_prevalences(y, p, rounds=200, seed=0):
    """What the label-shift estimate finds in these exams, resampled: true prevalence -> 2.5, 50, 97.5 %
    quantiles.
    """
    rng = np.random.default_rng(seed)
    af, rest = np.flatnonzero(y == 1), np.flatnonzero(y == 0)
    found = {}
    for prevalence in (y.mean(), 0.3, 0.5):
        n_af = round(prevalence * len(y))
        estimates = []
        for _ in range(rounds):
            exams = np.concatenate([rng.choice(af, n_af), rng.choice(rest, len(y) - n_af)])
            estimates.append(ecg.estimate_prevalence(p[exams]))
        found[prevalence] = np.quantile(estimates, [0.025, 0.5, 0.975])
    return found


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--records", type=Path)
    parser.add_argument("--rounds", type=int, default=1000, help="resamplings of the patients")
    return parser.parse_args()


def main():
    """Print the tables."""
    options = parse()
    records = options.records or options.work / "codesubset" / "test" / "RECORDS.txt"
    labels = ecg.load_labels(options.labels, records)
    y, patients = labels["AF"].to_numpy(), labels["id_patient"].to_numpy()
    results = json.loads((options.work / "results.json").read_text(encoding="utf-8"))
    print(f"{len(y)} test exams, {y.sum()} AF\n\n{HEADER}")
    for name, row in results.items():
        p = test_probabilities(name, row, options.work)
        print(table_line(name, row, y, p, patients, options.rounds), flush=True)
    p = test_probabilities("exp3_ensemble", results.get("exp3_ensemble", {}), options.work)
    if p is None:
        return
    print(
        "\nPrevalence estimated from the predictions of exp3_ensemble, test exams resampled (200 times) at "
        "known prevalences:\n\n| true prevalence | estimate: median (95 % of the draws) |\n|---|---|"
    )
    for prevalence, (low, middle, high) in estimated_prevalences(y, p).items():
        print(f"| {prevalence:.1%} | {middle:.1%} ({low:.1%}-{high:.1%}) |")


if __name__ == "__main__":
    main()
