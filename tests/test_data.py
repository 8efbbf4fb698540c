"""Data: whole files and locks, demo set, archives and folders, downloads from servers on loopback, labels, split."""
import errno
import gzip
import io
import json
import lzma
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import tarfile
import threading
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import wfdb
from hypothesis import given, settings
from hypothesis import strategies as st

import ecg_helpers as helpers

FORK = multiprocessing.get_context("fork")


def files(folder):
    """Content of every file below `folder`, by relative path; links by their target. Our own notes left out."""
    return {str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if (path.is_symlink() or path.is_file()) and path.name not in ("origin.json", ".lock")}


def left(folder):
    """Names in `folder`, its lock left out."""
    return sorted(set(os.listdir(folder)) - {".lock"})


@contextmanager
def other_process(function):
    """Run `function(say, wait)` in a forked process that is killed at the end; yields (process, heard, go_on).

    `say(word)` there is `heard()` here; `wait()` there lasts until `go_on()` here.
    """
    words, going = FORK.SimpleQueue(), FORK.Event()
    process = FORK.Process(target=function, args=(words.put, partial(going.wait, 30)))
    process.start()
    try:
        yield process, words.get, going.set
    finally:
        process.kill()
        process.join(30)


# ------------------------------------------------------------------------------------------------
# Whole files, unique parts, the lock, whose results a folder holds
# ------------------------------------------------------------------------------------------------
def test_json_is_finite_and_whole(tmp_path):
    """NaN and infinity become null, NumPy numbers plain ones; what cannot be written leaves the old file alone."""
    path = tmp_path / "new" / "results.json"
    helpers.write_json(path, {"auroc": math.nan, "list": [np.float32(0.5), (np.inf, np.int64(3), None)], "name": "é"})
    assert json.loads(path.read_text()) == {"auroc": None, "list": [0.5, [None, 3, None]], "name": "é"}
    with pytest.raises(TypeError):
        helpers.write_json(path, {"auroc": object()})
    assert json.loads(path.read_text())["auroc"] is None and os.listdir(path.parent) == ["results.json"]


def test_requirements_name_every_package():
    """What the module imports and Python does not bring stands in requirements.txt."""
    folder = Path(helpers.__file__).parent
    imported = re.findall(r"^(?:import|from) (\w+)", Path(helpers.__file__).read_text(), re.M)
    required = re.findall(r"^[\w-]+", (folder / "requirements.txt").read_text(encoding="utf-8"), re.M)
    names = {"sklearn": "scikit-learn", "ecg_plot": "ecg-plot"}
    assert {names.get(name, name) for name in imported if name not in sys.stdlib_module_names} <= set(required)


def test_parts_are_unique_and_debris_goes(tmp_path):
    """Two writers of one file never share a part; parts of living processes stay, those of killed ones go."""
    target = tmp_path / "x[1].h5"
    dead = FORK.Process(target=int)
    dead.start()
    dead.join()
    living = target.with_name(f"{target.name}.{os.getppid()}-1a2b3c4d.part")
    own_number = target.with_name(f"{target.name}.{os.getpid()}-1a2b3c4d.part")
    folder = target.with_name(f"{target.name}.{dead.pid}-1a2b3c4d.part")
    for path in (living, own_number, tmp_path / "x[1].h5.part", tmp_path / "notes.part"):
        path.write_text("x")
    folder.mkdir()
    (folder / "inside").write_text("x")
    with helpers.unique_part(target) as first, helpers.unique_part(target) as second:
        first.write_text("first")
        second.mkdir()
        assert first != second and first.parent == second.parent == tmp_path
        with helpers.unique_part(target):
            assert first.exists() and second.exists()
    assert left(tmp_path) == sorted([living.name, "notes.part", "x[1].h5.part"])


def test_one_run_at_a_time(tmp_path, demo_folder):
    """A second process is refused in one sentence, also after a build with workers; a killed one frees the lock."""
    def run(say, wait):
        lock = helpers.lock_folder(tmp_path / "work")
        again = helpers.lock_folder(tmp_path / "work" / ".." / "work")  # twice in one process: harmless
        helpers.build_h5(demo_folder / "test" / "RECORDS.txt", tmp_path / "work" / "test.h5", workers=2)
        say("built")
        wait()
        return lock, again
    with other_process(run) as (process, heard, _):
        assert heard() == "built"
        with pytest.raises(RuntimeError, match=r"work is in use by another run.*ECG_WORK\.$"):
            helpers.lock_folder(tmp_path / "work")
        process.kill()
        process.join(30)
        with helpers.lock_folder(tmp_path / "work"), helpers.lock_folder(tmp_path / "other"):
            pass


