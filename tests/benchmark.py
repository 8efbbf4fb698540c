"""The three waits of a student (preprocessing, training, predicting), each against the original way, as one table.

    python tests/benchmark.py [--real PATH [--pass-mark [--seeds 42 43 44]]] [--parts preprocessing training ...]

Without --real the ECGs are generated here. PATH: a codesubset/ folder or an archive of one, of which the first --exams
training exams are used. The original ways are written again below: wfdb and filter design for each record, one after
the other, into float64 HDF5; float64 loaded, then converted; a DataLoader that collates exam by exam; a loop that waits
for the device each batch. Ours and the original take turns in each repetition, so that a drifting machine hits both;
figures are medians over the repetitions, the ratio (ours / original) is the median of the pairs' ratios.

--pass-mark (minutes to hours): seconds of training until the validation AUROC is 0.97, for the final network, the
four-convolution network and the quarter-width network of Ribeiro et al.; one training a seed, no repetitions.

The table goes to stdout, what the helpers say meanwhile to stderr. Run it on an idle machine.
"""
import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import torch
import wfdb
from ablation import ecg, notebook_definitions, train_fold, variants
from scipy import signal as dsp
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

CPU = torch.device("cpu")
LINUX = Path("/proc/self/smaps_rollup").exists()  # memory is read there
MIB_PER_EXAM = ecg.N_SAMPLES * len(ecg.LEADS) * 4 / 2**20  # as float32: 0.125
PASS_MARK = 0.97  # validation AUROC


# ---- The original ways ---------------------------------------------------------------------------
def original_exam(path):
    """Read and preprocess one record as the public scripts do, (8, 4096) float64: filters designed for each record."""
    record = wfdb.rdrecord(str(path))
    rate, nyquist = record.fs, record.fs / 2
    order, _ = dsp.ellipord(0.8 / nyquist, 0.2 / nyquist, 0.5, 40)
    sos = dsp.iirfilter(order, 0.8 / nyquist, 0.5, 40, btype="high", ftype="ellip", output="sos")
    x = dsp.sosfiltfilt(sos, record.p_signal.T, padtype="constant")
    x = dsp.filtfilt(*dsp.iirnotch(60, 30, rate), x)
    x = dsp.resample_poly(x, ecg.SAMPLE_RATE, rate, axis=-1)
    x = x[[record.sig_name.index(lead) for lead in ecg.LEADS]]
    surplus = max(0, x.shape[1] - ecg.N_SAMPLES) // 2
    x = x[:, surplus:surplus + ecg.N_SAMPLES]
    front = (ecg.N_SAMPLES - x.shape[1]) // 2
    return np.pad(x, ((0, 0), (front, ecg.N_SAMPLES - x.shape[1] - front)))


def original_h5(records, h5_file):
    """One exam after the other into a float64 HDF5 file."""
    names = records.read_text().split()
    with h5py.File(h5_file, "w") as file:
        tracings = file.create_dataset("tracings", (len(names), ecg.N_SAMPLES, len(ecg.LEADS)), "f8")
        for i, name in enumerate(names):
            tracings[i] = original_exam(records.parent / name).T


def original_load(h5_file):
    """All exams as float64, then converted."""
    with h5py.File(h5_file, "r") as file:
        return torch.tensor(np.array(file["tracings"]), dtype=torch.float32)


def original_loader(traces, y, order):
    """Exam by exam, stacked to batches of 16. Its own generator leaves torch's random state, so losses can be compared."""
    exams = TensorDataset(traces, torch.tensor(y, dtype=torch.float32)[:, None])
    return DataLoader(exams, 16, sampler=[int(i) for i in order], generator=torch.Generator())


def original_train_loop(epoch, dataloader, model, optimizer, loss_function, device):
    """One epoch; reading the loss waits for the device each batch."""
    model.train()
    loss_sum, n_exams = 0.0, 0
    for traces, targets in dataloader:
        traces, targets = traces.to(device), targets.to(device)
        optimizer.zero_grad()
        loss = loss_function(model(traces), targets)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(targets)
        n_exams += len(targets)
    return loss_sum / n_exams


