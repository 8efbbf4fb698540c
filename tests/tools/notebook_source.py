"""The one way to the notebook's definitions and its training recipe, for tests and studies.

    space = definitions("AFNet", "RECIPE", "FINAL_RATE")
    model = space["AFNet"]()

Nothing of the notebook is run but what is asked for, and what that needs: functions, classes, imports and
plain constants. What the notebook computes (labels, tracings, the device) is given by the caller.
"""

import ast
import builtins
import dis
import hashlib
import importlib
import json
import linecache
import os
import re
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "assignment_ecg_classification.ipynb"
MODULE = ROOT / "ecg_helpers.py"

HELPER = re.compile(r"%%helper +(\d+) *(.*)\n")  # first line of a cell that carries a piece of the module
MARKERS = ("# ---- ", "#@title ")  # a line of the module that starts a piece
PLAIN_CALLS = {
    "dict",
    "list",
    "tuple",
    "set",
    "frozenset",
    "range",
    "len",
    "int",
    "float",
    "str",
    "min",
    "max",
    "sum",
    "sorted",
    "zip",
    "enumerate",
    "slice",
    "partial",
    "namedtuple",
    "Path",
}
PLAIN_METHODS = {"items", "keys", "values", "format", "join", "split"}

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


# ---- The file ------------------------------------------------------------------------------------
def load(path=NOTEBOOK):
    """The notebook as a dict."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def save(notebook, path=NOTEBOOK):
    """Write the notebook, whole or not at all, in the committed form."""
    part = Path(path).with_suffix(".part")
    part.write_text(as_text(notebook), encoding="utf-8")
    os.replace(part, path)


def as_text(notebook):
    """The text of the notebook's file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def source(cell):
    """Text of a cell, however the file stores it."""
    return "".join(cell["source"])


def code_cells(notebook=None):
    """The code cells, in order (dicts of `notebook` itself)."""
    notebook = load() if notebook is None else notebook
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_digest(notebook=None):
    """SHA-256 (hex) of all code cells' sources: which code made these outputs?"""
    text = "\n\n".join(source(cell) for cell in code_cells(notebook))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def clear_outputs(notebook):
    """Remove all outputs, execution counts, and the digest of the code that made them."""
    for cell in code_cells(notebook):
        cell["outputs"] = []
        cell["execution_count"] = None
    notebook["metadata"].pop("outputs_of", None)


# ---- The module's pieces -------------------------------------------------------------------------
def helper_pieces(text=None):
    """Cut the module's text at its marker lines: list of (title, text), in order.

    The pieces joined by two blank lines are the module, byte for byte; ValueError where they are not.
    """
    text = MODULE.read_text(encoding="utf-8") if text is None else text
    parts = [[]]
    for line in text.splitlines():
        if line.startswith(MARKERS):
            parts.append([])
        parts[-1].append(line)
    pieces = ["\n".join(lines).strip("\n") for lines in parts]
    if join_pieces(pieces) != text:
        odd = first_difference(text, join_pieces(pieces))
        raise ValueError(
            f"line {odd} of the module: a line starting with '# ---- ' or '#@title ' needs exactly two "
            "blank lines before it, and the file ends with one line break"
        )
    return [(piece_title(piece), piece) for piece in pieces]


def join_pieces(pieces):
    """The module's text from its pieces."""
    return "\n\n\n".join(piece.strip("\n") for piece in pieces) + "\n"


def first_difference(text, other):
    """Number of the first line in which two texts differ."""
    lines, others = text.split("\n"), other.split("\n")
    same = 0
    while same < min(len(lines), len(others)) and lines[same] == others[same]:
        same += 1
    return same + 1


def piece_title(piece):
    """The marker line without its decoration; the first piece, which has none, is named by its content."""
    first = piece.split("\n", 1)[0]
    if not first.startswith(MARKERS):
        return "Imports and small tools" if re.search("^def ", piece, flags=re.M) else "Imports and constants"
    for marker in MARKERS:
        first = first.removeprefix(marker)
    without_form = re.sub(r"\{.*\}", "", first)
    return without_form.rstrip("- ").strip()


def helper_cells(notebook):
    """The cells that carry a piece of the module: list of (position, number, title, text of the piece)."""
    found = []
    for position, cell in enumerate(notebook["cells"]):
        head = HELPER.match(source(cell)) if cell["cell_type"] == "code" else None
        if head:
            found.append((position, int(head[1]), head[2].strip(), source(cell)[head.end() :]))
    return found


# ---- Definitions ---------------------------------------------------------------------------------
def definitions(*names, notebook=None, **given):
    """Execute what `names` need of the notebook, and nothing else.

    Parameters
    ----------
    names : functions, classes or plain constants that the notebook's code cells define at their top level
    notebook : dict of `load`, optional; default: the committed one
    given : globals of the caller (tracings, y, DEVICE, ...); they take precedence over the notebook's

    Returns the namespace (dict) in which everything lives; functions find their globals there. `ecg` is the
    module ecg_helpers. `inspect.getsource` works on functions and classes. NameError: a name is unknown, or
    computed in the notebook and not given.
    """
    parsed = Source(load() if notebook is None else notebook)
    space = parsed.namespace(given)
    parsed.add(names, space, given)
    return space


def defines(name, notebook=None):
    """True if the notebook defines this function, class or name at the top level of a code cell."""
    return name in Source(load() if notebook is None else notebook).bindings


