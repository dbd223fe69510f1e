"A wheel built from the tree says what it needs and brings its command."
import importlib, shutil, subprocess, sys, zipfile
from email.parser import Parser
from conftest import ROOT

def test_a_wheel_carries_its_requirements_and_the_command(tmp_path):
    for name in ("settings.ini","setup.py","LICENSE","README.md"): shutil.copy(ROOT/name, tmp_path)
    shutil.copytree(ROOT/"cfm_lab", tmp_path/"cfm_lab", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run([sys.executable,"-m","pip","wheel",".","--no-deps","--no-build-isolation","--no-index","--use-pep517","-w","out"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode==0, done.stdout[-2000:]+done.stderr[-2000:]
    wheel = zipfile.ZipFile(next((tmp_path/"out").glob("cfm_lab-*.whl")))
    read = lambda end: wheel.read(next(n for n in wheel.namelist() if n.endswith(end))).decode()
    meta = Parser().parsestr(read("METADATA"))
    plain = lambda lines: sorted(l.replace(" ","").lower().replace("_","-") for l in lines)
    settings = importlib.import_module("cfm_lab.__main__").settings(ROOT)
    assert plain(r for r in meta.get_all("Requires-Dist") if "extra" not in r)==plain(settings["requirements"].split())
    assert plain(r.split(";")[0] for r in meta.get_all("Requires-Dist") if "extra" in r)==plain(settings["dev_requirements"].split())
    assert meta["Requires-Python"]==">="+settings["min_python"] and "Apache-2.0" in (meta["License"], meta["License-Expression"])
    assert "cfm = cfm_lab.cli:main" in read("entry_points.txt")
    assert {"cfm_lab/"+p.name for p in (ROOT/"cfm_lab").glob("*.py")}<=set(wheel.namelist())
