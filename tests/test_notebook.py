"""The notebook as it is committed: headings, the module's pieces, lengths, words, outputs that fit the code."""
import ast
import copy
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from embed_helpers import embed
from notebook_source import (
    HELPER, MODULE, NOTEBOOK, ROOT, as_text, code_cells, code_digest, definitions, helper_cells, join_pieces, load, save,
    source,
)
from run_on_real import MACHINE_PATH, MAX_BYTES

SYNC = "python tests/tools/embed_helpers.py"

HEADINGS = [  # level and text, in order; others may stand between them
    (1, "Module 3 - Assignment Overview: ECG classification"),
    (2, "Student and Group Information"),
    (3, "Basic Tasks"),
    (3, "Competitive setting"),
    (3, "Deliverables"),
    (3, "Grading"),
    (3, "GPU Acceleration"),
    (2, "The data set"),
    (2, "Data analysis"),
    (3, "Coding Task 1: Data Analysis"),
    (3, "Explanation task 1: Data Analysis"),
    (2, "Model"),
    (3, "Coding Task 2: Define your model"),
    (3, "Explanation Task 2: Final Model"),
    (2, "Train function"),
    (3, "Coding Task 3: Fill training loop"),
    (2, "Eval function"),
    (3, "Coding Task 4: Fill evaluation loop"),
    (2, "Run Training"),
    (3, "Coding Task 5: Combine everything to train/validate the model"),
    (3, "Coding Task 6: Run your model and adapt hyperparameters"),
    (3, "Explanation Task 3: Hyperparameter"),
    (2, "Baseline Model Performance Over 20 Epochs"),
    (2, "Linear Model Performance Over 20 Epochs"),
    (2, "Model Testing"),
    (3, "Coding Task 7: Make prediction for test data"),
    (3, "Explanation Task 4: Submissions"),
    (3, "Explanation Task 5: Reflection on Metrics"),
    (2, "Conclusions and limits"),
    (2, "Ready to hand in?"),
]
TASK = re.compile(r"(Coding|Explanation) task \d: ", re.IGNORECASE)

CODE_OF_TASK = {  # what must stand as code under the heading of a coding task
    1: ["TRAIN_H5", r"draw_ecg\(", "load_labels", "naive|NAIVE"],
    2: ["class LinearModel", r"class Model\(", "class AFNet"],
    3: ["def train_loop", r"\.backward\(\)", r"\.step\("],
    4: ["def eval_loop", r"no_grad|inference_mode"],
    5: ["def split_by_patient", "def classification_metrics", "def fit", "def weighted_loss", "def make_scheduler",
        "def train_model"],
    6: ["RECIPE = ", r"register\(\s*\"exp1_long_cnn\"", r"register\(\s*\"exp2_resnet\"", r"register\(\s*\"exp3_ensemble\""],
    7: ["soft_pred = ", "TEST_LOGITS", r"\.csv", "predictions"],
}

COURSE_FACTS = [  # links, people and rules of the assignment
    "https://canvas.kth.se/courses/54581/assignments", "August 22, 2025", "Dave Zachariah", "Jingwei Hu", "Tianru Zhang",
    "David Vävinggren", "[YOUR NAME HERE]", "[YOUR_TEAM_ID]",
    "https://www.mayoclinic.org/tests-procedures/ekg/about/pac-20384983",
    "https://www.mayoclinic.org/diseases-conditions/atrial-fibrillation/symptoms-causes/syc-20350624",
    "https://scilifelab.figshare.com/articles/dataset/CODE_dataset/15169716",
    "https://www.nature.com/articles/s41467-020-15432-4", "https://www.physionet.org/content/wfdb-python/3.4.1/",
    "https://github.com/antonior92/ecg-preprocessing", "https://www.h5py.org", "http://hyperion.it.uu.se:5050/leaderboard",
    "Submission note | Accuracy | F1 | AUC | AP | Submission description", "PTB-XL", "CC BY 4.0",
]
SETTINGS = ["ECG_DATA", "ECG_EPOCHS", "ECG_WORK", "ECG_OWN", "LEADERBOARD_HOST", "LEADERBOARD_TEAM", "LEADERBOARD_SUBMIT"]


