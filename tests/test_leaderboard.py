"""The leaderboard's protocol against a real HTTP server on this machine.

First the stand-in itself (with plain `requests`, what the client would refuse), then the client: what each
answer becomes, what is refused before anything is sent, and that no fault loses a submission.
"""
import base64
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import traceback
import types
from pathlib import Path

import leaderboard_server
import numpy as np
import pytest
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

import ecg_helpers as helpers

TEAM, PASSWORD, NOTE = "group_1", "s3cret:pässwört", "group_1_sub_1"
LABELS = [1, 0, 0, 1, 0]
AF = np.array([0.9, 0.8, 0.3, 0.6, 0.1])  # one false alarm: accuracy 0.8, F1 0.8, AUC 5/6, AP 0.875
PREDICTION = np.stack([1 - AF, AF], axis=1).tolist()
SCORES = [0.8, 0.8, 0.833, 0.875]
SCORE_COLUMNS = ["accuracy", "f1", "auc", "ap"]
WRONG_SIZE = ("<p>Prediction array is not the same size as the true class array which have length: 5 and 2 classes."
              "</p>")
NAN, INF = float("nan"), float("inf")


def columns(af):
    """Two columns (no AF, AF) from the probabilities of AF."""
    return np.stack([1 - np.asarray(af), np.asarray(af)], axis=1)


def put(server, path, team=TEAM, password=PASSWORD, **content):
    """A request by a client that checks nothing; `content` is the JSON, NaN and infinity included."""
    return requests.put(f"{server.host}{path}", data=json.dumps(content), timeout=10,
                        auth=(team.encode(), password.encode()), headers={"Content-Type": "application/json"})


def saved(folder):
    """What `submit` wrote, oldest first."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).rglob("*.json"))]


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    """Retry at once: the pause between attempts is urllib3's, not ours to test."""
    monkeypatch.setattr(Retry, "get_backoff_time", lambda self: 0)


@pytest.fixture
def server():
    """An empty leaderboard of five exams, day 1."""
    with leaderboard_server.running(labels=LABELS) as server:
        yield server


@pytest.fixture
def known(server):
    """The leaderboard with our team registered."""
    server.teams[TEAM] = PASSWORD
    return server


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "submissions"


@pytest.fixture
def send(known, folder):
    """`submit` with everything right, but for what a test changes."""
    def send(**changes):
        return helpers.submit(**{"team_id": TEAM, "password": PASSWORD, "prediction": PREDICTION, "note": NOTE,
                                 "host": known.host, "directory": folder, **changes})
    return send


@pytest.fixture
def sent(monkeypatch):
    """Every attempt of this process to send anything anywhere: `sent.before(options)` runs first."""
    attempts, real = types.SimpleNamespace(timeouts=[], before=lambda options: None), HTTPAdapter.send

    def spy(self, request, **options):
        attempts.timeouts.append(options["timeout"])
        attempts.before(options)
        return real(self, request, **options)
    monkeypatch.setattr(HTTPAdapter, "send", spy)
    return attempts


@pytest.fixture
def closed_host():
    """The address of a server that is down."""
    with leaderboard_server.running() as server:
        pass
    return server.host


# --- the stand-in answers as the course's server does, also to what the client never sends --------
@pytest.mark.parametrize("team, password, status, text", [
    ("x" * 21, "x", 400, "<p>Team id is too long</p>"), ("", "x", 201, ""), ("group_2", "", 201, "group_2"),
    ("group_1 ", "x", 201, "group_1 "), ("admin", "x", 400, "<p>Team id"),
], ids=["long-id", "empty-id", "empty-password", "blank-at-the-end", "admin"])
def test_table_register(known, team, password, status, text):
    answer = put(known, "register", team, password)
    assert answer.status_code == status and text in answer.text


def test_table_register_keeps_what_stands_before_the_colon(server):
    assert put(server, "register", "group:2", "x").status_code == 201
    assert server.teams == {"group": "2:x"}


def test_table_register_without_credentials(server):
    assert requests.put(server.host + "register", timeout=10).status_code == 500


@pytest.mark.parametrize("prediction, note, status, text", [
    ([row[::-1] for row in PREDICTION], NOTE, 201, "Submission successful"),
    (PREDICTION, "x" * 21, 400, "<p>Note is too long</p>"),
    ([[0, 0.5, 0.5]] * 5, NOTE, 400, WRONG_SIZE),
    (PREDICTION[:4] + [[NAN, 0.5]], NOTE, 500, ""),
    (PREDICTION[:4] + [[INF, 0.5]], NOTE, 500, ""),
    (PREDICTION[:4] + [[0.5]], NOTE, 500, ""),
    (AF.tolist(), NOTE, 500, ""),
], ids=["swapped", "long-note", "three-columns", "nan", "inf", "ragged", "one-dimensional"])
def test_table_leaderboard(known, prediction, note, status, text):
    answer = put(known, "leaderboard", prediction=prediction, note=note)
    assert answer.status_code == status and text in answer.text
    assert bool(known.submissions) == (status == 201)  # a failed upload uses up no day


def test_table_page_shows_tbc_until_the_next_day(known):
    put(known, "leaderboard", prediction=PREDICTION, note=NOTE)
    before = requests.get(known.host + "leaderboard", timeout=10).text
    requests.post(known.host + "next-day", timeout=10)
    after = requests.get(known.host + "leaderboard", timeout=10).text
    row = "{{ team: 'group_1', acc: '{}', f1: '{}', auc: '{}', ap: '{}', note: 'group_1_sub_1' }}"
    assert row.format(*["TBC"] * 4) in before
    assert row.format("0.800", "0.800", "0.833", "0.875") in after


def test_a_tie_is_no_af():
    assert leaderboard_server.scores([1, 0], [[0.5, 0.5], [0.9, 0.1]])["acc"] == 0.5


