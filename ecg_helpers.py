"""Reusable parts of the AF assignment: data, preprocessing, training, metrics, leaderboard.

The notebook tells the story and holds the models. The order here is the way of the data:
fetch_codesubset > build_h5 > load_labels > train_loop, eval_loop > split_by_patient > classification_metrics >
balanced_threshold > fit > submission_probabilities > submit. Everything is written beside its place and renamed
when whole, so that a killed run leaves nothing that a later run could take as complete.
"""
import ast
import dis
import glob
import hashlib
import html
import inspect
import json
import linecache
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
import types
import uuid
import zipfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from datetime import datetime, timezone
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import ecg_plot
import filelock
import h5py
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import requests
import torch
import wfdb
from requests.adapters import HTTPAdapter
from scipy import signal as dsp
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import binomtest, norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (accuracy_score, average_precision_score, brier_score_loss, confusion_matrix, f1_score,
                             precision_score, recall_score, roc_auc_score)
from tqdm import tqdm
from urllib3.util import Retry

LEADS = ("DI", "DII", "V1", "V2", "V3", "V4", "V5", "V6")  # order of the last axis of `tracings`
SAMPLE_RATE = 400  # Hz, after preprocessing
N_SAMPLES = 4096   # samples per exam, after preprocessing: 10.24 s

COURSE_MIRRORS = (
    "https://www.dropbox.com/s/9zkqa5y5jqakdil/codesubset.tar.gz?dl=1",
    "https://drive.usercontent.google.com/download?id=1zg2WoSbu6-5980X9hnpxDkZTwkYDbDdH&export=download&confirm=t",
)
DEFAULT_HOST = "http://hyperion.it.uu.se:5050/"


# ---- Small tools: progress as text, whole files only, one run at a time ----
def progress(iterable, label, total=None, unit="batch"):
    """`iterable` with a bar of plain text, which a saved notebook keeps; none where it takes less than 30 s."""
    return tqdm(iterable, f"  {label}", total, unit=unit, delay=30, mininterval=15, ascii=True, file=sys.stdout)


def first_ten(names):
    """'a, b, c' for a message: at most ten names, then how many more there are."""
    names = [str(name) for name in names]
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


_OPEN_PARTS = set()  # temporary files and folders that this process is writing now


def _left_by_a_dead_process(part, owner):
    if owner == os.getpid():
        return part not in _OPEN_PARTS  # an earlier process had the same number
    if os.name != "posix":  # elsewhere nobody can be asked without being killed
        return False
    try:
        os.kill(owner, 0)  # signal 0 only asks whether the process exists
    except (OSError, OverflowError) as error:
        return not isinstance(error, PermissionError)  # it exists, but belongs to someone else
    return False


@contextmanager
def unique_part(path):
    """Yield a temporary path beside `path` for this process alone; what killed processes left there is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(glob.escape(path.name) + ".*-*.part"):
        owner = old.name[len(path.name) + 1:].partition("-")[0]
        if owner.isdigit() and _left_by_a_dead_process(old, int(owner)):
            _remove(old)
    part = path.with_name(f"{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    _OPEN_PARTS.add(part)
    try:
        yield part
    finally:
        _remove(part)
        _OPEN_PARTS.discard(part)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it to `path` only if the block ends well."""
    with unique_part(path) as part:
        yield part
        os.replace(part, path)


def _move_aside(path):
    """Rename a file that this notebook may not have written: nothing of others is deleted."""
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.old")
    os.replace(path, aside)
    print(f"{path} is kept as {aside.name}.", flush=True)


# ---- Small tools: JSON and the lock of a folder ----
def write_json(path, content):
    """Write `content` as JSON, whole or not at all; NaN and infinity become null."""
    with whole_file(path) as part:
        part.write_text(json.dumps(_finite(content), indent=1, allow_nan=False), encoding="utf-8")


def _finite(content):
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, np.generic):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content


def lock_folder(folder):
    """Take the lock of a folder: one run at a time writes into it. Returns the lock; keep it while you write.

    The operating system opens it when the process ends, however it ends. RuntimeError: another process holds it.
    PermissionError: the folder cannot be written to.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0, is_singleton=True)  # taken twice by one process: harmless
    try:
        lock.acquire()
    except filelock.Timeout:
        raise RuntimeError(f"{folder} is in use by another run of this notebook: wait until it has ended, shut its "
                           "kernel down, or choose another ECG_WORK.") from None
    except (NotImplementedError, OSError) as error:  # some network drives know no locks
        if not os.access(folder, os.W_OK):
            raise PermissionError(f"{folder} cannot be written to: choose another ECG_WORK.") from None
        print(f"{folder} cannot be locked ({error}): take care that only one run uses it.", flush=True)
    return lock


def claim_folder(folder, fingerprint, source):
    """Note in `folder`/data.json which data its results come from; ValueError where it holds results of others."""
    note = Path(folder) / "data.json"
    if not note.exists():
        write_json(note, {"data": fingerprint, "source": str(source)})
    known = json.loads(note.read_text(encoding="utf-8"))
    if known["data"] != fingerprint:
        raise ValueError(f"{folder} holds results of other data ({known['source']}). Choose another ECG_WORK, or give "
                         f"those data as ECG_DATA. If you repaired these data on purpose, remove {note}.")


def copy_missing(source, target, names=("runs", "predictions", "submissions")):
    """Copy the files of these folders that `target` lacks from `source`; nothing is overwritten. Returns how many."""
    copied = 0
    for name in names:
        for file in (Path(source) / name).rglob("*"):
            copy = Path(target) / file.relative_to(source)
            if file.is_file() and not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
                copied += 1
    return copied


# ---- Device and seed ----
def pick_device():
    """CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def mixed_precision(device):
    """The type for torch.autocast: bfloat16 or float16 on CUDA as the card allows, None elsewhere."""
    if torch.device(device).type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


# ---- The settings of the leaderboard ----
class Secret(str):
    """A text whose `repr` hides it: neither a cell's output nor a verbose traceback shows it."""

    def __repr__(self):
        return "'***'"


def check_identity(team_id, password, host, demo=False):
    """The team id without blanks around it; ValueError for what the server would accept but cannot be meant.

    `password` None: not asked for yet. `demo` True: only a server on this machine will do.
    """
    team_id, host = (team_id or "").strip(), Secret(host or "")  # "group_7 " would be a new team there
    if not 1 <= len(team_id) <= 20 or ":" in team_id:
        raise ValueError(f"the team id must have 1 to 20 characters and no ':', not {team_id!r}")
    if password is not None and not password:
        raise ValueError("the password is empty")
    if "@" in host:  # first of all, so that no message shows what stands before it
        raise ValueError("LEADERBOARD_HOST must not hold a name or password (the part before '@'): remove it, and set "
                         "LEADERBOARD_TEAM and LEADERBOARD_PASSWORD")
    address = urlsplit(host)
    if address.scheme not in ("http", "https"):
        raise ValueError("LEADERBOARD_HOST must start with http:// or https://")
    if demo and address.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise ValueError("these are predictions of demo data: they go to a rehearsal server on this machine only")
    return team_id


def check_note(note):
    """ValueError unless the note has 1 to 20 characters."""
    if not (note or "").strip() or len(note) > 20:
        raise ValueError(f"the note must have 1 to 20 characters, not {note!r}")


#@title What a result depends on: values, functions, classes { display-mode: "form" }
_NO_EFFECT = {"progress", "first_ten", "write_json", "whole_file", "load_checkpoint", "save_checkpoint", "open_run",
              "describe_run", "epoch_line", "hint_at_sigmoid", "not_finite"}  # what they do changes no result
_FOR_SPEED = {"fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay"}  # settings of optimisers
_OF_EVERY_MODULE = set(vars(torch.nn.Module()))  # hooks, parameters, whether it is training
_OF_EVERY_SCHEDULE = {"optimizer", "last_epoch", "verbose", "default_min_lr"}
_PRIVATE_SETTINGS = {"_schedulers", "_milestones", "_schedule_phases", "_anneal_func_type"}


class Notes:
    """What `describe` collects on its way."""

    def __init__(self):
        self.known = {}    # id of a function, class or object -> (itself, its name): nothing is described twice
        self.taken = Counter()
        self.code = {}     # name of a function or class -> digest of its source and of what it uses
        self.numbers = []  # (label, sum of absolute values, weighted sum) of each array of floats
        self.label = ""
        self.outdated = []  # functions whose file was changed after it was loaded

    def name(self, thing, name):
        """Note a name for `thing`; a number makes it unique."""
        self.taken[name] += 1
        name += f" #{self.taken[name]}" if self.taken[name] > 1 else ""
        self.known[id(thing)] = (thing, name)
        return name


def _digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def describe(thing, notes):
    """A JSON value that says what `thing` is, equal in every process and Python version.

    Functions and classes of our own enter by their source, with what they use; those of libraries by their name.
    Arrays of floats enter as two sums in `notes.numbers`, compared with a tolerance: they may differ in the last bit
    between machines. Devices and floating-point types leave no trace: a run made on a GPU is the same run.
    """
    if thing is None or isinstance(thing, (bool, int, str)):
        return thing
    if isinstance(thing, float):
        return float(f"{thing:.9g}") if math.isfinite(thing) else str(thing)
    if isinstance(thing, np.generic):
        return describe(thing.item(), notes)
    if isinstance(thing, (bytes, complex, range, slice, Path)):
        return ascii(thing)
    if isinstance(thing, (list, tuple)):
        return [describe(item, notes) for item in thing]
    if isinstance(thing, (set, frozenset)):
        return sorted((describe(item, notes) for item in thing), key=str)
    if isinstance(thing, dict):
        return {str(describe(key, notes)): describe(value, notes) for key, value in thing.items()}
    if isinstance(thing, (torch.Tensor, np.ndarray)):
        return _describe_array(thing, notes)
    if isinstance(thing, (pd.DataFrame, pd.Series, pd.Index)):
        return describe(pd.DataFrame(thing).reset_index().to_dict("split", index=False), notes)
    if isinstance(thing, (torch.device, torch.dtype, types.ModuleType)):
        return None
    if isinstance(thing, np.ufunc):
        return f"numpy.{thing.__name__}"
    if isinstance(thing, partial):
        return ["partial", *(describe(part, notes) for part in (thing.func, thing.args, thing.keywords))]
    if id(thing) in notes.known:
        return notes.known[id(thing)][1]
    if isinstance(thing, type):
        return _describe_class(thing, notes)
    return _describe_function(thing, notes) if inspect.isroutine(thing) else _describe_object(thing, notes)


def _is_library(module):
    """True for the name of a module of Python or of an installed package."""
    root = module.partition(".")[0]
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    installed = "site-packages" in file or "dist-packages" in file
    return root != "__main__" and (installed or root in sys.stdlib_module_names)


#@title What a result depends on: source code without comments and layout { display-mode: "form" }
def _source_trees(code):
    """Syntax trees of a function: none where the source is not to be found or is not what runs."""
    linecache.checkcache(code.co_filename)
    trees, compiled = _functions_in("".join(linecache.getlines(code.co_filename)))
    this = _compiled(code)
    starts = [start for start, codes in compiled.items() if start[1] == code.co_name and this in codes]
    if not starts:
        return []
    start = min(starts, key=lambda start: abs(start[0] - code.co_firstlineno))  # lines move when a file is edited
    if 2 * len(trees[start]) == len(compiled[start]):  # several: lambdas of one line
        return [trees[start][compiled[start].index(this) % len(trees[start])]]
    return trees[start]


@lru_cache(maxsize=256)
def _functions_in(text):
    """Syntax trees and bytecode of all functions of a source text: two dicts, (line, name) -> list, in order."""
    trees, compiled = {}, {}
    try:
        whole = ast.parse(text)
        # Python compiles a file at once, a notebook statement by statement: the bytecode may differ
        units = [whole, *(ast.Module([statement], []) for statement in whole.body)]
        waiting = [compile(unit, "", "exec", dont_inherit=True) for unit in units]
    except (SyntaxError, ValueError):
        return trees, compiled
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    functions = [node for node in ast.walk(whole) if isinstance(node, kinds)]
    for node in sorted(functions, key=lambda node: (node.lineno, node.col_offset)):
        line = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        trees.setdefault((line, getattr(node, "name", "<lambda>")), []).append(node)
    while waiting:
        code = waiting.pop(0)
        compiled.setdefault((code.co_firstlineno, code.co_name), []).append(_compiled(code))
        waiting += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return trees, compiled


def _compiled(code):
    """Bytecode with its names and constants, as nested lists."""
    constants = []
    for value in code.co_consts:
        value = sorted(value, key=ascii) if isinstance(value, frozenset) else value
        constants.append(_compiled(value) if isinstance(value, types.CodeType) else ascii(value))
    return [code.co_code.hex(), list(code.co_names), list(code.co_freevars), constants]


def _canonical(node):
    """A syntax tree as nested lists; nothing in it differs between Python 3.10 and 3.13."""
    if isinstance(node, list):
        return [_canonical(item) for item in node if not _without_effect(item)]
    if not isinstance(node, ast.AST):
        return ascii(node)
    if isinstance(node, ast.AnnAssign):
        node = ast.Assign([node.target], node.value)
    if isinstance(node, ast.JoinedStr):  # Python 3.12 adds empty pieces to some f-strings
        node = ast.JoinedStr([part for part in node.values if getattr(part, "value", None) != ""])
    left_out = {"ctx", "kind", "type_comment", "type_params", "annotation", "returns"}
    fields = [field for field in ast.iter_fields(node) if field[0] not in left_out and field[1] not in (None, [])]
    return [type(node).__name__, *([name, _canonical(value)] for name, value in fields)]


def _without_effect(statement):
    """True for a docstring, `pass`, and a variable's annotation without a value."""
    if isinstance(statement, ast.Expr):
        return isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or (isinstance(statement, ast.AnnAssign) and statement.value is None)


def _library(thing):
    """package.name of a library's function or class; None for one of our own."""
    module = getattr(thing, "__module__", None) or "builtins"
    if isinstance(thing, types.FunctionType):
        module = thing.__globals__.get("__name__", "__main__")  # functools.wraps copies __module__
    elif not isinstance(thing, type):
        module = module if _is_library(module) else "builtins"  # no Python function: there is no source
    return f"{module.partition('.')[0]}.{thing.__qualname__}" if _is_library(module) else None


#@title What a result depends on: what code uses { display-mode: "form" }
def _describe_function(function, notes):
    if isinstance(function, types.MethodType):
        return [describe(function.__func__, notes), "of", describe(function.__self__, notes)]
    while hasattr(function, "__wrapped__") and _library(function):  # torch.no_grad, lru_cache
        function = function.__wrapped__
    if _library(function):
        return _library(function)
    if id(function) in notes.known:
        return notes.known[id(function)][1]
    name = notes.name(function, function.__qualname__)  # known from here on, should it call itself
    trees = _source_trees(function.__code__)
    if not trees and os.path.exists(function.__code__.co_filename):
        notes.outdated.append(f"{name} in {os.path.basename(function.__code__.co_filename)}")
    source = [_canonical(tree) for tree in trees] or _compiled(function.__code__)
    uses = _globals_used(function.__code__, function.__globals__)
    uses.update(__defaults__=function.__defaults__, __kwdefaults__=function.__kwdefaults__)
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with suppress(ValueError):  # a variable without a value yet
            uses[f"nonlocal {variable}"] = cell.cell_contents
    notes.code[name] = _digest([source, {key: describe(uses[key], notes) for key in sorted(uses)}])
    return name


def _globals_used(code, space):
    """name -> value of what a function takes from its module; of our own modules also `module.name`."""
    used, name, value = {}, "", None
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            name = step.argval
            value = None if name.startswith("__") else space.get(name)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, types.ModuleType):
            name = f"{name}.{step.argval}"
            value = None if _is_library(value.__name__) else getattr(value, step.argval, None)
        elif step.opname != "EXTENDED_ARG":  # belongs to the next step
            value = None
        if value is not None and not isinstance(value, types.ModuleType) and step.argval not in _NO_EFFECT:
            used[name] = value
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            used.update(_globals_used(part, space))
    return used


def _describe_class(cls, notes):
    if _library(cls):
        return _library(cls)
    name, content = notes.name(cls, cls.__qualname__), [describe(base, notes) for base in cls.__bases__]
    for key, value in sorted(vars(cls).items()):
        value = getattr(value, "__func__", getattr(value, "fget", value))  # static and class methods, properties
        written = isinstance(value, types.FunctionType) and value.__code__.co_filename != "<string>"  # not by dataclass
        if written or not key.startswith("__"):
            content.append([key, describe(value, notes)])
    notes.code[name] = _digest(content)
    return name


def _describe_array(array, notes):
    frozen = isinstance(array, torch.nn.Parameter) and not array.requires_grad
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.double() if array.is_floating_point() else array).numpy()  # NumPy knows no bfloat16
    name = f"frozen {array.shape}" if frozen else f"array {array.shape}"
    if array.dtype.kind == "O":
        return [name, describe(array.tolist(), notes)]
    if array.dtype.kind != "f":
        array = array.astype(np.int64) if array.dtype.kind in "iu" else array  # Windows has other integers
        return f"{name} {hashlib.sha256(array.tobytes()).hexdigest()[:12]}"
    flat = array.astype(np.float64).ravel()
    odd = int((~np.isfinite(flat)).sum())
    flat = np.nan_to_num(flat, nan=0, posinf=0, neginf=0)
    weights = np.cos(0.7 * np.arange(len(flat)) + 1)
    notes.numbers.append([notes.label, float(np.abs(flat).sum()), float(flat @ weights)])
    return f"{name}, {odd} not finite" if odd else name