@pytest.fixture(scope="module")
def notebook():
    return load()


def texts(notebook):
    """The sources of the text cells."""
    return [source(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]


def is_helper(cell):
    return cell["cell_type"] == "code" and bool(HELPER.match(source(cell)))


def other_code(notebook):
    """The code cells that carry no piece of the module."""
    return [cell for cell in code_cells(notebook) if not is_helper(cell)]


def first_line(cell):
    """A cell's first lines, to find it by."""
    return " / ".join(source(cell).splitlines()[:2])[:90]


def headings_of(text):
    """(level, heading) of a text cell; a fenced block has none."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [(len(marks), heading.strip()) for marks, heading in re.findall(r"^(#{1,6}) +(.*)$", text, flags=re.M)]


def headings(notebook):
    """(position of the cell, level, heading), in order."""
    return [(position, *heading) for position, cell in enumerate(notebook["cells"]) if cell["cell_type"] == "markdown"
            for heading in headings_of(source(cell))]


def section(notebook, wanted):
    """The cells from this heading's to the next heading of the third level or above."""
    found = headings(notebook)
    start = next(position for position, _, heading in found if heading == wanted)
    ends = [position for position, level, heading in found if level <= 3 and position > start]
    return notebook["cells"][start:min(ends, default=None)]


def python_of(cell):
    """A code cell as plain Python: without its cell magic, line magics as `pass`."""
    text = HELPER.sub("\n", source(cell), count=1)
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", text, flags=re.M)


# ---- The outline ---------------------------------------------------------------------------------
def test_headings_are_complete_and_in_order(notebook):
    """A grader finds every part: none is missing, none comes earlier or later, each on its level."""
    wanted = {heading for _, heading in HEADINGS}
    assert [(level, heading) for _, level, heading in headings(notebook) if heading in wanted] == HEADINGS


def test_headings_are_unique_and_no_other_tasks_exist(notebook):
    found = [heading for _, _, heading in headings(notebook)]
    assert not {heading for heading in found if found.count(heading) > 1}, "a link to it would be ambiguous"
    tasks = [heading for heading in found if TASK.match(heading)]
    assert tasks == [heading for _, heading in HEADINGS if TASK.match(heading)]


def test_nothing_stands_between_tasks_5_and_6(notebook):
    found = [heading for _, level, heading in headings(notebook) if level <= 3]
    five = next(i for i, heading in enumerate(found) if heading.startswith("Coding Task 5:"))
    assert found[five + 1].startswith("Coding Task 6:"), found[five + 1]


@pytest.mark.parametrize("number", CODE_OF_TASK)
def test_coding_task_has_its_code_under_its_heading(notebook, number):
    """Readable before anything ran: as code in unfolded cells between this heading and the next."""
    heading = next(text for _, text in HEADINGS if text.startswith(f"Coding Task {number}:"))
    cells = [cell for cell in section(notebook, heading) if cell["cell_type"] == "code" and "#@title" not in source(cell)]
    code = "\n".join(map(source, cells))
    missing = [pattern for pattern in CODE_OF_TASK[number] if not re.search(pattern, code)]
    assert not missing, f"not under '{heading}': {missing}"


def test_every_task_says_its_question_in_one_line(notebook):
    for _, heading in HEADINGS:
        if TASK.match(heading):
            text = source(section(notebook, heading)[0]).split(heading, 1)[1].strip()
            assert re.match(r"\*(Task|Question): [^\n]+\*$", text, flags=re.M), f"{heading}: {text[:60]}"


def test_every_explanation_has_a_text_and_this_runs_numbers(notebook):
    """A text cell that a student edits, and below it a short code cell that shows what this run found."""
    for _, heading in HEADINGS:
        if heading.startswith("Explanation"):
            first, *rest = section(notebook, heading)
            assert len(source(first).split()) > 60, heading
            assert any(cell["cell_type"] == "code" and re.search(r"\bsay\(", source(cell)) for cell in rest), heading


def test_contents_links_resolve(notebook):
    """Links inside the notebook: Jupyter and Colab make anchors of headings, blanks become dashes."""
    anchors = {heading.replace(" ", "-") for _, _, heading in headings(notebook)}
    links = [unquote(link) for text in texts(notebook) for link in re.findall(r"\]\(#((?:[^()]|\([^()]*\))*)\)", text)]
    assert not set(links) - anchors, f"no such heading: {set(links) - anchors}"
    assert len(links) >= 15


def test_contents_list_leads_to_every_task(notebook):
    """The contents stand before the first section, and link each task's heading or the section it stands in."""
    place, text = next((i, source(cell)) for i, cell in enumerate(notebook["cells"]) if "## Contents" in source(cell))
    assert place <= 5
    above = ""
    for level, heading in HEADINGS:
        above = heading if level == 2 else above
        if TASK.match(heading):
            links = [f"](#{name.replace(' ', '-')})" for name in (heading, above)]
            assert any(link in unquote(text) for link in links), f"no link to {heading} or {above}"
            kind, number = re.match(r"(Coding|Explanation) [Tt]ask (\d)", heading).groups()
            assert re.search(rf"{kind}\D[^|]*{number}", text), f"{kind} {number} is not named"


@pytest.mark.parametrize("fact", COURSE_FACTS)
def test_links_people_and_rules_are_there(notebook, fact):
    assert any(fact in source(cell) for cell in notebook["cells"])


def test_settings_are_form_fields_that_the_environment_overrides(notebook):
    cell = next(cell for cell in other_code(notebook) if source(cell).startswith("#@title Settings"))
    for name in SETTINGS:
        assert re.search(rf"^{name} = .*#@param", source(cell), flags=re.M), f"{name} is no form field"
        assert f'os.environ.get("{name}")' in source(cell), f"{name}: the environment does not override it"
    assert not re.search(r"PASSWORD.*#@param", "".join(map(source, code_cells(notebook)))), "a saved form keeps it"


# ---- The module's pieces -------------------------------------------------------------------------
def test_pieces_put_together_are_the_module():
    assert embed(write=False) == [], f"these pieces differ from ecg_helpers.py; run: {SYNC}"
    pieces = [piece for *_, piece in helper_cells(load())]
    assert join_pieces(pieces).encode() == MODULE.read_bytes(), f"run: {SYNC}"


def test_pieces_are_short(notebook):
    long = [f"{number} {title}: {piece.count(chr(10)) + 1} lines" for _, number, title, piece in helper_cells(notebook)
            if piece.strip("\n").count("\n") + 1 > 80]
    assert not long, f"more than 80 lines; cut them by a line '# ---- title ----': {long}"


# ---- Lengths and order ---------------------------------------------------------------------------
def test_code_cells_are_short(notebook):
    long = [f"{first_line(cell)}: {len(source(cell).splitlines())}" for cell in other_code(notebook)
            if len(source(cell).splitlines()) > 40]
    assert not long, f"more than 40 lines: {long}"


def test_code_lines_fit_a_screen(notebook):
    wide = [line for cell in other_code(notebook) for line in source(cell).splitlines()
            if len(line) > 120 and not line.startswith("#@markdown")]
    assert not wide, "wider than 120 characters:\n" + "\n".join(wide)


def test_at_most_130_cells_besides_the_pieces(notebook):
    assert len(notebook["cells"]) - len(helper_cells(notebook)) <= 130


def test_more_text_cells_than_code_cells(notebook):
    assert len(texts(notebook)) > len(other_code(notebook))


def test_a_text_stands_before_every_group_of_code_cells(notebook):
    """After a text: pieces of the module, as many as belong together, and at most two other code cells."""
    assert notebook["cells"][0]["cell_type"] == "markdown"
    group = []
    for cell in notebook["cells"]:
        group = [] if cell["cell_type"] == "markdown" else [*group, cell] if not is_helper(cell) else group
        assert len(group) <= 2, f"the third code cell without a text between: {first_line(cell)}"
        assert not (group and is_helper(cell)), f"a piece of the module after code, without a text between: {first_line(cell)}"


def test_no_text_cell_is_shorter_than_25_words(notebook):
    short = [text for text in texts(notebook) if len(text.split()) < 25]
    assert not short, f"merge with a neighbour: {short}"


def test_every_figure_has_a_title_that_marks_demo_data(notebook):
    """`title(...)` adds the mark; a figure with several panels has one for all."""
    for cell in other_code(notebook):
        if re.search(r"plt\.show\(|(?<!def )draw_ecg\(", source(cell)) and "def draw_ecg" not in source(cell):
            assert re.search(r"(?<![\w.])title\(", source(cell)), f"a figure without title(...): {first_line(cell)}"


def test_folded_cells_are_marked_for_every_reader(notebook):
    """Colab's form view, Jupyter's hidden source, and the tag by which an HTML for reading leaves them out."""
    for cell in code_cells(notebook):
        text, meta = HELPER.sub("", source(cell), count=1), cell["metadata"]
        folded = text.startswith("#@title")
        assert (meta.get("cellView") == "form") == folded, first_line(cell)
        assert meta.get("jupyter", {}).get("source_hidden", False) == folded, first_line(cell)
        assert ("folded" in meta.get("tags", [])) == folded, first_line(cell)
    titles = " ".join(source(cell) for cell in code_cells(notebook) if "folded" in cell["metadata"].get("tags", []))
    for plumbing in ("def download", "def make_demo_codesubset", "def register_team", "def _extract"):
        assert plumbing in titles, f"{plumbing} is not folded"


# ---- Code ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", [(3, minor) for minor in range(10, 14)], ids=lambda v: f"3.{v[1]}")
def test_cells_parse_as(notebook, version):
    for cell in code_cells(notebook):
        ast.parse(python_of(cell), feature_version=version)


def newer_f_strings(text):
    """f-strings that only Python 3.12 and later read: their quote, a backslash or a line break inside of { }."""
    found, open_strings = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_END":
            open_strings.pop()
        elif kind == "FSTRING_START":
            quote = token.string.lstrip("rRfFbBuU")
            found += [token.line for outer in open_strings if quote.startswith(outer) or outer.startswith(quote)]
            open_strings.append(quote)
        elif open_strings and kind == "STRING":
            quotes = ('"', "'")[token.string.lstrip("rRbBuU")[0] == "'"]
            found += [token.line for outer in open_strings if outer == quotes or outer in token.string or "\\" in token.string]
        elif open_strings and kind in ("COMMENT", "NL") and any(len(outer) == 1 for outer in open_strings):
            found.append(token.line)
    return found


@pytest.mark.skipif(sys.version_info < (3, 12), reason="older Pythons refuse such f-strings when they parse")
def test_f_strings_are_those_of_python_3_10(notebook):
    assert newer_f_strings('f"{a["b"]}"\n') and newer_f_strings("f'{chr(10).join('x')}'\n")
    assert not newer_f_strings('f"{a[\'b\']:{width}} {f(1)}"\nf"""{a["b"]}"""\n')
    found = [line for cell in code_cells(notebook) for line in newer_f_strings(python_of(cell) + "\n")]
    assert not found, found


def shown_names(tree):
    """Names in the arguments of calls that show or write something."""
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) in (
                "print", "say", "warn", "display", "write_json", "write_text", "Markdown"):
            for node in ast.walk(ast.Module([ast.Expr(arg) for arg in [*call.args, *(k.value for k in call.keywords)]], [])):
                if isinstance(node, ast.Name):
                    yield node.id