# --- what the client makes of each answer --------------------------------------------------------
def test_register_new_then_known(server):
    assert helpers.register_team(TEAM, PASSWORD, host=server.host).status_code == 201
    assert helpers.register_team(TEAM, PASSWORD, host=server.host).status_code == 200
    assert server.teams == {TEAM: PASSWORD}


@pytest.mark.parametrize("team, password", [("grüppe_ä", "pässwörd€"), ("グループ☃", "🙂:密码"), ("a b&c=d%41", " x ")])
def test_odd_team_ids_and_passwords_arrive_unchanged(server, folder, team, password):
    helpers.register_team(team, password, host=server.host)
    assert server.teams == {team: password}
    answer = helpers.submit(team, password, PREDICTION, NOTE, host=server.host, directory=folder)
    assert answer.status_code == 201


def test_register_with_another_password(known):
    with pytest.raises(helpers.LeaderboardError, match="Use the password of the first registration") as caught:
        helpers.register_team(TEAM, "other", host=known.host)
    assert caught.value.status == 400
    assert caught.value.reason == "Team: group_1 is already registered with a different password"


def test_reason_is_text_not_html(server):
    server.teams["<b>o'x</b> & y"] = PASSWORD
    with pytest.raises(helpers.LeaderboardError) as caught:
        helpers.register_team("<b>o'x</b> & y", "other", host=server.host)
    assert caught.value.reason == "Team: <b>o'x</b> & y is already registered with a different password"


def test_submit_and_replace(send, known):
    first, again = send(), send(note="group_1_sub_2")
    assert (first.status_code, again.status_code) == (201, 200)
    assert [request["content"] for request in known.received] == [
        {"prediction": PREDICTION, "note": NOTE}, {"prediction": PREDICTION, "note": "group_1_sub_2"}]
    assert known.submissions[TEAM][1][1] == "group_1_sub_2"


@pytest.mark.parametrize("slash", ["", "/"])
def test_host_with_and_without_a_slash(send, known, slash):
    host = known.host.rstrip("/") + slash
    assert helpers.register_team(TEAM, PASSWORD, host=host).status_code == 200
    assert send(host=host).status_code == 201
    assert len(helpers.published_scores(TEAM, host=host)) == 1


@pytest.mark.parametrize("changes", [{"password": "other"}, {"team_id": "group_2"}], ids=["password", "team"])
def test_wrong_credentials(send, changes):
    with pytest.raises(helpers.LeaderboardError, match="not registered") as caught:
        send(**changes)
    assert (caught.value.status, caught.value.reason) == (401, "Unauthorized Access")


@pytest.mark.parametrize("prediction", [PREDICTION[:4], PREDICTION + PREDICTION[:1]], ids=["fewer", "more"])
def test_the_server_has_the_last_word_on_the_rows(send, prediction):
    with pytest.raises(helpers.LeaderboardError, match="every test exam once") as caught:
        send(prediction=prediction)
    assert caught.value.status == 400
    assert caught.value.reason.endswith("which have length: 5 and 2 classes.")


def test_after_the_final_day(send, known):
    known.final_day, known.day = 1, 2
    with pytest.raises(helpers.LeaderboardError, match="final date has passed") as caught:
        send()
    assert (caught.value.status, caught.value.reason) == (400, "Submission closed")