# ---- Figures: colours, ECG paper, histograms and bars ----
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#666666"
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)  # Okabe and Ito's: colour-blind readers can tell them apart
LEAD_NAMES = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")  # as printed; the course's files write DI, DII


def draw_ecg(ecg_mv, rate, heading, window=(0, 5), leads=range(8), columns=2, marks=()):
    """Figure of leads of (8, samples) in mV on ECG paper, 25 mm/s and 10 mm/mV.

    `rate` in Hz, `window` in s; `marks`: annotations of ecg-plot (dicts with time, end_time, label).
    """
    window = (window[0], min(window[1], ecg_mv.shape[1] / rate))
    paper = ecg_plot.Style(major_color="#e09a9a", minor_color="#f5dcdc", line_width=0.25, font_size=3.4)
    chart = ecg_plot.plot(np.asarray(ecg_mv)[list(leads)], sample_rate=rate, title=heading, columns=columns,
                          lead_names=[LEAD_NAMES[i] for i in leads], window=window, style=paper)
    chart.add_annotations(list(marks), color=BLUE)
    figure, _ = chart.to_matplotlib()
    figure.set_layout_engine("none")  # the chart places everything itself
    return figure


def class_histogram(axis, values, truth, bins, xlabel):
    """Histogram of `values` by class, in % of each class; NaN left out, what lies outside in the end bins."""
    values, truth = np.asarray(values, dtype=float), np.asarray(truth)
    for label, name, colour in ((0, "no AF", BLUE), (1, "AF", ORANGE)):
        group = values[(truth == label) & np.isfinite(values)]
        share, group = np.full(len(group), 100 / max(1, len(group))), np.clip(group, bins[0], bins[-1])
        axis.hist(group, bins=bins, weights=share, alpha=0.6, label=name, color=colour)
    axis.set(xlabel=xlabel, ylabel="% of the class")
    axis.legend()


def grouped_bars(axis, table, ylabel="", colours=COLOURS):
    """One group of bars per row of the DataFrame `table`, one bar per column."""
    table.plot.bar(ax=axis, width=0.8, rot=0, color=list(colours), xlabel="", ylabel=ylabel)
    axis.margins(y=0.25)  # room for the legend
    axis.legend(ncols=2, fontsize=9, loc="upper left")


#@title Data: course archive, demo data, a folder or any tar archive { display-mode: "form" }
def fetch_codesubset(source="course", directory="."):
    """Make a `codesubset/` folder ready (`train/`, `test/` with RECORDS.txt and WFDB pairs, `train.csv`).

    Parameters
    ----------
    source : "course" (downloaded), "demo" (synthetic ECGs, generated here), the path of a `codesubset/` folder
        (returned itself, only read) or of any tar archive of one
    directory : where `codesubset/` (and the downloaded archive) is created, parents too

    Returns the folder's path. FileNotFoundError, ValueError, ConnectionError: what is wrong, what to do.
    """
    source, directory, path = str(source), Path(directory), Path(source).expanduser()
    target = directory / "codesubset"
    if source not in ("course", "demo") and path.is_dir():
        folder = path / "codesubset" if (path / "codesubset").is_dir() else path
        if missing := _missing(folder):
            raise FileNotFoundError(f"{folder} is no whole codesubset folder: {first_ten(missing)} missing.")
        return _announce(folder, "folder used as it is")
    if source not in ("course", "demo") and not path.is_file():
        raise FileNotFoundError(f"ECG_DATA: {source} does not exist. Give 'course', 'demo' or the path of a "
                                "codesubset/ folder or of a tar archive of one.")
    with lock_folder(directory):
        if source == "demo":
            return make_demo_codesubset(directory)
        if source == "course":
            return _ready_folder(target, "course") or _course_folder(target)
        origin = f"archive with SHA-256 {_file_digest(path)}"
        return _ready_folder(target, origin) or _extract(path, target, origin)


def _course_folder(target):
    """Download (or take the archive that lies there) and extract; a damaged archive is fetched again, once."""
    archive = target.with_name("codesubset.tar.gz")
    for attempt in (1, 2):
        found = archive.exists()
        try:
            if not found:
                download(COURSE_MIRRORS, archive)
            return _extract(archive, target, "course")
        except ValueError as error:
            if found:
                _move_aside(archive)
            else:
                archive.unlink()
            if attempt == 2:
                raise
            print(f"{error}\nIt is downloaded again.", flush=True)


def _ready_folder(target, origin):
    """`target` if it is complete and comes from `origin`, None if it must be made; ValueError if it is another's."""
    known = data_origin(target)
    missing = _missing(target)
    if not missing and (known == origin or (known is None and origin == "course")):
        return _announce(target, "ready from an earlier run")
    if known == origin:
        print(f"{target} misses {first_ten(missing)}: they are made again.", flush=True)
        return None
    if known is not None:
        raise ValueError(f"{target} holds other data ({known}), which are not replaced. Choose another ECG_WORK, "
                         "or move that folder away.")
    if any(file.suffix not in (".h5", ".part", ".old") for file in target.glob("*")):
        raise ValueError(f"{target} holds files that were not put there by this notebook. Move the folder away, give "
                         "its path as ECG_DATA, or choose another ECG_WORK.")
    return None


