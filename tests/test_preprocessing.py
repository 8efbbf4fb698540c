"""Preprocessing: parity with the public reference, WFDB input of all kinds, HDF5 files that are whole or absent."""
import ctypes
import multiprocessing
import os
import re
import resource
import select
import signal
import time
import tracemalloc
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_preprocessing import reference

import ecg_helpers as helpers

ROOT = Path(__file__).resolve().parents[1]
SMALL = Path(__file__).parent / "data" / "preprocess_reference.npz"
FULL = ROOT / "../shared/reference/preprocess_reference.npz"
LEADS = ["DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6"]
TWELVE = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
TOLERANCE = 1e-6  # mV
FORK = multiprocessing.get_context("fork")


# ------------------------------------------------------------------------------------------------
# Building blocks
# ------------------------------------------------------------------------------------------------
def noise(n_leads=8, n=1200, seed=0):
    """Digital random walk with drift, (n_leads, n) int16 in microvolts."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 30, (n_leads, n)).cumsum(axis=1) + rng.normal(0, 200, (n_leads, 1))
    return np.clip(steps + 50 * np.sin(np.arange(n) * 0.9), -30000, 30000).astype(np.int16)


def write_record(path, digital=None, rate=400, leads=LEADS, gain=1000.0, baseline=0, fmt="16", unit="mV"):
    """Write a WFDB pair through wfdb; `gain` and `baseline` may be one per lead."""
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


@pytest.mark.parametrize("rate", [333.3, 499.99, 359.97, np.float32(500)])
def test_fractional_rate(rate):
    """A rate with decimals is resampled by the exact ratio."""
    ecg = noise(8, 2000) / 1000
    np.testing.assert_allclose(helpers.preprocess_ecg(ecg, rate, LEADS).T, reference(ecg.T, float(rate), LEADS),
                               rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rate, near", [(1000 / 3, 1000 / 3), (333.333, 1000 / 3), (4999.999, 5000), (400.0001, 400),
                                        (257.7301, 257.73)])
def test_odd_rates_cost_no_more(rate, near):
    """Rates of many decimals take no seconds and no gigabytes, and give what the plain rate beside them gives."""
    ecg = noise(8, int(10 * rate)) / 1000
    helpers.preprocess_ecg(ecg, 500, LEADS)  # what is imported and designed once
    tracemalloc.start()
    start = time.process_time()
    ours = helpers.preprocess_ecg(ecg, rate, LEADS)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1.5 and peak < 200e6
    assert np.count_nonzero(np.any(ours, axis=0)) == pytest.approx(4000, abs=2)
    np.testing.assert_allclose(ours, helpers.preprocess_ecg(ecg, near, LEADS), rtol=0, atol=2e-3)


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


@pytest.mark.parametrize("names, twice", [([*LEADS, "V6"], "V6"), ([*LEADS[:7], " v5 "], "V6"), ([*LEADS, "I"], "DI")])
def test_repeated_lead_is_refused(names, twice):
    """Two rows for one lead, under whichever names: which one is meant cannot be known; a missing one is said first."""
    with pytest.raises(ValueError, match=f"lead {twice} (more than once|missing)"):
        helpers.preprocess_ecg(noise(len(names)) / 1000, 400, names)
    names = [*LEADS, "AVR", "AVR"]  # leads that are dropped may repeat
    assert helpers.preprocess_ecg(noise(10) / 1000, 400, names).shape == (8, 4096)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.001, 0.9), mark=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_gaps_are_interpolated(seed, share, mark):
    """Any pattern of samples without value gives what linear interpolation in that lead gives."""
    rng, ecg = np.random.default_rng(seed), noise(8, 900, seed) / 1000
    hole = rng.random(ecg.shape) < share
    hole[:, rng.integers(900)] = False  # at least one finite sample per lead
    filled = np.array([np.interp(np.arange(900), np.flatnonzero(~h), x[~h]) for x, h in zip(ecg, hole)])
    ours = helpers.preprocess_ecg(np.where(hole, mark, ecg), 400, LEADS)
    np.testing.assert_allclose(ours.T, reference(filled.T, 400, LEADS), rtol=0, atol=TOLERANCE)
    assert helpers.fill_gaps(np.where(hole, mark, ecg)).flags.writeable


@pytest.mark.parametrize("value", [np.nan, 0.0, 0.7], ids=["NaN", "zero", "flat"])
def test_lead_without_signal_becomes_zero(value):
    """A lead of NaN and a flat channel are zero afterwards and do not touch the others."""
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


@pytest.mark.parametrize("leads, gain, baseline", [(LEADS, 1000, 0), (LEADS, 333.25, -512), (TWELVE, "mixed", 0),
                                                   (TWELVE, 200, "mixed")],
                         ids=["course", "decimals, offset", "12 leads, gains", "12 leads, offsets"])
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


@pytest.mark.parametrize("unit, to_mv", [("uV", 1e-3), ("mv", 1)])
def test_other_units(tmp_path, unit, to_mv):
    """Microvolts, and millivolts written otherwise, arrive in mV."""
    path = write_record(tmp_path / "TNMG1")
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace("/mV", f"/{unit}"))
    np.testing.assert_allclose(helpers.read_ecg(path)[0], noise() / 1000 * to_mv, rtol=1e-12)


@pytest.mark.parametrize("unit, encoding", [("V", "ascii"), ("mmHg", "ascii"), ("µV", "utf-8"), ("µV", "latin-1")])
def test_refused_units(tmp_path, unit, encoding):
    """Anything else is refused for what it is (wfdb loses the sign µ, so V may be a millionth of a volt)."""
    path = write_record(tmp_path / "TNMG1")
    header = path.with_suffix(".hea")
    text = header.read_text()
    header.write_text(text.replace("/mV", f"/{unit}"), encoding=encoding)
    with pytest.raises(ValueError, match=r"TNMG1: the unit must be mV or uV, but DI in .*V6 in .*\. Convert") as caught:
        helpers.read_ecg(path)
    assert "Extract" not in str(caught.value)


@pytest.mark.parametrize("name", ["sub/TNMG1.dat", "../x/TNMG1.dat", "/tmp/TNMG1.dat", "a b.dat"])
def test_dat_name_that_wfdb_refuses(tmp_path, name):
    """A .dat elsewhere is refused as wfdb refuses it, although the file is there."""
    path = write_record(tmp_path / "x" / "TNMG1")
    (path.parent / "sub").mkdir()
    for copy in ("sub/TNMG1.dat", "a b.dat"):
        (path.parent / copy).write_bytes(path.with_suffix(".dat").read_bytes())
    header = path.with_suffix(".hea")
    header.write_text(header.read_text().replace("TNMG1.dat", name))
    with pytest.raises((ValueError, OSError)):
        wfdb.rdrecord(str(path))
    with pytest.raises(ValueError, match="TNMG1: cannot be read"):
        helpers.read_ecg(path)


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
    elif what == "lead twice":
        write_record(path, noise(9), leads=[*LEADS, "X9"])
        header.write_text(header.read_text().replace(" X9\n", " V6\n"))
    elif what == "missing lead":
        header.write_text(text.replace(" V6\n", " X9\n"))
    elif what == "all NaN":
        dat.write_bytes(np.full(len(content) // 2, -32768, "<i2").tobytes())
    elif what == "too short":
        write_record(path, noise(n=300))
    elif what == "rate 20 Hz":
        header.write_text(text.replace(" 400 ", " 20 "))
    elif what == "in volts":
        header.write_text(text.replace("/mV", "/V"))
    else:
        header.write_bytes({"empty header": b"", "binary header": bytes(range(256)), "header cut": text[:60].encode(),
                            "words as header": b"<html>quota</html>\n",
                            "leads not counted": text.replace(" 8 ", " x ").encode(),
                            "length 0": text.replace(" 400 1200", " 400 0").encode(),
                            "absurd length": text.replace(" 400 1200", " 400 900000000000").encode()}[what])


UNREADABLE = ["no .dat", "no .hea", "truncated .dat", "empty .dat", "truncated format 212", "empty header",
              "binary header", "words as header", "header cut", "leads not counted", "length 0", "absurd length"]
UNUSABLE = {"truncated .dat": "600 of 1200", "missing lead": "V6", "lead twice": "V6 more than once",
            "all NaN": "finite", "too short": "300 samples", "rate 20 Hz": "20 Hz", "in volts": "mV or uV"}


@pytest.mark.parametrize("what", UNREADABLE)
def test_unreadable_record_is_named(tmp_path, what):
    """read_ecg raises one kind of error, with the record's path and a way out that works in it."""
    path = write_record(tmp_path / "TNMG77")
    damage(path, what)
    with pytest.raises(ValueError, match="TNMG77.*Remove its files and run"):
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