@pytest.mark.parametrize("writable", [True, False])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, monkeypatch, capsys, writable):
    """No lock file can be made: without permission that is the end, on a drive without locks a remark."""
    def refuse(lock, *args, **kwargs):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(helpers.filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(helpers.os, "access", lambda path, mode: writable)
    with nullcontext() if writable else pytest.raises(PermissionError, match="choose another ECG_WORK"):
        helpers.lock_folder(tmp_path)
    assert ("cannot be locked" in capsys.readouterr().out) == writable


def test_folder_belongs_to_its_data(tmp_path):
    """Results of other data are refused with what to do; the same data may come from another place."""
    helpers.claim_folder(tmp_path, "1234", "course")
    helpers.claim_folder(tmp_path, "1234", tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"other data \(course\)\. Choose another ECG_WORK"):
        helpers.claim_folder(tmp_path, "5678", "demo")
    assert os.listdir(tmp_path) == ["data.json"]


# ------------------------------------------------------------------------------------------------
# Demo data
# ------------------------------------------------------------------------------------------------
def demo_table(demo_folder, split):
    return pd.read_csv(demo_folder / "train.csv" if split == "train" else demo_folder.parent / "test_labels.csv")


@pytest.mark.parametrize("split, n, af", [("train", 48, 14), ("test", 16, 8)])
def test_demo_layout(demo_folder, split, n, af):
    """The course's files: a pair per record, a table of the same exams in another order, 30 % and 50 % AF."""
    names = (demo_folder / split / "RECORDS.txt").read_text().split()
    on_disk = sorted(path.name for path in (demo_folder / split).iterdir())
    assert on_disk == sorted(["RECORDS.txt", *(name + suffix for name in names for suffix in (".hea", ".dat"))])
    table = demo_table(demo_folder, split)
    assert list(table) == ["id_exam", "id_patient", "age", "sex", "AF", "date_exam"]
    ids = [int(name.removeprefix("TNMG")) for name in names]
    assert len(ids) == n and sorted(table["id_exam"]) == sorted(ids) and list(table["id_exam"]) != ids
    assert set(table["sex"]) == {"F", "M"} and set(table["AF"]) == {0, 1} and table["AF"].sum() == af


def test_demo_top_level(demo_folder):
    """The test labels lie beside codesubset/, never inside; the record that the notebook draws exists."""
    assert demo_folder.name == "codesubset" and {"train", "test", "train.csv"} <= set(os.listdir(demo_folder))
    assert not list(demo_folder.rglob("test_labels.csv")) and (demo_folder.parent / "test_labels.csv").is_file()
    assert (demo_folder / "train" / "TNMG100046.hea").is_file()


def test_demo_records_are_real_wfdb(demo_folder):
    """wfdb reads them: eight leads in mV, several rates and lengths within the course's limits, true checksums."""
    headers = [wfdb.rdheader(str(path.with_suffix(""))) for path in demo_folder.rglob("*.hea")]
    assert all(h.sig_name == list(helpers.LEADS) and set(h.units) == {"mV"} for h in headers)
    assert len({h.fs for h in headers}) > 2 and len({h.sig_len for h in headers}) > 20
    assert all(300 <= h.fs <= 600 and 7 <= h.sig_len / h.fs <= 10.3 for h in headers)
    record = wfdb.rdrecord(str(demo_folder / "train" / "TNMG100046"), physical=False)
    assert record.calc_checksum() == record.checksum and 0.1 < np.ptp(record.dac()) < 10


def test_demo_patients(demo_folder):
    """Some patients have several exams, none is in both splits."""
    train, test = (demo_table(demo_folder, split)["id_patient"] for split in ("train", "test"))
    assert train.nunique() < len(train) and not set(train) & set(test)


def test_demo_keeps_its_mark(tmp_path):
    """An archive of demo data is demo data where it is extracted."""
    folder = helpers.make_demo_codesubset(tmp_path / "a", n_train=3, n_test=2)
    target = helpers.fetch_codesubset(pack(folder, tmp_path / "mine.tar"), tmp_path / "b")
    assert (folder / "SYNTHETIC.txt").read_bytes() == (target / "SYNTHETIC.txt").read_bytes()


def test_demo_depends_on_the_seed_alone(tmp_path):
    """Same seed, same bytes; another seed, others."""
    made = [files(helpers.make_demo_codesubset(tmp_path / str(i), n_train=3, n_test=2, seed=seed))
            for i, seed in enumerate((3, 3, 4))]
    assert made[0] == made[1]
    assert not set(made[0].values()) & {content for name, content in made[2].items() if name.endswith(".dat")}


# ------------------------------------------------------------------------------------------------
# fetch_codesubset: demo, folders, archives
# ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A codesubset/ of 3 + 2 exams without any note of ours: as if it came from the course. Read only."""
    folder = helpers.make_demo_codesubset(tmp_path_factory.mktemp("small"), n_train=3, n_test=2, seed=7)
    for mark in ("origin.json", "SYNTHETIC.txt"):
        (folder / mark).unlink()
    return folder


def pack(folder, archive, prefix="", extra=()):
    """Write a tar archive of `folder`; `extra` members are (TarInfo or name, content) and come first."""
    with tarfile.open(archive, "w:" + {"tar": ""}.get(archive.suffix[1:], archive.suffix[1:])) as tar:
        for member, content in extra:
            info = tarfile.TarInfo(member) if isinstance(member, str) else member
            if content is not None:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if content is not None else None)
        if folder:
            tar.add(folder, prefix + "codesubset")
    return archive


@pytest.fixture(scope="module")
def archive(small, tmp_path_factory):
    """The small codesubset as tar.gz. Read only."""
    return pack(small, tmp_path_factory.mktemp("archive") / "codesubset.tar.gz")


@pytest.fixture
def small_demo(monkeypatch):
    """fetch_codesubset("demo") makes 3 + 2 exams only."""
    monkeypatch.setattr(helpers, "make_demo_codesubset", partial(helpers.make_demo_codesubset, n_train=3, n_test=2))


@pytest.mark.parametrize("source", ["demo", "archive"])
def test_fetched_once(archive, tmp_path, capsys, small_demo, source):
    """Parents are created; the second call uses the folder, with what was built in it, at once."""
    source = archive if source == "archive" else source
    target = helpers.fetch_codesubset(source, tmp_path / "a" / "b")
    assert target == tmp_path / "a" / "b" / "codesubset"
    (target / "train.h5").write_text("built")
    inode, content = target.stat().st_ino, files(target)
    capsys.readouterr()
    assert helpers.fetch_codesubset(source, tmp_path / "a" / "b") == target
    assert target.stat().st_ino == inode and files(target) == content
    assert "earlier" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["demo", "archive", "course"])
@pytest.mark.parametrize("lost", ["train/{}.dat", "test/{}.hea", "train/RECORDS.txt", "train"])
def test_what_is_missing_comes_back(archive, tmp_path, capsys, small_demo, source, lost):
    """A finished folder that lost files gets just those again: results, edits and other files in it stay."""
    if source == "course":
        shutil.copy(archive, tmp_path)
    fetch = partial(helpers.fetch_codesubset, archive if source == "archive" else source, tmp_path)
    target = fetch()
    content = files(target) | {"train.h5": b"built", "mine.txt": b"mine"}
    for name in ("train.h5", "mine.txt"):
        (target / name).write_bytes(content[name])
    content["train.csv"] += b"edited\n"
    (target / "train.csv").write_bytes(content["train.csv"])
    lost = lost.format(helpers.read_records(target / lost.split("/")[0] / "RECORDS.txt")[0])
    shutil.rmtree(target / lost) if lost == "train" else (target / lost).unlink()
    capsys.readouterr()
    assert fetch() == target and files(target) == content
    assert f"misses {lost}" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("as_parent", [False, True])
def test_fetch_folder(small, tmp_path, as_parent):
    """A folder, or its parent, is returned itself and only read."""
    before = files(small.parent), small.stat().st_mtime_ns, left(small.parent)
    for as_type in (str, Path):
        assert helpers.fetch_codesubset(as_type(small.parent if as_parent else small), tmp_path / "work") == small
    assert (files(small.parent), small.stat().st_mtime_ns, left(small.parent)) == before
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("missing", ["train.csv", "train/RECORDS.txt", "test/RECORDS.txt", "a .dat", "a .hea"])
def test_folder_that_is_no_codesubset(small, tmp_path, missing):
    """The part that is missing is named, before anything is noted about these data."""
    if missing.startswith("a "):
        missing = f"train/{helpers.read_records(small / 'train' / 'RECORDS.txt')[-1]}{missing[2:]}"
    folder = shutil.copytree(small, tmp_path / "data")
    (folder / missing).unlink()
    with pytest.raises((FileNotFoundError, ValueError), match=missing):
        helpers.fetch_codesubset(folder, tmp_path)