#@title Data: is a folder complete, where does it come from? { display-mode: "form" }
def data_origin(folder):
    """What a `codesubset/` that was made here came from; None where nothing says so."""
    try:
        return json.loads((Path(folder) / "origin.json").read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _missing(folder):
    """What a `codesubset/` lacks: its three tables first, then files of the records."""
    tables = ["train/RECORDS.txt", "test/RECORDS.txt", "train.csv"]
    if missing := [table for table in tables if not (folder / table).is_file()]:
        return missing
    names = {split: read_records(folder / split / "RECORDS.txt") for split in ("train", "test")}
    files = [f"{split}/{name}{end}" for split in names for name in names[split] for end in (".hea", ".dat")]
    return [file for file in files if not os.path.isfile(folder / file)]


def _announce(folder, how):
    counts = {split: len(read_records(folder / split / "RECORDS.txt")) for split in ("train", "test")}
    print(f"Data: {folder} ({how}): {counts['train']:,} training and {counts['test']:,} test exams.", flush=True)
    return folder


def _file_digest(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


@contextmanager
def _whole_codesubset(target, origin):
    """Yield a path for a new `codesubset/`, which becomes `target` if the block ends well.

    Where `target` exists, only what it lacks moves there: nothing is deleted or replaced.
    """
    with unique_part(target) as part:
        part.mkdir()
        folder = part / "codesubset"
        yield folder
        write_json(folder / "origin.json", {"origin": origin})
        if not target.exists():
            os.replace(folder, target)
            return
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        # first whose data these are, and the mark of demo data: a killed run must not leave records without them
        for file in sorted(files, key=lambda file: (file.name != "origin.json", len(file.parts))):
            if not (target / file).exists():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / file, target / file)


#@title Data: download that resumes { display-mode: "form" }
def download(urls, path, timeout=(10, 60), attempts=4):
    """Download the first of `urls` that serves a gzip archive to `path`; an interrupted download resumes.

    The data go to `<path>.part`, renamed when its length is what the server announced. A cut connection, 429 and
    5xx are tried `attempts` times; a server without HTTP ranges restarts. ConnectionError: no mirror served it.
    """
    path, failures = Path(path), []
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        server = urlsplit(url).netloc
        for attempt in range(attempts):
            try:
                _download_once(url, server, part, timeout)
                os.replace(part, path)
                return path
            except (requests.RequestException, ValueError) as error:
                failures.append(f"{server}: {error}")
                print(f"  {failures[-1]}", flush=True)
                if not isinstance(error, requests.RequestException):
                    break  # the answer itself is wrong: asking again would not help
                time.sleep(min(0.5 * 2 ** attempt, 5))  # the connection: continue where it stopped
    reasons = "\n  ".join(dict.fromkeys(failures))
    raise ConnectionError(
        f"No mirror served {path.name}:\n  {reasons}\nBy hand: open {urls[0]} in a browser, put the file at {path} "
        "and run this cell again (in Colab: folder symbol on the left, then upload).")


def _download_once(url, server, part, timeout):
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code == 416:  # nothing beyond what we have: start again
            part.unlink()
        if answer.status_code in (416, 429) or answer.status_code >= 500:
            raise requests.ConnectionError(f"HTTP {answer.status_code} {answer.reason}")
        if answer.status_code not in (200, 206):
            raise ValueError(f"HTTP {answer.status_code} {answer.reason}")
        have = have if answer.status_code == 206 else 0
        blocks = answer.iter_content(1 << 20)
        first = next(blocks, b"")
        if not have and first[:2] != b"\x1f\x8b":
            raise ValueError(f"sent no gzip archive but {answer.headers.get('Content-Type')} (a sign-in page?)")
        length = answer.headers.get("Content-Length")
        total = int(length) + have if length else None
        size = f"{total / 2**20:.0f} MiB" if total else "unknown size"
        resumed = f", continuing at {have / 2**20:.0f} MiB" if have else ""
        print(f"Downloading from {server}: {size}{resumed} ...", flush=True)
        with open(part, "ab" if have else "wb") as file:
            file.write(first)
            for block in progress(blocks, "download", total and (total - have) >> 20, "MiB"):
                file.write(block)  # urllib3 raises where fewer bytes come than the server announced


#@title Data: safe extraction { display-mode: "form" }
MAX_MEMBER, MAX_TOTAL = 8 * 2**30, 64 * 2**30  # bytes that one file and all files of an archive may unpack to


def _extract(archive, target, origin):
    """Extract the `codesubset/` of a tar archive to `target`: regular files and folders only, whole or not at all."""
    if not hasattr(tarfile, "data_filter"):
        raise RuntimeError(f"Python {sys.version.split()[0]} cannot extract archives safely: use Python "
                           "3.10.12, 3.11.4 or newer.")
    print(f"Extracting {archive} ...", flush=True)
    try:
        with _whole_codesubset(target, origin) as folder:
            with tarfile.open(archive) as tar:
                members = _safe_members(progress(tar, "extract", unit=" files"))
                tar.extractall(folder.parent, members=members, filter="data")
                while tar.fileobj.read(1 << 20):  # to the end, where gzip and xz keep their checksums
                    pass
            if missing := _missing(folder):
                raise ValueError(f"not inside: {first_ten(missing)}")
    except tarfile.FilterError as error:
        raise ValueError(f"{archive} is refused: {error}. It did not come from the course.") from error
    except Exception as error:  # tarfile, gzip, bz2 and xz raise many types for a damaged file
        if isinstance(error, OSError) and error.errno:  # disk full, no permission: not the archive's fault
            raise
        raise ValueError(f"{archive} is damaged or no codesubset archive ({error}). Fetch it again.") from error
    return _announce(target, "extracted")


def _safe_members(members):
    """Members of `codesubset/`, names without a leading "./"; tarfile.FilterError for what no ECG archive holds.

    Links are refused altogether: long ones lead around tarfile's own filter (CVE-2025-4517).
    """
    total = 0
    for member in members:
        member.name = re.sub(r"^(\./)+", "", member.name)
        if member.name.split("/")[0] != "codesubset":
            continue
        total += member.size
        if not (member.isdir() or (member.isreg() and not member.issparse())):
            raise tarfile.FilterError(f"{member.name} is neither a regular file nor a folder")
        if member.size > MAX_MEMBER or total > MAX_TOTAL:
            raise tarfile.FilterError(f"{member.name} would unpack to {member.size:,} bytes, {total:,} in all")
        yield member


#@title Data: synthetic ECGs for a demo run { display-mode: "form" }
def make_demo_codesubset(directory, n_train=240, n_test=80, seed=0):
    """Write synthetic ECGs as real WFDB files in the course's layout, in some seconds.

    Parameters
    ----------
    directory : where `codesubset/` is made, and beside it `test_labels.csv`, which only tests read
    n_train, n_test : number of exams; 30 % and 50 % are labelled AF, about 3 % of the labels are wrong
    seed : integer; the same seed gives the same files

    Returns the path of `directory/codesubset`; its SYNTHETIC.txt marks the data as generated.
    """
    directory = Path(directory)
    target, origin = directory / "codesubset", f"demo data of generator 2, {n_train} + {n_test} exams, seed {seed}"
    if folder := _ready_folder(target, origin):
        return folder
    print(f"Generating {n_train + n_test} synthetic ECGs ...", flush=True)
    rng = np.random.default_rng(seed)
    with _whole_codesubset(target, origin) as folder:
        train = _write_demo_split(rng, folder / "train", n_train, af_share=0.3, first_id=100_000)
        test = _write_demo_split(rng, folder / "test", n_test, af_share=0.5, first_id=500_000)
        train.to_csv(folder / "train.csv", index=False)
        with whole_file(directory / "test_labels.csv") as file:
            test.to_csv(file, index=False)
        mark = "Generated ECGs: they prove that code runs, never that a model is good.\n"
        (folder / "SYNTHETIC.txt").write_text(mark)
    return _announce(target, "synthetic, generated")


def _write_demo_split(rng, folder, n, af_share, first_id):
    """Write `n` exams and RECORDS.txt to `folder`; return the table of their labels and patients."""
    folder.mkdir(parents=True)
    ids = rng.permutation(first_id + np.arange(n))  # record order is not the table's order
    label = rng.permutation(np.arange(n) < round(af_share * n)).astype(int)
    af = label.copy()  # the true rhythm
    for value in (0, 1):  # as many wrong labels in either direction keep the prevalence exact
        wrong = rng.permutation(np.flatnonzero(label == value))[:3 * n // 200]
        af[wrong] = 1 - value
    kind = np.zeros(n)  # a number between 0 and 1 that chooses the rhythm; evenly spread in either class
    for value in (0, 1):
        exams = np.flatnonzero(af == value)
        kind[exams] = (rng.permutation(len(exams)) + 0.5) / len(exams)
    for exam, *rhythm in progress(list(zip(ids, af, kind)), "generate", unit="exam"):
        rate = int(rng.choice([300, 400, 500, 600]))
        ecg = _synthetic_ecg(rng, *rhythm, rate, seconds=rng.uniform(7.2, 10.2))
        wfdb.wrsamp(f"TNMG{exam}", fs=rate, units=["mV"] * 8, sig_name=list(LEADS), p_signal=ecg.T,
                    fmt=["16"] * 8, adc_gain=[1000.0] * 8, baseline=[0] * 8, write_dir=str(folder))
    (folder / "RECORDS.txt").write_text("".join(f"TNMG{exam}\n" for exam in ids))
    patient = rng.integers(0, max(1, int(0.8 * n)), n)  # some have several exams
    age = np.clip(rng.normal(55 + 15 * af, 12), 18, 99).astype(int)
    sex = rng.choice(["F", "M"], n, p=[0.63, 0.37])
    table = pd.DataFrame({"id_exam": ids, "id_patient": first_id // 10 + np.where(af, 0, n) + patient,
                          "age": age, "sex": sex, "AF": label, "date_exam": "2014-01-01"})
    return table.sort_values("id_exam")


#@title Data: one synthetic ECG { display-mode: "form" }
def _synthetic_rr(rng, af, kind):
    """Forty RR intervals (s): mostly irregular in AF, mostly regular in sinus rhythm."""
    mean = rng.uniform(0.6, 1.05)
    change = rng.normal(0, 1, 40)
    if af and kind < 0.1:  # paced, or complete heart block
        return mean * (1 + 0.015 * change)
    if af:
        return mean * np.exp(rng.uniform(0.15, 0.3) * change)
    rr = mean * (1 + 0.02 * change)
    if kind < 0.1:  # one to three premature beats, each with a compensatory pause
        early = rng.choice([1, 3, 5, 7, 9], rng.integers(1, 4), replace=False)
        rr[early] = 0.65 * mean
        rr[early + 1] = 1.35 * mean
    elif kind < 0.2:  # respiratory arrhythmia
        breathing = np.sin(2 * np.pi * rng.uniform(0.2, 0.35) * np.cumsum(rr))
        rr *= 1 + rng.uniform(0.1, 0.2) * breathing
    return rr


def _synthetic_ecg(rng, af, kind, rate, seconds):
    """One exam, (8, samples) in mV: Gaussian waves at each beat, drift, 60 Hz interference, noise."""
    t = np.arange(int(rate * seconds)) / rate
    rr = _synthetic_rr(rng, af, kind)
    beats = np.cumsum(rr) - rng.uniform(0, rr[0])
    beats = beats[beats < seconds + 0.5, None]
    weak_p = rng.random() < 0.25
    p_size = 0 if af else 0.2 if weak_p else 1
    waves = [  # offset from R (s), width (s), amplitude in DI DII V1 ... V6 (mV): P, Q, R, S, T
        (-0.16, 0.020, p_size * np.array([0.08, 0.13, 0.05, 0.06, 0.07, 0.08, 0.08, 0.08])),
        (-0.03, 0.010, [-0.05, -0.08, 0.0, 0.0, -0.05, -0.10, -0.10, -0.08]),
        (0.0, 0.012, [0.6, 1.0, 0.2, 0.5, 0.9, 1.3, 1.2, 0.9]),
        (0.03, 0.014, [-0.1, -0.2, -0.9, -1.1, -0.7, -0.4, -0.2, -0.1]),
        (0.26, 0.045, [0.2, 0.3, 0.1, 0.4, 0.5, 0.5, 0.4, 0.3])]
    ecg = np.zeros((8, len(t)))
    gain = rng.normal(1, 0.15, 8)
    for offset, width, amplitude in waves:
        shape = np.exp(-0.5 * ((t - beats - offset) / width) ** 2).sum(axis=0)
        ecg += (gain * amplitude)[:, None] * shape
    if af or rng.random() < 0.1:  # fibrillatory waves, low in half of the exams; or a tremor like them
        size = rng.choice([0.015, 0.05]) * np.array([0.5, 0.8, 1.5, 1, 0.7, 0.6, 0.5, 0.5])
        ecg += size[:, None] * np.sin(2 * np.pi * rng.uniform(4, 9) * t + 2 * np.sin(2 * np.pi * 0.7 * t))
    drift = np.sin(2 * np.pi * (rng.uniform(0.1, 0.4) * t + rng.random((8, 1))))
    power_line = np.sin(2 * np.pi * 60 * t + rng.random((8, 1)))
    noise = rng.normal(0, rng.uniform(0.01, 0.04), ecg.shape)
    return ecg + rng.uniform(0.05, 0.3) * drift + rng.uniform(0, 0.06) * power_line + noise


# ---- Records: names, fingerprint, reading ----
def read_records(records_file):
    """Record names of a RECORDS.txt, in order. Empty or repeated names: ValueError."""
    records_file = Path(records_file)
    names = records_file.read_text(encoding="utf-8-sig").split()
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if not names:
        raise ValueError(f"{records_file} lists no record")
    if repeated:
        raise ValueError(f"{records_file} repeats {first_ten(repeated)}")
    return names


def data_fingerprint(records_file):
    """Digest of the records' names, headers (with their checksums) and .dat sizes: which data is this?"""
    digest, folder = hashlib.sha256(), Path(records_file).parent
    for name in read_records(records_file):
        header, samples = folder / f"{name}.hea", folder / f"{name}.dat"
        digest.update(f"{name}.hea\n".encode() + (header.read_bytes() if header.is_file() else b"missing"))
        size = str(samples.stat().st_size) if samples.is_file() else "missing"
        digest.update(f"{name}.dat\n{size}".encode())
    return digest.hexdigest()[:16]


def read_ecg(path):
    """Read one WFDB record; `path` without suffix.

    Returns signal (leads, samples) float64 in mV, NaN where a sample is marked as invalid; sample_rate, Hz; leads,
    names as in the header. ValueError, naming the record: a file is missing, truncated or not readable.
    """
    return _read_record(path)[:3]


def _read_record(path):
    """As `read_ecg`, and whether the samples differ from the header's checksums."""
    try:
        signal, rate, leads, damaged = _read_plain_record(path) or _read_any_record(path)
    except UnitError as error:
        raise ValueError(f"record {path}: {error}") from None
    except Exception as error:  # wfdb raises many types for a broken header: all mean the same here
        raise ValueError(f"record {path}: cannot be read ({type(error).__name__}: {error}). Remove its files and run "
                         "the notebook from its start (a folder of your own: extract its archive again).") from error
    return signal, int(rate) if float(rate).is_integer() else float(rate), leads, damaged


class UnitError(ValueError):
    """The header gives a unit that is not millivolt or microvolt."""


# ---- Records: the common header without wfdb's slow parser ----
_HEADER = re.compile(r"\S+ (\d+) (\d+(?:\.\d+)?) (\d+)")
_SIGNAL = re.compile(r"([\w.-]+) 16 ([1-9][\d.]*)\((-?\d+)\)/mV \d+ -?\d+ -?\d+ (-?\d+) 0 (\S+)", re.ASCII)


def _read_plain_record(path):
    """The commonest form (one .dat, format 16, mV), read directly; None for any other form, which wfdb reads."""
    lines = [line.strip() for line in Path(f"{path}.hea").read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    head = _HEADER.fullmatch(lines[0]) if lines else None
    specs = [_SIGNAL.fullmatch(line) for line in lines[1:]]
    if not head or not all(specs) or len(specs) != int(head[1]) or len({spec[1] for spec in specs}) != 1:
        return None
    n_leads, n_samples = len(specs), int(head[3])
    digital = np.fromfile(Path(path).parent / specs[0][1], dtype="<i2", count=n_leads * n_samples)
    if len(digital) < n_leads * n_samples or n_samples == 0:
        raise ValueError(f"{specs[0][1]} is truncated: {len(digital) // n_leads} of {n_samples} samples")
    digital = np.ascontiguousarray(digital.reshape(n_samples, n_leads).T)
    gain = np.array([float(spec[2]) for spec in specs])[:, None]
    baseline = np.array([float(spec[3]) for spec in specs])[:, None]
    signal = (digital - baseline) / gain
    np.putmask(signal, digital == -32768, np.nan)  # WFDB's mark of an invalid sample
    sums = digital.sum(axis=1, dtype=np.int64)
    damaged = any((int(total) - int(spec[4])) % 65536 for total, spec in zip(sums, specs))
    return signal, float(head[2]), [spec[5] for spec in specs], damaged


def _read_any_record(path):
    record = wfdb.rdrecord(str(path), physical=False)
    factors = {"mv": 1.0, "uv": 1e-3}  # no V: wfdb loses the sign µ and reads µV as V
    odd = [f"{lead} in {unit}" for lead, unit in zip(record.sig_name, record.units) if unit.lower() not in factors]
    if odd:
        raise UnitError(f"the unit must be mV or uV, but {first_ten(odd)}. Convert the record.")
    sums = record.calc_checksum()
    damaged = any(given is not None and (total - given) % 65536 for total, given in zip(sums, record.checksum))
    to_mv = np.array([factors[unit.lower()] for unit in record.units])[:, None]
    return record.dac().T * to_mv, record.fs, record.sig_name, damaged


def order_leads(signal, leads):
    """The eight leads in the order of LEADS, (8, samples); I/II are accepted for DI/DII, in any case."""
    alias = {"I": "DI", "II": "DII"}
    names = [alias.get(name.strip().upper(), name.strip().upper()) for name in leads]
    if missing := [lead for lead in LEADS if lead not in names]:
        raise ValueError(f"lead {', '.join(missing)} missing; the record has {', '.join(leads)}")
    if twice := [lead for lead in LEADS if names.count(lead) > 1]:
        raise ValueError(f"lead {', '.join(twice)} more than once; the record has {', '.join(leads)}")
    return np.asarray(signal, dtype=np.float64)[[names.index(lead) for lead in LEADS]]


# ---- Preprocessing: the filters and the four steps ----
def fill_gaps(signal):
    """Interpolate NaN samples within each lead, (leads, samples); a lead without a finite sample is zero."""
    finite = np.isfinite(signal)
    if finite.all():
        return signal
    if not finite.any():
        raise ValueError("no lead has a finite sample")
    leads = pd.DataFrame(np.where(finite, signal, np.nan).T)
    return leads.interpolate(limit_direction="both").fillna(0.0).to_numpy(copy=True).T


@lru_cache(maxsize=32)
def baseline_filter(sample_rate, pass_edge=0.8, stop_edge=0.2, ripple=0.5, attenuation=40.0):
    """Elliptic high-pass as second-order sections: edges in Hz, ripple and attenuation in dB."""
    order, edge = dsp.ellipord(pass_edge, stop_edge, ripple, attenuation, fs=sample_rate)
    return dsp.iirfilter(order, edge, ripple, attenuation, btype="high", ftype="ellip", output="sos", fs=sample_rate)


@lru_cache(maxsize=32)
def powerline_filter(sample_rate, powerline=60, quality=30):
    """Notch at `powerline` Hz as transfer function (b, a)."""
    return dsp.iirnotch(powerline, quality, fs=sample_rate)


@lru_cache(maxsize=32)
def resampling(sample_rate, new_freq):
    """Factors up, down and the low-pass of `resample_poly` (its default, designed once instead of for each exam).

    Rates with many decimals get the nearest ratio of numbers up to 50,000, off by less than a tenth of a sample
    over an exam: the exact one would need a filter of millions of taps.
    """
    ratio = float(new_freq) / float(sample_rate)
    ratio = Fraction(ratio).limit_denominator(int(50_000 / max(1, ratio)))
    longest = max(ratio.numerator, ratio.denominator)
    window = dsp.firwin(20 * longest + 1, 1 / longest, window=("kaiser", 5.0)) if ratio != 1 else None
    return ratio.numerator, ratio.denominator, window


def preprocess_ecg(signal, sample_rate, leads, new_freq=SAMPLE_RATE, new_len=N_SAMPLES, remove_baseline=True,
                   powerline=60):
    """Bring one exam to the form that all models read; equals github.com/antonior92/ecg-preprocessing to 1e-6 mV.

    Parameters
    ----------
    signal : array (leads, samples), mV
    sample_rate : number, Hz
    leads : names of the rows of `signal`; more than the eight are dropped
    new_freq, new_len : rate (Hz) and length (samples) of the result, zero-padded or cropped, centred
    powerline : power-line frequency to remove (Hz); None, or one beyond half the sample rate, skips the step

    Returns ndarray (8, new_len), float64, mV, in the order of LEADS. ValueError: a lead missing or repeated, no
    finite sample, rate outside 50-5000 Hz, shorter than one second.
    """
    if not 50 <= sample_rate <= 5000:
        raise ValueError(f"sample rate {sample_rate} Hz is outside 50-5000 Hz")
    ecg = fill_gaps(order_leads(signal, leads))
    if ecg.shape[1] < sample_rate:
        raise ValueError(f"only {ecg.shape[1]} samples, less than one second")
    if remove_baseline:
        ecg = dsp.sosfiltfilt(baseline_filter(sample_rate), ecg, padtype="constant")
    if powerline and powerline < sample_rate / 2:
        ecg = dsp.filtfilt(*powerline_filter(sample_rate, powerline), ecg)
    up, down, window = resampling(sample_rate, new_freq)
    if up != down:
        ecg = dsp.resample_poly(ecg, up, down, axis=1, window=window)
    surplus = max(0, ecg.shape[1] - new_len) // 2
    ecg = ecg[:, surplus:surplus + new_len]
    padded, front = np.zeros((len(ecg), new_len)), (new_len - ecg.shape[1]) // 2
    padded[:, front:front + ecg.shape[1]] = ecg
    return padded


# ---- HDF5: one record, and the worker processes ----
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"  # of the worker processes


def _prepare_record(job):
    """Write one tracing at its offset in the file; (remarks, None), or ([], error text)."""
    path, h5_file, offset = job
    try:
        signal, rate, leads, damaged = _read_record(path)
        raw = order_leads(signal, leads)
        finite, filled = np.isfinite(raw), fill_gaps(raw)
        tracing = preprocess_ecg(filled, rate, LEADS).astype("<f4").T
    except ValueError as error:
        return [], f"record {path}: {str(error).removeprefix(f'record {path}: ')}"
    with open(h5_file, "r+b") as file:  # its own bytes of the file: nothing goes through a pipe
        file.seek(offset)
        file.write(tracing.tobytes())
    live = finite.any(axis=1)  # leads with at least one finite sample
    notes = {"the samples differ from the header's checksum (damaged? fetch the archive again)": damaged,
             "NaN samples interpolated": not finite[live].all(),
             "a lead without finite samples set to zero": not live.all(),
             "a flat channel (lead off) kept": (filled[live, :1] == filled[live]).all(axis=1).any(),
             "60 Hz filter skipped (rate too low)": rate <= 120}
    return [note for note, applies in notes.items() if applies], None


def _start_worker():
    """A worker ignores Ctrl-C, which its parent handles, and ends when its parent has ended, however that ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch():
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _in_processes(jobs, workers):
    """Results of `_prepare_record` in order, from `workers` processes; one works in this process."""
    if workers == 1:
        yield from map(_prepare_record, jobs)
        return
    portion = max(1, min(16, len(jobs) // workers))  # handing the jobs over one by one takes a third longer
    context = multiprocessing.get_context(START_METHOD)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        yield from pool.map(_prepare_record, jobs, chunksize=portion)
    except BrokenProcessPool:
        raise RuntimeError("a worker process was killed (out of memory?) and no file was written. Run the cell "
                           "again, or call build_h5 with workers=1.") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---- HDF5: preprocess all records into one file ----
def h5_problem(h5_file, fingerprint, n_exams):
    """The file's attributes, and why it is not the finished result for these records (a phrase; None if it is)."""
    attributes = {}
    try:
        with h5py.File(h5_file, "r") as file:
            attributes = dict(file.attrs)
            shape = file["tracings"].shape
            file["tracings"][-1]  # the last exam can be read
    except Exception as error:  # h5py raises many types for a foreign or damaged file
        return attributes, f"cannot be read ({error})"
    if attributes.get("settings") != _preprocessing_settings() or shape != (n_exams, N_SAMPLES, len(LEADS)):
        return attributes, f"has other contents (shape {shape}, or other preprocessing settings)"
    return attributes, None if attributes.get("fingerprint") == fingerprint else "was made from other records"


def _preprocessing_settings():
    """What a tracing depends on besides its record: the code of the preprocessing, with its constants."""
    notes = Notes()
    describe(preprocess_ecg, notes)
    return _digest(notes.code)


def build_h5(records_file, h5_file, workers=None):
    """Preprocess the records beside a RECORDS.txt into an HDF5 file, in parallel; a finished one is kept.

    Parameters
    ----------
    h5_file : path to write: dataset `tracings` (exams, 4096, 8) float32 in mV, order of RECORDS.txt
    workers : processes; default: one per core. 1 works in this process.

    Returns the path. ValueError names the bad records (the first ten, and how many); no file is left then. A file
    of other data makes room; one that was not built here is kept under another name.
    """
    records_file, h5_file = Path(records_file), Path(h5_file)
    names, fingerprint = read_records(records_file), data_fingerprint(records_file)
    if h5_file.exists():
        attributes, problem = h5_problem(h5_file, fingerprint, len(names))
        if problem is None:
            print(f"{h5_file}: {len(names):,} exams, ready from an earlier run." + attributes["remarks"], flush=True)
            return h5_file
        print(f"{h5_file} {problem}: it is built again.", flush=True)
        if "fingerprint" in attributes:
            h5_file.unlink(missing_ok=True)  # another process may do the same
        else:
            _move_aside(h5_file)
    workers = min(workers or os.cpu_count() or 1, len(names))
    print(f"Preprocessing {len(names):,} exams of {records_file.parent} with {workers} process(es) ...", flush=True)
    start, bad, remarks = time.monotonic(), [], {}
    with whole_file(h5_file) as part:
        jobs = _empty_h5(part, records_file.parent, names)
        with closing(_in_processes(jobs, workers)) as results:  # an interrupt ends the workers at once
            for name, (notes, error) in zip(names, progress(results, "preprocess", len(names), "exam")):
                if error:
                    bad.append(error)
                for note in notes:
                    remarks.setdefault(note, []).append(name)
        lines = "".join(f"\n  {len(exams)} exams: {note}: {first_ten(exams)}" for note, exams in remarks.items())
        _finish_h5(part, h5_file, names, bad, {"fingerprint": fingerprint, "remarks": lines})
    seconds = time.monotonic() - start
    speed = f"{seconds:.0f} s ({len(names) / seconds:.0f} exams/s)"
    print(f"{h5_file}: {len(names):,} exams in {speed}.{lines}", flush=True)
    return h5_file


# ---- HDF5: room for all rows, and the check that each was written ----
def _empty_h5(part, folder, names):
    """Write an HDF5 file with room for all tracings; one job (record, file, offset in bytes) per record."""
    with h5py.File(part, "w") as file:
        tracings = file.create_dataset("tracings", (len(names), N_SAMPLES, len(LEADS)), "<f4")
        # the first write reserves the room of all exams; a whole exam, as writing one number makes HDF5 crash at
        # closing on a full disk
        tracings[-1:] = np.zeros((1, N_SAMPLES, len(LEADS)))
        start, size = tracings.id.get_offset(), N_SAMPLES * len(LEADS) * 4
    jobs = [(str(folder / name), str(part), start + i * size) for i, name in enumerate(names)]
    with open(part, "r+b") as file:  # not through a memory map, which ends the process where the disk is full
        for _, _, offset in jobs:
            file.seek(offset)
            file.write(np.float32(np.nan).tobytes())  # a tracing has no NaN: a row that keeps it was never written
    return jobs


def _map_rows(h5_file, offset, n_exams, mode):
    return np.memmap(h5_file, "<f4", mode, offset, (n_exams, N_SAMPLES, len(LEADS)))


def _finish_h5(part, h5_file, names, bad, attributes):
    """Refuse the file if a record was bad or a row was never written; else note what it was made from."""
    if bad:
        more = "\n  ..." if len(bad) > 10 else ""
        raise ValueError(f"{len(bad)} of {len(names):,} records cannot be used, {h5_file.name} was not written:\n  "
                         + "\n  ".join(bad[:10]) + more)
    with h5py.File(part, "r+") as file:
        offset = file["tracings"].id.get_offset()
        file.attrs.update(attributes, settings=_preprocessing_settings())
    unwritten = np.isnan(_map_rows(part, offset, len(names), "r")[:, 0, 0])
    if unwritten.any():
        lost = [name for name, is_lost in zip(names, unwritten) if is_lost]
        raise RuntimeError(f"{h5_file.name}: {first_ten(lost)} were not written. Run the cell again.")


# ---- Labels: the table in the order of the records ----
_TRUTH = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
_SEX = {"f": "F", "female": "F", "woman": "F", "w": "F", "m": "M", "male": "M", "man": "M"}


def load_labels(csv_file, records_file):
    """Read the label table in the order of the records (the CSV's own order is another one).

    Returns a DataFrame indexed by id_exam, one row per record: id_patient (one spelling per patient), age (float,
    NaN where it is blank), sex ("F", "M" or NaN), AF (int 0/1) and what else the table has.
    ValueError names the column or the exams: missing, duplicated, or AF not 0/1.
    """
    try:
        table = pd.read_csv(csv_file, encoding="utf-8-sig", skipinitialspace=True, dtype={"id_patient": str})
    except ValueError as error:  # empty, not UTF-8, rows of different lengths
        raise ValueError(f"{csv_file} is no table ({error}). Extract the archive again.") from error
    if missing := [name for name in ("id_exam", "id_patient", "age", "sex", "AF") if name not in table]:
        raise ValueError(f"{csv_file}: column {', '.join(missing)} missing; it has {', '.join(map(str, table))}")
    table["id_exam"] = pd.to_numeric(table["id_exam"], errors="coerce")
    ids = _exam_numbers(records_file)
    mine = table[table["id_exam"].isin(ids)].astype({"id_exam": "int64"})
    if len(mine) < len(table):
        print(f"{csv_file}: {len(table) - len(mine):,} rows belong to no record and are ignored.", flush=True)
    af = mine["AF"].astype(str).str.strip().str.lower().map(_TRUTH)
    patient = _patient_numbers(mine["id_patient"])
    problems = {"appear more than once": mine.loc[mine["id_exam"].duplicated(), "id_exam"].unique(),
                "have no row": sorted(set(ids) - set(mine["id_exam"])),
                "have an AF that is not 0 or 1": mine.loc[af.isna(), "id_exam"],
                "have no id_patient": mine.loc[patient.isna(), "id_exam"]}
    for what, exams in problems.items():
        if len(exams):
            raise ValueError(f"{csv_file}: {len(exams)} exams {what}: {first_ten(exams)}. Correct the table.")
    age = pd.to_numeric(mine["age"], errors="coerce").astype(float)
    sex = mine["sex"].astype(str).str.strip().str.lower().map(_SEX)
    for name, column in (("age", age), ("sex", sex)):
        if column.isna().any():
            print(f"{csv_file}: {column.isna().sum():,} exams have no {name} that can be read.", flush=True)
    return mine.assign(AF=af.astype(int), id_patient=patient, age=age, sex=sex).set_index("id_exam").loc[ids]


def require_enough(labels, folds=5):
    """ValueError, in one sentence, where too few patients have (or lack) AF for `folds` patient folds."""
    patients = {name: labels.loc[labels["AF"] == label, "id_patient"].nunique()
                for label, name in ((1, "AF"), (0, "no AF"))}
    if min(patients.values()) < folds:
        raise ValueError(f"the training data have AF exams of {patients['AF']} patients and exams without AF of "
                         f"{patients['no AF']}, needed are at least {folds} patients of each for the patient folds.")


def _exam_numbers(records_file):
    """Exam numbers of the records, in order; two names for one number ("TNMG1", "TNMG01") are refused."""
    names = read_records(records_file)
    matches = [re.fullmatch(r"(?:.*/)?TNMG(\d+)", name) for name in names]
    if not all(matches):
        raise ValueError(f"{records_file}: record names must look like TNMG100046")
    ids = [int(match[1]) for match in matches]
    counts = Counter(ids)
    if twice := [name for name, number in zip(names, ids) if counts[number] > 1]:
        raise ValueError(f"{records_file}: {first_ten(twice)} have the same exam number")
    return ids


def _patient_numbers(column):
    """One spelling per patient: "10", " 10.0" and "010" are one; numbers where all are numbers."""
    text = column.str.strip().str.replace(r"^0*(\d+)(?:\.0*)?$", r"\1", regex=True)
    text = text.where(text != "")
    return text.astype("int64") if text.str.fullmatch(r"\d{1,18}", na=False).all() else text


# ---- Rhythm features: R peaks, RR irregularity, P waves ----
P_WINDOW = slice(-96, -24)  # samples at 400 Hz relative to the R peak: 0.24 to 0.06 s before it
LEAD_II = 1


def r_peaks(exam, sample_rate=SAMPLE_RATE):
    """Samples of the R peaks of one exam (8, samples): peaks of the summed squared slope, 0.1 s smoothed."""
    slope = np.square(np.diff(exam, axis=1)).sum(axis=0)
    energy = dsp.convolve(slope, np.hanning(sample_rate // 10), mode="same")
    return dsp.find_peaks(energy, height=0.4 * np.percentile(energy, 97), distance=sample_rate // 4)[0]


def rr_irregularity(exam):
    """Normalised mean absolute difference of successive RR intervals; 0 where there are too few beats."""
    rr = np.diff(r_peaks(exam))
    return float(np.abs(np.diff(rr)).mean() / rr.mean()) if len(rr) > 2 else 0.0


def p_wave_height(exam):
    """Height (mV) of the mean P window of lead II over all beats, linearly detrended; 0 without a beat."""
    starts = [peak + P_WINDOW.start for peak in r_peaks(exam) if peak + P_WINDOW.start >= 0]
    length = P_WINDOW.stop - P_WINDOW.start
    beats = [exam[LEAD_II, start:start + length] for start in starts]
    return float(np.ptp(dsp.detrend(np.mean(beats, axis=0)))) if beats else 0.0


def rhythm_features(traces, block=256):
    """DataFrame with rr_irregularity and p_height (mV) of each exam of `traces`, tensor or h5py dataset."""
    rows = []
    for start in progress(range(0, len(traces), block), "rhythm features", unit="block"):
        part = torch.as_tensor(traces[start:start + block]).cpu().numpy()
        rows += [(rr_irregularity(exam.T), p_wave_height(exam.T)) for exam in part]
    return pd.DataFrame(rows, columns=["rr_irregularity", "p_height"])


# ---- Tracings in memory and the batches ----
def load_tracings(h5_file, device="cpu", max_bytes=None):
    """Tracings of an HDF5 file as a tensor (exams, 4096, 8): on the GPU if they fit there, in memory if they fit
    there, else mapped from the file, which then is read batch by batch (`max_bytes`: the memory they may take).
    """
    with h5py.File(h5_file, "r") as file:
        data = file["tracings"]
        room = 0.6 * _free_memory() if max_bytes is None else max_bytes
        if data.nbytes > room:
            print(f"{h5_file}: {data.nbytes / 2**30:.1f} GiB do not fit into memory; read from the disk.", flush=True)
            # "c": changes stay in memory; the file itself is only read
            return torch.from_numpy(_map_rows(h5_file, data.id.get_offset(), len(data), "c"))
        traces = torch.from_numpy(data[:])
    device = torch.device(device)
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 3 * traces.nbytes:
        return traces.to(device)
    return traces


def _free_memory():
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # no Linux: half of what the machine has, or no limit where it does not say
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2 if hasattr(os, "sysconf") else math.inf


class BatchLoader:
    """Whole batches by index from tracings in memory, on the device or mapped: a DataLoader without collation.

    Yields (traces (batch, 4096, 8), targets (batch, 1)) of the exams `indices`, in an order drawn from torch's
    random state with `shuffle`. `traces` is not copied, so train and validation share it.
    """

    def __init__(self, traces, targets, indices, batch_size=32, shuffle=False):
        self.traces, self.batch_size, self.shuffle = traces, batch_size, shuffle
        self.targets = torch.tensor(np.asarray(targets), dtype=torch.float32, device=traces.device).reshape(-1, 1)
        self.indices = torch.tensor(np.asarray(indices))

    def __len__(self):
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self):
        order = torch.randperm(len(self.indices)) if self.shuffle else torch.arange(len(self.indices))
        order = self.indices[order].to(self.traces.device)
        for batch in order.tensor_split(len(self)):  # equal sizes: a last batch of few exams would be noise
            yield self.traces[batch], self.targets[batch]

    def identity(self):
        """What a run depends on: exams, targets, batches, and a weighted sum per lead of at most 2,000 tracings."""
        some = self.indices[:: math.ceil(len(self.indices) / 2000)].tolist()
        weights = torch.cos(torch.arange(len(range(0, self.traces.shape[1], 16))) + 1.0)[:, None]
        sums = [(self.traces[i, ::16].cpu() * weights).sum(dim=0) for i in some]
        targets = self.targets[self.indices.to(self.targets.device)].cpu()
        return {"exams": self.indices, "targets": (1000 * targets).round().long(), "batch size": self.batch_size,
                "shuffle": self.shuffle, "tracings": torch.stack(sums)}


# ---- Train function: one epoch ----
def train_loop(epoch, dataloader, model, optimizer, loss_function, device, *, augment=None, scheduler=None,
               averaged=None, scaler=None, amp_dtype=None, max_norm=None):
    """Train `model` for one epoch.

    Parameters
    ----------
    dataloader : yields (traces (batch, 4096, 8), targets (batch, 1))
    loss_function : mean loss of a batch from (logits, targets)
    augment, scheduler, averaged, max_norm : optional: a function of the traces, a scheduler that steps each
        batch, an AveragedModel that follows the weights, a limit to the gradient's norm
    scaler, amp_dtype : GradScaler and autocast type for mixed precision, optional

    Returns the mean loss per exam, float (not the mean of batch means: batches differ in size).
    """
    device, n_exams = torch.device(device), 0
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # without mixed precision it passes everything on
    model.train()
    loss_sum = torch.zeros((), device=device)  # stays on the device: no host-device synchronisation per batch
    for traces, targets in progress(dataloader, f"epoch {epoch}"):
        # 1. a batch, on the device, augmented
        traces, targets = traces.to(device), targets.to(device)
        traces = augment(traces) if augment else traces
        # 2. forward: logits and their loss
        logits = forward(model, traces, amp_dtype)
        require_targets(targets, logits)
        loss = loss_function(logits, targets)
        # 3. backward
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if max_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        # 4. step
        scaler.step(optimizer)
        scaler.update()
        if scheduler is not None:
            scheduler.step()
        if averaged is not None:
            averaged.update_parameters(model)
        loss_sum += loss.detach() * len(targets)
        n_exams += len(targets)
    return loss_sum.item() / n_exams


def forward(model, traces, amp_dtype=None):
    """Logits (batch, 1), float32; ValueError for another shape, which would be broadcast without a word."""
    with torch.autocast(traces.device.type, amp_dtype, enabled=amp_dtype is not None):
        logits = model(traces)
    got, wanted = getattr(logits, "shape", type(logits).__name__), (len(traces), 1)
    if got != wanted:
        got = tuple(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"the model returned {got} for {len(traces)} exams, wanted a tensor of shape {wanted}: one "
                         "logit per exam, (batch, 1)")
    return logits.float()


def require_targets(targets, logits):
    """ValueError unless the targets have the logits' shape, for the same reason."""
    if targets.shape != logits.shape:
        raise ValueError(f"the loader gave targets of shape {tuple(targets.shape)}, wanted {tuple(logits.shape)}")


# ---- Eval function: one pass without gradients, and the one sigmoid ----
@torch.no_grad()
def eval_loop(epoch, dataloader, model, loss_function, device, *, amp_dtype=None):
    """Evaluate `model` without gradients; `amp_dtype` as in `train_loop`.

    Returns the mean loss per exam (float), the probabilities of AF (n, 1) float64 and the targets (n, 1).
    """
    device = torch.device(device)
    model.eval()
    loss_sum, logits_all, targets_all = torch.zeros((), device=device), [], []
    for traces, targets in progress(dataloader, f"validation {epoch}"):
        traces, targets = traces.to(device), targets.to(device)
        logits = forward(model, traces, amp_dtype)
        require_targets(targets, logits)
        loss_sum += loss_function(logits, targets) * len(targets)
        logits_all.append(logits)
        targets_all.append(targets)
    targets = torch.cat(targets_all).cpu().numpy()
    return loss_sum.item() / len(targets), to_probability(torch.cat(logits_all).cpu().numpy()), targets


def to_probability(logits):
    """Sigmoid in float64: float32 saturates and would tie the most certain exams. No other place applies it."""
    return expit(np.asarray(logits, dtype=np.float64))


@torch.no_grad()
def predict(model, traces, device, batch_size=None, amp_dtype=None, shifts=(0,)):
    """Logits (n,) float64 of `traces`, an h5py dataset, array or tensor (n, 4096, 8), batch by batch.

    `shifts`: samples by which each exam is shifted circularly; the logits are averaged over them.
    """
    device, logits = torch.device(device), []
    batch_size = batch_size or (16 if device.type == "cpu" else 256)  # 16 exams suit a CPU's cache
    model.eval()
    for start in progress(range(0, len(traces), batch_size), "predict"):
        batch = torch.as_tensor(traces[start:start + batch_size]).to(device, torch.float32)
        shifted = [forward(model, batch.roll(shift, 1) if shift else batch, amp_dtype) for shift in shifts]
        logits.append(torch.stack(shifted).mean(dim=0).squeeze(1))
    return torch.cat(logits).cpu().numpy().astype(np.float64)


# ---- The split by patient ----
def split_by_patient(labels, valid_fraction=0.2, seed=42):
    """Split exams into training and validation so that no patient is on both sides.

    Patients, in random order, go to validation while both classes have room there, which keeps the prevalence
    equal on both sides as far as patients allow. Returns train_idx, valid_idx: positions in `labels`.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(f"valid_fraction must lie between 0 and 1, not {valid_fraction}")
    patient, af = labels["id_patient"].to_numpy(), labels["AF"].to_numpy()
    names, code = np.unique(patient, return_inverse=True)
    if len(names) < 2:
        raise ValueError("one patient cannot be split: both sides need at least one")
    counts = np.stack([np.bincount(code, af == label, len(names)) for label in (0, 1)], axis=1)
    room = np.floor(valid_fraction * counts.sum(axis=0))
    in_valid = np.zeros(len(names), bool)
    for p in np.random.default_rng(seed).permutation(len(names)):
        if (counts[p] <= room).all():
            in_valid[p], room = True, room - counts[p]
    if not in_valid.any():  # no patient fits whole: take the one with the fewest exams
        in_valid[counts.sum(axis=1).argmin()] = True
    return np.flatnonzero(~in_valid[code]), np.flatnonzero(in_valid[code])


# ---- Metrics ----
def classification_metrics(y_true, y_prob, threshold=0.5, prevalence=None):
    """Metrics of AF probabilities.

    Parameters
    ----------
    y_true, y_prob : arrays of n values (any shape): 0/1, and the probability of AF
    threshold : AF is predicted where y_prob > threshold (a tie is no AF, as on the leaderboard)
    prevalence : weight the exams so that AF makes up this share; None: every exam counts once

    Returns a dict of float: accuracy, f1, precision, recall, specificity, auroc, ap, leaderboard_ap (the mean of
    the AP of AF and of no AF). AUROC, AP: NaN where a class is absent.
    """
    y, p = np.ravel(y_true).astype(float), np.ravel(y_prob).astype(float)
    if len(y) != len(p) or len(y) == 0:
        raise ValueError(f"{len(y)} labels and {len(p)} probabilities: they must be as many, and not none")
    if not np.isin(y, (0, 1)).all() or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("labels must be 0 or 1 and probabilities finite, between 0 and 1")
    predicted, weights = p > threshold, {"sample_weight": exam_weights(y, prevalence)}
    found = {"accuracy": accuracy_score(y, predicted, **weights),
             "f1": f1_score(y, predicted, zero_division=0, **weights),
             "precision": precision_score(y, predicted, zero_division=0, **weights),
             "recall": recall_score(y, predicted, zero_division=0, **weights),
             "specificity": recall_score(y, predicted, pos_label=0, zero_division=0, **weights),
             "auroc": math.nan, "ap": math.nan, "leaderboard_ap": math.nan}
    if 0 < y.sum() < len(y):
        ap = average_precision_score(y, p, **weights)
        ap_no_af = average_precision_score(1 - y, 1 - p, **weights)
        found.update(auroc=roc_auc_score(y, p, **weights), ap=ap, leaderboard_ap=(ap + ap_no_af) / 2)
    return {name: float(value) for name, value in found.items()}


def exam_weights(y, prevalence=None):
    """Weights of exams that make AF count `prevalence` of the whole; ones where it is None or undefined."""
    if prevalence is not None and not 0 < prevalence < 1:
        raise ValueError(f"the prevalence is a share between 0 and 1, not {prevalence}")
    y, share = np.ravel(y), np.mean(y)
    if prevalence is None or share in (0, 1):
        return np.ones(len(y))
    return np.where(y == 1, prevalence / share, (1 - prevalence) / (1 - share))


# ---- The operating point and the two columns of a submission ----
def balanced_threshold(y_true, logits, prevalence=0.5):
    """Logit at which the odds of AF are even in a population with this prevalence, from validation exams.

    A logistic regression of the label on the logit, weighted to `prevalence`, with the smoothed targets of
    Platt (1999), (N+ + 1) / (N+ + 2) and 1 / (N- + 2): its slope stays finite where the classes separate.
    Returns threshold, scale: the calibrated probability is sigmoid(scale * (logit - threshold)).
    """
    y, z = np.ravel(y_true).astype(int), np.ravel(logits).astype(np.float64)
    if len(y) != len(z) or not np.isfinite(z).all() or len(np.unique(y)) != 2:
        raise ValueError(f"{len(y)} labels of {len(np.unique(y))} class(es) and {len(z)} logits: needed are as many "
                         "labels as finite logits, of both classes")
    z = np.clip(z, -1e100, 1e100)  # their differences stay finite
    low, middle, high = np.array([np.quantile(z[y == label], [0.25, 0.5, 0.75]) for label in (0, 1)]).T
    centre, spread = middle.mean(), abs(middle[1] - middle[0]) + np.sum(high - low)
    spread = spread if spread > 0 else np.ptp(z)
    if spread < 1e-100:
        return 0.0, 1.0  # the logits carry no information: leave them as they are
    x = np.clip((z - centre) / spread, -2, 2)  # one logit of a million must not decide for all
    target = np.where(y == 1, (y.sum() + 1) / (y.sum() + 2), 1 / ((1 - y).sum() + 2))
    weight = exam_weights(y, prevalence)
    # scikit-learn takes hard labels: each exam counts as AF with its target, and as no AF with the rest
    platt = LogisticRegression(C=1e6, tol=1e-8, max_iter=1000).fit(
        np.concatenate([x, x])[:, None], np.repeat([1, 0], len(y)),
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]))
    slope, intercept = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    if slope <= 1e-6:
        return 0.0, 1.0
    return float(centre - spread * intercept / slope), float(slope / spread)


def submission_probabilities(logits, threshold=0.0, scale=1.0):
    """Two columns (no AF, AF) from logits, shifted so that the operating point `threshold` (a logit) is p = 0.5.

    Strictly monotone: AUROC and AP stay as they are, the leaderboard's fixed threshold 0.5 becomes ours, and two
    different logits have different probabilities in both columns (a sigmoid alone would tie the most certain
    exams). Beyond |z| = 20 the calibrated logit z is compressed; it stays below 22.
    """
    values, row_of = np.unique(np.ravel(logits).astype(np.float64), return_inverse=True)
    if np.isnan(values).any() or not math.isfinite(threshold) or not 0 < scale < math.inf:
        raise ValueError(f"a logit is NaN, or threshold {threshold} and scale {scale} are not finite (scale: above 0)")
    with np.errstate(over="ignore"):  # a difference beyond all numbers is infinite: as certain as can be
        z = scale * (values - threshold)
    size = np.abs(z)
    z = np.sign(z) * np.where(size > 20, 22 - 2 * np.exp((20 - np.maximum(size, 20)) / 2), size)
    columns = np.full((len(values), 2), 0.5)
    above, below = np.flatnonzero(values > threshold), np.flatnonzero(values < threshold)[::-1]
    for rows, af, no_af in ((above, 1, 0), (below, 0, 1)):
        columns[rows, 1] = _apart(to_probability(z[rows]), af)
        columns[rows, 0] = _apart(to_probability(-z[rows]), no_af)
    return columns[row_of.ravel()]


def _apart(probabilities, limit):
    """Probabilities, the nearest to 0.5 first, moved towards `limit` (0 or 1) by the smallest step where they tie."""
    last, apart = 0.5, []
    for probability in probabilities:
        step = math.nextafter(last, limit)
        last = max(probability, step) if limit else min(probability, step)
        apart.append(last)
    return apart


# ---- What a run depends on: model, optimiser, schedule, exams ----
def _describe_object(thing, notes):
    notes.name(thing, f"the same {type(thing).__qualname__}")
    has_identity = hasattr(type(thing), "identity") and not isinstance(thing, torch.nn.Module)
    content = thing.identity() if has_identity else _settings_of(thing)
    return {"type": describe(type(thing), notes), **describe(content, notes)}


def _settings_of(thing):
    """What an object's work depends on. None and False count as missing: new switches of libraries are off."""
    kept = dict(getattr(thing, "__dict__", {}))
    if isinstance(thing, torch.nn.Module):
        kept = {key: value for key, value in kept.items() if key not in _OF_EVERY_MODULE}
        kept.update([*thing.named_children(), *thing.named_parameters(recurse=False),
                     *thing.named_buffers(recurse=False)])
    elif isinstance(thing, torch.optim.Optimizer):
        groups = [{key: value for key, value in group.items() if key not in _FOR_SPEED} for group in thing.param_groups]
        kept = {f"group {i}": _switched_on(group) for i, group in enumerate(groups, 1)}
    elif isinstance(thing, torch.optim.lr_scheduler.LRScheduler):
        kept = {key: value for key, value in kept.items() if key not in _OF_EVERY_SCHEDULE}
    elif isinstance(thing, torch.utils.data.DataLoader):
        kept = {key: getattr(thing, key) for key in ("dataset", "batch_size", "sampler", "drop_last", "collate_fn")}
    if _library(type(thing)):
        kept = {key: value for key, value in kept.items() if key[0] != "_" or key in _PRIVATE_SETTINGS}
    return _switched_on(kept)


def _switched_on(settings):
    return {key: value for key, value in settings.items() if value is not None and value is not False}


def describe_run(model, train_loader, valid_loader, optimizer, scheduler, loss_function, augment, settings):
    """All that the result of a run depends on: a description (JSON values) and numbers to compare with tolerance."""
    notes, description = Notes(), {}
    parts = {"model": model, "training exams": train_loader, "validation exams": valid_loader, "loss": loss_function,
             "augmentation": augment, "optimiser": optimizer, "schedule": scheduler, "loops": fit, **settings}
    for name, part in parts.items():
        notes.label = "starting weights" if part is model else name
        description[name] = describe(part, notes)
    description["code"] = notes.code
    if notes.outdated:
        print(f"Changed after it was loaded: {first_ten(notes.outdated)}. Restart the kernel, so that the change takes "
              "effect.", flush=True)
    return description, notes.numbers


# ---- The folder of a run ----
def open_run(run_dir, description, numbers):
    """Folder `run_dir`/<digest> of the run that this description belongs to; a new one is made where none fits."""
    run_dir, digest, fitting = Path(run_dir), _digest(description), None
    earlier = sorted(run_dir.glob("*/description.json"), key=lambda path: path.stat().st_mtime_ns)
    for path in earlier:
        if path.parent.name.startswith(digest) and _same_numbers(_read_description(path)["numbers"], numbers):
            fitting = path.parent
    if fitting is not None:
        os.utime(fitting / "description.json")  # the newest from now on: the next edit is compared with it
    else:
        taken = len(list(run_dir.glob(f"{digest}*")))
        fitting = run_dir / (f"{digest}-{taken + 1}" if taken else digest)
        if earlier:
            changed = _differences(_read_description(earlier[-1]), {"description": description, "numbers": numbers})
            print(f"{run_dir.name}: another run than {earlier[-1].parent.name}, which is kept; different: {changed}.",
                  flush=True)
        write_json(fitting / "description.json", {"description": description, "numbers": numbers})
    write_json(run_dir / "last_used.json", {"folder": fitting.name})
    return fitting


def run_folder(run_dir):
    """Folder of the run that `fit` made or loaded last under this name: `run_dir`/<digest>."""
    return Path(run_dir) / json.loads((Path(run_dir) / "last_used.json").read_text(encoding="utf-8"))["folder"]


def _read_description(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"description": {}, "numbers": []}  # damaged: fits nothing


def _same_numbers(one, other):
    """True if the (label, sum of absolute values, weighted sum) of all arrays agree but for rounding."""
    if [label for label, *_ in one] != [label for label, *_ in other]:
        return False
    for (_, size, weighted), (_, other_size, other_weighted) in zip(one, other):
        allowed = 3e-7 * size
        if not (abs(size - other_size) <= allowed and abs(weighted - other_weighted) <= allowed):  # NaN: another run
            return False
    return True


def _differences(old, new):
    """In words: how the run `new` differs from `old`."""
    before, now = _leaves(old["description"]), _leaves(new["description"])
    changed = {}
    for path in {**before, **now}:
        if before.get(path) != now.get(path):
            changed.setdefault(path[0], []).append(path)
    code = [f"code of {path[1]}" for path in changed.pop("code", [])]
    found = []
    for part, paths in changed.items():
        values = [f"{' '.join(path)} ({now.get(path)} instead of {before.get(path)})" for path in paths]
        found += values if len(paths) <= 3 else [part]
    labels = {a[0] for a, b in zip(old["numbers"], new["numbers"]) if not _same_numbers([a], [b])}
    if not found and not code and "starting weights" in labels:
        return "other starting weights: was the seed set?"
    return first_ten(found + code or sorted(f"values of {label}" for label in labels))


def _leaves(value, path=()):
    """path -> value of all that is neither list nor dict."""
    if isinstance(value, list):
        value = {str(i): part for i, part in enumerate(value, 1)}
    if not isinstance(value, dict):
        return {path: value}
    found = {}
    for key, part in value.items():
        found.update(_leaves(part, (*path, key)))
    return found


# ---- The checkpoint of a run ----
def save_checkpoint(path, state):
    """Write a checkpoint whole or not at all: a killed run leaves the one before."""
    with whole_file(path) as part:
        torch.save(state, part)


def load_checkpoint(path, parts, device):
    """Load a checkpoint into `parts`. Returns its history and its best weights; None where there is none.

    A damaged file, or one that does not fit, is named and put aside; `parts` then are as before.
    """
    if not path.exists():
        return None
    untouched = {name: deepcopy(part.state_dict()) for name, part in parts.items()}
    try:
        with zipfile.ZipFile(path) as members:  # torch.load does not check the sums that torch.save wrote
            if members.testzip():
                raise zipfile.BadZipFile("wrong checksum")
        state = torch.load(path, map_location=device, weights_only=True)
        parts["model"].load_state_dict(state["best"])  # do they fit?
        for name, part in parts.items():
            if name != "scaler" or name in state:  # a run begun without mixed precision has none
                part.load_state_dict(state[name])
        return state["history"], state["best"]
    except Exception as error:  # torch raises many types for a damaged file: all mean the same here
        print(f"{path} is damaged ({type(error).__name__}): the run starts again from its first epoch.", flush=True)
        os.replace(path, path.with_suffix(".damaged"))
        for name, part in parts.items():
            part.load_state_dict(untouched[name])
        return None


# ---- Run training: epochs with validation, the best weights, exact resume ----
METRICS = ("auroc", "ap", "f1", "accuracy")  # validation metrics of each epoch


def fit(model, train_loader, valid_loader, *, optimizer, loss_function, epochs, device, run_dir, scheduler=None,
        augment=None, ema_decay=None, max_norm=None, select="valid_loss", seed=42, settings=None, amp_dtype=None,
        overwrite=False, prevalence=None):
    """Train with validation each epoch, keep the best weights, checkpoint each epoch, resume exactly.

    Each epoch draws its randomness from (`seed`, epoch): a killed run that is started again ends with the same
    numbers (on the CPU to the last bit). A finished run is loaded, not repeated, and shows its lines again.

    Parameters
    ----------
    run_dir : folder of all runs of this name; each run has its own `<digest>/` in it, named after all that its
        result depends on, with checkpoint.pt, history.json, model.pth (the kept weights) and description.json
    scheduler : OneCycleLR, CyclicLR step each batch, ReduceLROnPlateau on the validation loss, others each epoch
    ema_decay : validate and keep a moving average of the weights with this decay per step, instead of the last
    select : whose best epoch is kept: "valid_loss", "auroc", "ap", "f1", "accuracy", or "last" for the last one
    settings : dict, what else the run depends on (data): others are another run
    overwrite : repeat a finished run, in its folder
    prevalence : AP, F1 and accuracy of the epochs are reweighted to it (None: as they are)

    Returns the history, a dict of lists: epoch, lr, train_loss, valid_loss, auroc, ap, f1, accuracy, seconds.
    `model` holds the kept weights afterwards. A loss that is not finite: FloatingPointError.
    """
    if select not in ("valid_loss", "last", *METRICS):
        raise ValueError(f"select={select!r} is not known: it is 'valid_loss', 'last' or one of {', '.join(METRICS)}")
    device = torch.device(device)
    fixed = {"epochs": epochs, "seed": seed, "ema_decay": ema_decay, "max_norm": max_norm, "select": select,
             "prevalence": prevalence, **{f"setting {key}": value for key, value in (settings or {}).items()}}
    folder = open_run(run_dir, *describe_run(model, train_loader, valid_loader, optimizer, scheduler, loss_function,
                                             augment, fixed))
    parts = _stateful_parts(model, optimizer, scheduler, ema_decay, amp_dtype)
    loaded = None if overwrite else load_checkpoint(folder / "checkpoint.pt", parts, device)
    columns = ("epoch", "lr", "train_loss", "valid_loss", *METRICS, "seconds")
    history, best = loaded or ({column: [] for column in columns}, None)
    for i in range(len(history["epoch"])):
        print(f"{epoch_line(history, i, epochs, select)}  (loaded)", flush=True)
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for epoch in range(len(history["epoch"]) + 1, epochs + 1):
                torch.manual_seed(1_000_003 * seed + epoch)
                row, probability = _one_epoch(
                    epoch, parts, train_loader, valid_loader, loss_function, device, augment=augment,
                    max_norm=max_norm, amp_dtype=amp_dtype, prevalence=prevalence)
                for key, value in row.items():
                    history[key].append(value)
                if best_epoch(history, select) == epoch - 1:
                    best = _weights(_validated(parts))
                print(epoch_line(history, epoch - 1, epochs, select), flush=True)
                hint_at_sigmoid(probability)
                states = {name: part.state_dict() for name, part in parts.items()}
                save_checkpoint(folder / "checkpoint.pt", {"history": history, "best": best, **states})
    except KeyboardInterrupt:
        print(f"stopped after epoch {len(history['epoch'])} of {epochs}: run the cell again to continue.", flush=True)
        raise
    finally:  # after Ctrl-C too: the best weights so far
        if best is not None:
            model.load_state_dict(best)
    with whole_file(folder / "model.pth") as part:
        torch.save(best, part)
    write_json(folder / "history.json", history)
    return history


# ---- Run training: one epoch, and what to say about it ----
def _stateful_parts(model, optimizer, scheduler, ema_decay, amp_dtype):
    """What a checkpoint must restore, by name."""
    parts = {"model": model, "optimizer": optimizer}
    if scheduler is not None:
        parts["scheduler"] = scheduler
    if ema_decay:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay)
        parts["averaged"] = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    if amp_dtype == torch.float16:
        parts["scaler"] = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    return parts


def _validated(parts):
    """The model that is validated and kept: the average of the weights where there is one."""
    return parts["averaged"].module if "averaged" in parts else parts["model"]


def _weights(model):
    """A copy of the model's weights and buffers in memory, off the device."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _one_epoch(epoch, parts, train_loader, valid_loader, loss_function, device, *, augment, max_norm, amp_dtype,
               prevalence):
    """Train and validate once. Returns the epoch's row of the history and the validation probabilities."""
    model, optimizer, scheduler = parts["model"], parts["optimizer"], parts.get("scheduler")
    each_batch = isinstance(scheduler, (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR))
    start, lr, before = time.monotonic(), optimizer.param_groups[0]["lr"], _weights(model)
    train_loss = train_loop(epoch, train_loader, model, optimizer, loss_function, device, augment=augment,
                            scheduler=scheduler if each_batch else None, averaged=parts.get("averaged"),
                            scaler=parts.get("scaler"), amp_dtype=amp_dtype, max_norm=max_norm)
    if not math.isfinite(train_loss):
        raise not_finite(f"training loss is {train_loss}", epoch, lr, model, before, train_loader,
                         loss_function, device, augment=augment, amp_dtype=amp_dtype)
    valid_loss, probability, y = eval_loop(epoch, valid_loader, _validated(parts), loss_function, device,
                                           amp_dtype=amp_dtype)
    if not math.isfinite(valid_loss):
        raise not_finite(f"validation loss is {valid_loss}", epoch, lr, _validated(parts), before, valid_loader,
                         loss_function, device, amp_dtype=amp_dtype)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        scheduler.step(valid_loss)
    elif scheduler is not None and not each_batch:
        scheduler.step()
    metrics = classification_metrics(y, probability, prevalence=prevalence)
    row = {"epoch": epoch, "lr": float(lr), "train_loss": train_loss, "valid_loss": valid_loss,
           **{key: metrics[key] for key in METRICS}, "seconds": time.monotonic() - start}
    return row, probability


def best_epoch(history, select="valid_loss"):
    """Index of the epoch whose weights are kept: lowest loss, highest other metric, or the last."""
    values = np.array(history["epoch" if select == "last" else select], dtype=float)
    if select == "last" or np.isnan(values).all():
        return len(values) - 1
    return int(np.nanargmin(values) if select.endswith("loss") else np.nanargmax(values))


def epoch_line(history, i, epochs, select):
    """One line about epoch i + 1; "*": its weights are kept so far."""
    upto = {key: values[:i + 1] for key, values in history.items()}
    star = "  *" if select != "last" and best_epoch(upto, select) == i else ""
    return (f"epoch {history['epoch'][i]:3d}/{epochs}  loss {history['train_loss'][i]:.4f}  validation loss "
            f"{history['valid_loss'][i]:.4f}  AUROC {history['auroc'][i]:.3f}  AP {history['ap'][i]:.3f}  "
            f"F1 {history['f1'][i]:.3f}  {history['seconds'][i]:.1f} s{star}")


# ---- Run training: hints where something is wrong ----
def hint_at_sigmoid(probability):
    """Say so where the logits look like probabilities: all between 0 and 1, and either about 0.5 or far apart.

    A network that has hardly learned has logits in a narrow range about 0, which are no reason to worry.
    """
    if probability.min() <= 0 or probability.max() >= 1:
        return  # the logit of such a probability lies far outside
    low, middle, high = np.quantile(np.log(probability / (1 - probability)), [0, 0.5, 1])
    if 0 <= low and high <= 1 and (0.3 < middle < 0.7 or high - low > 0.6):
        print("All logits lie between 0 and 1: is there a sigmoid in the model? Return the plain logits.", flush=True)


def not_finite(what, epoch, lr, model, before, loader, loss_function, device, *, augment=None, amp_dtype=None):
    """The FloatingPointError for a loss that is not finite: the weights grew too large, or something else made it.

    `before`: the weights at the start of the epoch. `model` holds them afterwards.
    """
    lost = [name for name, value in model.state_dict().items() if not torch.isfinite(value).all()]
    model.load_state_dict(before)
    huge = [name for name, value in model.named_parameters() if value.abs().max() > 1e6]
    cause = None if huge else _first_not_finite(model, loader, loss_function, device, augment, amp_dtype)
    if cause is None:
        names = first_ten(huge or lost) or "the loss overflowed"
        cause = f"the weights grew beyond all bounds ({names}): lower the learning rate or clip the gradient"
    return FloatingPointError(f"{what} in epoch {epoch} at learning rate {lr:.2g}: {cause}. Then run again.")


@torch.no_grad()
def _first_not_finite(model, loader, loss_function, device, augment, amp_dtype):
    """What makes the first value that is not finite, in words, or None: the epoch again, without learning."""
    torch.manual_seed(torch.initial_seed())  # the same order and augmentation
    for i, (traces, targets) in enumerate(loader, 1):
        traces, targets = traces.to(device), targets.to(device)
        augmented = augment(traces) if augment else traces
        logits = forward(model, augmented, amp_dtype)
        steps = {"the tracings hold it: look at the input": traces,
                 "the augmentation makes it of finite tracings": augmented,
                 "the forward pass makes it, with finite weights and input: look at log, sqrt and divisions": logits,
                 "the loss function makes it of finite logits": loss_function(logits, targets)}
        for cause, values in steps.items():
            if not torch.isfinite(values).all():
                return f"in batch {i} {cause}"
    return None


# ---- Run training: loss, learning-rate schedule, optimiser ----
def weighted_loss(targets, weighted=True):
    """Binary cross-entropy on logits; both classes of the training `targets` (0/1) weigh the same if `weighted`."""
    n_af = np.sum(targets)
    if weighted and n_af == 0:
        raise ValueError("none of the training exams has AF: there is nothing to learn. Look at the split.")
    weight = (len(targets) - n_af) / n_af if weighted else 1.0
    return torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weight, dtype=torch.float32))


def make_scheduler(optimizer, schedule, lr, steps):
    """The schedule: "plateau", "onecycle" over `steps` batches, None, or a function of (optimizer, steps)."""
    if callable(schedule):
        return schedule(optimizer, steps)
    if schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3)
    if schedule == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 5), pct_start=0.25)
    if schedule is not None:
        raise ValueError(f"schedule={schedule!r} is not known: it is 'plateau', 'onecycle', None or a function")
    return None


