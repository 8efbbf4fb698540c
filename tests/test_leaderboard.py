"""The leaderboard's protocol (FACTS.md 3) against a real HTTP server on this machine.

First the stand-in itself (every row of the table, with plain `requests`), then the client: what each
answer becomes, what is refused before anything is sent, and that no fault loses a submission.
"""
import base64
import hashlib
import inspect
import json
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


# --- the stand-in answers every row of the table -------------------------------------------------
@pytest.mark.parametrize("team, password, status, text", [
    ("group_2", "x", 201, "group_2"),
    (TEAM, PASSWORD, 200, ""),
    (TEAM, "other", 400, "<p>Team: group_1 is already registered with a different password</p>"),
    ("x" * 21, "x", 400, "<p>Team id is too long</p>"),
    ("", "x", 201, ""),
    ("group_2", "", 201, "group_2"),
], ids=["new", "same-password", "other-password", "long-id", "empty-id", "empty-password"])
def test_table_register(known, team, password, status, text):
    answer = put(known, "register", team, password)
    assert answer.status_code == status
    assert text in answer.text if text else status == 201 or answer.text == ""


def test_table_register_keeps_what_stands_before_the_colon(server):
    assert put(server, "register", "group:2", "x").status_code == 201
    assert server.teams == {"group": "2:x"}


def test_table_register_without_credentials(server):
    assert requests.put(server.host + "register", timeout=10).status_code == 500


@pytest.mark.parametrize("prediction, note, status, text", [
    (PREDICTION, NOTE, 201, "Submission successful"),
    ([row[::-1] for row in PREDICTION], NOTE, 201, "Submission successful"),
    (PREDICTION, "x" * 21, 400, "<p>Note is too long</p>"),
    (PREDICTION[:4], NOTE, 400, WRONG_SIZE),
    ([[0, 0.5, 0.5]] * 5, NOTE, 400, WRONG_SIZE),
    (PREDICTION[:4] + [[NAN, 0.5]], NOTE, 500, ""),
    (PREDICTION[:4] + [[INF, 0.5]], NOTE, 500, ""),
    (PREDICTION[:4] + [[0.5]], NOTE, 500, ""),
    (AF.tolist(), NOTE, 500, ""),
], ids=["good", "swapped", "long-note", "few-rows", "three-columns", "nan", "inf", "ragged", "one-dimensional"])
def test_table_leaderboard(known, prediction, note, status, text):
    answer = put(known, "leaderboard", prediction=prediction, note=note)
    assert answer.status_code == status and text in answer.text
    assert bool(known.submissions) == (status == 201)  # a failed upload uses up no day


@pytest.mark.parametrize("team, password", [(TEAM, "other"), ("group_2", PASSWORD)], ids=["password", "team"])
def test_table_leaderboard_wrong_credentials(known, team, password):
    assert put(known, "leaderboard", team, password, prediction=PREDICTION, note=NOTE).status_code == 401


def test_table_leaderboard_one_a_day_five_in_all_until_the_final_day(known):
    known.final_day = 6
    for day in range(1, 6):
        known.day = day
        for status in (201, 200):
            answer = put(known, "leaderboard", prediction=PREDICTION, note=NOTE)
            assert (answer.status_code, answer.text) == (status, "Submission successful")
    known.day = 6
    assert "Maximum number of predictions reached" in put(known, "leaderboard", prediction=PREDICTION).text
    known.day = 7
    assert "Submission closed" in put(known, "leaderboard", prediction=PREDICTION).text


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


@pytest.mark.parametrize("fault, advice", [
    ("400 Team id is too long", "20 characters"),
    ("400 Note is too long", "20 characters"),
    ("400 Prediction array is not the same size as the true class array", "every test exam"),
    ("400 Submission closed", "final date"),
    ("400 Maximum number of predictions reached", "five"),
    ("401 Unauthorized Access", "password"),
    ("404 Not Found", "LEADERBOARD_HOST"),
    ("500 The server encountered an internal error", "later"),
], ids=lambda text: text[:22].replace(" ", "-"))
def test_every_answer_becomes_the_reason_and_what_to_do(send, known, fault, advice):
    known.faults = [fault] * 10
    with pytest.raises(helpers.LeaderboardError) as caught:
        send()
    assert (caught.value.status, caught.value.reason) == (int(fault[:3]), fault[4:])
    message = str(caught.value)
    assert caught.value.reason in message
    assert advice in message.replace(caught.value.reason, "")