@pytest.mark.parametrize("workers, method", [(1, None), (2, None), (9, None), (2, "spawn")])
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


def test_one_exam(tmp_path):
    """A set of one exam, with more workers asked for than it has exams."""
    records_file = write_records(tmp_path / "data", 1)
    expected = helpers.preprocess_ecg(*helpers.read_ecg(tmp_path / "data" / "TNMG0")).T.astype(np.float32)
    for workers in (None, 4):
        target = helpers.build_h5(records_file, tmp_path / f"{workers}.h5", workers=workers)
        np.testing.assert_array_equal(tracings(target), expected[None])


def test_portions(demo_folder, demo_h5, tmp_path, capsys):
    """48 exams in six portions, the last one short: every exam in its place."""
    target = helpers.build_h5(demo_folder / "train" / "RECORDS.txt", tmp_path / "train.h5", workers=5)
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


def replace_tracings(shape):
    def change(file):
        del file["tracings"]
        file.create_dataset("tracings", shape, "<f4")
    return edit_h5(change)


def cut(keep):
    return lambda target, _: os.truncate(target, int(keep * target.stat().st_size))


def edit_text(name, change):
    def edit(_, folder):
        (folder / name).write_text(change((folder / name).read_text()))
    return edit


STALE = {  # what happened to the file or its records -> a word of the reason, and whether the old file is kept
    "cut in half": (cut(0.5), "read", True), "cut by one byte": (cut(0.999999), "read", True),
    "a web page": (lambda target, _: target.write_text("<html>"), "read", True),
    "no tracings": (edit_h5(lambda file: file.pop("tracings")), "read", False),
    "no exams": (replace_tracings((0, 4096, 8)), "", False),
    "leads first": (replace_tracings((4, 8, 4096)), "shape", False),
    "by the original scripts": (edit_h5(lambda file: [file.attrs.pop(key) for key in list(file.attrs)]), "", True),
    "other order": (edit_text("RECORDS.txt", lambda text: "".join(sorted(text.splitlines(True)))), "other records",
                    False),
    "a record less": (edit_text("RECORDS.txt", lambda text: text.replace("TNMG2\n", "")), "", False),
    "other gain": (edit_text("TNMG1.hea", lambda text: text.replace("1000.0", "500.0")), "other records", False),
    "longer .dat": (lambda _, folder: (folder / "TNMG0.dat").open("ab").write(bytes(16)), "other records", False),
}