def make_optimizer(optimizer, model, device, **settings):
    """An optimiser from its class or a function; `fused`, faster on CUDA, where it takes that setting."""
    if not callable(optimizer):
        raise ValueError(f"optimizer={optimizer!r} is not known: it is a class such as torch.optim.AdamW or a function")
    if torch.device(device).type == "cuda" and "fused" in inspect.signature(optimizer).parameters:
        settings["fused"] = True
    return optimizer(model.parameters(), **settings)


# ---- Figures: a training run ----
CURVES = {"AUROC": BLUE, "F1": ORANGE, "AP": GREEN, "accuracy": GREY}


def plot_history(history, heading, name="this model", other=None):
    """Six panels: losses, AUROC, F1, AP, all metrics, and the metrics at chosen epochs.

    `other`: a dict name -> history; the sixth panel then sets AUROC against theirs.
    """
    figure, axes = plt.subplots(2, 3, figsize=(13, 5.6))
    losses, auroc, f1, ap, together, last = axes.flat
    table = pd.DataFrame(history).set_index("epoch").rename(columns={"auroc": "AUROC", "f1": "F1", "ap": "AP"})
    loss = table[["train_loss", "valid_loss"]].set_axis(["training", "validation"], axis=1)
    loss.plot(ax=losses, marker=".", title="losses", ylabel="loss (mean per exam)", color=[BLUE, ORANGE])
    for axis, metric in ((auroc, "AUROC"), (f1, "F1"), (ap, "AP")):
        table[metric].plot(ax=axis, color=CURVES[metric], marker=".", title=f"validation {metric}", ylabel=metric)
        axis.set_ylim(-0.02, 1.02)
    metrics = table[list(CURVES)]
    metrics.plot(ax=together, color=CURVES, title="all validation metrics", ylabel="metric", ylim=(-0.02, 1.5))
    if other is None:
        chosen = sorted({1, 5, 10, 15, 20, len(table)} & set(table.index))
        grouped_bars(last, metrics.loc[chosen, ["AUROC", "F1", "AP"]], "metric", [BLUE, ORANGE, GREEN])
        last.set(title="at chosen epochs", xlabel="epoch", ylim=(0, 1.6))
    else:
        runs = {label: pd.Series(run["auroc"], run["epoch"]) for label, run in {name: history, **other}.items()}
        pd.DataFrame(runs).plot(ax=last, color=[BLUE, ORANGE], xlabel="epoch", ylabel="AUROC", ylim=(0, 1.3))
        last.set_title("AUROC of both")
    for axis in (losses, auroc, f1, ap, together):
        axis.xaxis.set_major_locator(plt.MaxNLocator(integer=True))
    for axis in (together, last):
        axis.legend(fontsize=9, ncols=2, loc="upper center")
    figure.suptitle(heading)
    return figure


