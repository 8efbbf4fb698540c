"""The scripts that a person runs, on tiny notebooks: copying the module, making outputs, scoring a run."""
import subprocess

import numpy as np
import pytest
import run_on_real
import score_run
import sync_helpers

import ecg_helpers as helpers

PIECES = {"Imports and constants": '"""Module."""\nX = 1', "One": "# ==== One ====\ndef one():\n    return 1",
          "Two": "# ==== Two ====\nTWO = 2"}
MODULE = "\n\n\n".join(PIECES.values()) + "\n"
OUTPUT = {"output_type": "stream", "name": "stdout", "text": ["output\n"]}


def tiny_notebook(*sources, **metadata):
    cells = [{"cell_type": "code", "id": f"id-{number}", "metadata": metadata, "execution_count": number,
              "outputs": [OUTPUT], "source": source.splitlines(keepends=True)} for number, source in enumerate(sources)]
    return {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def files(tmp_path):
    """A notebook and a module that agree."""
    cells = [f"%%helper {title}\n{piece}" for title, piece in PIECES.items()]
    notebook, module = tmp_path / "a.ipynb", tmp_path / "ecg_helpers.py"
    notebook.write_text(run_on_real.as_text(tiny_notebook(cells[0], "print('ä')", *cells[1:])), encoding="utf-8")
    module.write_text(MODULE)
    return notebook, module


def edit(file, old, new):
    file.write_text(file.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")


def test_sync_to_module_writes_the_cells_text(files, capsys):
    assert sync_helpers.main([], *files) == 0
    edit(files[0], "return 1", "return 11")
    assert "They differ" in sync_helpers.main([], *files) and files[1].read_text() == MODULE
    assert sync_helpers.main(["--to-module"], *files) == 0 and "+    return 11" in capsys.readouterr().out
    assert files[1].read_text() == MODULE.replace("return 1", "return 11")
    assert files[1].with_name("ecg_helpers.py.bak").read_text() == MODULE


def test_sync_to_notebook_keeps_all_but_the_edited_cell(files):
    notebook = run_on_real.load(files[0])
    edit(files[1], "return 1", "return 11")
    assert sync_helpers.main(["--to-notebook"], *files) == 0 == sync_helpers.main([], *files)
    cell = notebook["cells"][2]
    cell.update(source=cell["source"][:3] + ["    return 11"], outputs=[], execution_count=None)
    assert run_on_real.load(files[0]) == notebook and files[0].with_name("a.ipynb.bak").exists()


@pytest.mark.parametrize("old, new, says", [
    ("# ==== Two", "# ==== Three ====\n\n\n# ==== Two", "add a cell '%%helper Three' by hand, below 'One'"),
    ("# ==== Two ====\n", "", "the cell '%%helper Two'"), ("==== Two", "==== New", "the cell '%%helper Two'")])
def test_sync_says_which_cell_to_change_by_hand(files, old, new, says):
    edit(files[1], old, new)
    assert says in sync_helpers.main(["--to-notebook"], *files)
    assert len(list(files[0].parent.iterdir())) == 2


def test_sync_refuses_when_both_sides_changed_since_the_commit(files, monkeypatch):
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)
    git = ["git", "-C", files[0].parent, "-c", "user.name=a", "-c", "user.email=a@b.example"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    for text, options, ends in (("11", [], 0), ("12", [], "Both sides changed"), ("13", ["--force"], 0)):
        files[1].write_text(MODULE.replace("return 1", f"return {text}"))
        assert str(sync_helpers.main(["--to-notebook", *options], *files)).startswith(str(ends))


def test_outputs_are_committed_without_paths_warnings_and_widgets():
    notebook, executed = tiny_notebook("1"), tiny_notebook("1")
    executed["cells"][0]["outputs"] = [
        {**OUTPUT, "name": "stderr"}, {**OUTPUT, "text": ["1 %\r50 %\rdone\n"]},
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}},
        {"output_type": "display_data", "data": {"text/plain": ["/home/somebody/runs\n"]}}]
    cleaned = run_on_real.with_outputs(notebook, executed, {"/home/somebody": "work"})
    first, second = cleaned["cells"][0]["outputs"]
    assert (first["text"], second["data"]["text/plain"]) == (["done\n"], ["work/runs\n"])
    assert cleaned["metadata"]["outputs_of"] == run_on_real.code_digest(notebook)
    with pytest.raises(ValueError, match="/home/somebody"):
        run_on_real.with_outputs(notebook, executed, {})


def test_a_run_fills_the_first_cell_and_a_failed_one_changes_nothing(tmp_path):
    path, work = tmp_path / "a.ipynb", tmp_path / "work"
    cells = ["handle = display(0, display_id=True)", "import os\nprint(os.environ['ECG_DATA'])", "handle.update(5)"]
    path.write_text(run_on_real.as_text(tiny_notebook(*cells)), encoding="utf-8")
    run_on_real.run(tmp_path, work, path=path)
    first, second, third = [cell["outputs"] for cell in run_on_real.load(path)["cells"]]
    assert (first[0]["data"], second[0]["text"], third) == ({"text/plain": ["5"]}, ["data\n"], [])
    edit(path, "handle.update(5)", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        run_on_real.run(tmp_path, work, path=path)
    assert path.read_bytes() == before and (tmp_path / "work.failed.ipynb").exists()


def test_only_the_cells_of_the_network_are_run():
    notebook = tiny_notebook("class AFNet(nn.Module):\n    k = 3", tags=["network"])
    notebook["cells"] += tiny_notebook("1 / 0")["cells"]
    assert not helpers._is_library(run_on_real.network_namespace(notebook)["AFNet"])  # its source counts as ours


def test_score_run_prints_a_line_for_each_model(tmp_path, capsys):
    y = np.arange(20) % 2
    rows = ["id_exam,id_patient,age,sex,AF", *[f"{exam},{exam},50,F,{af}" for exam, af in enumerate(y)]]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    (tmp_path / "RECORDS.txt").write_text("\n".join(f"TNMG{exam}" for exam in range(20)))
    helpers.write_json(tmp_path / "predictions" / "good.json", {"prediction": np.eye(2)[y]})
    helpers.write_json(tmp_path / "results.json", {"good": {"auroc": 0.5, "ap": 0.25}, "lost": {}})
    score_run.main([f"--work={tmp_path}", f"--labels={tmp_path}/labels.csv", f"--records={tmp_path}/RECORDS.txt"])
    good, lost = capsys.readouterr().out.splitlines()[-2:]
    assert good.startswith("| `good` | 0.500 | 0.250 |  | 1.000 (1.000-1.000) | 1.000 | 1.000 (1.000-1.000) |")
    assert lost.count("no predictions") == 5
