"""Does the notebook run to its end with any seed, number of threads and epochs, and on small or odd data?

    python tests/tools/robustness.py [--seeds 0 1 2 3 4] [--threads 1 2] [--epochs 1 3 default]
    python tests/tools/robustness.py --small [NAME ...]

Each run is headless, in a fresh folder, on demo data made here. Prints a Markdown table, one line a run: ok
or the error's last line, seconds, validation AUROC of experiment 3, warnings. --small: data sets that are
legal but small or odd; each must run to the end, or be refused in one sentence that says what is needed.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import wfdb
from notebook_source import code_cells, load
from run_on_real import error_line, execute, warnings_of

import ecg_helpers as ecg


# ---- One run -------------------------------------------------------------------------------------
def try_notebook(data, work, threads, epochs):
    """Run the notebook on `data`; dict of what happened."""
    settings = {} if epochs == "default" else {"ECG_EPOCHS": epochs}
    work.mkdir(parents=True)
    executed, error, seconds = execute(load(), work, threads, ECG_DATA=data, ECG_WORK=".", **settings)
    return {
        "result": error_line(error) if error else "ok",
        "seconds": f"{seconds:.0f}",
        "AUROC of exp3": auroc_of(work, "exp3_ensemble"),
        "warnings": remarks(executed),
    }


def auroc_of(work, name):
    """Validation AUROC in results.json, as text; demo data write into demo/."""
    for file in (work / "demo" / "results.json", work / "results.json"):
        if file.exists():
            value = json.loads(file.read_text(encoding="utf-8")).get(name, {}).get("auroc")
            return "undefined" if value is None else f"{value:.3f}"
    return ""


def remarks(executed):
    """How many cells wrote to stderr, and how many bold lines the notebook gave as a warning."""
    noisy, bold = 0, 0
    for cell in code_cells(executed):
        noisy += bool(warnings_of({"cells": [cell]}))
        for output in cell["outputs"]:
            text = "".join(output.get("data", {}).get("text/markdown", ""))
            bold += bool(re.fullmatch(r"\W*\*\*[^*\n]+\*\*", text.strip()))
    return f"{noisy} on stderr, {bold} bold"


def print_line(cells):
    """One line of a Markdown table."""
    print(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |", flush=True)


def print_table(runs, folder):
    """Run them one after the other: (labels of the run, function that makes its data, threads, epochs)."""
    head = None
    for number, (labels, make, threads, epochs) in enumerate(runs):
        place = folder / str(number)
        with redirect_stdout(sys.stderr):
            data = make(place)
        happened = {**labels, **try_notebook(data, place / "work", threads, epochs)}
        if head is None:
            head = list(happened)
            print_line(head)
            print_line(["---"] * len(head))
        print_line(happened.values())
        shutil.rmtree(place)


# ---- Seeds, threads, epochs ----------------------------------------------------------------------
def demo_data(place, seed=0, n_train=240, n_test=80):
    """Demo data of this seed; the path of their codesubset/."""
    return ecg.make_demo_codesubset(place, n_train=n_train, n_test=n_test, seed=seed)


def grid(options):
    """The runs of the first table."""
    n_train, n_test = options.exams
    for seed, threads, epochs in product(options.seeds, options.threads, options.epochs):
        labels = {"seed": seed, "threads": threads, "epochs": epochs}
        yield labels, lambda place, seed=seed: demo_data(place, seed, n_train, n_test), threads, epochs


# ---- Small or odd data ---------------------------------------------------------------------------
def edit_labels(data, change):
    """Replace train.csv by what `change` makes of its table."""
    file = data / "train.csv"
    change(pd.read_csv(file)).to_csv(file, index=False)


def choose_records(data, part, keep):
    """Leave only these records in RECORDS.txt; files and labels of the others go, too."""
    folder = data / part
    names = [
        name for name in ecg.read_records(folder / "RECORDS.txt") if keep(int(name.removeprefix("TNMG")))
    ]
    for file in folder.glob("TNMG*"):
        if file.stem not in names:
            file.unlink()
    (folder / "RECORDS.txt").write_text("".join(f"{name}\n" for name in names))
    if part == "train":
        numbers = {int(name.removeprefix("TNMG")) for name in names}
        edit_labels(data, lambda table: table[table["id_exam"].isin(numbers)])


def with_af(n_af, n_other):
    """Demo data with so many exams of each class, each of its own patient."""

    def make(place):
        data = demo_data(place)
        table = pd.read_csv(data / "train.csv")
        wanted = {*table["id_exam"][table["AF"] == 1][:n_af], *table["id_exam"][table["AF"] == 0][:n_other]}
        choose_records(data, "train", lambda number: number in wanted)
        edit_labels(data, lambda table: table.assign(id_patient=np.arange(len(table))))
        return data

    return make


def with_labels(change):
    """Demo data whose table of labels is changed."""

    def make(place):
        data = demo_data(place)
        edit_labels(data, change)
        return data

    return make


def four_patients(table):
    """All exams belong to four patients, each with AF exams and others."""
    return table.assign(id_patient=np.arange(len(table)) % 4)


def blank_age(table):
    """One exam has no age."""
    ages = table["age"].astype(float)
    ages.iloc[0] = np.nan
    return table.assign(age=ages)


def spelled_sex(table):
    """Sex as whole words."""
    return table.assign(sex=table["sex"].map({"F": "female", "M": "male"}))


def slow_first_record(place):
    """The first record, which the notebook draws, is sampled at 100 Hz."""
    data = demo_data(place)
    folder = data / "train"
    name = ecg.read_records(folder / "RECORDS.txt")[0]
    record = wfdb.rdrecord(str(folder / name))
    every = max(1, round(record.fs / 100))
    wfdb.wrsamp(
        name,
        fs=100,
        units=["mV"] * 8,
        sig_name=record.sig_name,
        p_signal=record.p_signal[::every],
        fmt=["16"] * 8,
        adc_gain=[1000.0] * 8,
        baseline=[0] * 8,
        write_dir=str(folder),
    )
    return data


def one_test_exam(place):
    """A test set of one exam."""
    data = demo_data(place)
    first = int(ecg.read_records(data / "test" / "RECORDS.txt")[0].removeprefix("TNMG"))
    choose_records(data, "test", lambda number: number == first)
    return data


SMALL = {
    "50 exams, 8 AF": with_af(8, 42),
    "4 AF exams": with_af(4, 100),
    "4 patients": with_labels(four_patients),
    "a blank age": with_labels(blank_age),
    "sex written female/male": with_labels(spelled_sex),
    "first record at 100 Hz": slow_first_record,
    "a test set of one exam": one_test_exam,
}


def small_runs(options):
    """The runs of the second table."""
    for name in options.small or SMALL:
        for threads, epochs in product(options.threads, options.epochs):
            yield {"data": name, "threads": threads, "epochs": epochs}, SMALL[name], threads, epochs


# ---- The command ---------------------------------------------------------------------------------
def parse():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the generated data")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; with --small: 1")
    parser.add_argument("--epochs", nargs="+", help="default: 1 3 default; with --small: 1")
    parser.add_argument("--exams", type=int, nargs=2, default=(240, 80), metavar=("TRAIN", "TEST"))
    parser.add_argument(
        "--small", nargs="*", choices=list(SMALL), metavar="NAME", help=f"of: {'; '.join(SMALL)}"
    )
    parser.add_argument("--work", type=Path, help="folder for the temporary files")
    options = parser.parse_args()
    small = options.small is not None
    options.threads = options.threads or ([1] if small else [1, 2])
    options.epochs = options.epochs or (["1"] if small else ["1", "3", "default"])
    return options


def main():
    """Print the table."""
    options = parse()
    runs = grid(options) if options.small is None else small_runs(options)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        print_table(runs, Path(folder))


if __name__ == "__main__":
    main()