def test_source_that_does_not_exist(tmp_path):
    """A wrong path is named, with what can be given instead."""
    with pytest.raises(FileNotFoundError, match="(?s)nowhere.tar.*'demo'"):
        helpers.fetch_codesubset("nowhere.tar", tmp_path)


@pytest.mark.parametrize("suffix, prefix", [("tar", ""), ("tar.gz", "./"), ("tar.xz", ""), ("tar.bz2", "./")])
def test_fetch_archive(small, tmp_path, suffix, prefix):
    """Any tar archive; its other members are left out, wherever they would land."""
    other = [("README", b"x"), ("codesubset2/train.csv", b"x"), (prefix + "other/codesubset/train.csv", b"x"),
             (f"{tmp_path}/absolute", b"x"), ("../dots", b"x"), ("./../dots", b"x")]
    packed = pack(small, tmp_path / f"my data.{suffix}", prefix, other)
    target = helpers.fetch_codesubset(packed, tmp_path / "work")
    assert target == tmp_path / "work" / "codesubset" and files(target) == files(small)
    assert left(tmp_path / "work") == ["codesubset"] and left(tmp_path) == [packed.name, "work"]


def test_records_in_folders_below(small, tmp_path):
    """RECORDS.txt may name records in folders below, in an archive as in a folder."""
    folder = shutil.copytree(small, tmp_path / "data" / "codesubset")
    name = helpers.read_records(folder / "train" / "RECORDS.txt")[0]
    (folder / "train" / "part1").mkdir()
    for end in (".hea", ".dat"):
        (folder / "train" / (name + end)).rename(folder / "train" / "part1" / (name + end))
    text = (folder / "train" / "RECORDS.txt").read_text()
    (folder / "train" / "RECORDS.txt").write_text(text.replace(name, f"part1/{name}"))
    target = helpers.fetch_codesubset(pack(folder, tmp_path / "data.tar"), tmp_path)
    assert files(target) == files(folder) and helpers.fetch_codesubset(tmp_path / "data.tar", tmp_path) == target


@pytest.mark.parametrize("earlier, wanted", [("archive", "other archive"), ("demo", "archive"), ("archive", "demo"),
                                             ("archive", "course")])
def test_other_data_are_refused(small, archive, tmp_path, small_demo, earlier, wanted):
    """Finished data are never replaced by another source: refused with what to do, everything stays."""
    source = {"archive": archive, "demo": "demo", "course": "course", "other archive": tmp_path / "other.tar"}
    changed = shutil.copytree(small, tmp_path / "changed" / "codesubset")
    (changed / "train.csv").write_bytes((small / "train.csv").read_bytes() + b"\n")
    pack(changed, source["other archive"])
    target = helpers.fetch_codesubset(source[earlier], tmp_path / "work")
    (target / "train.h5").write_text("built")
    content = files(tmp_path / "work")
    with pytest.raises(ValueError, match="other data.*not replaced.*ECG_WORK.*move"):
        helpers.fetch_codesubset(source[wanted], tmp_path / "work")
    assert files(tmp_path / "work") == content
    assert helpers.fetch_codesubset(source[earlier], tmp_path / "work") == target


def test_same_archive_under_another_name(archive, tmp_path):
    """An archive that was moved, copied or touched holds the same data."""
    target = helpers.fetch_codesubset(archive, tmp_path / "work")
    assert helpers.fetch_codesubset(shutil.copyfile(archive, tmp_path / "copy.tgz"), tmp_path / "work") == target


def test_folder_of_hdf5_files_is_filled(small, archive, tmp_path):
    """What was built from a folder given by path lies in codesubset/: it is no reason to refuse, and it stays."""
    (tmp_path / "codesubset").mkdir()
    (tmp_path / "codesubset" / "train.h5").write_text("built")
    target = helpers.fetch_codesubset(archive, tmp_path)
    assert files(target) == files(small) | {"train.h5": b"built"} and left(tmp_path) == ["codesubset"]


@pytest.mark.parametrize("put", ["archive", "demo", "course", "make_demo_codesubset"])
@pytest.mark.parametrize("content", ["train/RECORDS.txt", "my_thesis.txt"])
def test_folder_of_others_is_refused(archive, tmp_path, small_demo, put, content):
    """A codesubset/ that this project did not make is neither used up nor called a damaged archive."""
    (tmp_path / "codesubset" / content).parent.mkdir(parents=True)
    (tmp_path / "codesubset" / content).write_text("mine")
    with pytest.raises(ValueError, match="codesubset.*Move") as caught:
        if put == "make_demo_codesubset":
            helpers.make_demo_codesubset(tmp_path)
        else:
            helpers.fetch_codesubset(archive if put == "archive" else put, tmp_path)
    assert "damaged" not in str(caught.value)
    assert files(tmp_path) == {f"codesubset/{content}": b"mine"}


def member(name, kind=tarfile.REGTYPE, link="", size=0, **pax):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = kind, link, size, pax
    info.mode, info.devmajor, info.devminor = 0o755, 1, 3
    return info


def long_links():
    """The way around tarfile's own filter of CVE-2025-4517: links whose real path is longer than PATH_MAX."""
    letters, path = "abcdefghijklmnop", "codesubset"
    for letter in letters:
        yield member(f"{path}/{'d' * 247}", tarfile.DIRTYPE), None
        yield member(f"{path}/{letter}", tarfile.SYMTYPE, "d" * 247), None
        path += "/" + "d" * 247
    back = "/".join(letters) + "/" + "l" * 254
    yield member(f"codesubset/{back}", tarfile.SYMTYPE, "../" * len(letters)), None
    yield member("codesubset/escape", tarfile.SYMTYPE, back + "/../../../outside"), None
    yield member("codesubset/escape/evil"), b"x"


REFUSED = {  # members that are no files, land outside, or unpack to more than any disk has
    "dots": lambda: [(member("codesubset/../../../outside/evil"), b"x")],
    "symlink within": lambda: [(member("codesubset/train/link", tarfile.SYMTYPE, "RECORDS.txt"), None)],
    "root is a symlink": lambda: [(member("codesubset", tarfile.SYMTYPE, "../../outside"), None)],
    "hard link": lambda: [(member("codesubset/a"), b"x"),
                          (member("codesubset/b", tarfile.LNKTYPE, "codesubset/a"), None)],
    "character device": lambda: [(member("codesubset/null", tarfile.CHRTYPE), None)],
    "pipe": lambda: [(member("codesubset/pipe", tarfile.FIFOTYPE), None)],
    "links longer than a path": long_links,
    "sparse, 8 TB": lambda: [(member("codesubset/big", **{"GNU.sparse.map": "0,1", "GNU.sparse.size": str(8 << 40)}),
                              b"x")],
    "8 TB announced": lambda: [(member("codesubset/big", size=8 << 40), None)],
}


