"""Reusable parts of the AF assignment: data, preprocessing, training, metrics, leaderboard.

The notebook tells the story and holds the models and figures. The order here is the data's way:
fetch_codesubset > build_h5 > load_labels, split_by_patient > fit (train_loop, eval_loop) > predict >
classification_metrics, balanced_threshold > submission_probabilities > submit. Everything is written beside its
place and renamed when whole, so that a killed run leaves nothing that a later run could take as complete.
"""
import hashlib
import html
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tarfile
import time
import zipfile
from collections import Counter
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import h5py
import numpy as np
import pandas as pd
import requests
import torch
import wfdb
from requests.adapters import HTTPAdapter
from scipy import signal as dsp
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score
from tqdm import tqdm
from urllib3.util import Retry

LEADS = ("DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6")  # order of the last axis of `tracings`
SAMPLE_RATE = 400  # Hz, after preprocessing
N_SAMPLES = 4096   # samples an exam, after preprocessing: 10.24 s

COURSE_MIRRORS = (
    "https://www.dropbox.com/s/9zkqa5y5jqakdil/codesubset.tar.gz?dl=1",
    "https://drive.usercontent.google.com/download?id=1zg2WoSbu6-5980X9hnpxDkZTwkYDbDdH&export=download&confirm=t",
)
DEFAULT_HOST = "http://hyperion.it.uu.se:5050/"


# ---- Small tools: progress as text, whole files only ---------------------------------------------
def progress(iterable, label, total=None, unit="batch"):
    """`iterable` with a bar of plain text, which a saved notebook keeps; none where it takes less than 10 s."""
    return tqdm(iterable, f"  {label}", total, unit=unit, delay=10, mininterval=10, ascii=True, file=sys.stdout)


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it to `path` only if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    """Write `content` as JSON, whole or not at all. NaN and infinity are refused."""
    with whole_file(path) as part:
        part.write_text(json.dumps(content, indent=1, allow_nan=False), encoding="utf-8")


def first_ten(names):
    """'a, b, c' for an error message: at most ten names, then how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


# ---- Data: the course's archive, demo data, a folder or any tar archive --------------------------
def fetch_codesubset(source="course", directory="."):
    """Make a `codesubset/` folder ready (`train/`, `test/` with RECORDS.txt and WFDB pairs, `train.csv`).

    Parameters
    ----------
    source : "course" (downloaded), "demo" (synthetic ECGs, generated here), the path of a `codesubset/` folder
        (returned itself, only read) or of any tar archive of one
    directory : where `codesubset/` (and the downloaded archive) is created, parents too

    Returns the folder's path. FileNotFoundError, ValueError, ConnectionError: what is wrong, what to do.
    """
    target, source = Path(directory) / "codesubset", Path(source).expanduser()
    course, demo = str(source) == "course", str(source) == "demo"
    if source.is_dir() and not (course or demo):
        folder = source / "codesubset" if (source / "codesubset").is_dir() else source
        if _missing_parts(folder):
            raise FileNotFoundError(f"{folder} is no codesubset folder: {', '.join(_missing_parts(folder))} missing.")
        return _announce(folder, "folder used as it is")
    if not (course or demo or source.is_file()):
        raise FileNotFoundError(f"ECG_DATA: {source} does not exist. Give 'course', 'demo' or the path of a codesubset/ "
                                "folder or of a tar archive of one.")
    wanted = str(source) if course or demo else \
        f"archive {source.name}, {source.stat().st_size} bytes, time {source.stat().st_mtime_ns}"
    if not _missing_parts(target) and (data_origin(target) == wanted or (course and data_origin(target) is None)):
        return _announce(target, "ready from an earlier run")
    _refuse_foreign(target)
    if demo:
        return make_demo_codesubset(directory)
    if not course:
        return _extract(source, target, wanted)
    archive = Path(directory) / "codesubset.tar.gz"
    for attempt in (1, 2):
        try:
            return _extract(archive if archive.exists() else download(COURSE_MIRRORS, archive), target, wanted)
        except ValueError as error:
            archive.unlink()
            if attempt == 2:
                raise
            print(f"{error}\nThe file is removed and downloaded again.", flush=True)


def _missing_parts(folder, parts=("train/RECORDS.txt", "test/RECORDS.txt", "train.csv")):
    return [part for part in parts if not (folder / part).is_file()]


def data_origin(folder):
    """What a complete `codesubset/` that was made here came from; None where nothing says so."""
    try:
        return json.loads((folder / "origin.json").read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, KeyError):
        return None


def _announce(folder, how):
    counts = {split: len(read_records(folder / split / "RECORDS.txt")) for split in ("train", "test")}
    print(f"Data: {folder} ({how}): {counts['train']:,} training and {counts['test']:,} test exams.", flush=True)
    return folder


def _refuse_foreign(target):
    if data_origin(target) is None and any(file.suffix not in (".h5", ".part") for file in target.glob("*")):
        raise ValueError(f"{target} holds files that were not put there by this notebook. Move the folder away, give "
                         "its path as ECG_DATA, or choose another ECG_WORK.")


@contextmanager
def _whole_codesubset(target, origin):
    """Yield a path for a new `codesubset/`; it takes the place of `target` if the block ends well."""
    part = target.with_name("codesubset.part")
    shutil.rmtree(part, ignore_errors=True)  # what a killed run left
    part.mkdir(parents=True)
    try:
        yield part / "codesubset"
        write_json(part / "codesubset" / "origin.json", {"origin": origin})
        if target.exists():
            print(f"{target} came from other data ({data_origin(target)}): it is replaced.", flush=True)
            os.replace(target, part / "old")
        os.replace(part / "codesubset", target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def download(urls, path, timeout=(10, 60), attempts=4):
    """Download the first of `urls` that serves a gzip archive to `path`; resume an earlier attempt.

    The data go to `<path>.part`, renamed when its length is what the server announced. A cut connection, 429 and
    5xx are tried `attempts` times; a server without HTTP ranges starts anew. ConnectionError: no mirror served it.
    """
    path, failures = Path(path), []
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        server = urlsplit(url).netloc
        for attempt in range(attempts):
            try:
                _download_once(url, server, part, timeout)
                os.replace(part, path)
                return path
            except (requests.RequestException, ValueError) as error:
                failures.append(f"{server}: {error}")
                print(f"  {failures[-1]}", flush=True)
                if not isinstance(error, requests.RequestException):
                    break  # the answer itself is wrong: asking again would not help
                time.sleep(min(0.5 * 2 ** attempt, 5))  # the connection: continue where it stopped
    raise ConnectionError(
        f"No mirror served {path.name}:\n  " + "\n  ".join(dict.fromkeys(failures)) + f"\nBy hand: open {urls[0]} in a "
        f"browser, put the file at {path} and run this cell again (in Colab: folder symbol on the left, then upload).")


def _download_once(url, server, part, timeout):
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code == 416:  # nothing beyond what we have: start again
            part.unlink()
        if answer.status_code in (416, 429) or answer.status_code >= 500:
            raise requests.ConnectionError(f"HTTP {answer.status_code} {answer.reason}")
        if answer.status_code not in (200, 206):
            raise ValueError(f"HTTP {answer.status_code} {answer.reason}")
        have = have if answer.status_code == 206 else 0
        blocks = answer.iter_content(1 << 20)
        first = next(blocks, b"")
        if not have and first[:2] != b"\x1f\x8b":
            raise ValueError(f"sent no gzip archive but {answer.headers.get('Content-Type')} (a sign-in page?)")
        length = answer.headers.get("Content-Length")
        total = int(length) + have if length else None
        print(f"Downloading from {server}: {f'{total / 2**20:.0f} MiB' if total else 'unknown size'}"
              f"{f', continuing at {have / 2**20:.0f} MiB' if have else ''} ...", flush=True)
        with open(part, "ab" if have else "wb") as file:
            file.write(first)
            for block in progress(blocks, "download", total=total and (total - have) >> 20, unit="MiB"):
                file.write(block)
    if total is not None and part.stat().st_size != total:
        raise requests.ConnectionError(f"connection cut at {part.stat().st_size:,} of {total:,} bytes")


def _extract(archive, target, origin):
    """Extract the `codesubset/` of a tar archive to `target`, safely (tarfile's data filter) and whole."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(f"Python {sys.version.split()[0]} cannot extract archives safely: use Python "
                           "3.10.12, 3.11.4 or newer.")
    print(f"Extracting {archive} ...", flush=True)

    def wanted(tar):
        for member in progress(tar, "extract", unit=" files"):
            member.name = re.sub(r"^(\./)+", "", member.name)
            if member.name.split("/")[0] == "codesubset":
                yield member

    try:
        with _whole_codesubset(target, origin) as folder:
            with tarfile.open(archive) as tar:
                tar.extractall(folder.parent, members=wanted(tar), filter="data")
                while tar.fileobj.read(1 << 20):  # to the end, where gzip and xz keep their checksums
                    pass
            if missing := _missing_parts(folder) or _missing_parts(folder, [
                    f"{split}/{name}{suffix}" for split in ("train", "test")
                    for name in read_records(folder / split / "RECORDS.txt") for suffix in (".hea", ".dat")]):
                raise ValueError(f"not inside: {first_ten(missing)}")
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is refused: {error}. It did not come from the course.") from error
    except Exception as error:  # tarfile, gzip, bz2 and xz raise many types for a damaged file
        if isinstance(error, OSError) and error.errno:  # disk full, no permission: not the archive's fault
            raise
        raise ValueError(f"{archive} is damaged or no codesubset archive ({error}). Fetch it again.") from error
    return _announce(target, "extracted")


