"""Preprocessing: parity with the public reference, WFDB input of all kinds, HDF5 files that are whole or absent."""
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import warnings
from fractions import Fraction
from pathlib import Path

import h5py
import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import signal as dsp

import ecg_helpers as helpers

ROOT = Path(__file__).resolve().parents[1]
SMALL = Path(__file__).parent / "data" / "preprocess_reference.npz"
FULL = ROOT / "../shared/reference/preprocess_reference.npz"
LEADS = ["DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6"]
TWELVE = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
TOLERANCE = 1e-6  # mV


# ------------------------------------------------------------------------------------------------
# Building blocks
# ------------------------------------------------------------------------------------------------
def noise(n_leads=8, n=1200, seed=0):
    """Digital random walk with drift, (n_leads, n) int16 in microvolts."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 30, (n_leads, n)).cumsum(axis=1) + rng.normal(0, 200, (n_leads, 1))
    return np.clip(steps + 50 * np.sin(np.arange(n) * 0.9), -30000, 30000).astype(np.int16)


def write_record(path, digital=None, rate=400, leads=LEADS, gain=1000.0, baseline=0, fmt="16", unit="mV"):
    """Write a WFDB pair through wfdb; `gain` and `baseline` may be one a lead."""
    digital, path, n = noise(len(leads)) if digital is None else digital, Path(path), len(leads)
    path.parent.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp(path.name, fs=rate, units=[unit] * n, sig_name=list(leads), d_signal=digital.T.astype(np.int64),
                fmt=[fmt] * n, adc_gain=np.broadcast_to(gain, n).astype(float).tolist(),
                baseline=np.broadcast_to(baseline, n).tolist(), write_dir=str(path.parent))
    return path


def write_records(folder, n=4):
    """A folder of `n` records that differ, with RECORDS.txt in an order that is not the sorted one."""
    for i in range(n):
        write_record(folder / f"TNMG{i}", noise(n=900 + 200 * i, seed=i), rate=(300, 400, 500)[i % 3])
    (folder / "RECORDS.txt").write_text("".join(f"TNMG{i}\n" for i in reversed(range(n))))
    return folder / "RECORDS.txt"


def tracings(h5_file):
    with h5py.File(h5_file) as file:
        return file["tracings"][:]


def reference(ecg, rate, leads, new_freq=400, new_len=4096, remove_baseline=True, powerline=60):
    """The public pipeline written a second time, lead by lead: (samples, leads) in mV to (new_len, 8)."""
    result = np.zeros((new_len, 8))
    for column, lead in enumerate(LEADS):
        x = np.array(ecg[:, list(leads).index(lead)], dtype=float)
        if remove_baseline:
            order, wn = dsp.ellipord(0.8 / (rate / 2), 0.2 / (rate / 2), 0.5, 40)
            x = dsp.sosfiltfilt(dsp.iirfilter(order, wn, rp=0.5, rs=40, btype="high", ftype="ellip", output="sos"), x,
                                padtype="constant")
        if powerline and powerline < rate / 2:
            b, a = dsp.iirnotch(powerline / (rate / 2), 30)
            x = dsp.filtfilt(b, a, x)
        ratio = Fraction(new_freq) / Fraction(str(rate))
        x = dsp.resample_poly(x, up=ratio.numerator, down=ratio.denominator)
        if len(x) > new_len:
            first = (len(x) - new_len) // 2
            x = x[first:first + new_len]
        front = (new_len - len(x)) // 2
        result[front:front + len(x), column] = x
    return result


# ------------------------------------------------------------------------------------------------
# Parity
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [
    SMALL, pytest.param(FULL, marks=pytest.mark.skipif(not FULL.exists(), reason="the full file is not here"))],
    ids=["two cases", "all cases"])
def test_equals_stored_reference(file):
    """Stored outputs of the public scripts: all rates, lead orders and 12-lead cases to 1e-6 mV."""
    with np.load(file) as cases:
        for i in range(int(cases["n"])):
            ours = helpers.preprocess_ecg(cases[f"{i}_digital"].T / 1000, int(cases[f"{i}_fs"]), cases[f"{i}_leads"])
            np.testing.assert_allclose(ours.T, cases[f"{i}_expected"], rtol=0, atol=TOLERANCE, err_msg=f"case {i}")


@settings(max_examples=25, deadline=None)
@given(rate=st.integers(100, 1000), seconds=st.floats(1.1, 13), seed=st.integers(0, 2**32 - 1),
       order=st.one_of(st.permutations(LEADS), st.permutations(LEADS + ["DIII", "AVR", "AVL", "AVF"])))
def test_equals_independent_reference(rate, seconds, seed, order):
    """Any rate, length and lead order, 8 or 12 leads."""
    ecg = noise(len(order), int(rate * seconds), seed) / 1000
    ours = helpers.preprocess_ecg(ecg, rate, order)
    assert ours.shape == (8, 4096) and ours.dtype == np.float64
    np.testing.assert_allclose(ours.T, reference(ecg.T, rate, order), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", [
    {"new_freq": 250, "new_len": 1001}, {"new_len": 333}, {"remove_baseline": False}, {"powerline": None},
    {"powerline": 50}, {"remove_baseline": False, "powerline": None, "new_freq": 500, "new_len": 5000}], ids=str)
def test_options(options):
    """Every option does in both pipelines the same."""
    ecg = noise(8, 2501) / 1000
    ours = helpers.preprocess_ecg(ecg, 500, LEADS, **options)
    np.testing.assert_allclose(ours.T, reference(ecg.T, 500, LEADS, **options), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rate", [333.3, 256.41])
def test_fractional_rate(rate):
    """A rate with decimals is resampled by the exact ratio."""
    ecg = noise(8, 2000) / 1000
    np.testing.assert_allclose(helpers.preprocess_ecg(ecg, rate, LEADS).T, reference(ecg.T, rate, LEADS),
                               rtol=0, atol=TOLERANCE)


def test_endless_fraction_as_rate():
    """1000/3 Hz has no short decimal form: it still costs no more than another rate."""
    ours = helpers.preprocess_ecg(noise(8, 1000) / 1000, 1000 / 3, LEADS)
    assert np.isfinite(ours).all() and np.count_nonzero(np.any(ours, axis=0)) == pytest.approx(1200, abs=2)


@pytest.mark.parametrize("n, first, last", [(400, 1848, 2247), (4095, 0, 4094), (4096, 0, 4095), (4097, 0, 4095),
                                            (9000, 0, 4095)])
def test_short_records_are_centred_between_zeros(n, first, last):
    """Padding is zero and centred, the surplus sample at the end; long records fill the whole length."""
    used = np.flatnonzero(np.any(helpers.preprocess_ecg(noise(8, n) / 1000, 400, LEADS), axis=0))
    assert (used[0], used[-1]) == (first, last)


def test_input_is_left_alone():
    """The caller's array keeps its values, NaN included."""
    ecg = noise(8, 1000) / 1000
    ecg[2, 10:20] = np.nan
    before = ecg.copy()
    helpers.preprocess_ecg(ecg, 400, LEADS)
    np.testing.assert_array_equal(ecg, before)