def written_passwords(tree):
    """Assignments of a text to a name that means a password."""
    for node in ast.walk(tree):
        pairs = []
        if isinstance(node, ast.Assign):
            pairs = [(getattr(target, "id", ""), node.value) for target in node.targets]
        if isinstance(node, ast.Call):
            pairs = [(keyword.arg or "", keyword.value) for keyword in node.keywords]
        yield from (name for name, value in pairs if "password" in name.lower()
                    and isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value)


def test_no_password_is_written_or_printed(notebook):
    assert set(shown_names(ast.parse('print(f"{password}")'))) == {"password"}
    assert list(written_passwords(ast.parse('PASSWORD = "x"; f(password="y")'))) == ["PASSWORD", "password"]
    for cell in code_cells(notebook):
        tree = ast.parse(python_of(cell))
        shown = [name for name in shown_names(tree) if "password" in name.lower()]
        assert not shown and not list(written_passwords(tree)), first_line(cell)


def test_sync_removes_outputs_of_other_code(notebook, tmp_path):
    """A student's edit of any cell: the outputs that were there belong to other code. Those of this code stay."""
    for digest, left in (("another", False), (code_digest(notebook), True)):
        copied = copy.deepcopy(notebook)
        copied["metadata"]["outputs_of"] = digest
        code_cells(copied)[0]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["1\n"]}]
        save(copied, tmp_path / "notebook.ipynb")
        assert embed(tmp_path / "notebook.ipynb") == []
        assert bool(code_cells(load(tmp_path / "notebook.ipynb"))[0]["outputs"]) == left