def make_demo_codesubset(directory, n_train=240, n_test=80, seed=0):
    """Write synthetic ECGs as real WFDB files in the course's layout, in some seconds.

    30 % AF in train, 50 % in test, several exams for some patients, no patient in both. Returns the path of
    `directory/codesubset`; its SYNTHETIC.txt marks it. `directory/test_labels.csv` is for tests only.
    """
    rng, directory = np.random.default_rng(seed), Path(directory)
    _refuse_foreign(directory / "codesubset")
    print(f"Generating {n_train + n_test} synthetic ECGs ...", flush=True)
    with _whole_codesubset(directory / "codesubset", "demo") as part:
        for split, n, af_share, first in (("train", n_train, 0.3, 100_000), ("test", n_test, 0.5, 500_000)):
            (part / split).mkdir(parents=True)
            af = rng.permutation(np.arange(n) < round(af_share * n)).astype(int)
            ids = rng.permutation(first + np.arange(n))  # record order is not the table's order
            patients = first // 10 + np.where(af, 0, n) + rng.integers(0, max(1, int(0.8 * n)), n)
            for exam, label in progress(list(zip(ids, af)), "generate", unit="exam"):
                rate, seconds = int(rng.choice([300, 400, 500, 600])), rng.uniform(7.2, 10.2)
                wfdb.wrsamp(f"TNMG{exam}", fs=rate, units=["mV"] * 8, sig_name=list(LEADS), fmt=["16"] * 8,
                            p_signal=_synthetic_ecg(rng, label, rate, seconds).T, write_dir=str(part / split),
                            adc_gain=[1000.0] * 8, baseline=[0] * 8)
            (part / split / "RECORDS.txt").write_text("".join(f"TNMG{exam}\n" for exam in ids))
            age, sex = np.clip(rng.normal(55 + 15 * af, 12), 18, 99), rng.choice(["F", "M"], n, p=[0.63, 0.37])
            table = pd.DataFrame({"id_exam": ids, "id_patient": patients, "age": age.astype(int), "sex": sex, "AF": af,
                                  "date_exam": "2014-01-01"}).sort_values("id_exam")
            with whole_file(part / "train.csv" if split == "train" else directory / "test_labels.csv") as file:
                table.to_csv(file, index=False)
        (part / "SYNTHETIC.txt").write_text("Generated ECGs: they prove that code runs, never that a model is good.\n")
    return _announce(directory / "codesubset", "synthetic, generated")


def _synthetic_ecg(rng, af, rate, seconds):
    """One synthetic exam, (8, samples) in mV: Gaussian waves at each beat, noise, drift, 60 Hz mains."""
    t = np.arange(int(rate * seconds)) / rate
    mean_rr = rng.uniform(0.5, 0.95) if af else rng.uniform(0.6, 1.1)
    rr = mean_rr * (np.exp(rng.normal(0, 0.2, 40)) if af else 1 + rng.normal(0, 0.02, 40))
    if not af and rng.random() < 0.3:  # premature beats: irregular, but P waves remain
        early = rng.integers(2, 12)
        rr[early:early + 2] = mean_rr * np.array([0.65, 1.35])
    beats = np.cumsum(rr) - rng.uniform(0, mean_rr)
    leads = rng.normal(1, 0.15, 8)
    waves = [  # offset from R (s), width (s), amplitude in DI DII V1 ... V6 (mV)
        (-0.16, 0.020, [0.08, 0.13, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08]),  # P, absent in AF
        (-0.03, 0.010, [-0.05, -0.08, 0.0, 0.0, -0.05, -0.10, -0.10, -0.08]),
        (0.0, 0.012, [0.6, 1.0, 0.2, 0.5, 0.9, 1.3, 1.2, 0.9]),
        (0.03, 0.014, [-0.1, -0.2, -0.9, -1.1, -0.7, -0.4, -0.2, -0.1]),
        (0.26, 0.045, [0.2, 0.3, 0.1, 0.4, 0.5, 0.5, 0.4, 0.3])]
    ecg = np.zeros((8, len(t)))
    for offset, width, amplitude in waves[1:] if af else waves:
        shape = np.exp(-0.5 * ((t - beats[:, None] - offset) / width) ** 2).sum(axis=0)
        ecg += (leads * amplitude)[:, None] * shape
    if af:  # fibrillatory waves, 4-9 Hz, largest in V1
        wave = np.sin(2 * np.pi * (rng.uniform(4, 9) * t + 0.3 * np.sin(2 * np.pi * 0.7 * t)))
        ecg += rng.uniform(0.02, 0.08) * np.array([0.5, 0.8, 1.5, 1, 0.7, 0.6, 0.5, 0.5])[:, None] * wave
    drift = rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * (rng.uniform(0.1, 0.4) * t + rng.random((8, 1))))
    mains = rng.uniform(0, 0.06) * np.sin(2 * np.pi * 60 * t + rng.random((8, 1)))
    return ecg + drift + mains + rng.normal(0, rng.uniform(0.01, 0.04), ecg.shape)


