"""Run the notebook headless on real ECGs and commit its outputs into the notebook's file.

    python tests/tools/run_on_real.py PATH [--work FOLDER] [--threads 1]

PATH: a codesubset/ folder or an archive of one. The notebook runs in FOLDER (default: a temporary one), alone
as a student has it. Its outputs go into assignment_ecg_classification.ipynb with a digest of the code that
made them: without warnings, widgets, time stamps and paths of this machine, 4 MB at most. A run that fails
leaves the file as it is; what was run until then is written beside FOLDER.
"""

import argparse
import base64
import copy
import io
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from notebook_source import MODULE, ROOT, as_text, code_cells, code_digest, load, save

MAX_BYTES = 4_000_000
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|tmp|content)/|[A-Z]:\\\\")
OURS = ("ECG_", "LEADERBOARD_")  # settings of the caller's environment do not reach the notebook


# ---- Running -------------------------------------------------------------------------------------
def execute(notebook, folder, threads=None, **settings):
    """Run a notebook in `folder`, in a kernel of its own.

    Parameters
    ----------
    notebook : dict, stays as it is
    threads : OMP_NUM_THREADS of the kernel; None: the machine's default
    settings : environment variables of the notebook (ECG_DATA="demo")

    Returns the executed notebook (dict), the error or None, and the seconds.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(OURS)}
    environment.pop("OMP_NUM_THREADS", None)
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    environment.update({key: str(value) for key, value in settings.items()})
    node = nbformat.reads(as_text(notebook), as_version=4)
    client = NotebookClient(
        node,
        timeout=None,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    start, error = time.monotonic(), None
    try:
        client.execute(env=environment)
    except (CellExecutionError, DeadKernelError) as caught:
        error = caught
    return node, error, time.monotonic() - start


def error_line(error):
    """The last line of the error, in which Python says what happened."""
    lines = [line.strip() for line in plain(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def plain(error):
    """The error's text without a terminal's colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", str(error))


# ---- Cleaning ------------------------------------------------------------------------------------
def clean_outputs(outputs, words):
    """Outputs as they may be committed; `words`: paths of this machine -> neutral words."""
    kept = []
    for output in outputs:
        output = {key: value for key, value in output.items() if key != "transient"}
        if output.get("name") == "stderr":
            continue
        if any("widget" in kind for kind in output.get("data", {})):
            continue
        if "text" in output:
            output["text"] = neutral(output["text"], words)
        if "data" in output:
            output["data"] = {
                kind: value if kind.startswith("image/") else neutral(value, words)
                for kind, value in output["data"].items()
            }
        kept.append(output)
    return kept


def neutral(text, words):
    """Text (or list of lines) without machine paths and without what a progress line wrote over itself."""
    if not isinstance(text, (str, list)):
        return text
    joined = re.sub(r"[^\n]*\r(?!\n)", "", "".join(text))
    for path in sorted(words, key=len, reverse=True):
        joined = re.sub(as_pattern(path), words[path], joined)
    return joined.splitlines(keepends=True)


def as_pattern(path):
    """Regular expression of a path that does not start or end within a word."""
    return rf"(?<![\w.]){re.escape(path)}(?!\w)"


def machine_words(work, data):
    """Paths that outputs may name -> what a reader sees instead."""
    words = {
        work: "work",
        data: "data",
        ROOT: "project",
        Path.home(): "~",
        Path(sys.prefix): "python",
        Path(tempfile.gettempdir()): "temp",
    }
    both = {str(path.resolve()): word for path, word in words.items()}
    both.update({str(path): word for path, word in words.items()})
    return {path: word for path, word in both.items() if len(path) > 1}


def paths_left(notebook, words):
    """Lines of the outputs that still name a path of this machine."""
    lines = []
    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            texts = [output.get("text", "")]
            texts += [
                value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")
            ]
            lines += [line for text in texts for line in "".join(map(str, text)).splitlines()]
    patterns = [MACHINE_PATH.pattern, *map(as_pattern, words)]
    return [line for line in lines if any(re.search(pattern, line) for pattern in patterns)]


