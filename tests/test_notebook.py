"""The notebook as it is committed: budgets, the module's pieces, headings, links, settings, outputs of this code."""
import ast
import os
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from run_on_real import MACHINE_PATH, NOTEBOOK, ROOT, code_cells, code_digest, load

MODULE = ROOT / "ecg_helpers.py"
NOTEBOOK_DICT = load()
CELLS = NOTEBOOK_DICT["cells"]
OUTPUTS = [output for cell in code_cells(NOTEBOOK_DICT) for output in cell["outputs"]]
with_outputs = pytest.mark.skipif(not OUTPUTS, reason="the notebook carries no outputs")

HEADINGS = [  # in this order; others may stand between them
    "Module 3 - Assignment Overview: ECG classification", "Student and Group Information", "The data set",
    "Data analysis", "Coding Task 1: Data Analysis", "Explanation task 1: Data Analysis",
    "Model", "Coding Task 2: Define your model", "Explanation Task 2: Final Model",
    "Train function", "Coding Task 3: Fill training loop", "Eval function", "Coding Task 4: Fill evaluation loop",
    "Run Training", "Coding Task 5: Combine everything to train/validate the model",
    "Coding Task 6: Run your model and adapt hyperparameters", "Baseline Model Performance Over 20 Epochs",
    "Linear Model Performance Over 20 Epochs", "Explanation Task 3: Hyperparameter",
    "Model Testing", "Coding Task 7: Make prediction for test data", "Explanation Task 4: Submissions",
    "Explanation Task 5: Reflection on Metrics",
]
TASKS = [heading for heading in HEADINGS if re.match(r"(Coding|Explanation) [Tt]ask \d: ", heading)]

CODE_OF_TASK = {  # what must stand as unfolded code under the heading of a coding task
    1: [r"h5py\.File", r'on_paper\(file\["tracings"\]', r"load_labels\(", "NAIVE"],
    2: [r"class AFNet\(nn\.Module\)", "def forward"],
    3: ["def train_loop", r"zero_grad\(\)", r"\.backward\(\)", r"optimizer\.step\(\)"],
    4: ["def eval_loop", "no_grad"],
    5: [r"split_by_patient\(", "def weighted_loss", "def classification_metrics", "for epoch in range", "train_loop",
        r"eval_loop\("],
    6: [r"RECIPE = dict\(", *[rf'run_experiment\(\s*"{name}"' for name in ("baseline", "linear", "exp1_long_cnn",
                                                                      "exp2_resnet", "exp3_ensemble")]],
    7: ["soft_pred = ", r"submission_probabilities\(", r"\.to_csv\(", r"ecg\.register_team\(", r"ecg\.submit\("],
}

COURSE_FACTS = [  # people, rules, links
    "Dave Zachariah", "Jingwei Hu", "Tianru Zhang", "David Vävinggren", "August 22, 2025", "[YOUR NAME HERE]",
    "[YOUR_TEAM_ID]", "Basic tasks", "Competitive setting", "Deliverables", "Grading", "Hardware accelerator",
    "https://colab.research.google.com/assets/colab-badge.svg", "https://canvas.kth.se/courses/54581/assignments",
    "https://www.mayoclinic.org/tests-procedures/ekg/about/pac-20384983",
    "https://www.mayoclinic.org/diseases-conditions/atrial-fibrillation/symptoms-causes/syc-20350624",
    "https://scilifelab.figshare.com/articles/dataset/CODE_dataset/15169716",
    "https://www.nature.com/articles/s41467-020-15432-4", "https://www.physionet.org/content/wfdb-python/3.4.1/",
    "https://github.com/antonior92/ecg-preprocessing", "https://www.h5py.org",
    "http://hyperion.it.uu.se:5050/leaderboard",
    "Submission note | Accuracy | F1 | AUC | AP | Submission description",
]
SETTINGS = {  # name -> a value from the environment
    "ECG_DATA": "demo", "ECG_EPOCHS": "3", "ECG_WORK": "results", "LEADERBOARD_HOST": "http://127.0.0.1:1/",
    "LEADERBOARD_TEAM": "group_7", "LEADERBOARD_SUBMIT": "exp2_resnet", "LEADERBOARD_REPLACE": "1",
}


def source(cell):
    return "".join(cell["source"])