def overfits(history):
    """True if the validation loss ended over 10 % (and 0.01) above its lowest value while the training loss fell."""
    valid, train = history["valid_loss"], history["train_loss"]
    lowest = int(np.argmin(valid))
    rise = valid[-1] - valid[lowest]
    return rise > 0.1 * valid[lowest] and rise > 0.01 and train[-1] < train[lowest]


def history_table(history):
    """DataFrame: first, final and best value of each quantity, and the epoch of the best."""
    rows = {}
    for key in ("train_loss", "valid_loss", "auroc", "f1", "ap", "accuracy"):
        best, values = best_epoch(history, key), history[key]
        rows[key] = {"first": values[0], "final": values[-1], "best": values[best], "at epoch": best + 1}
    return pd.DataFrame(rows).T


# ---- The registry: everything that later tables, curves and files need to know about a model ----
@dataclass
class Entry:
    """A model and its validation logits."""

    description: str
    exams: np.ndarray  # positions in the labels that `logits` belong to: validation exams, or all (out-of-fold)
    logits: np.ndarray
    threshold: float = 0.0  # operating point, a logit
    scale: float = 1.0  # slope of the calibration
    history: dict = None
    predict: object = None  # function: tracings of the test exams -> logits; None: not for submission
    number: int = None  # of the submission note; never given to another model
    colour: str = GREY
    marker: str = "o"