@torch.no_grad()
def original_predict(model, h5_file, device):
    """Logits of a float64 file: everything is loaded first, each batch is waited for."""
    traces = original_load(h5_file)
    model.eval()
    batches = original_loader(traces, [0] * len(traces), range(len(traces)))
    return np.concatenate([model(batch.to(device)).cpu().numpy() for batch, _ in batches])


# ---- Measuring -----------------------------------------------------------------------------------
@contextmanager
def stopwatch(times, device=CPU):
    """Append the seconds of the block (or, as a decorator, of each call) to `times`; waits for a GPU."""
    wait = torch.cuda.synchronize if device.type == "cuda" else int  # int(): nothing to wait for
    wait()
    start = time.perf_counter()
    yield
    wait()
    times.append(time.perf_counter() - start)


def paired(ours, original):
    """Medians of two arrays of measurements and the median of their pairs' ratios."""
    return np.median(ours), np.median(original), np.median(ours / original)


def row(quantity, ours, original="", ratio="", bar="", met=None):
    """Cells of one line of the table; whether the bar is met is computed by the caller."""
    ratio = ratio if isinstance(ratio, str) else f"{ratio:.2f}"
    return [quantity, ours, original, ratio, f"{bar}: {'met' if met else '**missed**'}" if bar else ""]


def session_memory(session):
    """Proportional set size (MiB) of all processes of a session: memory that they share counts once."""
    total = 0.0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[3]) == session:
                total += int(re.search(r"\nPss:\s+(\d+)", (stat.parent / "smaps_rollup").read_text())[1]) / 1024
        except (OSError, TypeError):  # it ended meanwhile
            continue
    return total


def run_child(name, *paths):
    """Run one of CHILDREN in a fresh process: its own peak memory and that of all its processes together, MiB."""
    command, together = [sys.executable, __file__, "--child", name, *map(str, paths)], 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        while process.poll() is None:
            together = max(together, session_memory(process.pid))
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
        return float(process.stdout.read()), together


def child(name, *paths):
    """What `run_child` starts: do it, print the largest resident size in MiB."""
    with redirect_stdout(sys.stderr):
        CHILDREN[name](*paths)
    # not getrusage: its ru_maxrss starts with the size that the parent had when it started the child
    print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)