def test_sixth_day_is_refused_and_the_fifth_can_still_be_replaced(send, known):
    for day in range(1, 6):
        known.day = day
        assert send().status_code == 201  # the client's own count never blocks: all five are sent on its one day
    assert send().status_code == 200
    known.day = 6
    with pytest.raises(helpers.LeaderboardError, match="All five submissions are used") as caught:
        send()
    assert (caught.value.status, caught.value.reason) == (400, "Maximum number of predictions reached")
    assert sorted(known.submissions[TEAM]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("fault, advice, not_said", [
    ("400 Team id is too long", "20 characters", "later"),
    ("400 Note is too long", "20 characters", "later"),
    ("400 Team id not allowed", "refused again", "later"),
    ("400 Team: group_401, group_404 or maybe group_500", "refused again", "wrong|LEADERBOARD_HOST|later"),
    ("403 Forbidden", "refused again", "later"),
    ("404 Not Found", "LEADERBOARD_HOST", "later"),
    ("405 Method Not Allowed", "refused again", "later"),
    ("408 Request Timeout", "later", "refused again"),
    ("429 Too Many Requests", "later", "refused again"),
    ("500 The server encountered an internal error", "later", "refused again"),
    ("503 Service Unavailable", "later", "refused again"),
], ids=lambda text: text[:22].replace(" ", "-"))
def test_every_answer_becomes_the_reason_and_true_advice(send, known, fault, advice, not_said):
    known.faults = [fault] * 10
    with pytest.raises(helpers.LeaderboardError) as caught:
        send()
    assert (caught.value.status, caught.value.reason) == (int(fault[:3]), fault[4:])
    before, _, after = str(caught.value).partition(fault[4:])
    assert before.endswith(f"answered {fault[:3]}: ") and after.startswith(". ")  # the reason is a sentence of its own
    assert advice in after and not re.search(not_said, after)
    assert fault.startswith("5") or len(known.received) == 1  # 4xx is never tried again


def test_a_team_that_the_server_does_not_allow(server):
    with pytest.raises(helpers.LeaderboardError, match="not allowed") as caught:
        helpers.register_team("admin", PASSWORD, host=server.host)
    assert caught.value.status == 400 and "later" not in str(caught.value)


def test_an_answer_without_words(send, known):
    known.faults = ["405"]
    with pytest.raises(helpers.LeaderboardError, match="405: M") as caught:
        send()
    assert caught.value.reason.lower() == "method not allowed"


@pytest.mark.parametrize("written", [f" {TEAM}", f"{TEAM} ", f"\t{TEAM}\n"])
def test_blanks_around_a_team_id_are_stripped(server, folder, written):
    """'group_1 ' would be a new team there."""
    assert helpers.register_team(written, PASSWORD, host=server.host).status_code == 201
    assert helpers.register_team(TEAM, PASSWORD, host=server.host).status_code == 200
    answer = helpers.submit(written, PASSWORD, PREDICTION, NOTE, host=server.host, directory=folder)
    assert answer.status_code == 201 and server.teams == {TEAM: PASSWORD} and list(server.submissions) == [TEAM]
    assert len(helpers.published_scores(written, host=server.host)) == 1
    sent = helpers.sent_submissions(folder)
    assert sent["team"].tolist() == [TEAM]
    assert len(helpers.accepted_days(sent, written, server.host)) == 1
    assert helpers.accepted_submission(PREDICTION, server.host, written, folder)["note"] == NOTE


# --- what the client refuses before anything is sent ---------------------------------------------
WRONG = [
    ("flat", {"prediction": AF}, "shape"),
    ("three-columns", {"prediction": [[0.2, 0.3, 0.5]] * 5}, "shape"),
    ("no-rows", {"prediction": np.empty((0, 2))}, "shape"),
    ("none", {"prediction": None}, "shape"),
    ("ragged", {"prediction": PREDICTION[:4] + [[1.0]]}, "differ in length"),
    ("text", {"prediction": [["a", "b"]] * 5}, "numbers"),
    ("whole-file", {"prediction": {"prediction": PREDICTION, "note": NOTE}}, "numbers|shape|dict"),
    ("nan", {"prediction": columns([0.9, 0.8, 0.3, 0.6, NAN])}, "sum to 1|finite"),
    ("infinite", {"prediction": PREDICTION[:4] + [[-INF, INF]]}, "sum to 1|finite"),
    ("sum", {"prediction": PREDICTION[:4] + [[0.3, 0.4]]}, "sum to 1"),
    ("negative", {"prediction": PREDICTION[:4] + [[1.5, -0.5]]}, "probabilities"),
    ("swapped", {"prediction": columns(1 - AF), "af_probability": AF}, "swapped"),
    ("other-experiment", {"af_probability": AF[::-1]}, "recorded"),
    ("record-of-other-length", {"af_probability": AF[:4]}, "recorded|exams|rows"),
    ("fewer-rows", {"n_exams": 6}, "5 rows.*6 exams"),
    ("more-rows", {"n_exams": 4}, "5 rows.*4 exams"),
    ("demo", {"demo": True, "host": "http://leaderboard.example:5050/"}, "demo data"),
    ("demo-lookalike", {"demo": True, "host": "http://localhost.example/"}, "demo data"),
    ("demo-user-part", {"demo": True, "host": "http://127.0.0.1@leaderboard.example/"}, "name or password"),
    ("long-note", {"note": "x" * 21}, "20 characters"),
    ("empty-note", {"note": ""}, "note"),
    ("no-note", {"note": None}, "note"),
    ("blank-note", {"note": "  "}, "note"),
    ("long-team", {"team_id": "x" * 21}, "20 characters"),
    ("empty-team", {"team_id": ""}, "team id"),
    ("blank-team", {"team_id": "  "}, "team id"),
    ("colon", {"team_id": "group:1"}, "team id.*':'"),
    ("empty-password", {"password": ""}, "password"),
    ("no-scheme", {"host": "127.0.0.1:5050"}, "http://"),
    ("no-host", {"host": None}, "http://"),
]
ONE_SIDED = [("all-af", {"prediction": columns([0.9, 0.8, 0.7, 0.6, 0.51])}, "sigmoid applied twice"),
             ("no-af", {"prediction": columns([0.1, 0.2, 0.3, 0.4, 0.5])}, "one side of 0.5")]


def cases(table):
    return pytest.mark.parametrize("changes, words", [pytest.param(*row[1:], id=row[0]) for row in table])


@cases(WRONG + ONE_SIDED)
def test_refused_before_sending(send, known, sent, folder, changes, words):
    with pytest.raises(ValueError, match=words):
        send(**changes)
    assert sent.timeouts == [] and known.received == [] and saved(folder) == []


@cases([row for row in WRONG if row[0] in ("nan", "demo", "long-note")])
def test_the_override_is_for_one_sided_predictions_only(send, sent, changes, words):
    with pytest.raises(ValueError, match=words):
        send(allow_one_sided=True, **changes)
    assert sent.timeouts == []


@cases(ONE_SIDED)
def test_one_sided_predictions_go_with_the_override(send, changes, words):
    assert send(allow_one_sided=True, **changes).status_code == 201


@pytest.mark.parametrize("team, password, words", [
    ("", PASSWORD, "team id"), ("  ", PASSWORD, "team id"), ("x" * 21, PASSWORD, "20 characters"),
    ("group:1", PASSWORD, "':'"), (TEAM, "", "password"), (TEAM, None, "password"),
], ids=["empty-team", "blank-team", "long-team", "colon", "empty-password", "no-password"])
def test_register_refused_before_sending(server, sent, team, password, words):
    with pytest.raises(ValueError, match=words):
        helpers.register_team(team, password, host=server.host)
    assert sent.timeouts == [] and server.received == []


@pytest.mark.parametrize("changes", [
    {"note": "x" * 20}, {"n_exams": 5}, {"af_probability": AF}, {"prediction": np.float32(PREDICTION)},
    {"prediction": helpers.submission_probabilities(np.array([900.0, 3, -2, 1, -900]))}, {"demo": True},
], ids=["note-of-20", "rows-stated", "record-agrees", "float32", "saturated", "demo-at-home"])
def test_not_refused(send, changes):
    assert send(**changes).status_code == 201


@pytest.mark.parametrize("host", ["http://leaderboard.example:5050/", helpers.DEFAULT_HOST])
def test_no_team_is_registered_for_demo_data(server, sent, host):
    with pytest.raises(ValueError, match="demo data"):
        helpers.register_team(TEAM, PASSWORD, host=host, demo=True)
    assert sent.timeouts == []
    assert helpers.register_team(TEAM, PASSWORD, host=server.host, demo=True).status_code == 201  # a rehearsal


@pytest.mark.parametrize("host", ["http://group_1:s3cret@127.0.0.1:5050/", "group_1:s3cret@leaderboard.example",
                                  "http://s3cret@[::1/", "ftp://group_1:s3cret@x/", "http:/group_1:s3cret@x/"])
def test_a_host_with_credentials_is_refused_and_not_shown(send, sent, folder, capfd, host):
    for call in (lambda: helpers.register_team(TEAM, PASSWORD, host=host), lambda: send(host=host),
                 lambda: helpers.published_scores(TEAM, host=host), lambda: helpers.check_identity(TEAM, None, host)):
        with pytest.raises(ValueError, match="name or password") as caught:
            call()
        assert "s3cret" not in "".join([*traceback.format_exception(caught.value), *capfd.readouterr()])
    assert sent.timeouts == [] and saved(folder) == []


def test_demo_predictions_reach_localhost_by_name(send, known):
    assert send(demo=True, host=f"http://localhost:{known.server_port}").status_code == 201


# --- faults: nothing is lost, and the message says what happened ---------------------------------
@pytest.mark.parametrize("fault", ["drop", "500", "503", "520"])
def test_connection_errors_and_5xx_are_tried_again(send, known, fault):
    known.faults = [fault]
    assert send().status_code == 201
    assert len(known.received) == 2


@pytest.mark.parametrize("fault, status", [("500", 500), ("503", 503), ("drop", None)])
def test_the_retry_is_bounded(send, known, folder, fault, status):
    known.faults = [fault] * 100
    with pytest.raises(helpers.LeaderboardError) as caught:
        send()
    assert caught.value.status == status
    assert 2 <= len(known.received) <= 5
    assert [row["answer"]["status"] for row in saved(folder)] == [status]


@pytest.mark.parametrize("status", [301, 302, 307])
def test_redirects_are_errors_and_not_followed(send, known, folder, status):
    with leaderboard_server.running(labels=LABELS) as other:
        known.faults = [f"{status} {other.host}leaderboard"]
        with pytest.raises(helpers.LeaderboardError, match=re.escape(other.host)) as caught:
            send()
        assert caught.value.status == status
        assert [request["method"] for request in known.received] == ["PUT"] and other.received == []
        assert saved(folder)[0]["answer"]["status"] == status


def test_the_address_in_the_redirect_message_is_one_that_works(send, known):
    with leaderboard_server.running(labels=LABELS) as other:
        other.teams[TEAM] = PASSWORD
        known.faults = [f"302 {other.host}leaderboard"]
        with pytest.raises(helpers.LeaderboardError) as caught:
            send()
        address = re.findall(rf"\S*:{other.server_port}[^\s'\"]*", str(caught.value))[-1].rstrip(".,:;)")
        assert send(host=address).status_code == 201


def test_redirects_of_register_and_page_are_errors(known):
    known.faults = [f"302 {known.host}leaderboard"] * 2
    with pytest.raises(helpers.LeaderboardError):
        helpers.register_team(TEAM, PASSWORD, host=known.host)
    with pytest.raises(helpers.LeaderboardError):
        helpers.published_scores(TEAM, host=known.host)


def test_server_down(send, folder, closed_host):
    with pytest.raises(helpers.LeaderboardError, match="not reached.*send again") as caught:
        send(host=closed_host)
    assert caught.value.status is None
    assert [(row["prediction"], row["answer"]["status"]) for row in saved(folder)] == [(PREDICTION, None)]
    for call in (lambda: helpers.register_team(TEAM, PASSWORD, host=closed_host),
                 lambda: helpers.published_scores(TEAM, host=closed_host)):
        with pytest.raises(helpers.LeaderboardError) as caught:
            call()
        assert caught.value.status is None


def test_an_address_that_is_none(send, folder):
    for host in ("http://127.0.0.1:99999/", "http://[bad/", "http:///"):
        with pytest.raises((ValueError, helpers.LeaderboardError), match="LEADERBOARD_HOST|URL"):
            send(host=host)


def test_an_unexpected_error_while_sending_is_reported_as_any_other(send, sent, folder):
    def fail(options):
        raise RuntimeError("can't start new thread")
    sent.before = fail
    with pytest.raises(helpers.LeaderboardError, match="RuntimeError.*send again") as caught:
        send()
    assert caught.value.status is None and [row["answer"]["status"] for row in saved(folder)] == [None]


def test_every_call_has_a_finite_timeout(send, sent, known):
    helpers.register_team(TEAM, PASSWORD, host=known.host)
    send()
    helpers.published_scores(TEAM, host=known.host)
    assert len(sent.timeouts) == 3
    assert all(given is not None and 0 < seconds <= 120 for given in sent.timeouts for seconds in np.ravel(given))


@pytest.mark.parametrize("hangs", [1, 100])
def test_a_server_that_does_not_answer(send, sent, known, folder, hangs):
    sent.before = lambda options: options.update(timeout=0.2)  # the module's own time-outs are constants
    known.faults = ["hang"] * hangs
    if hangs == 1:
        assert send().status_code == 201
    else:
        with pytest.raises(helpers.LeaderboardError, match="not reached|time") as caught:
            send()
        assert caught.value.status is None and len(known.received) <= 5
    assert [row["prediction"] for row in saved(folder)] == [PREDICTION]


def test_an_answer_cut_in_the_middle(send, known, folder):
    known.faults = ["cut"] * 10
    with pytest.raises(helpers.LeaderboardError, match="broke off.*leaderboard page") as caught:
        send()
    assert caught.value.status is None
    assert [row["answer"]["status"] for row in saved(folder)] == [None]
    known.faults = []
    assert send().status_code == 200  # the first one had arrived: the same day is replaced, no day is lost
    assert list(known.submissions[TEAM]) == [1]


def test_a_page_cut_in_the_middle_is_no_table(send, known):
    send()
    known.faults = ["cut"] * 10
    with pytest.raises(helpers.LeaderboardError):
        helpers.published_scores(TEAM, host=known.host)


def test_proxy_and_netrc_of_the_environment_do_not_interfere(send, known, monkeypatch, tmp_path, closed_host):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login somebody password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("http_proxy", closed_host)
    assert send().status_code == 201
    assert known.received[0]["team"] == TEAM


# --- what stays on disk --------------------------------------------------------------------------
def test_saved_before_it_is_sent_and_answered_after(send, sent, folder):
    at_sending = []
    sent.before = lambda options: at_sending.extend(saved(folder))
    send(experiment="final", metrics={"f1": 0.91}, prediction=np.array(PREDICTION))
    (before,), (after,) = at_sending, saved(folder)
    assert before["prediction"] == PREDICTION and before["answer"]["status"] is None
    assert (after["team"], after["experiment"], after["note"], after["metrics"]) == (TEAM, "final", NOTE, {"f1": 0.91})
    assert after["answer"] == {"status": 201, "reason": "Submission successful"}
    assert after["digest"] and after["time"] and {**before, "answer": after["answer"]} == after


def test_saved_when_killed_while_sending(send, sent, folder):
    def kill(options):
        raise KeyboardInterrupt
    sent.before = kill
    with pytest.raises(KeyboardInterrupt):
        send()
    record, = saved(folder)
    assert record["prediction"] == PREDICTION and record["answer"]["status"] is None
    assert "not sent" not in record["answer"]["reason"]  # nobody knows: it may have arrived


def test_nothing_is_sent_that_cannot_be_saved(send, known, tmp_path):
    (tmp_path / "submissions").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        send()
    assert known.received == []


@pytest.mark.parametrize("fault, status", [("", 201), ("400 Submission closed", 400), ("drop", None)])
def test_a_full_disk_after_the_answer(send, known, folder, monkeypatch, capsys, fault, status):
    """The answer stands, and a line says that it could not be saved."""
    known.faults = [fault] * 5 if fault else []
    calls, real = [], helpers.write_json

    def write_json(path, content):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        real(path, content)
    monkeypatch.setattr(helpers, "write_json", write_json)
    if status == 201:
        assert send().status_code == 201
    else:
        with pytest.raises(helpers.LeaderboardError) as caught:
            send()
        assert caught.value.status == status
    line, = capsys.readouterr().out.splitlines()
    assert str(calls[0]) in line and "No space left" in line and f"({status or 'none'})" in line
    assert "leaderboard page" in line
    assert [row["prediction"] for row in saved(folder)] == [PREDICTION]


def test_metrics_that_are_nan_are_saved_as_null(send, folder):
    send(metrics={"f1": NAN, "auroc": np.float32(0.5), "folds": [INF, -INF, (1, np.float64(NAN))], "n": np.int64(5)})
    text = next(folder.glob("*.json")).read_text(encoding="utf-8")
    assert saved(folder)[0]["metrics"] == {"f1": None, "auroc": 0.5, "folds": [None, None, [1, None]], "n": 5}
    assert "NaN" not in text and "Infinity" not in text


def test_foreign_and_empty_files_are_named_and_skipped(send, folder, capsys):
    folder.mkdir()
    foreign = {"empty.json": b"", "text.json": b"no JSON", "binary.json": bytes(range(256)), "list.json": b"[1, 2]",
               "half.json": b'{"time": "2026-01-01T10:00:00", "pred', "answer.json": b'{"time": "x", "answer": "201"}',
               "prediction_20260101.json": json.dumps({"prediction": PREDICTION, "note": NOTE}).encode()}
    for name, content in foreign.items():
        (folder / name).write_bytes(content)
    (folder / "a folder.json").mkdir()
    assert helpers.sent_submissions(folder).empty
    send()
    capsys.readouterr()
    assert helpers.sent_submissions(folder)["status"].tolist() == [201]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(foreign) + 1 and all("skipped" in line for line in lines)
    assert all(any(name in line for line in lines) for name in [*foreign, "a folder.json"])
    assert helpers.accepted_submission(PREDICTION, "http://elsewhere/", TEAM, folder) is None


def test_sent_submissions_lists_every_attempt(send, known, folder):
    assert helpers.sent_submissions(folder).empty
    send(experiment="one")
    known.faults = ["400 Submission closed"]
    with pytest.raises(helpers.LeaderboardError):
        send(experiment="../two/ü", note="group_1_sub_2", prediction=columns(AF[::-1]))
    table = helpers.sent_submissions(folder)
    assert table["experiment"].tolist() == ["one", "../two/ü"] and table["note"].tolist() == [NOTE, "group_1_sub_2"]
    assert table["status"].tolist() == [201, 400]
    assert table["reason"].tolist() == ["Submission successful", "Submission closed"]
    assert table["digest"].nunique() == 2 and (table["team"] == TEAM).all() and (table["host"] == known.host).all()
    assert (table["day"] == table["time"].str[:10]).all()
    assert sorted(path.parent for path in folder.rglob("*")) == [folder] * 2  # no other file, none elsewhere


def test_the_digest_depends_on_the_prediction_alone(send, folder):
    send()
    send(note="other", experiment="other")
    send(prediction=columns(AF * 0.99))
    first, second, third = helpers.sent_submissions(folder)["digest"]
    assert first == second != third


def test_the_same_prediction_is_found_once_it_was_accepted(send, known, folder):
    def found(prediction=PREDICTION, host=known.host, team=TEAM):
        return helpers.accepted_submission(prediction, host, team, folder)
    assert found() is None  # no such folder yet
    known.faults = ["400 Submission closed", *["drop"] * 3]
    for _ in range(2):
        with pytest.raises(helpers.LeaderboardError):
            send()
    assert found() is None  # refused, and not reached: neither was accepted
    send(prediction=columns(AF * 0.99), note="another one")
    assert found() is None
    send(experiment="final")
    record = found()
    assert (record["note"], record["experiment"], record["status"]) == (NOTE, "final", 200) and record["time"]
    for same in (np.array(PREDICTION), np.asfortranarray(PREDICTION), json.loads(json.dumps(PREDICTION))):
        assert found(same)["digest"] == record["digest"]
    assert found(host=known.host.rstrip("/")) and found(team=f"{TEAM} ")
    assert found(np.array(PREDICTION) + [[1e-15, 0]] * 5) is None
    assert found(team="group_2") is None and found(host="http://elsewhere:5050/") is None
    assert len(known.received) == 6  # nothing of this asks the server


def test_a_replaced_prediction_may_be_sent_again(send, known, folder):
    """A, then B on the same day: only B gets a score, so A counts as not accepted; on the next day both stand."""
    def found(prediction):
        return helpers.accepted_submission(prediction, known.host, TEAM, folder)
    other = columns(AF * 0.99)
    assert send().status_code == 201 and send(prediction=other).status_code == 200
    assert found(PREDICTION) is None and found(other)["status"] == 200
    requests.post(known.host + "next-day", timeout=10)
    assert send().status_code == 201
    assert found(PREDICTION) and found(other), "nothing of the day before is replaced"


def test_days_are_counted_by_what_was_accepted(folder, send, known):
    """A retried request gets 200 although it was the day's first: distinct days count, with 200 or 201."""
    sent = helpers.sent_submissions(folder)
    assert helpers.accepted_days(sent, TEAM, known.host) == []
    send()
    record = saved(folder)[0]
    for number, (day, status, changes) in enumerate([
            ("2026-03-01", 201, {}), ("2026-03-01", 200, {}), ("2026-03-02", 200, {}), ("2026-03-03", 400, {}),
            ("2026-03-04", None, {}), ("2026-03-05", 500, {}), ("2026-03-06", 201, {"team": "group_2"}),
            ("2026-03-07", 201, {"host": "http://elsewhere/"}), ("2026-03-08", 201, {"host": known.host.rstrip("/")})]):
        content = {**record, "time": f"{day}T23:59:59+00:00", "answer": {"status": status, "reason": ""}, **changes}
        helpers.write_json(folder / f"{number}.json", content)
    days = helpers.accepted_days(helpers.sent_submissions(folder), TEAM, known.host)
    assert days == ["2026-03-01", "2026-03-02", "2026-03-08", record["time"][:10]]


@pytest.mark.parametrize("faults, changes", [
    ([], {}), (["400 Submission closed"], {}), (["401 Unauthorized Access"], {}), (["500"] * 9, {}),
    (["302 http://127.0.0.1:1/"], {}), (["cut"] * 9, {}), (["drop"] * 9, {}), ([], {"note": ""}),
    ([], {"host": "http://127.0.0.1:1"}), ([], {"host": "127.0.0.1:1"}),
], ids=["success", "400", "401", "500", "redirect", "cut", "drop", "note", "down", "no-scheme"])
def test_the_password_is_in_no_file_output_or_error(known, send, tmp_path, capfd, caplog, faults, changes):
    caplog.set_level("DEBUG")
    texts = []
    for call in (send, lambda host=known.host, **_: helpers.register_team(TEAM, PASSWORD, host=host)):
        known.faults = list(faults)
        try:
            texts.append(repr(call(**changes)))
        except (ValueError, helpers.LeaderboardError) as error:
            texts += traceback.format_exception(error) + [repr(vars(error)), repr(error.__cause__)]
    texts += [*capfd.readouterr(), caplog.text, helpers.sent_submissions(tmp_path / "submissions").to_string()]
    texts += [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    coded = base64.b64encode(f"{TEAM}:{PASSWORD}".encode()).decode()
    hashed = hashlib.sha256(PASSWORD.encode()).hexdigest()[:16]
    assert len(texts) > 4
    assert not [text for text in texts for secret in ("s3cret", coded[:20], hashed) if secret in text]


# --- the published scores ------------------------------------------------------------------------
def test_scores_are_missing_until_the_next_day(send, known):
    assert helpers.published_scores(TEAM, host=known.host).empty
    send()
    table = helpers.published_scores(TEAM, host=known.host)
    assert table["note"].tolist() == [NOTE] and table[SCORE_COLUMNS].isna().all(axis=None)
    known.day += 1
    table = helpers.published_scores(TEAM, host=known.host)
    assert table[SCORE_COLUMNS].values.tolist() == [SCORES]
    assert helpers.published_scores("group", host=known.host).empty


def test_three_submissions_on_three_days_give_three_scored_rows(send, known, folder):
    for k, share in enumerate((1.0, 0.7, 0.6), 1):  # 0.8 falls below 0.5 at last, 0.6 sooner
        assert send(prediction=columns(AF * share), note=f"group_1_sub_{k}", experiment=f"run {k}").status_code == 201
        known.day += 1
    table = helpers.published_scores(TEAM, host=known.host).set_index("note").sort_index()
    assert table.index.tolist() == ["group_1_sub_1", "group_1_sub_2", "group_1_sub_3"]
    assert table["accuracy"].tolist() == [0.8, 0.6, 0.8] and table["f1"].tolist() == [0.8, 0.5, 0.667]
    assert table["auc"].tolist() == [0.833] * 3 and table["ap"].tolist() == [0.875] * 3
    assert helpers.sent_submissions(folder)["status"].tolist() == [201] * 3


def test_a_repeated_note_shows_the_newest_score_last(send, known):
    for share, f1 in ((1.0, 0.8), (0.7, 0.5), (0.6, 0.667)):
        send(prediction=columns(AF * share))
        known.day += 1
        table = helpers.published_scores(TEAM, host=known.host)
        assert set(table["note"]) == {NOTE} and table["f1"].iloc[-1] == f1
    assert table["f1"].tolist() == [0.8, 0.5, 0.667]
    assert table.drop_duplicates("note", keep="last")["f1"].tolist() == [0.667]


@pytest.mark.parametrize("note", [
    "o'brien", 'say "hi"', "&amp; &#39;", "back\\slash\\", "grüppe ☃ 🙂", "x', note: 'y", "{ team: 'z' }", "a\tb",
    "</script>", "$^.*[a-z]+\\d", "TBC", "nan"])
def test_odd_characters_in_names_and_notes_survive(server, folder, note):
    team = note.replace(":", ";")
    helpers.register_team(team, PASSWORD, host=server.host)
    helpers.submit(team, PASSWORD, PREDICTION, note, host=server.host, directory=folder)
    server.day += 1
    table = helpers.published_scores(team, host=server.host)
    assert table["note"].tolist() == [note]
    assert table[SCORE_COLUMNS].values.tolist() == [SCORES]


@pytest.mark.parametrize("note", ["'},{team: 'group_1'", "}, { team: 'group_1", "\\"])
def test_another_team_cannot_forge_or_hide_our_rows(send, known, folder, note):
    known.teams["other"] = PASSWORD
    send(team_id="other", note=note, prediction=columns([0.9, 0.1, 0.2, 0.8, 0.3]))  # ranked before ours
    send()
    known.day += 1
    table = helpers.published_scores(TEAM, host=known.host)
    assert table["note"].tolist() == [NOTE] and table[SCORE_COLUMNS].values.tolist() == [SCORES]


# --- the password's way: environment, Colab secret, prompt ---------------------------------------
@pytest.fixture
def asked(monkeypatch):
    """In a notebook, with fakes of Colab's secrets and of the prompt; lists who was asked, in order."""
    asked = types.SimpleNamespace(log=[], secret="from-colab", prompt="from-prompt")

    def answer(name, value):
        asked.log.append(name)
        if isinstance(value, Exception):
            raise value
        return value
    colab = types.ModuleType("google.colab")
    colab.userdata = types.SimpleNamespace(get=lambda name: answer(f"colab {name}", asked.secret))
    monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr("getpass.getpass", lambda prompt="": answer(f"prompt {prompt}", asked.prompt))
    monkeypatch.delenv("LEADERBOARD_PASSWORD", raising=False)
    return asked


def test_password_environment_first(asked, monkeypatch):
    monkeypatch.setenv("LEADERBOARD_PASSWORD", "from-environment")
    password = helpers.leaderboard_password()
    assert password == "from-environment" and asked.log == [] and repr(password) == repr(helpers.Secret("x")) == "'***'"


def test_password_colab_secret_second(asked, monkeypatch):
    monkeypatch.setenv("LEADERBOARD_PASSWORD", "")
    password = helpers.leaderboard_password()
    assert password == "from-colab" and asked.log == ["colab LEADERBOARD_PASSWORD"] and repr(password) == "'***'"


@pytest.mark.parametrize("secret", [RuntimeError("missing"), KeyError("x"), "", None])
def test_password_prompt_last_with_a_warning(asked, capsys, secret):
    asked.secret = secret
    password = helpers.leaderboard_password()
    assert password == "from-prompt" and repr(password) == "'***'"
    assert len(asked.log) == 2 and "plain http" in asked.log[1]
    assert "from-prompt" not in "".join(capsys.readouterr())


def test_password_prompt_outside_colab(asked, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.colab", None)  # an ImportError, as where Colab is absent
    assert helpers.leaderboard_password() == "from-prompt" and len(asked.log) == 1


@pytest.mark.parametrize("problem", [EOFError, OSError, NotImplementedError])  # Jupyter's own is the last
def test_password_missing_and_nobody_to_ask(asked, problem):
    asked.secret = RuntimeError("missing")
    asked.prompt = problem("no input")
    with pytest.raises(ValueError, match="LEADERBOARD_PASSWORD in the environment or as a Colab secret"):
        helpers.leaderboard_password()


def test_password_no_prompt_in_a_headless_notebook(monkeypatch, tmp_path):
    """The function alone, in a real kernel run as `jupyter nbconvert --execute` runs one."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.delenv("LEADERBOARD_PASSWORD", raising=False)
    parts = ["import os", *map(inspect.getsource, (helpers.Secret, helpers.leaderboard_password)), "leaderboard_password()"]
    source = "\n".join(parts)
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client = nbclient.NotebookClient(book, timeout=25, resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ValueError"):
        client.execute()
    outputs = book.cells[0].outputs
    assert [output.output_type for output in outputs] == ["error"]  # no prompt, no warning
    assert "LEADERBOARD_PASSWORD in the environment" in outputs[0].evalue


VERBOSE_CELLS = """
import http.client, os
import ecg_helpers as ecg
ecg.Retry.get_backoff_time = lambda self: 0
def plain(): return os.environ["LEADERBOARD_PASSWORD"]
def with_credentials(): return f"http://group_1:{plain()}@127.0.0.1:5050/"
def interrupt(*given, **options): raise KeyboardInterrupt
def fail(*given, **options): raise RuntimeError("unexpected")
password, af = ecg.leaderboard_password(), [[0.1, 0.9], [0.8, 0.2]]
# %%
ecg.register_team("group_1", password, host=DOWN)
# %%
ecg.submit("group_1", password, af, "note", host=DOWN)
# %%
ecg.register_team("group_1", plain(), host=DOWN)
# %%
ecg.submit("group_1", plain(), af, "note", host=DOWN)
# %%
ecg.register_team("group_1", plain(), host=KNOWN)
# %%
ecg.submit("group_1", plain(), af, "note", host=KNOWN)
# %%
ecg.submit("group_1", plain(), af, "note", host=KNOWN + "nothing-here/")
# %%
ecg.submit("group_1", plain(), af, "a note of far too many characters", host=KNOWN)
# %%
ecg.submit("group_1", plain(), af[:1], "note", host=KNOWN)
# %%
ecg.submit("group_1", plain(), af, "note", host=KNOWN, directory="a file")
# %%
ecg.register_team("group_1", plain(), host=with_credentials())
# %%
ecg.submit("group_1", plain(), af, "note", host=with_credentials())
# %%
ecg.published_scores("group_1", host=with_credentials())
# %%
http.client.HTTPConnection.endheaders = interrupt  # the header with the password stands in the frames around
ecg.register_team("group_1", plain(), host=KNOWN)
# %%
ecg.submit("group_1", plain(), af, "note", host=KNOWN)
# %%
http.client.HTTPConnection.endheaders = fail
ecg.register_team("group_1", plain(), host=KNOWN)
# %%
ecg.submit("group_1", plain(), af, "note", host=KNOWN)
# %%
password
"""
VERBOSE_SCRIPT = """
import sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_line_magic("colors", "NoColor")
shell.run_line_magic("xmode", "Verbose")
shell.user_ns.update(KNOWN=sys.argv[1], DOWN=sys.argv[2])
for cell in sys.stdin.read().split("# %%"):
    result = shell.run_cell(cell)
    print("ended with", type(result.error_before_exec or result.error_in_exec).__name__, flush=True)
"""


def test_no_password_in_a_verbose_traceback(known, tmp_path, closed_host):
    """Every way to fail in IPython with `%xmode Verbose`, which shows the variables of all frames."""
    pytest.importorskip("IPython")
    known.teams[TEAM] = "another one"
    (tmp_path / "a file").write_text("in the way of a folder")
    paths = os.pathsep.join([str(Path(helpers.__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "HOME": str(tmp_path), "IPYTHONDIR": str(tmp_path),
                   "LEADERBOARD_PASSWORD": PASSWORD, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", VERBOSE_SCRIPT, known.host, closed_host], input=VERBOSE_CELLS, text=True,
                          capture_output=True, env=environment, cwd=tmp_path, timeout=120, encoding="utf-8")
    shown = done.stdout + done.stderr
    refused = ["LeaderboardError"] * 7 + ["ValueError"] * 2 + ["FileExistsError"] + ["ValueError"] * 3
    interrupted = ["KeyboardInterrupt"] * 2 + ["LeaderboardError"] * 2
    ends = re.findall("^ended with (.*)$", shown, flags=re.M)
    assert ends == ["NoneType", *refused, *interrupted, "NoneType"], shown[-4000:]
    assert "team_id = 'group_1'" in shown and "'***'" in shown  # variables were shown, the password as stars
    coded = base64.b64encode(f"{TEAM}:{PASSWORD}".encode()).decode()
    for secret in ("s3cret", "wört", repr(PASSWORD.encode()), coded, coded[16:28]):
        assert secret not in shown
    for path in tmp_path.rglob("*.json"):
        assert "s3cret" not in path.read_text(encoding="utf-8")


# --- the rehearsal at home -----------------------------------------------------------------------
def test_rehearsal_from_the_command_line(tmp_path, folder):
    """The documented command: its address takes demo predictions in record order and scores them a day later."""
    labels, records = tmp_path / "test_labels.csv", tmp_path / "RECORDS.txt"
    labels.write_text("id_exam,id_patient,AF\n501,1,1\n502,2,0\n503,3,0\n504,4,1\n999,5,1\n")
    records.write_text("TNMG503\nTNMG501\nTNMG504\nTNMG502\n")
    process = subprocess.Popen([sys.executable, leaderboard_server.__file__, "--port", "0", "--labels", str(labels),
                                "--records", str(records)], stdout=subprocess.PIPE, text=True)
    try:
        shown = process.stdout.readline() + process.stdout.readline()
        host = re.search(r"LEADERBOARD_HOST=(\S+)", shown)[1]
        helpers.register_team(TEAM, PASSWORD, host=host)
        helpers.submit(TEAM, PASSWORD, columns([0.1, 0.9, 0.8, 0.2]), NOTE, host=host, demo=True, directory=folder)
        requests.post(host + "next-day", timeout=10)
        assert helpers.published_scores(TEAM, host=host)[SCORE_COLUMNS].values.tolist() == [[1.0] * 4]
    finally:
        process.terminate()
        output = process.communicate(timeout=10)[0]
    assert "PUT /leaderboard" in output and "s3cret" not in output


def test_rehearsal_without_labels_takes_the_course_size_and_scores_nothing(folder):
    with leaderboard_server.running() as server:
        helpers.register_team(TEAM, PASSWORD, host=server.host)
        af = np.linspace(0, 1, 6000)
        assert helpers.submit(TEAM, PASSWORD, columns(af), NOTE, host=server.host, directory=folder).status_code == 201
        server.day += 1
        assert helpers.published_scores(TEAM, host=server.host)[SCORE_COLUMNS].isna().all(axis=None)
        with pytest.raises(helpers.LeaderboardError, match="length: 6000 and 2 classes"):
            helpers.submit(TEAM, PASSWORD, columns(af[1:]), NOTE, host=server.host, directory=folder)
