"""Score a finished run of the notebook against test labels, which the notebook itself never reads.

    python tests/tools/score_run.py --work FOLDER --labels test_labels.csv [--records RECORDS.txt]

FOLDER: where the run wrote results.json (for demo data its demo/). Prints a Markdown table: validation figures from
results.json, test figures from predictions/*.json as the leaderboard would score them, with 95 % intervals from
resampling patients. "50 %": reweighted so that AF makes up half of the exams; the leaderboard's AP is so, too.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ecg_helpers as ecg  # noqa: E402

HEADER = """\
| model | validation AUROC | AP, 50 % | F1, 50 % | test AUROC | AP as it is | AP, 50 % | F1, 50 % | leaderboard AP |
|---|---|---|---|---|---|---|---|---|"""


def figure(value, draws=()):
    """A number as text, with the 95 % interval of its draws; nothing where there is none."""
    if value is None or not np.isfinite(value):
        return ""
    if not len(draws):
        return f"{value:.3f}"
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def test_figures(y, p, patients, rounds):
    """Texts of the test columns, for the probabilities `p` of AF, (exams,)."""
    score, draws = ecg.patient_bootstrap(y, p, patients, threshold=0.5, rounds=rounds)
    # the same draws of patients, the other class: its AP is the other half of the leaderboard's
    no_af, no_af_draws = ecg.patient_bootstrap(1 - y, 1 - p, patients, threshold=0.5, rounds=rounds)
    as_it_is = ecg.classification_metrics(y, p)["ap"]
    both, both_draws = (score[1] + no_af[1]) / 2, (draws[:, 1] + no_af_draws[:, 1]) / 2
    auroc, ap, f1 = (figure(score[k], draws[:, k]) for k in range(3))
    return [auroc, figure(as_it_is), ap, f1, figure(both, both_draws)]


def table_line(name, row, y, patients, work, rounds):
    """One line of the table; "no predictions" where the run left no file."""
    validation = [figure(row.get(key)) for key in ("auroc", "ap", "f1")]
    file, test = work / "predictions" / f"{name}.json", ["no predictions"] * 5
    if file.exists():
        p = np.array(json.loads(file.read_text(encoding="utf-8"))["prediction"])[:, 1]
        if len(p) != len(y):
            raise SystemExit(f"{file} has {len(p)} rows, the labels {len(y)} exams: give the RECORDS.txt of that run.")
        test = test_figures(y, p, patients, rounds)
    return f"| {' | '.join([f'`{name}`', *validation, *test])} |"


def main(arguments=None):
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--records", type=Path, help="default: those of FOLDER/codesubset/test")
    parser.add_argument("--rounds", type=int, default=1000, help="resamplings of the patients")
    given = parser.parse_args(arguments)
    labels = ecg.load_labels(given.labels, given.records or given.work / "codesubset" / "test" / "RECORDS.txt")
    y, patients = labels["AF"].to_numpy(), labels["id_patient"].to_numpy()
    results = json.loads((given.work / "results.json").read_text(encoding="utf-8"))
    print(f"{len(y)} test exams, {y.sum()} AF\n\n{HEADER}")
    for name, row in results.items():
        print(table_line(name, row, y, patients, given.work, given.rounds), flush=True)


if __name__ == "__main__":
    main()
