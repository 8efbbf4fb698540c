"""Put ecg_helpers.py into the notebook that carries it: `python tests/embed_helpers.py`."""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "assignment_ecg_classification.ipynb"
FIRST_LINE = "%%embedded_module ecg_helpers.py\n"


def embedded_cell(notebook):
    """The one code cell that carries the module."""
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and "".join(c["source"]).startswith(FIRST_LINE)]
    if len(cells) != 1:
        raise ValueError(f"the notebook must have one cell starting with {FIRST_LINE.strip()}, not {len(cells)}")
    return cells[0]


def embed(notebook_file=NOTEBOOK, module_file=ROOT / "ecg_helpers.py"):
    """Replace the carried copy by the module's text; outputs and execution counts are removed, too."""
    notebook = json.loads(notebook_file.read_text(encoding="utf-8"))
    text = FIRST_LINE + module_file.read_text(encoding="utf-8").rstrip("\n")
    embedded_cell(notebook)["source"] = text.splitlines(keepends=True)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    notebook_file.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    embed()
    print(f"{NOTEBOOK.name} now carries the present ecg_helpers.py, and has no outputs.")
