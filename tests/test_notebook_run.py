"""The notebook run headless on demo data: alone, with a student's own network, undone; its self-check, submissions."""
import copy
import json
import os
import re
import types
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from leaderboard_server import running
from run_on_real import code_cells, execute, load

REFERENCES = ["baseline", "linear", "four_conv"]
EXPERIMENTS = ["exp1_long_cnn", "exp2_resnet", "exp3_ensemble"]
OWN_NETWORK = '''class AFNet(nn.Module):
    """Convolutions and an LSTM: two strided convolutions, then an LSTM over time."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(8, 16, 15, 8), nn.ReLU(), nn.Conv1d(16, 16, 9, 8), nn.ReLU())
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        steps, _ = self.lstm(self.conv(x.transpose(1, 2)).transpose(1, 2))
        return self.head(steps.mean(dim=1))
'''
OWN_EXPERIMENT = 'run_experiment("my_network", partial(PlainCNN, 1), "a shorter\\n | field", **RECIPE)'


def source(cell):
    return "".join(cell["source"])


def find(notebook, text):
    """The only code cell that holds this text."""
    (cell,) = [cell for cell in code_cells(notebook) if text in source(cell)]
    return cell


def pieces(notebook):
    """The cells that carry the module."""
    return [cell for cell in code_cells(notebook) if source(cell).startswith("%%helper")]


def only(notebook, wanted):
    """A copy of the notebook with these code cells only."""
    return {**notebook, "cells": [cell for cell in notebook["cells"] if cell in wanted]}


def added(after, text):
    """A code cell, as a student adds one below the cell `after`."""
    return {**after, "id": "added", "metadata": {}, "source": text}


def shown(cell):
    """All texts of a cell's outputs."""
    texts = [output.get("text", "") for output in cell["outputs"]]
    texts += [value for output in cell["outputs"] for kind, value in output.get("data", {}).items() if "text" in kind]
    return "\n".join("".join(text) for text in texts)


