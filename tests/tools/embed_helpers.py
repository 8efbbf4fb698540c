"""Put the pieces of ecg_helpers.py into the notebook's helper cells.

    python tests/tools/embed_helpers.py            # write
    python tests/tools/embed_helpers.py --check    # only say whether they agree; status 1 where not

The module is cut at its lines "# ---- title ----" and "#@title title"; piece k goes into the k-th cell that
starts with `%%helper`. Outputs are removed where they belong to other code: a piece changed, or any other cell did.
"""

import argparse
import difflib
import sys
from pathlib import Path

from notebook_source import (
    MODULE,
    NOTEBOOK,
    clear_outputs,
    code_digest,
    helper_cells,
    helper_pieces,
    load,
    save,
)


def embed(notebook_file=NOTEBOOK, module_file=MODULE, write=True):
    """Bring the helper cells up to date; returns the titles of the pieces that differed.

    ValueError, with nothing written: the notebook has more or fewer helper cells than the module has pieces.
    """
    notebook = load(notebook_file)
    pieces = helper_pieces(Path(module_file).read_text(encoding="utf-8"))
    cells = helper_cells(notebook)
    if len(cells) != len(pieces):
        raise ValueError(mismatch(cells, pieces, notebook_file, module_file))
    changed = []
    for number, ((position, *_), (title, piece)) in enumerate(zip(cells, pieces), 1):
        text = f"%%helper {number} {title}\n{piece}".splitlines(keepends=True)
        cell = notebook["cells"][position]
        if "".join(cell["source"]) != "".join(text):
            cell["source"] = text
            changed.append(f"{number} {title}")
    stale = notebook["metadata"].get("outputs_of") not in (None, code_digest(notebook))
    if write and (changed or stale):
        clear_outputs(notebook)
        save(notebook, notebook_file)
    return changed


def mismatch(cells, pieces, notebook_file, module_file):
    """Which piece has no cell and where it belongs, which cell has no piece."""
    there = [title for _, _, title, _ in cells]
    wanted = [title for title, _ in pieces]
    lines = [
        f"{Path(module_file).name} has {len(pieces)} pieces, "
        f"{Path(notebook_file).name} {len(cells)} helper cells:"
    ]
    for kind, a, b, c, d in difflib.SequenceMatcher(None, there, wanted, autojunk=False).get_opcodes():
        if kind == "equal":
            continue
        after = f"after cell {cells[a - 1][0]} ({there[a - 1]!r})" if a else "before all others"
        for number in range(c + 1, d + 1):
            lines.append(
                f"  piece {number}, {wanted[number - 1]!r}, has no cell: add one with the line "
                f"'%%helper {number} {wanted[number - 1]}' {after}"
            )
        for position, _, title, _ in cells[a:b]:
            lines.append(f"  cell {position}, {title!r}, carries no piece of the module: remove it")
    return "\n".join(lines)


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    had_outputs = "outputs_of" in load()["metadata"]
    try:
        changed = embed(write=not check)
    except ValueError as error:
        sys.exit(str(error))
    if not changed:
        removed = had_outputs and "outputs_of" not in load()["metadata"]
        print(
            f"{NOTEBOOK.name} carries the present {MODULE.name}."
            + " Its outputs belonged to other code and were removed." * removed
        )
    elif check:
        sys.exit(
            f"{len(changed)} piece(s) differ ({'; '.join(changed)}): run python tests/tools/embed_helpers.py"
        )
    else:
        print(
            f"{NOTEBOOK.name} now carries the present {MODULE.name}, and has no outputs. "
            f"Changed: {'; '.join(changed)}."
        )


if __name__ == "__main__":
    main()
