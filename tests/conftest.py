"Where things are, and tiny notebooks, for all tests."
import os, sys, time
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

def pytest_collection_modifyitems(items):
    "Notebooks first: they take longest, and whoever is left with the last of them works alone."
    items.sort(key=lambda i: i.path.name!="test_notebooks.py")

@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty data folder of its own."
    monkeypatch.setenv("CFM_DATA", str(tmp_path/"data"))
    return tmp_path/"data"

@pytest.fixture
def figure(capsys):
    "Keep a figure of a fault test; its seconds run from the beginning of the test."
    from faults import keep_figure
    begun = time.time()
    def keep(*a, **k):
        row = keep_figure(*a,seconds=time.time()-begun,**k)
        with capsys.disabled(): print("\n"+"; ".join(f"{n}: {row[n]}" for n in ("test","figure","n","inside","seconds","rate_below")))
    return keep

@pytest.fixture(scope="session")
def nursery():
    from faults import Nursery
    n = Nursery("cfm_lab.store","cfm_lab.collect","cfm_lab.tasks","cfm_lab.rollout","cfm_lab.behaviors")
    yield n
    n.close()

@pytest.fixture(scope="session")
def school():
    "Where trainers grow up: torch takes seconds to import."
    from faults import Nursery
    n = Nursery("cfm_lab.train","cfm_lab.dynamics","cfm_lab.loader","lightning")
    yield n
    n.close()

@pytest.fixture(scope="session")
def lessons(nursery, tmp_path_factory):
    root = tmp_path_factory.mktemp("lessons")/"set"
    assert nursery.start("collect_lessons",str(root)).wait()==0
    return str(root)
