"""Helpers of the AF assignment: data, preprocessing, training, metrics, leaderboard. Files are whole or absent."""
import dis
import hashlib
import html
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import types
import uuid
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from fractions import Fraction
from functools import cached_property, lru_cache, partial, partialmethod
from pathlib import Path
from urllib.parse import urlsplit

import h5py
import numpy as np
import pandas as pd
import requests
import torch
import wfdb
from scipy import signal as dsp
from scipy.special import expit
from sklearn import metrics as sk
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import BatchSampler, DataLoader, SubsetRandomSampler, TensorDataset
from tqdm import tqdm

LEADS = ("DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6")  # order of the last axis of the tracings
SAMPLE_RATE, N_SAMPLES = 400, 4096  # Hz, samples per exam, after preprocessing
COURSE_MIRRORS = (
    "https://www.dropbox.com/s/9zkqa5y5jqakdil/codesubset.tar.gz?dl=1",
    "https://drive.usercontent.google.com/download?id=1zg2WoSbu6-5980X9hnpxDkZTwkYDbDdH&export=download&confirm=t",
)
DEFAULT_HOST = "http://hyperion.it.uu.se:5050/"


# ==== Tools: whole files, device, seed ====
def progress(iterable, label, total=None, unit="batch"):
    """`iterable` with a bar of plain text after 30 s: GitHub does not show notebooks with saved widgets."""
    return tqdm(iterable, label, total, unit=unit, delay=30, mininterval=15, ascii=True, leave=False, file=sys.stdout)


@contextmanager
def whole_file(path):
    """Yield a temporary path for a file or folder; it becomes `path` only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield part
        try:
            os.replace(part, path)
        except OSError:
            if not (part.is_dir() and path.is_dir()):  # else another process made the folder meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)  # of a folder
        part.unlink(missing_ok=True)


def plain(content):
    """`content` with Python's own numbers and lists for NumPy's, so that JSON and safe checkpoints take them."""
    if isinstance(content, dict):
        return {plain(key): plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [plain(value) for value in content]
    return content.tolist() if isinstance(content, (np.generic, np.ndarray)) else content


def write_json(path, content):
    """Write `content` as JSON, whole or not at all."""
    with whole_file(path) as part:
        part.write_text(json.dumps(plain(content), indent=1), encoding="utf-8")


def pick_device():
    """The device for training: CUDA, then Apple's MPS, then the CPU."""
    mps_or_cpu = "mps" if torch.backends.mps.is_available() else "cpu"
    return torch.device("cuda" if torch.cuda.is_available() else mps_or_cpu)


def seed_everything(seed):
    """Seed the global random generators of Python, NumPy and PyTorch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


# ==== Data: course archive, own folder or archive, demo data ====
def fetch_codesubset(source="course", directory="."):
    """Folder of a ready data set: `train/`, `test/` (RECORDS.txt and WFDB pairs) and `train.csv`.

    `source`: "course" (downloaded), "demo" (synthetic), the path of such a folder, which is only read, or of a tar
    archive of one. `directory`: where `codesubset/` is created; what lies there from another source is never replaced.
    """
    path, target = Path(source).expanduser(), Path(directory) / "codesubset"
    if source == "demo":
        return make_demo_codesubset(directory)
    if source == "course":
        path, origin = target.with_name("codesubset.tar.gz"), "course"
    elif path.is_dir():
        if missing := _missing_files(path):
            raise FileNotFoundError(f"{path} is no whole codesubset folder: {missing[:10]} missing.")
        return path
    elif path.is_file():
        origin = f"{path.resolve()}, {path.stat().st_size} bytes of {path.stat().st_mtime_ns}"
    else:
        raise FileNotFoundError(f"{source} does not exist: give course, demo, a codesubset folder or a tar archive.")
    if not _is_there(target, origin):
        if not path.exists():
            print(f"Downloading the course's data (344 MiB) to {path} ...", flush=True)
            download(COURSE_MIRRORS, path)
        _extract(path, target, origin)
        _is_there(target, origin)  # another process may have been faster, with other data: refused
    return target


def _is_there(target, origin):
    """Whether `target` is there; ValueError where it holds other data."""
    note = target / "origin.txt"
    found = note.read_text(encoding="utf-8") if note.exists() else "of unknown origin"
    if target.exists() and found != origin:
        raise ValueError(f"{target} holds other data ({found}): choose another ECG_WORK, or move that folder away.")
    return target.exists()


def _missing_files(folder):
    """What a codesubset folder lacks: its three tables first, then files of the records."""
    tables = ["train/RECORDS.txt", "test/RECORDS.txt", "train.csv"]
    if missing := [table for table in tables if not (folder / table).is_file()]:
        return missing
    names = [f"{split}/{name}" for split in ("train", "test") for name in read_records(folder / split / "RECORDS.txt")]
    return [name + end for name in names for end in (".hea", ".dat") if not (folder / (name + end)).is_file()]


def read_text(path):
    """A text file; ValueError names one that is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")  # with or without Excel's mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: open it in an editor and save it as UTF-8.") from error


def read_records(records_file):
    """Record names of a RECORDS.txt, in order. ValueError: none, or some repeated."""
    names = read_text(records_file).split()
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or repeated:
        raise ValueError(f"{records_file} " + (f"repeats {repeated[:10]}" if repeated else "lists no record"))
    return names


# ==== Data: download, safe extraction ====
def download(urls, path):
    """Download a gzip archive from the first of `urls` that serves it; an interrupted download resumes."""
    part, problems = Path(f"{path}.part"), {}
    part.parent.mkdir(parents=True, exist_ok=True)
    for url in 4 * list(urls):  # four rounds; after a cut connection the next one resumes
        try:
            have = part.stat().st_size if part.exists() else 0
            wanted = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
            with requests.get(url, headers=wanted, stream=True, timeout=(10, 60)) as answer:
                if answer.status_code == 416:  # nothing beyond what we have, maybe of another file: start anew
                    part.unlink(missing_ok=True)
                answer.raise_for_status()
                with open(part, "ab" if answer.status_code == 206 else "wb") as file:
                    for block in progress(answer.iter_content(1 << 20), "download", unit="MiB"):
                        file.write(block)
            with open(part, "rb") as file:
                if file.read(2) == b"\x1f\x8b":  # gzip begins so
                    return os.replace(part, path)
            part.unlink()
            problem = "no gzip archive (a sign-in or quota page?)"
        except requests.RequestException as error:
            problem = str(error)
        problems[urlsplit(url).netloc] = problem
        time.sleep(1)
    raise ConnectionError(f"No mirror served the archive: {problems}. Try again later, or save {urls[0]} as {path}.")


