"""Real ECGs in the course's layout: made from a copy of PTB-XL and from a server on loopback, whole or not at all."""
import errno
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import ptbxl_to_codesubset as tool
import pytest
import wfdb

import ecg_helpers as helpers

SHARED = Path(__file__).resolve().parents[1] / "../shared/real"
TWELVE = ["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
SEVENTEEN = "records500/00000/00017_hr"  # the record that the tests damage
ZIP_FOLDER = "ptb-xl-a-large-publicly-available-electrocardiography-dataset-1.0.3"
SMALL = pd.DataFrame([
    # ecg_id, patient_id, age, sex, scp_codes, id_exam, part; in record order
    (21, 8421.0, 61.0, 1, "{'NORM': 100.0, 'SR': 0.0}", 105, "train"),
    (3, 13243.0, 300.0, 0, "{'AFIB': 0.0, 'ABQRS': 0.0}", 112, "train"),
    (1004, 9514.0, 90.0, 1, "{'AFLT': 100.0}", 101, "test"),
    (17, 13243.0, 89.0, 0, "{'IMI': 35.0, 'SR': 0.0}", 103, "train"),
    (1002, 77.0, 2.0, 1, "{'PACE': 100.0}", 109, "train"),
    (8, 10001.0, 55.0, 1, "{'AFIB': 100.0}", 110, "test"),
    (30, 5.0, 44.0, 0, "{}", 102, "train"),
    (9, 6.0, 45.0, 1, "{'AFIB': 15.0}", 108, "train"),
], columns=["ecg_id", "patient_id", "age", "sex", "scp_codes", "id_exam", "part"])


# ------------------------------------------------------------------------------------------------
# PTB-XL, built backwards from eight leads
# ------------------------------------------------------------------------------------------------
def tracing(ecg_id, n=5000):
    """Eight leads, (n, 8): a random walk in microvolts."""
    rng = np.random.default_rng(ecg_id)
    return (rng.normal(0, 40, (n, 8)).cumsum(axis=0) + rng.normal(0, 300, 8)).clip(-9000, 9000).astype("<i2")


def twelve_leads(eight):
    """The four other limb leads follow from I and II."""
    one, two = eight[:, :1].astype(float), eight[:, 1:2]
    limb = [one, two, two - one, -(one + two) / 2, one - two / 2, two - one / 2]
    return np.hstack([*np.rint(limb).clip(-32768, 32767), eight[:, 2:]]).astype("<i2")


def write_record(folder, record, eight):
    """A record in PTB-XL's form."""
    samples, name = twelve_leads(eight), record.rpartition("/")[2]
    lines = [f"{name} 12 500 {len(samples)}"]
    for lead, column in zip(TWELVE, samples.T):
        lines.append(f"{name}.dat 16 1000.0(0)/mV 16 0 {column[0]} {column.sum(dtype=int) % 65536} 0 {lead}")
    (folder / record).parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{record}.hea").write_text("\n".join(lines) + "\n")
    (folder / f"{record}.dat").write_bytes(samples.tobytes())


def write_database(folder, table):
    """ptbxl_database.csv of these exams, sorted as PTB-XL's, with some of its other columns; returns the records."""
    table = table.sort_values("ecg_id").drop(columns=["id_exam", "part"], errors="ignore")
    table["report"] = 'sinusrhythmus, "normales ekg"'
    for rate, end in ((100, "lr"), (500, "hr")):
        number = table["ecg_id"]
        table[f"filename_{end}"] = [f"records{rate}/{i // 1000 * 1000:05d}/{i:05d}_{end}" for i in number]
    folder.mkdir(exist_ok=True)
    table.to_csv(folder / tool.DATABASE, index=False)
    return dict(zip(table["ecg_id"], table["filename_hr"]))


def write_ptbxl(folder, table, n=5000):
    for ecg_id, record in write_database(folder, table).items():
        write_record(folder, record, tracing(ecg_id, n))
    return folder


@pytest.fixture(scope="module")
def ptbxl(tmp_path_factory):
    """A PTB-XL of eight exams. Read only."""
    return write_ptbxl(tmp_path_factory.mktemp("official") / ZIP_FOLDER, SMALL)


@pytest.fixture(scope="module")
def exams(tmp_path_factory):
    """The list of the eight exams."""
    path = tmp_path_factory.mktemp("list") / "exams.csv"
    SMALL[["id_exam", "ecg_id", "part"]].to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Records of the eight exams as wfdb writes them, by path."""
    folder = tmp_path_factory.mktemp("expected")
    for exam in SMALL.itertuples():
        (folder / exam.part).mkdir(exist_ok=True)
        wfdb.wrsamp(f"TNMG{exam.id_exam}", fs=500, units=["mV"] * 8, sig_name=list(helpers.LEADS), fmt=["16"] * 8,
                    d_signal=tracing(exam.ecg_id).astype(int), adc_gain=[1000.0] * 8, baseline=[0] * 8,
                    write_dir=str(folder / exam.part))
    return content(folder)


def content(folder):
    """Content of all files below `folder`, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(folder):
    return {name: data for name, data in content(folder).items() if name.endswith((".hea", ".dat"))}


def run(*arguments):
    tool.main([str(argument) for argument in arguments])


def refused(*arguments):
    """What a run says that ends with an error."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert isinstance(caught.value.code, str)  # a message, and exit status 1
    return caught.value.code


# ------------------------------------------------------------------------------------------------
# The set of the results, from an official copy
# ------------------------------------------------------------------------------------------------
def pack(ptbxl, path, top=ZIP_FOLDER + "/", without=None):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content(ptbxl).items():
            if name != without:
                archive.writestr(top + name, data)
    return path


@pytest.mark.parametrize("form", ["folder", "folder around it", "zip", "zip without its folder"])
def test_set_from_an_official_copy(ptbxl, exams, expected, tmp_path, capsys, form):
    """Folder or zip: the same records, as wfdb would write them; nothing else is left, and the copy is only read."""
    copies = {"folder": lambda: ptbxl, "folder around it": lambda: ptbxl.parent,
              "zip": lambda: pack(ptbxl, tmp_path / "ptb.zip"),
              "zip without its folder": lambda: pack(ptbxl, tmp_path / "ptb.zip", top="")}
    before = content(ptbxl)
    run("--ptbxl", copies[form](), "--exams", exams, "--out", tmp_path / "new" / "out")
    made = tmp_path / "new" / "out"
    assert records_of(made / "codesubset") == expected
    others = set(content(made)) - {f"codesubset/{name}" for name in expected}
    assert others == {"codesubset/train/RECORDS.txt", "codesubset/test/RECORDS.txt", "codesubset/train.csv",
                      "test_labels.csv"}
    assert content(ptbxl) == before
    said = capsys.readouterr().out
    assert "train: 6 exams, 2 of them AF (33.3 %)" in said and f"ECG_DATA={made / 'codesubset'}" in said


def test_labels_of_the_set(ptbxl, exams, tmp_path):
    """Records in the list's order; 300 years become 90, only AFIB counts as AF; train.csv has another order."""
    run("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    folder = tmp_path / "codesubset"
    for part, table in (("train", folder / "train.csv"), ("test", tmp_path / "test_labels.csv")):
        mine = SMALL[SMALL["part"] == part]
        labels = helpers.load_labels(table, folder / part / "RECORDS.txt")
        assert list(labels) == ["id_patient", "age", "sex", "AF", "date_exam"]
        assert list(labels.index) == list(mine["id_exam"])
        assert list(labels["id_patient"]) == list(mine["patient_id"])
        assert list(labels["age"]) == [min(age, 90) for age in mine["age"]]
        assert list(labels["sex"]) == ["MF"[sex] for sex in mine["sex"]]
        assert list(labels["AF"]) == ["AFIB" in codes for codes in mine["scp_codes"]]
    rows = pd.read_csv(folder / "train.csv")["id_exam"]
    assert list(rows) != list(SMALL.loc[SMALL["part"] == "train", "id_exam"]) and not rows.is_monotonic_increasing


def test_course_module_takes_the_set(ptbxl, exams, tmp_path, capsys):
    """fetch_codesubset, read_ecg and build_h5 use it as it is: the same millivolts, no remark about damage."""
    run("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    folder = helpers.fetch_codesubset(tmp_path / "codesubset", tmp_path / "work")
    for exam in SMALL.itertuples():
        signal_mv, rate, leads = helpers.read_ecg(folder / exam.part / f"TNMG{exam.id_exam}")
        assert rate == 500 and leads == list(helpers.LEADS)
        np.testing.assert_array_equal(signal_mv, tracing(exam.ecg_id).T / 1000)
    with h5py.File(helpers.build_h5(folder / "test" / "RECORDS.txt", tmp_path / "test.h5", workers=1)) as file:
        assert file["tracings"].shape == (2, 4096, 8) and file.attrs["remarks"] == ""


def test_header_to_the_letter(tmp_path):
    """First sample and 16-bit checksum of the lead itself, in the course's form."""
    eight = np.array([[100, 7, 1, 2, 3, 4, 5, 6], [-300, 7, 1, 2, 3, 4, 5, 6]], "<i2")
    write_record(tmp_path, "r", eight)
    header, samples = tool.convert(tmp_path, "r", "TNMG9")
    lines = ["TNMG9 8 500 2", "TNMG9.dat 16 1000.0(0)/mV 16 0 100 65336 0 DI",
             "TNMG9.dat 16 1000.0(0)/mV 16 0 7 14 0 DII"]
    assert header.decode().split("\n")[:3] == lines and header.endswith(b" 16 0 6 12 0 V6\n")
    assert samples == eight.tobytes()


def test_same_set_is_kept(ptbxl, exams, tmp_path, capsys):
    """A second run writes no record; lost test labels come back."""
    run("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    before, inode = content(tmp_path), (tmp_path / "codesubset").stat().st_ino
    (tmp_path / "test_labels.csv").unlink()
    (tmp_path / "codesubset" / "train.h5").write_text("built")
    capsys.readouterr()
    run("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    assert "it is kept" in capsys.readouterr().out and (tmp_path / "codesubset").stat().st_ino == inode
    assert content(tmp_path) == before | {"codesubset/train.h5": b"built"}


def test_debris_of_a_killed_run(ptbxl, exams, expected, tmp_path):
    """What a killed run left beside the set does not come into it, and goes."""
    (tmp_path / "codesubset.part/codesubset/train").mkdir(parents=True)
    (tmp_path / "codesubset.part/codesubset/train/TNMG1.dat").write_text("half")
    run("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    assert records_of(tmp_path / "codesubset") == expected
    assert sorted(os.listdir(tmp_path)) == ["codesubset", "test_labels.csv"]


def set_of_results_in(folder, exams, ptbxl):
    run("--ptbxl", ptbxl, "--exams", exams, "--out", folder)
    return folder / "codesubset"


OTHERS = {  # what may lie in the set's place
    "thesis": lambda out, *_: (out / "codesubset" / "thesis.txt").write_text("mine"),
    "file": lambda out, *_: (out / "codesubset").write_text("mine"),
    "labels of other data": lambda out, *_: (out / "test_labels.csv").write_text("mine"),
    "other row": lambda *made: (set_of_results_in(*made) / "train.csv").write_text("id_exam"),
    "record lost": lambda *made: (set_of_results_in(*made) / "train" / "TNMG103.hea").unlink(),
    "record cut": lambda *made: os.truncate(set_of_results_in(*made) / "test" / "TNMG101.dat", 1000),
}


@pytest.mark.parametrize("put", OTHERS.values(), ids=OTHERS)
def test_other_content_is_not_replaced(ptbxl, exams, tmp_path, put):
    """Something else in the set's place, or a damaged set: refused with what to do, and nothing changes."""
    if put is OTHERS["thesis"]:
        (tmp_path / "codesubset").mkdir()
    put(tmp_path, exams, ptbxl)
    before = content(tmp_path)
    assert "move it away, or choose another --out" in refused("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    assert content(tmp_path) == before


# ------------------------------------------------------------------------------------------------
# What can be wrong with a copy
# ------------------------------------------------------------------------------------------------
def only_100_hz(folder):
    (folder / "records500").rename(folder / "records100")


def without_column(folder):
    table = pd.read_csv(folder / tool.DATABASE)
    table.drop(columns=["scp_codes", "sex"]).to_csv(folder / tool.DATABASE, index=False)


def without_exam(folder):
    table = pd.read_csv(folder / tool.DATABASE)
    table[table["ecg_id"] != 1002].to_csv(folder / tool.DATABASE, index=False)


def with_column(folder, **column):
    table = pd.read_csv(folder / tool.DATABASE)
    table.assign(**column).to_csv(folder / tool.DATABASE, index=False)


def flipped(folder):
    path = folder / f"{SEVENTEEN}.dat"
    data = bytearray(path.read_bytes())
    data[24 * 2900 + 6] ^= 1  # a lead that the set does not keep
    path.write_bytes(data)


def in_header(old, new):
    def change(folder):
        path = folder / f"{SEVENTEEN}.hea"
        path.write_text(path.read_text().replace(old, new))
    return change


WRONG = {  # what is wrong with the copy, and what the message names
    "100 Hz only": (only_100_hz, ["no records500", "100 Hz"]),
    "no table": (lambda folder: (folder / tool.DATABASE).unlink(), ["holds no ptbxl_database.csv"]),
    "table is a web page": (lambda folder: (folder / tool.DATABASE).write_text("<html>"), ["column ecg_id"]),
    "table is empty": (lambda folder: (folder / tool.DATABASE).write_text(""), ["ptbxl_database.csv is no table"]),
    "columns missing": (without_column, ["ptbxl_database.csv: column sex, scp_codes missing"]),
    "exam not in the table": (without_exam, ["lacks 1 exams", "1002"]),
    "no patients": (lambda folder: with_column(folder, patient_id=None), ["lacks 8 exams", "21, 3, 1004"]),
    "path upwards": (lambda folder: with_column(folder, filename_hr="../../x"), ["filename_hr is not like", "../../x"]),
    "absolute path": (lambda folder: with_column(folder, filename_hr="/tmp/x"), ["filename_hr is not like", "/tmp/x"]),
    "no path": (lambda folder: with_column(folder, filename_hr=None), ["filename_hr is not like", "nan"]),
    "number twice": (lambda folder: with_column(folder, ecg_id=3), ["ecg_id must hold whole numbers, each once"]),
    "number with decimals": (lambda folder: with_column(folder, ecg_id=2.5), ["ecg_id must hold whole numbers"]),
    "record missing": (lambda folder: (folder / f"{SEVENTEEN}.dat").unlink(), [f"record {SEVENTEEN}", "missing"]),
    "record cut": (lambda folder: os.truncate(folder / f"{SEVENTEEN}.dat", 119_999), [SEVENTEEN, "119,999 bytes"]),
    "header cut": (lambda folder: os.truncate(folder / f"{SEVENTEEN}.hea", 100), [SEVENTEEN, "header is not whole"]),
    "header empty": (lambda folder: os.truncate(folder / f"{SEVENTEEN}.hea", 0), [SEVENTEEN, "header is not whole"]),
    "line lost": (in_header(f"{TWELVE[4]}\n", f"{TWELVE[4]}\n#"), [SEVENTEEN, "header is not whole"]),
    "bit flipped": (flipped, [SEVENTEEN, "lead AVR", "checksum"]),
    "other gain": (in_header("1000.0(0)/mV", "200.0(0)/mV"), [SEVENTEEN, "header is not whole"]),
    "other rate": (in_header(" 12 500 ", " 12 100 "), [SEVENTEEN, "header is not whole"]),
    "lead missing": (in_header(" V4\n", " V9\n"), [SEVENTEEN, "lead V4 missing"]),
}


@pytest.mark.parametrize("damage, words", WRONG.values(), ids=WRONG)
def test_copy_that_is_not_whole(ptbxl, exams, tmp_path, damage, words):
    """The file or the record is named, and no half set is left."""
    copy = shutil.copytree(ptbxl, tmp_path / "copy")
    damage(copy)
    said = refused("--ptbxl", copy, "--exams", exams, "--out", tmp_path / "out")
    assert [word for word in words if word not in said] == []
    assert not (tmp_path / "out").exists() or content(tmp_path / "out") == {}


def bytes_lost(path, lost):
    path.write_bytes(path.read_bytes().replace(lost, bytes(len(lost)), 1))


@pytest.mark.parametrize("damage, words", [
    (lambda path: os.truncate(path, 300_000), ["ptb.zip is neither a folder nor a whole zip"]),
    (lambda path: path.unlink(), ["ptb.zip is neither"]),
    (lambda path: bytes_lost(path, tracing(17)[0, 2:].tobytes()), [f"record {SEVENTEEN}", "CRC"]),
    (lambda path: bytes_lost(path, b"ecg_id,patient_id"), ["ptbxl_database.csv", "CRC"]),
    (lambda path: pack(path.parent / "copy", path, without=f"{SEVENTEEN}.dat"), [f"record {SEVENTEEN}", "missing"]),
], ids=["cut", "missing", "record damaged", "table damaged", "record missing"])
def test_zip_that_is_not_whole(ptbxl, exams, tmp_path, damage, words):
    """A cut zip, and one with a damaged or missing file, are named."""
    shutil.copytree(ptbxl, tmp_path / "copy")
    path = pack(ptbxl, tmp_path / "ptb.zip")
    damage(path)
    said = refused("--ptbxl", path, "--exams", exams, "--out", tmp_path / "out")
    assert [word for word in words if word not in said] == []
    assert not (tmp_path / "out").exists() or content(tmp_path / "out") == {}


def test_list_of_exams_is_missing(ptbxl, tmp_path):
    """What to do without the list: give its path, or make the other set."""
    said = refused("--ptbxl", ptbxl, "--exams", tmp_path / "no.csv", "--out", tmp_path / "out")
    assert "tests/data/ptbxl_exams.csv" in said and "--exams" in said and "--course-like" in said
    assert said.split("\n")[1] in refused("--url", "http://127.0.0.1:1", "--exams", tmp_path / "no.csv")  # at once
    (tmp_path / "other.csv").write_text("id_exam,part\n1,train\n")
    assert "other.csv: column ecg_id missing" in refused("--ptbxl", ptbxl, "--exams", tmp_path / "other.csv")


@pytest.mark.parametrize("rows, words", [
    ("1,3,train\n1,17,test\n", "id_exam must hold whole numbers, each once"),
    ("../../x,3,train\n2,17,test\n", "id_exam must hold whole numbers"),
    ("1,a,train\n2,17,test\n", "ecg_id must hold whole numbers"),
    ("1,3,train\n2,17,valid\n", "part must be train or test"),
    ("1,3,train\n2,17,train\n", "both must be there"),
])
def test_list_of_exams_that_is_wrong(ptbxl, tmp_path, rows, words):
    """Each exam once, by number, in one of the two parts."""
    (tmp_path / "list.csv").write_text("id_exam,ecg_id,part\n" + rows)
    said = refused("--ptbxl", ptbxl, "--exams", tmp_path / "list.csv", "--out", tmp_path / "out")
    assert f"list.csv: {words}" in said or words in said and "list.csv" in said
    assert not (tmp_path / "out").exists()


def test_odd_ages_and_patients(ptbxl, exams, tmp_path):
    """Text in place of an age or a patient is a missing value: no exam of the list lacks an age here."""
    copy = shutil.copytree(ptbxl, tmp_path / "copy")
    with_column(copy, age="61,0")
    run("--ptbxl", copy, "--exams", exams, "--out", tmp_path / "out")
    assert pd.read_csv(tmp_path / "out" / "codesubset" / "train.csv")["age"].isna().all()


def test_full_disk(ptbxl, exams, tmp_path, monkeypatch):
    """No space for the last record: the error is named, and no half set is left."""
    write = Path.write_bytes

    def full(path, data):
        if path.name == "TNMG108.dat":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)
    monkeypatch.setattr(Path, "write_bytes", full)
    assert "No space left" in refused("--ptbxl", ptbxl, "--exams", exams, "--out", tmp_path)
    assert content(tmp_path) == {}


# ------------------------------------------------------------------------------------------------
# Download from a server on loopback
# ------------------------------------------------------------------------------------------------
@contextmanager
def served(folder, **faults):
    """PTB-XL on loopback; yields its address and the names asked for.

    `faults`: for a file (named without its ending: hea_00017, dat_00017, database) the answers that come before the
    right one; an answer is a function (handler, content).
    """
    asked, answers = [], {name: iter(given) for name, given in faults.items()}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = self.path.removeprefix("/files/ptb-xl/1.0.3/")
            asked.append(name)
            file = folder / name
            short = "database" if name == tool.DATABASE else f"{file.suffix[1:]}_{file.stem.removesuffix('_hr')}"
            answer = next(answers.get(short, iter(())), right)
            if file.is_file():
                answer(self, file.read_bytes())
            else:
                send(self, b"no such file", 404)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/files/ptb-xl/1.0.3", asked
    finally:
        server.shutdown()
        server.server_close()


def send(handler, body, status=200, length=None, **headers):
    handler.send_response(status)
    for name, value in {"Content_Length": len(body) if length is None else length, **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def right(handler, data):
    send(handler, data)


def cut(handler, data):
    send(handler, data[:len(data) // 2], length=len(data))
    handler.close_connection = True


def short(handler, data):
    send(handler, data[:len(data) // 2])


def busy(handler, data):
    send(handler, b"wait", 429, Retry_After=0)


def broken(handler, data):
    send(handler, b"no", 500)


def page(handler, data):
    send(handler, b"\n<!DOCTYPE html><html>Sign in</html>", Content_Type="text/html")


def damaged(handler, data):
    send(handler, data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    """No pauses, and no proxy between us and loopback."""
    monkeypatch.setattr(tool, "PAUSES", (0, 0, 0))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


def names(*ecg_ids):
    """Files of a download, by path: the table and these records, or those of all eight exams."""
    records = [f"records500/{i // 1000 * 1000:05d}/{i:05d}_hr" for i in ecg_ids or SMALL["ecg_id"]]
    return {tool.DATABASE, *(record + end for record in records for end in (".hea", ".dat"))}


def test_download(ptbxl, exams, expected, tmp_path, capsys):
    """Just the records needed are fetched, each file once, and kept; a second run asks nothing."""
    some = tmp_path / "some.csv"
    pd.read_csv(exams).query("ecg_id != 30").to_csv(some, index=False)
    with served(ptbxl) as (url, asked):
        run("--url", url, "--exams", some, "--out", tmp_path / "out")
        said = capsys.readouterr().out
        needed = names(21, 3, 1004, 17, 1002, 8, 9)
        assert sorted(asked) == sorted(needed) and "7 of 7 records, about 1 MB" in said and "\r" in said
        assert content(tmp_path / "out" / "ptb-xl") == {name: (ptbxl / name).read_bytes() for name in needed}
        shutil.rmtree(tmp_path / "out" / "codesubset")
        run("--url", url + "/", "--exams", some, "--out", tmp_path / "out")
        assert len(asked) == len(needed) and "0 of 7 records" in capsys.readouterr().out
    made = records_of(tmp_path / "out" / "codesubset")
    assert made == {name: data for name, data in expected.items() if "TNMG102" not in name}


@pytest.mark.parametrize("faults", [
    {"dat_00017": [cut]}, {"dat_00017": [cut, cut, cut]}, {"hea_00017": [cut]}, {"database": [cut]},
    {"dat_00017": [broken], "hea_01004": [busy], "database": [busy, broken]}, {"dat_00017": [short]},
    {"hea_00017": [short]}, {"dat_00017": [damaged]}, {"dat_01002": [broken, damaged, cut]},
], ids=["cut", "cut three times", "header cut", "table cut", "busy and broken", "short", "header short", "damaged",
        "all of it"])
def test_passing_trouble_costs_only_time(ptbxl, exams, expected, tmp_path, faults):
    """Cut connections, 429, 500, short and damaged files: asked again, and the set is whole."""
    with served(ptbxl, **faults) as (url, asked):
        run("--url", url, "--exams", exams, "--out", tmp_path)
    assert records_of(tmp_path / "codesubset") == expected
    assert content(tmp_path / "ptb-xl") == {name: (ptbxl / name).read_bytes() for name in names()}
    faulty = sum(len(answers) for answers in faults.values())
    assert len(asked) in (17 + faulty, 18 + faulty)  # a damaged record is fetched anew with its header


@pytest.mark.parametrize("faults, words, asked_for_it", [
    ({"dat_00017": itertools.repeat(damaged)}, [SEVENTEEN, "checksum", "fetched anew"], 2),
    ({"dat_00017": itertools.repeat(short)}, [SEVENTEEN, "60,000 bytes", "fetched anew"], 2),
    ({"dat_00017": itertools.repeat(broken)}, ["00017_hr.dat: HTTP 500"], 4),
    ({"dat_00017": itertools.repeat(busy)}, ["00017_hr.dat: HTTP 429"], 4),
    ({"dat_00017": itertools.repeat(cut)}, ["00017_hr.dat", "IncompleteRead"], 4),
    ({"dat_00017": [page]}, ["00017_hr.dat: a web page came"], 1),
    ({"dat_00017": [lambda handler, data: send(handler, b"", 404)]}, ["00017_hr.dat: HTTP 404", "--url"], 1),
], ids=["damaged", "short", "500", "429", "cut", "web page", "404"])
def test_lasting_trouble_ends_in_a_message(ptbxl, exams, expected, tmp_path, faults, words, asked_for_it):
    """The record is named; the good files stay, nothing half is left; the next run fetches what is missing."""
    with served(ptbxl, **faults) as (url, asked):
        said = refused("--url", url, "--exams", exams, "--out", tmp_path, "--connections", 2)
    assert [word for word in [*words, "the same command continues"] if word not in said] == []
    assert asked.count(f"{SEVENTEEN}.dat") == asked_for_it
    kept = content(tmp_path)
    assert all(data == (ptbxl / name.removeprefix("ptb-xl/")).read_bytes() for name, data in kept.items())
    assert "ptb-xl/records500/00000/00021_hr.dat" in kept and not [name for name in kept if "00017_hr.dat" in name]
    with served(ptbxl) as (url, asked):
        run("--url", url, "--exams", exams, "--out", tmp_path)
    assert sorted(asked) == sorted(names() - {name.removeprefix("ptb-xl/") for name in kept})
    assert records_of(tmp_path / "codesubset") == expected


@pytest.mark.parametrize("answer, words", [(page, "a web page"),
                                           (lambda handler, data: send(handler, b"a,b\n1,2\n"), "column ecg_id"),
                                           (lambda handler, data: send(handler, b"", 403), "HTTP 403")])
def test_table_cannot_be_had(ptbxl, exams, tmp_path, answer, words):
    """A sign-in page in place of PTB-XL's table is not kept."""
    with served(ptbxl, database=[answer]) as (url, _):
        assert words in refused("--url", url, "--exams", exams, "--out", tmp_path)
    assert content(tmp_path) == {}


def test_wrong_address(exams, tmp_path):
    """An address without https:// and a closed port are said; the first is not tried again."""
    assert "physionet" in refused("--url", "physionet.org/x", "--exams", exams, "--out", tmp_path)
    with pytest.raises(ValueError, match="No scheme"):
        tool.Server("physionet.org/x").get(tool.DATABASE)
    with served(tmp_path) as (url, _):
        pass
    assert "refused" in refused("--url", url, "--exams", exams, "--out", tmp_path)


def test_pauses(ptbxl, monkeypatch, capsys):
    """A pause before each further try: the server's own where it names one, but two minutes at the most."""
    monkeypatch.setattr(tool, "PAUSES", (1, 3, 10))
    day, waited = (lambda handler, data: send(handler, b"", 503, Retry_After=86_400)), []
    with served(ptbxl, hea_00017=[busy, day, broken]) as (url, _):
        server = tool.Server(url)
        server.stopped = SimpleNamespace(is_set=bool, wait=waited.append)
        assert server.get(f"{SEVENTEEN}.hea") == (ptbxl / f"{SEVENTEEN}.hea").read_bytes()
    assert waited == [0, 120, 10] and "HTTP 503 Service Unavailable. Next try in 120 s" in capsys.readouterr().out


def test_error_ends_the_pauses_of_others(ptbxl, exams, tmp_path, monkeypatch):
    """While one download waits for its next try, another fails for good: the run ends then."""
    monkeypatch.setattr(tool, "PAUSES", (50,))
    waits = threading.Event()

    def busy_now(handler, data):
        waits.set()
        broken(handler, data)

    def absent(handler, data):
        waits.wait(10)
        send(handler, b"", 404)
    start = time.monotonic()
    with served(ptbxl, dat_00021=[busy_now], dat_00003=[absent]) as (url, _):
        assert "00003_hr.dat: HTTP 404" in refused("--url", url, "--exams", exams, "--out", tmp_path)
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("connections", [1, 3])
def test_few_connections_at_a_time(ptbxl, exams, tmp_path, connections):
    """No more requests at once than asked for."""
    running, most = [], []

    def slow(handler, data):
        running.append(1)
        most.append(len(running))
        time.sleep(0.1)
        running.pop()
        send(handler, data)
    slow_ones = {f"dat_{i:05d}": [slow] for i in SMALL["ecg_id"]}
    with served(ptbxl, **slow_ones) as (url, _):
        run("--url", url, "--exams", exams, "--out", tmp_path, "--connections", connections)
    assert max(most) <= connections and (max(most) > 1) == (connections > 1)


def test_record_that_was_damaged_here(ptbxl, exams, expected, tmp_path):
    """A download that lost bits or its half since is fetched anew; the others are not asked for."""
    with served(ptbxl) as (url, asked):
        run("--url", url, "--exams", exams, "--out", tmp_path)
        shutil.rmtree(tmp_path / "codesubset")
        flipped(tmp_path / "ptb-xl")
        os.truncate(tmp_path / "ptb-xl/records500/01000/01002_hr.dat", 100)
        (tmp_path / "ptb-xl/records500/00000/00003_hr.hea").unlink()
        del asked[:]
        run("--url", url, "--exams", exams, "--out", tmp_path)
    lost = names(17, 1002) - {tool.DATABASE} | {"records500/00000/00003_hr.hea"}
    assert sorted(asked) == sorted(lost) and records_of(tmp_path / "codesubset") == expected


def test_full_disk_while_downloading(ptbxl, exams, tmp_path, monkeypatch):
    """No space for a file: nothing half is left of it, what came before stays."""
    def full(source, target):
        if str(target).endswith("00017_hr.dat"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.rename(source, target)
    monkeypatch.setattr(os, "replace", full)
    with served(ptbxl) as (url, _):
        said = refused("--url", url, "--exams", exams, "--out", tmp_path, "--connections", 1)
    kept = content(tmp_path)
    assert "No space left" in said and not [name for name in kept if "part" in name or "00017_hr.dat" in name]
    assert "ptb-xl/records500/00000/00021_hr.dat" in kept


@pytest.mark.skipif(os.name != "posix", reason="needs SIGINT")
def test_interrupted_download_continues(ptbxl, exams, expected, tmp_path):
    """Ctrl-C ends a run with one line and no half file; the next one asks only for what is missing."""
    stalled, released = threading.Event(), threading.Event()

    def stall(handler, data):
        stalled.set()
        released.wait(20)
        send(handler, data)
    with served(ptbxl, dat_00017=[stall]) as (url, asked):
        command = [sys.executable, tool.__file__, "--url", url, "--exams", exams, "--out", tmp_path]
        command += ["--connections", "1"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert stalled.wait(30)
        process.send_signal(signal.SIGINT)
        released.set()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1 and said.count("\n") == 3 and "Stopped." in said and "Traceback" not in said
    kept = {name.removeprefix("ptb-xl/") for name in content(tmp_path)}
    needed = names()
    assert kept <= needed and 1 < len(kept) < len(needed)
    with served(ptbxl) as (url, asked):
        run("--url", url, "--exams", exams, "--out", tmp_path)
    assert sorted(asked) == sorted(needed - kept) and records_of(tmp_path / "codesubset") == expected


# ------------------------------------------------------------------------------------------------
# The set like the course's
# ------------------------------------------------------------------------------------------------
def many_exams(n_exams, n_patients, n_af, seed=0):
    """PTB-XL's table with exams of some patients more than once, AF and other exams within one patient too."""
    rng = np.random.default_rng(seed)
    patient = rng.integers(1, n_patients + 1, n_exams)
    likely = np.where(patient < 1.2 * n_af * n_patients / n_exams, 0.85, 0.001)
    af = np.argsort(rng.random(n_exams) / likely)[:n_af]
    codes = rng.choice(["{'NORM': 100.0}", "{'AFLT': 50.0}", "{'PACE': 100.0, 'SR': 0.0}"], n_exams).astype(object)
    codes[af] = "{'AFIB': 0.0, 'IMI': 35.0}"
    return pd.DataFrame({"ecg_id": np.arange(1, n_exams + 1), "patient_id": patient.astype(float), "scp_codes": codes,
                         "age": rng.integers(18, 90, n_exams).astype(float), "sex": rng.integers(0, 2, n_exams)})


@pytest.fixture(scope="module")
def whole_table(tmp_path_factory):
    """PTB-XL's number of exams, patients and AF exams."""
    folder = tmp_path_factory.mktemp("table")
    write_database(folder, many_exams(21_799, 18_869, 1_514))
    return tool.read_database((folder / tool.DATABASE).read_bytes())


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_shares_of_the_course(whole_table, seed):
    """All AF exams, half in either part; 30 % and 50 % AF to the exam; no patient in both parts."""
    exams = tool.choose_course_like(whole_table, seed)
    counts = exams.groupby(["part", "AF"]).size().to_dict()
    assert counts == {("train", 1): 757, ("train", 0): 1766, ("test", 1): 757, ("test", 0): 757}
    assert set(whole_table.loc[whole_table["AF"] == 1, "ecg_id"]) <= set(exams["ecg_id"])
    train, test = exams[exams["part"] == "train"], exams[exams["part"] == "test"]
    assert not set(train["id_patient"]) & set(test["id_patient"])
    assert exams["id_exam"].is_unique and (exams["id_exam"] == 100_000 + exams["ecg_id"]).all()
    known = whole_table.set_index("ecg_id").loc[exams["ecg_id"]]
    assert list(known["AF"]) == list(exams["AF"]) and list(known["id_patient"]) == list(exams["id_patient"])


def test_order_and_choice_say_nothing(whole_table):
    """AF is spread over the records, other exams over PTB-XL and over the patients that have AF in other exams."""
    exams = tool.choose_course_like(whole_table, 42)
    others = exams[exams["AF"] == 0]
    for part in ("train", "test"):
        af = exams.loc[exams["part"] == part, "AF"].to_numpy()
        assert abs(np.flatnonzero(af).mean() / len(af) - 0.5) < 0.05 and 0.2 < af[:200].mean() < 0.6
        number = others.loc[others["part"] == part, "ecg_id"]
        assert not number.is_monotonic_increasing and abs(number.mean() / 21_799 - 0.5) < 0.05
    af_patients = set(exams.loc[exams["AF"] == 1, "id_patient"])
    assert others["id_patient"].isin(af_patients).any()


def test_seed_decides(whole_table):
    """The same seed gives the same exams in the same order, another seed others."""
    first, again, other = (tool.choose_course_like(whole_table, seed) for seed in (7, 7, 8))
    pd.testing.assert_frame_equal(first, again)
    assert set(first["ecg_id"]) != set(other["ecg_id"])
    af_in_test = [set(exams.query("part == 'test' and AF == 1")["id_patient"]) for exams in (first, other)]
    assert af_in_test[0] != af_in_test[1]


def test_course_like_set(tmp_path, capsys):
    """Made twice from one download that both sets share; the module takes it; odd rows of the table are left out."""
    table = many_exams(240, 200, 30)
    table.loc[3, "patient_id"] = None
    table.loc[5, "scp_codes"] = "{'AFIB': "
    table.loc[6, "age"] = None
    source, out, listed = write_ptbxl(tmp_path / "source", table, n=60), tmp_path / "out", tmp_path / "list.csv"
    usable = table.drop(index=[3, 5])
    assert list(tool.read_database((source / tool.DATABASE).read_bytes())["ecg_id"]) == list(usable["ecg_id"])
    ids = [*usable["ecg_id"][:3], *usable["ecg_id"][-3:]]
    pd.DataFrame({"id_exam": ids, "ecg_id": ids, "part": ["train", "test"] * 3}).to_csv(listed, index=False)
    with served(source) as (url, asked):
        run("--course-like", "--url", url, "--out", out)
        run("--exams", listed, "--url", url, "--out", out)
        assert len(set(asked)) == len(asked)
    run("--course-like", "--ptbxl", source, "--out", tmp_path / "again")
    run("--course-like", "--ptbxl", source, "--out", tmp_path / "other", "--seed", 1)
    made, again, other = (content(folder / "course_like") for folder in (out, tmp_path / "again", tmp_path / "other"))
    assert made == again and made != other and len(content(out / "codesubset")) == 15
    folder = helpers.fetch_codesubset(out / "course_like" / "codesubset")
    n_af, patients = {}, {}
    for part, labels in (("train", folder / "train.csv"), ("test", out / "course_like" / "test_labels.csv")):
        labels = helpers.load_labels(labels, folder / part / "RECORDS.txt")
        n_af[part], patients[part] = [len(labels), labels["AF"].sum()], set(labels["id_patient"])
        codes = usable.set_index("ecg_id")["scp_codes"].loc[labels.index - 100_000]
        assert list(labels["AF"]) == list(codes.str.contains("AFIB"))
        exam = labels.index[0]
        np.testing.assert_array_equal(helpers.read_ecg(folder / part / f"TNMG{exam}")[0],
                                      tracing(exam - 100_000, 60).T / 1000)
    total = usable["scp_codes"].str.contains("AFIB").sum()
    test = total // 2
    assert n_af == {"train": [total - test + round(7 / 3 * (total - test)), total - test], "test": [2 * test, test]}
    assert not patients["train"] & patients["test"]


def test_no_af_exam(ptbxl, tmp_path):
    """A table of other statements is refused."""
    copy = shutil.copytree(ptbxl, tmp_path / "copy")
    with_column(copy, scp_codes="{'NORM': 100.0}")
    assert "no exam with AFIB" in refused("--course-like", "--ptbxl", copy, "--out", tmp_path / "out")


def test_script_alone_in_an_empty_folder(tmp_path):
    """As in Colab: the one file, without the project; results go to ptbxl/ there, without an exam list too."""
    source = write_ptbxl(tmp_path / "source", many_exams(60, 50, 8), n=60)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tool.__file__, alone)
    with served(source) as (url, _):
        command = [sys.executable, "-I", "ptbxl_to_codesubset.py", "--url", url]
        done = subprocess.run([*command, "--course-like"], cwd=alone, capture_output=True, text=True, timeout=60)
        listed = subprocess.run(command, cwd=alone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"ECG_DATA={alone}/ptbxl/course_like/codesubset\n" in done.stdout
    assert sorted(os.listdir(alone / "ptbxl")) == ["course_like", "ptb-xl"]
    assert helpers.fetch_codesubset(alone / "ptbxl" / "course_like") == alone / "ptbxl" / "course_like" / "codesubset"
    assert listed.returncode == 1 and "--exams" in listed.stderr and "Traceback" not in listed.stderr


# ------------------------------------------------------------------------------------------------
# The exams of the published results
# ------------------------------------------------------------------------------------------------
def test_list_of_the_published_results():
    """1,488 and 522 exams, every one once."""
    listed = pd.read_csv(tool.EXAMS)
    assert listed["part"].value_counts().to_dict() == {"train": 1488, "test": 522}
    assert listed["id_exam"].is_unique and listed["ecg_id"].is_unique and list(listed) == ["id_exam", "ecg_id", "part"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real ECGs are not here")
def test_published_set_to_the_last_byte(tmp_path):
    """All 2,010 exams, PTB-XL built backwards from them: records, lists and tables are the published ones."""
    with tarfile.open(SHARED / "ptbxl_codesubset.tar.xz") as archive:
        files = [member for member in archive if member.isfile()]
        published = {member.name.removeprefix("./"): archive.extractfile(member).read() for member in files}
    tables = [published["codesubset/train.csv"], published["test_labels.csv"]]
    labels = pd.concat(pd.read_csv(io.BytesIO(table)) for table in tables)
    table = pd.read_csv(tool.EXAMS).merge(labels, on="id_exam")
    table["scp_codes"] = np.where(table["AF"] == 1, "{'AFIB': 0.0}", "{'NORM': 100.0}")
    table["age"] = table["age"].astype(float).mask(table["age"] == 90, 300)
    table["sex"] = table["sex"].map({"M": 0, "F": 1})
    source = tmp_path / "source"
    records = write_database(source, table.rename(columns={"id_patient": "patient_id"}))
    for exam in table.itertuples():
        samples = np.frombuffer(published[f"codesubset/{exam.part}/TNMG{exam.id_exam}.dat"], "<i2")
        write_record(source, records[exam.ecg_id], samples.reshape(-1, 8))
    run("--ptbxl", source, "--out", tmp_path / "out")
    shutil.rmtree(source)
    made = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert sorted(made) == sorted(published)
    assert [name for name in made if made[name] != published[name]] == []