def warnings_of(notebook):
    """What cells wrote to stderr: it is not committed, but a clean notebook has none."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    return "".join("".join(output["text"]) for output in outputs if output.get("name") == "stderr")


def fit_size(notebook, limit=MAX_BYTES):
    """Give the pictures fewer colours until the file is small enough; returns its size in bytes."""
    for colours in (None, 128, 64, 32, 16):
        if colours:
            recolour(notebook, colours)
        size = len(as_text(notebook).encode("utf-8"))
        if size <= limit:
            return size
    raise ValueError(f"the notebook would have {size / 1e6:.1f} MB: fewer or smaller figures are needed")


def recolour(notebook, colours):
    """Store every PNG with a palette of so many colours, where that is smaller."""
    from PIL import Image  # matplotlib brings it

    for cell in code_cells(notebook):
        for output in cell["outputs"]:
            if "image/png" not in output.get("data", {}):
                continue
            encoded = "".join(output["data"]["image/png"])
            picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
            buffer = io.BytesIO()
            picture.quantize(colours).save(buffer, "png", optimize=True)
            smaller = base64.b64encode(buffer.getvalue()).decode("ascii")
            if len(smaller) < len(encoded):
                output["data"]["image/png"] = smaller


# ---- The command ---------------------------------------------------------------------------------
def with_outputs(notebook, executed, words):
    """`notebook` with the cleaned outputs of its executed copy, and the digest of its code."""
    result = copy.deepcopy(notebook)
    for cell, done in zip(code_cells(result), code_cells(executed)):
        cell["outputs"] = clean_outputs(done["outputs"], words)
        cell["execution_count"] = done["execution_count"]
        cell["metadata"].pop("execution", None)
    result["metadata"].pop("widgets", None)
    result["metadata"]["outputs_of"] = code_digest(result)
    left = paths_left(result, words)
    if left:
        raise ValueError("outputs still name paths of this machine:\n  " + "\n  ".join(left[:10]))
    return result


def run(data, work, threads):
    """Run on `data` in `work`; the seconds, and the size of the written file."""
    notebook, failed = load(), work.with_name(work.name + ".failed.ipynb")
    beside = work / MODULE.name
    if beside.exists() and beside.read_bytes() != MODULE.read_bytes():
        raise SystemExit(
            f"{beside} is another module than the project's, and the notebook would use it: remove it"
        )
    executed, error, seconds = execute(notebook, work, threads, ECG_DATA=data, ECG_WORK=".")
    try:
        if error:
            raise error
        result = with_outputs(notebook, executed, machine_words(work, data))
        size = fit_size(result)
        if code_digest(load()) != code_digest(notebook):
            raise ValueError("the notebook was edited while it ran")
    except (CellExecutionError, DeadKernelError, ValueError) as problem:
        nbformat.write(executed, failed)
        raise SystemExit(
            f"{plain(problem)}\n\nAfter {seconds:.0f} s. The committed notebook stays as it is; "
            f"the run so far: {failed}"
        ) from None
    save(result)
    if warnings_of(executed):
        print(f"Left out, written to stderr:\n{warnings_of(executed)[:2000]}")
    return seconds, size


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="PATH", type=Path, help="a codesubset/ folder or an archive of one")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="where the run writes; finished parts are used again"
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not options.data.exists():
        parser.error(f"{options.data} does not exist")
    work = (options.work or Path(tempfile.mkdtemp(prefix="run_on_real_"))).absolute()
    work.mkdir(parents=True, exist_ok=True)
    print(f"Running in {work} with {options.threads} thread(s) ...", flush=True)
    seconds, size = run(options.data.absolute(), work, options.threads)
    print(f"Done in {seconds:.0f} s; the notebook now carries the outputs ({size / 1e6:.2f} MB).")


if __name__ == "__main__":
    main()