# ------------------------------------------------------------------------------------------------
# Leads, gaps, lengths, rates
# ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [
    ["I", "II", *LEADS[2:]], [lead.lower() for lead in LEADS], ["i", "ii", "v1", "v2", "v3", "v4", "v5", "v6"],
    ["Di", "dII", "V1", "v2", " V3 ", "V4", "V5", "V6"]], ids=" ".join)
def test_lead_aliases(names):
    """I and II, any case, stand for DI and DII."""
    ecg = noise() / 1000
    np.testing.assert_array_equal(helpers.preprocess_ecg(ecg, 400, names), helpers.preprocess_ecg(ecg, 400, LEADS))


def test_twelve_leads_with_common_names():
    """The eight of a 12-lead record are picked by name."""
    ecg = noise(12) / 1000
    picked = ecg[[0, 1, *range(6, 12)]]
    np.testing.assert_array_equal(helpers.preprocess_ecg(ecg, 400, TWELVE), helpers.preprocess_ecg(picked, 400, LEADS))


@pytest.mark.parametrize("missing", [["V6"], ["DI", "V3"]])
def test_missing_lead_is_named(missing):
    """Never a silent zero: each lead that is not there is in the message, the others are not called missing."""
    names = [lead if lead not in missing else f"X{i}" for i, lead in enumerate(LEADS)]
    with pytest.raises(ValueError, match=f"lead {', '.join(missing)} missing"):
        helpers.preprocess_ecg(noise() / 1000, 400, names)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.001, 0.9), mark=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_gaps_are_interpolated(seed, share, mark):
    """Any pattern of samples without value gives what linear interpolation in that lead gives."""
    rng, ecg = np.random.default_rng(seed), noise(8, 900, seed) / 1000
    hole = rng.random(ecg.shape) < share
    hole[:, rng.integers(900)] = False  # at least one finite sample a lead
    filled = np.array([np.interp(np.arange(900), np.flatnonzero(~h), x[~h]) for x, h in zip(ecg, hole)])
    ours = helpers.preprocess_ecg(np.where(hole, mark, ecg), 400, LEADS)
    np.testing.assert_allclose(ours.T, reference(filled.T, 400, LEADS), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("value", [np.nan, 0.0, 0.7], ids=["NaN", "zero", "flat"])
def test_lead_without_signal_becomes_zero(value):
    """A lead of NaN or of one value is zero afterwards and does not touch the others."""
    ecg = noise() / 1000
    ecg[4] = value
    ours, others = helpers.preprocess_ecg(ecg, 400, LEADS), np.arange(8) != 4
    np.testing.assert_allclose(ours[4], 0, atol=1e-9)
    np.testing.assert_allclose(ours[others].T, reference(np.nan_to_num(ecg).T, 400, LEADS)[:, others], atol=TOLERANCE)


@pytest.mark.parametrize("change, words", [
    ({"signal": np.full((8, 1200), np.nan)}, "finite"), ({"signal": noise(n=399) / 1000}, "399 samples"),
    ({"signal": np.zeros((8, 0))}, "0 samples"), ({"sample_rate": 0}, "rate 0"), ({"sample_rate": -400}, "rate -400"),
    ({"sample_rate": 49}, "rate 49"), ({"sample_rate": 5001}, "rate 5001"), ({"sample_rate": float("nan")}, "rate nan"),
    ({"signal": noise().T / 1000}, "samples")],
    ids=["nothing finite", "too short", "empty", "0 Hz", "negative Hz", "49 Hz", "5001 Hz", "NaN Hz", "transposed"])
def test_refused_signals(change, words):
    """What cannot be an exam is a ValueError that says why."""
    with pytest.raises(ValueError, match=words):
        helpers.preprocess_ecg(**{"signal": noise() / 1000, "sample_rate": 400, "leads": LEADS, **change})


# ------------------------------------------------------------------------------------------------
# WFDB records
# ------------------------------------------------------------------------------------------------
def assert_same_as_wfdb(path, to_mv=1.0):
    """read_ecg gives wfdb's physical signal in mV, NaN in the same places, its rate and lead names."""
    expected = wfdb.rdrecord(str(path))
    signal_mv, rate, leads = helpers.read_ecg(path)
    np.testing.assert_allclose(signal_mv, expected.p_signal.T * to_mv, rtol=1e-12, atol=0)
    assert signal_mv.dtype == np.float64 and rate == expected.fs and list(leads) == expected.sig_name


@pytest.mark.parametrize("leads", [LEADS, TWELVE], ids=["8 leads", "12 leads"])
@pytest.mark.parametrize("gain", [1000, 200, 333.25, "mixed"])
@pytest.mark.parametrize("baseline", [0, -512, "mixed"])
def test_direct_reader_equals_wfdb(tmp_path, monkeypatch, leads, gain, baseline):
    """The commonest form is read without wfdb's parser and gives bit for bit the same."""
    n = len(leads)
    gain = np.linspace(100, 2000, n) if gain == "mixed" else gain
    baseline = np.arange(n) * 7 - 20 if baseline == "mixed" else baseline
    digital = noise(n, 700)
    digital[1, 50:60] = digital[-1, 0] = -32768
    path = write_record(tmp_path / "TNMG1", digital, 360, leads, gain, baseline)
    expected = wfdb.rdrecord(str(path)).p_signal.T
    monkeypatch.setattr(wfdb, "rdrecord", lambda *_: pytest.fail("not read directly"))
    signal_mv, rate, names = helpers.read_ecg(path)
    np.testing.assert_array_equal(signal_mv, expected)
    assert np.isnan(signal_mv[1, 50:60]).all() and np.isnan(signal_mv).sum() == 11
    assert rate == 360 and list(names) == leads


@pytest.mark.parametrize("fmt", ["80", "212", "24", "32"])
def test_other_formats(tmp_path, fmt):
    """Formats other than 16 are wfdb's business."""
    limit = {"80": 120, "212": 2000}.get(fmt, 30000)
    assert_same_as_wfdb(write_record(tmp_path / "TNMG1", np.clip(noise(), -limit, limit), fmt=fmt))


@pytest.mark.parametrize("unit, to_mv, encoding", [
    ("uV", 1e-3, "ascii"), ("mv", 1, "ascii"), ("µV", 1e-3, "utf-8"), ("µV", 1e-3, "latin-1")],
    ids=["uV", "mv", "micro sign in UTF-8", "micro sign in Latin-1"])
def test_other_units(tmp_path, unit, to_mv, encoding):
    """Other units arrive in mV or are refused: wfdb loses the sign µ, and what it calls V then is 1e6 too large."""
    path = write_record(tmp_path / "TNMG1")
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace("/mV", f"/{unit}"), encoding=encoding)
    try:
        signal_mv, _, _ = helpers.read_ecg(path)
    except ValueError as error:
        assert unit == "µV" and "TNMG1" in str(error)
    else:
        np.testing.assert_allclose(signal_mv, noise() / 1000 * to_mv, rtol=1e-12)


