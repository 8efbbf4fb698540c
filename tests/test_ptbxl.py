"""Real ECGs in the course's layout: made from a copy of PTB-XL and from a server on loopback, whole or not at all."""
import os
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path

import numpy as np
import pandas as pd
import ptbxl_to_codesubset as tool
import pytest
import wfdb

TWELVE = ["I", "II", "III", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6"]
HEADER, SAMPLES = "records500/00000/00017_hr.hea", "records500/00000/00017_hr.dat"  # the record that the tests damage
SMALL = pd.DataFrame([
    (21, 8421.0, 61.0, 1, "{'NORM': 100.0, 'SR': 0.0}", 105, "train"),
    (3, 13243.0, 300.0, 0, "{'AFIB': 0.0, 'ABQRS': 0.0}", 112, "train"),
    (1004, 9514.0, 90.0, 1, "{'AFLT': 100.0}", 101, "test"),
    (17, 13243.0, 89.0, 0, "{'IMI': 35.0, 'SR': 0.0}", 103, "train"),
    (8, 10001.0, None, 1, "{'AFIB': 100.0}", 110, "test"),
], columns=["ecg_id", "patient_id", "age", "sex", "scp_codes", "id_exam", "part"])
TABLES = {  # the set's small files: 300 years become 90, only AFIB is AF, train.csv has another order
    "codesubset/train/RECORDS.txt": b"TNMG105\nTNMG112\nTNMG103\n",
    "codesubset/test/RECORDS.txt": b"TNMG101\nTNMG110\n",
    "codesubset/train.csv": b"id_exam,id_patient,age,sex,AF,date_exam\r\n105,8421,61,F,0,2014-05-06\r\n"
                            b"103,13243,89,M,0,2014-05-06\r\n112,13243,90,M,1,2014-05-06\r\n",
    "test_labels.csv": b"id_exam,id_patient,age,sex,AF,date_exam\r\n"
                       b"101,9514,90,F,0,2014-05-06\r\n110,10001,,F,1,2014-05-06\r\n",
}


def tracing(ecg_id):
    """Twelve leads, (1000, 12): random walks."""
    return np.random.default_rng(ecg_id).normal(0, 40, (1000, 12)).cumsum(axis=0).clip(-9000, 9000).astype("<i2")


def write_record(path, samples, leads):
    """A record as wfdb writes it: 500 Hz, 1000 per mV, 16 bit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n = len(leads)
    wfdb.wrsamp(path.name, fs=500, units=["mV"] * n, sig_name=leads, d_signal=samples.astype(int), fmt=["16"] * n,
                adc_gain=[1000.0] * n, baseline=[0] * n, write_dir=str(path.parent))


def write_ptbxl(folder, table):
    """A copy of PTB-XL with these exams."""
    table = table.drop(columns=["id_exam", "part"], errors="ignore").sort_values("ecg_id")
    table["filename_hr"] = [f"records500/{i // 1000 * 1000:05d}/{i:05d}_hr" for i in table["ecg_id"]]
    for exam in table.itertuples():
        write_record(folder / exam.filename_hr, tracing(exam.ecg_id), TWELVE)
    table.to_csv(folder / tool.DATABASE, index=False)
    return folder


def content(folder):
    """Content of all files below `folder`, by path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def ptbxl(tmp_path_factory):
    """A PTB-XL of five exams. Read only."""
    return write_ptbxl(tmp_path_factory.mktemp("official"), SMALL)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The set of the five exams, content by path; its records are written by wfdb."""
    folder = tmp_path_factory.mktemp("expected")
    for exam in SMALL.itertuples():
        eight = tracing(exam.ecg_id)[:, [0, 1, 6, 7, 8, 9, 10, 11]]
        write_record(folder / "codesubset" / exam.part / f"TNMG{exam.id_exam}", eight, ["DI", "DII", *TWELVE[6:]])
    return content(folder) | TABLES


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory, monkeypatch):
    """The list of the five exams, no pauses, and no proxy between us and loopback."""
    exams = tmp_path_factory.mktemp("list") / "exams.csv"
    SMALL[["id_exam", "ecg_id", "part"]].to_csv(exams, index=False)
    monkeypatch.setattr(tool, "EXAMS", exams)
    monkeypatch.setattr(tool, "PAUSES", (0, 0, 0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def run(*arguments):
    """What a run says that ends with an error; None where it ends well."""
    try:
        return tool.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_set_to_the_last_byte(ptbxl, expected, tmp_path, form):
    """Folder or zip: the same set to the last byte; a second run keeps it, and replaces nothing else either."""
    copy = ptbxl if form == "folder" else shutil.make_archive(tmp_path / "ptb", "zip", ptbxl.parent, ptbxl.name)
    out = tmp_path / "out"
    (out / "codesubset.part").mkdir(parents=True)
    (out / "codesubset.part" / "half.dat").write_text("of a killed run")
    run("--ptbxl", copy, "--out", out)
    assert content(out) == expected
    (out / "test_labels.csv").unlink()
    (out / "codesubset" / "train.h5").write_text("built from it")
    run("--ptbxl", copy, "--out", out)
    assert content(out) == expected | {"codesubset/train.h5": b"built from it"}
    (out / "codesubset" / "train.csv").write_text("other data")
    assert "not replaced" in run("--ptbxl", copy, "--out", out)


def edit(path, old, new):
    path.write_bytes(path.read_bytes().replace(old, new, 1))


def zipped(folder, change):
    """A zip of the copy whose bytes have changed."""
    path = Path(shutil.make_archive(folder, "zip", folder))
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("damage, words", [
    (lambda copy: (copy / tool.DATABASE).unlink(), ["holds no ptbxl_database.csv", "records500/"]),
    (lambda copy: edit(copy / tool.DATABASE, b"scp_codes", b"codes"), ["ptbxl_database.csv", "scp_codes"]),
    (lambda copy: edit(copy / tool.DATABASE, b"\n1004,", b"\n1005,"), ["lacks 1 exams", "1004"]),
    (lambda copy: edit(copy / tool.DATABASE, b"records500/01000", b"../../x"), ["filename_hr", "../../x", "line 6"]),
    (lambda copy: (copy / SAMPLES).unlink(), ["00017_hr", "missing"]),
    (lambda copy: os.truncate(copy / SAMPLES, 23_999), ["00017_hr", "23,999 bytes"]),
    (lambda copy: os.truncate(copy / HEADER, 100), ["00017_hr", "header is not whole"]),
    (lambda copy: edit(copy / SAMPLES, tracing(17)[500].tobytes(), bytes(24)), ["00017_hr", "checksum"]),
    (lambda copy: zipped(copy, lambda data: data[:50_000]), ["copy.zip is neither"]),
    (lambda copy: zipped(copy, lambda data: data[:50_000] + bytes(9) + data[50_009:]), ["record records500/"]),
])
def test_copy_that_is_not_whole(ptbxl, tmp_path, damage, words):
    """The file or the record is named, and no half set is left."""
    copy = shutil.copytree(ptbxl, tmp_path / "copy")
    said = run("--ptbxl", damage(copy) or copy, "--out", tmp_path / "out")
    assert [word for word in words if word not in said] == []
    assert not (tmp_path / "out").exists() or content(tmp_path / "out") == {}


FAULTS = {  # status, announced length and body of an answer, from the right content
    "right": lambda data: (200, len(data), data),
    "cut": lambda data: (200, len(data), data[:len(data) // 2]),
    "short": lambda data: (200, len(data) // 2, data[:len(data) // 2]),
    "damaged": lambda data: (200, len(data), data[:500] + bytes([data[500] ^ 1]) + data[501:]),
    "busy": lambda data: (429, 0, b""),
    "broken": lambda data: (500, 0, b""),
    "page": lambda data: (200, 36, b"\n<!DOCTYPE html><html>Sign in</html>"),
}


@contextmanager
def served(folder, faults=()):
    """PTB-XL on loopback: its address, the names asked for. `faults`: answers before the right one, by name."""
    asked, faults = [], {name: iter(kinds) for name, kinds in dict(faults).items()}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path[1:]
            asked.append(name)
            kind = next(faults.get(name, iter(())), "right")
            status, length, body = FAULTS[kind]((folder / name).read_bytes())
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_passing_trouble_costs_only_time(ptbxl, expected, tmp_path):
    """A sign-in page is not kept; cut connections, 429, 500, short and damaged files are asked for again."""
    faults = {HEADER: ["cut", "short"], SAMPLES: ["damaged", "broken", "cut"]}
    with served(ptbxl, {tool.DATABASE: ["page", "busy", "cut", "broken"], **faults}) as (url, asked):
        assert "a web page" in run("--url", url, "--out", tmp_path)
        assert content(tmp_path) == {}
        run("--url", url, "--out", tmp_path)
    assert content(tmp_path) == expected | {f"ptb-xl/{name}": data for name, data in content(ptbxl).items()}
    assert len(asked) == 5 + 2 * 4 + 3 + 4


@pytest.mark.parametrize("fault, words", [
    ("damaged", ["00017_hr: ", "checksum"]), ("short", ["00017_hr: ", "12,000 bytes"]),
    ("busy", ["00017_hr.dat: HTTP 429"]), ("broken", ["00017_hr.dat: HTTP 500"]), ("cut", ["00017_hr.dat: "]),
    ("page", ["00017_hr.dat: HTTP 200", "a web page"]),
])
def test_lasting_trouble_ends_in_a_message(ptbxl, expected, tmp_path, fault, words):
    """The record is named and no set is made; the next run asks only for what is missing."""
    with served(ptbxl, {SAMPLES: repeat(fault)}) as (url, _):
        said = run("--url", url, "--out", tmp_path, "--connections", 1)
    assert [word for word in [*words, "the same command continues"] if word not in said] == []
    kept = {name.removeprefix("ptb-xl/") for name in content(tmp_path)}
    assert not (tmp_path / "codesubset").exists() and len(kept) > 5
    with served(ptbxl) as (url, asked):
        run("--url", url, "--out", tmp_path)
    assert set(asked) == set(content(ptbxl)) - kept | {HEADER, SAMPLES}
    assert {name: data for name, data in content(tmp_path).items() if "ptb-xl" not in name} == expected


def many_exams(n_exams, n_patients, n_af):
    """PTB-XL's table with patients that have several exams, AF and others."""
    rng = np.random.default_rng(0)
    codes = np.full(n_exams, "{'NORM': 100.0}", dtype=object)
    codes[rng.permutation(n_exams)[:n_af]] = "{'AFIB': 0.0, 'IMI': 35.0}"
    return pd.DataFrame({"ecg_id": np.arange(1, n_exams + 1), "patient_id": rng.integers(1, n_patients + 1, n_exams),
                         "age": 60.0, "sex": rng.integers(0, 2, n_exams), "scp_codes": codes})


def test_shares_of_the_course():
    """All AF exams, half in either part; 30 % and 50 % AF; no patient in both parts; the seed decides."""
    table = many_exams(21_799, 18_869, 1_514).assign(filename_hr="records500/00000/00001_hr")
    database = tool.read_database(table.to_csv(index=False).encode())
    exams = tool.choose_course_like(database, 42)
    counts = exams.groupby(["part", "AF"]).size().to_dict()
    assert counts == {("train", 1): 757, ("train", 0): 1766, ("test", 1): 757, ("test", 0): 757}
    patients = exams.groupby("part")["id_patient"].agg(set)
    assert not patients["train"] & patients["test"]
    assert not exams.equals(tool.choose_course_like(database, 43))


def test_script_alone_in_an_empty_folder(tmp_path):
    """As in Colab: the one file, without the project, makes the course-like set; the other needs the list."""
    source = write_ptbxl(tmp_path / "source", many_exams(60, 50, 8))
    shutil.copy(tool.__file__, tmp_path)
    with served(source) as (url, _):
        command = [sys.executable, "-I", "ptbxl_to_codesubset.py", "--url", url]
        done = subprocess.run([*command, "--course-like"], cwd=tmp_path, capture_output=True, text=True)
        listed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    home = tmp_path / "ptbxl" / "course_like"
    assert done.returncode == 0 and f"ECG_DATA={home / 'codesubset'}\n" in done.stdout
    assert len(pd.read_csv(home / "test_labels.csv")) == 8 and len(content(home)) == 4 + 2 * (13 + 8)
    assert listed.returncode == 1 and "--exams" in listed.stderr and "Traceback" not in listed.stderr
