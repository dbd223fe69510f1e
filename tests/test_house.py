"The house is what its notebooks say: exports, imports, prose, outputs."
import ast, json, re, shutil, statistics, subprocess, sys
import pytest, yaml
from conftest import NOTEBOOKS, ROOT

MODULES = sorted(p for p in (ROOT/"cfm_lab").glob("*.py") if p.stem not in ("__init__","_modidx"))
SIMULATORS = {"mujoco","dm_control","gymnasium","gymnasium_robotics","metaworld","mink"}
names = lambda paths: [str(p.relative_to(ROOT)) for p in paths]
cells = lambda path: json.loads(path.read_text(encoding="utf8"))["cells"]
source = lambda cell: "".join(cell["source"])

def numbers():
    "Module → the number of its notebook."
    out = {}
    for p in NOTEBOOKS:
        exp = re.search(r"^#\| *default_exp +(\S+)", "\n".join(source(c) for c in cells(p) if c["cell_type"]=="code"), re.M)
        if exp: out[exp[1]] = p.name.split("_")[0]
    return out

def imports(path):
    "(imported module, is it inside a function?) for every import of a file; own rooms as cfm_lab.x."
    tree = ast.parse(path.read_text(encoding="utf8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f,(ast.FunctionDef,ast.AsyncFunctionDef,ast.Lambda)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n,ast.Import):
            for a in n.names: yield a.name, id(n) in inside
        elif isinstance(n,ast.ImportFrom):
            base = "cfm_lab"+("."+n.module if n.module else "") if n.level else n.module
            for name in [f"cfm_lab.{a.name}" for a in n.names] if base=="cfm_lab" else [base]: yield name, id(n) in inside

def tracked():
    "Files that are in git or could be."
    out = subprocess.run(["git","ls-files","-co","--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if out.returncode: pytest.skip("not a git clone")
    return [ROOT/l for l in out.stdout.splitlines() if (ROOT/l).is_file()]

def python(code, cwd, *argv):
    return subprocess.run([sys.executable,"-c",code,*argv], cwd=cwd, capture_output=True, text=True, timeout=300)

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the notebooks, cleaned and exported by nbdev."
    copy = tmp_path_factory.mktemp("export")
    shutil.copy(ROOT/"settings.ini", copy)
    shutil.copytree(ROOT/"nbs", copy/"nbs")
    done = python("from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()", copy)
    assert not done.returncode, done.stderr[-2000:]
    return copy

def test_the_package_is_what_the_notebooks_export(exported):
    assert sorted(p.name for p in (exported/"cfm_lab").glob("*.py"))==sorted(p.name for p in (ROOT/"cfm_lab").glob("*.py"))
    for p in (exported/"cfm_lab").glob("*.py"): assert p.read_text()==(ROOT/"cfm_lab"/p.name).read_text(), f"{p.name}: call python3 -m cfm_lab export"

def test_export_makes_no_pyproject(exported):
    assert not (exported/"pyproject.toml").exists() and not (ROOT/"pyproject.toml").exists()

def test_notebooks_are_clean(exported):
    dirty = [n for n in names(NOTEBOOKS) if json.loads((ROOT/n).read_text())!=json.loads((exported/n).read_text())]
    assert not dirty, "call python3 -m cfm_lab clean"

def test_readme_is_the_index_notebook():
    from cfm_lab.cli import readme
    assert (ROOT/"README.md").read_text(encoding="utf8")==readme(ROOT/"nbs"/"index.ipynb"), "call python3 -m cfm_lab export"

def test_readme_shows_the_committed_numbers():
    from cfm_lab.base import Report
    from cfm_lab.cells import headline_text, read_result
    from cfm_lab.pipeline import text_table
    found = read_result("dynamics", ROOT/"data"/"results")
    told = headline_text(found)+"\n"+text_table(Report.from_dicts(found["rows"]).where(tier="T1", metric="MAE", horizon=10, data_n=[0,10]))
    shown = {l.strip() for l in (ROOT/"README.md").read_text(encoding="utf8").splitlines()}
    assert not [l for l in told.splitlines() if l.strip() and l.strip() not in shown], "run nbs/index.ipynb, then python3 -m cfm_lab export"

def test_every_module_has_a_notebook():
    assert {p.stem for p in MODULES}==set(numbers())

@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_down(path):
    n = numbers()
    up = [m for m,_ in imports(path) if m.startswith("cfm_lab.") and n.get(m.split(".")[1],"99")>n[path.stem]]     # a room may name itself: spawned processes find it so
    assert not up

@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_only_floor_1_knows_a_simulator(path):
    n = numbers()
    if "10"<=n[path.stem]<"20": return
    assert not {m for m,_ in imports(path) if m.split(".")[0] in SIMULATORS}
    assert not {m for m,inside in imports(path) if m.startswith("cfm_lab.") and "10"<=n.get(m.split(".")[1],"99")<"20" and not inside}, "import it inside the function that simulates"

def test_rooms_open_without_a_simulator():
    rooms = [m for m,n in numbers().items() if not "10"<=n<"20" and m!="__main__"]
    code = "import importlib, sys\nfor m in sys.argv[1].split(','): sys.modules[m] = None\nfor m in sys.argv[2:]: importlib.import_module('cfm_lab.'+m)"
    done = python(code, ROOT, ",".join(SIMULATORS), *rooms)
    assert not done.returncode, done.stderr[-2000:]

def test_the_package_itself_imports_nothing():
    assert python("import sys; import cfm_lab; sys.exit(any(m in sys.modules for m in ('numpy','torch','mujoco')))", ROOT).returncode==0

def test_the_bootstrap_needs_only_the_standard_library():
    stray = {m for m,_ in imports(ROOT/"cfm_lab"/"__main__.py")} - set(sys.stdlib_module_names) - {"importlib.util","importlib.metadata"}
    assert not stray

def test_executing_the_main_notebook_starts_nothing(tmp_path):
    nb = "\n\n".join(source(c) for c in cells(ROOT/"nbs"/"74_main.ipynb") if c["cell_type"]=="code" and not source(c).startswith("%"))
    (tmp_path/"as_script.py").write_text(f"import sys, os\nsys.path.insert(0, {str(ROOT)!r})\ndef started(*a): os._exit(7)\nos.execv = started\n{nb}\nprint('END')")
    done = subprocess.run([sys.executable,"as_script.py","run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0 and done.stdout.endswith("END\n"), done.stderr[-2000:]
    assert [p.name for p in tmp_path.iterdir()]==["as_script.py"]

def test_bootstrap_and_command_know_the_same_words():
    import importlib
    from cfm_lab.cli import parser
    words = next(a for a in parser()._actions if a.dest=="word").choices
    assert set(words)==set(importlib.import_module("cfm_lab.__main__").WORDS)

@pytest.mark.parametrize("path", NOTEBOOKS, ids=names(NOTEBOOKS))
def test_a_notebook_reads_well(path):
    all_cells = cells(path)
    code = [c for c in all_cells if c["cell_type"]=="code"]
    prose = [c for c in all_cells if c["cell_type"]=="markdown"]
    shown = [c for c in all_cells if not source(c).startswith(("#| hide","#| default_exp"))]
    assert re.fullmatch(r"# .+\n\n> .+", source(all_cells[0]).strip()), "the first cell holds # title and > summary, and nothing else"
    assert len(prose)>=.3*len(shown), f"{len(prose)} of {len(shown)} visible cells are prose"
    assert not [i for i,c in enumerate(all_cells) if c["cell_type"]=="code" and source(c).count("\n")>=60], "code cells over 60 lines"
    assert not [i for i,c in enumerate(all_cells) if len(json.dumps(c.get("outputs",[])))>100_000], "outputs over 100 kB"
    assert not [i for i,c in enumerate(code) if re.search(r"^#\| *eval: *false", source(c), re.M)], "papermill runs such cells anyway"
    assert not [i for i,c in enumerate(all_cells) for o in c.get("outputs",[]) if len(o.get("traceback",[]))>1], "call python3 -m cfm_lab clean"
    assert not [i for i,c in enumerate(all_cells) if set(c["metadata"])-{"tags"}]
    assert not [i for i,c in enumerate(code) if re.search(r"^\s*from \S+ import \*", source(c), re.M)]

def test_no_registry_and_no_machine_is_named():
    host = re.compile(r"pypi[.]org|pythonhosted[.]org|download[.]pytorch[.]org|anaconda[.]org")
    place = re.compile(r"(?<![\w.~/-])/(wor[k]|hom[e]|roo[t]|op[t]|User[s])/\w")
    found = []
    for p in tracked():
        try: text = p.read_text(encoding="utf8")
        except UnicodeDecodeError: continue
        found += [f"{p.relative_to(ROOT)}: {m[0]}" for r in (host,place) for m in r.finditer(text)]
    assert not found

def test_top_level():
    for name in ("README.md","settings.ini","setup.py","_quarto.yml","LICENSE",".ci/run",".gitignore"): assert (ROOT/name).is_file(), name
    assert "Apache License" in (ROOT/"LICENSE").read_text()
    subprocess.run(["bash","-n",ROOT/".ci"/"run"], check=True)

def test_every_requirement_has_a_pin():
    import importlib
    main = importlib.import_module("cfm_lab.__main__")
    assert not [r for r in main.requirements(ROOT) if not re.search(r"[=>]=\d", r)]

def test_quarto_knows_the_keys():
    # from the schemas that Quarto publishes (src/resources/schema: project.yml, definitions.yml, document-*.yml)
    known = {"": {"project","website","format","execute"}, "project": {"type","output-dir","render","resources"}, "execute": {"enabled"},
        "website": {"title","description","search","page-navigation","navbar","sidebar","site-url","repo-url"}, "website.navbar": {"logo-href","left","right","search","background"},
        "website.sidebar": {"style","contents","search"}, "format": {"html"}, "format.html": {"theme","toc","code-copy","html-math-method"}}
    site = yaml.safe_load((ROOT/"_quarto.yml").read_text())
    for where,keys in known.items():
        d = site
        for k in filter(None,where.split(".")): d = d[k]
        assert set(d)<=keys, where
    assert all(list(ROOT.glob(g)) for g in site["project"]["render"])

def shown(path):
    "For every cell that exports a function or class: does one of the next two code cells use a name of it, without exporting?"
    code = [source(c) for c in cells(path) if c["cell_type"]=="code"]
    for i,s in enumerate(code):
        made = re.findall(r"^(?:def|class) ([A-Za-z]\w*)", s, re.M)
        if s.startswith("#| export") and made: yield any(re.search(rf"\b({'|'.join(made)})\b", n) for n in code[i+1:i+3] if not n.startswith("#| export"))

def figures():
    "How the house reads."
    n = numbers()
    rooms = [p for p in NOTEBOOKS if p.name[:2].isdigit() and p.parent.name=="nbs"]
    uses = {(p.stem,m.split(".")[1]) for p in MODULES for m,_ in imports(p) if m.startswith("cfm_lab.")}
    lines = lambda s: len([l for l in s.splitlines() if l.strip() and not l.startswith("#|")])
    code = [source(c) for p in rooms for c in cells(p) if c["cell_type"]=="code" and not source(c).startswith(("#| hide","#| default_exp"))]
    seen = [b for p in rooms for b in shown(p)]
    return dict(modules=len(MODULES), lines=sum(lines(p.read_text()) for p in MODULES), cells=sum(len(cells(p)) for p in rooms), imports=len([1 for a,b in uses if a!=b]), upward=len([1 for a,b in uses if n.get(b,"")>n[a]]),
        exports=len(seen), shown_within_two=round(sum(seen)/len(seen),3), median_code_cell=statistics.median(lines(s) for s in code))

def test_most_exports_are_shown_at_once():
    assert figures()["shown_within_two"]>=.7

if __name__=="__main__": print(json.dumps(figures(), indent=1))