# ---- Preprocessing: WFDB records to HDF5 ---------------------------------------------------------
def read_records(records_file):
    """Record names of a RECORDS.txt, in order. Empty or repeated names: ValueError."""
    records_file = Path(records_file)
    names = records_file.read_text(encoding="utf-8-sig").split()
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names or repeated:
        raise ValueError(f"{records_file} " + (f"repeats {first_ten(repeated)}" if names else "lists no record"))
    return names


PREPROCESSING = f"{SAMPLE_RATE} Hz, {N_SAMPLES} samples, baseline removed, 60 Hz removed, {' '.join(LEADS)}"
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"  # of the worker processes
_HEADER = re.compile(r"\S+ (\d+) (\d+(?:\.\d+)?) (\d+)")
_SIGNAL = re.compile(r"(\S+) 16 ([1-9][\d.]*)\((-?\d+)\)/mV \d+ -?\d+ -?\d+ -?\d+ 0 (\S+)")


def read_ecg(path):
    """Read one WFDB record; `path` without suffix.

    Returns signal (leads, samples) float64 in mV, NaN where a sample is marked as invalid; sample_rate, Hz; leads,
    names as in the header. ValueError, naming the record: a file is missing, truncated or not readable.
    """
    try:
        signal, rate, leads = _read_plain_record(path) or _read_any_record(path)
    except Exception as error:  # wfdb raises many types for a broken header: all mean the same here
        raise ValueError(f"record {path}: cannot be read ({type(error).__name__}: {error}). "
                         "Extract the archive again.") from error
    return signal, int(rate) if float(rate).is_integer() else float(rate), leads


