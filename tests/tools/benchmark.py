"""What a student waits for (preprocessing, training, predicting), each against the course's original solution.

    python tests/tools/benchmark.py [--parts preprocessing training predicting memory]
    python tests/tools/benchmark.py --real PATH [--pass-mark [--seeds 42 43 44]]
    python tests/tools/benchmark.py --parts --mapped
    python tests/tools/benchmark.py --parts --course-size

Without --real the ECGs are generated here. PATH: a codesubset/ folder or an archive of one, of which the
first --exams training exams are used. The reference implementations are written again below: wfdb and filter
design for each record, one after the other, into float64 HDF5; float64 loaded, then converted; a DataLoader that
collates exam by exam; a loop that waits for the device each batch. Ours and the original take turns in each
repetition, so that a drifting machine hits both; figures are medians over the repetitions, the ratio (ours /
original) is the median of the pairs' ratios. Networks and training recipes are the notebook's.

--pass-mark (minutes to hours): seconds of training until the validation AUROC is 0.97, for the final network,
the four-convolution network and the quarter-width network of Ribeiro et al.; one training run per seed, no
repetitions.
--mapped: memory and speed of training from a file four times the allowed memory, against the same file in
memory.
--course-size (ten minutes): the whole notebook on 10,000 + 6,000 generated exams, one epoch each: times and
memory.

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
import threading
import time
import types
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from unittest import mock

import ablation
import h5py
import notebook_source
import numpy as np
import torch
import wfdb
from reference_preprocessing import reference
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import ecg_helpers as ecg

CPU = torch.device("cpu")
LINUX = Path("/proc/self/smaps_rollup").exists()  # memory is read there
MIB_PER_EXAM = ecg.N_SAMPLES * len(ecg.LEADS) * 4 / 2**20  # as float32: 0.125
PASS_MARK = 0.97  # validation AUROC
NETWORKS = {"four_conv": "Model", "exp2_resnet": "AFNet"}  # run of the notebook -> its class
HEADER = "| quantity | ours | original solution | ratio | bar |\n|---|---|---|---|---|"


# ---- The original solution -----------------------------------------------------------------------
def original_exam(path):
    """Read and preprocess one record as the public scripts do, (4096, 8) float64."""
    record = wfdb.rdrecord(str(path))
    return reference(record.p_signal, record.fs, record.sig_name)


def original_h5(records, h5_file):
    """One exam after the other into a float64 HDF5 file."""
    names = records.read_text().split()
    with h5py.File(h5_file, "w") as file:
        tracings = file.create_dataset("tracings", (len(names), ecg.N_SAMPLES, len(ecg.LEADS)), "f8")
        for i, name in enumerate(names):
            tracings[i] = original_exam(records.parent / name)


def original_load(h5_file):
    """All exams as float64, then converted."""
    with h5py.File(h5_file, "r") as file:
        return torch.tensor(np.array(file["tracings"]), dtype=torch.float32)


def original_loader(traces, y, order):
    """Exam by exam, stacked to batches of 16. Its own generator leaves torch's random state, so losses can be
    compared.
    """
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
    verdict = "met" if met else "**missed**"
    return [quantity, ours, original, ratio, f"{bar}: {verdict}" if bar else ""]


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


def memory_of(processes, field="Pss"):
    """MiB of these processes; Pss: memory that they share counts once; Pss_Anon: without pages of files."""
    total = 0.0
    for process in processes:
        try:
            text = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(re.search(rf"\n{field}:\s+(\d+)", text)[1]) / 1024
        except (OSError, TypeError):  # it ended meanwhile
            continue
    return total


def run_child(name, *arguments):
    """Run one of CHILDREN in a fresh process.

    Returns a dict: `result` of the function, `peak` of its process, `together` and `own` (without pages of
    files) of it and all that it starts, in MiB.
    """
    command = [sys.executable, __file__, "--child", name, *map(str, arguments)]
    together, own = 0.0, 0.0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            processes = {process.pid} | descendants(process.pid)
            together = max(together, memory_of(processes))
            own = max(own, memory_of(processes, "Pss_Anon"))
            time.sleep(0.05)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
        return {**json.loads(process.stdout.read()), "together": together, "own": own}


def child(name, *arguments):
    """What `run_child` starts: do it, print what it returns and the largest resident size in MiB."""
    with redirect_stdout(sys.stderr):
        result = CHILDREN[name](*arguments)
    # not getrusage: its ru_maxrss starts with the size that the parent had when it started the child
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    print(json.dumps({"result": result if isinstance(result, (dict, float)) else None, "peak": peak}))


# ---- The notebook's settings ---------------------------------------------------------------------
class Captured(Exception):
    """What the notebook's `train_model` hands to `fit`: model, training batches, validation batches,
    keywords.
    """


def capture(model, train_loader, valid_loader, **keywords):
    """Stands in for `fit`."""
    raise Captured(model, train_loader, valid_loader, keywords)


def setup(name, data, train, device):
    """Model, optimizer, loss and the other arguments of `train_loop`, as the notebook makes them for the run
    `name`.
    """
    helpers = types.ModuleType("ecg_helpers")
    vars(helpers).update(vars(ecg), fit=capture)
    build = notebook_source.definitions(NETWORKS[name])[NETWORKS[name]]
    settings = notebook_source.training_settings(name)
    try:
        ablation.train_fold(name, build, {**data, "DEVICE": device, "ecg": helpers}, train, train, **settings)
    except Captured as caught:
        model, _, _, fit = caught.args
    more = {key: fit[key] for key in ("augment", "max_norm") if fit.get(key)}
    if isinstance(fit.get("scheduler"), (OneCycleLR, CyclicLR)):
        more["scheduler"] = fit["scheduler"]
    if fit.get("ema_decay"):
        average = get_ema_multi_avg_fn(fit["ema_decay"])
        more["averaged"] = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    return model, fit["optimizer"], fit["loss_function"], more


def network(name, device):
    """An untrained network of the notebook, always with the same weights."""
    ecg.seed_everything(ablation.SEED)
    return notebook_source.definitions(name)[name]().to(device)


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
    rates = {way: len(names) / np.array(seconds) for way, seconds in times.items()}
    rows = [speed_row(workers, rates) for workers in numbers]
    exact, stored = difference(records, names, folder)
    rows.append(
        row(
            "preprocessing, largest difference, mV",
            f"{exact:.1e} ({stored:.1e} in the float32 file)",
            bar="at most 1e-6 before rounding",
            met=exact <= 1e-6,
        )
    )
    return [*rows, preprocessing_memory(records, names, folder, cores)]


def speed_row(workers, rates):
    """Exams/s with so many workers."""
    ours, original, ratio = paired(rates[workers], rates["original"])
    gain = f" ({np.median(rates[workers] / rates[1]):.2f} times 1 worker)" if workers > 1 else ""
    bar = "at least 4.5 times" if workers == 2 else ""
    return row(
        f"preprocessing, {workers} worker(s), exams/s",
        f"{ours:.0f}{gain}",
        f"{original:.0f}",
        ratio,
        bar,
        ratio >= 4.5,
    )


def preprocessing_memory(records, names, folder, cores):
    """Peak memory for a quarter of the exams and for all."""
    what = f"preprocessing, {cores} worker(s), peak memory of all processes, MiB"
    if not LINUX:
        return row(what, "not measured")
    few = len(names) // 4 + 1
    quarter = records.with_name("QUARTER.txt")
    quarter.write_text("\n".join(names[:few]))
    peaks = [run_child("build", file, folder / "child.h5")["together"] for file in (quarter, records)]
    shown = f"{peaks[0]:.0f} for {few} exams, {peaks[1]:.0f} for {len(names)}"
    return row(what, shown, bar="below 600", met=max(peaks) < 600)


def difference(records, names, folder):
    """Largest difference from the original in mV: of `preprocess_ecg`, and of what `build_h5` stored."""
    exact, stored = 0.0, 0.0
    with h5py.File(folder / "original.h5", "r") as original, h5py.File(folder / "train.h5", "r") as ours:
        for name, tracing, expected in zip(names, ours["tracings"], original["tracings"]):
            again = ecg.preprocess_ecg(*ecg.read_ecg(records.parent / name)).T
            exact = max(exact, np.abs(again - expected).max())
            stored = max(stored, np.abs(tracing - expected).max())
    return exact, stored


# ---- Training ------------------------------------------------------------------------------------
def timed_epoch(loop, batches, device, model, optimizer, loss, more):
    """Exams/s of one epoch, the share of its time outside the computation, and the mean loss.

    The share is measured inside one and the same epoch: stopwatches around augmentation, forward, loss,
    backward, clip, step, averaging and scheduler; the rest is the loop's own (fetching batches, zero_grad,
    bookkeeping). The difference of two epochs, one with and one without a loader, would be a few percent of
    noise on an effect of about one. It means something on the CPU only, where calls return when done.
    """
    inside, total, more = [], [], dict(more)
    watch = stopwatch(inside)
    places = [
        (model, "forward"),
        (loss, "forward"),
        (torch.Tensor, "backward"),
        (torch.nn.utils, "clip_grad_norm_"),
        (optimizer, "step"),
    ]
    for key, name in (("scheduler", "step"), ("averaged", "update_parameters")):
        if key in more:
            places.append((more[key], name))
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
    size = (
        (options.train_exams or (8192 if cuda else 256)) // 32 * 32
    )  # whole batches only, so both loops get the same
    order = torch.randint(len(y), (size,), generator=torch.Generator().manual_seed(0)).numpy()
    original, here = (
        original_loader(traces, y, order),
        traces.to(device),
    )  # as in the notebook: once, where there is a GPU
    by_16, by_32 = (ecg.BatchLoader(here, y, order, n) for n in (16, 32))
    data = ablation.notebook_globals(here, y, folder, device)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10) if amp == torch.float16 else None

    def original_epoch():
        return timed_epoch(original_train_loop, original, device, *setup("four_conv", data, order, device))

    def our_epoch():
        return timed_epoch(ecg.train_loop, by_16, device, *setup("four_conv", data, order, device))

    def notebook_epoch():  # on CUDA the four convolutions as the notebook trains them, else the final network
        *parts, more = setup("four_conv" if cuda else "exp2_resnet", data, order, device)
        return timed_epoch(
            ecg.train_loop, by_32, device, *parts, {**more, "amp_dtype": amp, "scaler": scaler}
        )

    ways = {"original": original_epoch, "ours": our_epoch, "notebook": notebook_epoch}
    runs = [{way: run() for way, run in ways.items()} for _ in range(options.repetitions + 1)][
        1:
    ]  # the first warms up
    return training_rows({way: np.array([run[way] for run in runs]).T for way in ways}, cuda)


def training_rows(runs, cuda):
    """Lines of the table from way -> (exams/s, share outside, loss), each an array over repetitions."""
    ours, original, ratio = paired(runs["ours"][0], runs["original"][0])
    rows = [
        row(
            "training, four convolutions, batch 16, exams/s",
            f"{ours:.0f}",
            f"{original:.0f}",
            ratio,
            "at least 2 times" if cuda else "",
            ratio >= 2,
        )
    ]
    if cuda:
        ours, original, ratio = paired(runs["notebook"][0], runs["original"][0])
        rows.append(
            row(
                "training, four convolutions, exams/s: mixed precision, batch 32 against float32, batch 16",
                f"{ours:.0f}",
                f"{original:.0f}",
                ratio,
                "at least 8 times",
                ratio >= 8,
            )
        )
    else:
        ours, original, ratio = paired(runs["ours"][1], runs["original"][1])
        final, what = np.median(runs["notebook"][1]), "time outside the computation"
        rows.append(
            row(
                f"training, four convolutions, batch 16, {what}",
                f"{ours:.2%}",
                f"{original:.2%}",
                ratio,
                "below 3 %",
                ours < 0.03,
            )
        )
        rows.append(
            row(
                f"training, final network, batch 32, {what}",
                f"{final:.2%}",
                bar="below 3 %",
                met=final < 0.03,
            )
        )
    ours, original = runs["ours"][2], runs["original"][2]
    gap, limit = (
        np.abs(ours / original - 1).max(),
        1e-3 if cuda else 1e-5,
    )  # a GPU's sums differ from run to run
    what = f"training, four convolutions, mean loss of the epoch (largest relative difference {gap:.0e})"
    return [
        *rows,
        row(what, f"{ours[0]:.6f}", f"{original[0]:.6f}", bar=f"equal to {limit:.0e}", met=gap <= limit),
    ]


# ---- Predicting ----------------------------------------------------------------------------------
def predicting(records, folder, options, device):
    """Exams/s from file to logits with the four-convolution network."""
    ecg.build_h5(records, folder / "train.h5")
    if not (folder / "original.h5").exists():
        original_h5(records, folder / "original.h5")
    model, times = network("Model", device), {"ours": [], "original": []}
    with h5py.File(folder / "train.h5", "r") as file:
        for _ in range(options.repetitions + 1):
            with stopwatch(times["ours"], device):
                ours = ecg.predict(model, file["tracings"], device)
            with stopwatch(times["original"], device):
                original = original_predict(model, folder / "original.h5", device)
    rates = {way: len(ours) / np.array(seconds[1:]) for way, seconds in times.items()}  # the first warms up
    gap, (fast, slow, ratio) = np.abs(ours - original[:, 0]).max(), paired(rates["ours"], rates["original"])
    return [
        row(
            f"predicting, four convolutions, file to logits, exams/s (logits differ by {gap:.0e} at most)",
            f"{fast:.0f}",
            f"{slow:.0f}",
            ratio,
        )
    ]


# ---- Memory of training and predicting -----------------------------------------------------------
def random_h5(path, n, dtype):
    """Random tracings, written in blocks."""
    block = np.random.default_rng(0).normal(size=(100, ecg.N_SAMPLES, len(ecg.LEADS))).astype(dtype)
    with h5py.File(path, "w") as file:
        tracings = file.create_dataset("tracings", (n, *block.shape[1:]), dtype)
        for start in range(0, n, len(block)):
            tracings[start : start + len(block)] = block[: n - start]
    return path


def train_final(tracings, train, valid):
    """One epoch of the final network as the notebook trains it; its seconds."""
    build, settings = (
        notebook_source.definitions("AFNet")["AFNet"],
        notebook_source.training_settings("exp2_resnet"),
    )
    with tempfile.TemporaryDirectory() as work:
        data = ablation.notebook_globals(tracings, np.arange(len(tracings)) % 2, work, CPU)
        history, _ = ablation.train_fold("memory", build, data, train, valid, **{**settings, "epochs": 1})
    return history["seconds"][0]


def train_ours(h5_file):
    """As the notebook: float32 tracings once in memory; few batches, then validation and prediction of a
    fifth.
    """
    tracings = ecg.load_tracings(h5_file, CPU)
    order = np.random.default_rng(0).permutation(len(tracings))
    train_final(tracings, order[:160], order[-len(order) // 5 :])


def train_original(h5_file):
    """Float64, converted, then few batches of the original loop."""
    traces = original_load(h5_file)
    y = np.arange(len(traces)) % 2
    data = ablation.notebook_globals(traces, y, ".", CPU)
    parts = setup("four_conv", data, np.arange(80), CPU)[:3]
    original_train_loop(1, original_loader(traces, y, range(80)), *parts, CPU)


def predict_stream(h5_file):
    """Predict from the file, with the smallest network: its activations do not depend on the number of exams.
    """
    with h5py.File(h5_file, "r") as file:
        ecg.predict(network("ModelBaseline", CPU), file["tracings"], CPU)


def memory(records, folder, options, device):
    """Peak memory as constant + slope x exams, from two sizes, on the CPU."""
    if not LINUX:
        return [row("training and predicting, peak memory", "not measured")]
    small, large = sizes = sorted(options.memory_exams)
    files = {
        (dtype, n): random_h5(folder / f"{dtype}_{n}.h5", n, dtype) for n in sizes for dtype in ("f4", "f8")
    }
    inputs = {"train_original": "f8", "train_ours": "f4", "predict": "f4"}
    runs = []
    for _ in range(options.repetitions):
        runs.append(
            [[run_child(way, files[dtype, n])["peak"] for n in sizes] for way, dtype in inputs.items()]
        )
    peaks = np.array(runs).T  # sizes, ways, repetitions
    slopes = (peaks[1] - peaks[0]) / (large - small) / MIB_PER_EXAM
    constants = peaks[0] - slopes * small * MIB_PER_EXAM
    unit, stream = f"times the tracings' float32 size ({small} to {large} exams)", np.median(slopes[2])
    ours, original, ratio = paired(slopes[1], slopes[0])
    fixed, fixed_original, fixed_ratio = paired(constants[1], constants[0])
    return [
        row(
            f"training, peak memory, {unit}",
            f"{ours:.2f}",
            f"{original:.2f}",
            ratio,
            "at most 1.4",
            ours <= 1.4,
        ),
        row(
            "training, peak memory, constant part, MiB",
            f"{fixed:.0f}",
            f"{fixed_original:.0f}",
            fixed_ratio,
            "below 1229 (1.2 GiB)",
            fixed < 1.2 * 1024,
        ),
        row(f"predicting, peak memory, {unit}", f"{stream:.2f}", bar="at most 0.05", met=stream <= 0.05),
    ]


# ---- Tracings that do not fit --------------------------------------------------------------------
def train_limited(h5_file, max_bytes):
    """Read every exam once in random order, then train on an eighth of them, with so much memory for the
    tracings.
    """
    tracings = ecg.load_tracings(h5_file, CPU, max_bytes=int(max_bytes))
    n = len(tracings)
    torch.manual_seed(0)
    start = time.perf_counter()
    for traces, _ in ecg.BatchLoader(tracings, np.zeros(n), np.arange(n), 32, shuffle=True):
        traces.sum()
    reading = n / (time.perf_counter() - start)
    order = np.random.default_rng(0).permutation(n)
    training = n // 8 / train_final(tracings, order[: n // 8], order[n // 8 : n // 8 + 32])
    return {"reading": reading, "training": training}


def mapped(folder, options):
    """Table: the same file with four times less memory than its size, and with enough."""
    n = options.mapped_exams
    file = random_h5(folder / "mapped.h5", n, "f4")
    size = n * MIB_PER_EXAM
    lines = [
        f"{n:,} exams, {size:.0f} MiB as float32; batches of 32 in random order.\n",
        "| memory allowed for the tracings, MiB | own memory at its peak, MiB | with pages of the file, MiB "
        "| reading, exams/s | training the final network, exams/s |",
        "|---|---|---|---|---|",
    ]
    for allowed in (size / 4, 2 * size):
        run = run_child("train_limited", file, int(allowed * 2**20))
        speed = run["result"]
        lines.append(
            f"| {allowed:.0f} | {run['own']:.0f} | {run['together']:.0f} | {speed['reading']:.0f} | "
            f"{speed['training']:.0f} |"
        )
    return (
        "\n".join(lines)
        + "\n\nPages of the file are the system's cache: it takes them back when memory is short."
    )


CHILDREN = {
    "build": ecg.build_h5,
    "train_ours": train_ours,
    "train_original": train_original,
    "predict": predict_stream,
    "train_limited": train_limited,
}


# ---- The course's size ---------------------------------------------------------------------------
@contextmanager
def peak_of_descendants(pause=0.5):
    """Yield a list whose last value is the largest memory, in MiB, of all that this process started
    meanwhile.
    """
    peak, done = [0.0], threading.Event()

    def sample():
        while not done.wait(pause):
            peak.append(max(peak[-1], memory_of(descendants(os.getpid()))))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def course_size(folder, options):
    """Table of times per part and peak memory of a headless run, one epoch each, with one thread."""
    from run_on_real import error_line, execute

    train, test = options.course_exams
    with redirect_stdout(sys.stderr):
        data = ecg.make_demo_codesubset(folder / "course", n_train=train, n_test=test)
    work = folder / "run"
    work.mkdir()
    with peak_of_descendants() as peak:
        executed, error, seconds = execute(
            notebook_source.load(), work, 1, ECG_DATA=data, ECG_WORK=".", ECG_EPOCHS=1
        )
    lines = [
        f"{train:,} + {test:,} generated exams, one epoch each, one thread.\n",
        "| part | s |",
        "|---|---|",
    ]
    lines += [f"| {part} | {value} |" for part, value in seconds_table(executed)]
    lines += [f"| **the whole notebook** | {seconds:.0f} |", f"| peak memory, GiB | {peak[-1] / 1024:.2f} |"]
    if error:
        lines.append(f"\n**It did not end:** {error_line(error)}")
    return "\n".join(lines)


def seconds_table(executed):
    """The notebook's own table of times, from the outputs of the cell that shows SECONDS: list of (part,
    seconds).
    """
    for cell in notebook_source.code_cells(executed):
        if "SECONDS" not in notebook_source.source(cell):
            continue
        for output in cell["outputs"]:
            data = output.get("data", {})
            text = "".join(data.get("text/markdown", data.get("text/plain", "")))
            rows = re.findall(r"^[| ]*(.*?\w)[ |]+([\d.,]+)[ |]*$", text, flags=re.M)
            if len(rows) > 3 and "second" in text.lower():
                return rows
    return []


# ---- Time to the pass mark -----------------------------------------------------------------------
def pass_mark(source, folder, options, device):
    """Train the three networks for the same time; when does each reach the pass mark?"""
    choices, data = ablation.variants(), ablation.load(source, folder / "pass_mark", device)
    parts = ecg.split_by_patient(data["labels"])
    results = {"final": [], "four_conv_same_time": [], "ribeiro_same_time": []}
    for seed in options.seeds:
        for name, result in results.items():
            build, settings = choices[name]
            if name == "final":
                settings = {**settings, "epochs": options.epochs or settings["epochs"]}
            else:
                seconds = results["final"][-1][3]
                settings = {
                    **settings,
                    "epochs": ablation.epochs_in(seconds, build, data, parts[0], settings),
                }
            history, _ = ablation.train_fold(f"{name}_{seed}", build, data, *parts, seed=seed, **settings)
            result.append(time_to_mark(history))
    size = f"{len(parts[0])} training exams, {len(options.seeds)} seed(s)"
    what = f"seconds to validation AUROC {PASS_MARK} ({size})"
    ours, *originals = (np.array(result).T for result in results.values())
    rows = []
    for name, original in zip(("four convolutions", "Ribeiro, quarter width"), originals):
        quantity = f"{what}, final network against {name}"
        rows.append(row(quantity, mark_cell(*ours), mark_cell(*original), mark_ratio(ours, original)))
    return rows


def time_to_mark(history):
    """Seconds until the pass mark (inf: never), the best AUROC, seconds until that, seconds of the whole run.
    """
    auroc, seconds = np.array(history["auroc"], dtype=float), np.cumsum(history["seconds"], dtype=float)
    return (
        seconds[auroc >= PASS_MARK].min(initial=np.inf),
        np.nanmax(auroc),
        seconds[np.nanargmax(auroc)],
        seconds[-1],
    )


def spread(values, form):
    """Median (lowest to highest) as text."""
    shown = [format(v, form).replace("inf", "never") for v in (np.median(values), values.min(), values.max())]
    middle, low, high = shown
    return middle if low == high else f"{middle} ({low} to {high})"


def mark_cell(mark, best, when, whole):
    """Median (range) over seeds; what was reached instead where a seed never got there."""
    missed = f"; best AUROC {spread(best, '.3f')} at {spread(when, '.0f')}" if np.isinf(mark).any() else ""
    return f"{spread(mark, '.0f')} of {spread(whole, '.0f')}{missed}"


def mark_ratio(ours, original):
    """Median over seeds of our time to the mark / theirs; where they never reach it, below ours / their whole
    time.
    """
    ratio = np.median(ours[0] / np.minimum(original[0], original[3]))
    return f"{'below ' if np.isinf(original[0]).any() else ''}{ratio:.2f}" if np.isfinite(ratio) else ""


# ---- The command ---------------------------------------------------------------------------------
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--real", help="a codesubset/ folder or an archive of one")
    add("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    add("--repetitions", type=int, default=5)
    add("--exams", type=int, default=1000, help="exams to preprocess and predict")
    add("--train-exams", type=int, help="exams of a training epoch (256; on CUDA 8192), a multiple of 32")
    add(
        "--memory-exams", type=int, nargs=2, default=(2000, 4000), help="fewer: the activations hide the data"
    )
    add("--pass-mark", action="store_true", help="needs --real: on generated ECGs every network passes")
    add(
        "--epochs", type=int, help="of the final network on the way to the pass mark; default: the notebook's"
    )
    add("--seeds", type=int, nargs="+", default=[42])
    add("--mapped", action="store_true")
    add("--mapped-exams", type=int, default=4000)
    add("--course-size", action="store_true")
    add("--course-exams", type=int, nargs=2, default=(10_000, 6_000), metavar=("TRAIN", "TEST"))
    add("--work", type=Path, help="folder for the temporary files (3 GB)")
    add("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pass_mark and not options.real:
        parser.error("--pass-mark needs --real")
    if (options.mapped or options.course_size) and not LINUX:
        parser.error("--mapped and --course-size read memory where Linux has it")
    return options


def describe_machine(options, device):
    """One line: what the figures were measured on."""
    gpu = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return (
        f"Device {device}{gpu}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} torch threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"{platform.system()}; {'real' if options.real else 'generated'} ECGs, "
        f"{options.repetitions} repetitions."
    )


def print_rows(options, folder, device):
    """The table against the original solution, part by part."""
    with redirect_stdout(sys.stderr):
        if options.real:
            source = ecg.fetch_codesubset(options.real, folder)
        else:
            source = ecg.make_demo_codesubset(folder, n_train=options.exams, n_test=8)
        records = first_exams(source, folder, options.exams)
    parts = [PARTS[name] for name in options.parts] + ([pass_mark] if options.pass_mark else [])
    print(HEADER, flush=True)
    for part in parts:
        with redirect_stdout(sys.stderr):
            rows = part(source if part is pass_mark else records, folder, options, device)
        print("\n".join(f"| {' | '.join(cells)} |" for cells in rows), flush=True)


def main():
    """Print the tables."""
    options, device = parse(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.child:
        return child(*options.child)
    print(describe_machine(options, device) + "\n", flush=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.parts or options.pass_mark:
            print_rows(options, Path(folder), device)
        if options.mapped:
            print("\n" + mapped(Path(folder), options), flush=True)
        if options.course_size:
            print("\n" + course_size(Path(folder), options), flush=True)


if __name__ == "__main__":
    main()
