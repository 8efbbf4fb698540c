"""Make real ECGs in the course's layout from PTB-XL: the exams of the README's results, or a larger set.

    python ptbxl_to_codesubset.py                        # the 2,010 exams of the results, from PhysioNet
    python ptbxl_to_codesubset.py --ptbxl FOLDER_OR_ZIP  # the same from an official copy of PTB-XL
    python ptbxl_to_codesubset.py --course-like          # all AF exams: 30 % AF in training, 50 % in the test part

Writes DIR/codesubset/, or with --course-like DIR/course_like/codesubset/; that path is the notebook's ECG_DATA.
Beside it lies test_labels.csv, for scoring only. Downloads stay in DIR/ptb-xl/: a run that was stopped continues.
With --course-like this file is enough; the set of the results needs the list tests/data/ptbxl_exams.csv too.

Source of the ECGs: Wagner et al., PTB-XL, a large publicly available electrocardiography dataset, Scientific Data
7:154 (2020); version 1.0.3 on https://physionet.org/content/ptb-xl/1.0.3/, licence CC BY 4.0.
"""
import argparse
import io
import os
import re
import shutil
import sys
import time
import zipfile
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
HEAD = re.compile(r"\S+ (\d+) 500 (\d+)\b")
LEAD = re.compile(r"^\S+\.dat 16 1000(?:\.0+)?(?:\(0\))?/mV 16 0 -?\d+ (-?\d+) 0 (\S+)\s*$", re.MULTILINE)
PAUSES = (1, 3, 10, 30)  # seconds between the tries of one file
BAR = {"unit": "record", "mininterval": 15, "ascii": True, "file": sys.stdout}  # text, which a saved notebook keeps


# ---- Which exams ----
def read_table(content, name, columns):
    """These columns of a table."""
    try:
        return pd.read_csv(io.BytesIO(content), usecols=columns)
    except ValueError as error:
        raise ValueError(f"{name} is not the right file, or not whole: {error}. Get it again.") from None


def read_database(content):
    """PTB-XL's table in the course's terms, without exams that lack a patient."""
    table = read_table(content, DATABASE, ["ecg_id", "patient_id", "age", "sex", "scp_codes", "filename_hr"])
    for column, form in (("ecg_id", r"\d+"), ("filename_hr", RECORD), ("scp_codes", r"\{.*\}")):
        odd = ~table[column].astype(str).str.fullmatch(form)
        if odd.any():
            raise ValueError(f"{DATABASE}: {column} is {table.loc[odd, column].iloc[0]} in line "
                             f"{odd.argmax() + 2}. Is it the original file, and whole?")
    exams = table[["ecg_id", "filename_hr"]].copy()
    numbers = table[["patient_id", "age"]].apply(pd.to_numeric, errors="coerce").round().astype("Int64")
    exams["id_patient"] = numbers["patient_id"]
    exams["age"] = numbers["age"].clip(upper=90)  # PTB-XL writes 300 for all over 89
    exams["sex"] = table["sex"].map({0: "M", 1: "F"})
    exams["AF"] = table["scp_codes"].str.contains("'AFIB':").astype(int)
    exams["date_exam"] = "2014-05-06"  # a placeholder, which nothing reads
    return exams.dropna(subset=["id_patient"])


def choose_listed(database, file):
    """The exams of a list (columns id_exam, ecg_id, part), in its order."""
    listed = read_table(file.read_bytes(), file, ["id_exam", "ecg_id", "part"])
    unknown = listed.loc[~listed["ecg_id"].isin(database["ecg_id"]), "ecg_id"]
    if len(unknown):
        raise ValueError(f"{DATABASE} lacks {len(unknown)} exams of {file}, or their patients. First ecg_id: "
                         f"{', '.join(map(str, unknown[:10]))}. Is it whole? Else remove it and get it again.")
    return listed.merge(database, on="ecg_id", how="left", validate="1:1")


def choose_course_like(database, seed):
    """All AF exams, half in either part, and others at random: 30 % and 50 % AF. No patient is in both parts."""
    rng = np.random.default_rng(seed)
    drawn = database.iloc[rng.permutation(len(database))]
    af_exams = Counter(drawn.loc[drawn["AF"] == 1, "id_patient"])
    if not af_exams:
        raise ValueError(f"{DATABASE} has no exam with AFIB. Is it the original file?")
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
        exams = pd.concat([af, side[side["AF"] == 0].head(round(others_per_af * len(af)))])
        parts.append(exams.iloc[rng.permutation(len(exams))].assign(part=part))
    exams = pd.concat(parts, ignore_index=True)
    exams["id_exam"] = 100_000 + exams["ecg_id"]
    return exams