def _read_plain_record(path):
    """The commonest form (one .dat, format 16, mV) without wfdb's slow header parser; None for any other."""
    lines = [line.strip() for line in Path(f"{path}.hea").read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    head = _HEADER.fullmatch(lines[0]) if lines else None
    specs = [_SIGNAL.fullmatch(line) for line in lines[1:]]
    if not head or not all(specs) or len(specs) != int(head[1]) or len({s[1] for s in specs}) != 1:
        return None
    n_leads, n_samples = len(specs), int(head[3])
    digital = np.fromfile(Path(path).parent / specs[0][1], dtype="<i2", count=n_leads * n_samples)
    if len(digital) < n_leads * n_samples or n_samples == 0:
        raise ValueError(f"{specs[0][1]} is truncated: {len(digital) // n_leads} of {n_samples} samples")
    digital = np.ascontiguousarray(digital.reshape(n_samples, n_leads).T)
    gain, baseline = (np.array([float(s[i]) for s in specs])[:, None] for i in (2, 3))
    signal = (digital - baseline) / gain
    np.putmask(signal, digital == -32768, np.nan)  # WFDB's mark of an invalid sample
    return signal, float(head[2]), [s[4] for s in specs]


def _read_any_record(path):
    record = wfdb.rdrecord(str(path))
    to_mv = [{"mv": 1.0, "uv": 1e-3}[unit.lower()] for unit in record.units]  # no V: wfdb reads µV as V
    return record.p_signal.T * np.array(to_mv)[:, None], record.fs, record.sig_name


def order_leads(signal, leads):
    """The eight leads in the order of LEADS, (8, samples); I/II are accepted for DI/DII, in any case."""
    alias = {"I": "DI", "II": "DII"}
    names = [alias.get(name.strip().upper(), name.strip().upper()) for name in leads]
    if missing := [lead for lead in LEADS if lead not in names]:
        raise ValueError(f"lead {', '.join(missing)} missing; the record has {', '.join(leads)}")
    return np.asarray(signal, dtype=np.float64)[[names.index(lead) for lead in LEADS]]


def fill_gaps(signal):
    """Interpolate NaN samples within each lead, (leads, samples); a lead without a finite sample is zero."""
    if np.isfinite(signal).all():
        return signal
    if not np.isfinite(signal).any():
        raise ValueError("no lead has a finite sample")
    signal, t = signal.copy(), np.arange(signal.shape[1])
    for lead in signal:
        good = np.isfinite(lead)
        lead[~good] = np.interp(t[~good], t[good], lead[good]) if good.any() else 0.0
    return signal


@lru_cache(maxsize=32)
def baseline_filter(sample_rate, pass_edge=0.8, stop_edge=0.2, ripple=0.5, attenuation=40.0):
    """Elliptic high-pass as second-order sections (FACTS 2.1): edges in Hz, ripple, attenuation in dB."""
    order, edge = dsp.ellipord(pass_edge, stop_edge, ripple, attenuation, fs=sample_rate)
    return dsp.iirfilter(order, edge, ripple, attenuation, btype="high", ftype="ellip", output="sos", fs=sample_rate)


@lru_cache(maxsize=32)
def mains_filter(sample_rate, powerline=60, quality=30):
    """Notch at `powerline` Hz as transfer function (b, a) (FACTS 2.2)."""
    return dsp.iirnotch(powerline, quality, fs=sample_rate)


low_pass_filter = lru_cache(maxsize=32)(dsp.firwin)  # `resample_poly` would design its own anew for each exam


def preprocess_ecg(signal, sample_rate, leads, new_freq=SAMPLE_RATE, new_len=N_SAMPLES, remove_baseline=True,
                   powerline=60):
    """Bring one exam to the form that all models read; equals github.com/antonior92/ecg-preprocessing to 1e-6 mV.

    Parameters
    ----------
    signal : array (leads, samples), mV
    sample_rate : number, Hz
    leads : names of the rows of `signal`; more than the eight are dropped
    new_freq, new_len : rate (Hz) and length (samples) of the result, zero-padded or cropped, centred
    powerline : mains frequency to remove (Hz); None, or one beyond half the sample rate, skips the step

    Returns ndarray (8, new_len), float64, mV, in the order of LEADS. Raises ValueError: a lead missing, no
    finite sample, rate outside 50-5000 Hz, shorter than one second.
    """
    if not 50 <= sample_rate <= 5000:
        raise ValueError(f"sample rate {sample_rate} Hz is outside 50-5000 Hz")
    ecg = fill_gaps(order_leads(signal, leads))
    if ecg.shape[1] < sample_rate:
        raise ValueError(f"only {ecg.shape[1]} samples, less than one second")
    if remove_baseline:
        ecg = dsp.sosfiltfilt(baseline_filter(sample_rate), ecg, padtype="constant")
    if powerline and powerline < sample_rate / 2:
        ecg = dsp.filtfilt(*mains_filter(sample_rate, powerline), ecg)
    ratio = Fraction(new_freq) / Fraction(str(sample_rate)).limit_denominator(1000)
    if ratio != 1:
        up, down, rate = ratio.numerator, ratio.denominator, max(ratio.numerator, ratio.denominator)
        window = low_pass_filter(20 * rate + 1, 1 / rate, window=("kaiser", 5.0))  # as its default
        ecg = dsp.resample_poly(ecg, up, down, axis=1, window=window)
    surplus = max(0, ecg.shape[1] - new_len) // 2
    ecg = ecg[:, surplus:surplus + new_len]
    padded, front = np.zeros((len(ecg), new_len)), (new_len - ecg.shape[1]) // 2
    padded[:, front:front + ecg.shape[1]] = ecg
    return padded


def _prepare_record(job):
    """Worker of `build_h5`: write one tracing to its place in the file; (remarks, None), or ([], error text)."""
    path, h5_file, place = job
    try:
        signal, rate, leads = read_ecg(path)
        raw = order_leads(signal, leads)
        finite, filled = np.isfinite(raw), fill_gaps(raw)
        tracing = preprocess_ecg(filled, rate, LEADS).astype("<f4").T
        with open(h5_file, "r+b") as file:  # its own place in the file: nothing goes through a pipe
            file.seek(place)
            file.write(tracing.tobytes())
        live = finite.any(axis=1)  # leads with at least one finite sample
        notes = {"NaN samples interpolated": not finite[live].all(),
                 "a lead without finite samples set to zero": not live.all(),
                 "a flat lead kept": (filled[live, :1] == filled[live]).all(axis=1).any(),
                 "60 Hz filter skipped (rate too low)": rate <= 120}
        return [note for note, applies in notes.items() if applies], None
    except ValueError as error:
        return [], f"record {path}: {str(error).removeprefix(f'record {path}: ')}"


def _prepare_records(jobs):
    return [_prepare_record(job) for job in jobs]


def _from_pool(pool, jobs, workers, patience=120):
    """Results in order; a pool whose worker was killed would wait for ever, so wait `patience` seconds at most."""
    size = min(16, len(jobs) // workers)  # handing the jobs over one by one, all would take a third longer
    portions = [jobs[i:i + size] for i in range(0, len(jobs), size)]
    results = pool.imap(_prepare_records, portions)
    for portion in portions:
        try:
            yield from results.next(timeout=patience)
        except multiprocessing.TimeoutError:
            raise RuntimeError(f"no answer for record {portion[0][0]} and the next in {patience} s: was a worker process "
                               "killed (out of memory)? Run the cell again, or call build_h5 with workers=1.") from None


def data_fingerprint(records_file):
    """Digest of the records' names, headers (with their checksums) and .dat sizes: which data is this?"""
    digest, folder = hashlib.sha256(), Path(records_file).parent
    for name in read_records(records_file):
        for suffix, content in ((".hea", Path.read_bytes), (".dat", lambda file: str(file.stat().st_size).encode())):
            file = folder / (name + suffix)
            digest.update(f"{name}{suffix}\n".encode() + (content(file) if file.is_file() else b"missing"))
    return digest.hexdigest()[:16]


def h5_problem(h5_file, fingerprint, n_exams):
    """Why `h5_file` is not the finished result for these records (one sentence), or None if it is."""
    try:
        with h5py.File(h5_file, "r") as file:
            said = file.attrs.get("fingerprint"), file.attrs.get("settings"), file["tracings"].shape
            file["tracings"][-1]  # the last exam can be read
    except Exception as error:  # h5py raises many types for a foreign or damaged file
        return f"cannot be read ({error})"
    if said[1] != PREPROCESSING or said[2] != (n_exams, N_SAMPLES, len(LEADS)):
        return f"has other contents (shape {said[2]}, settings {said[1]})"
    return None if said[0] == fingerprint else "was made from other records"


def build_h5(records_file, h5_file, workers=None):
    """Preprocess the records beside a RECORDS.txt into an HDF5 file, in parallel; a finished one is kept.

    Parameters
    ----------
    h5_file : path to write: dataset `tracings` (exams, 4096, 8) float32 in mV, order of RECORDS.txt
    workers : processes; default: one a core. 1 works in this process.

    Returns the path. Raises ValueError naming every bad record (the first ten, and how many); no file is left then.
    """
    records_file, h5_file = Path(records_file), Path(h5_file)
    names, fingerprint = read_records(records_file), data_fingerprint(records_file)
    if h5_file.exists():
        problem = h5_problem(h5_file, fingerprint, len(names))
        if problem is None:
            print(f"{h5_file}: {len(names):,} exams, ready from an earlier run.", flush=True)
            return h5_file
        print(f"{h5_file} {problem}: it is built again.", flush=True)
        h5_file.unlink()
    workers = min(workers or os.cpu_count() or 1, len(names))
    print(f"Preprocessing {len(names):,} exams of {records_file.parent} with {workers} process(es) ...", flush=True)
    start, remarks, bad = time.monotonic(), Counter(), []
    pool = multiprocessing.get_context(START_METHOD).Pool(workers) if workers > 1 else nullcontext()
    with pool, whole_file(h5_file) as part:
        with h5py.File(part, "w") as file:
            tracings = file.create_dataset("tracings", (len(names), N_SAMPLES, len(LEADS)), "<f4")
            tracings[-1:] = np.zeros((1, N_SAMPLES, len(LEADS)))  # the first write reserves the room of all
            place, size = tracings.id.get_offset(), tracings[-1].nbytes
        jobs = [(str(records_file.parent / name), str(part), place + i * size) for i, name in enumerate(names)]
        results = _from_pool(pool, jobs, workers) if workers > 1 else map(_prepare_record, jobs)
        for notes, error in progress(results, "preprocess", len(names), "exam"):
            remarks.update(notes)
            bad += [error] if error else []
        with h5py.File(part, "r+") as file:
            file.attrs.update(fingerprint=fingerprint, settings=PREPROCESSING)
        if bad:
            raise ValueError(f"{len(bad)} of {len(names):,} records cannot be used, {h5_file.name} was not "
                             "written:\n  " + "\n  ".join(bad[:10]) + ("\n  ..." if len(bad) > 10 else ""))
    seconds = time.monotonic() - start
    print(f"{h5_file}: {len(names):,} exams in {seconds:.0f} s ({len(names) / seconds:.0f} exams/s)."
          + "".join(f"\n  {count} exams: {note}" for note, count in remarks.items()), flush=True)
    return h5_file


# ---- Labels and the split by patient -------------------------------------------------------------
def load_labels(csv_file, records_file):
    """Read the label table in the order of the records (the CSV's own order is another one).

    Returns a DataFrame indexed by id_exam, one row a record: id_patient, age, sex, AF (int 0/1), ...
    Raises ValueError naming the column or the exams: missing, duplicated, or AF not 0/1.
    """
    try:
        table = pd.read_csv(csv_file, encoding="utf-8-sig", skipinitialspace=True)
    except ValueError as error:  # empty, not UTF-8, rows of different lengths
        raise ValueError(f"{csv_file} is no table ({error}). Extract the archive again.") from error
    if missing := [c for c in ("id_exam", "id_patient", "age", "sex", "AF") if c not in table]:
        raise ValueError(f"{csv_file}: column {', '.join(missing)} missing; it has {', '.join(map(str, table))}")
    table["id_exam"] = pd.to_numeric(table["id_exam"], errors="coerce")
    ids = [re.fullmatch(r"(?:.*/)?TNMG(\d+)", name) for name in read_records(records_file)]
    if not all(ids):
        raise ValueError(f"{records_file}: record names must look like TNMG100046")
    ids = [int(match[1]) for match in ids]
    mine = table[table["id_exam"].isin(ids)].astype({"id_exam": "int64"})
    if len(mine) < len(table):
        print(f"{csv_file}: {len(table) - len(mine):,} rows belong to no record and are ignored.", flush=True)
    twice = mine.loc[mine["id_exam"].duplicated(), "id_exam"].unique()
    absent = sorted(set(ids) - set(mine["id_exam"]))
    af = mine["AF"].astype(str).str.strip().str.lower().map({"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1})
    for what, exams in (("appear more than once", twice), ("have no row", absent),
                        ("have an AF that is not 0 or 1", mine.loc[af.isna(), "id_exam"]),
                        ("have no id_patient", mine.loc[mine["id_patient"].isna(), "id_exam"])):
        if len(exams):
            raise ValueError(f"{csv_file}: {len(exams)} exams {what}: {first_ten(exams)}. Mend the table.")
    return mine.assign(AF=af.astype(int)).set_index("id_exam").loc[ids]


def split_by_patient(labels, valid_fraction=0.2, seed=42):
    """Split exams into training and validation so that no patient is on both sides.

    Patients, in random order, go to validation while both classes have room there, which keeps the AF share
    equal on both sides as far as patients allow. Returns train_idx, valid_idx: positions in `labels`.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, not {valid_fraction}")
    patient, af = labels["id_patient"].to_numpy(), labels["AF"].to_numpy()
    names, code = np.unique(patient, return_inverse=True)
    if len(names) < 2:
        raise ValueError("one patient cannot be split: both sides need at least one")
    counts = np.stack([np.bincount(code, af == label, len(names)) for label in (0, 1)], axis=1)
    room = np.floor(valid_fraction * counts.sum(axis=0))
    in_valid = np.zeros(len(names), bool)
    for p in np.random.default_rng(seed).permutation(len(names)):
        if (counts[p] <= room).all():
            in_valid[p], room = True, room - counts[p]
    if not in_valid.any():  # no patient fits whole: take the one with the fewest exams
        in_valid[counts.sum(axis=1).argmin()] = True
    return np.flatnonzero(~in_valid[code]), np.flatnonzero(in_valid[code])


# ---- Training ------------------------------------------------------------------------------------
def pick_device():
    """CUDA, then Apple's MPS, then the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class BatchLoader:
    """Whole batches by index from tracings in memory or on the device: a DataLoader without collation.

    Yields (traces (batch, 4096, 8), targets (batch, 1)) of the exams `indices`, in an order drawn from torch's
    random state with `shuffle`. `traces` is not copied, so train and validation share it.
    """

    def __init__(self, traces, targets, indices, batch_size=32, shuffle=False):
        self.traces, self.batch_size, self.shuffle = traces, batch_size, shuffle
        self.targets = torch.tensor(np.asarray(targets), dtype=torch.float32, device=traces.device).reshape(-1, 1)
        self.indices = torch.tensor(np.asarray(indices))

    def __len__(self):
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.indices)) if self.shuffle else torch.arange(len(self.indices))
        order = self.indices[order].to(self.traces.device)
        for batch in order.tensor_split(len(self)):  # equal sizes: a last batch of few exams would be noise
            yield self.traces[batch], self.targets[batch]


def mixed_precision(device):
    """The type for torch.autocast: bfloat16 or float16 on CUDA as the card allows, None elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def train_loop(epoch, dataloader, model, optimizer, loss_function, device, *, augment=None, scheduler=None,
               averaged=None, scaler=None, amp_dtype=None, max_norm=None):
    """Train `model` for one epoch.

    Parameters
    ----------
    dataloader : yields (traces (batch, 4096, 8), targets (batch, 1))
    loss_function : mean loss of a batch from (logits, targets)
    augment, scheduler, averaged, max_norm : optional: a function of the traces, a scheduler that steps each
        batch, an AveragedModel that follows the weights, a limit to the gradient's norm
    scaler, amp_dtype : GradScaler and autocast type for mixed precision, optional

    Returns the mean loss per exam, float (not the mean of batch means: batches differ in size).
    """
    device, n_exams = torch.device(device), 0
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # without mixed precision it passes everything on
    model.train()
    loss_sum = torch.zeros((), device=device)  # stays on the device: no synchronisation per batch
    for traces, targets in progress(dataloader, f"epoch {epoch}"):
        # 1. a batch, on the device, augmented
        traces, targets = traces.to(device), targets.to(device)
        traces = augment(traces) if augment else traces
        # 2. forward: logits and their loss
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(traces)
        loss = loss_function(logits.float(), targets)
        # 3. backward
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if max_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        # 4. step
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)
        loss_sum += loss.detach() * len(targets)
        n_exams += len(targets)
    return loss_sum.item() / n_exams


@torch.no_grad()
def eval_loop(epoch, dataloader, model, loss_function, device, *, amp_dtype=None):
    """Evaluate `model` without gradients; parameters as in `train_loop`.

    Returns the mean loss per exam (float), the probabilities of AF (n, 1) float64 and the targets (n, 1).
    """
    device = torch.device(device)
    model.eval()
    loss_sum, logits_all, targets_all = torch.zeros((), device=device), [], []
    for traces, targets in progress(dataloader, f"validation {epoch}"):
        traces, targets = traces.to(device), targets.to(device)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            logits = model(traces).float()
        loss_sum += loss_function(logits, targets) * len(targets)
        logits_all.append(logits)
        targets_all.append(targets)
    targets = torch.cat(targets_all).cpu().numpy()
    return loss_sum.item() / len(targets), to_probability(torch.cat(logits_all).cpu().numpy()), targets


def to_probability(logits):
    """The project's one sigmoid, in float64: float32 saturates and would tie the most certain exams."""
    return expit(np.asarray(logits, dtype=np.float64))


@torch.no_grad()
def predict(model, traces, device, batch_size=None, amp_dtype=None, shifts=(0,)):
    """Logits (n,) float64 of `traces`, an h5py dataset, array or tensor (n, 4096, 8), batch by batch.

    `shifts`: samples by which each exam is moved (circularly); the logits are averaged over them.
    """
    device, logits = torch.device(device), []
    batch_size = batch_size or (16 if device.type == "cpu" else 256)  # 16 exams suit a CPU's cache
    model.eval()
    for start in progress(range(0, len(traces), batch_size), "predict"):
        batch = torch.as_tensor(traces[start:start + batch_size]).to(device, torch.float32)
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype is not None):
            moved = [model(batch.roll(shift, 1) if shift else batch).float() for shift in shifts]
        logits.append(torch.stack(moved).mean(dim=0).squeeze(1))
    return torch.cat(logits).cpu().numpy().astype(np.float64)


def best_epoch(history, select="valid_loss"):
    """Index of the epoch whose weights are kept: lowest loss, highest other metric, or the last."""
    if select == "last":
        return len(history["epoch"]) - 1
    values = np.array(history[select], dtype=float)
    return int(np.nanargmin(values) if select.endswith("loss") else np.nanargmax(values))


def fit(model, train_loader, valid_loader, *, optimizer, loss_function, epochs, device, run_dir, scheduler=None,
        augment=None, ema_decay=None, max_norm=None, select="valid_loss", seed=42, settings=None,
        amp_dtype=None, overwrite=False):
    """Train with validation each epoch, keep the best weights, checkpoint each epoch, resume exactly.

    Each epoch draws its randomness from (`seed`, epoch): a killed run that is started again ends with the same
    numbers (on the CPU to the last bit). A finished run is loaded, not repeated.

    Parameters
    ----------
    run_dir : folder for checkpoint.pt, history.json and model.pth (the kept weights)
    scheduler : OneCycleLR, CyclicLR step each batch, ReduceLROnPlateau on the validation loss, others each epoch
    ema_decay : validate and keep a moving average of the weights with this decay a step, instead of the last
    select : history key whose best epoch is kept ("valid_loss", "auroc", "ap", "f1"), or "last"
    settings : dict of JSON values, what else the run depends on (data, batch size): others start a new run

    Returns the history, a dict of lists: epoch, lr, train_loss, valid_loss, auroc, ap, f1, accuracy, seconds.
    `model` holds the kept weights afterwards. A loss that is not finite: FloatingPointError.
    """
    run_dir, device = Path(run_dir), torch.device(device)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay), use_buffers=True) if ema_decay else None
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10) if amp_dtype == torch.float16 else None
    parts = {name: part for name, part in (("model", model), ("optimizer", optimizer), ("scheduler", scheduler),
                                           ("averaged", averaged), ("scaler", scaler)) if part is not None}
    run = _describe_run(model, optimizer, loss_function, scheduler, epochs=epochs, seed=seed, ema_decay=ema_decay,
                        select=select, max_norm=max_norm, augment=_name(augment),
                        **{f"settings.{key}": value for key, value in (settings or {}).items()})
    watched = ("auroc", "ap", "f1", "accuracy")
    history, best = {key: [] for key in ("epoch", "lr", "train_loss", "valid_loss", *watched, "seconds")}, None
    if not overwrite and (state := _load_checkpoint(run_dir, run, device)):
        history, best = state["history"], state["best"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    validated = averaged.module if averaged is not None else model
    each_batch = isinstance(scheduler, (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR))
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for epoch in range(len(history["epoch"]) + 1, epochs + 1):
                start = time.monotonic()
                torch.manual_seed(1_000_003 * seed + epoch)
                rate = optimizer.param_groups[0]["lr"]
                train_loss = train_loop(epoch, train_loader, model, optimizer, loss_function, device, augment=augment,
                                        scheduler=scheduler if each_batch else None, averaged=averaged, scaler=scaler,
                                        amp_dtype=amp_dtype, max_norm=max_norm)
                _require_finite(train_loss, "training", epoch, rate, model)
                valid_loss, prob, y = eval_loop(epoch, valid_loader, validated, loss_function, device, amp_dtype=amp_dtype)
                _require_finite(valid_loss, "validation", epoch, rate, model)
                if scheduler is not None and not each_batch:
                    plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                    scheduler.step(*([valid_loss] if plateau else []))
                metrics = classification_metrics(y, prob)
                row = {"epoch": epoch, "lr": float(rate), "train_loss": train_loss, "valid_loss": valid_loss,
                       "seconds": time.monotonic() - start, **{k: metrics[k] for k in watched}}
                for key, value in row.items():
                    history[key].append(value)
                kept = best_epoch(history, select) == epoch - 1
                if kept:
                    best = {name: value.detach().cpu().clone() for name, value in validated.state_dict().items()}
                print(f"epoch {epoch:3d}/{epochs}  loss {train_loss:.4f}  validation loss {valid_loss:.4f}  "
                      f"AUROC {row['auroc']:.3f}  AP {row['ap']:.3f}  F1 {row['f1']:.3f}  {row['seconds']:.1f} s"
                      f"{'  *' if kept and select != 'last' else ''}", flush=True)
                _save_checkpoint(run_dir, {"run": run, "history": history, "best": best,
                                           **{name: part.state_dict() for name, part in parts.items()}})
    finally:  # after Ctrl-C too: the best weights so far
        if best is not None:
            model.load_state_dict(best)
    with whole_file(run_dir / "model.pth") as part:
        torch.save(best, part)
    write_json(run_dir / "history.json", {key: [v if v == v else None for v in row] for key, row in history.items()})
    return history


def _require_finite(loss, what, epoch, rate, model):
    if not math.isfinite(loss):
        odd = [name for name, value in model.named_parameters() if not torch.isfinite(value).all()]
        where = f"not finite: {first_ten(odd)}" if odd else "the weights are still finite: look at the input"
        raise FloatingPointError(f"{what} loss is {loss} in epoch {epoch} at learning rate {rate:.2g} ({where}). The "
                                 "checkpoint holds the epoch before. Lower the learning rate or clip the gradient.")


def _name(part):
    """A function's name or an object's type: never its address, which differs from process to process."""
    return getattr(part, "__qualname__", type(part).__name__)


def _describe_run(model, optimizer, loss_function, scheduler, **settings):
    """All that the result of a run depends on, as JSON text: a checkpoint continues only an equal one."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    loss = {name: value.tolist() for name, value in getattr(loss_function, "state_dict", dict)().items()}
    weights = hashlib.sha256(b"".join(v.detach().cpu().numpy().tobytes() for v in model.state_dict().values()))
    return json.dumps({"model": str(model), "start": weights.hexdigest()[:16], "loss": [_name(loss_function), loss],
                       "optimizer": [_name(optimizer), groups],
                       "scheduler": [_name(scheduler), scheduler and scheduler.state_dict()],
                       **settings}, sort_keys=True, default=str)


def _save_checkpoint(run_dir, state):
    """Write the checkpoint whole; the one before stays as checkpoint.previous.pt."""
    with whole_file(path := run_dir / "checkpoint.pt") as part:
        torch.save(state, part)
        if path.exists():
            os.replace(path, run_dir / "checkpoint.previous.pt")


def _load_checkpoint(run_dir, run, device):
    """The newest readable checkpoint of the same run, or None."""
    for path in (run_dir / "checkpoint.pt", run_dir / "checkpoint.previous.pt"):
        if not path.exists():
            continue
        try:
            with zipfile.ZipFile(path) as parts:  # torch.load does not check the sums that torch.save wrote
                if parts.testzip():
                    raise zipfile.BadZipFile("wrong checksum")
            state = torch.load(path, map_location=device, weights_only=True)
            there = json.loads(state["run"])
            done = len(state["history"]["epoch"])
        except Exception as error:  # torch raises many types for a damaged file: all mean the same here
            print(f"{path} is damaged ({type(error).__name__}): trying the one before.", flush=True)
            os.replace(path, path.with_suffix(".damaged"))  # or the next save would push out the good one
            continue
        here = json.loads(run)
        if changed := [key for key in {**here, **there} if here.get(key) != there.get(key)]:
            print(f"{run_dir} holds a run with other settings ({', '.join(sorted(changed))}): training starts anew.",
                  flush=True)
            return None
        print(f"{path}: {done} epochs are done{'' if done == here['epochs'] else ', continuing'}.", flush=True)
        return state
    return None


# ---- Metrics and the decision --------------------------------------------------------------------
def classification_metrics(y_true, y_prob, threshold=0.5, prevalence=None):
    """Metrics of AF probabilities.

    Parameters
    ----------
    y_true, y_prob : arrays of n values (any shape): 0/1, and the probability of AF
    threshold : AF is called where y_prob > threshold (a tie is no AF, as on the leaderboard)
    prevalence : weight the exams so that AF makes up this share; None: every exam counts once

    Returns a dict of float: accuracy, f1, precision, recall, specificity, auroc, ap, leaderboard_ap (the mean of
    the AP of AF and of no AF). AUROC, AP: NaN where a class is absent.
    """
    y, p = np.ravel(y_true).astype(float), np.ravel(y_prob).astype(float)
    if len(y) != len(p) or len(y) == 0:
        raise ValueError(f"{len(y)} labels and {len(p)} probabilities: they must be as many, and not none")
    if not np.isin(y, (0, 1)).all() or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("labels must be 0 or 1 and probabilities finite, between 0 and 1")
    both = 0 < y.sum() < len(y)
    weight = class_weights(y, prevalence)
    tn, fp, fn, tp = confusion_matrix(y, p > threshold, labels=[0, 1], sample_weight=weight).ravel()

    def ratio(part, whole):
        return float(part / whole) if whole > 0 else 0.0

    ap, ap_no_af = (average_precision_score(t, q, sample_weight=weight) if both else math.nan
                    for t, q in ((y, p), (1 - y, 1 - p)))
    return {"accuracy": ratio(tp + tn, tp + tn + fp + fn), "f1": ratio(2 * tp, 2 * tp + fp + fn),
            "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn), "specificity": ratio(tn, tn + fp),
            "auroc": float(roc_auc_score(y, p, sample_weight=weight)) if both else math.nan,
            "ap": float(ap), "leaderboard_ap": float(ap + ap_no_af) / 2}


def class_weights(y, prevalence=None):
    """Weights of exams that make AF count `prevalence` of the whole; ones where it is None or undefined."""
    if prevalence is not None and not 0 < prevalence < 1:
        raise ValueError(f"the prevalence is a share between 0 and 1, not {prevalence}")
    y, share = np.ravel(y), np.mean(y)
    if prevalence is None or share in (0, 1):
        return np.ones(len(y))
    return np.where(y == 1, prevalence / share, (1 - prevalence) / (1 - share))


def balanced_threshold(y_true, logits, prevalence=0.5):
    """Logit at which the odds of AF are even in a population with this AF share, from validation exams.

    A logistic regression of the label on the logit (Platt 1999), weighted to `prevalence`: steadier than the maximum
    of the F1 curve. Returns threshold, scale: the calibrated probability is sigmoid(scale * (logit - threshold)).
    """
    y, z = np.ravel(y_true), np.ravel(logits)
    platt = LogisticRegression(C=1e6).fit(z[:, None], y, sample_weight=class_weights(y, prevalence))
    scale = float(platt.coef_[0, 0])
    if not scale > 0:
        return 0.0, 1.0  # the logits carry no information: leave them as they are
    return float(-platt.intercept_[0] / scale), scale


def submission_probabilities(logits, threshold=0.0, scale=1.0):
    """Two columns (no AF, AF) from logits, moved so that `threshold` (a logit) becomes p = 0.5.

    A monotone map: AUROC and AP stay as they are, the leaderboard's fixed decision at 0.5 becomes ours.
    """
    z = scale * (np.ravel(logits).astype(np.float64) - threshold)
    return np.stack([to_probability(-z), to_probability(z)], axis=1)


# ---- Leaderboard: one submission a day counts, scores appear the next day, five in all ----------
class LeaderboardError(RuntimeError):
    """The leaderboard refused or was not reached: `.status` (None if not reached), `.reason` (its words)."""

    def __init__(self, message, status=None, reason=""):
        super().__init__(message)
        self.status, self.reason = status, reason


_ADVICE = {  # words in the server's answer -> what to do
    "different password": "Use the password of the first registration, or choose another team id.",
    "too long": "Team id and note have at most 20 characters.",
    "not the same size": "Predict every test exam once: two columns, no AF and AF.",
    "Submission closed": "The final date has passed.",
    "Maximum number": "All five submissions are used; only a submission of the same day can still be replaced.",
    "401": "Team id or password is wrong, or the team is not registered.",
    "404": "No leaderboard answers there: check LEADERBOARD_HOST.",
}


def register_team(team_id, password, host=DEFAULT_HOST):
    """Register a team; again with the same password is harmless. Returns the `requests` response (201 new, 200 known).

    LeaderboardError: the server refuses or is not reached. ValueError: it would accept what cannot be meant.
    """
    _check_identity(team_id, password, host)
    return _call("PUT", host, "register", team_id, password)


def submit(team_id, password, prediction, note, host=DEFAULT_HOST, *, n_exams=None, experiment="", metrics=None,
           af_probability=None, demo=False, allow_one_sided=False, directory="submissions"):
    """Save a submission in `directory`, then send it; returns the `requests` response (201 new, 200 replaced).

    Parameters
    ----------
    prediction : array (exams, 2): probability of no AF and of AF, rows in the order of RECORDS.txt
    note : str, 1-20 characters, shown beside the score
    n_exams, af_probability : rows and probabilities (exams,) that the experiment recorded: checked where given
    experiment, metrics : kept with the saved submission
    demo : True for predictions of demo data, which go to servers on this machine only
    allow_one_sided : send although all predictions are on one side of 0.5

    Raises ValueError before anything is sent; LeaderboardError when the server refuses or is not reached.
    """
    _check_identity(team_id, password, host)
    if not (note or "").strip() or len(note) > 20:
        raise ValueError(f"the note must have 1 to 20 characters, not {note!r}")
    if demo and urlsplit(host).hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError("these are predictions of demo data: they go to a rehearsal server on this machine only")
    table = _check_prediction(prediction, n_exams, af_probability, allow_one_sided)
    now = datetime.now(timezone.utc)
    saved = {"time": now.isoformat(timespec="seconds"), "host": host, "team": team_id, "experiment": experiment,
             "note": note, "metrics": metrics or {}, "digest": hashlib.sha256(table.tobytes()).hexdigest()[:16],
             "answer": {"status": None, "reason": "no answer yet"}, "prediction": table.tolist()}
    path = Path(directory) / f"{now:%Y%m%d_%H%M%S_%f}_{re.sub(r'[^A-Za-z0-9_-]', '_', experiment or note)}.json"
    write_json(path, saved)
    try:
        answer = _call("PUT", host, "leaderboard", team_id, password, {"prediction": saved["prediction"], "note": note})
        saved["answer"] = {"status": answer.status_code, "reason": _reason(answer)}
    except LeaderboardError as error:
        saved["answer"] = {"status": error.status, "reason": error.reason}
        raise
    finally:
        write_json(path, saved)
    return answer


def sent_submissions(directory="submissions"):
    """Table of what `submit` saved: time, day (UTC), host, team, experiment, note, digest, status, reason."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(directory).glob("*.json"))]
    columns = ["time", "day", "host", "team", "experiment", "note", "digest", "status", "reason"]
    return pd.DataFrame([{**row, **row["answer"], "day": row["time"][:10]} for row in rows], columns=columns)


def published_scores(team_id, host=DEFAULT_HOST):
    """The team's rows of the public leaderboard page: note, accuracy, f1, auc, ap (NaN while "TBC")."""
    page = _call("GET", host, "leaderboard").text
    fields = {"team": "team", "note": "note", "acc": "accuracy", "f1": "f1", "auc": "auc", "ap": "ap"}
    rows = [{key: html.unescape(value) for key, value in re.findall(r"(\w+):\s*'([^']*)'", row)}
            for row in re.findall(r"\{\s*(team:\s*'[^']*'(?:,\s*\w+:\s*'[^']*')*),?\s*\}", page)]
    table = pd.DataFrame(rows, columns=list(fields)).rename(columns=fields)
    table = table[table["team"] == team_id].drop(columns="team").reset_index(drop=True)
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in ("accuracy", "f1", "auc", "ap")})