@pytest.mark.parametrize("extra", REFUSED.values(), ids=REFUSED)
def test_archive_that_is_refused(small, tmp_path, extra):
    """Refused, the member named; nothing outside is touched, nothing half stays."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine").write_text("mine")
    packed = pack(small, tmp_path / "bad.tar", extra=extra())
    with pytest.raises(ValueError, match="bad.tar is refused: .*codesubset.*did not come from the course"):
        helpers.fetch_codesubset(packed, tmp_path / "work")
    assert files(tmp_path / "outside") == {"mine": b"mine"} and left(tmp_path) == ["bad.tar", "outside", "work"]
    assert left(tmp_path / "work") == []


def test_sum_of_an_archive_is_bounded(small, archive, tmp_path, monkeypatch):
    """Many files of allowed size: refused where their sum passes the bound, and not before."""
    total = sum(map(len, files(small).values()))
    monkeypatch.setattr(helpers, "MAX_TOTAL", total - 1, raising=False)
    with pytest.raises(ValueError, match=f"{total:,} in all"):
        helpers.fetch_codesubset(archive, tmp_path)
    monkeypatch.setattr(helpers, "MAX_TOTAL", total)
    assert files(helpers.fetch_codesubset(archive, tmp_path)) == files(small)


NO_ARCHIVE = {
    "text": lambda path, small: path.write_text("<html>Quota exceeded</html>"),
    "empty": lambda path, small: path.write_bytes(b""),
    "gzip of no tar": lambda path, small: path.write_bytes(gzip.compress(b"no tar" * 1000)),
    "zip": lambda path, small: shutil.move(shutil.make_archive(str(path), "zip", small), path),
    "tar of other things": lambda path, small: pack(None, path, extra=[("other/file", b"x")]),
    "without train.csv": lambda path, small: pack(None, path, extra=[("codesubset/train/RECORDS.txt", b"TNMG1"),
                                                                     ("codesubset/test/RECORDS.txt", b"TNMG2")]),
    "codesubset is a file": lambda path, small: pack(None, path, extra=[("codesubset", b"x")]),
    "tar cut in a file": lambda path, small: os.truncate(pack(small, path.with_suffix("")).rename(path), 20_000),
    "gz cut": lambda path, small: os.truncate(pack(small, path), 20_000),
    "xz cut": lambda path, small: path.write_bytes(lzma.compress(pack(small, path.with_suffix("")).read_bytes())[:-9]),
}


@pytest.mark.parametrize("make", NO_ARCHIVE.values(), ids=NO_ARCHIVE)
def test_no_archive_of_a_codesubset(small, tmp_path, make):
    """A ValueError that names the file; it stays, nothing half does."""
    make(tmp_path / "data.tar.gz", small)
    before = left(tmp_path)
    with pytest.raises(ValueError, match="data.tar.gz"):
        helpers.fetch_codesubset(tmp_path / "data.tar.gz", tmp_path)
    assert left(tmp_path) == before


@pytest.mark.parametrize("number, offset", [(-1, 0), (-2, 100)])
def test_tar_cut_between_members(small, tmp_path, number, offset):
    """tarfile takes a cut at or in a header for the end of the archive: the records missing then are missed."""
    packed = tmp_path / "data.tar"
    with tarfile.open(packed, "w") as tar:  # the records last
        for path in sorted(small.rglob("*.*"), key=lambda path: path.suffix not in (".csv", ".txt")):
            tar.add(path, f"codesubset/{path.relative_to(small)}")
    with tarfile.open(packed) as tar:
        cut = tar.getmembers()[number].offset + offset
    os.truncate(packed, cut)
    with pytest.raises(ValueError, match="data.tar"):
        helpers.fetch_codesubset(packed, tmp_path)
    assert left(tmp_path) == ["data.tar"]


@pytest.mark.parametrize("suffix", ["tar.gz", "tar.xz"])
def test_flipped_byte_is_found(small, tmp_path, suffix):
    """Eight places: the archive's own checksum speaks, whether or not the unpacking fails."""
    packed = pack(small, tmp_path / f"data.{suffix}")
    content = packed.read_bytes()
    for place in np.linspace(100, len(content) - 100, 8).astype(int):
        packed.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(ValueError, match="data.tar"):
            helpers.fetch_codesubset(packed, tmp_path)
            pytest.fail(f"byte {place} flipped and not noticed")
    assert left(tmp_path) == [packed.name]