def test_reason_and_advice_are_two_sentences(send, known):
    known.faults = ["400 Submission closed"]
    with pytest.raises(helpers.LeaderboardError, match=r"Submission closed['\"]?[.:;)]"):
        send()


# --- what the client refuses before anything is sent ---------------------------------------------
WRONG_ANYWAY = [  # refused with allow_one_sided too
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
    ("demo-user-part", {"demo": True, "host": "http://127.0.0.1@leaderboard.example/"}, "demo data"),
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
]
ONE_SIDED = [("all-af", {"prediction": columns([0.9, 0.8, 0.7, 0.6, 0.51])}, "sigmoid applied twice"),
             ("no-af", {"prediction": columns([0.1, 0.2, 0.3, 0.4, 0.5])}, "one side of 0.5")]


def cases(table):
    return pytest.mark.parametrize("changes, words", [pytest.param(*row[1:], id=row[0]) for row in table])


@cases(WRONG_ANYWAY + ONE_SIDED)
def test_refused_before_sending(send, known, sent, folder, changes, words):
    with pytest.raises(ValueError, match=words):
        send(**changes)
    assert sent.timeouts == [] and known.received == [] and saved(folder) == []


@cases(WRONG_ANYWAY)
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


def test_demo_predictions_reach_localhost_by_name(send, known):
    assert send(demo=True, host=f"http://localhost:{known.server_port}").status_code == 201


# --- faults: nothing is lost, and the message says what happened ---------------------------------
@pytest.mark.parametrize("fault", ["drop", "500", "501", "502", "503", "504", "520"])
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


@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 413, 429])
def test_4xx_is_never_tried_again(send, known, status):
    known.faults = [f"{status} No"]
    with pytest.raises(helpers.LeaderboardError) as caught:
        send()
    assert caught.value.status == status and len(known.received) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
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


@pytest.mark.parametrize("faults, changes", [
    ([], {}), (["400 Submission closed"], {}), (["401 Unauthorized Access"], {}), (["500"] * 9, {}),
    (["302 http://127.0.0.1:1/"], {}), (["cut"] * 9, {}), (["drop"] * 9, {}), ([], {"note": ""}),
    ([], {"prediction": columns(AF * 0.1)}), ([], {"host": "http://127.0.0.1:1"}), ([], {"host": "127.0.0.1:1"}),
], ids=["success", "400", "401", "500", "redirect", "cut", "drop", "note", "one-sided", "down", "no-scheme"])
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


@pytest.mark.parametrize("note", [
    "o'brien", 'say "hi"', "<b>bold</b>", "a & b", "&amp; &#39;", "a}b{c", "back\\slash\\", "grüppe ☃ 🙂",
    "f1: 1, ap: 2", "x', note: 'y", "{ team: 'z' }", "a\tb", "</script>", "$^.*[a-z]+\\d", "TBC", "nan"])
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
    assert helpers.leaderboard_password() == "from-environment" and asked.log == []


def test_password_colab_secret_second(asked, monkeypatch):
    monkeypatch.setenv("LEADERBOARD_PASSWORD", "")
    assert helpers.leaderboard_password() == "from-colab" and asked.log == ["colab LEADERBOARD_PASSWORD"]


@pytest.mark.parametrize("secret", [RuntimeError("missing"), KeyError("x"), "", None])
def test_password_prompt_last_with_a_warning(asked, capsys, secret):
    asked.secret = secret
    assert helpers.leaderboard_password() == "from-prompt"
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
    source = f"import os\n{inspect.getsource(helpers.leaderboard_password)}\nleaderboard_password()"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    client = nbclient.NotebookClient(book, timeout=25, resources={"metadata": {"path": str(tmp_path)}})
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ValueError"):
        client.execute()
    outputs = book.cells[0].outputs
    assert [output.output_type for output in outputs] == ["error"]  # no prompt, no warning
    assert "LEADERBOARD_PASSWORD in the environment" in outputs[0].evalue


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
