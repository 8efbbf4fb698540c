"""Preprocessing: parity with the public scripts, leads and gaps, records of all kinds as wfdb reads them."""
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import wfdb
from reference_preprocessing import reference
from scipy.io import savemat

import ecg_helpers as helpers

ROOT = Path(__file__).resolve().parents[1]
STORED = [ROOT / "tests" / "data" / "preprocess_reference.npz",
          ROOT.parent / "shared" / "reference" / "preprocess_reference.npz"]
REAL = ROOT.parent / "shared" / "real" / "ptbxl_codesubset.tar.xz"
LEADS = list(helpers.LEADS)
TWELVE = ["I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6"]
TOLERANCE = 1e-6  # mV


def noise(n_leads=8, n=1200, seed=0):
    """Random walk with drift and a fast wave, (n_leads, n) int16 in microvolts."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 30, (n_leads, n)).cumsum(axis=1) + rng.normal(0, 200, (n_leads, 1))
    return np.clip(steps + 50 * np.sin(np.arange(n) * 0.9), -30000, 30000).astype(np.int16)


def write_record(path, digital=None, leads=LEADS, gain=1000.0, baseline=0, fmt="16", rate=400):
    """Write a WFDB pair through wfdb."""
    digital, n = noise(len(leads)) if digital is None else digital, len(leads)
    wfdb.wrsamp(path.name, fs=rate, units=["mV"] * n, sig_name=list(leads), d_signal=digital.T.astype(np.int64),
                fmt=[fmt] * n, adc_gain=[float(gain)] * n, baseline=[baseline] * n, write_dir=str(path.parent))
    return path


def assert_parity(ecg, rate, leads, **options):
    expected = reference(np.asarray(ecg).T, rate, leads, **options)
    np.testing.assert_allclose(helpers.preprocess_ecg(ecg, rate, leads, **options).T, expected, rtol=0, atol=TOLERANCE)


# ---- Parity ----
@pytest.mark.parametrize("file", STORED, ids=["two cases", "all cases"])
def test_equals_the_stored_output_of_the_public_scripts(file):
    if not file.exists():
        pytest.skip("the stored cases are not here")
    with np.load(file) as cases:
        for i in range(int(cases["n"])):
            ours = helpers.preprocess_ecg(cases[f"{i}_digital"].T / 1000, int(cases[f"{i}_fs"]), cases[f"{i}_leads"])
            np.testing.assert_allclose(ours.T, cases[f"{i}_expected"], rtol=0, atol=TOLERANCE, err_msg=f"case {i}")


@pytest.mark.parametrize("rate, seconds, options", [
    (100, 1, {}), (100, 10, {}), (257, 7.3, {}), (300, 10, {}), (360, 10.24, {}), (400, 10.24, {}), (600, 10, {}),
    (500, 13, {}), (1000, 30, {}), (333.3, 8, {}), (500, 5, {"powerline": None}), (500, 5, {"powerline": 50}),
    (500, 5, {"remove_baseline": False}), (500, 5, {"new_freq": 250, "new_len": 1001})])
def test_equals_an_independent_reference(rate, seconds, options):
    """Short exams are padded, those beyond 10.24 s cropped."""
    assert_parity(noise(n=int(rate * seconds)) / 1000, rate, LEADS, **options)


def test_real_exams(tmp_path):
    """Ten real exams: read as wfdb reads them, preprocessed as the public scripts do."""
    if not REAL.exists():
        pytest.skip("the real exams are not here")
    with tarfile.open(REAL, "r|xz") as tar:  # a stream: the first records are there at once
        for member in tar:
            if member.isreg():
                (tmp_path / Path(member.name).name).write_bytes(tar.extractfile(member).read())
            if len(headers := sorted(tmp_path.glob("*.hea"))) == 10:
                break
    for header in headers:
        signal_mv, rate, leads = helpers.read_ecg(header.with_suffix(""))
        np.testing.assert_array_equal(signal_mv, wfdb.rdrecord(str(header.with_suffix(""))).p_signal.T)
        assert_parity(signal_mv, rate, leads)


# ---- Leads, gaps, what is no exam ----
@pytest.mark.parametrize("names", [TWELVE, [lead.lower() for lead in LEADS], [*LEADS[::-1], "AVR", "AVR"]])
def test_leads_are_found_by_name(names):
    ecg, upper = noise(len(names)) / 1000, [{"I": "DI", "II": "DII"}.get(name, name.upper()) for name in names]
    picked = ecg[[upper.index(lead) for lead in LEADS]]
    np.testing.assert_array_equal(helpers.order_leads(ecg, names), picked)
    np.testing.assert_array_equal(helpers.preprocess_ecg(ecg, 400, names), helpers.preprocess_ecg(picked, 400, LEADS))


@pytest.mark.parametrize("names, lead", [([*LEADS[:7], "X"], "V6"), ([*LEADS, "I"], "DI"),
                                         ([*LEADS[:7], None], "V6")])
def test_missing_or_repeated_lead_is_named(names, lead):
    """Never a lead of zeros, never one of two."""
    with pytest.raises(ValueError, match=f"leads .*'{lead}'"):
        helpers.preprocess_ecg(noise(len(names)) / 1000, 400, names)


@pytest.mark.parametrize("mark", [np.nan, np.inf])
def test_gaps_are_interpolated_within_the_lead(mark):
    rng, ecg = np.random.default_rng(1), noise(n=900) / 1000
    hole = rng.random(ecg.shape) < np.linspace(0.01, 0.9, 8)[:, None]
    filled = np.array([np.interp(np.arange(900), np.flatnonzero(~gap), lead[~gap]) for lead, gap in zip(ecg, hole)])
    given = np.where(hole, mark, ecg)
    ours = helpers.preprocess_ecg(given, 400, LEADS)
    np.testing.assert_allclose(ours.T, reference(filled.T, 400, LEADS), rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(given, np.where(hole, mark, ecg))  # the caller's array is left alone


@pytest.mark.parametrize("value", [np.nan, 0.0, 0.7])
def test_lead_without_signal_becomes_zero(value):
    """A lead of NaN or a flat one touches no other lead."""
    ecg = noise() / 1000
    ecg[4] = value
    ours, others = helpers.preprocess_ecg(ecg, 400, LEADS), np.arange(8) != 4
    np.testing.assert_allclose(ours[4], 0, atol=1e-9)
    np.testing.assert_allclose(ours[others].T, reference(np.nan_to_num(ecg).T, 400, LEADS)[:, others], atol=TOLERANCE)


@pytest.mark.parametrize("signal, rate, words", [
    (np.full((8, 1200), np.nan), 400, "finite"), (noise(n=399), 400, "399 samples"), (noise(n=0), 400, "0 samples"),
    (noise(), 0, "rate 0"), (noise(), 5001, "rate 5001"), (noise(), np.nan, "rate nan"), (noise().T, 400, "samples")])
def test_what_is_no_exam_is_refused(signal, rate, words):
    with pytest.raises(ValueError, match=words):
        helpers.preprocess_ecg(signal, rate, LEADS)


# ---- Records ----
@pytest.mark.parametrize("leads, gain, baseline", [(LEADS, 1000, 0), (TWELVE, 333.25, -512)], ids=["course", "offset"])
def test_common_form_equals_wfdb(tmp_path, monkeypatch, leads, gain, baseline):
    """Without wfdb's slow parser bit for bit the same, NaN where marked as invalid."""
    digital = noise(len(leads), 700)
    digital[1, 50:60] = digital[-1, 0] = -32768
    expected = wfdb.rdrecord(str(write_record(tmp_path / "TNMG1", digital, leads, gain, baseline, rate=360)))
    monkeypatch.setattr(wfdb, "rdrecord", lambda *_: pytest.fail("not read directly"))
    signal_mv, rate, names = helpers.read_ecg(tmp_path / "TNMG1")
    np.testing.assert_array_equal(signal_mv, expected.p_signal.T)
    assert np.isnan(signal_mv[1, 50:60]).all() and np.isnan(signal_mv).sum() == 11
    assert signal_mv.dtype == np.float64 and rate == 360 and list(names) == leads