def check_run(result):
    """The run came to its end, without warnings; returns its code cells."""
    executed, error, _ = result
    assert error is None, error
    outputs = [output for cell in code_cells(executed) for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    return code_cells(executed)


def results_in(folder):
    """Path -> bytes of the predictions, and path -> time of writing of the finished runs."""
    predictions = {path.name: path.read_bytes() for path in folder.glob("demo/predictions/*")}
    return predictions, {path: path.stat().st_mtime_ns for path in folder.glob("demo/runs/*/*/*")}


# ---- One run, then a student's day ----
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def first(folder):
    """The notebook alone in an empty folder: its code cells, what it left in the folder."""
    cells = check_run(execute(load(), folder, threads=1, ECG_DATA="demo", ECG_EPOCHS=1))
    return cells, results_in(folder), {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def own(first, folder):
    """The same folder with another class AFNet, and one more cell with an experiment."""
    notebook = copy.deepcopy(load())
    find(notebook, "class AFNet")["source"] = OWN_NETWORK
    last = find(notebook, 'run_experiment("exp3_ensemble"')
    notebook["cells"].insert(notebook["cells"].index(last) + 1, added(last, OWN_EXPERIMENT))
    cells = check_run(execute(notebook, folder, threads=1, ECG_DATA="demo", ECG_EPOCHS=1))
    return cells, results_in(folder)


def test_all_files_of_a_run(first, folder):
    """In demo/ and nowhere else; probabilities of each test exam and a note for each model."""
    _, (predictions, runs), top = first
    assert top == {"demo"}
    assert {path.name for path in (folder / "demo").iterdir()} == {
        "codesubset", "predictions", "results.json", "runs", "test_labels.csv"}
    assert {path.name for path in (folder / "demo" / "codesubset").glob("*.h5")} == {"train.h5", "test.h5"}
    for name in REFERENCES + EXPERIMENTS:
        content = json.loads(predictions[f"{name}.json"])
        table = np.array(content["prediction"])
        assert table.shape == (80, 2) and np.allclose(table.sum(axis=1), 1) and (table >= 0).all()
        assert 1 <= len(content["note"]) <= 20
    networks = {*REFERENCES, *EXPERIMENTS[:2], "sweep", "receptive_field", "no_augmentation"}
    assert {path.relative_to(folder / "demo" / "runs").parts[0] for path in runs} == networks


def test_results_at_a_glance(first):
    """The run itself fills them in; they say that demo data prove nothing."""
    cells, *_ = first
    glance = next(cell for cell in cells if source(cell).count("display_id=True") == 2)
    text = shown(glance)
    assert "DEMO" in text and "fills this in" not in text and "nan" not in text
    for name in REFERENCES + EXPERIMENTS:
        assert re.search(rf"\| `{name}`: .* \d\.\d+ \(\d\.\d+ to \d\.\d+\)", text), name
    assert sum("image/png" in output.get("data", {}) for output in glance["outputs"]) == 1
    assert "filled in by" not in "".join(map(shown, cells))
    figures = ["image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]]
    assert 18 <= sum(figures) <= 24


def test_an_own_network_changes_what_depends_on_it(first, own):
    """Experiments 2 and 3; all else is loaded, and no finished run is written again."""
    (_, (before, old_runs), _), (_, (after, new_runs)) = first, own
    changed = {Path(name).stem for name in before if before[name] != after[name]}
    assert changed == {"exp2_resnet", "exp3_ensemble"}
    assert {path: new_runs[path] for path in old_runs} == old_runs
    trained = [path.parts[-3] for path in set(new_runs) - set(old_runs)]
    assert set(trained) == {"sweep", "exp2_resnet", "no_augmentation", "my_network"}


def test_texts_speak_of_the_own_network(own):
    cells, _ = own
    row = next(line for cell in cells for line in shown(cell).splitlines() if line.startswith("| sub_2 |"))
    assert "Convolutions and an LSTM" in row
    assert "residual" not in "".join(map(shown, cells)).lower()


def test_an_own_experiment_stands_everywhere(own, folder):
    """One call: in every text and table with the three experiments, with a prediction and a note by count."""
    cells, (predictions, _) = own
    assert [json.loads(predictions[f"{name}.json"])["note"] for name in [*EXPERIMENTS, "my_network"]] == [
        "sub_1", "sub_2", "sub_3", "sub_4"]
    assert "my_network" in json.loads((folder / "demo" / "results.json").read_text())
    with_all = [shown(cell) for cell in cells if "run_experiment(" not in source(cell)]
    with_all = [text for text in with_all if all(name in text for name in EXPERIMENTS)]
    assert len(with_all) >= 4 and all("my_network" in text for text in with_all)
    assert any(line.startswith("| sub_4 |") and "a shorter / field" in line for line in "\n".join(with_all).splitlines())


def test_going_back_finds_the_first_results(first, own, folder):
    """Nothing is trained; every file is that of the first run. (Only what leads to the predictions is run.)"""
    notebook = load()
    last = notebook["cells"].index(find(notebook, 'run_experiment("exp3_ensemble"'))
    wanted = [*notebook["cells"][:last + 1], find(notebook, "FULL = ["), find(notebook, "soft_pred = ")]
    _, error, _ = execute(only(notebook, wanted), folder, threads=1, ECG_DATA="demo", ECG_EPOCHS=1, MPLBACKEND="agg")
    (_, (before, _), _), (_, (_, all_runs)) = first, own
    after, runs = results_in(folder)
    assert error is None and {name: after[name] for name in before} == before and runs == all_runs


# ---- The loops and their self-check ----
DATA_OF_CHECK = "y = np.arange(40) % 2\ntracings = torch.randn(40, 4096, 8)"


def helpers_with(old="", new=""):
    """The module made of the notebook's pieces, with one edit."""
    text = "\n\n\n".join(source(cell).split("\n", 1)[1].strip("\n") for cell in pieces(load())) + "\n"
    assert not old or text.count(old) == 1, f"where is {old}?"
    module = types.ModuleType("edited_helpers")
    exec(text.replace(old, new), module.__dict__)
    return module


def self_check(ecg):
    """Run the cell of the self-check on the loops of this module."""
    space = {"ecg": ecg, "np": np, "torch": torch, "nn": torch.nn, "SEED": 42}
    exec(DATA_OF_CHECK, space)
    exec(source(find(load(), "Coding Task 3 or 4")), space)


def test_self_check_passes_the_loops():
    self_check(helpers_with())


STEP_LOSS = "loss = loss_function(logits, targets)"
EVAL_LOSS = "loss_sum += loss_function(logits, targets) * len(targets)"


@pytest.mark.parametrize("old, new", [
    ("optimizer.zero_grad()", "pass"),
    ("optimizer.step()\n        if", "pass\n        if"),
    ("model.train()\n", "model.eval()\n"),
    (STEP_LOSS, "loss = loss_function(logits, 0.9 * targets + 0.05)"),  # label smoothing of 0.1
    (STEP_LOSS, f"{STEP_LOSS} * 2"),
    ("loss_sum += loss.detach() * len(targets)", "loss_sum += loss.detach() * 12"),  # two batches: mean of their means
    ("model.eval()\n    loss_sum, logits_all", "model.train()\n    loss_sum, logits_all"),
    (EVAL_LOSS, f"{EVAL_LOSS} * 2"),
    (EVAL_LOSS, "loss_sum += loss_function(logits, targets) * 12"),
])
def test_self_check_stops_a_wrong_loop(old, new):
    with pytest.raises(AssertionError, match="Coding Task 3 or 4"):
        self_check(helpers_with(old, new))


def test_an_edited_piece_wins_over_a_file_beside_the_notebook(tmp_path):
    """Label smoothing in train_loop: the self-check meets it and stops; one line says where cell and file differ."""
    notebook = copy.deepcopy(load())
    check = find(notebook, "Coding Task 3 or 4")
    wanted = [find(notebook, "def helper(line, cell)"), find(notebook, "STARTED, DEVICE = "), check, *pieces(notebook)]
    text = "\n\n\n".join(source(cell).split("\n", 1)[1] for cell in pieces(notebook))
    (tmp_path / "ecg_helpers.py").write_text(text, encoding="utf-8")
    loop = find(notebook, "def train_loop")
    loop["source"] = source(loop).replace("(logits, targets)", "(logits, 0.9 * targets + 0.05)")
    part = only(notebook, wanted)
    part["cells"].insert(part["cells"].index(check), added(check, DATA_OF_CHECK))
    executed, error, _ = execute(part, tmp_path, threads=1)
    assert "Coding Task 3 or 4: weights" in str(error)
    differ = [source(cell) for cell in code_cells(executed) if "differs from the file ecg_helpers.py" in shown(cell)]
    assert len(differ) == 1 and "def train_loop" in differ[0]
    assert (tmp_path / "ecg_helpers.py").read_text(encoding="utf-8") == text
    assert [path.name for path in tmp_path.iterdir()] == ["ecg_helpers.py"]


# ---- Submissions ----
PASSWORD, TEAM = "s3cret-password", "group_7"
LABELS = np.arange(20) % 2


def prediction(seed):
    """Probabilities (20, 2) on both sides of 0.5."""
    af = np.random.default_rng(seed).uniform(0.1, 0.9, 20)
    return np.column_stack([1 - af, af])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running(labels=LABELS.tolist()) as server:
        yield server


@pytest.fixture
def submit_day(tmp_path, monkeypatch, server):
    """Run the settings, the submit cell and the table of Explanation 4; returns all that they show."""
    ecg, predictions = helpers_with(), {name: prediction(seed) for seed, name in enumerate(EXPERIMENTS)}
    notes = {name: f"{TEAM}_sub_{number}" for number, name in enumerate(EXPERIMENTS, 1)}
    described = {name: types.SimpleNamespace(description=f"what {name} is") for name in EXPERIMENTS}

    def run(**settings):
        settings = {"LEADERBOARD_HOST": server.host, "LEADERBOARD_TEAM": TEAM, **settings}
        settings["LEADERBOARD_PASSWORD"] = PASSWORD
        for name in ("ECG_DATA", "ECG_EPOCHS", "ECG_WORK", "LEADERBOARD_SUBMIT", "LEADERBOARD_REPLACE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        space = {"ecg": ecg, "os": os, "json": json, "np": np, "pd": pd, "Path": Path, "say": print, "display": print,
                 "IS_DEMO": True, "DATA_NAME": "DEMO", "WORK": tmp_path, "PREDICTIONS": predictions, "NOTES": notes,
                 "FULL": EXPERIMENTS, "EXPERIMENTS": described, "STEPS": "steps", "TEST_NAMES": list(range(20)),
                 "copy_results": lambda source, target: None}
        with redirect_stdout(StringIO()) as text:
            for cell in ("#@title Settings", "def leaderboard_password", "SCORES, scored = "):
                exec(source(find(load(), cell)), space)
        assert PASSWORD not in text.getvalue()
        return text.getvalue()

    run.predictions = predictions
    yield run
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and PASSWORD in path.read_text(encoding="utf-8")]


def row(text, number):
    return next(line for line in text.splitlines() if line.startswith(f"| {TEAM}_sub_{number} |"))


def test_nothing_is_sent_unless_asked_for(submit_day, server):
    submit_day(LEADERBOARD_TEAM="")
    assert server.received == []
    submit_day()
    assert [request["method"] for request in server.received] == ["GET"]
    with pytest.raises(ValueError, match="LEADERBOARD_TEAM must be"):
        submit_day(LEADERBOARD_TEAM="", LEADERBOARD_SUBMIT="exp1_long_cnn")
    with pytest.raises(ValueError, match="exp1_long_cnn, exp2_resnet, exp3_ensemble"):
        submit_day(LEADERBOARD_SUBMIT="exp9")
    with pytest.raises(ValueError, match="rehearsal server"):  # demo data
        submit_day(LEADERBOARD_SUBMIT="exp1_long_cnn", LEADERBOARD_HOST="http://leaderboard.invalid/")


def test_a_rehearsal_of_two_days(submit_day, server):
    """Not the same prediction twice; a second one of the day on request; scores beside what was scored."""
    text = submit_day(LEADERBOARD_SUBMIT="exp1_long_cnn")
    assert server.teams == {TEAM: PASSWORD} and server.submissions[TEAM][1][1] == f"{TEAM}_sub_1"
    assert "not scored yet" in row(text, 1)
    sent = [request["content"] for request in server.received if request["path"] == "/leaderboard"][0]
    assert sent == {"prediction": submit_day.predictions["exp1_long_cnn"].tolist(), "note": f"{TEAM}_sub_1"}

    before = len(server.received)
    assert "accepted before" in submit_day(LEADERBOARD_SUBMIT="exp1_long_cnn")
    assert [request["method"] for request in server.received[before:]] == ["GET"]
    assert "replaces it" in submit_day(LEADERBOARD_SUBMIT="exp2_resnet")
    assert server.submissions[TEAM][1][1] == f"{TEAM}_sub_1"
    submit_day(LEADERBOARD_SUBMIT="exp2_resnet", LEADERBOARD_REPLACE="1")
    assert server.submissions[TEAM][1][1] == f"{TEAM}_sub_2"

    server.next_day()
    scores = server.submissions[TEAM][1][0]
    published = " | ".join(f"{scores[name]:.3f}" for name in ("acc", "f1", "auc", "ap"))
    text = submit_day()
    assert published in row(text, 2) and "rehearsal" in row(text, 2) and "what exp2_resnet is" in row(text, 2)
    assert "not scored yet" in row(text, 1) and "not scored yet" in row(text, 3)
    server.faults = ["drop"]  # a server that is down hides nothing
    text = submit_day()
    assert "was not reached" in text and published in row(text, 2)
    submit_day.predictions["exp2_resnet"] = prediction(seed=9)  # another network since: another note, another score
    assert published not in submit_day()
    submit_day(LEADERBOARD_SUBMIT="exp2_resnet", LEADERBOARD_REPLACE="1")
    server.next_day()
    text, (scores, note) = submit_day(), server.submissions[TEAM][2]
    assert note == f"{TEAM}_sub_2b" and f"| {note} | {scores['acc']:.3f} | {scores['f1']:.3f}" in text
    # replaced on the first day, so never scored: it may be sent again; a scored one may not
    assert "was submitted" in submit_day(LEADERBOARD_SUBMIT="exp1_long_cnn", LEADERBOARD_REPLACE="1")
    assert "accepted before" in submit_day(LEADERBOARD_SUBMIT="exp2_resnet", LEADERBOARD_REPLACE="1")
