"""Keep ecg_helpers.py and the notebook's %%helper cells one text.

    python tests/tools/sync_helpers.py [--to-module | --to-notebook]   # without either: do they agree? else status 1

A cell whose first line is `%%helper Title` carries one piece of the module, which starts with the line
`# ==== Title ====`; what stands before the first such line is the piece "Imports and constants". Shows the difference,
keeps the replaced file as .bak, removes outputs of edited cells only, and stops where both sides changed since the
last commit, unless --force is given.
"""
import argparse
import difflib
import json
import re
import shutil
import subprocess
import sys

from run_on_real import NOTEBOOK, ROOT, as_text, code_cells, load, save

MODULE = ROOT / "ecg_helpers.py"
FIRST = "Imports and constants"


def module_pieces(text):
    """Title -> piece of the module's text, in order. ValueError: it cannot be cut."""
    pieces = re.split(r"\n\n\n(?=# ==== )", text.removesuffix("\n"))
    titles = [FIRST, *re.findall(r"^# ==== (.+) ====$", text, flags=re.M)]
    if not len(set(titles)) == len(titles) == len(pieces) or not text.endswith("\n"):
        raise ValueError("each piece needs its own line '# ==== Title ====', with two blank lines before it")
    return dict(zip(titles, pieces))


def helper_cells(notebook):
    """List of (title, piece, cell) of the notebook's %%helper cells, in order."""
    found = []
    for cell in code_cells(notebook):
        head, _, piece = "".join(cell["source"]).partition("\n")
        if head.startswith("%%helper "):
            found.append((head.removeprefix("%%helper ").strip(), piece, cell))
    return found


def helper_text(path, text=None):
    """The module's text as this file has it, the module or a notebook; `text`: of another version of the file."""
    text = path.read_text(encoding="utf-8") if text is None else text
    if path.suffix == ".py":
        return text
    return "\n\n\n".join(piece for _, piece, _ in helper_cells(json.loads(text))) + "\n"


def check_titles(titles, wanted):
    """ValueError says which cell to add, remove or move by hand, so that the cells' `titles` become the `wanted`."""
    for title in titles:
        if title not in wanted or titles.count(title) > 1:
            raise ValueError(f"the module has no piece, or one only, with the title of the cell '%%helper {title}'")
    for title, above in zip(wanted, ["the notebook's first text", *wanted]):
        if title not in titles:
            raise ValueError(f"add a cell '%%helper {title}' by hand, below {above!r}")
    if titles != wanted:
        raise ValueError(f"the cells must stand in the module's order: {wanted}")


def changed_since_commit(path):
    """Whether this file's helper code is another one than in the last commit; False where there is none."""
    try:
        shown = subprocess.run(["git", "-C", path.parent, "show", f"HEAD:./{path.name}"], capture_output=True)
    except FileNotFoundError:  # no git
        return False
    committed = shown.stdout.decode("utf-8").replace("\r\n", "\n")
    return shown.returncode == 0 and helper_text(path, committed) != helper_text(path)


def with_pieces(notebook, pieces):
    """The notebook with these pieces in its cells; an edited cell loses its outputs."""
    for title, piece, cell in helper_cells(notebook):
        if piece != pieces[title]:
            cell["source"] = f"%%helper {title}\n{pieces[title]}".splitlines(keepends=True)
            cell["outputs"], cell["execution_count"] = [], None
    return notebook


def main(arguments=None, notebook_file=NOTEBOOK, module_file=MODULE):
    """Compare or copy; returns the exit status: 0, or a sentence that says why not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--to-module", "--to-notebook", "--force"):
        parser.add_argument(option, action="store_true")
    given = parser.parse_args(arguments)
    source, target = (module_file, notebook_file) if given.to_notebook else (notebook_file, module_file)
    before, after = helper_text(target), helper_text(source)
    try:
        pieces = module_pieces(after)
        check_titles([title for title, _, _ in helper_cells(load(notebook_file))], list(pieces))
    except ValueError as error:
        return f"Nothing was written: {error}."
    if before == after:
        print("The notebook and the module agree.")
        return 0
    print("".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), target.name, source.name)))
    if given.to_module == given.to_notebook:
        return "They differ: --to-module takes the notebook's text, --to-notebook the module's."
    if changed_since_commit(source) and changed_since_commit(target) and not given.force:
        return "Both sides changed since the last commit: undo or commit one of them, or use --force."
    shutil.copy2(target, f"{target}.bak")
    save(as_text(with_pieces(load(notebook_file), pieces)) if given.to_notebook else after, target)
    print(f"{target.name} has the text of {source.name} now; what it was: {target.name}.bak")
    return 0


if __name__ == "__main__":
    sys.exit(main())