def _extract(archive, target, origin):
    """Extract the `codesubset/` of a tar archive to `target`, whole or not at all."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError("this Python cannot extract archives safely: use 3.10.12, 3.11.4, 3.12 or newer")
    if zipfile.is_zipfile(archive):
        raise ValueError(f"{archive} is a zip archive: unpack it and give the path of its codesubset folder.")
    try:
        with whole_file(target) as part, tarfile.open(archive) as tar:
            tar.extractall(part, members=_safe_members(tar), filter="data")
            while tar.fileobj.read(1 << 20):  # to the end, where gzip and xz keep their checksums
                pass
            if missing := _missing_files(part):
                raise ValueError(f"not inside: {missing[:10]}")
            (part / "origin.txt").write_text(origin, encoding="utf-8")
    except Exception as error:  # tarfile, gzip, bz2 and xz raise many types for a damaged file
        if isinstance(error, OSError) and error.errno:  # disk full, no permission: not the archive's fault
            raise
        raise ValueError(f"{archive} is damaged, compressed twice or no archive of a codesubset folder ({error}). "
                         "Give another one; codesubset.tar.gz: remove it, so that it is fetched again.") from error


def _safe_members(tar, limit=64 * 2**30):
    """Members below `codesubset/`, named from there; ValueError for links (CVE-2025-4517), giants, or none."""
    total, others, first = 0, set(), None
    for member in progress(tar, "extract", unit=" files"):
        parent, inside, member.name = ("/" + member.name).rpartition("/codesubset/")  # a/codesubset/x.hea: /a, x.hea
        if not inside or member.isdir():  # a folder comes with its files
            others.add(member.name)
            continue
        total, first = total + member.size, parent if first is None else first
        if total > limit or member.issparse() or not member.isreg() or parent != first:
            raise ValueError(f"{parent}/{member.name} is a link, too large, or of a second codesubset folder")
        yield member
    if total == 0:
        raise ValueError(f"no codesubset folder inside, but {sorted(others)[:10]}")


# ==== Data: synthetic ECGs for a demo run ====
def make_demo_codesubset(directory, n_train=240, n_test=80, seed=0):
    """Write synthetic ECGs in the course's layout; 30 % AF in training, 50 % in the test part. Same seed, same files.

    `directory` gets `codesubset/`, which is returned, and `test_labels.csv`, for tests and scripts only.
    """
    target, origin = Path(directory) / "codesubset", f"demo data, {n_train} + {n_test} exams, seed {seed}"
    if _is_there(target, origin):
        return target
    rng = np.random.default_rng(seed)
    with whole_file(target) as part:
        for split, n, af_share, first_id in (("train", n_train, 0.3, 100_000), ("test", n_test, 0.5, 500_000)):
            table = _write_demo_split(rng, part / split, n, af_share, first_id)
            with whole_file(part / "train.csv" if split == "train" else target.with_name("test_labels.csv")) as file:
                table.to_csv(file, index=False)
        (part / "origin.txt").write_text(origin, encoding="utf-8")
    return target


def _write_demo_split(rng, folder, n, af_share, first_id):
    """Write `n` exams and RECORDS.txt to `folder`; the table of their labels and patients."""
    folder.mkdir(parents=True)
    ids = rng.permutation(first_id + np.arange(n))  # record order is not the table's order
    af = rng.permutation(np.arange(n) < round(af_share * n)).astype(int)
    for exam, has_af in zip(ids, af):
        rate = int(rng.choice([300, 400, 500, 600]))
        ecg = _synthetic_ecg(rng, has_af, np.arange(int(rate * rng.uniform(7.2, 10.2))) / rate)
        wfdb.wrsamp(f"TNMG{exam}", fs=rate, units=["mV"] * 8, sig_name=list(LEADS), p_signal=ecg.T, fmt=["16"] * 8,
                    adc_gain=[1000.0] * 8, baseline=[0] * 8, write_dir=str(folder))
    (folder / "RECORDS.txt").write_text("".join(f"TNMG{exam}\n" for exam in ids), encoding="utf-8")
    patient = first_id // 10 + np.where(af, 0, n) + rng.integers(0, max(1, int(0.8 * n)), n)  # each of one class
    age, sex = np.clip(rng.normal(55 + 15 * af, 12), 18, 99).astype(int), rng.choice(["F", "M"], n, p=[0.63, 0.37])
    table = {"id_exam": ids, "id_patient": patient, "age": age, "sex": sex, "AF": af, "date_exam": "2014-01-01"}
    return pd.DataFrame(table).sort_values("id_exam")


def _synthetic_ecg(rng, af, t):
    """One exam, (8, samples) in mV, at the times `t` (s): waves at each beat, drift, power line, noise."""
    rr = rng.uniform(0.6, 1.05) * np.exp((rng.uniform(0.05, 0.3) if af else 0.03) * rng.normal(size=40))
    beats = np.cumsum(rr)[:, None] - rng.uniform(0, rr[0])
    p_size = 0 if af else rng.choice([0.2, 1, 1, 1])  # a quarter of the others: P waves that hardly show
    waves = [(-0.16, 0.02, 0.13 * p_size), (-0.03, 0.01, -0.08), (0, 0.012, 1), (0.03, 0.014, -0.2), (0.26, 0.045, 0.3)]
    one_lead = np.zeros(len(t))
    for offset, width, size in waves:  # P, Q, R, S, T: seconds from R, width (s), mV
        one_lead += size * np.exp(-0.5 * ((t - beats - offset) / width) ** 2).sum(axis=0)
    if af:  # fibrillatory waves
        one_lead += rng.choice([0.015, 0.06]) * np.sin(2 * np.pi * rng.uniform(4, 9) * t + 2 * np.sin(4.4 * t))
    ecg = one_lead * (rng.normal(1, 0.15, 8) * [0.6, 1.0, -0.7, -0.7, 0.7, 1.3, 1.2, 0.9])[:, None]
    ecg += rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * (rng.uniform(0.1, 0.4) * t + rng.random((8, 1))))
    ecg += rng.uniform(0, 0.06) * np.sin(2 * np.pi * 60 * t)
    return ecg + rng.normal(0, rng.uniform(0.01, 0.04), ecg.shape)


# ==== Records: fingerprint, reading ====
def data_fingerprint(records_file):
    """Digest of the records' names, headers (with their checksums) and sizes: which data is this?"""
    folder, digest = Path(records_file).parent, hashlib.sha256()
    for name in read_records(records_file):
        header, samples = folder / f"{name}.hea", folder / f"{name}.dat"
        digest.update(header.read_bytes() if header.is_file() else b"missing")
        digest.update(f"{name} {samples.stat().st_size if samples.is_file() else 'missing'}\n".encode())
    return digest.hexdigest()[:16]


def read_ecg(path):
    """Signal (leads, samples) in mV, NaN where marked invalid, sample rate (Hz) and lead names of one WFDB record.

    `path`: without suffix. ValueError names the record and what is wrong with it.
    """
    try:
        return _read_plain_record(path) or _read_any_record(path)
    except Exception as error:  # wfdb raises many types for a broken or unusual header
        raise ValueError(f"record {path}: cannot be read ({type(error).__name__}: {error}); replace its files, or take "
                         "it out of RECORDS.txt") from error


HEADER_LINE = re.compile(r"\S+ (\d+) (\d+(?:\.\d+)?) (\d+)")  # record, leads, rate, samples
# file, format, gain(baseline)/unit, resolution, zero, first value, checksum, block size, lead
SIGNAL_LINE = re.compile(r"([\w.-]+) 16 ([1-9][\d.]*)\((-?\d+)\)/mV \d+ -?\d+ -?\d+ -?\d+ 0 (\S+)", re.ASCII)