class Registry(dict):
    """Models by name, reference models (without a number) first; `add` keeps results.json up to date."""

    def __init__(self, truth, work, **data):
        super().__init__()
        self.truth, self.work, self.data = np.asarray(truth), Path(work), data

    def add(self, name, description, *, exams, logits, **more):
        """Add a model (`more`: fields of Entry); ValueError for logits that do not fit or a number that is taken."""
        entry = Entry(description, np.asarray(exams), np.asarray(logits, dtype=float), **more)
        if entry.logits.shape != entry.exams.shape or not np.isfinite(entry.logits).all():
            raise ValueError(f"{name}: {entry.logits.shape} logits for {entry.exams.shape} exams; needed is one finite "
                             "logit per exam")
        taken = {other.number: key for key, other in self.items() if key != name and other.number is not None}
        if entry.number in taken:
            raise ValueError(f"{name}: number {entry.number} belongs to {taken[entry.number]}; choose another one")
        ordered = sorted({**self, name: entry}.items(), key=lambda item: item[1].number or 0)
        self.clear()
        self.update(ordered)
        palette = (GREY, PURPLE, RED, GREEN, ORANGE, BLUE, "#56B4E9", "#000000", "#8C6D31", "#999933")
        for k, other in enumerate(self.values()):
            other.colour, other.marker = palette[k % len(palette)], "os^DvP*Xhd"[k % 10]
        write_json(self.work / "results.json", {key: self.row(key) for key in self})
        return entry

    def metrics(self, entry, prevalence=0.5):
        """Metrics of an Entry at its operating point, reweighted to `prevalence`."""
        probability = to_probability(np.asarray(entry.logits) - entry.threshold)
        return classification_metrics(self.truth[entry.exams], probability, prevalence=prevalence)

    def row(self, name):
        """What results.json says about a model."""
        entry, folder = self[name], self.work / "runs" / name
        balanced = self.metrics(entry)
        has_run = (folder / "last_used.json").exists()
        return {**self.metrics(entry, None), "balanced_f1": balanced["f1"], "balanced_ap": balanced["ap"],
                "run": run_folder(folder).relative_to(self.work).as_posix() if has_run else None,
                "threshold_logit": entry.threshold, "scale": entry.scale, "n_exams": len(entry.exams),
                "seconds_per_epoch": np.mean(entry.history["seconds"]) if entry.history else None, **self.data}


# ---- Uncertainty: bootstrap over patients ----
SCORE_NAMES = ("AUROC", "balanced AP", "balanced F1")


def balanced_rates(truth, logits, weights=None):
    """Share of AF exams (recall) and of other exams (false positive rate) at or above each logit, for each draw.

    `weights` (draws, exams) says how often a draw holds an exam; None: one draw, the exams as they are. Returns the
    distinct logits, high to low, and two arrays (draws, distinct logits), NaN where a draw has only one class.
    """
    truth, logits = np.asarray(truth), np.asarray(logits, dtype=float)
    weights = np.ones((1, len(truth))) if weights is None else weights
    order = np.argsort(-logits, kind="stable")
    values, af = logits[order], truth[order] == 1
    last = np.r_[np.flatnonzero(np.diff(values)), len(values) - 1]  # tied exams move together
    weights = weights[:, order]
    recall, fpr = np.cumsum(weights * af, axis=1), np.cumsum(weights * ~af, axis=1)
    with np.errstate(invalid="ignore"):
        return values[last], (recall / recall[:, -1:])[:, last], (fpr / fpr[:, -1:])[:, last]


def balanced_scores(truth, logits, threshold=0.0, weights=None):
    """SCORE_NAMES for each draw, (draws, 3): AUROC, then AP and F1 (at `threshold`) at 50 % prevalence."""
    values, recall, fpr = balanced_rates(truth, logits, weights)
    start = np.zeros((len(recall), 1))
    recall, fpr = np.hstack([start, recall]), np.hstack([start, fpr])
    gained = np.diff(recall, axis=1)
    auroc = (gained * (1 - (fpr[:, 1:] + fpr[:, :-1]) / 2)).sum(axis=1)
    either = recall[:, 1:] + fpr[:, 1:]
    precision = recall[:, 1:] / np.where(either > 0, either, 1)
    at = np.searchsorted(-values, -threshold)  # the number of distinct logits above the threshold
    f1 = 2 * recall[:, at] / (1 + recall[:, at] + fpr[:, at])
    return np.column_stack([auroc, (gained * precision).sum(axis=1), f1])


def patient_draws(patients, rounds=2000, seed=42, block=250):
    """How often each exam is in a draw of patients with replacement, in blocks (up to `block`, exams)."""
    rng = np.random.default_rng(seed)
    _, patient = np.unique(patients, return_inverse=True)
    people = patient.max() + 1
    for start in range(0, rounds, block):
        times = rng.multinomial(people, np.full(people, 1 / people), size=min(block, rounds - start))
        yield times[:, patient].astype(float)


def patient_bootstrap(truth, logits, patients, threshold=0.0, rounds=2000, seed=42):
    """SCORE_NAMES of these exams (3,) and of their draws (rounds, 3). Equal exams, equal draws."""
    draws = [balanced_scores(truth, logits, threshold, weights) for weights in patient_draws(patients, rounds, seed)]
    return balanced_scores(truth, logits, threshold)[0], np.concatenate(draws)


def interval(draws):
    """95 % interval of one score's draws: (low, high), NaN where none has a score."""
    draws = draws[np.isfinite(draws)]
    return tuple(np.quantile(draws, [0.025, 0.975])) if len(draws) else (np.nan, np.nan)


# ---- Uncertainty: paired differences, intervals as text ----
def difference(one, other):
    """Paired difference of two results of `patient_bootstrap` on the same exams: (3,) and (rounds, 3)."""
    return one[0] - other[0], one[1] - other[1]


def score_interval(result, score):
    """One score of a result of `patient_bootstrap` or `difference`: value, (low, high)."""
    column = SCORE_NAMES.index(score)
    return result[0][column], interval(result[1][:, column])


def threshold_interval(truth, logits, patients, rounds=300, seed=42):
    """95 % interval of the operating point of `balanced_threshold`, refitted in each draw of patients."""
    fits, truth, logits = [], np.asarray(truth), np.asarray(logits)
    for weights in patient_draws(patients, rounds, seed):
        for times in weights:
            rows = np.repeat(np.arange(len(truth)), times.astype(int))
            if 0 < truth[rows].sum() < len(rows):
                fits.append(balanced_threshold(truth[rows], logits[rows])[0])
    return interval(np.array(fits))


def with_interval(value, limits, sign=""):
    """An estimate and its interval as text: 0.982 (0.971 to 0.990); `sign` "+" for differences."""
    text = f"{value:{sign}.3f} ({limits[0]:{sign}.3f} to {limits[1]:{sign}.3f})"
    return text if np.isfinite(value) else "too few"


def interval_table(results, sign="", scores=SCORE_NAMES):
    """DataFrame of texts: a row per name of the dict `results`, a column per score."""
    rows = [[with_interval(*score_interval(result, score), sign) for score in scores] for result in results.values()]
    return pd.DataFrame(rows, list(results), scores)


def percent(share):
    """A share as text; never a rounded 0 % or 100 %."""
    if not np.isfinite(share):
        return "undefined"
    if share > 0.999:
        return "> 99.9 %"
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


# ---- Figures: forest plot, and AUROC against training time ----
def forest(axis, results, score, colours, markers="o", offset=0, label=None):
    """One score as a forest plot, the first row on top.

    Parameters
    ----------
    results : dict name -> result of `patient_bootstrap` or `difference`; a marker for the estimate, a line for the
        95 % interval
    colours, markers : one for all rows, or one per row
    offset, label : of these rows, where several models share the axis
    """
    n = len(results)
    colours = [colours] * n if isinstance(colours, str) else colours
    markers = list(markers) * n if len(markers) == 1 else markers
    for row, (result, colour, marker) in enumerate(zip(results.values(), colours, markers)):
        value, limits = score_interval(result, score)
        axis.plot(limits, [row + offset] * 2, color=colour, linewidth=1.8)
        axis.plot(value, row + offset, color=colour, marker=marker, linestyle="none", clip_on=False,
                  label=None if row else label)
    axis.set(yticks=range(n), yticklabels=list(results), ylim=(n - 0.5, -0.5), xlabel=score)
    axis.grid(axis="y", visible=False)