def small_files(exams):
    """Content of the lists of records and of the tables, by path."""
    train, test = exams[exams["part"] == "train"], exams[exams["part"] == "test"]
    rng = np.random.default_rng(0)
    rows = [rng.permutation(len(part)) for part in (train, test, train)][2]  # as in the published train.csv
    files = {}
    for part, table in (("train", train), ("test", test)):
        files[f"codesubset/{part}/RECORDS.txt"] = "".join(f"TNMG{i}\n" for i in table["id_exam"]).encode()
    for path, table in (("codesubset/train.csv", train.iloc[rows]), (LABELS, test)):
        table = table[["id_exam", "id_patient", "age", "sex", "AF", "date_exam"]]
        files[path] = table.to_csv(index=False, lineterminator="\r\n").encode()
    return files


# ---- Records, from a copy or a download ----
def read_record(folder, record):
    """Samples of the course's leads, (samples, 8); ValueError where the record is not whole or of another form."""
    try:
        header, content = ((folder / f"{record}{end}").read_bytes() for end in (".hea", ".dat"))
    except (FileNotFoundError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"record {record}: a file is missing or damaged ({error})") from None
    text = header.decode("utf-8", "replace")
    head, leads = HEAD.match(text), LEAD.findall(text)
    names = [name.upper() for _, name in leads]
    if not head or len(leads) != int(head[1]) or not set(LEADS) <= set(names):
        raise ValueError(f"record {record}: the header is not whole, or not PTB-XL's (12 leads, 500 Hz, format 16, "
                         f"1000 per mV); leads: {', '.join(names)}")
    if len(content) != 2 * int(head[1]) * int(head[2]):
        raise ValueError(f"record {record}: {len(content):,} bytes of samples do not fit the header")
    samples = np.frombuffer(content, "<i2").reshape(int(head[2]), int(head[1]))
    for (checksum, name), total in zip(leads, samples.sum(axis=0, dtype=np.int64)):
        if (total - int(checksum)) % 65536:
            raise ValueError(f"record {record}: the samples of lead {name} differ from the header's checksum")
    return samples[:, [names.index(lead) for lead in LEADS]]


def write_record(samples, folder, name):
    """A record with the course's eight leads; the samples stay as they are."""
    lines = [f"{name} 8 500 {len(samples)}"]
    for lead, column in zip(LEADS.values(), samples.T):
        checksum = column.sum(dtype=np.int64) % 65536
        lines.append(f"{name}.dat 16 1000.0(0)/mV 16 0 {column[0]} {checksum} 0 {lead}")
    (folder / f"{name}.hea").write_bytes("\n".join([*lines, ""]).encode())
    (folder / f"{name}.dat").write_bytes(samples.tobytes())


def open_copy(path):
    """PTB-XL's folder in an official copy: in a folder or in the zip, there at the top or one level below."""
    if not path.is_dir() and not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is neither a folder nor a whole zip file: give the folder or the zip of PTB-XL.")
    top = path if path.is_dir() else zipfile.Path(path)
    found = [folder for folder in (top, *top.iterdir()) if (folder / DATABASE).exists()]
    if not found or not (found[0] / "records500").exists():
        raise ValueError(f"{path} holds no {DATABASE} with records500/ beside it: it is no whole copy of PTB-XL. "
                         "Leave --ptbxl out to download just the records needed.")
    return found[0]