def leaderboard_password():
    """The password from the environment, then a Colab secret, then a prompt (all: LEADERBOARD_PASSWORD)."""
    if os.environ.get("LEADERBOARD_PASSWORD"):
        return os.environ["LEADERBOARD_PASSWORD"]
    try:
        from google.colab import userdata
        if secret := userdata.get("LEADERBOARD_PASSWORD"):
            return secret
    except ImportError:
        pass
    except Exception as error:  # Colab raises its own types for a missing or forbidden secret
        print(f"No Colab secret LEADERBOARD_PASSWORD ({type(error).__name__}; key symbol on the left).")
    try:
        from getpass import getpass
        return getpass("Leaderboard password (sent over plain http: use it nowhere else): ")
    except Exception as error:  # a run without a person: Jupyter's error type is not importable everywhere
        raise ValueError("No password: set LEADERBOARD_PASSWORD in the environment or as a Colab secret.") from error


def _check_identity(team_id, password, host):
    if not (team_id or "").strip() or len(team_id) > 20 or ":" in team_id:
        raise ValueError(f"the team id must have 1 to 20 characters and no ':', not {team_id!r}")
    if not password:
        raise ValueError("the password is empty")
    if urlsplit(host).scheme not in ("http", "https"):
        raise ValueError(f"the host must start with http:// or https://, not {host!r}")


