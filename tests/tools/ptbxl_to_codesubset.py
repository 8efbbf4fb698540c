"""Make real ECGs in the course's layout from PTB-XL: the exams of the README's results, or a larger set.

    python ptbxl_to_codesubset.py                        # the 2,010 exams of the results, from PhysioNet
    python ptbxl_to_codesubset.py --ptbxl FOLDER_OR_ZIP  # the same from an official copy of PTB-XL
    python ptbxl_to_codesubset.py --course-like          # all AF exams: 30 % AF in training, 50 % in the test part

Writes DIR/codesubset/, or with --course-like DIR/course_like/codesubset/; that path is the notebook's ECG_DATA.
Beside it lies test_labels.csv, for scoring only. Downloads stay in DIR/ptb-xl/: a run that was stopped continues,
and both sets share them. With --course-like this one file is enough; the set of the results needs the list of its
exams, tests/data/ptbxl_exams.csv.

Source of the ECGs: Wagner et al., PTB-XL, a large publicly available electrocardiography dataset, Scientific Data
7:154 (2020); version 1.0.3 on https://physionet.org/content/ptb-xl/1.0.3/, licence CC BY 4.0.
"""
import argparse
import ast
import io
import os
import re
import shutil
import sys
import threading
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
import requests
from tqdm import tqdm

URL = "https://physionet.org/files/ptb-xl/1.0.3/"
MIRROR = "https://physionet-open.s3.amazonaws.com/ptb-xl/1.0.3/"
EXAMS = Path(__file__).resolve().parent.parent / "data" / "ptbxl_exams.csv"
DATABASE, LABELS = "ptbxl_database.csv", "test_labels.csv"
LEADS = {"I": "DI", "II": "DII", "V1": "V1", "V2": "V2", "V3": "V3", "V4": "V4", "V5": "V5", "V6": "V6"}
RECORD = r"records500/\d{5}/\d{5}_hr"  # no other path: the table decides where downloads are written
PAUSES = (1, 3, 10, 30)  # seconds between the tries of one file


# ---- Which exams ----
def read_table(content, name, columns):
    """Table with at least these columns."""
    try:
        table = pd.read_csv(io.BytesIO(content))
    except ValueError as error:
        raise ValueError(f"{name} is no table ({error}). Remove it and get it again.") from None
    if missing := [column for column in columns if column not in table]:
        raise ValueError(f"{name}: column {', '.join(missing)} missing. Is it the right file, and whole?")
    return table


def read_database(content):
    """PTB-XL's table in the course's terms, without exams that lack a patient or statements that can be read."""
    columns = ("ecg_id", "patient_id", "age", "sex", "scp_codes", "filename_hr")
    table = read_table(content, DATABASE, columns)
    require_whole_numbers(table, DATABASE, ["ecg_id"])
    odd = ~table["filename_hr"].astype(str).str.fullmatch(RECORD)
    if odd.any():
        raise ValueError(f"{DATABASE}: filename_hr is not like records500/00000/00001_hr, first: "
                         f"{table.loc[odd, 'filename_hr'].iloc[0]}")
    exams = table[["ecg_id", "filename_hr"]].copy()
    exams["id_patient"] = whole_number(table["patient_id"])
    exams["age"] = whole_number(table["age"]).clip(upper=90)  # PTB-XL writes 300 for all over 89
    exams["sex"] = table["sex"].map({0: "M", 1: "F"})
    exams["AF"] = table["scp_codes"].map(has_af).astype("Int64")
    exams["date_exam"] = "2014-05-06"  # a placeholder, which nothing reads
    return exams.dropna(subset=["id_patient", "AF"])


def whole_number(column):
    """Numbers of a column, rounded; missing where there is none."""
    return pd.to_numeric(column, errors="coerce").round().astype("Int64")


def require_whole_numbers(table, name, columns):
    """ValueError unless these columns hold whole numbers, each once."""
    for column in columns:
        if not pd.api.types.is_integer_dtype(table[column]) or not table[column].is_unique:
            raise ValueError(f"{name}: {column} must hold whole numbers, each once. Is it the original file?")


def has_af(scp_codes):
    """1 where AFIB is among the statements, else 0; None where they cannot be read."""
    try:
        return int("AFIB" in ast.literal_eval(scp_codes))
    except (ValueError, SyntaxError, TypeError):
        return None