def write_whole(path, content):
    """Write a file beside its place and rename it, so that no half file ever has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(content)
    os.replace(part, path)


def download(session, address):
    """Content of a file. Passing troubles (cut connection, busy server) are tried again, with pauses."""
    for pause in (*PAUSES, None):
        try:
            answer = session.get(address, timeout=(10, 30))
            problem = f"HTTP {answer.status_code} {answer.reason}"
            if answer.status_code != 429 and answer.status_code < 500:
                break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            problem = str(error)
        if pause is None:
            raise ConnectionError(f"{address}: {problem}, {len(PAUSES) + 1} times. Try again later.")
        time.sleep(pause)
    is_page = answer.content.lstrip()[:9].lower().startswith((b"<!doctype", b"<html"))
    if answer.status_code == 200 and not is_page:
        return answer.content
    raise ConnectionError(f"{address}: {problem}{', a web page (to sign in?)' if is_page else ''}. Is --url right?")


def fetch_record(session, url, folder, record):
    """Make a record whole in `folder`: one that is there and fits its checksums stays, else it is fetched."""
    for last_try in (False, False, True):
        try:
            read_record(folder, record)
            return
        except ValueError as error:
            if last_try:
                raise ValueError(f"{error}, also after it was fetched anew. Try again later.") from None
        for name in (f"{record}.hea", f"{record}.dat"):
            write_whole(folder / name, download(session, url + name))


def fetch_records(session, url, folder, records, connections):
    """Make all records whole in `folder`, a few at a time. The first one that cannot be had ends it."""
    missing = sum(not (folder / f"{record}.dat").exists() for record in records)
    print(f"To download: {missing:,} of {len(records):,} records, about {0.121 * missing:,.0f} MB, from {url}")
    with ThreadPoolExecutor(connections) as pool:
        try:
            done = pool.map(lambda record: fetch_record(session, url, folder, record), records)
            list(tqdm(done, "download", len(records), **BAR))
        finally:  # after an error or Ctrl-C: what has begun ends, nothing more begins
            pool.shutdown(cancel_futures=True)


def is_there(home, files):
    """Whether `home` holds this set; ValueError where something else is in its place."""
    there = (home / "codesubset").exists()
    for path, content in files.items():
        file, expected = home / path, there and path != LABELS
        if (expected or file.exists()) and not (file.is_file() and file.read_bytes() == content):
            raise ValueError(f"{file} is not of this set, and is not replaced. Move it away or choose another --out.")
    return there


def write_set(folder, home, exams, files):
    """Write the set to `home`/codesubset.part, and rename it when whole."""
    part = home / "codesubset.part"
    shutil.rmtree(part, ignore_errors=True)  # of a killed run
    try:
        for path, content in files.items():
            write_whole(part / path, content)
        for exam in tqdm(exams.itertuples(), "convert", len(exams), **BAR):
            samples = read_record(folder, exam.filename_hr)
            write_record(samples, part / "codesubset" / exam.part, f"TNMG{exam.id_exam}")
        os.replace(part / "codesubset", home / "codesubset")
    finally:
        shutil.rmtree(part, ignore_errors=True)


def make_set(options):
    """Choose the exams, get their records, write the set."""
    if not options.course_like and not options.exams.is_file():
        raise FileNotFoundError(f"The list of exams {options.exams} is missing. It is tests/data/ptbxl_exams.csv of "
                                "the project: give its path as --exams. The set of --course-like needs no list.")
    out, url, session = options.out.resolve(), options.url.rstrip("/") + "/", requests.Session()
    folder = open_copy(options.ptbxl) if options.ptbxl else out / "ptb-xl"
    if not (folder / DATABASE).exists():
        content = download(session, url + DATABASE)
        read_database(content)  # a wrong answer is not kept
        write_whole(folder / DATABASE, content)
    database = read_database((folder / DATABASE).read_bytes())
    home = out / "course_like" if options.course_like else out
    exams = (choose_course_like(database, options.seed) if options.course_like
             else choose_listed(database, options.exams))
    for part, af in exams.groupby("part")["AF"]:
        print(f"{part}: {len(af):,} exams, {af.sum():,} of them AF ({100 * af.mean():.1f} %)", flush=True)
    files = small_files(exams)
    if not is_there(home, files):
        if not options.ptbxl:
            fetch_records(session, url, folder, list(exams["filename_hr"]), options.connections)
        write_set(folder, home, exams, files)
    write_whole(home / LABELS, files[LABELS])
    print(f"Next: ECG_DATA={home / 'codesubset'}\nFor scoring only, after training: {home / LABELS}")


def main(arguments=None):
    """Read the command line and make the set; a trouble ends in one message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ptbxl", type=Path, metavar="FOLDER_OR_ZIP", help="an official copy of PTB-XL; without it, a download")
    add("--course-like", action="store_true", help="the larger set, with the course's shares of AF")
    add("--out", type=Path, metavar="DIR", default=Path("ptbxl"), help="where all is written (default: ptbxl)")
    add("--exams", type=Path, metavar="CSV", default=EXAMS, help="the list: tests/data/ptbxl_exams.csv")
    add("--url", default=URL, help=f"where PTB-XL is (default: {URL}); often faster: {MIRROR}")
    add("--connections", type=int, choices=range(1, 17), metavar="N", default=4, help="at a time (default: 4)")
    add("--seed", type=int, default=42, help="of the draws of --course-like (default: 42)")
    options = parser.parse_args(arguments)
    kept = "" if options.ptbxl else "\nWhat was downloaded is kept: the same command continues."
    try:
        make_set(options)
    except KeyboardInterrupt:
        sys.exit(f"\nStopped.{kept}")
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"\n{error}{kept}")


if __name__ == "__main__":
    main()