# ---- Outputs -------------------------------------------------------------------------------------
def test_outputs_belong_to_this_code(notebook):
    """Either no output at all, or those of one whole run of exactly these code cells."""
    cells = code_cells(notebook)
    if not any(cell["outputs"] for cell in cells):
        assert "outputs_of" not in notebook["metadata"]
        assert all(cell["execution_count"] is None for cell in cells)
        return
    assert notebook["metadata"].get("outputs_of") == code_digest(notebook), (
        "the outputs belong to other code; make them again: python tests/tools/run_on_real.py PATH")
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "not one run of all cells"
    assert "DEMO DATA" not in as_text({"outputs": [cell["outputs"] for cell in cells]})


def test_outputs_are_clean(notebook):
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            assert output.get("name") != "stderr" and output["output_type"] != "error", first_line(cell)
            assert not any("widget" in kind for kind in output.get("data", {})), first_line(cell)


def test_file_is_small_and_names_no_machine(notebook):
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text == as_text(notebook), "not in the form in which tests/tools/notebook_source.py saves it"
    assert len(text.encode()) <= MAX_BYTES
    assert "widgets" not in notebook["metadata"]
    colab = "/content/drive"  # where Colab mounts Drive: the same for everybody
    lines = [line for line in text.replace(colab, "").splitlines() if '"image/png"' not in line]
    assert MACHINE_PATH.search("see /home/ann/x") and not MACHINE_PATH.search("https://a.b/home/x")
    assert not [line[:200] for line in lines if MACHINE_PATH.search(line)]


