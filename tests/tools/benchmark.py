"""What a student waits for: preprocessing, training, the course's whole size.

    python tests/tools/benchmark.py preprocessing [--data PATH] [--exams 1000] [--repetitions 5]
    python tests/tools/benchmark.py step [--repetitions 5]
    python tests/tools/benchmark.py pass-mark --data PATH [--seeds 42 43 44] [--epochs N]
    python tests/tools/benchmark.py course-size [--course-exams 10000 6000]

PATH: a codesubset/ folder or an archive of one; without it the ECGs are generated here.

preprocessing: build_h5 with one and two workers against the public scripts' way (reference_preprocessing.py: wfdb and
    filter design for each record, one after the other, into float64 HDF5). Both take turns in each repetition, so that
    a drifting machine hits both; medians, and the median of the pairs' ratios.
step: forward and backward pass of the notebook's networks, and the augmentation, milliseconds per exam.
pass-mark (minutes): seconds of training until the validation AUROC is 0.97, the final network with its recipe against
    the four-convolution network with the original one; one run per seed. On generated ECGs every network passes.
course-size (Linux, minutes): the whole notebook on so many generated exams, one epoch each, one thread: time, memory.

Tables go to stdout, what the helpers say meanwhile to stderr. Run it on an idle machine.
"""
import argparse
import inspect
import os
import platform
import re
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
import wfdb
from reference_preprocessing import reference
from run_on_real import ROOT, execute, load, network_namespace

sys.path.insert(0, str(ROOT))
import ecg_helpers as ecg  # noqa: E402

PASS_MARK = 0.97  # validation AUROC
NETWORKS = ("ModelBaseline", "LinearModel", "Model", "PlainCNN", "AFNet")
ORIGINAL = {"epochs": 25, "lr": 1e-3, "batch_size": 16, "optimizer": partial(torch.optim.Adam, weight_decay=1e-4)}


def table(header, rows):
    """Print a Markdown table."""
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def notebook_names():
    """What the notebook's cells of the network define."""
    with redirect_stdout(sys.stderr):
        return network_namespace()


def seconds_of(function, *arguments, **keywords):
    """Seconds of one call; what it prints goes to stderr."""
    start = time.perf_counter()
    with redirect_stdout(sys.stderr):
        function(*arguments, **keywords)
    return time.perf_counter() - start


# ---- Preprocessing ----
def reference_h5(records, names, h5_file):
    """The public scripts' way: one exam after the other into a float64 HDF5 file."""
    with h5py.File(h5_file, "w") as file:
        tracings = file.create_dataset("tracings", (len(names), ecg.N_SAMPLES, len(ecg.LEADS)), "f8")
        for i, name in enumerate(names):
            record = wfdb.rdrecord(str(records.parent / name))
            tracings[i] = reference(record.p_signal, record.fs, record.sig_name)


def rebuild(records, h5_file, workers):
    """`build_h5` from the beginning: it keeps a finished file."""
    h5_file.unlink(missing_ok=True)
    ecg.build_h5(records, h5_file, workers=workers)


def first_records(source, folder, n):
    """A RECORDS.txt in `folder` of the first `n` training exams, with copies of their files, and their names."""
    train, target = source / "train", folder / "subset"
    target.mkdir()
    names = ecg.read_records(train / "RECORDS.txt")[:n]
    for name in names:
        for end in (".hea", ".dat"):
            shutil.copy(train / f"{name}{end}", target)
    (target / "RECORDS.txt").write_text("\n".join(names), encoding="utf-8")
    return target / "RECORDS.txt", names


def largest_difference(records, names, folder):
    """Largest difference from the reference in mV: of `preprocess_ecg`, and of what `build_h5` stored."""
    exact = stored = 0.0
    with h5py.File(folder / "reference.h5", "r") as theirs, h5py.File(folder / "ours.h5", "r") as ours:
        for name, tracing, expected in zip(names, ours["tracings"], theirs["tracings"]):
            again = ecg.preprocess_ecg(*ecg.read_ecg(records.parent / name)).T
            exact = max(exact, np.abs(again - expected).max())
            stored = max(stored, np.abs(tracing - expected).max())
    return exact, stored


