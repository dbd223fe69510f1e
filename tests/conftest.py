"Where things are, and tiny notebooks, for all tests."
import os, sys
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT/"nbs").rglob("*.ipynb") if not any(part.startswith((".","_")) for part in p.relative_to(ROOT).parts))
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(ROOT))

def make_notebook(path, *cells, head=""):
    "A notebook with a parameters cell (`head`) and further code cells; a cell can be (source, tag)."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# tiny"), nbformat.v4.new_code_cell(head, metadata=dict(tags=["parameters"]))])
    for c in cells:
        source,tags = (c,[]) if isinstance(c,str) else (c[0],[c[1]])
        nb.cells.append(nbformat.v4.new_code_cell(source, metadata=dict(tags=tags)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(nbformat.writes(nb))
    return path

@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty data folder of its own."
    monkeypatch.setenv("CFM_DATA", str(tmp_path/"data"))
    return tmp_path/"data"
