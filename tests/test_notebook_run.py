"""The notebook as a student uses it: run, edited, run again, undone, submitted day by day, on odd data.

A run has a folder and a kernel of its own. One live kernel serves several tests: cells are edited and run again in it,
as a person does. Figures are drawn in two runs only, on the demo data and on odd data; elsewhere they would cost
most of the time.
"""
import copy
import io
import itertools
import json
import os
import re
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import ecg_helpers as helpers
import nbformat
import numpy as np
import pandas as pd
import pytest
import wfdb
from leaderboard_server import read_labels, running, scores
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebook_source import MODULE, ROOT, as_text, code_cells, load, source
from run_on_real import MACHINE_PATH, OURS

pytestmark = pytest.mark.timeout(900)  # the first test of a fixture waits for its run

EXPERIMENTS = ("exp1_long_cnn", "exp2_resnet", "exp3_ensemble")
REFERENCES = ("baseline", "linear", "four_conv")  # these do not use AFNet
PASSWORD, WRONG = "only-for-the-rehearsal", "not-the-right-one"


# ---- Running -------------------------------------------------------------------------------------
class Run:
    """The notebook, alone in a folder, in a live kernel; `cells` runs it, `edit` changes it."""

    def __init__(self, folder, client):
        self.folder, self.client, self.cells = folder, client, client.nb.cells

    def find(self, text, kind="code"):
        """Position of the one cell in which this text stands."""
        found = [i for i, cell in enumerate(self.cells) if cell.cell_type == kind and text in cell.source]
        assert len(found) == 1, f"{text!r} stands in {len(found)} {kind} cells"
        return found[0]

    def run(self, start=0, stop=None):
        """Run the cells from `start` to before `stop`, by position or by a text in them; what they show."""
        start = start if isinstance(start, int) else self.find(start)
        stop = len(self.cells) - 1 if stop is None else stop if isinstance(stop, int) else self.find(stop)
        for position in range(start, stop):
            if self.cells[position].cell_type == "code":
                self.client.execute_cell(self.cells[position], position)
        return "\n".join(shown(cell) for cell in self.cells[start:stop])

    def run_cell(self, text):
        """Run the one code cell with this text; what it shows."""
        position = self.find(text)
        return self.run(position, position + 1)

    def edit(self, text, old, new):
        """Edit the one code cell with this text; returns its source before."""
        cell = self.cells[self.find(text)]
        assert cell.source.count(old) == 1, f"{old!r} stands {cell.source.count(old)} times in the cell"
        before, cell.source = cell.source, cell.source.replace(old, new)
        return before

    def execute(self, code):
        """Run code that is not in the notebook; what it shows."""
        self.cells[-1].source = code
        return shown(self.client.execute_cell(self.cells[-1], len(self.cells) - 1))

    def settings(self, **environment):
        """Other settings in the live kernel: the form's cell and its check are run again."""
        self.execute(f"import os; os.environ.update({environment!r})")
        return self.run_cell("#@title Settings") + self.run_cell("SUBMITTABLE =")

    def outputs(self):
        return [output for cell in self.cells if cell.cell_type == "code" for output in cell.outputs]

    def text(self):
        """Everything that the notebook shows."""
        return "\n".join(map(shown, self.cells))


def shown(cell):
    """What a cell shows, as text."""
    outputs = cell.get("outputs", []) if cell["cell_type"] == "code" else []
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/markdown", "")
                     or output.get("data", {}).get("text/plain", "") for output in outputs)