@pytest.mark.parametrize("change, reason, kept", STALE.values(), ids=STALE)
def test_stale_file_is_rebuilt(tmp_path, capsys, change, reason, kept):
    """A damaged or foreign file is never used, one line says why, and the result is a fresh build's.

    What was not built here, as far as the file tells, is kept under another name.
    """
    records_file, target = write_records(tmp_path / "data"), tmp_path / "work" / "train.h5"
    helpers.build_h5(records_file, target, workers=1)
    change(target, records_file.parent)
    old = target.read_bytes()
    capsys.readouterr()
    helpers.build_h5(records_file, target, workers=1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "again" in line)
    assert "train.h5" in line and reason in line
    fresh = helpers.build_h5(records_file, tmp_path / "fresh.h5", workers=1)
    np.testing.assert_array_equal(tracings(target), tracings(fresh))
    others = [path.read_bytes() for path in target.parent.iterdir() if path != target]
    assert others == ([old] if kept else [])


def test_other_preprocessing_is_noticed(records, tmp_path, monkeypatch, capsys):
    """A filter that was edited makes another file; edited back, the first numbers again."""
    target = helpers.build_h5(records[0], tmp_path / "train.h5", workers=1)

    def powerline_filter(sample_rate, powerline=50, quality=30):
        return helpers.dsp.iirnotch(50, quality, fs=sample_rate)
    with monkeypatch.context() as patch:
        patch.setattr(helpers, "powerline_filter", powerline_filter)
        helpers.build_h5(records[0], target, workers=1)
    assert "other preprocessing settings" in capsys.readouterr().out
    assert np.abs(tracings(target) - records[1]).max() > 1e-4
    np.testing.assert_array_equal(tracings(helpers.build_h5(records[0], target, workers=1)), records[1])