HEADER_CHANGES = {
    "comments": lambda text: "# made by hand\n" + text + "# age: 61\n#\n",
    "comment in Latin-1": lambda text: text + "# m\xe9decin\n",
    "Windows line ends": lambda text: text.replace("\n", "\r\n"),
    "no explicit baseline": lambda text: text.replace("(0)/mV", "/mV"),
    "no unit": lambda text: text.replace("(0)/mV", "(0)"),
    "gain 0 means 200": lambda text: text.replace("1000.0(0)", "0(0)"),
    "negative gain": lambda text: text.replace("1000.0(0)", "-1000(0)"),
    "no length": lambda text: text.replace(" 400 1200\n", " 400\n"),
    "rate with decimals": lambda text: text.replace(" 400 1200\n", " 399.5 1200\n"),
    "rate as whole float": lambda text: text.replace(" 400 1200\n", " 400.0 1200\n"),
    "date and time": lambda text: text.replace(" 400 1200\n", " 400 1200 12:30:00 01/02/2014\n"),
    "counter frequency": lambda text: text.replace(" 400 1200\n", " 400/400(0) 1200\n"),
    "shorter than the file": lambda text: text.replace(" 400 1200\n", " 400 1100\n"),
    "lead name with a blank": lambda text: text.replace(" V6\n", " lead V6\n"),
}