@contextmanager
def student(folder, figures=False, threads=1, **settings):
    """A Run in `folder`: an empty home beside the work, no settings of ours, no way to the internet."""
    node = nbformat.reads(as_text(load()), as_version=4)
    for cell in node.cells:
        if cell.cell_type == "code":
            cell.outputs = []
            if not figures:
                cell.source = cell.source.replace('figure_formats = ["png"]', "figure_formats = []")
    node.cells.append(nbformat.v4.new_code_cell(""))
    for name in ("home", "temp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith((*OURS, "OMP_"))}
    environment |= {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy")}  # any connection would fail
    environment |= {"HOME": str(folder / "home"), "TMPDIR": str(folder / "temp"), **settings}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    environment["OMP_WAIT_POLICY"] = "PASSIVE"  # a thread that waits sleeps, should the machine have other work
    client = NotebookClient(node, timeout=600, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    client.reset_execution_trackers()
    with client.setup_kernel(env=environment):
        yield Run(folder, client)


def refusal(run, *cells):
    """The type and text of the error that stops the notebook."""
    with pytest.raises(CellExecutionError) as caught:
        run.run(*cells)
    return caught.value.ename, caught.value.evalue


def runs_in(work):
    """(name, digest) -> when its checkpoint was written, of every training run."""
    return {path.parts[-3:-1]: path.stat().st_mtime_ns for path in (work / "runs").glob("*/*/checkpoint.pt")}


def predictions_in(work):
    return {path.stem: path.read_bytes() for path in (work / "predictions").glob("*.json")}


def epoch_lines(text):
    return re.findall(r"^epoch +\d+/\d+ .*$", text, flags=re.M)


# ---- The default run on demo data ----------------------------------------------------------------
@pytest.fixture(scope="module")
def demo_kernel(tmp_path_factory):
    """All cells, `ECG_DATA=demo`, nothing else set but the folder; the machine's default threads. The kernel lives on."""
    folder = tmp_path_factory.mktemp("student folder")  # with a space
    with student(folder, figures=True, threads=None, ECG_DATA="demo", ECG_WORK="my work") as run:
        run.run()
        work = folder / "my work" / "demo"
        yield run, copy.deepcopy(run.cells), {path.name: path.read_text() for path in (work / "predictions").iterdir()}


@pytest.fixture(scope="module")
def demo_run(demo_kernel):
    """The cells of the demo run with their outputs."""
    return demo_kernel[1]


@pytest.fixture(scope="module")
def demo_work(demo_kernel):
    return demo_kernel[0].folder / "my work" / "demo"


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def test_demo_run_writes_into_its_folder_only(demo_work):
    """Nothing beside ECG_WORK, in it only demo/; at home at most settings of Jupyter."""
    def names(folder):
        return {path.name for path in folder.iterdir()}

    work = demo_work.parent
    assert names(work.parent) == {"home", "temp", "my work"}
    assert names(work) - {".lock"} == {"demo"}
    assert names(demo_work) - {".lock", "submissions"} == {"codesubset", "test_labels.csv", "runs", "predictions", "results.json",
                                                  "data.json"}
    assert names(work.parent / "home") <= {".ipython", ".jupyter", ".cache", ".config", ".local", ".matplotlib"}
    assert not list(work.rglob("*.part"))


def test_demo_run_writes_predictions(demo_kernel, demo_work):
    _, _, files = demo_kernel
    records = (demo_work / "codesubset" / "test" / "RECORDS.txt").read_text().split()
    assert set(files) == {f"{name}.{ending}" for name in EXPERIMENTS for ending in ("json", "csv")}
    for number, name in enumerate(EXPERIMENTS, 1):
        content = json.loads(files[f"{name}.json"])
        prediction = np.array(content["prediction"])
        assert prediction.shape == (len(records), 2) and np.allclose(prediction.sum(axis=1), 1)
        assert 0.1 < (prediction[:, 1] > 0.5).mean() < 0.9
        assert content["note"] == f"sub_{number}" and content["demo"] is True
        table = pd.read_csv(io.StringIO(files[f"{name}.csv"]))
        assert list(table["record"]) == records and np.allclose(table["AF"], prediction[:, 1])


def test_demo_run_writes_results(demo_work):
    results = json.loads((demo_work / "results.json").read_text())
    assert set(results) - {"my_experiment"} == {*REFERENCES, *EXPERIMENTS}
    for name, row in results.items():
        assert all(0 <= row[key] <= 1 for key in ("auroc", "ap", "f1", "balanced_f1", "balanced_ap")), name
        if name not in ("exp3_ensemble", "my_experiment"):  # these are no single training run
            assert row["run"].startswith(f"runs/{name}/") and (demo_work / row["run"] / "model.pth").is_file(), name


def test_demo_run_finds_af(demo_kernel, demo_work):
    """Synthetic AF is easy, but not so easy that every figure is 1: about 3 % of the labels are wrong."""
    results = json.loads((demo_work / "results.json").read_text())
    assert 0.85 < results["exp3_ensemble"]["auroc"] < 1
    assert results["exp3_ensemble"]["auroc"] > max(results["baseline"]["auroc"], results["linear"]["auroc"])
    labels = read_labels(demo_work / "test_labels.csv", demo_work / "codesubset" / "test" / "RECORDS.txt")
    found = scores(labels, json.loads(demo_kernel[2]["exp3_ensemble.json"])["prediction"])
    assert found["auc"] > 0.85 and found["f1"] > 0.75, found


def test_demo_run_says_that_the_data_are_synthetic(demo_run):
    """A banner comes before the first figure."""
    text = "\n".join(map(shown, demo_run))
    assert "⚠️ **DEMO DATA" in text and "nothing was sent" in text and "not yet published" in text
    outputs = [output for cell in demo_run for output in cell.get("outputs", [])]
    banner = next(i for i, output in enumerate(outputs) if "DEMO DATA" in output.get("data", {}).get("text/markdown", ""))
    assert banner < next(i for i, output in enumerate(outputs) if "image/png" in output.get("data", {}))


def test_demo_run_draws_its_figures(demo_run):
    """As many pictures as the cell shows figures; the executed file stays small."""
    for cell in demo_run:
        if cell.cell_type == "code" and not cell.source.startswith("%%helper"):
            figures = re.findall(r"^(?:plt\.show\(|display\((?:ecg\.)?draw_ecg\()", cell.source, flags=re.M)
            assert pictures(cell) >= len(figures), cell.source
            assert pictures(cell) or "<Figure size" not in shown(cell), f"a figure is shown as text: {cell.source}"
    assert sum(map(pictures, demo_run)) >= 30
    assert len(json.dumps([cell.get("outputs") for cell in demo_run])) < 6_000_000


def test_demo_run_has_no_warnings_nor_machine_paths(demo_kernel):
    run, cells, _ = demo_kernel
    assert_no_warnings(cells)
    assert not [line for cell in cells for line in shown(cell).splitlines() if MACHINE_PATH.search(line)]
    written = json.dumps([cell.get("outputs") for cell in cells])
    assert str(run.folder) not in written and str(ROOT) not in written


def assert_no_warnings(cells):
    for cell in cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", f"{cell.source[:100]}\n{output.text}"
            assert not any("widget" in kind for kind in output.get("data", {})), cell.source[:100]


def test_demo_run_shows_every_self_check(demo_run):
    """A self-check follows each coding task; the code below its announcement prints what it checked."""
    tasks = ""
    for i, cell in enumerate(demo_run):
        announced = re.search(r"\*\*self-check[^*]*\*\*", cell.source, flags=re.IGNORECASE) if cell.cell_type == "markdown" else None
        if announced:
            tasks += announced[0]
            below = itertools.takewhile(lambda cell: cell.cell_type == "code", demo_run[i + 1:])
            assert re.search(r"\w{3}", "".join(map(shown, below))), f"shows nothing: {announced[0]}"
    assert set(re.findall(r"\d", tasks)) == set("1234567"), f"not every task has one: {tasks}"


def test_demo_run_has_no_nan_in_its_sentences(demo_run):
    lines = [line for cell in demo_run for line in shown(cell).splitlines() if "**" in line]
    assert len(lines) > 20
    assert not [line for line in lines if re.search(r"(?<![\w.])nan(?!\w)", line)]


# ---- Rehearsal: submissions on several days ------------------------------------------------------
def submit(run, **settings):
    """What a student does on another day: other settings, then the cells from the submission on; what they show."""
    return run.settings(**settings) + run.run("def submit_experiment")


@pytest.fixture(scope="module")
def rehearsal(demo_kernel, demo_work):
    """Four server days in the kernel of the demo run; (what each step showed, the server, the run)."""
    run, seen = demo_kernel[0], {}
    labels = read_labels(demo_work / "test_labels.csv", demo_work / "codesubset" / "test" / "RECORDS.txt")
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with running(labels=labels) as server:
        here = {"LEADERBOARD_HOST": server.host, "LEADERBOARD_TEAM": " group_7 ", "LEADERBOARD_PASSWORD": PASSWORD}
        run.settings(ECG_OWN="1")
        run.run_cell('register("my_experiment"')
        run.settings(LEADERBOARD_SUBMIT="exp1_long_cnn", **here)
        seen["first"] = run.run(run.find("## Model Testing", "markdown"))  # notes, now with the team
        server.day = 2
        seen["same again"] = submit(run)
        seen["second"] = submit(run, LEADERBOARD_SUBMIT="exp2_resnet")
        server.day = 3
        seen["wrong password"] = submit(run, LEADERBOARD_SUBMIT="my_experiment", LEADERBOARD_PASSWORD=WRONG)
        seen["server down"] = submit(run, LEADERBOARD_PASSWORD=PASSWORD, LEADERBOARD_HOST=nobody)
        seen["third"] = submit(run, LEADERBOARD_HOST=server.host)
        server.day = 4
        seen["scores"] = submit(run, LEADERBOARD_SUBMIT="")
        yield seen, server, run


def test_rehearsal_sends_each_experiment_once(rehearsal):
    """Three submissions, each with the note of its experiment; blanks around the team id are stripped."""
    seen, server, _ = rehearsal
    sent = [one["content"]["note"] for one in server.received if (one["method"], one["path"]) == ("PUT", "/leaderboard")]
    assert sent == ["group_7_sub_1", "group_7_sub_2", "group_7_sub_4"] and list(server.teams) == ["group_7"]
    assert "NEW team registered" in seen["first"] and "NEW" not in seen["second"]
    for step, name in (("first", "exp1_long_cnn"), ("second", "exp2_resnet"), ("third", "my_experiment")):
        assert re.search(rf"{name} as '?group_7_sub_\d'?: accepted", seen[step]), seen[step]
        assert "Not submitted" not in seen[step]


def test_rehearsal_does_not_send_the_same_file_again(rehearsal):
    seen, *_ = rehearsal
    assert re.search(r"exp1_long_cnn was accepted on .* not sent again", seen["same again"])


@pytest.mark.parametrize("step, words", [("wrong password", "different password"), ("server down", "was not reached")])
def test_rehearsal_problems_give_one_line_and_the_run_ends_well(rehearsal, step, words):
    seen, *_ = rehearsal
    lines = [line for line in seen[step].splitlines() if "Not submitted" in line]
    assert len(lines) == 1 and words in lines[0] and lines[0].endswith("**"), seen[step]
    assert "Traceback" not in seen[step] and "| written | files |" in seen[step], "the last cell did not run"


def test_rehearsal_shows_scores_beside_their_experiment(rehearsal, demo_work):
    """The table of Explanation 4: the scores of each note are those of the experiment's own file."""
    seen, server, _ = rehearsal
    rows = {line.split(" | ")[0].strip("| "): line for line in seen["scores"].splitlines() if line.startswith("| group_7_sub_")}
    assert len(rows) == 4
    for number, name in ((1, "exp1_long_cnn"), (2, "exp2_resnet"), (4, "my_experiment")):
        content = json.loads((demo_work / "predictions" / f"{name}.json").read_text())
        found = scores(server.labels, content["prediction"])
        wanted = " | ".join(f"{found[key]:.3f}" for key in ("acc", "f1", "auc", "ap"))
        assert content["note"] == f"group_7_sub_{number}"
        assert wanted in rows[content["note"]] and name in rows[content["note"]], (rows, wanted)
    assert "not yet published" in rows["group_7_sub_3"] and "exp3_ensemble" in rows["group_7_sub_3"]


def test_rehearsal_shows_what_published_figures_tell(rehearsal, demo_work):
    """Recall, precision and prevalence of the hidden labels lie within the intervals computed from two rounded figures."""
    seen, server, _ = rehearsal
    truth = np.array(server.labels) == 1
    for name in ("exp1_long_cnn", "exp2_resnet", "my_experiment"):
        content = json.loads((demo_work / "predictions" / f"{name}.json").read_text())
        predicted = np.array(content["prediction"])[:, 1] > 0.5
        line = next(line for line in seen["scores"].splitlines() if line.startswith(f"**{name}** on the leaderboard"))
        hits = (truth & predicted).sum()
        true = {"recall": hits / truth.sum(), "precision": hits / predicted.sum(), "prevalence": truth.mean()}
        for word, value in true.items():
            _, low, high = re.search(rf"{word} ([\d.]+)% \(([\d.]+)% to ([\d.]+)%\)", line).groups()
            assert float(low) - 0.06 <= 100 * value <= float(high) + 0.06, (word, value, line)


def test_rehearsal_leaves_no_password_behind(rehearsal, demo_work):
    seen, _, run = rehearsal
    kept = "".join(path.read_text(errors="replace") for path in demo_work.parent.rglob("*.json"))
    for secret in (PASSWORD, WRONG):
        assert secret not in kept and secret not in str(seen) and secret not in json.dumps(run.outputs())


# ---- The workbench: edit, run, undo, run ---------------------------------------------------------
def run_below(run, text):
    """Run this cell and those below; only the comparison and evaluation of the models, which train nothing, are left out."""
    middle, testing = run.find("## All models side by side", "markdown"), run.find("## Model Testing", "markdown")
    return run.run(text, middle) + run.run(testing)


@pytest.fixture(scope="module")
def workbench(tmp_path_factory):
    """One live kernel on a small data set, one epoch: what each step showed, which runs and predictions were there after it.

    At last the second run: a new kernel, the edit undone, ECG_OWN=1.
    """
    folder, seen = tmp_path_factory.mktemp("workbench"), {}
    data = helpers.make_demo_codesubset(tmp_path_factory.mktemp("small"), n_train=60, n_test=12, seed=1)
    settings = {"ECG_DATA": str(data), "ECG_WORK": "work", "ECG_EPOCHS": "1"}
    work = folder / "work" / "demo"

    def note(step, text):
        seen[step] = text, runs_in(work), predictions_in(work)

    with student(folder, **settings) as run:
        note("first", run.run())
        seen["module"] = run.execute("from pathlib import Path\nprint(Path(ecg.__file__).read_text(encoding='utf-8'), end='')")
        with student(folder, **settings) as second:
            seen["two at once"] = refusal(second)

        run.edit("class AFNet", "return self.head(", "return 1.5 * self.head(")
        note("edit", run_below(run, "class AFNet"))

        note("before the helper cell", run.run_cell("baseline = ModelBaseline()"))
        before = run.edit("def train_loop", "return loss_sum.item()", "return 2 * loss_sum.item()")
        run.run_cell("def train_loop")
        note("edited helper cell", run.run_cell("baseline = ModelBaseline()"))
        run.cells[run.find("def train_loop")].source = before
        run.run_cell("def train_loop")
        note("helper cell undone", run.run_cell("baseline = ModelBaseline()"))

        run.settings(ECG_EPOCHS="2")
        note("two epochs", run.run_cell("baseline = ModelBaseline()"))
        run.settings(ECG_EPOCHS="1")
        note("quick look", run.run_cell("baseline = ModelBaseline()"))
        run.settings(ECG_EPOCHS="2")
        note("two epochs again", run.run_cell("baseline = ModelBaseline()"))
    with student(folder, ECG_OWN="1", **settings) as run:  # the edit undone, but for a comment
        run.edit("class AFNet", "return self.head(", "# as it was\n        return self.head(")
        note("second run", run.run())
        seen["cells"] = run.cells
        seen["module while running"] = [path.name for path in (folder / "temp").iterdir()]
    seen["module afterwards"] = [path.name for path in (folder / "temp").iterdir()]
    return seen


def new_runs(seen, before, after):
    """Names of the runs that a step made; every earlier one must be there as it was."""
    (_, old, _), (_, new, _) = seen[before], seen[after]
    assert all(new.get(key) == written for key, written in old.items()), "a finished run was written again"
    return [name for name, _ in set(new) - set(old)]


def test_edit_trains_only_what_depends_on_it(workbench):
    """A factor in AFNet.forward: all its networks are trained again, the reference models are loaded."""
    names = {name for name, _ in workbench["first"][1]}
    assert {*REFERENCES, "exp1_long_cnn", "exp2_resnet"} < names
    trained = new_runs(workbench, "first", "edit")
    assert sorted(trained) == sorted(names - set(REFERENCES))
    assert workbench["edit"][2]["exp1_long_cnn"] != workbench["first"][2]["exp1_long_cnn"]
    lines = epoch_lines(workbench["edit"][0])
    assert sum(line.endswith("(loaded)") for line in lines) == len(REFERENCES)


def losses(text):
    return [float(value) for value in re.findall(r"^epoch +\d+/\d+ +loss ([\d.]+)", text, flags=re.M)]


def test_edited_helper_cell_takes_effect(workbench):
    """A train_loop that returns twice the loss: trained again with the doubled figure; undone, it is loaded again."""
    before, edited = losses(workbench["before the helper cell"][0]), losses(workbench["edited helper cell"][0])
    assert len(before) == len(edited) == 1 and edited[0] == pytest.approx(2 * before[0], rel=1e-3)
    assert new_runs(workbench, "before the helper cell", "edited helper cell") == ["baseline"]
    assert new_runs(workbench, "edited helper cell", "helper cell undone") == []
    assert losses(workbench["helper cell undone"][0]) == before


def test_quick_look_leaves_the_longer_run_alone(workbench):
    """Two epochs, then one, then two: each is trained once and found again."""
    assert new_runs(workbench, "helper cell undone", "two epochs") == ["baseline"]
    assert new_runs(workbench, "two epochs", "quick look") == [] and len(losses(workbench["quick look"][0])) == 1
    assert new_runs(workbench, "quick look", "two epochs again") == []
    assert losses(workbench["two epochs again"][0]) == losses(workbench["two epochs"][0])


def test_undo_trains_nothing_and_gives_the_first_numbers(workbench):
    """In a new kernel, undone but for a comment: every prediction file is the first run's, to the last byte."""
    assert new_runs(workbench, "two epochs again", "second run") == []
    predictions = workbench["second run"][2]
    assert {name: predictions[name] for name in EXPERIMENTS} == workbench["first"][2]


def test_second_run_shows_the_lines_of_the_first_marked_as_loaded(workbench):
    lines = epoch_lines(workbench["second run"][0])
    assert all(line.endswith("(loaded)") for line in lines)
    assert [line.removesuffix("  (loaded)") for line in lines] == epoch_lines(workbench["first"][0])


def test_own_experiment_is_everywhere(workbench):
    """ECG_OWN=1 alone puts it into every file, and into every output that shows the other three."""
    text, _, predictions = workbench["second run"]
    content = json.loads(predictions["my_experiment"])
    assert np.array(content["prediction"]).shape == (12, 2) and content["note"] == "sub_4"
    assert "my_experiment" not in workbench["first"][0].replace("ECG_OWN", "") and "my_experiment" not in workbench["first"][2]
    rows = [line for line in text.splitlines() if line.startswith("| sub_4 |")]
    assert len(rows) == 1 and "my_experiment" in rows[0], "no row in Explanation 4"
    for cell in workbench["cells"]:
        output = re.sub(r"Training \w+", "", shown(cell))  # the table of times: it trains nothing
        if all(name in output for name in EXPERIMENTS):
            assert "my_experiment" in output, f"not in the output of:\n{cell.source[:300]}"


def test_own_experiment_stands_in_the_comparison_of_all_models(workbench):
    comparison = [cell for cell in workbench["cells"] if cell.cell_type == "code" and "comparison = " in cell.source]
    assert len(comparison) == 1
    assert all(name in shown(comparison[0]) for name in (*REFERENCES, *EXPERIMENTS, "my_experiment"))


def test_no_temporary_module_is_left(workbench):
    assert any("ecg_helpers" in name for name in workbench["module while running"])
    assert not any("ecg_helpers" in name for name in workbench["module afterwards"])


def test_two_runs_at_once_stop_the_second(workbench):
    kind, words = workbench["two at once"]
    assert kind == "RuntimeError" and "in use by another run" in words and "ECG_WORK" in words and "\n" not in words


def test_helper_cells_make_the_module(workbench):
    assert workbench["module"] == MODULE.read_text(encoding="utf-8")


def test_own_module_beside_the_notebook_wins(tmp_path):
    """A person's file is used and stays as it is; the one cell that differs from it says so, the others are silent."""
    own = tmp_path / "ecg_helpers.py"
    text = MODULE.read_text(encoding="utf-8")
    assert text.count("def pick_device():\n") == 1
    own.write_text(text.replace("def pick_device():\n", "def pick_device():\n    # mine\n") + "\n\nMINE = 1\n", encoding="utf-8")
    written = own.read_bytes(), own.stat().st_mtime_ns
    with student(tmp_path) as run:
        run.run(0, run.find("%%helper 1 "))
        for cell in run.cells:
            if cell.cell_type == "code" and cell.source.startswith("%%helper"):
                run.run_cell(cell.source)
        assert run.execute("print(ecg.MINE, ecg.__file__)").split() == ["1", str(own)]
    told = {cell.source for cell in run.cells if "differs from this cell" in shown(cell)}
    assert len(told) == 1 and "def pick_device" in told.pop()
    assert (own.read_bytes(), own.stat().st_mtime_ns) == written


# ---- Odd data and settings -----------------------------------------------------------------------
def odd_codesubset(folder, n_af, af_patients):
    """50 exams, a blank age, sex in words, an example record at 100 Hz, one test exam."""
    data = helpers.make_demo_codesubset(folder, n_train=50, n_test=1, seed=3)
    table = pd.read_csv(data / "train.csv")
    af = table.index[table["AF"] == 1]
    table.loc[af[n_af:], "AF"] = 0
    table.loc[af[:n_af], "id_patient"] = 900_001 + np.arange(n_af) % af_patients
    table["sex"] = table["sex"].map({"F": "female", "M": "male"})
    table["age"] = table["age"].astype(float)
    table.loc[7, "age"] = np.nan
    table.to_csv(data / "train.csv", index=False)
    signal, rate, leads = helpers.read_ecg(data / "train" / "TNMG100046")  # the record that the notebook draws
    wfdb.wrsamp("TNMG100046", fs=100, units=["mV"] * 8, sig_name=list(leads), p_signal=signal[:, ::rate // 100].T,
                fmt=["16"] * 8, adc_gain=[1000.0] * 8, baseline=[0] * 8, write_dir=str(data / "train"))
    return data


@pytest.fixture(scope="module")
def odd_run(tmp_path_factory):
    """First too few patients with AF, then 50 exams with 8 AF of 5 patients in the same kernel, figures drawn."""
    few = odd_codesubset(tmp_path_factory.mktemp("few"), n_af=4, af_patients=4)
    odd = odd_codesubset(tmp_path_factory.mktemp("odd"), n_af=8, af_patients=5)
    folder = tmp_path_factory.mktemp("odd run")
    with student(folder, figures=True, ECG_DATA=str(few), ECG_WORK="few", ECG_EPOCHS="1") as run:
        refused = refusal(run)
        run.settings(ECG_DATA=str(odd), ECG_WORK="work")
        run.run("CODESUBSET = ecg.fetch_codesubset(")
    return run, refused


def test_too_few_patients_are_refused_in_one_sentence(odd_run):
    """Four patients with AF cannot be split into five folds: said before anything is trained."""
    run, (kind, words) = odd_run
    assert kind == "ValueError" and "\n" not in words and "AF exams of 4 patients" in words, words
    assert not (run.folder / "few" / "demo" / "runs").exists()


def test_odd_data_run_to_the_end(odd_run):
    """One row of two probabilities each; metrics that are no number are written as null."""
    def no_number(word):
        raise ValueError(f"{word} is no JSON")

    run, _ = odd_run
    work = run.folder / "work" / "demo"
    for name in EXPERIMENTS:
        prediction = np.array(json.loads((work / "predictions" / f"{name}.json").read_text())["prediction"])
        assert prediction.shape == (1, 2) and np.isfinite(prediction).all()
    json.loads((work / "results.json").read_text(), parse_constant=no_number)
    assert "at 100 Hz" in run.text() and "Age unknown: 1" in run.text()


def test_odd_data_give_no_warnings(odd_run):
    assert_no_warnings(odd_run[0].cells)


def take_settings(monkeypatch, **settings):
    """Run the form's cell and the cell that checks it, with these environment variables."""
    for name in [name for name in os.environ if name.startswith(OURS)]:
        monkeypatch.delenv(name)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    space = {"ecg": helpers, "os": os, "Path": Path, "time": time}
    for text in ("#@title Settings", "SUBMITTABLE ="):
        exec(next(source(cell) for cell in code_cells(load()) if text in source(cell)), space)


@pytest.mark.parametrize("settings, words", [
    ({"LEADERBOARD_SUBMIT": "exp9"}, "exp1_long_cnn, exp2_resnet, exp3_ensemble"),
    ({"LEADERBOARD_SUBMIT": "my_experiment"}, "ECG_OWN=1"),
    ({"LEADERBOARD_TEAM": " "}, "1 to 20 characters"),
    ({"LEADERBOARD_TEAM": "a team with a very long name"}, "1 to 20 characters"),
    ({"LEADERBOARD_HOST": "http://me:secret@127.0.0.1/"}, "must not hold a name or password"),
    ({"ECG_DATA": "demo"}, "rehearsal server"),
    ({"ECG_EPOCHS": "-1"}, "ECG_EPOCHS"),
    ({"ECG_EPOCHS": "abc"}, "ECG_EPOCHS is 'abc'"),
])
def test_settings_that_cannot_work_are_refused_at_once(tmp_path, monkeypatch, settings, words):
    """In the cell after the settings: before anything is downloaded, trained or sent."""
    good = {"LEADERBOARD_SUBMIT": "exp1_long_cnn", "LEADERBOARD_TEAM": "group_7"}
    take_settings(monkeypatch, **good, ECG_WORK=str(tmp_path / "good"))
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        take_settings(monkeypatch, **{**good, "ECG_WORK": str(tmp_path / "bad"), **settings})
    assert "secret" not in str(caught.value) and not (tmp_path / "bad").exists()