def test_remarks_are_counted(tmp_path, capsys):
    """Gaps, flat channels, a skipped power-line filter, other checksums: each by name and count, later runs too."""
    def with_change(name, lead, value, samples=slice(None), rate=400):
        digital = noise()
        digital[lead, samples] = value
        return write_record(tmp_path / name, digital, rate)
    with_change("TNMG1", 0, -32768, slice(5, 9))   # a gap
    with_change("TNMG2", 7, -32768, slice(0, 90))  # a gap
    with_change("TNMG3", 3, -32768)                # a lead of NaN
    with_change("TNMG4", 5, 700)                   # a flat channel
    with_change("TNMG5", 0, 1, slice(0, 1), rate=110)
    for name, fmt in (("TNMG6", "16"), ("TNMG7", "212")):  # 17 mV of damage, for both readers
        dat = write_record(tmp_path / name, np.clip(noise(seed=6), -2000, 2000), fmt=fmt).with_suffix(".dat")
        dat.write_bytes(dat.read_bytes()[:600] + b"\x77\x47" * 90 + dat.read_bytes()[780:])
    header = write_record(tmp_path / "TNMG8").with_suffix(".hea")  # sums as signed numbers: the same sums
    header.write_text(re.sub(r"(16 0 -?\d+) (\d+)", lambda m: f"{m[1]} {(int(m[2]) + 2**15) % 2**16 - 2**15}",
                             header.read_text()))
    (tmp_path / "RECORDS.txt").write_text("".join(f"TNMG{i}\n" for i in range(1, 9)))
    for way in ("built", "ready from an earlier run"):
        target = helpers.build_h5(tmp_path / "RECORDS.txt", tmp_path / "train.h5", workers=1)
        lines = [line for line in capsys.readouterr().out.splitlines() if " exams: " in line]
        said = {word: [(int(line.split()[0]), line.split(": ")[-1]) for line in lines if word in line]
                for word in ("interpolated", "set to zero", "flat", "60 Hz", "checksum")}
        assert said == {"interpolated": [(2, "TNMG1, TNMG2")], "set to zero": [(1, "TNMG3")], "flat": [(1, "TNMG4")],
                        "60 Hz": [(1, "TNMG5")], "checksum": [(2, "TNMG6, TNMG7")]}, way
    assert np.isfinite(tracings(target)).all()