# ---- Words ---------------------------------------------------------------------------------------
# How it must not be put -> the field's term. Only phrases that cannot be meant otherwise; upper and lower case alike.
TERMS = {
    r"\bknobs?\b": "settings",
    r"\bruns? without a person\b": "runs headless",
    r"\btrainings\b|\b(?:a|one|this|each|every|finished|edited) training(?=[.,;:!?)]| (?:is|was|that|which|takes|ends|restarts)\b)":
        "a training run",
    r"\banew\b": "again; restarts; rebuilt",
    r"\brests? of (?:\w+ )?(?:wander|drift|interference)\b": "residual baseline wander",
    r"\bhum\b|\bmains\b": "power-line interference",
    r"\bjumps? of an electrode\b": "electrode-motion artefacts",
    r"\bmuscles\b": "EMG noise",
    r"\bdead leads?\b": "a flat channel (lead off)",
    r"\bflattens the line\b|\bline is level\b": "removes baseline wander",
    r"\bfilters? lets? through\b": "magnitude response",
    r"\bpower density\b": "power spectral density",
    r"\bits own size\b|\bsize of an exam\b|\bsize of the exam\b": "amplitude-normalised; amplitude",
    r"\blimited softly\b": "soft-clipped (tanh)",
    r"\bfills the scale\b": "dominates the amplitude estimate",
    r"\bshrugs? off\b": "a clinically irrelevant change",
    r"\bno heart (?:produces|makes)\b": "non-physiological ECGs",
    r"\bmiddle of (?:its|the) class\b": "closest to the class median",
    r"\buneven(?:ly)?\b|\blooks even\b": "irregular, regular",
    r"\bmean change of the RR\b": "normalised mean absolute difference of successive RR intervals",
    r"\bshaded stretch\b": "shaded window",
    r"\ba coin\b|\bcoin (?:toss|flip)\b": "random classifier",
    r"\bright calls?\b|\bcalled AF\b": "correct predictions, predicted AF",
    r"\bweighed to\b": "reweighted to 50 % prevalence",
    r"\bshare of AF\b(?! exams)|\bAF share\b": "prevalence",  # "share of AF exams above ..." is a recall
    r"\ba little too good\b": "optimistically biased",
    r"\bmeets other weights\b": "not shift-invariant",
    r"\bby heart\b": "memorises the training set, overfits",
    r"\bwhole exam looks like\b": "using global context",
    r"\bsees \(s\)": "receptive field (s)",
    r"\bMFLOPs? an exam\b": "MFLOPs per exam",
    r"\bwait for Python\b": "no host-device synchronisation per batch",
    r"\btoo sure of itself\b|\btoo cautious\b": "overconfident, underconfident",
    r"\btoo large and off-centre\b": "overconfident and biased logits",
    r"\bstretched by\b": "rescaled by the slope",
    r"\bsteadier\b": "lower variance",
    r"\bfrom fold to fold\b": "between-fold variability",
    r"\bat our decision\b|\bwhere to decide\b": "choice of the operating point",
    r"\bprobabilities honest\b|\bhonest probabilit": "calibration",
    r"\bwhat the time bought\b": "validation AUROC against training time",
    r"\bthe crowd\b": "ensemble",
    r"(?<!training )(?<!same )\bthe recipe\b": "the training recipe",
    r"\bthe original way\b": "the course's original solution; reference implementation",
    r"\bthe threshold becomes 0\.5\b": "the operating point is p = 0.5",
    r"\bour tests\b|\bthe project's scripts\b": "we (a hand-in speaks as its student)",
}
# Sentences that define a term for a beginner may use the plain words.
ALLOWED = ["| **prevalence** | share of AF among the exams"]