def _read_plain_record(path):
    """The commonest form (one .dat, format 16, mV) without wfdb's slow parser; None for any other form."""
    text = Path(f"{path}.hea").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    head = HEADER_LINE.fullmatch(lines[0]) if lines else None
    specs = [SIGNAL_LINE.fullmatch(line) for line in lines[1:]]
    if not head or not all(specs) or len(specs) != int(head[1]) or len({spec[1] for spec in specs}) != 1:
        return None
    n_leads, n_samples = len(specs), int(head[3])
    digital = np.fromfile(Path(path).parent / specs[0][1], dtype="<i2", count=n_leads * n_samples)
    if len(digital) < n_leads * n_samples or n_samples == 0:
        raise ValueError(f"{specs[0][1]} is truncated: {len(digital) // n_leads} of {n_samples} samples")
    digital = digital.reshape(n_samples, n_leads).T.copy()  # lead by lead in memory: faster from here on
    gain, baseline = (np.array([float(spec[k]) for spec in specs])[:, None] for k in (2, 3))
    signal_mv = (digital - baseline) / gain
    signal_mv[digital == -32768] = np.nan  # WFDB's mark of an invalid sample
    return signal_mv, float(head[2]), [spec[4] for spec in specs]


def _read_any_record(path):
    """Any form that wfdb reads, in mV."""
    record = wfdb.rdrecord(str(path))
    to_mv = [{"mv": 1.0, "uv": 1e-3}.get(unit.lower()) for unit in record.units]  # V may be µV: wfdb drops the µ
    if None in to_mv:
        raise ValueError(f"the units must be mV or uV, not {record.units}")
    return record.p_signal.T * np.array(to_mv)[:, None], float(record.fs), record.sig_name


def order_leads(signal_mv, leads):
    """The eight leads in the order of LEADS, (8, samples) float64; I and II are accepted for DI and DII."""
    names = [str(name).strip().upper() for name in leads]
    names = [{"I": "DI", "II": "DII"}.get(name, name) for name in names]
    if wrong := [lead for lead in LEADS if names.count(lead) != 1]:
        raise ValueError(f"leads {wrong} are missing or there more than once; the record has {list(leads)}")
    return np.asarray(signal_mv, dtype=np.float64)[[names.index(lead) for lead in LEADS]]


# ==== Preprocessing: the filters and the four steps ====
def fill_gaps(signal_mv):
    """Interpolate samples that are not finite within each lead (leads, samples); a lead without any becomes zero."""
    finite = np.isfinite(signal_mv)
    if finite.all():
        return signal_mv
    if not finite.any():
        raise ValueError("no lead has a finite sample")
    leads = pd.DataFrame(np.where(finite, signal_mv, np.nan).T)
    return leads.interpolate(limit_direction="both").fillna(0.0).to_numpy(copy=True).T  # pandas' own is read-only


@lru_cache(maxsize=32)
def baseline_filter(sample_rate, pass_edge=0.8, stop_edge=0.2, ripple=0.5, attenuation=40.0):
    """Elliptic high-pass as second-order sections: edges in Hz, ripple and attenuation in dB of one pass."""
    order, edge = dsp.ellipord(pass_edge, stop_edge, ripple, attenuation, fs=sample_rate)
    return dsp.iirfilter(order, edge, ripple, attenuation, btype="high", ftype="ellip", output="sos", fs=sample_rate)


@lru_cache(maxsize=32)
def powerline_filter(sample_rate, powerline=60, quality=30):
    """Notch at `powerline` Hz as transfer function (b, a)."""
    return dsp.iirnotch(powerline, quality, fs=sample_rate)


@lru_cache(maxsize=32)
def resampling_filter(up, down):
    """Low-pass for a change of rate by up/down: the default of `resample_poly`, which would design it for each exam."""
    longest = max(up, down, 2)  # 2 at 1/1, where `resample_poly` uses no filter: one that can be designed
    return dsp.firwin(20 * longest + 1, 1 / longest, window=("kaiser", 5.0))