PIECES = [cell for cell in code_cells(NOTEBOOK_DICT) if source(cell).startswith("%%helper ")]
OWN_CODE = [cell for cell in code_cells(NOTEBOOK_DICT) if not source(cell).startswith("%%helper ")]
TEXTS = [source(cell) for cell in CELLS if cell["cell_type"] == "markdown"]
FOUND = [(place, heading.strip()) for place, cell in enumerate(CELLS) if cell["cell_type"] == "markdown"
         for heading in re.findall(r"^#{1,6} +(.*)$", source(cell), flags=re.M)]


def python_of(cell):
    """A code cell as plain Python: without its cell magic, line magics as `pass`."""
    text = re.sub(r"^%%.*\n", "\n", source(cell))
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", text, flags=re.M)


# ---- Budgets ----
def test_one_sitting():
    assert len(CELLS) <= 90 and len(PIECES) <= 21
    assert sum(len(text.split()) for text in TEXTS) <= 6000, "words"
    assert sum(len(source(cell).splitlines()) for cell in OWN_CODE) <= 950, "lines of code besides the pieces"


def test_lines_fit_a_screen():
    """Markdown in a cell's f-triple-quotes and in forms may be as long as in text cells."""
    texts = [re.sub(r'f""".*?"""', lambda text: "\n" * text[0].count("\n"), source(cell), flags=re.S) for cell in OWN_CODE]
    lines = [line for text in texts for line in text.splitlines() if not line.startswith("#@markdown")]
    assert not [line for line in lines if len(line) > 120]


def test_small_helper_module():
    text = MODULE.read_text(encoding="utf-8")
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(text.splitlines()) <= 1050 and len(functions) <= 75
    long = {node.name: node.end_lineno - node.lineno + 1 for node in functions if isinstance(node, ast.FunctionDef)}
    assert not {name: lines for name, lines in long.items() if lines > 50}


def test_python_3_10_reads_every_cell():
    for cell in code_cells(NOTEBOOK_DICT):
        ast.parse(python_of(cell), feature_version=(3, 10))


# ---- The module's pieces ----
def test_pieces_are_the_module():
    """Byte for byte; titles are those of the module's sections; each piece fits two screens."""
    pieces = [source(cell).split("\n", 1) for cell in PIECES]
    joined = "\n\n\n".join(text.strip("\n") for _, text in pieces) + "\n"
    assert joined.encode() == MODULE.read_bytes(), "python tests/tools/sync_helpers.py shows where they differ"
    for line, text in pieces[1:]:
        assert text.startswith(f"# ==== {line.removeprefix('%%helper ')} ====\n"), line
    assert not [line for line, text in pieces if len(text.splitlines()) + 1 > 80], "at most 80 lines"


# ---- The outline ----
def test_a_grader_finds_every_part():
    assert [heading for _, heading in FOUND if heading in HEADINGS] == HEADINGS
    assert [heading for _, heading in FOUND if re.match(r"(Coding|Explanation) task", heading, re.I)] == TASKS


@pytest.mark.parametrize("heading", TASKS)
def test_a_task_begins_with_its_prompt(heading):
    text = next(text for text in TEXTS if f"### {heading}\n" in text).split(f"### {heading}\n")[1]
    assert re.match(r"\s*\*[^*\n]+\*\n", text), f"{heading}: the task's question in one line of italics is missing"


@pytest.mark.parametrize("number", CODE_OF_TASK)
def test_code_of_a_task_stands_under_its_heading(number):
    """Unfolded, before the next task's heading."""
    heading = next(task for task in TASKS if task.startswith(f"Coding Task {number}"))
    after = TASKS[TASKS.index(heading) + 1]
    start, end = (next(place for place, text in FOUND if text == wanted) for wanted in (heading, after))
    cells = [cell for cell in CELLS[start:end] if cell["cell_type"] == "code"]
    code = "\n".join(source(cell) for cell in cells if "folded" not in cell["metadata"].get("tags", []))
    assert not [pattern for pattern in CODE_OF_TASK[number] if not re.search(pattern, code)]


def test_links_within_the_notebook():
    """Jupyter and Colab make anchors of headings: blanks become dashes. Every task is linked."""
    anchors = {heading.replace(" ", "-") for _, heading in FOUND}
    links = {unquote(link) for text in TEXTS for link in re.findall(r"\]\(#([^)]+)\)", text)}
    assert links <= anchors and {task.replace(" ", "-") for task in TASKS} <= links