def test_full_disk_is_not_called_a_damaged_archive(archive, tmp_path, monkeypatch):
    """ENOSPC while extracting stays what it is, the downloaded archive stays too, and no half folder."""
    shutil.copy(archive, tmp_path / "codesubset.tar.gz")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(tarfile, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        helpers.fetch_codesubset("course", tmp_path)
    assert left(tmp_path) == ["codesubset.tar.gz"]


def forked(function, kill_at=0):
    """Run `function` in a forked process that SIGKILLs itself before its file operation `kill_at` (0: never).

    Returns the process's number and how many times it opened, made, renamed or removed a file or folder.
    """
    count = FORK.Value("i", 0, lock=False)

    def watch(event, _):
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            count.value += 1
            if count.value == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    process = FORK.Process(target=lambda: (sys.addaudithook(watch), function()), daemon=True)
    process.start()
    process.join(30)
    assert process.exitcode == (-signal.SIGKILL if kill_at else 0)
    return process.pid, count.value


@pytest.mark.parametrize("source, earlier", [("archive", None), ("archive", "train.h5"), ("demo", None)])
def test_killed_fetch_is_not_complete(archive, tmp_path, monkeypatch, small_demo, source, earlier):
    """SIGKILL at steps spread over the run, the last ones included: the next run has all files.

    A run that makes the folder takes the debris of killed ones away, also where a process number comes again: on
    real data that is gigabytes.
    """
    fetch = partial(helpers.fetch_codesubset, archive if source == "archive" else "demo", tmp_path)

    def prepare():
        shutil.rmtree(tmp_path / "codesubset", ignore_errors=True)
        if earlier:
            (tmp_path / "codesubset").mkdir()
            (tmp_path / "codesubset" / earlier).write_text("built")
    prepare()
    _, steps = forked(fetch)
    expected = files(tmp_path / "codesubset")
    kills = sorted({*np.linspace(1, steps - 2, 6 if source == "demo" else 14).astype(int), steps - 3, steps - 4})
    for i, kill_at in enumerate(kills):
        prepare()
        number, _ = forked(fetch, kill_at)
        with monkeypatch.context() as patch:
            if i % 2:
                patch.setattr(os, "getpid", lambda: number)  # noqa: B023
            assert files(fetch()) == expected
    prepare()
    fetch()
    assert set(left(tmp_path)) <= {"codesubset", "test_labels.csv"}


# ------------------------------------------------------------------------------------------------
# Download from real servers on loopback
# ------------------------------------------------------------------------------------------------
class Mirror:
    """A server on loopback that gives one answer per request, in turn; the last one again and again.

    An answer is a function (handler, content, start): `start` is the first byte asked for, or None.
    `ranges` lists what was asked for; `asked` is set with the first request, `released` lets stalled ones end.
    """

    def __init__(self, content, *answers):
        self.ranges, self.asked, self.released = [], threading.Event(), threading.Event()
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
                answer = answers[min(len(mirror.ranges), len(answers) - 1)]
                mirror.ranges.append(int(asked[1]) if asked else None)
                mirror.asked.set()
                self.mirror, self.close_connection = mirror, True
                try:
                    answer(self, content, mirror.ranges[-1])
                except ConnectionError:
                    pass  # the client went away

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/codesubset.tar.gz?dl=1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def reply(handler, status, body, **headers):
    """Send a status, headers (names with _ for -) and a body; the length is the body's unless given."""
    handler.send_response(status)
    for name, value in {"Content_Length": len(body), **headers}.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def whole(handler, content, start):
    """A server that knows ranges."""
    if start is None:
        reply(handler, 200, content)
    elif start >= len(content):
        reply(handler, 416, b"", Content_Range=f"bytes */{len(content)}")
    else:
        reply(handler, 206, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}")


def without_ranges(handler, content, start):
    reply(handler, 200, content)


def without_length(handler, content, start):
    reply(handler, 200, content, Content_Length=None)


def cut_at(byte, then=None):
    """Send up to `byte` of the whole file, then close the connection (or wait)."""
    def answer(handler, content, start):
        first = start or 0
        reply(handler, 206 if start else 200, content[first:byte], Content_Length=len(content) - first)
        if then:
            then(handler, content, start)
    return answer


def stall(handler, content, start):
    handler.wfile.flush()
    handler.mirror.released.wait(10)


def announces_less(handler, content, start):
    reply(handler, 200, content[:len(content) // 2])


def html(handler, content, start):
    reply(handler, 200, b"<html>Quota exceeded</html>", Content_Type="text/html")


def status(code, **headers):
    return lambda handler, content, start: reply(handler, code, b"<html>no</html>", **headers)


def redirect(code, to):
    return lambda handler, content, start: reply(handler, code, b"", Location=to() if callable(to) else to)


def damaged(handler, content, start):
    middle = len(content) // 2
    whole(handler, content[:middle] + bytes(64) + content[middle + 64:], start)


@pytest.fixture(scope="module")
def big(small, tmp_path_factory):
    """An archive of 3 MB, so that it takes more than one block: path and content. Read only."""
    extra = [("codesubset/noise.bin", random.Random(0).randbytes(2_800_000))]
    path = pack(small, tmp_path_factory.mktemp("big") / "codesubset.tar.gz", extra=extra)
    return path, path.read_bytes()


@pytest.fixture
def pauses(monkeypatch):
    """Pauses of this process are noted and not waited for; no proxy stands between us and loopback."""
    noted = []
    monkeypatch.setattr(time, "sleep", noted.append)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return noted


@contextmanager
def mirrors(content, *answers):
    """Two mirrors: the first gives `answers`, the second the whole file."""
    with Mirror(content, *answers) as first, Mirror(content, whole) as second:
        yield first, second


def download(path, *servers, timeout=(5, 0.4)):
    helpers.download([server.url for server in servers], path, timeout=timeout)
    return path.read_bytes()


def test_course_data_are_downloaded_once(big, small, tmp_path, monkeypatch, pauses):
    """Parents are created, the archive is extracted; later calls ask no server, nor does a folder or file by hand."""
    with mirrors(big[1], whole) as (first, second):
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", (first.url, second.url))
        target = helpers.fetch_codesubset("course", tmp_path / "a" / "b")
        assert target == tmp_path / "a" / "b" / "codesubset" and files(target).items() >= files(small).items()
        assert helpers.fetch_codesubset("course", tmp_path / "a" / "b") == target
        assert (first.ranges, second.ranges) == ([None], [])
        shutil.copytree(small, tmp_path / "folder by hand" / "codesubset")
        helpers.fetch_codesubset("course", tmp_path / "folder by hand")
        (tmp_path / "file by hand").mkdir()
        shutil.copy(big[0], tmp_path / "file by hand")
        helpers.fetch_codesubset("course", tmp_path / "file by hand")
        assert (first.ranges, second.ranges) == ([None], []) and not pauses


def test_two_fetches_at_once(big, small, tmp_path, monkeypatch, pauses):
    """The second process is refused while the first downloads; it takes nothing away, and the first ends well."""
    with mirrors(big[1], cut_at(2_000_000, then=stall), whole) as (first, second):
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", (first.url, second.url))
        monkeypatch.setattr(helpers, "download", partial(helpers.download, timeout=(5, 20)))
        fetch = partial(helpers.fetch_codesubset, "course", tmp_path)
        process = FORK.Process(target=fetch)
        process.start()
        assert first.asked.wait(20)
        with pytest.raises(RuntimeError, match="in use by another run"):
            fetch()
        first.released.set()
        process.join(30)
        assert process.exitcode == 0 and len(first.ranges) == 2 and not second.ranges
    assert files(tmp_path / "codesubset").items() >= files(small).items()
    assert left(tmp_path) == ["codesubset", "codesubset.tar.gz"]


@pytest.mark.parametrize("answers, ranges", [
    ([cut_at(1_500_000), cut_at(2_700_000), whole], [None, "partial", "partial"]),
    ([cut_at(2_500_000, then=stall), whole], [None, "partial"]),
    ([cut_at(2_500_000), without_ranges], [None, "partial"]),
    ([without_length], [None]),
    ([redirect(307, "/moved"), cut_at(2_500_000), redirect(302, "/moved"), whole], [None, None, "partial", "partial"]),
], ids=["cut twice", "stalled in the middle", "cut, server without ranges", "no length", "redirect, cut, redirect"])
def test_download_arrives_whole(big, tmp_path, pauses, answers, ranges):
    """Cut, stalled and redirected downloads continue where they stopped and end with the server's bytes."""
    with mirrors(big[1], *answers) as (first, second):
        assert download(tmp_path / "new" / "x.tar.gz", first, second) == big[1]
        assert [start and "partial" for start in first.ranges] == ranges and not second.ranges
        assert all(start is None or 1_000_000 < start < len(big[1]) for start in first.ranges)
    assert os.listdir(tmp_path / "new") == ["x.tar.gz"]


@pytest.mark.parametrize("answer", [html, status(404)], ids=["HTML", "404"])
def test_second_mirror_at_once(big, tmp_path, pauses, capsys, answer):
    """Where asking again is no use, the second mirror is asked after one request, and a line says why."""
    with mirrors(big[1], answer) as (first, second):
        assert download(tmp_path / "x.tar.gz", first, second) == big[1]
        assert len(first.ranges) == 1 and len(second.ranges) == 1 and not pauses
    assert re.search(r"127.0.0.1.*(404|text/html)", capsys.readouterr().out)


@pytest.mark.parametrize("code", [429, 503])
def test_busy_server_is_asked_again(big, tmp_path, pauses, code):
    """A passing trouble of the first mirror costs some pauses, not the mirror."""
    with mirrors(big[1], status(code), status(code), whole) as (first, second):
        assert download(tmp_path / "x.tar.gz", first, second) == big[1]
        assert len(first.ranges) == 3 and not second.ranges and pauses


@pytest.mark.parametrize("answer", [status(429, Retry_After=86400), stall, cut_at(0), redirect(302, "/again")],
                         ids=["429, wait a day", "stall", "no byte", "redirects for ever"])
def test_patience_has_an_end(big, tmp_path, pauses, answer):
    """A mirror that never recovers is left after few requests and less than a minute of pauses."""
    with mirrors(big[1], answer) as (first, second):
        assert download(tmp_path / "x.tar.gz", first, second) == big[1]
        requests_a_try = 31 if answer.__qualname__.startswith("redirect") else 1
        assert len(first.ranges) <= 6 * requests_a_try and sum(pauses) < 60


def test_closed_port_goes_to_the_second_mirror(big, tmp_path, pauses):
    """Nobody listens at the first address."""
    with socket.socket() as free, Mirror(big[1], whole) as second:
        free.bind(("127.0.0.1", 0))
        helpers.download([f"http://127.0.0.1:{free.getsockname()[1]}/", second.url], tmp_path / "x.tar.gz")
    assert (tmp_path / "x.tar.gz").read_bytes() == big[1]


@pytest.mark.parametrize("earlier", [lambda content: content, lambda content: content + b"more",
                                     lambda content: content[:1_000_000]], ids=["whole", "longer", "partial"])
def test_part_file_of_an_earlier_run(big, tmp_path, pauses, earlier):
    """A .part of a killed run is continued, or restarted where it does not fit."""
    (tmp_path / "x.tar.gz.part").write_bytes(earlier(big[1]))
    with mirrors(big[1], whole) as (first, second):
        assert download(tmp_path / "x.tar.gz", first, second) == big[1]
        assert first.ranges[0] == len(earlier(big[1])) and not second.ranges
    assert os.listdir(tmp_path) == ["x.tar.gz"]


def test_all_mirrors_down(big, tmp_path, monkeypatch, pauses):
    """The message gives each mirror's reason, the address to open and the place to put the file; no data folder."""
    with Mirror(big[1], status(404)) as first, Mirror(big[1], html) as second:
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", (first.url, second.url))
        with pytest.raises(ConnectionError) as caught:
            helpers.fetch_codesubset("course", tmp_path)
    for words in ("404", "text/html", first.url, str(tmp_path / "codesubset.tar.gz"), "browser", "again"):
        assert words in str(caught.value)
    assert left(tmp_path) == []


@pytest.mark.parametrize("answer", [damaged, announces_less], ids=["damaged", "wrong length"])
def test_damaged_download_is_fetched_again(big, small, tmp_path, monkeypatch, pauses, answer):
    """Removed and fetched again, once."""
    with mirrors(big[1], answer, whole) as (first, second):
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", (first.url, second.url))
        target = helpers.fetch_codesubset("course", tmp_path)
        assert files(target).items() >= files(small).items() and first.ranges == [None, None]
    assert left(tmp_path) == ["codesubset", "codesubset.tar.gz"]


def test_damaged_download_twice_is_an_error(big, tmp_path, monkeypatch, pauses):
    """Two damaged downloads end the attempt: the archive is named and no folder stands there."""
    with mirrors(big[1], damaged) as (first, second):
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", (first.url, second.url))
        with pytest.raises(ValueError, match="codesubset.tar.gz"):
            helpers.fetch_codesubset("course", tmp_path)
        assert first.ranges == [None, None]
    assert left(tmp_path) == []


@pytest.mark.parametrize("name, content", [("codesubset.tar.gz", slice(1_000_000)),
                                           ("codesubset.tar.gz.part", slice(None, 1_000_000, -1))])
def test_damaged_file_placed_by_hand(big, small, tmp_path, monkeypatch, pauses, name, content):
    """A cut archive, or a part of another file, ends in a download; the archive is kept under another name."""
    (tmp_path / name).write_bytes(big[1][content])
    with mirrors(big[1], whole) as (first, second):
        monkeypatch.setattr(helpers, "COURSE_MIRRORS", (first.url, second.url))
        target = helpers.fetch_codesubset("course", tmp_path)
    assert files(target).items() >= files(small).items()
    kept = [path.read_bytes() for path in tmp_path.glob("*.old")]
    assert kept == ([big[1][content]] if name == "codesubset.tar.gz" else [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_download_to_a_full_disk(big, tmp_path, pauses):
    """A real ENOSPC ends the download with that error; other mirrors are not blamed."""
    (tmp_path / "x.tar.gz.part").symlink_to("/dev/full")
    with mirrors(big[1], whole) as (first, second):
        with pytest.raises(OSError, match="No space left") as caught:
            download(tmp_path / "x.tar.gz", first, second)
        assert caught.value.errno == errno.ENOSPC and not second.ranges


# ------------------------------------------------------------------------------------------------
# Labels
# ------------------------------------------------------------------------------------------------
ROWS = ["3,30,61,M,0", "1,10,50,F,1", "2,10,51,F,0", "4,40,70,M,1"]


def label_files(tmp_path, rows=ROWS, head="id_exam,id_patient,age,sex,AF", records="TNMG2 TNMG4 TNMG1 TNMG3",
                encoding="utf-8", line_end="\n"):
    (tmp_path / "train.csv").write_bytes(line_end.join([head, *rows, ""]).encode(encoding))
    (tmp_path / "RECORDS.txt").write_bytes(records.replace(" ", line_end).encode())
    return tmp_path / "train.csv", tmp_path / "RECORDS.txt"


def assert_labels(table):
    assert list(table.index) == [2, 4, 1, 3] and table.index.name == "id_exam"
    assert list(table["AF"]) == [0, 1, 1, 0] and pd.api.types.is_integer_dtype(table["AF"])
    assert list(table["id_patient"]) == [10, 40, 10, 30]
    assert list(table["age"]) == [51, 70, 50, 61] and list(table["sex"]) == ["F", "M", "F", "M"]


def in_column(number, change):
    """ROWS with one column changed."""
    rows = [row.split(",") for row in ROWS]
    return [",".join([*row[:number], change(row[number]), *row[number + 1:]]) for row in rows]


@pytest.mark.parametrize("how", [
    {}, {"encoding": "utf-8-sig", "line_end": "\r\n"}, {"head": "id_exam, id_patient, age, sex, AF"},
    {"rows": [f" {row.replace(',', ', ')} " for row in ROWS[::-1]]},
    {"head": "note,id_exam,id_patient,age,sex,AF", "rows": [f"x,{row}" for row in ROWS]},
    {"rows": in_column(0, lambda exam: exam + ".0")}, {"rows": in_column(4, lambda af: f'"{af}.0"')},
    {"rows": in_column(4, lambda af: " True" if af == "1" else "false")},
    {"rows": in_column(3, lambda sex: {"F": "female", "M": " Male"}[sex])},
    {"rows": in_column(3, lambda sex: {"F": "f", "M": "m "}[sex])},
    {"rows": in_column(1, lambda patient: f" 0{patient}.0 ")}],
    ids=["plain", "Windows editor", "blanks in the head", "other order, blanks", "a column more", "float exams",
         "quoted float AF", "booleans", "sex as words", "sex in small letters", "odd patient numbers"])
def test_labels_in_record_order(tmp_path, how):
    """Row order, byte-order mark, blanks, spelling and types do not change the table."""
    assert_labels(helpers.load_labels(*label_files(tmp_path, **how)))


def test_one_spelling_per_patient(tmp_path):
    """Patient ids written as text: "10", "10.0" and " 010" are one patient, "a10 " and "a10" another."""
    rows = ["3, 010,61,M,0", "1,10,50,F,1", "2,10.0,51,F,0", "4,a10 ,70,M,1", "5,a10,70,M,0", "6,b,20,F,0"]
    labels = helpers.load_labels(*label_files(tmp_path, rows, records="TNMG1 TNMG2 TNMG3 TNMG4 TNMG5 TNMG6"))
    assert list(labels["id_patient"]) == ["10", "10", "10", "a10", "a10", "b"]
    for seed in range(20):
        train, valid = helpers.split_by_patient(labels, 0.5, seed)
        assert not set(labels["id_patient"].iloc[train]) & set(labels["id_patient"].iloc[valid])


def test_blank_age_and_unknown_sex(tmp_path, capsys):
    """They become NaN, one line each says how many: no reason to stop, and no other sex."""
    rows = ["3,30,,M,0", "1,10,?,unknown,1", "2,10,51,,0", "4,40,70,0,1"]
    labels = helpers.load_labels(*label_files(tmp_path, rows))
    assert labels["age"].dtype == float and labels["age"].isna().tolist() == [False, False, True, True]
    assert labels["sex"].dropna().to_dict() == {3: "M"}
    out = capsys.readouterr().out
    assert "2 exams have no age" in out and "3 exams have no sex" in out


@pytest.mark.parametrize("extra", [["9,90,5,F,1", "8,80,5,F,0"], ["9,90,5,F,7", "x,y,5,F,"]], ids=["good", "not good"])
def test_extra_rows_are_counted(tmp_path, capsys, extra):
    """Rows of other exams are ignored, whatever they hold, and counted."""
    assert_labels(helpers.load_labels(*label_files(tmp_path, rows=ROWS + extra)))
    assert re.search(r"train.csv: 2 rows .*ignored", capsys.readouterr().out)


@pytest.mark.parametrize("how, words", [
    ({"rows": ROWS[:2]}, ["2 exams", "no row", "2, 4"]),
    ({"rows": ROWS + ROWS[:1]}, ["1 exams", "more than once", "3"]),
    ({"rows": ROWS + ["1,11,50,F,0"]}, ["more than once", "1"]),
    ({"rows": in_column(4, lambda af: "2" if af == "1" else af)}, ["2 exams", "0 or 1", "1, 4"]),
    ({"rows": in_column(4, lambda af: "" if af == "1" else af)}, ["2 exams", "0 or 1", "1, 4"]),
    ({"rows": in_column(4, lambda af: "yes" if af == "1" else "0.5")}, ["4 exams", "0 or 1"]),
    ({"rows": [row.replace(",10,", ", ,") for row in ROWS]}, ["2 exams", "id_patient", "1, 2"]),
    ({"head": "id_exam,id_patient,age,sex,af"}, ["column AF missing", "age"]),
    ({"rows": [row.replace(",", ";") for row in ROWS], "head": "id_exam;id_patient;age;sex;AF"}, ["id_exam"]),
    ({"head": "", "rows": []}, ["train.csv"]),
    ({"head": "<html>no</html>", "rows": []}, ["train.csv", "id_exam"]), ({"encoding": "utf-16"}, ["train.csv"]),
    ({"records": "TNMG1 A0002 TNMG3"}, ["RECORDS.txt", "TNMG"]),
    ({"records": "TNMG1 TNMG2 TNMG1"}, ["RECORDS.txt", "TNMG1"]),
    ({"records": "TNMG1 TNMG2 TNMG01"}, ["RECORDS.txt", "TNMG1, TNMG01 have the same exam number"]),
    ({"records": ""}, ["RECORDS.txt", "no record"]),
    ({"records": " ".join(f"TNMG{i}" for i in range(100, 130))}, ["30 exams have no row: 100, ", "109 and 20 more"]),
], ids=["missing", "duplicate", "contradiction", "AF 2", "AF empty", "AF yes or 0.5", "no patient",
        "no AF column", "semicolons", "empty file", "HTML", "UTF-16", "odd record name",
        "record twice", "number twice", "no records", "thirty missing"])
def test_bad_labels(tmp_path, how, words):
    """Each defect names the file or the exams (at most ten) and how many there are."""
    with pytest.raises(ValueError) as caught:
        helpers.load_labels(*label_files(tmp_path, **how))
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("missing", ["train.csv", "RECORDS.txt"])
def test_label_files_absent(tmp_path, missing):
    """A missing file is named."""
    paths = label_files(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        helpers.load_labels(*paths)


def test_labels_of_the_course_size(tmp_path):
    """10,000 exams are read in a moment."""
    ids = range(100_000, 110_000)
    rows = [f"{i},{i // 2},50,F,{i % 2}" for i in ids]
    paths = label_files(tmp_path, rows, records=" ".join(f"TNMG{i}" for i in ids))
    start = time.process_time()
    assert len(helpers.load_labels(*paths)) == 10_000
    assert time.process_time() - start < 0.5


# ------------------------------------------------------------------------------------------------
# Enough data
# ------------------------------------------------------------------------------------------------
def tiny_labels(n_af, n_other, exams_per_patient=1):
    patient = np.arange(n_af + n_other) // exams_per_patient
    return pd.DataFrame({"id_patient": patient, "AF": [1] * n_af + [0] * n_other})


@pytest.mark.parametrize("labels", [tiny_labels(4, 46), tiny_labels(20, 30, 13), tiny_labels(50, 0), tiny_labels(0, 50),
                                    tiny_labels(12, 40, 4)],
                         ids=["4 AF exams", "4 patients", "AF only", "no AF", "12 AF exams of 3 patients"])
def test_too_little_data(labels):
    """Refused at the start, in one sentence that gives both counts and says what is needed."""
    with pytest.raises(ValueError) as caught:
        helpers.require_enough(labels)
    counts = [labels.loc[labels["AF"] == label, "id_patient"].nunique() for label in (1, 0)]
    said = str(caught.value)
    assert all(re.search(rf"\b{count}\b", said) for count in counts) and "at least 5 patients" in said
    assert "\n" not in said and said.count(".") == 1


@pytest.mark.parametrize("labels", [tiny_labels(8, 42), tiny_labels(5, 5), tiny_labels(10, 40, 2)],
                         ids=["50 exams with 8 AF", "the least", "pairs"])
def test_enough_data(labels):
    """What has enough patients of both classes goes on."""
    helpers.require_enough(labels)


# ------------------------------------------------------------------------------------------------
# Split by patient
# ------------------------------------------------------------------------------------------------
def course_like_labels(n=3000, seed=0):
    """Exams as in the course: 30 % AF, about 1.4 exams per patient, both classes within some patients."""
    rng = np.random.default_rng(seed)
    patient = rng.integers(0, int(0.9 * n), n)
    af = (rng.random(n) < np.where(patient % 10 < 3, 0.8, 0.09)).astype(int)
    return pd.DataFrame({"id_patient": patient, "AF": af}, index=pd.Index(range(n), name="id_exam"))


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("seed", [0, 42])
def test_split_keeps_fraction_and_prevalence(fraction, seed):
    """On a table like the course's both sides have the same prevalence, and validation has its fraction."""
    labels = course_like_labels()
    train, valid = helpers.split_by_patient(labels, valid_fraction=fraction, seed=seed)
    assert not set(labels["id_patient"].iloc[train]) & set(labels["id_patient"].iloc[valid])
    assert len(valid) / len(labels) == pytest.approx(fraction, abs=0.01)
    af = labels["AF"].to_numpy()
    assert af[valid].mean() == pytest.approx(af[train].mean(), abs=0.01)


def test_split_is_deterministic():
    """The same seed gives the same split, another seed another one; the table is left alone."""
    labels = course_like_labels(500)
    before = labels.copy()
    first, again, other = (helpers.split_by_patient(labels, seed=seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    pd.testing.assert_frame_equal(labels, before)


@settings(max_examples=150, deadline=None)
@given(exams=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 1)), min_size=2, max_size=40)
       .filter(lambda exams: len({patient for patient, _ in exams}) > 1),
       fraction=st.floats(0.02, 0.98), seed=st.integers(0, 2**31), as_text=st.booleans())
def test_split_of_any_table(exams, fraction, seed, as_text):
    """Both sides have exams, no patient is on both, every exam is on one, and validation is not overfull."""
    labels = pd.DataFrame(exams, columns=["id_patient", "AF"])
    labels["id_patient"] = labels["id_patient"].map("P{}".format) if as_text else labels["id_patient"]
    train, valid = helpers.split_by_patient(labels, fraction, seed)
    assert len(train) and len(valid)
    assert sorted([*train, *valid]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()
    patient = labels["id_patient"].to_numpy()
    assert not set(patient[train]) & set(patient[valid])
    smallest = labels["id_patient"].value_counts().min()
    assert len(valid) <= max(smallest, fraction * len(labels) + 1)


@pytest.mark.parametrize("labels, fraction", [
    (pd.DataFrame({"id_patient": [5, 5, 5], "AF": [0, 1, 0]}), 0.2), (course_like_labels(50), 0),
    (course_like_labels(50), 1), (course_like_labels(50), -0.1)],
    ids=["one patient", "fraction 0", "fraction 1", "negative fraction"])
def test_split_that_cannot_be(labels, fraction):
    """One patient, or a fraction that leaves a side empty: said in words."""
    with pytest.raises(ValueError, match="patient|valid_fraction"):
        helpers.split_by_patient(labels, fraction)


# ------------------------------------------------------------------------------------------------
# Tracings in memory or mapped
# ------------------------------------------------------------------------------------------------
def test_tracings_in_memory_or_mapped(demo_h5, capsys):
    """What does not fit is mapped: the same numbers and batches, a word about it, and the file is only read."""
    content = demo_h5.read_bytes()
    whole_size = 48 * 4096 * 8 * 4
    loaded = [helpers.load_tracings(demo_h5, max_bytes=size) for size in (whole_size, whole_size - 1)]
    said = capsys.readouterr().out
    assert said.count("do not fit") == 1 and "train.h5" in said
    assert all(tracings.shape == (48, 4096, 8) and tracings.dtype == torch.float32 for tracings in loaded)
    assert torch.equal(*loaded) and torch.equal(helpers.load_tracings(demo_h5, "cpu"), loaded[0])
    targets = np.arange(48) % 2
    batches = [list(helpers.BatchLoader(tracings, targets, np.arange(5, 40), batch_size=8)) for tracings in loaded]
    assert all(torch.equal(a, b) for first, second in zip(*batches) for a, b in zip(first, second))
    loaded[1][:] = 7
    assert demo_h5.read_bytes() == content