def training_settings(name, notebook=None, **given):
    """The keyword arguments with which the notebook calls `train_model(name, ...)`, `part` left out.

    So a study reads the recipe where it is written. Epochs are the notebook's own for real data.
    """
    parsed = Source(load() if notebook is None else notebook)
    given = {"epochs_for": lambda real, demo: real, **given}
    call = parsed.find_call("train_model", name)
    space, settings = parsed.namespace(given), {}
    for keyword in call.keywords:
        if keyword.arg == "part":
            continue
        expression = ast.Expression(keyword.value)
        parsed.add(loaded_names(expression, "eval"), space, given)
        value = eval(compile(expression, parsed.filename, "eval"), space)
        settings.update(value if keyword.arg is None else {keyword.arg: value})
    return settings


class Source:
    """The notebook's code as one parsed file, which `inspect` can read, and what its top level binds."""

    def __init__(self, notebook):
        self.text = "\n".join(as_python(source(cell)) for cell in code_cells(notebook)) + "\n"
        digest = hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:12]
        self.filename = f"<notebook {digest}>"
        # no time stamp: then linecache keeps the entry although there is no such file
        linecache.cache[self.filename] = (
            len(self.text),
            None,
            self.text.splitlines(keepends=True),
            self.filename,
        )
        self.tree = ast.parse(self.text, self.filename)
        self.bindings = {}
        for node in self.tree.body:
            for name in bound_names(node):
                self.bindings.setdefault(name, []).append(node)

    def namespace(self, given):
        """An empty module's namespace with `ecg` and the caller's globals."""
        module = types.ModuleType(self.filename)
        module.__file__ = self.filename  # `inspect` finds the source of a class through its module
        sys.modules[self.filename] = module
        space = vars(module)
        space["ecg"] = importlib.import_module("ecg_helpers")
        space.update(given)
        return space

    def add(self, names, space, given):
        """Execute in `space` what `names` need."""
        for name in names:
            if name not in space and not hasattr(builtins, name) and self.binding(name, space) is None:
                where = "computes it: give it as a keyword" if name in self.bindings else "has no such name"
                raise NameError(f"{name}: the notebook {where}")
        for node in sorted(self.needed(names, space), key=lambda node: node.lineno):
            try:
                exec(compile(ast.Module([node], []), self.filename, "exec"), space)
            except NameError as error:
                what = " and ".join(bound_names(node))
                raise NameError(f"{what} of the notebook: {error}; give it as a keyword") from error
            space.update(given)  # a statement may bind several names

    def needed(self, names, space):
        """The statements that bind `names` and, recursively, what these refer to."""
        statements, waiting, seen = set(), list(names), set()
        while waiting:
            name = waiting.pop()
            if name in seen or name in space:
                continue
            seen.add(name)
            node = self.binding(name, space)
            if node is not None:
                statements.add(node)
                waiting.extend(loaded_names(ast.Module([node], []), "exec"))
        return statements

    def binding(self, name, space, inside=()):
        """The last statement that binds `name` and can be executed alone, or None."""
        for node in reversed(self.bindings.get(name, [])):
            if not isinstance(node, (ast.Assign, ast.AnnAssign)) or self.is_plain(
                node, space, (*inside, node)
            ):
                return node
        return None

    def is_plain(self, node, space, inside):
        """True for a constant: it calls nothing but containers, and refers to nothing that is computed."""
        if not all(is_plain_call(call) for call in calls(node)):
            return False
        for name in loaded_names(ast.Module([node], []), "exec"):
            known = name in space or hasattr(builtins, name)
            if known or all(other in inside for other in self.bindings.get(name, [])):
                continue
            if self.binding(name, space, inside) is None:
                return False
        return True

    def find_call(self, function, first_argument):
        """The first call of `function` whose first argument is this text."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == function:
                if (
                    node.args
                    and isinstance(node.args[0], ast.Constant)
                    and node.args[0].value == first_argument
                ):
                    return node
        raise NameError(f"the notebook has no call {function}({first_argument!r}, ...)")


def as_python(text):
    """A cell as plain Python with the same number of lines: helper cells empty, magics and shell lines
    `pass`.
    """
    if text.startswith("%%"):
        return "\n" * text.count("\n")
    return re.sub(r"^(\s*)[%!].*$", r"\1pass", text, flags=re.M)


def bound_names(node):
    """The names that a top-level statement binds: def, class, import and assignment to names."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.AnnAssign):
        targets = [node.target] if node.value else []
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    names = []
    for target in targets:
        parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        names += [part.id for part in parts if isinstance(part, ast.Name)]
    return names


def loaded_names(tree, mode):
    """Global names that the code refers to, also inside its functions and classes."""
    names, waiting = [], [compile(tree, "<names>", mode)]
    while waiting:
        code = waiting.pop()
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_NAME", "LOAD_GLOBAL", "LOAD_FROM_DICT_OR_GLOBALS"):
                names.append(step.argval)
        waiting.extend(part for part in code.co_consts if isinstance(part, types.CodeType))
    return list(dict.fromkeys(names))


def calls(node):
    """The calls that are made when the statement is executed: not those inside of a lambda."""
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if isinstance(part, ast.Lambda):
            continue
        if isinstance(part, ast.Call):
            yield part
        waiting.extend(ast.iter_child_nodes(part))


def is_plain_call(call):
    """True for calls that only build a value: dict(...), partial(...), np.arange(...), RATES.items()."""
    function = call.func
    if isinstance(function, ast.Name):
        return function.id in PLAIN_CALLS
    if not isinstance(function, ast.Attribute):
        return False
    of_numpy = (
        isinstance(function.value, ast.Name) and function.value.id == "np" and "load" not in function.attr
    )
    return of_numpy or function.attr in PLAIN_METHODS