@pytest.mark.parametrize("what", UNUSABLE)
def test_bad_record_is_named(tmp_path, what):
    """One bad record of four: named, with the reason, and nothing is written."""
    records_file = write_records(tmp_path / "data")
    write_record(tmp_path / "data" / "TNMG2")
    damage(tmp_path / "data" / "TNMG2", what)
    with pytest.raises(ValueError, match="(?s)1 of 4 .*TNMG2.*" + UNUSABLE[what]) as caught:
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
# Kills, two builds at once, full disks
# ------------------------------------------------------------------------------------------------
def run_killed(function, owner, name, at):
    """Run `function` in a forked process that SIGKILLs itself at call number `at` of `owner.name`."""
    original, calls = getattr(owner, name), []

    def child():
        def counted(*args, **kwargs):
            calls.append(1)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(owner, name, counted)
        function()
    process = FORK.Process(target=child, daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("owner, name, at", [
    (h5py.File, "create_dataset", 1), *((helpers, "preprocess_ecg", at) for at in (1, 2, 3, 4)),
    (h5py.File, "close", 1), (os, "replace", 1)], ids=lambda value: getattr(value, "__name__", str(value)))
def test_kill_at_any_step(records, tmp_path, owner, name, at):
    """Killed before, at and after each exam, at closing or renaming: no file; the next build is an undisturbed one."""
    target = tmp_path / "train.h5"
    run_killed(lambda: helpers.build_h5(records[0], target, workers=1), owner, name, at)
    assert not target.exists()
    np.testing.assert_array_equal(tracings(helpers.build_h5(records[0], target, workers=1)), records[1])
    assert os.listdir(tmp_path) == ["train.h5"], "what the killed run left (GB on real data) stays on the disk"


def planted(monkeypatch, function):
    """Let the forked workers run `function(job)` instead of `_prepare_record`."""
    function.__module__, function.__name__, function.__qualname__ = helpers.__name__, *2 * ["_prepare_record"]
    monkeypatch.setattr(helpers, "_prepare_record", function)
    monkeypatch.setattr(helpers, "START_METHOD", "fork")


def test_no_worker_outlives_its_parent(demo_folder, demo_h5, tmp_path, monkeypatch):
    """SIGKILL of the process in mid-build: its workers end within a second or two; the next build is whole."""
    records_file, target = demo_folder / "train" / "RECORDS.txt", tmp_path / "train.h5"
    prepare = helpers._prepare_record
    reading, writing = os.pipe()  # the workers inherit it: its end is the end of the last process

    def slow(job):
        os.write(writing, b".")
        time.sleep(0.2)
        return prepare(job)

    def program():
        helpers.lock_folder(tmp_path)
        helpers.build_h5(records_file, target, workers=2)
    with monkeypatch.context() as patch:
        planted(patch, slow)
        process = FORK.Process(target=program)
        process.start()
    os.close(writing)
    assert os.read(reading, 1) == b"."  # the workers are at work
    process.kill()
    process.join(30)
    killed, ended = time.monotonic(), False
    while not ended and select.select([reading], [], [], 10)[0]:
        ended = not os.read(reading, 100)
    assert ended and time.monotonic() - killed < 3
    os.close(reading)
    assert not target.exists()
    with helpers.lock_folder(tmp_path):
        helpers.build_h5(records_file, target, workers=1)
    np.testing.assert_array_equal(tracings(target), tracings(demo_h5))
    assert sorted(os.listdir(tmp_path)) == [".lock", "train.h5"]


def test_killed_worker_ends_the_build(records, tmp_path, monkeypatch):
    """A worker process that is killed (out of memory) ends the build within a second or two; no file is left."""
    prepare = helpers._prepare_record

    def mortal(job):
        if job[0].endswith("TNMG1"):
            os.kill(os.getpid(), signal.SIGKILL)
        return prepare(job)
    planted(monkeypatch, mortal)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker process was killed.*workers=1"):
        helpers.build_h5(records[0], tmp_path / "train.h5", workers=2)
    assert time.monotonic() - start < 5 and not os.listdir(tmp_path)


def test_interrupt_ends_the_workers(demo_folder, tmp_path, monkeypatch):
    """Ctrl-C anywhere in the loop stops the workers at once, although the traceback is kept, as a notebook does."""
    def stopped(iterable, *_):
        yield next(iter(iterable))
        raise KeyboardInterrupt
    monkeypatch.setattr(helpers, "progress", stopped)
    with pytest.raises(KeyboardInterrupt) as caught:
        helpers.build_h5(demo_folder / "train" / "RECORDS.txt", tmp_path / "train.h5", workers=2)
    assert caught.tb is not None and not multiprocessing.active_children() and not os.listdir(tmp_path)


@pytest.mark.parametrize("stale", [False, True])
def test_builds_at_once(records, tmp_path, stale):
    """Four processes build one file at the same moment: all end well, it is whole, nothing else is left."""
    target, barrier = tmp_path / "train.h5", FORK.Barrier(4)
    if stale:
        helpers.build_h5(write_records(tmp_path / "data", 3), target, workers=1)

    def build():
        barrier.wait(30)
        helpers.build_h5(records[0], target, workers=1)
        os._exit(0 if np.array_equal(tracings(target), records[1]) else 3)
    processes = [FORK.Process(target=build) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    np.testing.assert_array_equal(tracings(target), records[1])
    assert not [name for name in os.listdir(tmp_path) if name not in ("train.h5", "data")]


@pytest.mark.parametrize("workers", [1, 2])
def test_unwritten_row_is_noticed(records, tmp_path, monkeypatch, workers):
    """A row that no worker wrote is named, and no file is left: zeros must not pass for an exam."""
    prepare = helpers._prepare_record
    planted(monkeypatch, lambda job: ([], None) if job[0].endswith("TNMG2") else prepare(job))
    with pytest.raises(RuntimeError, match="TNMG2 were not written. Run the cell again"):
        helpers.build_h5(records[0], tmp_path / "train.h5", workers=workers)
    assert not os.listdir(tmp_path)


def in_child(function):
    """What `function` returns (a text) in a forked process, which must end well."""
    queue = FORK.SimpleQueue()
    process = FORK.Process(target=lambda: queue.put(function()))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    return queue.get()


def build_in_vain(records_file, h5_file, workers):
    try:
        helpers.build_h5(records_file, h5_file, workers=workers)
        return "no error"
    except (OSError, RuntimeError) as error:  # h5py raises the second from a failing close
        return f"{error}; left: {os.listdir(h5_file.parent)}"


def mount_disk(folder, size):
    """Make `folder` a disk of `size` bytes for this process and its children; whether the system allows it."""
    libc = ctypes.CDLL(None)
    ids = {"setgroups": "deny", "uid_map": f"0 {os.getuid()} 1", "gid_map": f"0 {os.getgid()} 1"}
    new_namespaces, private = 0x10020000, 0x44000  # CLONE_NEWUSER | CLONE_NEWNS; MS_PRIVATE | MS_REC
    if not hasattr(libc, "unshare") or libc.unshare(new_namespaces):
        return False
    try:
        for name, content in ids.items():
            Path("/proc/self", name).write_text(content)
    except OSError:
        return False
    return not (libc.mount(b"none", b"/", None, private, None)
                or libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, f"size={size}".encode()))


@pytest.mark.parametrize("size, workers", [(100_000, 1), (140_000, 1), (300_000, 1), (300_000, 2)],
                         ids=["first write", "marks of all rows", "second exam", "second exam, two workers"])
def test_full_disk(records, tmp_path, size, workers):
    """A disk that fills up at any step ends the build with that error; the process lives and leaves no file."""
    def build():
        if not mount_disk(tmp_path, size):
            return "not allowed"
        return build_in_vain(records[0], tmp_path / "train.h5", workers)
    said = in_child(build)
    if said == "not allowed":
        pytest.skip("needs the right to mount a small disk")
    assert "No space left" in said and said.endswith("left: []")


def test_file_that_may_not_grow(records, tmp_path):
    """A write that really fails (limit on the file size) ends the build, says so and leaves no file."""
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        return build_in_vain(records[0], tmp_path / "train.h5", 1)
    said = in_child(limited)
    assert "File too large" in said and said.endswith("left: []")
    np.testing.assert_array_equal(tracings(helpers.build_h5(records[0], tmp_path / "train.h5", 1)), records[1])