def error_scale(axis, which="x", ticks=(0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998)):
    """Put scores on a logarithmic scale of their distance from 1; scores above 0.999 are drawn there."""
    def place_of(score):
        return -np.log(np.clip(1 - score, 1e-3, None))

    def score_at(place):
        return 1 - np.exp(-place)

    set_scale = axis.set_xscale if which == "x" else axis.set_yscale
    set_scale("function", functions=(place_of, score_at))
    axis.set(**{f"{which}lim": (0, 0.999), f"{which}ticks": ticks, f"{which}ticklabels": map(str, ticks)})
    axis.tick_params(axis=which, labelsize=9)


def difference_figure(results, heading, colours, markers):
    """Forest plots of paired differences, one panel per score; a black line at zero."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
    for axis, score in zip(axes, SCORE_NAMES):
        forest(axis, results, score, colours, markers)
        axis.axvline(0, color="black", linewidth=1)
        axis.set(xlabel=f"difference in {score}")
        axis.xaxis.set_major_locator(plt.MaxNLocator(5))
    figure.suptitle(heading)
    return figure


def time_figure(entries, pass_mark, heading):
    """Validation AUROC against training time of a dict name -> Entry, a marker per epoch.

    Returns a dict name -> seconds until the AUROC first reached `pass_mark`, of the models that did.
    """
    figure, axis = plt.subplots(figsize=(10, 4))
    error_scale(axis, "y")
    reached = {}
    for name, entry in entries.items():
        if entry.history:
            seconds, auroc = np.cumsum(entry.history["seconds"]), np.array(entry.history["auroc"], dtype=float)
            axis.plot(seconds, np.minimum(auroc, 0.999), label=name, color=entry.colour, marker=entry.marker,
                      markersize=4)
            if (auroc >= pass_mark).any():
                reached[name] = seconds[np.argmax(auroc >= pass_mark)]
    axis.axhline(pass_mark, color="black", linestyle=":", label=f"pass mark {pass_mark}")
    axis.set(xlabel="training time (s), logarithmic", ylabel="validation AUROC", xscale="log", title=heading)
    axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return reached


# ---- Counterfactual ECGs: P waves erased or added ----
P_START, P_LENGTH = P_WINDOW.start, P_WINDOW.stop - P_WINDOW.start  # in samples, from the R peak


def straighten(exam, starts, length=P_LENGTH):
    """Copy of an exam (8, samples): from each start, `length` samples of all leads are a straight line."""
    exam = exam.copy()
    for s in starts:
        if s >= 0 and s + length < exam.shape[1]:
            ends = exam[:, s], exam[:, s + length]
            exam[:, s : s + length] = np.linspace(*ends, length, endpoint=False, axis=1)
    return exam


def replace_p_by_tp(exam, peaks):
    """Copy of an exam whose P windows hold the T-P stretch before them, its ends moved to fit."""
    changed = straighten(exam, peaks + P_START)
    for s in peaks + P_START:
        if s >= P_LENGTH + 8:
            pause = exam[:, s - P_LENGTH - 8 : s - 8]
            changed[:, s : s + P_LENGTH] += pause - np.linspace(pause[:, 0], pause[:, -1], P_LENGTH, axis=1)
    return changed


def mean_p_wave(exam):
    """Mean P window of an exam over its beats (8, P_LENGTH), its ends moved to zero."""
    peaks = [r for r in r_peaks(exam) if r >= -P_START]
    wave = np.mean([exam[:, r + P_START : r + P_START + P_LENGTH] for r in peaks], axis=0)
    return wave - np.linspace(wave[:, 0], wave[:, -1], P_LENGTH, axis=1)


def add_p_waves(exam, peaks, wave):
    """Copy of an exam with `wave` (8, P_LENGTH) added in the P window of each beat."""
    exam = exam.copy()
    for s in peaks + P_START:
        if s >= 0:
            exam[:, s : s + P_LENGTH] += wave
    return exam


# ---- Counterfactual ECGs: beats re-spaced, all manipulations ----
def set_rr_intervals(exam, peaks, new_rr, before=104, after=144):
    """Copy of an exam (8, samples) whose beats have the intervals `new_rr` (same sum as before)."""
    moved = peaks[0] + np.r_[0, np.round(np.cumsum(new_rr))].astype(int)
    moved[-1] = peaks[-1]
    n, old, new = exam.shape[1], [0], [0]
    for k in range(len(peaks) - 1):
        shorter = min(peaks[k + 1] - peaks[k], moved[k + 1] - moved[k])
        keep_after, keep_before = int(min(after, 0.55 * shorter)), int(min(before, 0.4 * shorter))
        old += [peaks[k], peaks[k] + keep_after, peaks[k + 1] - keep_before]
        new += [moved[k], moved[k] + keep_after, moved[k + 1] - keep_before]
    old, new = [*old, peaks[-1], n - 1], [*new, moved[-1], n - 1]
    from_time = np.interp(np.arange(n), new, old)
    return np.stack([np.interp(from_time, np.arange(n), lead) for lead in exam]).astype(exam.dtype)


def af_like_rr(own_rr, af_rr, shortest=240):
    """RR intervals with the pattern of an AF exam, the sum of `own_rr`, and none below `shortest` (0.6 s)."""
    pattern = np.resize(af_rr, len(own_rr)) / np.mean(af_rr) * own_rr.mean()
    excess = np.maximum(pattern - shortest, 0)
    return shortest + excess * (own_rr.sum() - shortest * len(own_rr)) / excess.sum()


def sinus_variants(exam, patterns, rng):
    """Dict: manipulation -> changed copy of a sinus exam (8, samples); `patterns`: RR intervals of AF exams."""
    peaks = r_peaks(exam)
    own = np.diff(peaks)
    irregular = af_like_rr(own, patterns[rng.integers(len(patterns))])
    no_p = straighten(exam, peaks + P_START)
    return {
        "sinus: P windows erased": no_p,
        "sinus: T-P stretch in place of P": replace_p_by_tp(exam, peaks),
        "control: T-P stretch erased": straighten(exam, peaks + P_START - P_LENGTH - 8),
        "control: T waves erased": straighten(exam, peaks + 80),
        "sinus: irregular beats": set_rr_intervals(exam, peaks, irregular),
        "control: own intervals, reversed": set_rr_intervals(exam, peaks, own[::-1]),
        "sinus: P erased and irregular": set_rr_intervals(no_p, peaks, irregular),
    }


def af_variants(exam, wave):
    """Dict: manipulation -> changed copy of an AF exam (8, samples)."""
    peaks = r_peaks(exam)
    own = np.diff(peaks)
    even = set_rr_intervals(exam, peaks, np.full(len(own), own.mean()))
    return {
        "AF: P waves added": add_p_waves(exam, peaks, wave),
        "AF: regular beats": even,
        "control (AF): own intervals, reversed": set_rr_intervals(exam, peaks, own[::-1]),
        "AF: P added and regular": add_p_waves(even, r_peaks(even), wave),
    }


# ---- Disturbed ECGs ----
def _wave(x, size, hertz, rng):
    seconds = torch.arange(x.shape[1], device=x.device)[None, :, None] / SAMPLE_RATE
    phase = torch.rand(len(x), 1, x.shape[2], generator=rng).to(x.device)  # another one in each lead
    return size * torch.sin(2 * torch.pi * (hertz * seconds + phase))


def _noise(x, size, rng):
    return size * torch.randn(x.shape, generator=rng).to(x.device)


def _leads_off(x, leads):
    x = x.clone()
    x[:, :, list(leads)] = 0
    return x


def _middle(x, seconds):
    edge = (x.shape[1] - seconds * SAMPLE_RATE) // 2
    return torch.nn.functional.pad(x[:, edge:-edge], (0, 0, edge, edge))


DISTURBANCES = {  # of a batch (n, samples, 8) in mV, with a random generator
    "undisturbed": lambda x, rng: x,
    "amplitude halved": lambda x, rng: x / 2,
    "amplitude doubled": lambda x, rng: x * 2,
    "baseline wander 0.2 mV, 0.7 Hz": lambda x, rng: x + _wave(x, 0.2, 0.7, rng),
    "EMG noise 0.05 mV": lambda x, rng: x + _noise(x, 0.05, rng),
    "power line 0.1 mV, 50 Hz": lambda x, rng: x + _wave(x, 0.1, 50, rng),
    "lead off: II": lambda x, rng: _leads_off(x, [1]),
    "leads off: II and V1": lambda x, rng: _leads_off(x, [1, 2]),
    "recording of 7 s": lambda x, rng: _middle(x, 7),
}


def disturb(x, name, seed=42):
    """A batch (n, samples, 8) in mV with one of DISTURBANCES, the same in each call; padding stays zero."""
    rng, changed = torch.Generator().manual_seed(seed), torch.empty_like(x)
    for part, out in zip(x.split(256), changed.split(256)):  # in parts: noise of all exams would double the memory
        out[:] = DISTURBANCES[name](part, rng) * (part != 0).any(dim=2, keepdim=True)
    return changed


def mean_score_drop(results):
    """Mean loss of scores: the first of a dict of results of `patient_bootstrap` less the mean of all others."""
    clean, *disturbed = results.values()
    return tuple(clean[k] - np.mean([each[k] for each in disturbed], axis=0) for k in (0, 1))


def worst_disturbance(results, score):
    """Name of the lowest score in a dict of results, whose first one is undisturbed and does not count."""
    return min(list(results)[1:], key=lambda name: results[name][0][SCORE_NAMES.index(score)])


# ---- Evaluation: ROC curves, pass marks, calibration ----
def curve_points(truth, logits, threshold):
    """Recall, false positive rate and precision (at 50 % prevalence), and the position of `threshold` in them."""
    values, recall, fpr = balanced_rates(truth, logits)
    precision = recall[0] / (recall[0] + fpr[0])
    return np.r_[0, recall[0]], np.r_[0, fpr[0]], np.r_[1, precision], int(np.sum(values > threshold))


def pass_curves(auroc, ap):
    """Curves that just reach an AUROC or an AP (50 % prevalence), were the logits of both classes normal.

    Returns false positive rates, and the recall there for the AUROC and for the AP.
    """
    fpr = np.logspace(-12, 0, 5000)

    def recall(distance):  # of the two means, in standard deviations
        return norm.cdf(norm.ppf(fpr) + distance)

    def excess(distance):
        return np.trapezoid(recall(distance) / (recall(distance) + fpr), recall(distance)) - ap

    return fpr, recall(2**0.5 * norm.ppf(auroc)), recall(brentq(excess, 1, 5))


def cross_calibrated(truth, logits, folds):
    """Probability of AF at 50 % prevalence, of each fold by the logistic calibration of all other folds."""
    probability = np.empty(len(truth))
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(truth)), fold)
        calibration = balanced_threshold(truth[rest], logits[rest])
        probability[fold] = submission_probabilities(logits[fold], *calibration)[:, 1]
    return probability


def reliability_table(truth, p):
    """Bins of equal weight at 50 % prevalence: predicted, observed, low, high (95 %, Wilson), exams, AF."""
    exams = pd.DataFrame({"p": p, "AF": truth, "weight": exam_weights(truth, 0.5)}).sort_values("p", kind="stable")
    n_bins = int(np.clip(truth.sum() // 8, 2, 8))
    weight_upto = exams["weight"].cumsum() / exams["weight"].sum()
    rows = []
    for _, group in exams.groupby(np.ceil(n_bins * weight_upto - 1e-9)):  # but for rounding
        n, n_af = len(group), int(group["AF"].sum())
        shares = [n_af / n, *binomtest(n_af, n).proportion_ci(method="wilson")]
        balanced = to_probability(logit(shares) - logit(truth.mean()))  # the log-odds shift by a constant
        rows.append([np.average(group["p"], weights=group["weight"]), *balanced, n, n_af])
    return pd.DataFrame(rows, columns=["predicted", "observed", "low", "high", "exams", "AF"])


def reliability(axis, truth, p, colour):
    """Draw a reliability diagram of AF probabilities, reweighted to 50 % prevalence; returns the Brier score."""
    table = reliability_table(truth, p)
    x = table["predicted"].clip(2e-3, 1 - 2e-3)
    error_bars = [table["observed"] - table["low"], table["high"] - table["observed"]]
    axis.errorbar(x, table["observed"], yerr=error_bars, fmt="o", color=colour, elinewidth=2)
    for k, (left, n, n_af) in enumerate(zip(x, table["exams"], table["AF"])):
        height = -0.05 - 0.15 * (k % 2)  # neighbours apart
        axis.text(left, height, f"{n:,}\n{n_af:,}", ha="center", va="top", fontsize=8)
    reach = 1.15 * np.abs(logit(x)).max() + 0.2
    grid = to_probability(np.linspace(-reach, reach))
    axis.plot(grid, grid, color=GREY, linestyle=":", label="perfect calibration")
    ticks = [0.01, 0.1, 0.5, 0.9, 0.99] if reach > 3 else [0.1, 0.3, 0.5, 0.7, 0.9]
    axis.set(xscale="logit", ylim=(-0.36, 1.03), xlabel="predicted probability of AF", yticks=np.linspace(0, 1, 5))
    axis.set_xticks(ticks, [f"{100 * tick:.0f} %" for tick in ticks])
    axis.set_xticks([], minor=True)
    axis.set_xlim(grid[0], grid[-1])
    return brier_score_loss(truth, p, sample_weight=exam_weights(truth, 0.5))


# ---- Evaluation: F1 against the threshold ----
def prior_shift(threshold, scale, prevalence):
    """Logit of even odds at this prevalence, from `balanced_threshold` at 50 %."""
    return threshold + np.log((1 - prevalence) / prevalence) / scale


def f1_curve(truth, logits, prevalence):
    """The distinct logits, high to low, and F1 at this prevalence for a threshold just below each."""
    values, recall, fpr = (each.ravel() for each in balanced_rates(truth, logits))
    return values, 2 * prevalence * recall / (prevalence * (1 + recall) + (1 - prevalence) * fpr)


def f1_at(truth, logits, threshold, prevalence):
    """F1 at this prevalence where logits above `threshold` are predicted AF."""
    values, f1 = f1_curve(truth, logits, prevalence)
    return np.r_[0, f1][np.sum(values > threshold)]


# ---- Evaluation: error rates, subgroups, screening ----
def class_rates(truth, predicted, patients, rounds=2000, seed=42):
    """Recall and false positive rate of predictions: (2,), and of each draw of patients (draws, 2)."""
    af = np.asarray(truth) == 1
    columns = np.column_stack([predicted & af, af, predicted & ~af, ~af]).astype(float)

    def rates(weights):
        sums = weights @ columns
        with np.errstate(invalid="ignore"):
            return sums[:, [0, 2]] / sums[:, [1, 3]]

    draws = [rates(weights) for weights in patient_draws(patients, rounds, seed)]
    return rates(np.ones((1, len(af))))[0], np.concatenate(draws)


def error_text(errors, n, draws, what):
    """An error rate as text; where nothing is wrong, by the rule of three."""
    if errors == 0:
        return f"0 of {n:,} {what}: 0 errors in n still allow 3/n, here {percent(min(1, 3 / max(n, 1)))}"
    low, high = interval(draws)
    return f"{errors:,} of {n:,} {what}: {percent(errors / n)} ({percent(low)} to {percent(high)})"


def confusion(axis, truth, predicted):
    """Draw the confusion matrix, rows by label, with the share of each row; returns it."""
    table = confusion_matrix(truth, predicted, labels=[0, 1])
    axis.imshow(table / table.sum(axis=1, keepdims=True), cmap="Blues", vmin=0, vmax=2)
    for (i, j), count in np.ndenumerate(table):
        axis.text(j, i, f"{count:,}\n{percent(count / table[i].sum())}", ha="center", va="center")
    axis.set(xticks=(0, 1), xticklabels=("no AF", "AF"), yticks=(0, 1), yticklabels=("no AF", "AF"))
    axis.set(xlabel="predicted", ylabel="label", title="confusion matrix")
    axis.grid(False)
    return table


def subgroups(labels):
    """Dict name -> positions of exams: all, by age, by sex. Where age or sex is unknown, only all."""
    age, sex = labels["age"].to_numpy(dtype=float), labels["sex"].to_numpy()
    inside = {"all": np.full(len(labels), True), "under 50": age < 50, "50 to 64": (age >= 50) & (age < 65),
              "65 to 79": (age >= 65) & (age < 80), "80 and older": age >= 80, "women": sex == "F", "men": sex == "M"}
    return {name: np.flatnonzero(rows) for name, rows in inside.items()}


def screening_values(recall, fpr, prevalence):
    """PPV, NPV and what they mean in numbers, from recall and false positive rate."""
    true_alarms, false_alarms = prevalence * recall, (1 - prevalence) * fpr
    missed, all_clear = prevalence * (1 - recall), (1 - prevalence) * (1 - fpr)
    with np.errstate(divide="ignore", invalid="ignore"):
        ppv, per_true = true_alarms / (true_alarms + false_alarms), false_alarms / true_alarms
        npv = all_clear / (all_clear + missed)  # NaN where all exams are predicted AF
    row = {"PPV": ppv, "NPV": npv, "false alarms per true alarm": per_true}
    return row | {"missed AF per 10,000": 1e4 * missed, "false alarms per 10,000": 1e4 * false_alarms}


def screening_row(truth, logits, patients, cut, prevalence):
    """Predictions at the threshold `cut` in a population of this prevalence: dict of texts, with 95 % intervals."""
    (recall, fpr), draws = class_rates(truth, logits > cut, patients)
    row = {"threshold (logit)": f"{cut:.2f}", "recall": percent(recall), "specificity": percent(1 - fpr)}
    drawn = screening_values(*draws.T, prevalence)
    for name, value in screening_values(recall, fpr, prevalence).items():
        write = percent if name in ("PPV", "NPV") else "{:,.1f}".format
        low, high = map(write, interval(drawn[name]))
        row[name] = f"{write(value)} ({low} to {high})" if np.isfinite(value) else "no true alarm"
    if fpr == 0 and recall > 0:  # the rule of three: the worst that these exams allow
        allowed = 3 / max(np.sum(truth == 0), 3)
        worst = screening_values(recall, allowed, prevalence)
        row["specificity"] = f"at least {percent(1 - allowed)} (0 errors in n still allow 3/n)"
        row["PPV"] = f"at least {percent(worst['PPV'])}"
        for name in ("false alarms per true alarm", "false alarms per 10,000"):
            row[name] = f"at most {worst[name]:,.1f}"
    return row


# ---- Evaluation: occlusion, and exams on ECG paper ----
def occlusion(model, exam, device, width=200, step=100):
    """How much the logit of one exam (samples, 8) falls when `width` samples are zero: centres (s), falls."""
    starts = np.arange(0, len(exam) - width + 1, step)
    batch = exam[None].repeat(len(starts) + 1, 1, 1)
    for row, begin in enumerate(starts, 1):
        batch[row, begin:begin + width] = 0
    logits = predict(model, batch, device)
    return (starts + width / 2) / SAMPLE_RATE, logits[0] - logits[1:]


def occlusion_figure(exam, strip, heading):
    """Leads II and V1 of an exam (8, samples) on ECG paper, and below them the result of `occlusion`."""
    figure, axis = plt.subplots(figsize=(13, 3.3))
    ii, v1 = exam[LEAD_NAMES.index("II")], exam[LEAD_NAMES.index("V1")]
    low, high = np.quantile(ii, [0.001, 0.999])
    v1_low, v1_high = np.quantile(v1, [0.001, 0.999])
    shift = low - v1_high - 0.3  # V1 below II
    bottom, top = max(shift + v1_low - 0.2, high - 6), high + 0.3
    edge = bottom - 0.12 * (top - bottom)
    for lead, level in ((ii, 0), (v1, shift)):
        axis.plot(np.arange(len(lead)) / SAMPLE_RATE, lead + level, color="black", linewidth=0.8)
    times, values = strip
    largest = max(np.abs(values).max(), 1e-9)
    extent = (times[0] - 0.125, times[-1] + 0.125, edge, bottom)
    axis.imshow(values[None], cmap="PuOr_r", vmin=-largest, vmax=largest, aspect="auto", extent=extent)
    axis.text(1.005, 0.06, f"±{largest:.1f}", transform=axis.transAxes, va="center", color=GREY)
    axis.set(xlim=(0, N_SAMPLES / SAMPLE_RATE), ylim=(edge, top), xlabel="time (s)", yticks=[0, shift],
             yticklabels=["II", "V1"])
    axis.xaxis.set_major_locator(plt.MultipleLocator(1))
    axis.xaxis.set_minor_locator(plt.MultipleLocator(0.2))
    axis.yaxis.set_minor_locator(plt.MultipleLocator(0.5))
    axis.grid(which="both", color="#e09a9a", alpha=0.6, linewidth=0.6)
    axis.set_title(heading, fontsize=11)
    return figure


# ---- Prevalence of unlabelled exams, and what a published score tells ----
def estimate_prevalence(probability, assumed=0.5, rounds=500):
    """Prevalence of AF among exams from their probabilities, which are calibrated for the share `assumed`.

    Expectation maximisation after Saerens, Latinne and Decaestecker (2002, Neural Computation).
    """
    share, odds = assumed, probability / np.clip(1 - probability, 1e-12, None) * (1 - assumed) / assumed
    for _ in range(rounds):
        posterior = odds * share / (odds * share + 1 - share)
        share, before = posterior.mean(), share
        if abs(share - before) < 1e-7:
            break
    return float(share)


def published_tells(accuracy, f1, n_predicted_af, n_exams):
    """Recall, precision and prevalence of the hidden labels from a published score: (value, low, high) each.

    Where TP of our `n_predicted_af` exams are right and `af` exams have AF, 1 - accuracy is (n_predicted_af +
    af - 2 TP) / n_exams and F1 is 2 TP / (n_predicted_af + af). Low and high: over all whole numbers TP and af
    that give the figures as published, rounded to three digits. ValueError: none do.
    """
    half = 0.0005 + 1e-9
    af = np.arange(n_exams + 1)
    total = n_predicted_af + af
    tp_low = np.maximum((f1 - half) * total, total - (1 - accuracy + half) * n_exams) / 2
    tp_high = np.minimum((f1 + half) * total, total - (1 - accuracy - half) * n_exams) / 2
    tp_low = np.ceil(np.maximum(tp_low, np.maximum(total - n_exams, 0)))
    tp_high = np.floor(np.minimum(tp_high, np.minimum(af, n_predicted_af)))
    fits = tp_low <= tp_high
    if not fits.any():
        raise ValueError("no counts give this accuracy and F1: was another file scored, or other exams?")
    af, tp_low, tp_high = af[fits], tp_low[fits], tp_high[fits]
    total = (1 - accuracy) * n_exams / (1 - f1) if f1 < 1 else 2 * n_predicted_af
    best_af = np.clip(total - n_predicted_af, af[0], af[-1])
    tp = f1 * (n_predicted_af + best_af) / 2
    with_af, predicted = np.maximum(af, 1), n_predicted_af or np.nan
    found = {"recall": (tp / max(best_af, 1), tp_low / with_af, tp_high / with_af),
             "precision": (tp / predicted, tp_low / predicted, tp_high / predicted),
             "prevalence": (best_af / n_exams, af / n_exams, af / n_exams)}
    return {name: (float(np.clip(value, low.min(), high.max())), float(low.min()), float(high.max()))
            for name, (value, low, high) in found.items()}


#@title Leaderboard: register and submit { display-mode: "form" }
class LeaderboardError(RuntimeError):
    """The leaderboard refused or was not reached: `.status` (None if not reached), `.reason` (its words)."""

    def __init__(self, message, status=None, reason=""):
        super().__init__(message)
        self.status, self.reason = status, reason


def register_team(team_id, password, host=DEFAULT_HOST, *, demo=False):
    """Register a team; again with the same password is harmless. Returns the `requests` response (201 new, 200 known).

    LeaderboardError: the server refuses or is not reached. ValueError: it would accept what cannot be meant.
    """
    password, host = Secret(password or ""), Secret(host or "")
    team_id = check_identity(team_id, password, host, demo)
    return _call("PUT", host, "register", team_id, password)


def submit(team_id, password, prediction, note, host=DEFAULT_HOST, *, n_exams=None, experiment="", metrics=None,
           af_probability=None, demo=False, allow_one_sided=False, directory="submissions"):
    """Save a submission in `directory`, then send it; returns the `requests` response (201 new, 200 replaced).

    Parameters
    ----------
    prediction : array (exams, 2): probability of no AF and of AF, rows in the order of RECORDS.txt
    note : str, 1-20 characters, shown beside the score
    n_exams, af_probability : rows and probabilities (exams,) that the experiment recorded: checked where given
    experiment, metrics : kept with the saved submission
    demo : True for predictions of demo data, which go to servers on this machine only
    allow_one_sided : send although all predictions are on one side of 0.5

    Raises ValueError before anything is sent; LeaderboardError when the server refuses or is not reached.
    """
    password, host = Secret(password or ""), Secret(host or "")
    team_id = check_identity(team_id, password, host, demo)
    check_note(note)
    table = check_prediction(prediction, n_exams, af_probability, allow_one_sided)
    now = datetime.now(timezone.utc)
    saved = {"time": now.isoformat(timespec="seconds"), "host": host, "team": team_id, "experiment": experiment,
             "note": note, "metrics": metrics or {}, "digest": _prediction_digest(table),
             "answer": {"status": None, "reason": "no answer yet"}, "prediction": table.tolist()}
    name = f"{now:%Y%m%d_%H%M%S_%f}_{experiment or note}"
    path = Path(directory) / (re.sub(r"[^A-Za-z0-9_-]", "_", name) + ".json")
    write_json(path, saved)
    try:
        answer = _call("PUT", host, "leaderboard", team_id, password, {"prediction": saved["prediction"], "note": note})
    except LeaderboardError as error:
        _save_answer(path, saved, error.status, error.reason)
        raise
    _save_answer(path, saved, answer.status_code, _reason(answer))
    return answer


def _save_answer(path, saved, status, reason):
    try:
        write_json(path, {**saved, "answer": {"status": status, "reason": reason}})
    except OSError as error:  # a full disk: the server's answer still stands
        print(f"The answer ({status or 'none'}) could not be saved in {path} ({error}): make room. "
              "Look at the leaderboard page before you send again.", flush=True)


#@title Leaderboard: what was sent, what was published { display-mode: "form" }
def sent_submissions(directory="submissions"):
    """Table of what `submit` saved: time, day (UTC), host, team, experiment, note, digest, status, reason."""
    columns, rows = ["time", "day", "host", "team", "experiment", "note", "digest", "status", "reason"], []
    for path in sorted(Path(directory).glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            rows.append({**row, **row["answer"], "day": row["time"][:10]})
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{path} is no submission of this notebook (empty or foreign): skipped.", flush=True)
    return pd.DataFrame(rows, columns=columns)


def accepted_days(sent, team_id, host):
    """The days (UTC) on which the server accepted something: an answer of 200 may belong to a first one, too."""
    return sorted(set(_accepted(sent, team_id, host)["day"]))


def accepted_submission(prediction, host, team_id, directory="submissions"):
    """The row of `sent_submissions` (a dict) in which the server accepted just this prediction, or None.

    One that a later one of the same day replaced does not count: it got no score and may be sent again.
    """
    accepted = _accepted(sent_submissions(directory), team_id, host)
    after = accepted.shift(-1)
    replaced = (after["day"] == accepted["day"]) & (after["status"] == 200)
    same = accepted[~replaced & (accepted["digest"] == _prediction_digest(prediction))]
    return same.iloc[-1].to_dict() if len(same) else None


def _accepted(sent, team_id, host):
    same_host = sent["host"].astype(str).str.rstrip("/") == host.rstrip("/")
    return sent[same_host & (sent["team"] == team_id.strip()) & sent["status"].isin([200, 201])]


def _prediction_digest(prediction):
    return hashlib.sha256(np.asarray(prediction, dtype=np.float64).tobytes()).hexdigest()[:16]


def published_scores(team_id, host=DEFAULT_HOST):
    """The team's rows of the public leaderboard page, newest last: note, accuracy, f1, auc, ap (NaN while "TBC")."""
    host = Secret(host or "")
    team_id = check_identity(team_id, None, host)
    page = _call("GET", host, "leaderboard").text
    fields = {"team": "team", "note": "note", "acc": "accuracy", "f1": "f1", "auc": "auc", "ap": "ap"}
    rows = []
    for row in re.findall(r"\{\s*(team:\s*'[^']*'(?:,\s*\w+:\s*'[^']*')*),?\s*\}", page):
        values = re.findall(r"(\w+):\s*'([^']*)'", row)
        rows.append({key: html.unescape(value) for key, value in values})
    table = pd.DataFrame(rows, columns=list(fields)).rename(columns=fields)
    table = table[table["team"] == team_id].drop(columns="team").reset_index(drop=True)
    scores = ("accuracy", "f1", "auc", "ap")
    return table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in scores})


