"""A stand-in for the course's leaderboard: for the tests, and to rehearse the submissions at home.

It speaks the protocol of the course's public server code, keeps everything in memory, listens on this
machine only and has its own calendar: a day lasts until somebody asks for the next one.

    python tests/tools/leaderboard_server.py --labels test_labels.csv --records codesubset/test/RECORDS.txt
    curl -X POST http://127.0.0.1:5050/next-day

`--labels` needs the columns `id_exam` and `AF` (demo data have such a file). Without it the protocol is
the same, but every score stays "TBC".
"""
import argparse
import base64
import binascii
import csv
import json
import math
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COURSE_ROWS = 6000  # exams in the course's test set
MAX_DAYS = 5        # submissions that count
MAX_LENGTH = 20     # characters of a team id or a note
RESERVED = "admin"  # the course's server refuses this team; its exact words are not known
JINJA_ESCAPES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "'": "&#39;", '"': "&#34;"})
PAGE = """<!doctype html>
<html><head><meta charset="utf-8"><title>Leaderboard</title></head>
<body><h1>Leaderboard, day {day}</h1><table></table>
<script>
const columns = ['team', 'acc', 'f1', 'auc', 'ap', 'note'];
const rows = [
{rows}
];
for (const row of rows) {{
  const line = document.querySelector('table').insertRow();
  for (const column of columns) line.insertCell().innerHTML = row[column];
}}
</script></body></html>
"""
ERROR_PAGE = "<!doctype html>\n<html lang=en>\n<title>{title}</title>\n<h1>{title}</h1>\n<p>{reason}</p>\n"


class Refused(Exception):
    """An answer that is not a success: status, reason."""


class LeaderboardServer(ThreadingHTTPServer):
    """The leaderboard's state and rules.

    Parameters
    ----------
    labels : list of int, optional
        AF (0/1) of the test exams, in the order of RECORDS.txt. None: scores stay "TBC".
    rows : int
        Rows that a prediction must have, where no labels are given.
    final_day : int, optional
        Submissions are closed after this day.
    port : int
        0 takes a free one.
    log : callable, optional
        Called with one line of text for each answer. No password is ever logged.

    Attributes
    ----------
    host : str, the address that a client is given
    day : int, starts at 1; raise it (or POST /next-day) for the next server day
    teams : dict, team id -> password
    submissions : dict, team id -> {day: (scores or None, note)}
    received : list of dict, every request in order: method, path, team, content
    faults : list of str, one for each of the next requests, "" for none: "hang" (no answer until the server
        stops), "drop" (closes without an answer), "cut" (acts, then breaks off in the middle of the
        answer), "500", "400 reason", "302 address"
    """

    daemon_threads = True

    def __init__(self, labels=None, rows=COURSE_ROWS, final_day=None, port=0, log=None):
        super().__init__(("127.0.0.1", port), _Handler)
        self.labels, self.rows = labels, rows if labels is None else len(labels)
        self.final_day, self.day, self.log = final_day, 1, log
        self.teams, self.submissions, self.received, self.faults = {}, {}, [], []
        self.order = []  # (team, day) of each submission that counts
        self.lock, self.released = threading.Lock(), threading.Event()
        self.host = f"http://127.0.0.1:{self.server_port}/"

    def answer(self, method, path, credentials, body):
        """Status and text for one request; raises Refused for everything but success."""
        if (method, path) == ("PUT", "/register"):
            return self.register(credentials)
        if (method, path) == ("PUT", "/leaderboard"):
            return self.submit(credentials, body)
        if method == "GET" and path in ("/", "/leaderboard"):
            return 200, self.page()
        if (method, path) == ("POST", "/next-day"):
            self.day += 1
            return 200, f"Day {self.day}\n"
        raise Refused(404, f"{method} {path}: not found")

    def register(self, credentials):
        """201 for a new team, 200 for a known one."""
        if credentials is None:
            raise Refused(500, "The server encountered an internal error")
        team, password = credentials
        if len(team) > MAX_LENGTH:
            raise Refused(400, "Team id is too long")
        if team == RESERVED:
            raise Refused(400, "Team id not allowed")
        if team in self.teams:
            if self.teams[team] != password:
                raise Refused(400, f"Team: {team} is already registered with a different password")
            return 200, ""
        self.teams[team] = password
        return 201, f"Team: {team} is now registered"

    def submit(self, credentials, body):
        """201 for the first submission of a day, 200 for one that replaces it."""
        team, password = credentials or (None, None)
        if team not in self.teams or self.teams[team] != password:
            raise Refused(401, "Unauthorized Access")
        prediction, note = body.get("prediction"), body.get("note")
        note = note if isinstance(note, str) else ""
        if not isinstance(prediction, list):
            raise Refused(400, "Submission does not contain a correctly formatted prediction")
        if len(note) > MAX_LENGTH:
            raise Refused(400, "Note is too long")
        if self.final_day is not None and self.day > self.final_day:
            raise Refused(400, "Submission closed")
        self.check(prediction)
        days = self.submissions.setdefault(team, {})
        again = self.day in days
        if not again and len(days) >= MAX_DAYS:
            raise Refused(400, "Maximum number of predictions reached")
        if not again:
            self.order.append((team, self.day))
        days[self.day] = (None if self.labels is None else scores(self.labels, prediction), note)
        return 200 if again else 201, "Submission successful"

    def check(self, prediction):
        """Refuse what the course's server refuses: its own 400 for the size, a crash (500) for the rest."""
        crash = Refused(500, "The server encountered an internal error")
        if not all(isinstance(row, list) and len(row) == len(prediction[0]) for row in prediction):
            raise crash  # one-dimensional or ragged
        if len(prediction) != self.rows or len(prediction[0]) != 2:
            raise Refused(400, "Prediction array is not the same size as the true class array which have "
                               f"length: {self.rows} and 2 classes.")
        values = [value for row in prediction for value in row]
        if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
            raise crash

    def page(self):
        """The public page, in the order of submission; scores of the current day are "TBC"."""
        rows = []
        for team, day in self.order:
            known, note = self.submissions[team][day]
            rows.append(_row(team, note, known if day < self.day else None))
        return PAGE.format(day=self.day, rows=",\n".join(rows))

    def stop(self):
        """Let go of what hangs and close the port."""
        self.released.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_PUT(self):
        path = self.requestline.split()[1]  # self.path hides a doubled slash
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        credentials = _credentials(self.headers.get("Authorization", ""))
        content, team = _json(body), credentials[0] if credentials else None
        self.server.received.append({"method": self.command, "path": path, "team": team, "content": content})
        fault = self.server.faults.pop(0) if self.server.faults and path != "/next-day" else ""
        if fault == "hang":
            self.server.released.wait()
        if fault in ("hang", "drop"):
            return
        try:
            if fault[:3].isdigit():
                raise Refused(int(fault[:3]), fault[4:])
            with self.server.lock:
                status, text = self.server.answer(self.command, path, credentials, content)
            reason = ""
        except Refused as refused:
            status, reason = refused.args
            title = f"{status} {self.responses.get(status, ('',))[0]}"
            page = ERROR_PAGE.format(title=title, reason=reason.translate(JINJA_ESCAPES))
            text = reason if status == 401 else page  # the course's 401 is plain text
        if self.server.log:  # before the answer: who has it can read the line
            who = f" {team!r} {content.get('note', '')!r}" if team else ""
            self.server.log(f"day {self.server.day}: {self.command} {path}{who} {status} {reason}")
        self.reply(status, text, location=reason if 300 <= status < 400 else None, cut=fault == "cut")

    do_GET = do_POST = do_PUT

    def reply(self, status, text, location=None, cut=False):
        """Send `text`; cut: announce more than is sent."""
        data = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data) + (10 if cut else 0)))
        if location:
            self.send_header("Location", location)
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if cut else data)

    def log_message(self, *args):
        """Silence the standard library's log: LeaderboardServer.log replaces it."""


