"""Data: archives and folders, downloads from servers on loopback, demo set, HDF5 files, labels, split by patient."""
import gzip
import io
import multiprocessing
import os
import select
import shutil
import signal
import tarfile
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import wfdb
from scipy.signal import iirnotch

import ecg_helpers as helpers

FORK = multiprocessing.get_context("fork")
MIB = 2**20


def files(folder):
    """Content of every file below `folder` by relative path, our note of the origin left out."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and path.name != "origin.txt"}


def forked(function, n=1):
    """Run `function` in `n` processes that start it at the same moment; their exit codes."""
    barrier = FORK.Barrier(n)
    processes = [FORK.Process(target=lambda: (barrier.wait(30), function())) for _ in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def member(name, kind=tarfile.REGTYPE, link="", size=1, **pax):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, link, size, pax
    return info


def pack(folder, archive, prefix="", extra=()):
    """Write a tar archive of `folder`, with `extra` members of random content in front."""
    with tarfile.open(archive, "w:" + archive.suffix[1:].replace("tar", "")) as tar:
        for each in extra:
            tar.addfile(each, io.BytesIO(np.random.default_rng(0).bytes(each.size)))
        if folder:
            tar.add(folder, prefix + "codesubset")
    return archive


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return helpers.make_demo_codesubset(tmp_path_factory.mktemp("small"), n_train=3, n_test=2)  # read only


@pytest.fixture(scope="module")
def archive(small, tmp_path_factory):
    return pack(small, tmp_path_factory.mktemp("archive") / "codesubset.tar.gz")  # read only


# ---- Demo data ----
def test_demo_has_the_layout_of_the_course(demo_folder):
    patients = []
    for split, n, n_af in (("train", 48, 14), ("test", 16, 8)):  # 30 % and 50 % AF
        names = (demo_folder / split / "RECORDS.txt").read_text().split()
        table = pd.read_csv(demo_folder / "train.csv" if split == "train" else demo_folder.parent / "test_labels.csv")
        assert list(table) == ["id_exam", "id_patient", "age", "sex", "AF", "date_exam"]
        ids = [int(name.removeprefix("TNMG")) for name in names]
        assert len(ids) == n and sorted(ids) == sorted(table["id_exam"]) and ids != list(table["id_exam"])
        assert table["AF"].sum() == n_af and set(table["sex"]) == {"F", "M"}
        patients.append(table["id_patient"])
    assert patients[0].nunique() < 48 and not set(patients[0]) & set(patients[1])
    headers = [wfdb.rdheader(str(path.with_suffix(""))) for path in demo_folder.rglob("*.hea")]
    assert all(header.sig_name == list(helpers.LEADS) and set(header.units) == {"mV"} for header in headers)
    assert {header.fs for header in headers} == {300, 400, 500, 600} and len({h.sig_len for h in headers}) > 20
    assert len(headers) == 64 and all(7 <= header.sig_len / header.fs <= 10.3 for header in headers)


def test_demo_depends_on_the_seed_alone(tmp_path):
    first, again, other = (files(helpers.make_demo_codesubset(tmp_path / str(i), n_train=3, n_test=2, seed=seed))
                           for i, seed in enumerate((3, 3, 4)))
    assert first == again and not {first[name] for name in first if name.endswith(".dat")} & set(other.values())


# ---- Folders and archives ----
@pytest.mark.parametrize("lost", ["train.csv", "test/RECORDS.txt", "train/{}.dat"])
@pytest.mark.parametrize("packed", [False, True])
def test_folder_is_only_read_and_what_is_missing_is_named(small, tmp_path, lost, packed):
    folder = shutil.copytree(small, tmp_path / "data" / "codesubset")
    assert helpers.fetch_codesubset(str(folder), tmp_path / "work") == folder and files(folder) == files(small)
    lost = lost.format(helpers.read_records(small / "train" / "RECORDS.txt")[-1])
    (folder / lost).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=lost):
        helpers.fetch_codesubset(pack(folder, tmp_path / "data.tar.gz") if packed else folder, tmp_path / "work")
    assert not files(tmp_path / "work")


@pytest.mark.parametrize("suffix, prefix", [("tar", ""), ("tar.gz", "./"), ("tar.xz", "my folder/"),
                                            ("tar.bz2", "codesubset/")])
def test_archive_of_any_kind(small, tmp_path, suffix, prefix):
    """Only its codesubset/ is taken; the second call uses the folder, with what was built in it."""
    others = map(member, ("README", "codesubset2/train.csv", f"{tmp_path}/absolute", "../dots"))
    packed = pack(small, tmp_path / f"my data.{suffix}", prefix, others)
    target = helpers.fetch_codesubset(packed, tmp_path / "work" / "new")
    assert target == tmp_path / "work" / "new" / "codesubset" and files(target) == files(small)
    (target / "train.h5").write_text("built")
    assert helpers.fetch_codesubset(packed, tmp_path / "work" / "new") == target and (target / "train.h5").exists()
    assert os.listdir(target.parent) == ["codesubset"] and sorted(os.listdir(tmp_path)) == [packed.name, "work"]


NO_DATA = {  # what is given as archive (how it is made, or what else is in it), a word of the message
    "CSV": (lambda path, small: shutil.copy(small / "train.csv", path), "no archive"),
    "zip": (lambda path, small: shutil.move(shutil.make_archive(str(path), "zip", small), path), "zip.*unpack"),
    "gzipped twice": (lambda path, small: path.write_bytes(gzip.compress(pack(small, path).read_bytes())), "twice"),
    "cut": (lambda path, small: os.truncate(pack(small, path), 20_000), "damaged"),
    "bits": (lambda path, small: path.write_bytes(pack(small, path).read_bytes()[:-8] + bytes(8)), "damaged"),
    "others": (lambda path, small: pack(None, path, extra=[member("other/file")]), "no codesubset .*other/file"),
    "symlink": (member("codesubset/train", tarfile.SYMTYPE, "../../outside", 0), "link"),
    "dots": (member("codesubset/../../evil"), "outside"),
    "two data sets": (member("demo/codesubset/train.csv"), "second codesubset"),
    "8 TB": (member("codesubset/x", **{"GNU.sparse.map": "0,1", "GNU.sparse.size": "8796093022208"}), "too large")}


@pytest.mark.parametrize("kind", NO_DATA)
def test_what_is_no_archive_of_a_codesubset_is_refused(small, tmp_path, kind):
    """The file is named and stays; nothing half stays, nothing lands outside."""
    make, words = NO_DATA[kind]
    make(tmp_path / "data.tar.gz", small) if callable(make) else pack(small, tmp_path / "data.tar.gz", extra=[make])
    (tmp_path / "work").mkdir()
    with pytest.raises(ValueError, match=f"(?s)data.tar.gz.*({words})"):
        helpers.fetch_codesubset(tmp_path / "data.tar.gz", tmp_path / "work")
    assert sorted(os.listdir(tmp_path)) == ["data.tar.gz", "work"] and not os.listdir(tmp_path / "work")


@pytest.mark.parametrize("wanted", ["other", "demo", "course", "nowhere", "same size"])
def test_other_data_are_refused_and_left_alone(small, archive, tmp_path, wanted):
    packed = pack(small, tmp_path / "mine.tar")
    helpers.fetch_codesubset(packed, tmp_path / "work")
    (tmp_path / "foreign" / "codesubset").mkdir(parents=True)
    before, size = files(tmp_path / "work"), packed.stat().st_size
    if wanted == "same size":  # edited labels: tar fills up to whole blocks
        folder = shutil.copytree(small, tmp_path / "edited" / "codesubset")
        (folder / "train.csv").write_bytes((folder / "train.csv").read_bytes() + b"\n")
        assert pack(folder, packed).stat().st_size == size
    for work in ("work", "foreign"):
        with pytest.raises((ValueError, FileNotFoundError), match="codesubset holds other data .*ECG_WORK|nowhere"):
            helpers.fetch_codesubset({"other": archive, "same size": packed}.get(wanted, wanted), tmp_path / work)
    assert files(tmp_path / "work") == before and not files(tmp_path / "foreign")


# ---- Download ----
ANSWERS = {  # of a server: (content, first byte asked for) -> status, body, length announced
    "whole": lambda content, start: (206, content[start:], len(content) - start) if content[start:] else (416, b"", 0),
    "without ranges": lambda content, start: (200, content, len(content)),
    "cut": lambda content, start: (206, content[start:start + 3 * MIB // 2], len(content) - start),
    "HTML": lambda content, start: (200, b"<html>Quota exceeded</html>", 27), "404": lambda *_: (404, b"", 0)}


@pytest.fixture
def mirrors(small, tmp_path, monkeypatch):
    """Two mirrors of an archive of 3.5 MiB: its content; the names of their answers, to be set; what was asked."""
    packed = pack(small, tmp_path / "x.tar.gz", extra=[member("codesubset/noise", size=7 * MIB // 2)])
    content, answers, asked = packed.read_bytes(), [[], []], [[], []]

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            mirror = int(self.path[1])
            asked[mirror].append(int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")))
            name = answers[mirror][:len(asked[mirror])][-1]
            status, body, length = ANSWERS[name](content, asked[mirror][-1])
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(body)

        log_message = ANSWERS["404"]  # silent
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hosts = f"127.0.0.1:{server.server_port}/0", f"localhost:{server.server_port}/1"
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", [f"http://{host}?dl=1" for host in hosts])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield content, answers, asked
        server.shutdown()


@pytest.mark.parametrize("earlier, answers, expected", [
    (None, [["whole"], ["HTML"]], [[0], []]), (None, [["HTML"], ["whole"]], [[0], [0]]),
    (None, [["404"], ["without ranges"]], [[0], [0]]), (None, [["cut"], ["without ranges"]], [[0], [MIB]]),
    (None, [["cut"], ["cut", "whole"]], [[0, 2 * MIB], [MIB, 3 * MIB]]),
    (-MIB, [["whole"], ["404"]], None), (None, [["whole"], ["404"]], None)], ids=str)
def test_course_data_arrive_whole_and_once(small, tmp_path, mirrors, earlier, answers, expected):
    """A cut download goes on where it stopped; a part that does not fit is fetched again; an archive is used."""
    mirrors[1][:] = answers
    if expected is None:
        (tmp_path / "codesubset.tar.gz.part").write_bytes(mirrors[0][:earlier])
    for _ in range(2):
        assert files(helpers.fetch_codesubset("course", tmp_path)).items() > files(small).items()
        shutil.rmtree(tmp_path / "codesubset")  # as where the archive was saved by hand
    assert os.path.exists(tmp_path / "codesubset.tar.gz") and mirrors[2] == (expected or mirrors[2])


def test_both_mirrors_down(tmp_path, mirrors):
    mirrors[1][:] = ["404"], ["HTML"]
    with pytest.raises(ConnectionError, match=r"404.*no gzip.*save http://.*/0\?dl=1 as .*/new/codesubset.tar.gz"):
        helpers.fetch_codesubset("course", tmp_path / "new")
    assert not os.listdir(tmp_path / "new")


# ---- Records and HDF5 ----
def test_records_in_order(tmp_path):
    path = tmp_path / "RECORDS.txt"
    path.write_bytes(b"\xef\xbb\xbfTNMG2\r\n\r\nTNMG1")
    assert helpers.read_records(path) == ["TNMG2", "TNMG1"]
    for content, words in (("TNMG2".encode("utf-16"), "UTF-8"), (b"A B A", "repeats.*'A'"), (b"\n", "no record")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"RECORDS.txt.*{words}"):
            helpers.read_records(path)


@pytest.fixture
def records(demo_folder, tmp_path):
    return shutil.copytree(demo_folder / "test", tmp_path / "data") / "RECORDS.txt"  # of 16 exams, may be changed


@pytest.mark.parametrize("workers", [1, 2])
def test_tracings_are_in_record_order_and_can_be_mapped(records, tmp_path, workers):
    names = records.read_text().split()[:13]  # a worker's portions: 8 and 5
    records.write_text("\n".join(names))
    h5_file = helpers.build_h5(records, tmp_path / "new" / "test.h5", workers)
    content, before, loaded = h5_file.read_bytes(), h5_file.stat(), helpers.load_tracings(h5_file)
    assert loaded.shape == (13, 4096, 8) and loaded.dtype == torch.float32
    with h5py.File(h5_file) as file:
        np.testing.assert_array_equal(file["tracings"], loaded)
    for name, tracing in zip(names, loaded):
        exam = helpers.preprocess_ecg(*helpers.read_ecg(records.parent / name))
        np.testing.assert_array_equal(tracing, exam.T.astype(np.float32))
    loaded[:] = 7
    helpers.build_h5(records, h5_file)
    assert h5_file.read_bytes() == content and h5_file.stat() == before and os.listdir(h5_file.parent) == ["test.h5"]


@pytest.mark.parametrize("other_records, change", [
    (True, lambda folder, h5: (folder / "RECORDS.txt").write_text("\n".join(p.stem for p in folder.glob("*.dat")))),
    (True, lambda folder, h5: (at := next(folder.glob("*.hea"))).write_text(at.read_text().replace("1000.0", "500.0"))),
    (True, lambda folder, h5: os.truncate(next(folder.glob("*.dat")), 10**6)),
    (False, lambda folder, h5: h5.write_text("<html>")),
    (False, lambda folder, h5: os.truncate(h5, h5.stat().st_size - 1))],
    ids=["other order", "other gain", "longer .dat", "web page", "cut"])
def test_file_of_other_records_or_damaged_is_built_again(records, tmp_path, other_records, change):
    h5_file, before = helpers.build_h5(records, tmp_path / "test.h5", 1), helpers.data_fingerprint(records)
    change(records.parent, h5_file)
    assert helpers.build_h5(records, h5_file).read_bytes() == helpers.build_h5(records, tmp_path / "2.h5").read_bytes()
    assert (helpers.data_fingerprint(records) != before) == other_records


def test_edited_preprocessing_builds_again(records, tmp_path, monkeypatch):
    h5_file = helpers.build_h5(records, tmp_path / "test.h5", 1)
    first = helpers.load_tracings(h5_file)
    with monkeypatch.context() as patch:
        patch.setattr(helpers, "powerline_filter", lambda rate, powerline: iirnotch(50, 30, fs=rate))
        patch.setattr(helpers, "ProcessPoolExecutor", partial(helpers.ProcessPoolExecutor, mp_context=FORK))
        assert (helpers.load_tracings(helpers.build_h5(records, h5_file, 1)) - first).abs().max() > 1e-4
    assert torch.equal(helpers.load_tracings(helpers.build_h5(records, h5_file, 1)), first)


def test_bad_records_are_named_and_no_file_is_left(records, tmp_path):
    """Neither a new file nor an older one, which is not of these records."""
    names, h5_file = helpers.read_records(records), helpers.build_h5(records, tmp_path / "h5" / "test.h5", 1)
    (records.parent / f"{names[0]}.dat").unlink()
    os.truncate(records.parent / f"{names[5]}.dat", 5000)
    for i, lead in ((7, " X"), (9, "")):  # another lead, a lead without a name
        header = records.parent / f"{names[i]}.hea"
        header.write_text(header.read_text().replace(" V6", lead))
    with pytest.raises(ValueError, match="4 of 16") as caught:
        helpers.build_h5(records, h5_file, 2)
    assert [name for name in names if f"{name}:" in str(caught.value)] == [names[i] for i in (0, 5, 7, 9)]
    assert not os.listdir(h5_file.parent)


@pytest.mark.parametrize("what, killed_at", [
    ("archive", "utime"), ("archive", "replace"), ("demo", "replace"), ("h5", "replace"),
    ("archive", None), ("h5", None)])
def test_killed_or_three_at_once(records, archive, tmp_path, monkeypatch, what, killed_at):
    """Killed in the middle or as the last step: nothing passes for whole. Three at once end whole."""
    make = {"archive": lambda folder: helpers.fetch_codesubset(archive, folder),
            "demo": lambda folder: helpers.make_demo_codesubset(folder, n_train=3, n_test=2),
            "h5": lambda folder: helpers.build_h5(records, folder / "test.h5", 1)}[what]
    with monkeypatch.context() as patch:
        if killed_at:
            patch.setattr(os, killed_at, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
        codes = forked(lambda: make(tmp_path / "work"), 1 if killed_at else 3)
    assert codes == ([-signal.SIGKILL] if killed_at else [0, 0, 0])
    whole = make(tmp_path / "whole")
    assert (tmp_path / "work" / whole.name).exists() != bool(killed_at)
    make(tmp_path / "work")
    assert files(tmp_path / "work").items() >= files(tmp_path / "whole").items()


def test_killed_build_leaves_no_worker(records, tmp_path, monkeypatch):
    reading, writing = os.pipe()  # the workers inherit it: it ends with the last of them
    read = helpers.read_ecg
    monkeypatch.setattr(helpers, "read_ecg", lambda path: (os.write(writing, b"."), time.sleep(0.2), read(path))[2])
    monkeypatch.setattr(helpers, "ProcessPoolExecutor", partial(helpers.ProcessPoolExecutor, mp_context=FORK))
    process = FORK.Process(target=helpers.build_h5, args=(records, tmp_path / "test.h5", 2))
    process.start()
    os.close(writing)
    assert os.read(reading, 1) == b"."  # the workers are at work
    process.kill()
    process.join(30)
    while (heard := select.select([reading], [], [], 10)[0]) and os.read(reading, 100):
        pass
    os.close(reading)
    assert heard and not (tmp_path / "test.h5").exists()  # else 10 s of silence, but not the end


# ---- Labels ----
HEAD, ROWS = "id_exam,id_patient,age,sex,AF", ["3,30,61,M,0", "1,10,50,F,1", "2,10,51,F,0", "4,40,70,M,1"]


def load_labels(tmp_path, rows=ROWS, head=HEAD, records="TNMG2 TNMG4 TNMG1 TNMG3", encoding="utf-8"):
    (tmp_path / "train.csv").write_bytes("\r\n".join([head, *rows, ""]).encode(encoding))
    (tmp_path / "RECORDS.txt").write_text(records)
    return helpers.load_labels(tmp_path / "train.csv", tmp_path / "RECORDS.txt")


@pytest.mark.parametrize("how", [
    {}, {"encoding": "utf-8-sig", "head": HEAD.replace(",", ", ")}, {"rows": [*ROWS[::-1], "9,90,5,F,7", "8,,5,,"]},
    {"rows": [row.replace(",", " , ") for row in ROWS]}, {"rows": [row[0] + ".0" + row[1:] + ".0" for row in ROWS]},
    {"rows": [row.replace("0,", "0.0,", 1)[:-1] + str(row[-1] == "1") for row in ROWS]}])
def test_labels_in_record_order(tmp_path, how):
    table = load_labels(tmp_path, **how)
    assert list(table.index) == [2, 4, 1, 3] and table.index.name == "id_exam"
    assert list(table["AF"]) == [0, 1, 1, 0] and pd.api.types.is_integer_dtype(table["AF"])
    assert list(table["id_patient"]) == ["10", "40", "10", "30"]
    assert list(table["age"]) == [51, 70, 50, 61] and list(table["sex"].str.strip()) == ["F", "M", "F", "M"]
    unknown = [f"{exam},7,{age},F,0" for exam, age in ((1, 300), (2, ""), (3, -1), (4, "?"))]
    assert load_labels(tmp_path, unknown)["age"].isna().all()


@pytest.mark.parametrize("how, words", [
    ({"rows": ROWS[:2]}, r"2 exams have no row: \[2, 4\]"), ({"rows": [*ROWS, "1,11,50,F,0"]}, r"more than once: \[1"),
    ({"rows": [row[:-1] + row[-1].replace("1", "2") for row in ROWS]}, r"2 exams .*not 0 or 1: \[1, 4\]"),
    ({"rows": [row[:-1] for row in ROWS]}, "4 exams .*not 0 or 1"),
    ({"rows": [row.replace(",10,", ", ,") for row in ROWS]}, r"2 exams have no id_patient: \[1, 2\]"),
    ({"head": HEAD.lower()}, r"train.csv: column \['AF'\] missing"), ({"encoding": "utf-16"}, "train.csv is no UTF-8"),
    ({"head": HEAD.replace(",", ";")}, "train.csv: column"), ({"records": "TNMG1 TNMG1"}, "RECORDS.txt repeats")])
def test_table_that_does_not_fit_is_refused(tmp_path, how, words):
    with pytest.raises(ValueError, match=words):
        load_labels(tmp_path, **how)


# ---- Split by patient ----
def test_folds_by_patient():
    """No patient on both sides, each exam validated once, the same prevalence everywhere, the same each time."""
    rng = np.random.default_rng(0)  # as in the course: 30 % AF, some patients with several exams, of both classes
    patient = rng.integers(0, 1800, 2000)
    af = (rng.random(2000) < np.where(patient % 10 < 3, 0.8, 0.09)).astype(int)
    labels = pd.DataFrame({"id_patient": patient.astype(str), "AF": af})
    folds = helpers.patient_folds(labels, 5, seed=1)
    assert sorted(np.concatenate([valid for _, valid in folds])) == list(range(2000))
    for train, valid in folds:
        assert len(train) + len(valid) == 2000 and not set(patient[train]) & set(patient[valid])
        assert af[valid].mean() == pytest.approx(af.mean(), abs=0.05) and len(valid) == pytest.approx(400, abs=80)
    assert np.array_equal(helpers.split_by_patient(labels, 0.2, seed=1)[1], folds[0][1])
    labels["AF"] = (patient < 4).astype(int)
    with pytest.raises(ValueError, match="^5 folds need 5 patients .*$"):
        helpers.split_by_patient(labels)


def test_hdf5_files_are_opened_without_locking(demo_folder, tmp_path, monkeypatch):
    """Network drives refuse it."""
    opened, real = [], helpers.h5py.File
    monkeypatch.setattr(helpers.h5py, "File", lambda *args, **kwargs: opened.append(kwargs) or real(*args, **kwargs))
    file = helpers.build_h5(demo_folder / "test" / "RECORDS.txt", tmp_path / "test.h5", workers=1)
    helpers.build_h5(demo_folder / "test" / "RECORDS.txt", file)
    helpers.load_tracings(file)
    assert len(opened) >= 3 and all(kwargs["locking"] is False for kwargs in opened)


def test_implausible_ages_are_counted(tmp_path, capsys):
    (tmp_path / "RECORDS.txt").write_text("TNMG1\nTNMG2\n", encoding="utf-8")
    (tmp_path / "train.csv").write_text("id_exam,id_patient,age,sex,AF\n1,1,300,F,0\n2,2,50,M,1\n", encoding="utf-8")
    labels = helpers.load_labels(tmp_path / "train.csv", tmp_path / "RECORDS.txt")
    assert labels["age"].isna().tolist() == [True, False] and "1 ages" in capsys.readouterr().out