HEADERS = {  # ways to write a header; the standard makes most of its fields optional
    "comments": lambda text: "#a\n" + text + "#m\xe9decin\n", "Windows": lambda text: text.replace("\n", "\r\n"),
    "no unit": lambda text: text.replace("(0)/mV", ""), "gain 0 is 200": lambda text: text.replace("1000.0(", "0("),
    "negative gain": lambda text: text.replace("1000.0(0)", "-1000(0)"),
    "no length": lambda text: text.replace(" 1200\n", "\n"), "no rate": lambda text: text.replace(" 400 1200\n", "\n"),
    "date and time, counter": lambda text: text.replace(" 400 1200\n", " 400/400(0) 1200 12:30:00 01/02/2014\n"),
    "shorter than the file": lambda text: text.replace(" 400 1200\n", " 400 1100\n"),
    "lead name with a blank": lambda text: text.replace(" V6\n", " lead V6\n"),
    "file, format and gain only": lambda text: "TNMG1 8 400 1200\n" + 8 * "TNMG1.dat 16 1000\n",
    "file and format only": lambda text: "TNMG1 8 400\n" + 8 * "TNMG1.dat 16\n",
    "2 samples a frame": lambda text: text.replace(".dat 16 ", ".dat 16x2 ").replace(" 1200\n", " 600\n"),
    "skew": lambda text: text.replace(".dat 16 ", ".dat 16:3 ", 1),
    "uV": lambda text: text.replace("/mV", "/uV"), "volt": lambda text: text.replace("/mV", "/V"),
    "microvolt sign": lambda text: text.replace("/mV", "/\xb5V"), "mmHg": lambda text: text.replace("/mV", "/mmHg"),
    "in a subfolder": lambda text: text.replace("TNMG1.dat", "sub/TNMG1.dat"),
    "empty": lambda text: "", "a web page": lambda text: "<html>quota</html>\n", "cut": lambda text: text[:60],
    "no samples": lambda text: text.replace(" 1200", " 0"), "absurd": lambda text: text.replace(" 1200", " 9000000000"),
}
REFUSED = ("volt", "microvolt sign", "mmHg", "in a subfolder", "empty", "a web page", "cut", "no samples", "absurd")