def read_list(file):
    """The list of exams of a set: id_exam, ecg_id, part."""
    if not file.is_file():
        raise FileNotFoundError(f"The list of exams {file} is missing. It is tests/data/ptbxl_exams.csv of the "
                                "project: give its path as --exams. The set of --course-like needs no list.")
    table = read_table(file.read_bytes(), file, ("id_exam", "ecg_id", "part"))
    require_whole_numbers(table, file, ["id_exam", "ecg_id"])
    if set(table["part"]) != {"train", "test"}:
        raise ValueError(f"{file}: part must be train or test, and both must be there")
    return table


def choose_listed(database, listed):
    """The exams of a list, in its order."""
    exams = listed.merge(database, on="ecg_id", how="left")
    unknown = exams.loc[exams["AF"].isna(), "ecg_id"]
    if len(unknown):
        raise ValueError(f"{DATABASE} lacks {len(unknown)} exams of the list, their patient or their statements. Is "
                         f"it whole? First ecg_id: {', '.join(map(str, unknown[:10]))}")
    return exams


def choose_course_like(database, seed):
    """All AF exams, half of them in either part, and other exams at random: 30 % AF in training, 50 % in the test.

    Every patient belongs to one part, so that no patient is in both.
    """
    rng = np.random.default_rng(seed)
    drawn = database.iloc[rng.permutation(len(database))]
    af_exams = Counter(drawn.loc[drawn["AF"] == 1, "id_patient"])
    if not af_exams:
        raise ValueError(f"{DATABASE} has no exam with AFIB")
    room, test_patients = af_exams.total() // 2, set()
    for patient, exams in af_exams.items():
        if exams <= room:
            test_patients.add(patient)
            room -= exams
    without_af = [patient for patient in drawn["id_patient"].unique() if patient not in af_exams]
    in_test = rng.random(len(without_af)) < 0.3  # of ten other exams needed, seven go to training
    test_patients.update(np.array(without_af)[in_test])
    parts = []
    for part, others_per_af in (("train", 7 / 3), ("test", 1)):
        side = drawn[drawn["id_patient"].isin(test_patients) == (part == "test")]
        af = side[side["AF"] == 1]
        others = side[side["AF"] == 0].head(round(others_per_af * len(af)))
        exams = pd.concat([af, others])
        parts.append(exams.iloc[rng.permutation(len(exams))].assign(part=part))
    exams = pd.concat(parts, ignore_index=True)
    exams["id_exam"] = 100_000 + exams["ecg_id"]
    return exams


def small_files(exams):
    """Content of the lists of records and of the tables, by path."""
    train, test = exams[exams["part"] == "train"], exams[exams["part"] == "test"]
    rng = np.random.default_rng(0)
    for part in (train, test, train):
        rows = rng.permutation(len(part))  # the third draw is the order of the rows in the published train.csv
    files = {}
    for part, exams_of_part in (("train", train), ("test", test)):
        names = [f"TNMG{number}\n" for number in exams_of_part["id_exam"]]
        files[f"codesubset/{part}/RECORDS.txt"] = "".join(names).encode()
    for path, table in (("codesubset/train.csv", train.iloc[rows]), (LABELS, test)):
        table = table[["id_exam", "id_patient", "age", "sex", "AF", "date_exam"]]
        files[path] = table.to_csv(index=False, lineterminator="\r\n").encode()
    return files


# ---- Records ----
HEAD = re.compile(r"\S+ (\d+) 500 (\d+)(?: .*)?")
LEAD = re.compile(r"\S+\.dat 16 1000(?:\.0+)?(?:\(0\))?/mV 16 0 -?\d+ (-?\d+) 0 (\S+)")


def read_record(folder, record):
    """Samples (samples, leads) and the leads' names; ValueError where the record is not whole or of another form."""
    try:
        header, content = ((folder / f"{record}{end}").read_bytes() for end in (".hea", ".dat"))
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"record {record}: a file is missing or damaged ({error})") from None
    lines = [line.strip() for line in header.decode("utf-8", "replace").splitlines()]
    head = HEAD.fullmatch(lines[0]) if lines else None
    leads = [LEAD.fullmatch(line) for line in lines[1:] if line and not line.startswith("#")]
    if not head or not all(leads) or len(leads) != int(head[1]):
        raise ValueError(f"record {record}: the header is not whole, or not PTB-XL's (500 Hz, format 16, 1000 per mV)")
    if len(content) != 2 * int(head[1]) * int(head[2]):
        raise ValueError(f"record {record}: {len(content):,} bytes of samples do not fit the header")
    samples = np.frombuffer(content, "<i2").reshape(int(head[2]), int(head[1]))
    for lead, total in zip(leads, samples.sum(axis=0, dtype=np.int64)):
        if (total - int(lead[1])) % 65536:
            raise ValueError(f"record {record}: the samples of lead {lead[2]} differ from the header's checksum")
    return samples, [lead[2].upper() for lead in leads]


