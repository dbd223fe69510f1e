"Every notebook runs under papermill: a copy, in a folder of its own, one thread."
import shutil
import pytest
from cfm_lab.artifacts import read_json
from cfm_lab.pipeline import execute, run_study
from conftest import NOTEBOOKS, ROOT

STUDIES = [p for p in NOTEBOOKS if p.parent.name=="studies"]
ROOMS = [p for p in NOTEBOOKS if p.parent==ROOT/"nbs"]

@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_room(path, tmp_path, data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    copy = shutil.copy(path, tmp_path/path.name)
    execute(copy, tmp_path/"executed.ipynb", cwd=tmp_path, timeout_s=300)

@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_study(path, tmp_path, data, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = run_study(shutil.copy(path, tmp_path/path.name), quick=True, timeout_s=600)
    assert read_json(run.folder/"status.json")["state"]=="done"