def _credentials(header):
    """(team id, password) of a basic-auth header, else None. The first ":" separates them."""
    try:
        text = base64.b64decode(header.removeprefix("Basic "), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return None
    team, _, password = text.partition(":")
    return (team, password) if header.startswith("Basic ") else None


def _json(body):
    try:
        content = json.loads(body or b"{}")
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _row(team, note, known):
    cells = {key: f"{known[key]:.3f}" if known else "TBC" for key in ("acc", "f1", "auc", "ap")}
    cells = {"team": team.translate(JINJA_ESCAPES), **cells, "note": note.translate(JINJA_ESCAPES)}
    return "{ " + ", ".join(f"{key}: '{value}'" for key, value in cells.items()) + " }"


def scores(labels, prediction):
    """The leaderboard's four scores: decision by argmax (a tie is class 0), AUC and AP averaged over both
    columns.
    """
    # imported here: without labels the server needs no scikit-learn
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
    called = [int(af > other) for other, af in prediction]
    both = [[1 - label, label] for label in labels]
    return {"acc": accuracy_score(labels, called), "f1": f1_score(labels, called, zero_division=0),
            "auc": roc_auc_score(both, prediction), "ap": average_precision_score(both, prediction)}


def read_labels(labels_file, records_file):
    """AF (0/1) of each record of RECORDS.txt, from a CSV with the columns id_exam and AF."""
    with open(labels_file, encoding="utf-8-sig", newline="") as file:
        table = {int(row["id_exam"]): int(row["AF"]) for row in csv.DictReader(file)}
    return [table[int(re.search(r"\d+$", name)[0])] for name in Path(records_file).read_text().split()]


@contextmanager
def running(**options):
    """Yield a LeaderboardServer that answers in the background until the block ends."""
    server = LeaderboardServer(**options)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.stop()


def main():
    parser = argparse.ArgumentParser(description="A leaderboard on this machine, to rehearse submissions.")
    parser.add_argument("--labels", help="CSV with id_exam, AF of the test exams; without: scores stay TBC")
    parser.add_argument("--records", help="RECORDS.txt of the test exams: the order of the rows")
    parser.add_argument("--rows", type=int, help=f"rows of a prediction, unlabelled (default {COURSE_ROWS})")
    parser.add_argument("--final-day", type=int, help="the last day that takes submissions")
    parser.add_argument("--port", type=int, default=5050, help="0 takes a free one")
    parser.add_argument("--faults", nargs="*", default=[], metavar="FAULT",
                        help='for the first requests: 500, hang, drop, cut, "400 reason", "302 address"')
    given = parser.parse_args()
    if given.labels and not given.records:
        parser.error("--labels needs --records: the CSV's order is not the order of the rows")
    try:
        labels = read_labels(given.labels, given.records) if given.labels else None
        known = len(Path(given.records).read_text().split()) if given.records else COURSE_ROWS
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"--labels and --records do not fit: {error!r}")
    server = LeaderboardServer(labels, given.rows or known, given.final_day, given.port,
                               log=lambda line: print(line, flush=True))
    server.faults = given.faults
    print(f"Leaderboard of day 1: {server.host}leaderboard ({server.rows:,} exams, "
          f"{'scores the next day' if labels else 'no labels: scores stay TBC'})\n"
          f"Use it:    set LEADERBOARD_HOST={server.host} with LEADERBOARD_TEAM, LEADERBOARD_PASSWORD and "
          "LEADERBOARD_SUBMIT, then run the notebook\n"
          f"Next day:  curl -X POST {server.host}next-day\nStop:      Ctrl+C", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