# ---- Preprocessing -------------------------------------------------------------------------------
def preprocessing(records, folder, options, device):
    """Exams/s, agreement and memory of `build_h5` against the original."""
    names, cores = ecg.read_records(records), os.cpu_count() or 1
    numbers = sorted({1, min(2, cores), cores})
    times = {way: [] for way in ("original", *numbers)}
    for _ in range(options.repetitions):
        with stopwatch(times["original"]):
            original_h5(records, folder / "original.h5")
        for workers in numbers:
            (folder / "train.h5").unlink(missing_ok=True)
            with stopwatch(times[workers]):
                ecg.build_h5(records, folder / "train.h5", workers=workers)
    rates, rows = {way: len(names) / np.array(seconds) for way, seconds in times.items()}, []
    for workers in numbers:
        ours, original, ratio = paired(rates[workers], rates["original"])
        gain = f" ({np.median(rates[workers] / rates[1]):.2f} times 1 worker)" if workers > 1 else ""
        rows.append(row(f"preprocessing, {workers} worker(s), exams/s", f"{ours:.0f}{gain}", f"{original:.0f}", ratio,
                        "at least 4.5 times" if workers == 2 else "", ratio >= 4.5))
    exact, stored = difference(records, names, folder)
    rows.append(row("preprocessing, largest difference, mV", f"{exact:.1e} ({stored:.1e} in the float32 file)",
                    bar="at most 1e-6 before rounding", met=exact <= 1e-6))
    quarter = records.with_name("QUARTER.txt")
    quarter.write_text("\n".join(names[:len(names) // 4 + 1]))
    peaks = [run_child("build", file, folder / "child.h5")[1] for file in (quarter, records)] if LINUX else []
    shown = f"{peaks[0]:.0f} for {len(names) // 4 + 1} exams, {peaks[1]:.0f} for {len(names)}" if peaks else "not measured"
    return [*rows, row(f"preprocessing, {cores} worker(s), peak memory of all processes, MiB", shown,
                       bar="below 600" if peaks else "", met=max(peaks, default=0) < 600)]


def difference(records, names, folder):
    """Largest difference from the original in mV: of `preprocess_ecg`, and of what `build_h5` stored."""
    with h5py.File(folder / "original.h5", "r") as original, h5py.File(folder / "train.h5", "r") as ours:
        pairs = [(np.abs(ecg.preprocess_ecg(*ecg.read_ecg(records.parent / name)).T - expected).max(),
                  np.abs(tracing - expected).max())
                 for name, tracing, expected in zip(names, ours["tracings"], original["tracings"])]
    return np.max(pairs, axis=0)


# ---- Training ------------------------------------------------------------------------------------
def setup(network, device, steps=0, fused=False):
    """Model, optimizer, loss and the other arguments of `train_loop`, as the notebook trains "Model" or "AFNet"."""
    space = notebook_definitions()
    ecg.seed_everything(42)
    model = space[network]().to(device)
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor(7 / 3, device=device))
    if network == "Model":
        return model, torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4, fused=fused), loss, {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2, fused=fused)
    return model, optimizer, loss, {
        "augment": space["augment_exams"], "max_norm": 1.0,
        "averaged": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True),
        "scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 5), pct_start=0.25)}


def timed_epoch(loop, batches, device, model, optimizer, loss, more):
    """Exams/s of one epoch, the share of its time outside the computation, and the mean loss.

    The share is measured inside one and the same epoch: stopwatches around augmentation, forward, loss, backward, clip,
    step, averaging and scheduler; the rest is the loop's own (fetching batches, zero_grad, bookkeeping). The difference
    of two epochs, one with and one without a loader, would be a few percent of noise on an effect of about one. It
    means something on the CPU only, where calls return when they are done.
    """
    inside, total, more = [], [], dict(more)
    watch = stopwatch(inside)
    places = [(model, "forward"), (loss, "forward"), (torch.Tensor, "backward"), (torch.nn.utils, "clip_grad_norm_"),
              (optimizer, "step"), *((more[key], name) for key, name in (("scheduler", "step"), ("averaged", "update_parameters"))
                                     if key in more)]
    if "augment" in more:
        more["augment"] = watch(more["augment"])
    with ExitStack() as stack:
        for owner, name in places:
            stack.enter_context(mock.patch.object(owner, name, watch(getattr(owner, name))))
        torch.manual_seed(1)  # dropout and augmentation
        with stopwatch(total, device):
            mean = loop(1, batches, model, optimizer, loss, device, **more)
    return len(batches) * batches.batch_size / total[0], 1 - sum(inside) / total[0], mean


def training(records, folder, options, device):
    """Exams/s, share outside the computation and losses of `train_loop` against the original loop."""
    cuda, amp = device.type == "cuda", ecg.mixed_precision(device)
    with h5py.File(ecg.build_h5(records, folder / "train.h5"), "r") as file:
        traces = torch.from_numpy(file["tracings"][:])
    y = ecg.load_labels(records.parents[1] / "train.csv", records)["AF"].to_numpy()
    size = (options.train_exams or (8192 if cuda else 256)) // 32 * 32  # whole batches only, so both loops see the same
    order = torch.randint(len(y), (size,), generator=torch.Generator().manual_seed(0))
    original, here = original_loader(traces, y, order), traces.to(device)  # as in the notebook: once, where there is a GPU
    by_16, by_32 = (ecg.BatchLoader(here, y, order, n) for n in (16, 32))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10) if amp == torch.float16 else None

    def notebook_epoch():  # on CUDA the four convolutions as the notebook trains them, else the final network
        *parts, more = setup("Model" if cuda else "AFNet", device, len(by_32), fused=cuda)
        return timed_epoch(ecg.train_loop, by_32, device, *parts, {**more, "amp_dtype": amp, "scaler": scaler})

    ways = {"original": lambda: timed_epoch(original_train_loop, original, device, *setup("Model", device)),
            "ours": lambda: timed_epoch(ecg.train_loop, by_16, device, *setup("Model", device)), "notebook": notebook_epoch}
    runs = [{way: run() for way, run in ways.items()} for _ in range(options.repetitions + 1)][1:]  # the first warms up
    return training_rows({way: np.array([run[way] for run in runs]).T for way in ways}, cuda)