@pytest.mark.parametrize("kind", HEADERS)
def test_header_is_read_as_wfdb_does_or_the_record_is_named(tmp_path, kind):
    (tmp_path / "sub").mkdir()
    write_record(tmp_path / "sub" / "TNMG1")
    header = write_record(tmp_path / "TNMG1").with_suffix(".hea")
    text = header.read_text()
    assert HEADERS[kind](text) != text
    header.write_bytes(HEADERS[kind](text).encode("latin-1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind in REFUSED:
            with pytest.raises(ValueError, match="record .*TNMG1"):
                helpers.read_ecg(tmp_path / "TNMG1")
            return
        expected = wfdb.rdrecord(str(tmp_path / "TNMG1"))
        signal_mv, rate, leads = helpers.read_ecg(tmp_path / "TNMG1")
    np.testing.assert_allclose(signal_mv, expected.p_signal.T * (1e-3 if kind == "uV" else 1), rtol=1e-12)
    assert rate == expected.fs and list(leads) == list(expected.sig_name)


def test_record_of_a_challenge(tmp_path):
    """A .mat with 24 bytes before the samples, as in the CinC challenges."""
    digital = noise(12)
    savemat(tmp_path / "A0001.mat", {"val": digital}, format="4")
    lines = [f"A0001.mat 16+24 1000/mV 16 0 0 0 0 {lead}" for lead in TWELVE]
    (tmp_path / "A0001.hea").write_text("\n".join(["A0001 12 400 1200", *lines, "#Age: 74", ""]))
    signal_mv, rate, leads = helpers.read_ecg(tmp_path / "A0001")
    np.testing.assert_allclose(signal_mv, digital / 1000, atol=1e-12)
    assert rate == 400 and list(leads) == TWELVE


@pytest.mark.parametrize("fmt, lost", [("16", "half"), ("16", ".dat"), ("16", ".hea"), ("212", "half")])
def test_record_is_whole_or_named(tmp_path, fmt, lost):
    digital = np.clip(noise(), -2000, 2000)
    path = write_record(tmp_path / "TNMG77", digital, fmt=fmt)
    np.testing.assert_allclose(helpers.read_ecg(path)[0], digital / 1000, atol=1e-12)
    dat = path.with_suffix(".dat")
    dat.write_bytes(dat.read_bytes()[:9000]) if lost == "half" else path.with_suffix(lost).unlink()
    with pytest.raises(ValueError, match="record .*TNMG77"):
        helpers.read_ecg(path)