def preprocessing(given, source, folder):
    """Exams/s of `build_h5` against the reference, and agreement."""
    records, names = first_records(source, folder, given.exams)
    seconds = []
    for _ in range(given.repetitions):
        seconds.append([seconds_of(reference_h5, records, names, folder / "reference.h5"),
                        seconds_of(rebuild, records, folder / "ours.h5", 1),
                        seconds_of(rebuild, records, folder / "ours.h5", 2)])
    theirs, *ours = len(names) / np.array(seconds).T
    rows = []
    for workers, rates in enumerate(ours, 1):
        rows.append([f"build_h5, {workers} worker(s)", f"{np.median(rates):.0f}", f"{np.median(theirs):.0f}",
                     f"{np.median(rates / theirs):.2f}"])
    table(["preprocessing", "exams/s", "reference, exams/s", "ratio"], rows)
    exact, stored = largest_difference(records, names, folder)
    print(f"\n{len(names)} exams; largest difference {exact:.1e} mV, {stored:.1e} mV in the float32 file.")


# ---- Training step ----
def step_seconds(model, traces, targets):
    """Seconds of one forward and backward pass."""
    loss_function = torch.nn.BCEWithLogitsLoss()

    def step():
        model.zero_grad()
        loss_function(model(traces), targets).backward()
        if traces.device.type == "cuda":
            torch.cuda.synchronize()

    return seconds_of(step)


def training_step(given, source, folder):
    """Milliseconds per exam of the notebook's networks."""
    space, device, batch = notebook_names(), ecg.pick_device(), 32
    ecg.seed_everything(0)
    traces = torch.randn(batch, ecg.N_SAMPLES, len(ecg.LEADS), device=device)
    targets = torch.randint(2, (batch, 1), device=device).float()
    rows = []
    for name in NETWORKS:
        model = space[name]().to(device).train()
        times = [step_seconds(model, traces, targets) for _ in range(given.repetitions + 1)][1:]  # the first warms up
        weights = sum(parameter.numel() for parameter in model.parameters())
        rows.append([name, f"{weights:,}", f"{1000 * np.median(times) / batch:.2f}"])
    times = [seconds_of(space["augment_exams"], traces) for _ in range(given.repetitions + 1)][1:]
    rows.append(["augmentation", "", f"{1000 * np.median(times) / batch:.2f}"])
    table([f"batch of {batch} exams on {device}", "weights", "ms per exam"], rows)


# ---- Time to the pass mark ----
def train(name, settings, data, run_dir, seed):
    """Seconds until the pass mark (inf: never), best validation AUROC, seconds of the whole run."""
    space, traces, truth, (train_exams, valid_exams) = data
    accepted = inspect.signature(ecg.fit).parameters
    if settings.get("averaging"):
        settings = {**settings, "ema_decay": 0.99}  # of about the last 100 steps, as in the notebook
    settings = {key: value for key, value in settings.items() if key in accepted}  # averaging is the notebook's, not fit's
    ecg.seed_everything(seed)
    with redirect_stdout(sys.stderr):
        history = ecg.fit(space[name](), traces, truth, train_exams, valid_exams, device=ecg.pick_device(),
                          run_dir=run_dir, seed=seed, **settings)
    auroc, seconds = np.array(history["auroc"]), np.cumsum(history["seconds"])
    return seconds[auroc >= PASS_MARK].min(initial=np.inf), auroc.max(), seconds[-1]


