"""A stand-in for the course's leaderboard: for the tests, and to rehearse the submissions at home.

It speaks the protocol of the course's public server code, keeps everything in memory, listens on this machine only,
and a day lasts until somebody asks for the next one.

    python tests/tools/leaderboard_server.py --labels test_labels.csv --records codesubset/test/RECORDS.txt
    curl -X POST http://127.0.0.1:5050/next-day

    with running(labels=[1, 0, 0]) as server:   # in a test: answers on a free port until the block ends
        requests.put(server.host + "register", auth=("group_1", "password"))
        server.next_day()
"""
import argparse
import base64
import html
import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

COURSE_ROWS = 6000  # exams in the course's test set
MAX_DAYS, MAX_LENGTH = 5, 20  # submissions that count; characters of a team id or a note
PAGE = """<!doctype html><meta charset="utf-8"><h1>Leaderboard, day {day}</h1><script>
const rows = [{rows}];
for (const row of rows) document.write(Object.values(row).join(' | ') + '<br>');
</script>"""


class LeaderboardServer(ThreadingHTTPServer):
    """The leaderboard's state and rules.

    `labels`: AF (0/1) of the test exams in the order of RECORDS.txt; without them 6,000 rows are expected and scores
    stay "TBC". `port` 0 takes a free one. For a test to read and change:

    host: the address for a client; day: starts at 1; final_day: the last one for submissions (None: no end)
    teams, submissions: {team id: password}; {team id: {day: (scores or None, note)}}
    received: every request in order: {"method", "path", "team", "content"}
    faults: one for each of the next requests, "" for none: "hang" (no answer), "drop" (closes without an answer),
        "cut" (acts, then breaks off its answer), "500", "400 reason", "302 address"
    """

    def __init__(self, labels=None, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.host = f"http://127.0.0.1:{self.server_port}/"
        self.labels, self.rows = labels, COURSE_ROWS if labels is None else len(labels)
        self.day, self.final_day = 1, None
        self.teams, self.submissions, self.received, self.faults = {}, {}, [], []

    def next_day(self):
        """Publish the scores of today."""
        self.day += 1

    def answer(self, request, team, password, content, fault):
        """Status and text for one request. An error in here is the 500 of the course's server."""
        if fault[:3].isdigit():
            return int(fault[:3]), fault[4:]
        if request == "PUT /register":
            return self.register(team, password)
        if request == "PUT /leaderboard":
            return self.submit(team, password, content["prediction"], content.get("note", ""))
        if request == "GET /leaderboard":
            return 200, self.page()
        if request == "POST /next-day":
            self.next_day()
            return 200, f"Day {self.day}\n"
        return 404, f"{request} is not known"

    def register(self, team, password):
        """201 for a new team, 200 for a known one."""
        if len(team) > MAX_LENGTH:
            return 400, "Team id is too long"
        if team not in self.teams:
            self.teams[team] = password
            return 201, f"Team: {team} is now registered"
        if self.teams[team] != password:
            return 400, f"Team: {team} is already registered with a different password"
        return 200, ""

    def submit(self, team, password, prediction, note):
        """201 for the first submission of a day, 200 for one that replaces it."""
        if team not in self.teams or self.teams[team] != password:
            return 401, "Unauthorized Access"
        if len(note) > MAX_LENGTH:
            return 400, "Note is too long"
        if self.final_day is not None and self.day > self.final_day:
            return 400, "Submission closed"
        n_rows, n_columns = np.asarray_chkfinite(prediction, dtype=float).shape  # an error for all but a finite table
        if (n_rows, n_columns) != (self.rows, 2):
            return 400, ("Prediction array is not the same size as the true class array which have "
                         f"length: {self.rows} and 2 classes.")
        days = self.submissions.get(team, {})
        if self.day not in days and len(days) >= MAX_DAYS:
            return 400, "Maximum number of predictions reached"
        known = None if self.labels is None else scores(self.labels, prediction)
        self.submissions[team] = {**days, self.day: (known, note)}
        return 200 if self.day in days else 201, "Submission successful"

    def page(self):
        """The public page; scores of the current day are "TBC"."""
        rows = []
        for team, days in self.submissions.items():
            for day, (known, note) in days.items():
                public = known and day < self.day
                shown = {key: f"{known[key]:.3f}" if public else "TBC" for key in ("acc", "f1", "auc", "ap")}
                cells = {"team": html.escape(team), **shown, "note": html.escape(note)}
                rows.append("{ " + ", ".join(f"{name}: '{cell}'" for name, cell in cells.items()) + " }")
        return PAGE.format(day=self.day, rows=",\n".join(rows))


class Handler(BaseHTTPRequestHandler):
    """One request: answered by the server's rules, or by the next fault."""
    def do_PUT(self):
        path = self.requestline.split()[1]  # self.path hides a doubled slash
        content = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        coded = self.headers.get("Authorization", "").removeprefix("Basic ")
        team, _, password = base64.b64decode(coded).decode().partition(":") if coded else (None, None, None)
        self.server.received.append({"method": self.command, "path": path, "team": team, "content": content})
        fault = self.server.faults.pop(0) if self.server.faults and path != "/next-day" else ""
        if fault == "hang":
            threading.Event().wait()  # for ever, in a thread that ends with the program
        if fault == "drop":
            return
        try:
            status, text = self.server.answer(f"{self.command} {path}", team, password, content, fault)
        except Exception as error:  # whatever the rules did not foresee
            status, text = 500, repr(error)
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("Location", text)
        if status >= 400:
            text = f"<!doctype html>\n<title>{status}</title>\n<p>{html.escape(text)}</p>\n"
        data = text.encode()
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data) + (10 if fault == "cut" else 0)))  # cut: more than is sent
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if fault == "cut" else data)

    do_GET = do_POST = do_PUT


def scores(labels, prediction):
    """The leaderboard's scores: decision by argmax (a tie is class 0), AUC and AP averaged over both columns."""
    called = [int(af > other) for other, af in prediction]
    both = [[1 - label, label] for label in labels]
    return {"acc": accuracy_score(labels, called), "f1": f1_score(labels, called, zero_division=0),
            "auc": roc_auc_score(both, prediction), "ap": average_precision_score(both, prediction)}


def read_labels(labels_file, records_file):
    """AF (0/1) of each record of RECORDS.txt, from a CSV with the columns id_exam and AF."""
    af = pd.read_csv(labels_file, index_col="id_exam")["AF"]
    return [int(af[int(exam)]) for exam in Path(records_file).read_text().replace("TNMG", "").split()]


@contextmanager
def running(**options):
    """Yield a LeaderboardServer that answers in the background until the block ends."""
    with LeaderboardServer(**options) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def main():
    """Read the command line and serve until Ctrl+C."""
    parser = argparse.ArgumentParser(description="A leaderboard on this machine, to rehearse submissions.")
    parser.add_argument("--labels", help="CSV with id_exam, AF of the test exams; without: scores stay TBC")
    parser.add_argument("--records", help="RECORDS.txt of the test exams, for --labels: the order of the rows")
    parser.add_argument("--port", type=int, default=5050, help="0 takes a free one")
    given = parser.parse_args()
    try:
        labels = read_labels(given.labels, given.records) if given.labels or given.records else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        parser.error(f"--labels {given.labels} and --records {given.records} must be there and fit: {error!r}")
    server = LeaderboardServer(labels, given.port)
    print(f"Leaderboard of {server.rows:,} exams: {server.host}leaderboard, for the notebook LEADERBOARD_HOST="
          f"{server.host}\nNext day: curl -X POST {server.host}next-day\nStop: Ctrl+C", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