def convert(folder, record, name):
    """Header and samples of a record with the course's eight leads; the samples stay as they are."""
    samples, leads = read_record(folder, record)
    if missing := [lead for lead in LEADS if lead not in leads]:
        raise ValueError(f"record {record}: lead {', '.join(missing)} missing")
    samples = samples[:, [leads.index(lead) for lead in LEADS]]
    lines = [f"{name} 8 500 {len(samples)}"]
    for lead, column in zip(LEADS.values(), samples.T):
        checksum = column.sum(dtype=np.int64) % 65536
        lines.append(f"{name}.dat 16 1000.0(0)/mV 16 0 {column[0]} {checksum} 0 {lead}")
    return "\n".join([*lines, ""]).encode(), samples.tobytes()


# ---- An official copy, or a download ----
def open_copy(path):
    """PTB-XL's folder in an official copy: in a folder or in the zip, there at the top or one level below."""
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a whole zip file: give the folder or the zip of PTB-XL.")
    top = path if path.is_dir() else zipfile.Path(path)
    found = [folder for folder in (top, *top.iterdir()) if (folder / DATABASE).exists()]
    if not found:
        raise ValueError(f"{path} holds no {DATABASE}: it is no copy of PTB-XL.")
    if not (found[0] / "records500").exists():
        raise ValueError(f"{path} has no records500/. The 100 Hz records are not enough: get the 500 Hz ones, or leave "
                         "--ptbxl out to download just the records needed.")
    return found[0]