def leaderboard_password():
    """The password from the environment, then a Colab secret, then a prompt (all: LEADERBOARD_PASSWORD)."""
    if os.environ.get("LEADERBOARD_PASSWORD"):
        return Secret(os.environ["LEADERBOARD_PASSWORD"])
    try:
        from google.colab import userdata
        if secret := Secret(userdata.get("LEADERBOARD_PASSWORD") or ""):
            return secret
    except ImportError:
        pass
    except Exception as error:  # Colab raises its own types for a missing or forbidden secret
        print(f"No Colab secret LEADERBOARD_PASSWORD ({type(error).__name__}; key symbol on the left).")
    try:
        from getpass import getpass
        return Secret(getpass("Leaderboard password (sent over plain http: use it nowhere else): "))
    except Exception as error:  # a headless run: Jupyter's error type is not importable everywhere
        raise ValueError("No password: set LEADERBOARD_PASSWORD in the environment or as a Colab secret.") from error


#@title Leaderboard: what is refused before anything is sent { display-mode: "form" }
def check_prediction(prediction, n_exams=None, af_probability=None, allow_one_sided=False):
    """The prediction as an array (exams, 2); ValueError for what `submit` refuses before anything is sent."""
    try:
        table = np.asarray(prediction, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("the rows of the prediction differ in length or are no numbers") from error
    if table.ndim != 2 or table.shape[1] != 2 or len(table) == 0:
        raise ValueError(f"the prediction must have shape (exams, 2), not {table.shape}")
    if n_exams is not None and len(table) != n_exams:
        raise ValueError(f"the prediction has {len(table)} rows, the test set {n_exams} exams")
    if not (np.isfinite(table).all() and (table >= 0).all() and np.allclose(table.sum(axis=1), 1, atol=1e-6)):
        raise ValueError("every row must be two probabilities that sum to 1")
    recorded = table[:, 1] if af_probability is None else np.ravel(af_probability)
    if len(recorded) != len(table):
        raise ValueError(f"the prediction has {len(table)} rows, the experiment recorded {len(recorded)}")
    if not np.allclose(table[:, 1], recorded, atol=1e-6):
        if np.allclose(table[:, 0], recorded, atol=1e-6):
            raise ValueError("the columns are swapped: the second must be AF")
        raise ValueError("the prediction is not the one that the experiment recorded")
    if len(set(table[:, 1] > 0.5)) == 1 and not allow_one_sided:
        raise ValueError("all predictions are on one side of 0.5, which scores F1 0 or 0.667. The usual cause is a "
                         "sigmoid applied twice. If it is meant: allow_one_sided=True")
    return table


#@title Leaderboard: one request, and what to do about each answer { display-mode: "form" }
_ADVICE = {  # words in the server's answer -> what to do
    "different password": "Use the password of the first registration, or choose another team id.",
    "too long": "Team id and note have at most 20 characters.",
    "not the same size": "Predict every test exam once: two columns, no AF and AF.",
    "Submission closed": "The final date has passed.",
    "Maximum number": "All five submissions are used; only a submission of the same day can still be replaced.",
    "401:": "Team id or password is wrong, or the team is not registered.",
    "404:": "No leaderboard answers there: check LEADERBOARD_HOST.",
}


def _reason(answer):
    """The server's own words: the <p> of its HTML error page, else the text."""
    words = re.search(r"<p>(.*?)</p>", answer.text, flags=re.S)
    return html.unescape(re.sub(r"<[^>]+>|\s+", " ", words[1] if words else answer.text)).strip()[:300] or answer.reason


def _send(method, url, team_id, password, content):
    """One request: time-outs, some retries (connection errors and 5xx only), no redirects.

    Returns (answer, None) or (None, problem): errors end here, as the frames of a verbose traceback would show the
    password, in clear and in base64.
    """
    retry = Retry(total=2, backoff_factor=0.5, status_forcelist=range(500, 600), allowed_methods=None,
                  raise_on_status=False, respect_retry_after_header=False)
    try:
        with requests.Session() as session:
            session.trust_env = False  # no proxy, no .netrc of the environment
            for scheme in ("http://", "https://"):  # as long as requests' own prefixes, or theirs win
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            auth = (team_id.encode("utf-8"), password.encode("utf-8")) if team_id else None
            return session.request(method, url, json=content, auth=auth, timeout=(10, 60), allow_redirects=False), None
    except KeyboardInterrupt:
        return None, "interrupted"
    except Exception as error:  # nearly always a requests.RequestException
        return None, f"{type(error).__name__}: {error}"


def _call(method, host, path, team_id=None, password=None, content=None):
    url = f"{host.rstrip('/')}/{path}"
    answer, problem = _send(method, url, team_id, password, content)
    if problem == "interrupted":
        raise KeyboardInterrupt
    if answer is None:
        raise LeaderboardError(f"{url} was not reached or broke off ({problem.partition(':')[0]}). Nothing is lost: "
                               "check LEADERBOARD_HOST, look at the leaderboard page, then send again.", None, problem)
    status = answer.status_code
    if status in (200, 201):
        return answer
    reason = _reason(answer)
    refusal = f"{status}: {reason.rstrip('.')}."
    later = status >= 500 or status in (408, 429)
    general = "Try again later." if later else "The same request would be refused again: change what it names."
    advice = next((text for words, text in _ADVICE.items() if words in refusal), general)
    if answer.is_redirect:
        address = urljoin(url, answer.headers["Location"]).removesuffix(path)
        advice = f"The server redirects: if you know that address, set LEADERBOARD_HOST to {address}"
    raise LeaderboardError(f"{url} answered {refusal} {advice}", status, reason)
