"""The leaderboard's protocol against a real HTTP server on this machine (tests/tools/leaderboard_server.py)."""
import base64
import json
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import leaderboard_server
import numpy as np
import pytest
import requests

import ecg_helpers as helpers

def of_af(af):
    """Two columns (no AF, AF) from the probabilities of AF."""
    return np.stack([1 - np.array(af), np.array(af)], axis=1)


TEAM, PASSWORD, NOTE = "group_1", "s3cret:pässwört", "group_1_sub_1"
LABELS = [1, 0, 0, 1, 0]
AF = np.array([0.9, 0.8, 0.3, 0.6, 0.1])  # one false alarm
PREDICTION = of_af(AF)
COLUMNS, SCORES = ["accuracy", "f1", "auc", "ap"], [0.8, 0.8, 0.833, 0.875]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server():
    """A leaderboard of five exams, on day 1, with our team registered."""
    with leaderboard_server.running(labels=LABELS) as server:
        server.teams[TEAM] = PASSWORD
        yield server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "submissions"


@pytest.fixture
def send(server, folder):
    """`submit` with everything right, but for what a test changes."""
    right = dict(team_id=TEAM, password=PASSWORD, prediction=PREDICTION, note=NOTE, host=server.host, directory=folder)
    return lambda **changes: helpers.submit(**{**right, **changes})


@pytest.fixture
def down():
    """The address of a server that is down."""
    with leaderboard_server.running() as server:
        return server.host