def write_whole(path, content):
    """Write a file beside its place and rename it, so that no half file ever has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Server:
    """The files of PTB-XL at a web address; `stopped` is an event that ends all waiting."""

    def __init__(self, url):
        self.url, self.session, self.stopped = url.rstrip("/") + "/", requests.Session(), threading.Event()
        self.session.headers["Accept-Encoding"] = "identity"  # so that a short answer shows by its length

    def get(self, name):
        """Content of a file. Passing troubles (cut connection, busy server) are tried again, with pauses."""
        for pause in (*PAUSES, None):
            try:
                answer = self.session.get(self.url + name, timeout=(10, 30))
                if answer.status_code != 429 and answer.status_code < 500:
                    break
                problem = f"HTTP {answer.status_code} {answer.reason}"
                asked = answer.headers.get("Retry-After", "")
                if pause is not None and asked.isdigit():
                    pause = min(int(asked), 120)  # a server that asks for hours is left after some tries
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                problem = str(error)
            if pause is None or self.stopped.is_set():
                raise ConnectionError(f"{self.url}{name}: {problem}")
            if pause >= 10:
                print(f"  {name}: {problem}. Next try in {pause} s.", flush=True)
            self.stopped.wait(pause)
        if answer.status_code != 200:
            raise ConnectionError(f"{self.url}{name}: HTTP {answer.status_code} {answer.reason}. Is --url right?")
        if answer.content.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
            raise ConnectionError(f"{self.url}{name}: a web page came instead of the file (to sign in?).")
        return answer.content


def fetch_record(server, folder, record):
    """Make a record whole in `folder`: what is there and fits its checksums stays, else it is fetched anew, once."""
    names = (f"{record}.hea", f"{record}.dat")
    for last_try in (False, True):
        for name in names:
            if not (folder / name).exists():
                write_whole(folder / name, server.get(name))
        try:
            read_record(folder, record)
            return
        except ValueError as error:
            for name in names:
                (folder / name).unlink()
            if last_try:
                raise ValueError(f"{error}, also after it was fetched anew") from None


def fetch_records(server, folder, records, connections):
    """Make all records whole in `folder`, a few at a time. The first one that cannot be had ends it."""
    missing = sum(not (folder / f"{record}.dat").exists() for record in records)
    size = f"about {0.121 * missing:,.0f} MB"
    print(f"To download: {missing:,} of {len(records):,} records, {size}, from {server.url}", flush=True)
    with ThreadPoolExecutor(connections) as pool:
        try:
            jobs = [pool.submit(fetch_record, server, folder, record) for record in records]
            for job in progress(as_completed(jobs), "download", len(jobs)):
                job.result()
        finally:  # after an error or Ctrl-C: what has begun ends soon, nothing more begins
            server.stopped.set()
            pool.shutdown(cancel_futures=True)


def progress(iterable, label, total):
    """A bar of plain text, which a saved notebook keeps."""
    return tqdm(iterable, label, total, unit="record", mininterval=15, ascii=True, file=sys.stdout)


# ---- The set ----
def is_there(home, exams, files):
    """Whether `home` holds this set, whole. ValueError where something else is in its place."""
    target = home / "codesubset"
    try:
        for path, content in files.items():
            expected = target.exists() and path != LABELS
            if (expected or (home / path).exists()) and (home / path).read_bytes() != content:
                raise ValueError(f"{path} has another content")
        for exam in exams.itertuples() if target.exists() else ():
            read_record(target / exam.part, f"TNMG{exam.id_exam}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{home} holds something else than this set, or not all of it ({error}). It is not replaced: "
                         "move it away, or choose another --out.") from None
    return target.exists()


def write_set(folder, home, exams, files):
    """Write the set beside its place, to `home`/codesubset.part, and rename it when whole."""
    part = home / "codesubset.part"
    shutil.rmtree(part, ignore_errors=True)  # of a killed run
    try:
        for path, content in files.items():
            write_whole(part / path, content)
        for exam in progress(exams.itertuples(), "convert", len(exams)):
            name = f"TNMG{exam.id_exam}"
            header, samples = convert(folder, exam.filename_hr, name)
            (part / "codesubset" / exam.part / f"{name}.hea").write_bytes(header)
            (part / "codesubset" / exam.part / f"{name}.dat").write_bytes(samples)
        os.replace(part / "codesubset", home / "codesubset")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_set(options):
    """Choose the exams, get their records, write the set."""
    out, server = options.out.resolve(), Server(options.url)
    listed = None if options.course_like else read_list(options.exams)
    folder = open_copy(options.ptbxl) if options.ptbxl else out / "ptb-xl"
    if not (folder / DATABASE).exists():
        print(f"To download: {server.url}{DATABASE}", flush=True)
        content = server.get(DATABASE)
        read_database(content)  # a wrong answer is not kept
        write_whole(folder / DATABASE, content)
    database = read_database((folder / DATABASE).read_bytes())
    if options.course_like:
        home, exams = out / "course_like", choose_course_like(database, options.seed)
    else:
        home, exams = out, choose_listed(database, listed)
    for part in ("train", "test"):
        af = exams.loc[exams["part"] == part, "AF"]
        print(f"{part}: {len(af):,} exams, {af.sum():,} of them AF ({100 * af.mean():.1f} %)", flush=True)
    files = small_files(exams)
    if is_there(home, exams, files):
        print("This set is there, whole: it is kept.")
    else:
        if not options.ptbxl:
            fetch_records(server, folder, list(exams["filename_hr"]), options.connections)
        write_set(folder, home, exams, files)
    write_whole(home / LABELS, files[LABELS])
    print(f"Next: ECG_DATA={home / 'codesubset'}\nFor scoring only, after training: {home / LABELS}")


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ptbxl", type=Path, metavar="FOLDER_OR_ZIP", help="an official copy of PTB-XL; without it, a download")
    add("--course-like", action="store_true", help="the larger set, with the course's shares of AF")
    add("--out", type=Path, metavar="DIR", default=Path("ptbxl"), help="where all is written (default: ptbxl)")
    add("--exams", type=Path, metavar="CSV", default=EXAMS, help="the list: tests/data/ptbxl_exams.csv")
    add("--url", default=URL, help=f"where PTB-XL is (default: {URL}); often faster: {MIRROR}")
    add("--connections", type=int, choices=range(1, 17), metavar="N", default=4, help="at a time (default: 4)")
    add("--seed", type=int, default=42, help="of the draws of --course-like (default: 42)")
    return parser.parse_args(arguments)


def main(arguments=None):
    """Make the set; a trouble ends in one message."""
    options, start = parse(arguments), time.monotonic()
    kept = "" if options.ptbxl else "\nWhat was downloaded is kept: the same command continues."
    try:
        make_set(options)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped.{kept}")
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"\n{error}{kept}")
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
