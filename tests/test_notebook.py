"""The notebook: committed form, headings, and a run on demo data from an empty folder."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ablation import notebook_definitions
from embed_helpers import FIRST_LINE, NOTEBOOK, ROOT, embedded_cell
from leaderboard_server import read_labels, running

HEADINGS = [
    "Module 3 - Assignment Overview: ECG classification", "Student and Group Information", "Basic Tasks", "Deliverables",
    "Grading", "GPU Acceleration", "The data set", "Coding Task 1: Data Analysis", "Explanation task 1: Data Analysis",
    "Model", "Coding Task 2: Define your model", "Explanation Task 2: Final Model", "Train function",
    "Coding Task 3: Fill training loop", "Eval function", "Coding Task 4: Fill evaluation loop", "Run Training",
    "Coding Task 5: Combine everything to train/validate the model",
    "Baseline Model Performance Over 20 Epochs", "Linear Model Performance Over 20 Epochs",
    "Coding Task 6: Run your model and adapt hyperparameters", "Explanation Task 3: Hyperparameter", "Model Testing",
    "Coding Task 7: Make prediction for test data", "Explanation Task 4: Submissions", "Explanation Task 5: Reflection on Metrics",
]


@pytest.fixture(scope="module")
def notebook():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def sources(notebook, kind):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def as_python(source):
    """A code cell as plain Python: the embedded module without its magic, line magics as `pass`."""
    return re.sub(r"^(\s*)%\w.*$", r"\1pass", source.removeprefix(FIRST_LINE), flags=re.M)


def test_headings_are_complete_and_in_order(notebook):
    found = [line.lstrip("#").strip() for text in sources(notebook, "markdown")
             for line in text.splitlines() if line.startswith("#")]
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS


def test_committed_notebook_is_clean(notebook):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"(?<![\w.])/(home|root|Users|tmp|content)/|C:\\\\", text), "a machine's path"
    assert "widgets" not in notebook["metadata"]


def test_carries_the_helper_module_byte_for_byte(notebook):
    carried = "".join(embedded_cell(notebook)["source"]).removeprefix(FIRST_LINE) + "\n"
    assert carried == (ROOT / "ecg_helpers.py").read_text(encoding="utf-8"), "run: python tests/embed_helpers.py"


def test_reads_as_a_story(notebook):
    code, text = sources(notebook, "code"), sources(notebook, "markdown")
    assert len(text) >= len(code)
    long = [source.splitlines()[0] for source in code if len(source.splitlines()) > 40 and not source.startswith(FIRST_LINE)]
    assert not long, f"cells of more than 40 lines: {long}"


@pytest.mark.parametrize("version", [(3, minor) for minor in range(9, 14)], ids=lambda v: f"3.{v[1]}")
def test_cells_parse_as(notebook, version):
    for source in sources(notebook, "code"):
        ast.parse(as_python(source), feature_version=version)


def test_no_password_is_written_or_printed(notebook):
    for source in sources(notebook, "code"):
        assert not re.search(r"(print|say|write_json)\([^)]*password", source)
    assert not any("PASSWORD" in s and "=" in s.split("PASSWORD")[1][:3] for s in sources(notebook, "code")
                   if not s.startswith(FIRST_LINE))


# ---- the run ---------------------------------------------------------------------------------------
RUN = """
import sys, nbformat
from nbclient import NotebookClient
nb = nbformat.read("assignment_ecg_classification.ipynb", as_version=4)
try:
    NotebookClient(nb, timeout=1200, kernel_name="python3").execute()
finally:
    nbformat.write(nb, "executed.ipynb")