def preprocess_ecg(signal, sample_rate, leads, new_freq=SAMPLE_RATE, new_len=N_SAMPLES, remove_baseline=True,
                   powerline=60):
    """Bring one exam to the form that all models read, as github.com/antonior92/ecg-preprocessing does.

    Parameters
    ----------
    signal, sample_rate, leads : array (leads, samples) in mV, Hz, names of the rows
    new_freq, new_len : rate (Hz) and length (samples) of the result, zero-padded or cropped, centred
    remove_baseline, powerline : remove the drift below 0.8 Hz; frequency to remove (Hz) if below half the rate, or None

    Returns (8, new_len) float64 in mV, in the order of LEADS. ValueError says what makes it no exam.
    """
    if not 50 <= sample_rate <= 5000:
        raise ValueError(f"sample rate {sample_rate} Hz is outside 50-5000 Hz")
    ecg = fill_gaps(order_leads(signal, leads))
    if ecg.shape[1] < sample_rate:
        raise ValueError(f"only {ecg.shape[1]} samples, less than one second")
    if remove_baseline:
        ecg = dsp.sosfiltfilt(baseline_filter(sample_rate), ecg, padtype="constant")
    if powerline and powerline < sample_rate / 2:
        ecg = dsp.filtfilt(*powerline_filter(sample_rate, powerline), ecg)
    ratio = Fraction(float(new_freq) / float(sample_rate)).limit_denominator(10_000)  # no giant filter at 399.9987 Hz
    up, down = ratio.as_integer_ratio()
    ecg = dsp.resample_poly(ecg, up, down, axis=1, window=resampling_filter(up, down))
    surplus = max(0, ecg.shape[1] - new_len) // 2
    ecg = ecg[:, surplus:surplus + new_len]
    missing = new_len - ecg.shape[1]
    return np.pad(ecg, [(0, 0), (missing // 2, missing - missing // 2)])


# ==== Which result is this? A digest of code and values ====
VALUES = (bool, int, float, complex, str, bytes, range, slice, type(None), type(...), Path, re.Pattern, np.generic,
          torch.device, torch.dtype, torch.Size)
WRAPPERS = (partial, partialmethod, cached_property, property, staticmethod, classmethod, type(lru_cache(len)),
            types.MethodType, types.BuiltinMethodType, types.MethodWrapperType)
ATTRIBUTES_ONLY = (torch.nn.Module, torch.no_grad, torch.inference_mode, torch.autocast, types.SimpleNamespace)
NO_EFFECT = ("__dict__", "__weakref__", "__doc__", "__firstlineno__", "__static_attributes__", "__annotations__",
             "__dataclass_fields__", "__dataclass_params__", "_flat_weight_refs")  # the last: of recurrent networks


def identity(*things):
    """Digest of values and code (not comments), with all of ours that it uses; TypeError: something hides its state."""
    return hashlib.sha256(repr(_describe(things, {})).encode()).hexdigest()[:12]


def _describe(thing, known):
    """Nested lists that say what `thing` is; `known`: functions, classes and objects met so far."""
    if isinstance(thing, VALUES) and _is_library(type(thing)):
        return [type(thing).__name__, (thing.pattern, thing.flags) if isinstance(thing, re.Pattern) else repr(thing)]
    if type(thing) in (list, tuple, set, frozenset):
        items = [_describe(item, known) for item in thing]
        return [type(thing).__name__, *(items if type(thing) in (list, tuple) else sorted(items, key=repr))]
    if type(thing) in (dict, OrderedDict, types.MappingProxyType):
        return [_describe(item, known) for item in thing.items() if item[0] not in NO_EFFECT]
    # what is left is code, an array or another object: its name, and what it consists of
    if id(thing) in known:
        return known[id(thing)][0]
    names = [str(getattr(thing, part, "")) for part in ("__module__", "__qualname__", "__name__")]
    name = " ".join([type(thing).__qualname__, *names, str(len(known))])
    known[id(thing)] = (name, thing)  # the thing itself, so that no other one gets its id
    if isinstance(thing, torch.Tensor) or type(thing) in (np.ndarray, np.memmap):
        array = torch.tensor(thing.copy()) if isinstance(thing, np.ndarray) else thing.detach().cpu().contiguous()
        content = hashlib.sha256(array.reshape(-1).view(torch.uint8).numpy()).hexdigest()  # copy: no negative strides
        further = [getattr(thing, part, None) for part in ("requires_grad", "_backward_hooks", "__dict__")]
        parts = [str(array.dtype), *array.shape, content, further]
    elif isinstance(thing, WRAPPERS):
        wrapped = ("func", "args", "keywords", "fget", "fset", "__wrapped__", "__func__", "__self__")
        parts = [type(thing), *(getattr(thing, part, None) for part in wrapped)]
    elif _is_library(thing):
        parts = getattr(thing, "__bases__", [])  # its name suffices; a class that it made may have ours as a base
    elif isinstance(thing, types.FunctionType):
        cells = [cell.cell_contents for cell in thing.__closure__ or ()]
        parts = [_code(thing.__code__, thing.__globals__), thing.__defaults__, thing.__kwdefaults__, cells, vars(thing)]
    elif isinstance(thing, type):
        parts = [type(thing), thing.__bases__, vars(thing)]
    elif isinstance(thing, types.ModuleType):  # a file of ours counts whole
        parts = {name: value for name, value in vars(thing).items() if not name.startswith("__")}
    elif isinstance(thing, ATTRIBUTES_ONLY) or not any(map(_is_library, type(thing).__mro__[:-1])):
        parts = [type(thing), vars(thing)]  # an object whose classes are all ours (the last is `object`) has no other
    else:
        raise TypeError(f"a {type(thing).__qualname__} has a state that cannot be described")
    return [name, _describe(parts, known)]


def _is_library(thing):
    """Whether this is a module, class or function of Python or of an installed package; ours is all else."""
    if isinstance(thing, types.FunctionType) and not thing.__closure__:
        file = thing.__code__.co_filename
    elif isinstance(thing, (type, types.ModuleType)):
        package = (thing.__name__ if isinstance(thing, types.ModuleType) else thing.__module__).partition(".")[0]
        no_file = os.__file__ if package in sys.builtin_module_names else ""  # built in: counts as a file of Python's
        file = "" if package == "__main__" else getattr(sys.modules.get(package), "__file__", None) or no_file
    else:  # written in C, or made at run time, as decorators do: a library's where it is found there by its name
        owner = getattr(thing, "__objclass__", sys.modules.get(getattr(thing, "__module__", None)))
        found = getattr(owner, getattr(thing, "__name__", ""), None) is thing
        return (found and _is_library(owner)) or (isinstance(thing, np.ufunc) and "vectorized" not in thing.__name__)
    return file.startswith(os.path.dirname(os.__file__)) or "site-packages" in file or "dist-packages" in file


def _code(code, space):
    """What a code object consists of, with the values that it imports or reads from its globals, `space`."""
    steps = list(dis.get_instructions(code))
    names = [step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    used = {name: space[name] for name in names if name in space}
    for name in [step.argval for step in steps if step.opname == "IMPORT_NAME"]:  # a.b: b, and a that holds it
        used[name] = [__import__(name, fromlist=[part for part in code.co_names if "." not in part]), __import__(name)]
    constants = [_code(value, space) if isinstance(value, types.CodeType) else value for value in code.co_consts]
    fields = ("co_code", "co_exceptiontable", "co_names", "co_varnames", "co_cellvars", "co_flags")  # the 2nd: of `try`
    return [*(getattr(code, field, None) for field in fields), constants, used]


# ==== HDF5: all exams in one file ====
def build_h5(records_file, h5_file, workers=None):
    """Preprocess the records of a RECORDS.txt into `tracings` (exams, 4096, 8), float32, mV; a finished file is kept.

    `workers`: processes, by default one per core. ValueError names the first bad records; no file is left then.
    """
    records_file, h5_file = Path(records_file), Path(h5_file)
    names = read_records(records_file)
    made_from = f"{data_fingerprint(records_file)} {identity(_prepare_records, wfdb.__version__)}"
    with suppress(OSError, KeyError, RuntimeError), h5py.File(h5_file, "r", locking=False) as file:  # none, or damaged
        if file.attrs.get("made_from") == made_from and len(file["tracings"]) == len(names):
            print(f"{h5_file.name}: {len(names):,} exams, ready from an earlier run.", flush=True)
            return h5_file
    paths, bad, done, start = [records_file.parent / name for name in names], [], 0, time.monotonic()
    portions = [paths[first:first + 8] for first in range(0, len(paths), 8)]  # one by one is a sixth slower
    with (whole_file(h5_file) as part, h5py.File(part, "w", locking=False) as file,
          ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool,
          closing(pool.map(_prepare_records, portions)) as results):  # closed first: cancels what waits
        tracings = file.create_dataset("tracings", (len(names), N_SAMPLES, len(LEADS)), "<f4")
        for rows, problems in progress(results, "preprocess", len(portions), " portions of 8 exams"):
            tracings[done:done + len(rows)] = rows
            done += len(rows)
            bad += problems
        if bad:
            h5_file.unlink(missing_ok=True)  # it was made from other records
            raise ValueError("\n  ".join([f"{len(bad)} of {len(names):,} records cannot be used:", *bad[:10]]))
        file.attrs["made_from"] = made_from
    print(f"{h5_file.name}: {len(names):,} exams in {time.monotonic() - start:.0f} s.", flush=True)
    return h5_file


def _prepare_records(paths):
    """Tracings (records, 4096, 8) of some records, and what is wrong with those that cannot be used."""
    tracings, problems = np.zeros((len(paths), N_SAMPLES, len(LEADS)), "<f4"), []
    for tracing, path in zip(tracings, paths):
        try:
            tracing[:] = preprocess_ecg(*read_ecg(path)).T
        except ValueError as error:
            problems.append(f"{path.name}: {error}")
    return tracings, problems


def _end_with_parent():
    """A worker leaves Ctrl-C to its parent, and ends when its parent has ended, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)  # sys.exit would end this thread only

    threading.Thread(target=watch, daemon=True).start()


# ==== Labels, patient folds, tracings, batches ====
def load_labels(csv_file, records_file):
    """Labels in the order of the records, indexed by id_exam: id_patient (text), age (NaN: unknown), sex, AF (0/1).

    ValueError names the column or the exams: missing, repeated, AF not 0 or 1, no patient.
    """
    table = pd.read_csv(io.StringIO(read_text(csv_file)), skipinitialspace=True, dtype={"id_patient": str, "AF": str})
    if missing := [name for name in ("id_exam", "id_patient", "age", "sex", "AF") if name not in table]:
        raise ValueError(f"{csv_file}: column {missing} missing; it has {list(table)[:10]}")
    ids = [int(re.sub(r"\D", "", Path(name).name) or 0) for name in read_records(records_file)]  # TNMG100046
    table = table[table["id_exam"].isin(ids)].set_index("id_exam")
    table["AF"] = table["AF"].str.strip().map({"0": 0, "1": 1, "0.0": 0, "1.0": 1, "False": 0, "True": 1})
    table["id_patient"] = table["id_patient"].str.strip().str.removesuffix(".0")
    problems = {"appear more than once": table.index[table.index.duplicated()],
                "have no row": sorted(set(ids) - set(table.index)),
                "have an AF that is not 0 or 1": table.index[table["AF"].isna()],
                "have no id_patient": table.index[table["id_patient"].isna()]}
    for what, exams in problems.items():
        if len(exams):
            raise ValueError(f"{csv_file}: {len(exams)} exams {what}: {list(exams)[:10]}. Correct the table.")
    age = pd.to_numeric(table["age"], errors="coerce")
    table["age"] = age.where(age.between(0, 120))
    if odd := int((age.notna() & table["age"].isna()).sum()):
        print(f"{odd} ages outside 0 to 120 years count as unknown.", flush=True)
    return table.loc[ids].astype({"AF": int})


def patient_folds(labels, n_folds=5, seed=42):
    """List of (training, validation) positions: no patient on both sides, prevalence as equal as patients allow."""
    patients = labels.groupby("AF")["id_patient"].nunique()
    if len(patients) < 2 or patients.min() < n_folds:
        raise ValueError(f"{n_folds} folds need {n_folds} patients with and without AF; there are {patients.to_dict()}")
    folds = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    return list(folds.split(labels, labels["AF"], labels["id_patient"]))


def split_by_patient(labels, valid_fraction=0.2, seed=42):
    """Positions of training and validation exams: the first of round(1 / valid_fraction) patient folds validates."""
    return patient_folds(labels, round(1 / valid_fraction), seed)[0]


def load_tracings(h5_file, device="cpu"):
    """Tracings of an HDF5 file, a tensor (exams, 4096, 8): on a CUDA GPU, else mapped from the file."""
    with h5py.File(h5_file, "r", locking=False) as file:
        data = file["tracings"]
        mapped = np.memmap(h5_file, data.dtype, "c", data.id.get_offset(), data.shape)  # "c": the file stays as it is
    return torch.from_numpy(mapped).to(device if torch.device(device).type == "cuda" else "cpu")


def make_loader(traces, targets, exams, batch_size=32, shuffle=False):
    """DataLoader of pairs traces (batch, 4096, 8), targets (batch, 1); `shuffle` drops a last batch not full."""
    truth = torch.tensor(np.asarray(targets, dtype=np.float32), device=traces.device)[:, None]
    exams = [int(exam) for exam in exams]
    order = SubsetRandomSampler(exams) if shuffle else exams
    sampler = BatchSampler(order, batch_size, drop_last=shuffle and len(exams) > batch_size)
    return DataLoader(TensorDataset(traces, truth), sampler=sampler, batch_size=None)  # None: indexed batch by batch


# ==== Train function: one epoch ====
def train_loop(epoch, dataloader, model, optimizer, loss_function, device, *, augment=None, after_step=None):
    """Train `model` for one epoch; returns the mean loss per exam (batches may differ in size).

    `dataloader` yields pairs: traces (batch, 4096, 8), targets (batch, 1). `augment`: a function of the traces of a
    batch. `after_step`: called without arguments after each step (learning-rate schedule, averaged weights).
    """
    model.train()
    loss_sum, n_exams = torch.zeros((), device=device), 0  # summed on the device: no waiting for each batch
    for traces, targets in batches(dataloader, device, f"epoch {epoch}"):
        if augment:
            traces = augment(traces)
        optimizer.zero_grad()
        logits = forward(model, traces)
        loss = loss_function(logits, targets)
        loss.backward()
        optimizer.step()
        if after_step:
            after_step()
        loss_sum += loss.detach() * len(targets)
        n_exams += len(targets)
    return loss_sum.item() / n_exams


def batches(dataloader, device, label):
    """Pairs of float32 traces (batch, 4096, 8) and targets (batch, 1) on the device."""
    for batch in progress(dataloader, label):
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise ValueError("a batch must be a pair: traces (batch, 4096, 8) and targets (batch, 1)")
        traces, targets = batch
        yield traces.float().to(device), targets.float().reshape(len(traces), -1).to(device)


def forward(model, traces):
    """Logits (batch, 1); ValueError for another shape, which a loss might broadcast without a word."""
    logits = model(traces.float())  # an augmentation with NumPy's numbers makes float64
    shape = tuple(getattr(logits, "shape", [type(logits).__name__]))
    if shape != (len(traces), 1):
        raise ValueError(f"the model must return logits of shape {(len(traces), 1)}, one per exam, not {shape}")
    return logits.float()


# ==== Eval function: one pass without gradients, and the one sigmoid ====
@torch.no_grad()
def eval_loop(epoch, dataloader, model, loss_function, device):
    """Evaluate without gradients: the mean loss per exam, probabilities of AF (n, 1) float64, targets (n, 1)."""
    model.eval()
    loss_sum, logits_all, targets_all = torch.zeros((), device=device), [], []
    for traces, targets in batches(dataloader, device, f"validation {epoch}"):
        logits = forward(model, traces)
        loss_sum += loss_function(logits, targets) * len(targets)
        logits_all.append(logits)
        targets_all.append(targets)
    targets = torch.cat(targets_all).cpu().numpy()
    return loss_sum.item() / len(targets), to_probability(torch.cat(logits_all).cpu().numpy()), targets


def to_probability(logits):
    """Sigmoid in float64: float32 saturates and would tie the most certain exams."""
    return expit(np.asarray(logits, dtype=np.float64))


@torch.no_grad()
def predict(model, traces, device, *, batch_size=64, shifts=(0,)):
    """Logits (n,) float64 of `traces` (n, 4096, 8), averaged over time `shifts` (samples), batch by batch."""
    model.eval()
    logits = []
    for start in progress(range(0, len(traces), batch_size), "predict"):
        batch = torch.as_tensor(traces[start:start + batch_size]).float().to(device)
        shifted = [forward(model, batch.roll(shift, 1)) for shift in shifts]
        logits.append(torch.stack(shifted).mean(dim=0).squeeze(1))
    return torch.cat(logits).cpu().numpy().astype(np.float64)


# ==== Metrics, operating point, the two columns of a submission ====
METRICS = ("auroc", "ap", "f1", "accuracy")  # validation metrics of each epoch


def classification_metrics(y_true, y_prob, threshold=0.5, prevalence=None):
    """Dict of scikit-learn's metrics; AF is predicted where y_prob > `threshold` (a tie: no AF, as on the leaderboard).

    `prevalence`: reweight the exams so that AF makes up this share. leaderboard_ap: mean of the AP of AF and of no AF.
    """
    y, p = np.ravel(y_true).astype(float), np.ravel(y_prob).astype(float)
    if len(y) != len(p) or len(y) == 0 or not np.isin(y, (0, 1)).all() or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("as many labels (0 or 1) as probabilities (between 0 and 1) are needed, at least one")
    predicted, weights = p > threshold, {"sample_weight": exam_weights(y, prevalence)}
    found = {"accuracy": sk.accuracy_score(y, predicted, **weights), "auroc": np.nan, "ap": np.nan,
             "leaderboard_ap": np.nan, "f1": sk.f1_score(y, predicted, zero_division=0, **weights)}
    if 0 < y.sum() < len(y):
        ap = sk.average_precision_score(y, p, **weights)
        ap_no_af = sk.average_precision_score(1 - y, 1 - p, **weights)
        found.update(auroc=sk.roc_auc_score(y, p, **weights), ap=ap, leaderboard_ap=(ap + ap_no_af) / 2)
    return {name: float(value) for name, value in found.items()}


def exam_weights(y, prevalence=None):
    """Weights of exams that make AF count `prevalence` of the whole; ones where it is None or a class is absent."""
    y, share = np.ravel(y), np.mean(y)
    if prevalence is None or share in (0, 1):
        return np.ones(len(y))
    return np.where(y == 1, prevalence / share, (1 - prevalence) / (1 - share))


def balanced_threshold(y_true, logits, prevalence=0.5):
    """(threshold, scale): the calibrated probability of AF is sigmoid(scale * (logit - threshold)) at this prevalence.

    Logistic regression with the smoothed targets of Platt (1999): the slope stays finite where the classes separate.
    """
    y, z = np.ravel(y_true).astype(int), np.ravel(logits).astype(np.float64)
    if len(y) != len(z) or not np.isfinite(z).all() or len(np.unique(y)) != 2:
        raise ValueError("as many labels, of both classes, as finite logits are needed")
    low, high = np.sort([np.quantile(z[y == 0], 0.2), np.quantile(z[y == 1], 0.8)])
    centre, spread = (low + high) / 2, (high - low) / 4  # these quantiles become x = -2 and 2
    if spread < 1e-100 or not np.isfinite(spread):
        return 0.0, 1.0  # hardly any spread: leave the logits as they are
    x = np.clip((z - centre) / spread, -6, 6)  # an extreme logit must not decide for all
    target = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))
    weight = exam_weights(y, prevalence)
    # scikit-learn takes hard labels: each exam counts as AF with its target, and as no AF with the rest
    platt = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000).fit(  # C: practically no penalty
        np.concatenate([x, x])[:, None], np.repeat([1, 0], len(y)),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]))
    slope, intercept = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    if slope <= 1e-6:
        return 0.0, 1.0  # higher logits do not mean more AF
    return float(centre - spread * intercept / slope), float(slope / spread)  # even odds: slope * x + intercept = 0


def submission_probabilities(logits, threshold=0.0, scale=1.0):
    """Two columns (no AF, AF) from logits, shifted so that the logit `threshold` becomes p = 0.5.

    Strictly monotone in both columns: a ramp of 1e-9 over the ranks keeps logits apart that a sigmoid would tie.
    """
    values, place = np.unique(np.ravel(logits).astype(np.float64), return_inverse=True)
    if np.isnan(values).any() or not np.isfinite(threshold) or not 0 < scale < np.inf:
        raise ValueError(f"a logit is NaN, or threshold {threshold} and scale {scale} are not finite (scale: above 0)")
    z = np.clip(scale * (values - threshold), -20, 20)  # sigmoid(-20) is 2e-9: the ramp fits below it
    rank, below, up_to = np.arange(len(values)), np.sum(values < threshold), np.sum(values <= threshold)
    ramp = np.where(values > threshold, rank - up_to + 1, rank - below)  # ... -2, -1, (0: at the threshold), 1, 2 ...
    af = (to_probability(z) + 1e-9 * ramp / len(values))[place.ravel()]
    return np.column_stack([1 - af, af])


# ==== Run training: fit, load, resume ====
def fit(model, traces, targets, train_exams, valid_exams, *, epochs, lr, device, run_dir, augment=None, seed=42,
        batch_size=32, optimizer=torch.optim.Adam, scheduler=None, loss_function=None, ema_decay=None,
        select="valid_loss", data="", verbose=True):
    """Train with validation each epoch and keep the best weights; a killed run resumes to the same numbers.

    The run lives in `run_dir`/<digest of all that its result depends on>: a finished one is loaded, an edit makes
    another one. What has no digest (a generator, an open file) is trained anew each time.

    Parameters
    ----------
    train_exams, valid_exams : positions in `traces` (exams, 4096, 8) and `targets` (0/1); repeated: oversampled
    optimizer : called as optimizer(parameters, lr=lr), for instance functools.partial(AdamW, weight_decay=0.01)
    scheduler : called as scheduler(optimizer, number of batches in all), stepped after each batch; a ReduceLROnPlateau
        once per epoch instead, with the validation loss, or with AUROC where its mode is "max"
    loss_function : mean loss of (logits, targets); None: cross-entropy in which both classes weigh the same
    ema_decay : validate and keep a moving average of the weights with this decay per step
    select : whose best epoch is kept: "valid_loss", "auroc", "ap", "f1", "accuracy", or "last"
    data : text that says which data `traces` hold, for instance `data_fingerprint`

    Returns the history (dict of lists, a value per epoch). `model` holds the kept weights afterwards.
    """
    targets, train_exams, valid_exams = map(np.asarray, (targets, train_exams, valid_exams))
    if train_exams.dtype.kind != "i" or valid_exams.dtype.kind != "i":  # a mask would pass for exams 0 and 1
        raise ValueError("train_exams and valid_exams must be positions (np.flatnonzero makes them of a mask)")
    arguments = dict(locals())
    for name in ("traces", "device", "run_dir", "verbose"):  # a run made on a GPU is the same run
        del arguments[name]
    if getattr(loss_function, "reduction", "mean") != "mean":
        raise ValueError("the loss function must be the mean over the batch (reduction='mean')")
    if epochs < 1 or select not in ("valid_loss", *METRICS, "last"):
        raise ValueError(f"epochs must be at least 1, and select one of valid_loss, {', '.join(METRICS)}, last")
    model.train().to(device)
    exams = np.concatenate([train_exams, valid_exams])  # of these, at most 200 stand for the data
    probe = torch.stack([traces[int(i)][::16] for i in exams[::1 + len(exams) // 200]])
    try:
        folder = Path(run_dir) / identity(fit, arguments, probe)
    except Exception as error:  # TypeError; foreign objects raise what they like
        print(f"{run_dir}: trained anew and not reused later, because {error}.", flush=True)
        folder = Path(run_dir) / f"once-{uuid.uuid4().hex[:8]}"
    state = _load_run(folder)
    if state.get("finished"):
        print(f"{Path(run_dir).name}: {epochs} epochs, loaded", flush=True)
    else:
        state = _run_epochs(model, traces, state, folder, types.SimpleNamespace(**arguments), device, verbose)
    model.load_state_dict(state["best"])
    return state["history"]


def _load_run(folder):
    """State of a run after its last whole epoch; empty where there is none."""
    file = folder / "run.pt"
    if not file.exists():
        return {}
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip():  # torch does not look at the checksums
                raise ValueError("wrong checksum")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch raise many types for a damaged file
        print(f"{file} is damaged ({error}): this run starts again.", flush=True)
        return {}


# ==== Run training: the epoch loop ====
def _run_epochs(model, traces, state, folder, want, device, verbose):
    """The epochs of `fit` that `state` does not hold yet; `want`: its arguments. Returns the last state."""
    train_loader = make_loader(traces, want.targets, want.train_exams, want.batch_size, shuffle=True)
    valid_loader = make_loader(traces, want.targets, want.valid_exams, 64)
    loss_function = want.loss_function or weighted_loss(want.targets[want.train_exams])
    if isinstance(loss_function, torch.nn.Module):
        loss_function.to(device)
    parts, after_step = _trained_parts(model, want, want.epochs * len(train_loader))
    kept_model = parts["averaged"].module if "averaged" in parts else model  # validated, and kept where it is best
    history, best = state.get("history", {}), state.get("best")
    for name, part_state in state.get("parts", {}).items():
        parts[name].load_state_dict(part_state)
    for epoch in range(len(history.get("epoch", [])) + 1, want.epochs + 1):
        seed_everything(1_000_003 * want.seed + epoch)  # each epoch has a seed of its own: a resumed run repeats it
        start, lr = time.monotonic(), parts["optimizer"].param_groups[0]["lr"]
        # train, validate, metrics
        train_loss = train_loop(epoch, train_loader, model, parts["optimizer"], loss_function, device,
                                augment=want.augment, after_step=after_step)
        valid_loss, p, y = eval_loop(epoch, valid_loader, kept_model, loss_function, device)
        check_training(train_loss + valid_loss, p, epoch, want.epochs, lr)
        metrics = classification_metrics(y, p, prevalence=0.5)
        row = {"epoch": epoch, "lr": lr, "train_loss": train_loss, "valid_loss": valid_loss,
               **{name: metrics[name] for name in METRICS}, "seconds": time.monotonic() - start}
        for name, value in row.items():
            history.setdefault(name, []).append(value)
        # keep the best weights, step the scheduler, checkpoint, one line
        if best_epoch(history, want.select) == epoch - 1:
            best = {name: value.clone() for name, value in kept_model.state_dict().items()}
        if isinstance(parts.get("scheduler"), ReduceLROnPlateau):
            parts["scheduler"].step(metrics["auroc"] if parts["scheduler"].mode == "max" else valid_loss)
        finished = epoch == want.epochs
        states = {} if finished else {name: part.state_dict() for name, part in parts.items()}
        state = plain({"history": history, "best": best, "parts": states, "finished": finished})
        with whole_file(folder / "run.pt") as file:
            torch.save(state, file)
        if verbose or finished:
            print(f"{folder.parent.name}:", *(f"{name} {value:.4g} " for name, value in row.items()), flush=True)
    return state


# ==== Run training: loss, optimiser and average, checks ====
def weighted_loss(targets):
    """Binary cross-entropy on logits with pos_weight = (no AF) / (AF) of these exams: both classes weigh the same."""
    n_af = np.sum(targets)
    return torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor((len(targets) - n_af) / n_af, dtype=torch.float32))


def _trained_parts(model, want, n_batches):
    """What a checkpoint must restore, by name, and the function to call after each step."""
    parts = {"model": model, "optimizer": want.optimizer(model.parameters(), lr=float(want.lr))}
    if want.scheduler:
        parts["scheduler"] = want.scheduler(parts["optimizer"], n_batches)
    if want.ema_decay:
        parts["averaged"] = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(want.ema_decay), use_buffers=True)

    def after_step():
        if want.scheduler and not isinstance(parts["scheduler"], ReduceLROnPlateau):
            parts["scheduler"].step()
        if want.ema_decay:
            parts["averaged"].update_parameters(model)
    return parts, after_step


def check_training(loss, probability, epoch, epochs, lr):
    """FloatingPointError for a loss that is not finite; a hint where logits of a trained model are probabilities."""
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the loss is not finite in epoch {epoch} (learning rate at its start {lr:.2g}): look for a sqrt, log or "
            "division at zero in model or augmentation (a lead that is off is all zeros), or lower the rate.")
    low, high = to_probability([0.1, 0.9])  # outputs of a sigmoid, taken for logits, give p from 0.5 to 0.73
    if epoch == epochs and 0.5 <= probability.min() < low and high < probability.max() <= to_probability(1):
        print("All logits lie between 0 and 1, near both ends: does the model end in a sigmoid? Return logits.")


def best_epoch(history, select="valid_loss"):
    """Index of the epoch whose weights are kept: lowest loss, highest other metric, or the last."""
    values = np.nan_to_num(history["epoch" if select == "last" else select])  # NaN: one class; last: highest epoch
    return int(values.argmin() if select.endswith("loss") else values.argmax())


# ==== Uncertainty: bootstrap over patients ====
def balanced_scores(truth, logits, threshold, weights):
    """AUROC, AP and F1, (3,), as if half of the exams had AF; an exam counts `weights` times. NaN: only one class."""
    if len(np.unique(truth[weights > 0])) < 2:
        return np.full(3, np.nan)
    fpr, recall, cuts = sk.roc_curve(truth, logits, sample_weight=weights, drop_intermediate=False)
    precision = recall[1:] / (recall[1:] + fpr[1:])  # one AF exam, one other: TP = recall, FP = fpr, FN = 1 - recall
    at = np.sum(cuts > threshold) - 1  # cuts fall from infinity: the last one above the threshold
    f1 = 2 * recall[at] / (1 + recall[at] + fpr[at])  # 2 TP / (2 TP + FP + FN)
    return np.array([sk.auc(fpr, recall), np.sum(np.diff(recall) * precision), f1])


def patient_bootstrap(truth, logits, patients, threshold=0.0, rounds=1000, seed=42):
    """`balanced_scores` of these exams (3,) and of draws of their patients with replacement (rounds, 3).

    The same patients and seed give the same draws: those of two models are paired, subtract them.
    """
    truth, rng, draws = np.asarray(truth), np.random.default_rng(seed), []
    people, patient = np.unique(patients, return_inverse=True)
    for _ in range(rounds):
        drawn = rng.integers(len(people), size=len(people))
        times = np.bincount(drawn, minlength=len(people))[patient]  # how often each exam is drawn
        draws.append(balanced_scores(truth, logits, threshold, times))
    return balanced_scores(truth, logits, threshold, np.ones(len(truth))), np.array(draws)


# ==== Leaderboard: register and submit ====
class LeaderboardError(RuntimeError):
    """The leaderboard refused or was not reached: `.status` (None if not reached), `.reason` (its words)."""

    def __init__(self, message, status=None, reason=""):
        super().__init__(message)
        self.status, self.reason = status, reason


class Secret(str):
    """A text whose `repr` hides it: neither a cell's output nor a verbose traceback shows it."""

    def __repr__(self):
        return "'***'"


def register_team(team_id, password, host=DEFAULT_HOST, *, demo=False):
    """Register a team (again with the same password: harmless); returns the response. Errors: see `submit`."""
    password = Secret(password or "")
    team_id = check_team(team_id, password, host, demo)
    return _call("PUT", host, "register", team_id, password)


def submit(team_id, password, prediction, note, host=DEFAULT_HOST, *, n_exams=None, demo=False, replace=True,
           directory="submissions"):
    """Save a submission in `directory`, then send it; returns the response (201 new, 200 replaced).

    `prediction`: (exams, 2), no AF and AF, in the order of RECORDS.txt. `replace=False` refuses within 24 hours of an
    accepted one. ValueError: nothing was sent. LeaderboardError: the server refuses or is not reached.
    """
    password = Secret(password or "")
    team_id = check_team(team_id, password, host, demo)
    if not (note or "").strip() or len(note) > 20:
        raise ValueError(f"the note must have 1 to 20 characters, not {note!r}")
    table, now = check_prediction(prediction, n_exams), datetime.now(timezone.utc)
    earlier = accepted_submissions(team_id, host, directory)["time"].tolist()[-1:]
    if not replace and earlier and now - datetime.fromisoformat(earlier[0]) < timedelta(hours=24):
        raise ValueError(f"not sent: one was accepted at {earlier[0][:16]} (UTC), and a second one of the same day "
                         "replaces it; wait a day, or set LEADERBOARD_REPLACE to 1")
    saved = {"time": now.isoformat(), "host": host.rstrip("/"), "team": team_id, "note": note,
             "digest": identity(table), "status": None, "reason": "no answer yet", "prediction": table}
    path = Path(directory) / f"{now:%Y-%m-%dT%H%M%S.%f}.json"
    write_json(path, saved)
    try:
        answer = _call("PUT", host, "leaderboard", team_id, password, {"prediction": table.tolist(), "note": note})
        saved.update(status=answer.status_code, reason=answer.text[:300])
        return answer
    except LeaderboardError as error:
        saved.update(status=error.status, reason=error.reason)
        raise
    finally:
        try:
            write_json(path, saved)
        except OSError as error:  # a full disk: the server's answer still stands
            print(f"{path} could not be written ({error}): make room; look at the leaderboard before you send again.")


def check_team(team_id, password, host, demo=False):
    """The team id without blanks around it; ValueError for what the server would accept but cannot be meant."""
    team_id = (team_id or "").strip()  # "group_7 " would be a new team there
    if not 1 <= len(team_id) <= 20 or ":" in team_id or password == "":
        raise ValueError(f"the team id {team_id!r} must have 1 to 20 characters and no ':', the password at least one")
    if "@" in host or not host.startswith(("http://", "https://")):
        raise ValueError("LEADERBOARD_HOST must start with http:// or https:// and hold no name or password")
    if demo and urlsplit(host).hostname not in ("localhost", "127.0.0.1"):
        raise ValueError("these are predictions of demo data: they go to a rehearsal server on this machine only")
    return team_id


# ==== Leaderboard: checks, what was sent, what was published ====
def check_prediction(prediction, n_exams=None):
    """The prediction as an array (exams, 2); ValueError for what must not be sent."""
    table = np.asarray(prediction, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 2 or len(table) != (n_exams or len(table)):
        raise ValueError(f"the prediction must have shape ({n_exams or 'exams'}, 2), not {table.shape}")
    if not (np.isfinite(table).all() and (table >= 0).all() and np.allclose(table.sum(axis=1), 1, atol=1e-6)):
        raise ValueError("every row must be two probabilities that sum to 1")
    if len(set(table[:, 1] > 0.5)) < 2:
        raise ValueError("all predictions are on one side of 0.5: too few epochs, or a sigmoid twice?")
    return table


def accepted_submissions(team_id, host=DEFAULT_HOST, directory="submissions"):
    """Table of what `submit` saved and the server accepted: file, time (UTC), note, digest, scores, day of reading."""
    columns = ["file", "time", "host", "team", "note", "digest", "status", "reason", "scores", "read"]
    rows = [{"file": path, **json.loads(read_text(path))} for path in sorted(Path(directory).glob("*.json"))]
    sent = pd.DataFrame(rows, columns=columns)
    ours = (sent["team"] == team_id.strip()) & (sent["host"] == host.rstrip("/")) & sent["status"].isin([200, 201])
    return sent[ours].reset_index(drop=True)


def published_scores(team_id, host=DEFAULT_HOST, directory="submissions"):
    """The team's rows of the public page, newest last: note, accuracy, f1, auc, ap (NaN while "TBC").

    A score is also kept in the saved submission with its note, if that note was accepted once only.
    """
    team_id = check_team(team_id, None, host)
    page, rows = _call("GET", host, "leaderboard").text, []  # it holds JavaScript: {team: '...', note: '...', ...}
    for row in re.findall(r"\{\s*(team:\s*'[^']*'(?:,\s*\w+:\s*'[^']*')*),?\s*\}", page):
        rows.append({name: html.unescape(value) for name, value in re.findall(r"(\w+):\s*'([^']*)'", row)})
    table = pd.DataFrame(rows, columns=["team", "note", "acc", "f1", "auc", "ap"]).rename(columns={"acc": "accuracy"})
    table = table[table["team"] == team_id].drop(columns="team").reset_index(drop=True)
    table = table.assign(**table.drop(columns="note").apply(pd.to_numeric, errors="coerce"))
    for _, sent in accepted_submissions(team_id, host, directory).drop_duplicates("note", keep=False).iterrows():
        row = table[table["note"] == sent["note"]].drop(columns="note").dropna()
        if len(row) == 1:
            found = {"scores": row.iloc[0].to_dict(), "read": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
            write_json(sent["file"], {**json.loads(read_text(sent["file"])), **found})
    return table


def _call(method, host, path, team_id="", password="", content=None):
    """The answer of the leaderboard; LeaderboardError, with its own words, for everything but success."""
    url = f"{host.rstrip('/')}/{path}"
    problem = None
    try:
        answer = requests.request(method, url, json=content, timeout=(10, 60), allow_redirects=False,
                                  auth=(team_id.encode("utf-8"), password.encode("utf-8")))
    except BaseException as error:  # a new one is raised below: the traceback of this one holds the password
        problem = type(error)
    if problem is KeyboardInterrupt:
        raise KeyboardInterrupt
    if problem:
        raise LeaderboardError(f"{url} was not reached ({problem.__name__}): look at its page, then send again.")
    if answer.status_code in (200, 201):
        return answer
    words = re.search(r"<p>(.*?)</p>", answer.text, flags=re.S)  # of its HTML error page
    reason = html.unescape(words[1] if words else answer.text).strip()[:300] or answer.reason
    raise LeaderboardError(f"{url} answered {answer.status_code}: {reason}", answer.status_code, reason)