@pytest.mark.parametrize("fact", COURSE_FACTS)
def test_people_rules_and_links(fact):
    assert any(fact in source(cell) for cell in CELLS)


def test_folded_cells_are_folded_everywhere():
    """In Colab, in Jupyter, and for tools that read the tag."""
    for cell in code_cells(NOTEBOOK_DICT):
        data = cell["metadata"]
        marks = {data.get("cellView") == "form", data.get("jupyter", {}).get("source_hidden", False),
                 "folded" in data.get("tags", [])}
        assert len(marks) == 1, source(cell)[:80]


# ---- Code ----
def test_settings_are_form_fields_that_the_environment_overrides(monkeypatch):
    text = next(source(cell) for cell in OWN_CODE if source(cell).startswith("#@title Settings"))
    fields = re.findall(r"^(\w+) = .*#@param", text, flags=re.M)
    assert sorted(fields) == sorted([*SETTINGS, "DRIVE_FOLDER"])
    assert "PASSWORD" not in text
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    exec(text, defaults := {"os": os, "Path": Path})
    assert (defaults["ECG_DATA"], defaults["ECG_EPOCHS"], defaults["LEADERBOARD_SUBMIT"]) == ("course", 0, "")
    for name, value in SETTINGS.items():
        monkeypatch.setenv(name, value)
    exec(text, given := {"os": os, "Path": Path})
    assert [given[name] for name in SETTINGS] == [type(given[name])(value) for name, value in SETTINGS.items()]


def test_there_is_one_sigmoid():
    """Of the module; the self-check of Coding Tasks 3 and 4 compares with torch's."""
    cells = []
    for cell in code_cells(NOTEBOOK_DICT):
        calls = [node.func for node in ast.walk(ast.parse(python_of(cell))) if isinstance(node, ast.Call)]
        cells += [cell for call in calls if re.search(r"(?i)\b(sigmoid|expit|softmax)$", ast.unparse(call))]
    by_module, by_check = map(source, cells)
    assert "def to_probability" in by_module and "Coding Task 3 or 4" in by_check


def test_the_test_labels_are_never_read():
    named = [cell for cell in CELLS if "test_labels" in source(cell)]
    assert all("def make_demo_codesubset" in source(cell) for cell in named), "only the demo writes them"


def test_no_paths_of_a_machine_and_no_credentials():
    for cell in CELLS:
        text = source(cell).replace("/content/drive", "")  # Colab's, as an example
        assert not re.search(MACHINE_PATH, text), text[:80]
        assert not re.search(r"://[^/\s:@]+:[^/\s@]+@|(?i:password)\"?\]? *= *[\"']\w", text), text[:80]


# ---- Outputs ----
@with_outputs
def test_outputs_belong_to_this_code():
    assert NOTEBOOK_DICT["metadata"].get("outputs_of") == code_digest(NOTEBOOK_DICT), "run tests/tools/run_on_real.py"
    assert NOTEBOOK.stat().st_size <= 4_000_000
    assert 18 <= sum("image/png" in output.get("data", {}) for output in OUTPUTS) <= 24, "figures"


@with_outputs
def test_outputs_hold_no_errors_warnings_widgets_or_paths():
    for output in OUTPUTS:
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        data = output.get("data", {})
        assert not any("widget" in kind for kind in data)
        texts = [output.get("text", ""), *[value for kind, value in data.items() if not kind.startswith("image/")]]
        assert not re.search(MACHINE_PATH, "\n".join("".join(text) for text in texts))


# ---- Other files ----
def test_requirements_are_lower_bounds():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line and not re.fullmatch(r"#.*|[\w-]+>=[\d.]+", line)]


def test_the_readme_names_files_that_are_there():
    text = re.sub(r"\[[^]]*\]", "", (ROOT / "README.md").read_text(encoding="utf-8"))  # without the links' words
    named = set(re.findall(r"(?<![\w./-])(?:tests/[\w./-]+|[\w.-]+\.(?:py|ipynb|md)|requirements\.txt)", text))
    assert not [name for name in named if not (ROOT / name).exists()]