def wrong_terms(text):
    """(words found, term to use, what surrounds them) of each wrong term in a prose text."""
    for allowed in ALLOWED:
        text = text.replace(allowed, "")
    text = re.sub(r"`[^`\n]*`|https?://\S+", " ", text)  # names of the code and addresses are no prose
    text = re.sub(r"\s+", " ", text)
    return [(found[0], term, text[max(0, found.start() - 40):found.end() + 20])
            for pattern, term in TERMS.items() for found in re.finditer(pattern, text, flags=re.IGNORECASE)]


def prose_of_code(text):
    """Comments and texts of Python code: docstrings, messages, labels of figures."""
    comments = [token.string.lstrip("#") for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT]
    strings = [node.value for node in ast.walk(ast.parse(text))
               if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join([" ".join(comments), *strings])


@pytest.mark.parametrize("wrong, right", [
    ("an edited training restarts", "an edited training run restarts"), ("mains hum", "the human, the remains"),
    ("built anew", "a new one"), ("the share of AF", "the prevalence"), ("called AF", "the function is called after it"),
    ("what a coin\ngets", "what a coincidence"), ("3 MFLOP an exam", "3 MFLOPs per exam"), ("it learns by heart", "the heart"),
    ("the recipe", "the training recipe"),
])
def test_wrong_terms_are_found(wrong, right):
    assert wrong_terms(wrong) and not wrong_terms(right)
    assert wrong_terms(prose_of_code(f"x = 1  # {wrong.splitlines()[0]}\n")) or "\n" in wrong
    assert wrong_terms(prose_of_code(f"def f():\n    '''{wrong}'''\n"))


def test_text_cells_use_the_terms_of_the_field(notebook):
    found = [(*words, first_line(cell)) for cell in notebook["cells"] if cell["cell_type"] == "markdown"
             for words in wrong_terms(source(cell))]
    assert not found, "\n".join(map(str, found))


def test_code_cells_use_the_terms_of_the_field(notebook):
    """Comments, docstrings, messages, labels."""
    found = [(*words, first_line(cell)) for cell in other_code(notebook)
             for words in wrong_terms(prose_of_code(python_of(cell) + "\n"))]
    assert not found, "\n".join(map(str, found))


@pytest.mark.parametrize("name", ["ecg_helpers.py", "README.md"])
def test_module_and_readme_use_the_terms_of_the_field(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    found = wrong_terms(prose_of_code(text) if name.endswith(".py") else text)
    assert not found, "\n".join(map(str, found))


# ---- The notebook's own functions ----------------------------------------------------------------
def test_augmentation_keeps_what_it_must():
    """Same seed, same exams; the input stays as it is; nothing is added where nothing was recorded."""
    names = ("augment_gain_shift_noise", "add_disturbances", "shorten", "augment_exams")
    space = definitions(*names)
    x = 0.2 * torch.randn(16, 4096, 8, generator=torch.Generator().manual_seed(0))
    x[:, :500] = 0
    before = x.clone()
    for name in names:
        torch.manual_seed(1)
        first = space[name](x)
        torch.manual_seed(1)
        assert torch.equal(space[name](x), first) and first.shape == x.shape and first.dtype == x.dtype
        assert torch.isfinite(first).all() and not torch.equal(first, x) and torch.equal(x, before)
    assert not space["add_disturbances"](x)[:, :500].any()
    cut = (space["shorten"](torch.ones(200, 4096, 1)) == 0).sum(dim=1)
    assert cut.min() < 200 and 1000 < cut.max() <= 1200


def test_final_network_minds_no_gain_and_no_bad_lead():
    """The same logit for twice the gain; a lead of 100 mV noise changes the amplitude of the others by little; zeros are no fault."""
    torch.manual_seed(0)
    net = definitions("AFNet")["AFNet"]().eval()
    seen = []
    net.features.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = 0.2 * torch.randn(4, 4096, 8)
    with torch.no_grad():
        assert torch.allclose(net(x), net(2 * x), atol=0.05) and torch.isfinite(net(torch.zeros(1, 4096, 8))).all()
        x[:, :, 5] = 100 * torch.randn(4, 4096)
        net(x)
    leads = seen[-1].squeeze(2).std(dim=2)  # (exams, leads)
    assert 0.15 < leads[:, :5].min() and leads.max() <= 2.01


def test_shorter_receptive_fields_keep_depth_and_widths():
    """`wide_stages` changes kernels only; the final network spans several beats, the shortest less than a QRS complex."""
    space = definitions("AFNet", "receptive_field")
    nets = {k: space["AFNet"](residual=False, wide_stages=k) for k in (0, 1, 2, 3, 5)}
    fields = [space["receptive_field"](net) / 400 for net in nets.values()]
    assert fields == sorted(fields) and fields[0] < 0.1 and fields[-1] > 5
    depth = {tuple(type(layer).__name__ for layer in net.modules()) for net in nets.values()}
    widths = {tuple(tuple(p.shape[:2]) for p in net.parameters()) for net in nets.values()}
    assert len(depth) == len(widths) == 1


def test_nothing_else_at_the_top_level():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    top = {Path(name).parts[0] for name in tracked.stdout.splitlines()}
    assert top <= {"assignment_ecg_classification.ipynb", "ecg_helpers.py", "requirements.txt", "README.md", "tests",
                   ".gitignore", ".ci"}