def saved(folder):
    """What `submit` wrote, oldest first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


# ---- The stand-in answers as the course's server does, also to what the client never sends ----
@pytest.mark.parametrize("team, password, status, registered", [
    ("x" * 21, "x", 400, TEAM), ("", "x", 201, ""), ("group_2", "", 201, "group_2"), (TEAM, "other", 400, TEAM),
    (TEAM + " ", "x", 201, TEAM + " "), ("group:2", "x", 201, "group")])
def test_table_register(server, team, password, status, registered):
    assert requests.put(server.host + "register", timeout=10).status_code == 500
    answer = requests.put(server.host + "register", auth=(team, password), timeout=10)
    assert answer.status_code == status and list(server.teams)[-1] == registered


@pytest.mark.parametrize("prediction, status", [
    (PREDICTION[:, ::-1].tolist(), 201), ([[0, 0.5, 0.5]] * 5, 400), ([[0.5, 0.5]] * 4, 400), (AF.tolist(), 500),
    ([[0.5, 0.5]] * 4 + [[float("nan"), 0.5]], 500), ([[0.5, 0.5]] * 4 + [[0.5]], 500)])
def test_table_leaderboard(server, prediction, status):
    content = json.dumps({"prediction": prediction, "note": NOTE})
    answer = requests.put(server.host + "leaderboard", data=content, auth=(TEAM, PASSWORD.encode()), timeout=10)
    assert answer.status_code == status and bool(server.submissions) == (status == 201)


# ---- What the client makes of each answer ----
def test_register_new_then_known(server):
    assert [helpers.register_team("new", "x", server.host).status_code for _ in range(2)] == [201, 200]
    with pytest.raises(helpers.LeaderboardError) as caught:
        helpers.register_team("new", "other", server.host)
    assert (caught.value.status, caught.value.reason) == (
        400, "Team: new is already registered with a different password")


@pytest.mark.parametrize("team, password, slash", [
    ("grüppe_ä", "pässwörd€", ""), ("\u30b0\u2603", "\U0001f642:\u5bc6", "/"), ("a b&c=d%41", " x ", "/")])
def test_odd_names_arrive_unchanged_and_blanks_around_a_team_do_not(server, send, team, password, slash):
    host = server.host.rstrip("/") + slash
    helpers.register_team(f" {team}\n", password, host)
    assert server.teams == {TEAM: PASSWORD, team: password}
    assert send(team_id=f"{team} ", password=password, host=host).status_code == 201


def test_five_days_count_and_the_fifth_can_be_replaced(send, server, folder):
    for server.day in range(1, 6):
        assert send().status_code == 201
    assert send().status_code == 200
    assert server.received[0]["content"] == {"prediction": PREDICTION.tolist(), "note": NOTE}
    assert [(row["status"], row["reason"]) for row in saved(folder)] == [
        *[(201, "Submission successful")] * 5, (200, "Submission successful")]
    server.day = 6
    with pytest.raises(helpers.LeaderboardError, match="Maximum number of predictions reached"):
        send()


@pytest.mark.parametrize("changes, fault, status, reason", [
    ({"password": "other"}, "", 401, "Unauthorized Access"), ({"team_id": "new"}, "", 401, "Unauthorized Access"),
    ({"prediction": PREDICTION[1:]}, "", 400, "Prediction array is not the same size as the true class array which "
     "have length: 5 and 2 classes."), ({}, "400 Submission closed", 400, "Submission closed"),
    ({}, "400 <b>o'x</b> & y", 400, "<b>o'x</b> & y"), ({}, "404 Not here", 404, "Not here"),
    ({}, "500 Internal error", 500, "Internal error"), ({}, "302 http://127.0.0.1:1/", 302, "http://127.0.0.1:1/"),
    ({}, "307 http://127.0.0.1:1/", 307, "http://127.0.0.1:1/"), ({}, "drop", None, ""), ({}, "cut", None, ""),
    ({"host": "http://127.0.0.1:99999/"}, "", None, ""), ({}, "204 ", 204, "No Content")])
def test_what_is_no_success_is_an_error_with_status_and_reason(send, server, folder, changes, fault, status, reason):
    server.faults = [fault]
    with pytest.raises(helpers.LeaderboardError) as caught:
        send(**changes)
    assert (caught.value.status, caught.value.reason) == (status, reason) and reason in str(caught.value)
    (row,) = saved(folder)
    assert (row["status"], row["reason"], row["prediction"]) == (
        status, reason, changes.get("prediction", PREDICTION).tolist())
    assert len(server.received) <= 1  # no redirect is followed


def test_a_server_that_is_down_or_hangs(send, server, folder, down, monkeypatch):
    for call in (lambda: helpers.register_team(TEAM, PASSWORD, down), lambda: send(host=down),
                 lambda: helpers.published_scores(TEAM, down, folder)):
        with pytest.raises(helpers.LeaderboardError, match="was not reached") as caught:
            call()
        assert caught.value.status is None
    asked, real = [], requests.request

    def request(*given, timeout, **options):
        asked.append(timeout)
        return real(*given, timeout=0.3, **options)
    monkeypatch.setattr(requests, "request", request)
    server.faults = ["hang"]
    with pytest.raises(helpers.LeaderboardError, match="Timeout"):
        send()
    assert 0 < max(asked[0]) <= 120 and [row["status"] for row in saved(folder)] == [None, None]


# ---- What the client refuses before anything is sent or saved ----
@pytest.mark.parametrize("changes", [
    {"prediction": np.empty((0, 2))}, {"prediction": AF}, {"prediction": [["a", "b"]] * 5},
    {"note": " " * 11 + "x" * 10}, {"note": "x" * 21}, {"note": ""}, {"note": None},
    {"note": "  "}, {"prediction": [[0.2, 0.3, 0.5]] * 5}, {"prediction": None}, {"prediction": [[0.5, 0.5], [1.0]]},
    {"prediction": of_af([0.9, 0.2, np.nan])}, {"prediction": [[0.6, 0.4], [-np.inf, np.inf]]},
    {"prediction": [[0.6, 0.4], [0.3, 0.4]]}, {"prediction": [[0.6, 0.4], [-0.5, 1.5]]}, {"n_exams": 6}, {"n_exams": 4},
    {"prediction": of_af([0.9, 0.8, 0.51])}, {"prediction": of_af([0.1, 0.2, 0.5])}, {"team_id": "x" * 21},
    {"team_id": " "}, {"team_id": None}, {"team_id": "group:1"}, {"password": ""}, {"password": None},
    {"host": "127.0.0.1:5050"}, {"host": "http://group_1:s3cret@127.0.0.1:5050/"},
    {"demo": True, "host": helpers.DEFAULT_HOST}, {"demo": True, "host": "http://localhost.example/"}], ids=str)
def test_refused_before_anything_is_sent(send, server, folder, monkeypatch, changes):
    monkeypatch.setattr(requests, "request", None)
    with pytest.raises(ValueError) as caught:
        send(**changes)
    assert not folder.exists() and "s3cret" not in str(caught.value)
    if not {"prediction", "n_exams", "note"} & set(changes):
        with pytest.raises(ValueError):
            helpers.register_team(**{"team_id": TEAM, "password": PASSWORD, "host": server.host, **changes})


@pytest.mark.parametrize("changes", [
    {"note": "x" * 20}, {"n_exams": 5}, {"prediction": PREDICTION.tolist()}, {"prediction": np.float32(PREDICTION)},
    {"prediction": helpers.submission_probabilities([900.0, 3, -2, 1, -900])}, {"demo": True}], ids=str)
def test_not_refused(send, server, changes):
    assert send(**changes).status_code == 201
    assert send(**changes, host=f"http://localhost:{server.server_port}").status_code == 200


def test_no_second_submission_within_a_day_unless_it_is_wanted(send, server, folder):
    server.faults = ["400 Submission closed"]
    with pytest.raises(helpers.LeaderboardError):
        send(replace=False)
    assert send(replace=False).status_code == 201  # the first was not accepted
    with pytest.raises(ValueError, match="not sent"):
        send(replace=False, note="other")
    assert len(saved(folder)) == 2 and send(note="other").status_code == 200
    a_day_ago = (datetime.now(timezone.utc) - timedelta(hours=25)).isoformat()
    for path, row in zip(sorted(folder.glob("*.json")), saved(folder)):
        helpers.write_json(path, {**row, "time": a_day_ago})
    server.next_day()
    assert send(replace=False).status_code == 201


# ---- What stays on disk ----
def test_saved_before_it_is_sent_and_kept_when_sending_is_interrupted(send, folder, monkeypatch):
    def interrupt(*given, **options):
        (row,) = saved(folder)
        assert row["prediction"] == PREDICTION.tolist() and row["status"] is None
        raise KeyboardInterrupt
    monkeypatch.setattr(requests, "request", interrupt)
    with pytest.raises(KeyboardInterrupt):
        send()
    assert [row["status"] for row in saved(folder)] == [None]


def test_killed_while_sending(server, folder):
    server.faults = ["hang"]
    given = TEAM, PASSWORD, PREDICTION.tolist(), NOTE, server.host
    code = f"import ecg_helpers; ecg_helpers.submit(*{given}, directory={str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(helpers.__file__).parent)
    while not server.received and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    (row,) = saved(folder)
    assert (row["team"], row["note"], row["prediction"]) == (TEAM, NOTE, PREDICTION.tolist())


def test_a_disk_that_is_full_after_the_answer(send, folder, monkeypatch, capsys):
    real = helpers.write_json

    def write(path, content):
        if content["status"]:
            raise OSError(28, "No space left on device")
        real(path, content)
    monkeypatch.setattr(helpers, "write_json", write)
    assert send().status_code == 201
    assert "look at the leaderboard" in capsys.readouterr().out and len(saved(folder)) == 1


def test_accepted_submissions_are_those_of_the_team_and_the_server(send, server, folder, down):
    server.faults = ["500", ""]
    for changes in ({}, {}, {"host": down}, {"note": "second"}):
        with suppress(helpers.LeaderboardError):
            send(**changes)
    found = helpers.accepted_submissions(f" {TEAM} ", server.host.rstrip("/"), folder)
    assert found["note"].tolist() == [NOTE, "second"] and found["status"].tolist() == [201, 200]
    assert helpers.accepted_submissions("group_2", server.host, folder).empty
    assert helpers.accepted_submissions(TEAM, down, folder).empty


# ---- Published scores ----
def test_scores_are_missing_until_the_next_day_and_then_kept_with_the_submission(send, server, folder):
    assert helpers.published_scores(TEAM, server.host, folder).empty
    send()
    assert helpers.published_scores(TEAM, server.host, folder)[COLUMNS].isna().all(axis=None)
    server.next_day()
    table = helpers.published_scores(f"{TEAM} ", server.host, folder)
    assert table["note"].tolist() == [NOTE] and table[COLUMNS].values.tolist() == [SCORES]
    (row,) = helpers.accepted_submissions(TEAM, server.host, folder).to_dict("records")
    assert row["scores"] == dict(zip(COLUMNS, SCORES)) and row["read"]


def test_a_note_that_was_accepted_twice_gets_no_score(send, server, folder):
    assert [send().status_code, send(prediction=of_af(AF * 0.7)).status_code] == [201, 200]  # a row on the page
    server.next_day()
    assert helpers.published_scores(TEAM, server.host, folder)["f1"].tolist() == [0.5]
    assert not any("scores" in row for row in saved(folder))


@pytest.mark.parametrize("note", ["o'brien", 'say "hi"', "&amp; &#39;", "back\\slash\\", "☃ 🙂", "x', note: 'y",
                                  "{ team: 'z' }", "'},{team: 'group_1'", "</script>", "TBC"])
def test_odd_notes_survive_and_other_teams_cannot_forge_our_rows(send, server, folder, note):
    server.teams["other"] = PASSWORD
    send(team_id="other", note=note, prediction=of_af([0.9, 0.1, 0.2, 0.8, 0.3]))
    send(note=note)
    server.next_day()
    table = helpers.published_scores(TEAM, server.host, folder)
    assert table["note"].tolist() == [note] and table[COLUMNS].values.tolist() == [SCORES]


# ---- The password ----
@pytest.mark.parametrize("fault", ["", "400 Submission closed", "500", "302 http://127.0.0.1:1/", "cut", "drop", "down",
                                   "refused", "unexpected", "interrupted", "no-folder"])
def test_the_password_is_in_no_file_output_or_traceback(server, folder, capfd, caplog, monkeypatch, down, fault):
    """Nor among the variables of all frames, which a verbose traceback shows."""
    def fail(*given, **options):
        raise KeyboardInterrupt if fault == "interrupted" else RuntimeError(given, options)
    caplog.set_level("DEBUG")
    server.faults = [fault] * 2 if fault[:1].isdigit() or fault in ("cut", "drop") else []
    host, note = down if fault == "down" else server.host, "" if fault == "refused" else NOTE
    if fault in ("unexpected", "interrupted"):
        monkeypatch.setattr(requests.Session, "send", fail)
    if fault == "no-folder":
        folder.write_text("in the way")
    shown = []
    for call in (lambda: helpers.register_team(TEAM, PASSWORD, host),
                 lambda: helpers.submit(TEAM, PASSWORD, PREDICTION, note, host, directory=folder)):
        try:
            shown.append(repr(call()))
        except BaseException as error:
            shown += [*traceback.TracebackException.from_exception(error, capture_locals=True).format(), repr(error)]
    shown += [*capfd.readouterr(), caplog.text, *(path.read_text() for path in folder.glob("*.json"))]
    coded = base64.b64encode(f"{TEAM}:{PASSWORD}".encode()).decode()
    assert not [text for text in shown for secret in ("s3cret", "wört", coded[16:28]) if secret in text]
