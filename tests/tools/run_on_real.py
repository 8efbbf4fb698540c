"""Run the notebook headless on real ECGs and commit its outputs into the notebook's file.

    python tests/tools/run_on_real.py PATH [--work FOLDER] [--threads 1]

PATH: a codesubset/ folder or an archive of one. The notebook runs in FOLDER, alone as a student has it. Its outputs go
into assignment_ecg_classification.ipynb with a digest of the code that made them: no warnings, widgets, time stamps,
paths of this machine, 4 MB at most. A failed run leaves the file as it is; what it did is written beside FOLDER.
"""
import argparse
import base64
import copy
import hashlib
import io
import json
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "assignment_ecg_classification.ipynb"
MACHINE_PATH = r"(?<![\w.])/(home|root|Users|tmp|content)/|[A-Z]:\\\\"
SETTINGS = ("ECG_", "LEADERBOARD_", "OMP_NUM_THREADS")  # the caller's own do not reach the notebook


def load(path=NOTEBOOK):
    """The notebook as a dict."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def as_text(notebook):
    """The text of the notebook's file."""
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def save(text, path):
    """Write a file, whole or not at all."""
    part = Path(f"{path}.part")
    part.write_bytes(text.encode("utf-8"))
    os.replace(part, path)


def code_cells(notebook):
    """The code cells in order: the dicts of `notebook` itself."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def code_digest(notebook):
    """SHA-256 (hex) of all code cells' sources: which code made these outputs?"""
    text = "\n\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def network_namespace(notebook=None):
    """What the cells with the tag "network" define (AFNet, PlainCNN, Model, ..., augment_exams, RECIPE), a dict."""
    sys.path.insert(0, str(ROOT))
    import numpy as np  # here, so that the other functions start fast
    import torch

    import ecg_helpers as ecg
    space = {"__name__": "__main__", "ecg": ecg, "np": np, "torch": torch, "nn": torch.nn, "partial": partial}
    for cell in code_cells(notebook or load()):
        if "network" in cell["metadata"].get("tags", []):
            exec("".join(cell["source"]), space)
    return space


def execute(notebook, folder, threads=None, **settings):
    """Run a notebook (a dict, which stays as it is) in `folder`, in a kernel of its own.

    `threads`: OMP_NUM_THREADS, None: the machine's default. `settings`: environment variables, ECG_DATA="demo".
    Returns the executed notebook, the error or None, and the seconds.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(SETTINGS)}
    environment.update({key: str(value) for key, value in settings.items()})
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    node, start, error = nbformat.reads(as_text(notebook), as_version=4), time.monotonic(), None
    client = NotebookClient(node, timeout=None, kernel_name="python3", record_timing=False,
                            resources={"metadata": {"path": str(folder)}})
    try:
        client.execute(env=environment)
    except (CellExecutionError, DeadKernelError) as caught:
        error = caught
    return node, error, time.monotonic() - start


def with_outputs(notebook, executed, words):
    """`notebook` with the outputs of its executed copy as they may be committed, and the digest of its code."""
    result = copy.deepcopy(notebook)
    for cell, done in zip(code_cells(result), code_cells(executed)):
        cell["outputs"], cell["execution_count"] = [], done["execution_count"]
        for output in done["outputs"]:
            if output.get("name") == "stderr" or any("widget" in kind for kind in output.get("data", {})):
                continue
            cell["outputs"].append(output := dict(output))
            if "text" in output:
                output["text"] = neutral(output["text"], words)
            if "data" in output:
                output["data"] = {kind: value if kind.startswith("image/") else neutral(value, words)
                                  for kind, value in output["data"].items()}
    result["metadata"].pop("widgets", None)
    result["metadata"]["outputs_of"] = code_digest(result)
    return result


def neutral(text, words):
    """Lines of an output; `words`: paths of this machine -> what a reader sees. ValueError: another path is left."""
    text = re.sub(r"[^\n]*\r(?!\n)", "", "".join(text))  # what a progress line wrote over itself
    for path in sorted(words, key=len, reverse=True):
        text = re.sub(rf"(?<![\w.]){re.escape(path)}(?!\w)", words[path], text)
    if left := [line for line in text.splitlines() if re.search(MACHINE_PATH, line)]:
        raise ValueError(f"an output names a path of this machine: {left[:3]}")
    return text.splitlines(keepends=True)


def fit_size(notebook, limit=4_000_000):
    """Give the pictures fewer colours until the file is small enough; returns its text."""
    from PIL import Image  # matplotlib brings it
    for colours in (128, 64, 32, 16, 8):
        text = as_text(notebook)
        if len(text.encode("utf-8")) <= limit:
            return text
        for output in [output for cell in code_cells(notebook) for output in cell["outputs"]]:
            if encoded := "".join(output.get("data", {}).get("image/png", "")):
                picture, buffer = Image.open(io.BytesIO(base64.b64decode(encoded))), io.BytesIO()
                picture.convert("RGB").quantize(colours).save(buffer, "png", optimize=True)
                smaller = base64.b64encode(buffer.getvalue()).decode("ascii")
                output["data"]["image/png"] = min(encoded, smaller, key=len)
    raise ValueError(f"the notebook would have {len(text) / 1e6:.1f} MB: fewer or smaller figures are needed")


def run(data, work, threads=1, path=NOTEBOOK):
    """Run on `data` in `work` and write the outputs into the notebook at `path`."""
    notebook = load(path)
    work.mkdir(parents=True, exist_ok=True)
    executed, error, seconds = execute(notebook, work, threads, ECG_DATA=data, ECG_WORK=".")
    words = {work: "work", data: "data", ROOT: "project", Path.home(): "~", Path(sys.prefix): "python",
             Path(tempfile.gettempdir()): "temp"}
    words = {str(name): word for path, word in words.items() for name in (path, path.resolve()) if name.name}
    try:
        if error:
            raise error
        text = fit_size(with_outputs(notebook, executed, words))
        if code_digest(load(path)) != code_digest(notebook):
            raise ValueError("the notebook was edited while it ran")
    except (CellExecutionError, DeadKernelError, ValueError) as problem:
        failed = work.with_name(work.name + ".failed.ipynb")
        nbformat.write(executed, failed)
        raise SystemExit(f"{problem}\n\n{path.name} stays as it is; the run until then: {failed}") from None
    save(text, path)
    warnings = [part.text for cell in code_cells(executed) for part in cell.outputs if part.get("name") == "stderr"]
    print(f"Done in {seconds:.0f} s. Left out:", *warnings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="PATH", type=Path)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="finished parts of an earlier run are used again")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    folder = (given.work or Path(tempfile.mkdtemp(prefix="run_on_real_"))).absolute()
    run(given.data.resolve(strict=True), folder, given.threads)