def training_rows(runs, cuda):
    """Lines of the table from way -> (exams/s, share outside, loss), each an array over repetitions."""
    ours, original, ratio = paired(runs["ours"][0], runs["original"][0])
    rows = [row("training, four convolutions, batch 16, exams/s", f"{ours:.0f}", f"{original:.0f}", ratio,
                "at least 2 times" if cuda else "", ratio >= 2)]
    if cuda:
        ours, original, ratio = paired(runs["notebook"][0], runs["original"][0])
        rows.append(row("training, four convolutions, exams/s: mixed precision, batch 32 against float32, batch 16",
                        f"{ours:.0f}", f"{original:.0f}", ratio, "at least 8 times", ratio >= 8))
    else:
        ours, original, ratio = paired(runs["ours"][1], runs["original"][1])
        final, what = np.median(runs["notebook"][1]), "time outside the computation"
        rows += [row(f"training, four convolutions, batch 16, {what}", f"{ours:.2%}", f"{original:.2%}", ratio, "below 3 %",
                     ours < 0.03),
                 row(f"training, final network, batch 32, {what}", f"{final:.2%}", bar="below 3 %", met=final < 0.03)]
    ours, original = runs["ours"][2], runs["original"][2]
    gap, limit = np.abs(ours / original - 1).max(), 1e-3 if cuda else 1e-5  # a GPU's sums differ from run to run
    return [*rows, row(f"training, four convolutions, mean loss of the epoch (largest relative difference {gap:.0e})",
                       f"{ours[0]:.6f}", f"{original[0]:.6f}", bar=f"equal to {limit:.0e}", met=gap <= limit)]


# ---- Predicting ----------------------------------------------------------------------------------
def predicting(records, folder, options, device):
    """Exams/s from file to logits with the four-convolution network."""
    ecg.build_h5(records, folder / "train.h5")
    if not (folder / "original.h5").exists():
        original_h5(records, folder / "original.h5")
    model, times = setup("Model", device)[0], {"ours": [], "original": []}
    with h5py.File(folder / "train.h5", "r") as file:
        for _ in range(options.repetitions + 1):
            with stopwatch(times["ours"], device):
                ours = ecg.predict(model, file["tracings"], device)
            with stopwatch(times["original"], device):
                original = original_predict(model, folder / "original.h5", device)
    rates = {way: len(ours) / np.array(seconds[1:]) for way, seconds in times.items()}  # the first warms up
    gap, (fast, slow, ratio) = np.abs(ours - original[:, 0]).max(), paired(rates["ours"], rates["original"])
    return [row(f"predicting, four convolutions, file to logits, exams/s (logits differ by {gap:.0e} at most)",
                f"{fast:.0f}", f"{slow:.0f}", ratio)]


# ---- Memory of training and predicting -----------------------------------------------------------
def random_h5(path, n, dtype):
    """Random tracings, written in blocks."""
    block = np.random.default_rng(0).normal(size=(100, ecg.N_SAMPLES, len(ecg.LEADS))).astype(dtype)
    with h5py.File(path, "w") as file:
        tracings = file.create_dataset("tracings", (n, *block.shape[1:]), dtype)
        for start in range(0, n, len(block)):
            tracings[start:start + len(block)] = block[:n - start]
    return path