"""


def run_notebook(folder, **environment):
    """Copy the notebook alone to `folder`, run it there; the finished process."""
    shutil.copy(NOTEBOOK, folder)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ECG_", "LEADERBOARD_"))}
    return subprocess.run([sys.executable, "-c", RUN], cwd=folder, env={**clean, **environment},
                          capture_output=True, text=True, timeout=1200)


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    """The notebook, alone in an empty folder with a space in its name, run on demo data; nothing is sent.

    The value is ECG_WORK, a folder of its own beside the notebook.
    """
    folder = tmp_path_factory.mktemp("student folder")
    proxies = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}  # any connection would fail
    (folder / "home").mkdir()
    result = run_notebook(folder, ECG_DATA="demo", ECG_WORK="my work", HOME=str(folder / "home"), **proxies)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder / "my work"


@pytest.fixture(scope="module")
def executed(demo_run):
    return json.loads((demo_run.parent / "executed.ipynb").read_text(encoding="utf-8"))


def output_text(cell):
    return "".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", ""))
                   for o in cell.get("outputs", []))


@pytest.mark.timeout(1200)
def test_run_writes_the_helper_module(demo_run):
    assert (demo_run.parent / "ecg_helpers.py").read_bytes() == (ROOT / "ecg_helpers.py").read_bytes()


def test_run_writes_into_its_folder_only(demo_run):
    """Beside ECG_WORK stand the notebook, its result and the helper module; at home, settings of Jupyter at most."""
    beside = {path.name for path in demo_run.parent.iterdir()} - {"__pycache__"}
    assert beside == {NOTEBOOK.name, "executed.ipynb", "ecg_helpers.py", "home", "my work"}
    assert {path.name for path in demo_run.iterdir()} <= {"codesubset", "test_labels.csv", "runs", "predictions", "results.json"}
    assert {path.name for path in (demo_run.parent / "home").iterdir()} <= {
        ".ipython", ".jupyter", ".cache", ".config", ".local", ".matplotlib"}


def test_run_writes_predictions(demo_run):
    records = (demo_run / "codesubset" / "test" / "RECORDS.txt").read_text().split()
    for name in ("exp1_long_cnn", "exp2_resnet", "exp3_ensemble"):
        content = json.loads((demo_run / "predictions" / f"{name}.json").read_text())
        prediction = np.array(content["prediction"])
        assert prediction.shape == (len(records), 2) and np.allclose(prediction.sum(axis=1), 1)
        assert 0 < len(content["note"]) <= 20 and content["demo"] is True
        assert (demo_run / "predictions" / f"{name}.csv").read_text().split()[1].startswith(records[0])


def test_run_writes_results(demo_run):
    results = json.loads((demo_run / "results.json").read_text())
    assert set(results) == {"baseline", "linear", "four_conv", "exp1_long_cnn", "exp2_resnet", "exp3_ensemble"}
    for name, row in results.items():
        assert 0 <= row["f1"] <= 1 and 0 <= row["balanced_f1"] <= 1, name
    assert results["exp3_ensemble"]["auroc"] > 0.9, "synthetic AF is easy: the pipeline must find it"


def test_run_has_its_figures(executed):
    pictures = sum("image/png" in o.get("data", {}) for c in executed["cells"] for o in c.get("outputs", []))
    assert pictures >= 27, "11 ECGs on paper, 6 trainings, 10 others"
    assert len(json.dumps(executed)) < 5_000_000, "the executed notebook must stay below 5 MB"
    assert "widget" not in json.dumps([c.get("outputs") for c in executed["cells"]])


def test_every_ecg_is_drawn(executed):
    """A figure made apart from pyplot is shown as text where the inline backend is not set up: look for the picture."""
    drawn = [c for c in executed["cells"] if c["cell_type"] == "code" and re.search(r"^\s*draw_ecg\(", "".join(c["source"]), re.M)]
    assert len(drawn) >= 5
    assert all(any("image/png" in o.get("data", {}) for o in c["outputs"]) for c in drawn)


def test_run_says_that_the_data_are_synthetic(executed):
    text = "".join(output_text(cell) for cell in executed["cells"])
    assert "DEMO DATA" in text and "not yet published" in text and "nothing was sent" in text


def test_run_has_no_warnings_nor_machine_paths(executed, demo_run):
    for cell in executed["cells"]:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output["text"]
    assert str(demo_run.parent) not in json.dumps(executed) and str(ROOT) not in json.dumps(executed)


def test_every_self_check_printed(executed):
    """A self-check follows each coding task; the cell after its heading prints what it checked."""
    cells = executed["cells"]
    checks = [cells[i + 1] for i, cell in enumerate(cells) if "**Self-check" in "".join(cell["source"])]
    assert len(checks) >= 5
    assert all(output_text(cell).strip() for cell in checks)


@pytest.mark.timeout(1200)
def test_a_second_run_loads_instead_of_training(demo_run):
    before = {p: p.read_bytes() for p in (demo_run / "predictions").glob("*.json")}
    result = run_notebook(demo_run.parent, ECG_DATA="demo", ECG_WORK=demo_run.name)
    assert result.returncode == 0, result.stderr[-3000:]
    assert {p: p.read_bytes() for p in before} == before, "the same folder must end with the same predictions"
    text = (demo_run.parent / "executed.ipynb").read_text()
    assert "epochs are done" in text and "validation loss 0." not in text.split("Baseline model")[0]


@pytest.mark.timeout(1200)
def test_rehearsal_of_three_submissions(demo_run):
    """Three runs submit the three experiments on three server days; the last shows three scored rows."""
    labels = read_labels(demo_run / "test_labels.csv", demo_run / "codesubset" / "test" / "RECORDS.txt")
    with running(labels=labels) as server:
        for name in ("exp1_long_cnn", "exp2_resnet", "exp3_ensemble", ""):
            result = run_notebook(demo_run.parent, ECG_DATA="demo", ECG_WORK=demo_run.name, LEADERBOARD_HOST=server.host,
                                  LEADERBOARD_TEAM="group_7", LEADERBOARD_PASSWORD="only-for-the-rehearsal",
                                  LEADERBOARD_SUBMIT=name)
            assert result.returncode == 0, result.stderr[-3000:]
            server.day += 1
    text = "".join(output_text(cell) for cell in json.loads((demo_run.parent / "executed.ipynb").read_text())["cells"])
    rows = [line for line in text.splitlines() if re.match(r"\| group_7_sub_[123] \|", line)]
    assert len(rows) == 3 and "not yet published" not in "".join(rows) and "3 of 5 days used" in text
    kept = "".join(path.read_text() for path in [*(demo_run / "submissions").iterdir(), demo_run.parent / "executed.ipynb"])
    assert "only-for-the-rehearsal" not in kept


def test_prevalence_estimate_finds_the_share(notebook):
    """The label-shift estimate of the notebook, on simulated logits whose AF share is known."""
    cell = next(s for s in sources(notebook, "code") if "def estimate_prevalence" in s)
    space = {"np": np}
    exec(cell.split("\n\n\n")[0], space)
    rng = np.random.default_rng(0)
    for share in (0.07, 0.3, 0.5):
        label = rng.random(4000) < share
        logit = rng.normal(np.where(label, 2.0, -2.0), 2.0)  # log odds of these normals at equal shares: the logit itself
        found = space["estimate_prevalence"](1 / (1 + np.exp(-logit)))
        assert abs(found - share) < 0.03, (share, found)


def test_augmentation_keeps_what_it_must():
    """Same seed, same exams; the input stays as it is; nothing is added where nothing was recorded."""
    space = notebook_definitions()
    x = 0.2 * torch.randn(16, 4096, 8)
    x[:, :500] = 0
    before = x.clone()
    for name in ("augment_gain_shift_noise", "add_disturbances", "shorten", "augment_exams"):
        torch.manual_seed(1)
        first = space[name](x)
        torch.manual_seed(1)
        assert torch.equal(space[name](x), first) and first.shape == x.shape and first.dtype == x.dtype
        assert torch.isfinite(first).all() and not torch.equal(first, x) and torch.equal(x, before)
    assert not space["add_disturbances"](x)[:, :500].any()
    cut = (space["shorten"](torch.ones(200, 4096, 1)) == 0).sum(dim=1)
    assert cut.min() < 200 and 1000 < cut.max() <= 1200


def test_final_network_minds_no_gain_and_no_bad_lead():
    """The same logit for twice the gain; a lead of 100 mV noise changes the size of the others by little; zeros are no fault."""
    torch.manual_seed(0)
    net = notebook_definitions()["AFNet"]().eval()
    seen = []
    net.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = 0.2 * torch.randn(4, 4096, 8)
    with torch.no_grad():
        assert torch.allclose(net(x), net(2 * x), atol=0.05) and torch.isfinite(net(torch.zeros(1, 4096, 8))).all()
        x[:, :, 5] = 100 * torch.randn(4, 4096)
        net(x)
    leads = seen[-1].squeeze(2).std(dim=2)  # (exams, leads)
    assert 0.15 < leads[:, :5].min() and leads.max() <= 2.01


def test_unknown_experiment_is_refused(notebook):
    cell = next(s for s in sources(notebook, "code") if s.startswith("if LEADERBOARD_SUBMIT:"))
    with pytest.raises(ValueError, match="exp9"):
        exec(cell, {"LEADERBOARD_SUBMIT": "exp9", "PREDICTIONS": {"exp1": None}})


def test_nothing_else_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
    assert top <= {"assignment_ecg_classification.ipynb", "ecg_helpers.py", "requirements.txt", "README.md", "tests",
                   ".gitignore", ".ci"}