def _check_prediction(prediction, n_exams, af_probability, allow_one_sided):
    try:
        table = np.asarray(prediction, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("the rows of the prediction differ in length or are no numbers") from error
    if table.ndim != 2 or table.shape[1] != 2 or len(table) == 0:
        raise ValueError(f"the prediction must have shape (exams, 2), not {table.shape}")
    if n_exams is not None and len(table) != n_exams:
        raise ValueError(f"the prediction has {len(table)} rows, the test set {n_exams} exams")
    if not (np.isfinite(table).all() and (table >= 0).all() and np.allclose(table.sum(axis=1), 1, atol=1e-6)):
        raise ValueError("every row must be two probabilities that sum to 1")
    recorded = table[:, 1] if af_probability is None else np.ravel(af_probability)
    if len(recorded) != len(table):
        raise ValueError(f"the prediction has {len(table)} rows, the experiment recorded {len(recorded)}")
    if not np.allclose(table[:, 1], recorded, atol=1e-6):
        raise ValueError("the columns are swapped: the second must be AF" if np.allclose(table[:, 0], recorded, atol=1e-6)
                         else "the prediction is not the one that the experiment recorded")
    if len(set(table[:, 1] > 0.5)) == 1 and not allow_one_sided:
        raise ValueError("all predictions are on one side of 0.5, which scores F1 0 or 0.667. The usual cause is a "
                         "sigmoid applied twice. If it is meant: allow_one_sided=True")
    return table


def _reason(answer):
    """The server's own words: the <p> of its HTML error page, else the text."""
    words = re.search(r"<p>(.*?)</p>", answer.text, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>|\s+", " ", words[1] if words else answer.text)).strip()[:300]


def _call(method, host, path, team_id=None, password=None, content=None):
    """One request: time-outs, some retries (connection errors and 5xx only), no redirects."""
    url = f"{host.rstrip('/')}/{path}"
    auth = (team_id.encode("utf-8"), password.encode("utf-8")) if team_id else None
    retry = Retry(total=2, backoff_factor=0.5, status_forcelist=range(500, 600), allowed_methods=None,
                  raise_on_status=False, respect_retry_after_header=False)
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy, no .netrc of the environment
            for scheme in ("http://", "https://"):  # as long as requests' own prefixes, or theirs win
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            answer = session.request(method, url, json=content, auth=auth, timeout=(10, 60), allow_redirects=False)
    except requests.RequestException as error:
        raise LeaderboardError(f"{url} was not reached or broke off ({type(error).__name__}). Nothing is lost: look at "
                               f"the leaderboard page, then send again.", None, str(error)) from error
    if answer.status_code in (200, 201):
        return answer
    reason = _reason(answer)
    said = f"{answer.status_code}: {reason.rstrip('.')}."
    advice = next((text for words, text in _ADVICE.items() if words in said), "Try again later.")
    if answer.is_redirect:
        address = urljoin(url, answer.headers["Location"]).removesuffix(path)
        advice = f"The server redirects: if you know that address, set LEADERBOARD_HOST to {address}"
    raise LeaderboardError(f"{url} answered {said} {advice}", answer.status_code, reason)