def train_ours(h5_file):
    """As the notebook: float32 tracings once in memory; few batches, then validation and prediction of a fifth."""
    with h5py.File(h5_file, "r") as file:
        tracings = torch.from_numpy(file["tracings"][:])
    space, n = notebook_definitions(), len(tracings)
    order = np.random.default_rng(0).permutation(n)
    with tempfile.TemporaryDirectory() as run_dir:
        train_fold(space["AFNet"], {"tracings": tracings, "y": np.arange(n) % 2}, order[:160], order[-n // 5:], Path(run_dir),
                   CPU, augment=space["augment_exams"], epochs=1)


def train_original(h5_file):
    """Float64, converted, then few batches of the original loop."""
    traces = original_load(h5_file)
    original_train_loop(1, original_loader(traces, [0, 1] * (len(traces) // 2), range(80)), *setup("Model", CPU)[:3], CPU)


def predict_stream(h5_file):
    """Predict from the file, with the smallest network: its activations do not depend on the number of exams."""
    with h5py.File(h5_file, "r") as file:
        ecg.predict(notebook_definitions()["ModelBaseline"](), file["tracings"], CPU)


CHILDREN = {"build": ecg.build_h5, "train_ours": train_ours, "train_original": train_original, "predict": predict_stream}


def memory(records, folder, options, device):
    """Peak memory as constant + slope x exams, from two sizes, on the CPU."""
    if not LINUX:
        return [row("training and predicting, peak memory", "not measured")]
    small, large = sizes = sorted(options.memory_exams)
    files = {(dtype, n): random_h5(folder / f"{dtype}_{n}.h5", n, dtype) for n in sizes for dtype in ("f4", "f8")}
    inputs = {"train_original": "f8", "train_ours": "f4", "predict": "f4"}
    runs = [[[run_child(way, files[dtype, n])[0] for n in sizes] for way, dtype in inputs.items()]
            for _ in range(options.repetitions)]
    peaks = np.array(runs).T  # sizes, ways, repetitions
    slopes = (peaks[1] - peaks[0]) / (large - small) / MIB_PER_EXAM
    constants = peaks[0] - slopes * small * MIB_PER_EXAM
    unit, stream = f"times the tracings' float32 size ({small} to {large} exams)", np.median(slopes[2])
    ours, original, ratio = paired(slopes[1], slopes[0])
    fixed, fixed_original, fixed_ratio = paired(constants[1], constants[0])
    return [row(f"training, peak memory, {unit}", f"{ours:.2f}", f"{original:.2f}", ratio, "at most 1.4", ours <= 1.4),
            row("training, peak memory, constant part, MiB", f"{fixed:.0f}", f"{fixed_original:.0f}", fixed_ratio,
                "below 1229 (1.2 GiB)", fixed < 1.2 * 1024),
            row(f"predicting, peak memory, {unit}", f"{stream:.2f}", bar="at most 0.05", met=stream <= 0.05)]


# ---- Time to the pass mark -----------------------------------------------------------------------
def pass_mark(source, folder, options, device):
    """Train the three networks for the same time; when does each reach the pass mark?"""
    records, choices = source / "train" / "RECORDS.txt", variants(notebook_definitions())
    with h5py.File(ecg.build_h5(records, folder / "all.h5"), "r") as file:
        tracings = torch.from_numpy(file["tracings"][:]).to(device)
    labels = ecg.load_labels(source / "train.csv", records)
    parts, data = ecg.split_by_patient(labels), {"tracings": tracings, "y": labels["AF"].to_numpy()}
    results = {"final": [], "four_conv_same_time": [], "ribeiro_same_time": []}
    for seed in options.seeds:
        for name, result in results.items():
            (build, settings), run_dir = choices[name], folder / f"{name}_{seed}"
            budget = {"epochs": options.epochs} if name == "final" else {"seconds": results["final"][-1][3]}
            train_fold(build, data, *parts, run_dir, device, seed=seed, **settings, **budget)
            result.append(time_to_mark(json.loads((run_dir / "history.json").read_text())))
    what = f"seconds to validation AUROC {PASS_MARK} ({len(parts[0])} training exams, {len(options.seeds)} seed(s))"
    ours, *originals = (np.array(result).T for result in results.values())
    return [row(f"{what}, final network against {name}", mark_cell(*ours), mark_cell(*original), mark_ratio(ours, original))
            for name, original in zip(("four convolutions", "Ribeiro, quarter width"), originals)]


def time_to_mark(history):
    """Seconds until the pass mark (inf: never), the best AUROC, seconds until that, seconds of the whole training."""
    auroc, seconds = np.array(history["auroc"], dtype=float), np.cumsum(history["seconds"], dtype=float)
    return seconds[auroc >= PASS_MARK].min(initial=np.inf), np.nanmax(auroc), seconds[np.nanargmax(auroc)], seconds[-1]


def mark_cell(mark, best, when, whole):
    """Median (range) over seeds; what was reached instead where a seed never got there."""
    def spread(values, form):
        middle, low, high = (format(v, form).replace("inf", "never") for v in (np.median(values), values.min(), values.max()))
        return middle if low == high else f"{middle} ({low} to {high})"

    missed = f"; best AUROC {spread(best, '.3f')} at {spread(when, '.0f')}" if np.isinf(mark).any() else ""
    return f"{spread(mark, '.0f')} of {spread(whole, '.0f')}{missed}"


def mark_ratio(ours, original):
    """Median over seeds of our time to the mark / theirs; where they never reach it, below ours / their whole time."""
    ratio = np.median(ours[0] / np.minimum(original[0], original[3]))
    return f"{'below ' if np.isinf(original[0]).any() else ''}{ratio:.2f}" if np.isfinite(ratio) else ""


# ---- The run -------------------------------------------------------------------------------------
PARTS = {part.__name__: part for part in (preprocessing, training, predicting, memory)}


def first_exams(source, folder, n):
    """A codesubset/ with copies of the first `n` training exams; the path of its RECORDS.txt."""
    target, names = folder / "subset" / "train", ecg.read_records(source / "train" / "RECORDS.txt")[:n]
    target.mkdir(parents=True)
    for file in [f"{name}{suffix}" for name in names for suffix in (".hea", ".dat")]:
        shutil.copy(source / "train" / file, target)
    shutil.copy(source / "train.csv", target.parent)
    (target / "RECORDS.txt").write_text("\n".join(names))
    return target / "RECORDS.txt"


def parse():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", help="a codesubset/ folder or an archive of one")
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--exams", type=int, default=1000, help="exams to preprocess and predict")
    parser.add_argument("--train-exams", type=int, help="exams of a training epoch (256; on CUDA 8192), a multiple of 32")
    parser.add_argument("--memory-exams", type=int, nargs=2, default=(2000, 4000), help="fewer: the activations hide the data")
    parser.add_argument("--pass-mark", action="store_true", help="needs --real: on generated ECGs every network passes")
    parser.add_argument("--epochs", type=int, default=30, help="of the final network on the way to the pass mark")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--work", type=Path, help="folder for the temporary files (3 GB)")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pass_mark and not options.real:
        parser.error("--pass-mark needs --real")
    return options


def main():
    """Print the table, part by part."""
    options, device = parse(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.child:
        return child(*options.child)
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    print(f"Device {device}{gpu}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads, Python "
          f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, {platform.system()}; "
          f"{'real' if options.real else 'generated'} ECGs, {options.repetitions} repetitions.\n\n"
          "| quantity | ours | original way | ratio | bar |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        with redirect_stdout(sys.stderr):
            source = ecg.fetch_codesubset(options.real, folder) if options.real else \
                ecg.make_demo_codesubset(folder, n_train=options.exams, n_test=8)
            records = first_exams(source, Path(folder), options.exams)
        for part in [*(PARTS[name] for name in options.parts), *([pass_mark] if options.pass_mark else [])]:
            with redirect_stdout(sys.stderr):
                rows = part(source if part is pass_mark else records, Path(folder), options, device)
            print("\n".join(f"| {' | '.join(cells)} |" for cells in rows), flush=True)


if __name__ == "__main__":
    main()