def pass_mark(given, source, folder):
    """When do the final and the four-convolution network reach the pass mark?"""
    records = source / "train" / "RECORDS.txt"
    labels = ecg.load_labels(source / "train.csv", records)
    with redirect_stdout(sys.stderr):
        traces = ecg.load_tracings(ecg.build_h5(records, folder / "train.h5"), ecg.pick_device())
    space = notebook_names()
    data = space, traces, labels["AF"].to_numpy(), ecg.split_by_patient(labels)
    rows = []
    for name, settings in (("AFNet", space["RECIPE"]), ("Model", ORIGINAL)):
        if given.epochs:
            settings = {**settings, "epochs": given.epochs}
        for seed in given.seeds:
            mark, best, whole = train(name, settings, data, folder / f"{name}_{seed}", seed)
            reached = f"{mark:.0f}" if np.isfinite(mark) else "never"
            rows.append([name, str(seed), reached, f"{best:.3f}", str(settings["epochs"]), f"{whole:.0f}"])
    table(["network", "seed", f"s to AUROC {PASS_MARK}", "best AUROC", "epochs", "s in all"], rows)


# ---- The course's size ----
def descendants(process):
    """Numbers of all processes that `process` started, directly or not."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found = {process}
    while new := {child for child, parent in parents.items() if parent in found} - found:
        found |= new
    return found - {process}


def memory_of(processes):
    """GiB of these processes; what they share counts once."""
    total = 0.0
    for process in processes:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(re.search(r"\nPss:\s+(\d+)", text)[1]) / 2**20
        except (OSError, TypeError):  # it ended meanwhile
            continue
    return total


@contextmanager
def peak_memory(pause=0.5):
    """Yield a list whose largest value is the memory, in GiB, of all that this process started meanwhile."""
    sampled, done = [0.0], threading.Event()

    def sample():
        while not done.wait(pause):
            sampled.append(memory_of(descendants(os.getpid())))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield sampled
    finally:
        done.set()
        sampler.join()


def course_size(given, source, folder):
    """Seconds and peak memory of a headless run, one epoch each, with one thread."""
    n_train, n_test = given.course_exams
    data, work = ecg.make_demo_codesubset(folder / "course", n_train=n_train, n_test=n_test), folder / "run"
    work.mkdir()
    with peak_memory() as sampled:
        _, error, seconds = execute(load(), work, 1, ECG_DATA=data, ECG_WORK=".", ECG_EPOCHS=1)
    ended = f"no: {getattr(error, 'ename', 'the kernel died')}" if error else "yes"
    row = [f"{n_train:,} + {n_test:,}", f"{seconds:.0f}", f"{max(sampled):.2f}", ended]
    table(["generated exams, one epoch each, one thread", "s", "peak memory, GiB", "ran to the end"], [row])


# ---- The command ----
PARTS = {"preprocessing": preprocessing, "step": training_step, "pass-mark": pass_mark, "course-size": course_size}


def main(arguments=None):
    """Print the tables of the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--data", metavar="PATH", help="a codesubset/ folder or an archive of one")
    parser.add_argument("--exams", type=int, default=1000, help="exams to preprocess")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--epochs", type=int, help="on the way to the pass mark; default: the recipe's own")
    parser.add_argument("--course-exams", type=int, nargs=2, default=(10_000, 6_000), metavar=("TRAIN", "TEST"))
    given = parser.parse_args(arguments)
    if "pass-mark" in given.parts and not given.data:
        parser.error("pass-mark needs --data: on generated ECGs every network passes")
    print(f"{ecg.pick_device()}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads, Python "
          f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.system()}; "
          f"{'the ECGs of --data' if given.data else 'generated ECGs'}.", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder, source = Path(folder), None
        if {"preprocessing", "pass-mark"} & set(given.parts):
            with redirect_stdout(sys.stderr):
                source = (ecg.fetch_codesubset(given.data, folder) if given.data
                          else ecg.make_demo_codesubset(folder, n_train=given.exams, n_test=8))
        for part in given.parts:
            PARTS[part](given, source, folder)


if __name__ == "__main__":
    main()