@pytest.mark.parametrize("change", HEADER_CHANGES.values(), ids=HEADER_CHANGES)
def test_headers_that_wfdb_reads(tmp_path, change):
    """Each legal way to write a header gives what wfdb gives."""
    path = write_record(tmp_path / "TNMG1")
    header = path.with_suffix(".hea")
    text = header.read_text()
    assert change(text) != text
    header.write_bytes(change(text).encode("latin-1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same_as_wfdb(path)


def test_two_dat_files(tmp_path):
    """Leads spread over two .dat files."""
    digital = noise()
    digital[:3].T.astype("<i2").tofile(tmp_path / "a.dat")
    digital[3:].T.astype("<i2").tofile(tmp_path / "b.dat")
    lines = [f"{'a' if i < 3 else 'b'}.dat 16 1000(0)/mV 16 0 0 0 0 {lead}" for i, lead in enumerate(LEADS)]
    (tmp_path / "TNMG1.hea").write_text("\n".join(["TNMG1 8 400 1200", *lines, ""]))
    assert_same_as_wfdb(tmp_path / "TNMG1")
    np.testing.assert_array_equal(helpers.read_ecg(tmp_path / "TNMG1")[0], digital / 1000)


def test_multi_segment_record(tmp_path):
    """A record in two segments."""
    digital = noise(n=1200)
    write_record(tmp_path / "part1", digital[:, :500])
    write_record(tmp_path / "part2", digital[:, 500:])
    (tmp_path / "TNMG1.hea").write_text("TNMG1/2 8 400 1200\npart1 500\npart2 700\n")
    np.testing.assert_allclose(helpers.read_ecg(tmp_path / "TNMG1")[0], digital / 1000, rtol=1e-12)


def damage(path, what):
    """Damage the record at `path` (without suffix)."""
    header, dat = path.with_suffix(".hea"), path.with_suffix(".dat")
    text, content = header.read_text(), dat.read_bytes()
    if what.startswith("no "):
        path.with_suffix(what[3:]).unlink()
    elif what == "truncated .dat":
        dat.write_bytes(content[:len(content) // 2])
    elif what == "empty .dat":
        dat.write_bytes(b"")
    elif what == "truncated format 212":
        write_record(path, np.clip(noise(), -2000, 2000), fmt="212")
        dat.write_bytes(dat.read_bytes()[:1000])
    elif what == "missing lead":
        header.write_text(text.replace(" V6\n", " X9\n"))
    elif what == "all NaN":
        dat.write_bytes(np.full(len(content) // 2, -32768, "<i2").tobytes())
    elif what == "too short":
        write_record(path, noise(n=300))
    elif what == "rate 20 Hz":
        header.write_text(text.replace(" 400 ", " 20 "))
    elif what == "unknown unit":
        header.write_text(text.replace("/mV", "/mmHg"))
    else:
        header.write_bytes({"empty header": b"", "binary header": bytes(range(256)), "header cut": text[:60].encode(),
                            "words as header": b"<html>quota</html>\n",
                            "leads not counted": text.replace(" 8 ", " x ").encode(),
                            "length 0": text.replace(" 400 1200", " 400 0").encode(),
                            "absurd length": text.replace(" 400 1200", " 400 900000000000").encode()}[what])


UNREADABLE = ["no .dat", "no .hea", "truncated .dat", "empty .dat", "truncated format 212", "empty header",
              "binary header", "words as header", "header cut", "leads not counted", "length 0", "absurd length",
              "unknown unit"]
UNUSABLE = {"missing lead": "V6", "all NaN": "finite", "too short": "300 samples", "rate 20 Hz": "20 Hz"}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_record_is_named(tmp_path, what):
    """read_ecg raises one kind of error, with the record's path in it."""
    path = write_record(tmp_path / "TNMG77")
    damage(path, what)
    with pytest.raises(ValueError, match="TNMG77"):
        helpers.read_ecg(path)


@settings(max_examples=40, deadline=None)
@given(lines=st.lists(st.text(st.sampled_from("TNMG1.dat 0123456789()/mVx-#:\t"), max_size=40), max_size=5))
def test_any_header_is_read_or_refused(tmp_path_factory, lines):
    """Random headers beside a good .dat: a signal, or a ValueError that names the record."""
    path = write_record(tmp_path_factory.mktemp("header") / "TNMG1", noise(n=20))
    path.with_suffix(".hea").write_text("\n".join(lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            signal_mv, _, leads = helpers.read_ecg(path)
            assert signal_mv.shape[0] == len(leads)
        except ValueError as error:
            assert "TNMG1" in str(error)


# ------------------------------------------------------------------------------------------------
# HDF5
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """RECORDS.txt of four small records, and the tracings that belong to them. Read only."""
    records_file = write_records(tmp_path_factory.mktemp("records"))
    names = ["TNMG3", "TNMG2", "TNMG1", "TNMG0"]
    expected = [helpers.preprocess_ecg(*helpers.read_ecg(records_file.parent / name)).T for name in names]
    return records_file, np.array(expected, dtype=np.float32)


@pytest.mark.parametrize("workers, method", [(1, None), (2, None), (9, None), (None, None), (2, "spawn")])
def test_build(records, tmp_path, monkeypatch, workers, method):
    """Shape, type and order of RECORDS.txt; any number of processes, forked or spawned, gives the same bits."""
    if method:
        monkeypatch.setattr(helpers, "START_METHOD", method)
    target = tmp_path / "new" / "folder" / "train.h5"
    assert helpers.build_h5(records[0], target, workers=workers) == target
    with h5py.File(target) as file:
        assert file["tracings"].shape == (4, 4096, 8) and file["tracings"].dtype == np.float32
    np.testing.assert_array_equal(tracings(target), records[1])
    assert os.listdir(target.parent) == ["train.h5"]


@pytest.mark.parametrize("workers", [2, 5])
def test_portions(demo_folder, demo_h5, tmp_path, capsys, workers):
    """48 exams in three portions of 16 and in six, the last one short: every exam in its place."""
    target = helpers.build_h5(demo_folder / "train" / "RECORDS.txt", tmp_path / "train.h5", workers=workers)
    np.testing.assert_array_equal(tracings(target), tracings(demo_h5))
    assert "48 exams in " in capsys.readouterr().out


def test_finished_file_is_kept(records, tmp_path, capsys):
    """A second call reads the file only, and says so."""
    target = helpers.build_h5(records[0], tmp_path / "train.h5", workers=1)
    before = target.stat()
    capsys.readouterr()
    helpers.build_h5(records[0], target, workers=2)
    after = target.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert "train.h5: 4 exams, ready" in capsys.readouterr().out


def edit_h5(change):
    def edit(target, _):
        with h5py.File(target, "r+") as file:
            change(file)
    return edit


def replace_tracings(**dataset):
    def change(file):
        del file["tracings"]
        file.create_dataset("tracings", **dataset) if dataset else file.create_group("tracings")
    return edit_h5(change)


def cut(keep):
    return lambda target, _: os.truncate(target, int(keep * target.stat().st_size))


def edit_text(name, change):
    def edit(_, folder):
        (folder / name).write_text(change((folder / name).read_text()))
    return edit


STALE = {  # what happened to the file or its records -> a word of the reason
    "cut in half": (cut(0.5), "read"), "cut by one byte": (cut(0.999999), "read"), "empty": (cut(0), "read"),
    "a web page": (lambda target, _: target.write_text("<html>"), "read"),
    "no tracings": (edit_h5(lambda file: file.pop("tracings")), "read"),
    "tracings is a group": (replace_tracings(), ""), "a single number": (replace_tracings(data=1.0), ""),
    "no exams": (replace_tracings(shape=(0, 4096, 8), dtype="f4"), ""),
    "fewer exams": (replace_tracings(shape=(3, 4096, 8), dtype="f4"), "shape"),
    "leads first": (replace_tracings(shape=(4, 8, 4096), dtype="f4"), "shape"),
    "no attributes": (edit_h5(lambda file: [file.attrs.pop(key) for key in list(file.attrs)]), ""),
    "other settings": (edit_h5(lambda file: file.attrs.update({k: "500 Hz" for k in file.attrs})), "settings"),
    "other order": (edit_text("RECORDS.txt", lambda text: "".join(sorted(text.splitlines(True)))), "other records"),
    "a record less": (edit_text("RECORDS.txt", lambda text: text.replace("TNMG2\n", "")), ""),
    "other gain": (edit_text("TNMG1.hea", lambda text: text.replace("1000.0", "500.0")), "other records"),
    "longer .dat": (lambda _, folder: (folder / "TNMG0.dat").open("ab").write(bytes(16)), "other records"),
}


@pytest.mark.parametrize("change, reason", STALE.values(), ids=STALE)
def test_stale_file_is_rebuilt(tmp_path, capsys, change, reason):
    """A damaged or foreign file is never used: one line says why, and the result is a fresh build's."""
    records_file, target = write_records(tmp_path / "data"), tmp_path / "train.h5"
    helpers.build_h5(records_file, target, workers=1)
    change(target, records_file.parent)
    capsys.readouterr()
    helpers.build_h5(records_file, target, workers=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "again" in line)
    assert "train.h5" in line and reason in line
    fresh = helpers.build_h5(records_file, tmp_path / "fresh.h5", workers=1)
    np.testing.assert_array_equal(tracings(target), tracings(fresh))


def test_remarks_are_counted(tmp_path, capsys):
    """Gaps, dead leads, flat leads and a skipped mains filter: each counted once, and only where it is so."""
    def with_change(name, lead, value, samples=slice(None), rate=400):
        digital = noise()
        digital[lead, samples] = value
        write_record(tmp_path / name, digital, rate)
    with_change("TNMG1", 0, -32768, slice(5, 9))   # a gap
    with_change("TNMG2", 7, -32768, slice(0, 90))  # a gap
    with_change("TNMG3", 3, -32768)                # a lead of NaN
    with_change("TNMG4", 5, 700)                   # a flat lead
    with_change("TNMG5", 0, 1, slice(0, 1), rate=110)
    (tmp_path / "RECORDS.txt").write_text("TNMG1\nTNMG2\nTNMG3\nTNMG4\nTNMG5\n")
    target = helpers.build_h5(tmp_path / "RECORDS.txt", tmp_path / "train.h5", workers=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if " exams: " in line]
    counts = {word: [int(line.split()[0]) for line in lines if word in line]
              for word in ("interpolated", "set to zero", "flat", "60 Hz")}
    assert counts == {"interpolated": [2], "set to zero": [1], "flat": [1], "60 Hz": [1]}
    assert np.isfinite(tracings(target)).all()


@pytest.mark.parametrize("what", [*UNREADABLE, *UNUSABLE])
def test_bad_record_is_named(tmp_path, what):
    """One bad record of four: named, with the reason, and nothing is written."""
    records_file = write_records(tmp_path / "data")
    write_record(tmp_path / "data" / "TNMG2")
    damage(tmp_path / "data" / "TNMG2", what)
    with pytest.raises(ValueError, match="(?s)1 of 4 .*TNMG2.*" + UNUSABLE.get(what, "")) as caught:
        helpers.build_h5(records_file, tmp_path / "train.h5", workers=1)
    assert not any(f"TNMG{i}" in str(caught.value) for i in (0, 1, 3))
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_records_are_collected(tmp_path, workers):
    """Twelve of fourteen: the count and the first ten names; an older file does not survive as if it were theirs."""
    records_file, target = write_records(tmp_path / "data", 14), tmp_path / "train.h5"
    helpers.build_h5(records_file, target, workers=1)
    for i in range(12):
        damage(tmp_path / "data" / f"TNMG{i}", ("no .dat", "truncated .dat", "missing lead")[i % 3])
    with pytest.raises(ValueError, match="12 of 14") as caught:
        helpers.build_h5(records_file, target, workers=workers)
    named = [i for i in range(14) if f"TNMG{i}:" in str(caught.value)]
    assert named == list(range(2, 12))  # RECORDS.txt counts down: 11 is the first bad one
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("content", [
    b"TNMG3\r\nTNMG2\r\nTNMG1\r\nTNMG0\r\n", b"\n\nTNMG3\n\nTNMG2\n  \nTNMG1\nTNMG0\n\n", b"TNMG3\nTNMG2\nTNMG1\nTNMG0",
    b"\xef\xbb\xbfTNMG3\nTNMG2\nTNMG1\nTNMG0\n"], ids=["Windows line ends", "blank lines", "no last line end", "BOM"])
def test_ways_to_write_records_txt(records, tmp_path, content):
    """Line ends, blank lines and a byte-order mark do not change the result."""
    folder = write_records(tmp_path / "data").parent
    (folder / "RECORDS.txt").write_bytes(content)
    np.testing.assert_array_equal(tracings(helpers.build_h5(folder / "RECORDS.txt", tmp_path / "x.h5", 1)), records[1])


@pytest.mark.parametrize("content, words", [("", "no record"), ("\n \n", "no record"),
                                            ("TNMG1\nTNMG0\nTNMG1\n", "TNMG1"), (None, "RECORDS.txt")])
def test_refused_records_txt(tmp_path, content, words):
    """Empty, with a name twice, or absent: an error that names the file, and nothing is written."""
    records_file = write_records(tmp_path / "data")
    records_file.unlink() if content is None else records_file.write_text(content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=words) as caught:
        helpers.build_h5(records_file, tmp_path / "train.h5")
    assert "RECORDS.txt" in str(caught.value) and os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("fmt", ["16", "32"])
def test_path_with_spaces(records, tmp_path, fmt):
    """Folder names with blanks and letters beyond ASCII, for both readers."""
    folder = write_records(tmp_path / "my ECG data é").parent
    write_record(folder / "TNMG1", noise(n=1100, seed=1), fmt=fmt)
    target = helpers.build_h5(folder / "RECORDS.txt", folder / "out put" / "train.h5", workers=2)
    assert tracings(target).shape == (4, 4096, 8) and os.listdir(target.parent) == ["train.h5"]


# ------------------------------------------------------------------------------------------------
# Kills and full disks
# ------------------------------------------------------------------------------------------------
def run_killed(function, owner, name, at):
    """Run `function` in a forked process that SIGKILLs itself at call number `at` of `owner.name`; its number."""
    original, calls = getattr(owner, name), []

    def child():
        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, counted)
        function()
    process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    return process.pid


def test_killed_program_leaves_nothing_that_looks_whole(demo_folder, demo_h5, tmp_path):
    """SIGKILL of a whole Python program in mid-build: no file, no orphans; the next build is an undisturbed one."""
    records_file, target = demo_folder / "train" / "RECORDS.txt", tmp_path / "train.h5"
    code = ("import sys, time, ecg_helpers as h; preprocess = h.preprocess_ecg\n"
            "h.preprocess_ecg = lambda *a: (time.sleep(0.1), preprocess(*a))[1]\n"
            "h.build_h5(sys.argv[1], sys.argv[2], workers=2)")
    program = subprocess.Popen([sys.executable, "-c", code, records_file, target], cwd=ROOT, stdout=subprocess.PIPE)
    while not os.listdir(tmp_path) and program.poll() is None:
        time.sleep(0.005)
    program.kill()
    program.communicate(timeout=30)  # the end of the output: no worker lives on
    assert program.returncode == -signal.SIGKILL and not target.exists()
    helpers.build_h5(records_file, target, workers=1)
    np.testing.assert_array_equal(tracings(target), tracings(demo_h5))
    assert os.listdir(tmp_path) == ["train.h5"], "what the killed run left (GB on real data) stays on the disk"


@pytest.mark.parametrize("owner, name, at", [
    (h5py.File, "create_dataset", 1), *((helpers, "preprocess_ecg", at) for at in (1, 2, 3, 4)),
    (h5py.File, "close", 1), (os, "replace", 1)], ids=lambda value: getattr(value, "__name__", str(value)))
def test_kill_at_any_step(records, tmp_path, owner, name, at):
    """Killed before, at and after each exam, at closing or renaming: no file; the next build is an undisturbed one."""
    target = tmp_path / "train.h5"
    run_killed(lambda: helpers.build_h5(records[0], target, workers=1), owner, name, at)
    assert not target.exists()
    np.testing.assert_array_equal(tracings(helpers.build_h5(records[0], target, workers=1)), records[1])


@pytest.mark.parametrize("owner, name", [(h5py.Dataset, "__setitem__"), (helpers, "open")], ids=["first", "later"])
def test_disk_full_leaves_nothing(records, tmp_path, monkeypatch, owner, name):
    """A write that fails with ENOSPC ends the build with that error and no file; with room the build succeeds."""
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full, raising=False)
        with pytest.raises(OSError, match="No space left"):
            helpers.build_h5(records[0], tmp_path / "train.h5", workers=1 if helpers.START_METHOD == "spawn" else 2)
    assert not os.listdir(tmp_path)
    np.testing.assert_array_equal(tracings(helpers.build_h5(records[0], tmp_path / "train.h5", 1)), records[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_file_that_may_not_grow(records, tmp_path):
    """A write that really fails (limit on the file size) ends the build, says so and leaves no file."""
    import resource

    def limited(queue):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            helpers.build_h5(records[0], tmp_path / "train.h5", workers=1)
            queue.put("no error")
        except (OSError, RuntimeError) as error:  # h5py raises the second from a failing close
            queue.put(str(error))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=limited, args=(queue,))
    process.start()
    process.join(30)
    assert process.exitcode == 0 and "File too large" in queue.get()
    assert not os.listdir(tmp_path)


def test_killed_worker_ends_the_build(records, tmp_path, monkeypatch):
    """A worker process that is killed (out of memory) ends the build with an error; no file is left."""
    if helpers.START_METHOD != "fork":
        pytest.skip("the fault is planted by forking")
    prepare, victim = helpers._prepare_record, sorted(path.stem for path in records[0].parent.glob("*.hea"))[0]

    def mortal(job):
        if job[0].endswith(victim):
            os.kill(os.getpid(), 9)
        return prepare(job)
    mortal.__qualname__ = mortal.__name__ = "_prepare_record"
    mortal.__module__ = helpers.__name__
    monkeypatch.setattr(helpers, "_prepare_record", mortal)
    monkeypatch.setattr(helpers._from_pool, "__defaults__", (2,))
    with pytest.raises(RuntimeError, match="worker process killed"):
        helpers.build_h5(records[0], tmp_path / "train.h5", workers=2)
    assert list(tmp_path.glob("train.h5*")) == []
