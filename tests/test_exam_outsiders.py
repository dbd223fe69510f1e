"""Anybody's model takes the exam: the worked example, and models that misbehave."""
import json, os, re, subprocess, sys
import pytest
from conftest import ROOT

CFM = [sys.executable,"-W","ignore","-m","cfm_lab.cli","exam"]
MISFITS = '''
import numpy as np
from cfm_lab.base import Prediction
class Base:
    def start(self, spec, history, K): return history.repeat(K).state_KTC[:,-1]
    def step(self, carry, action_KA): return carry,Prediction(carry)
class Loud(Base):
    def step(self, carry, action_KA): print("I am thinking"); return super().step(carry,action_KA)
class Raises(Base):
    def step(self, carry, action_KA): raise KeyError("knee")
class Leaves(Base):
    def start(self, spec, history, K): raise SystemExit(0)
class Nan(Base):
    def step(self, carry, action_KA): return carry,Prediction(carry*np.nan)
class Flat(Base):
    def step(self, carry, action_KA): return carry
class Needs(Base):
    def __init__(self, size): pass
class NoDynamics: pass
'''

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    f = tmp_path_factory.mktemp("outside")
    (f/"misfits.py").write_text(MISFITS)
    (f/"damped.py").write_text((ROOT/"tests"/"damped.py").read_text())
    return f

def cfm(folder, *words):
    env = dict(os.environ, CFM_DATA=str(folder/"data"), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    return subprocess.run([*CFM,*map(str,words)], cwd=folder, env=env, capture_output=True, text=True, timeout=600)

@pytest.fixture(scope="module")
def mine(folder):
    p = cfm(folder,"dynamics","--quick","--model","damped:Damped","--json","mine.json")
    assert p.returncode==0, p.stderr[-2000:]
    return json.loads((folder/"mine.json").read_text())

def test_the_worked_example(mine):
    assert mine["quick"] and mine["test_sets"]=="dynamics-v1" and mine["name"]=="damped"
    rows = {(r["method"],r["metric"],r["data_n"],r["horizon"]) for r in mine["rows"]}
    for m,n in (("damped",0),("damped_nocard",0),("damped",2),("ridge_arx",0),("ridge_arx",2)): assert (m,"MAE",n,100) in rows
    assert {"zero_shot_skill","zero_shot_skill_nocard","few_shot_skill","history_used"} <= set(mine["headline"]) and "few_shot_vs_scratch" not in mine["headline"]

def test_the_example_is_that_of_the_notebook():
    source = "".join("".join(c["source"]) for c in json.loads((ROOT/"nbs"/"62b_outsiders.ipynb").read_text())["cells"])
    text = (ROOT/"tests"/"damped.py").read_text()
    assert text in source and len(text.splitlines())<=45

def test_a_class_that_does_not_learn_and_prints(folder, mine):
    p = cfm(folder,"dynamics","--quick","--only","references,zero_shot,few_shot","--model","misfits:Loud","--json")
    assert p.returncode==0, p.stderr[-2000:]
    d = json.loads(p.stdout)                                   # nothing but JSON
    assert any("neither fit nor loss" in x for x in d["left_out"]) and "few_shot_skill" not in d["headline"]
    skills = [r["value"] for r in d["rows"] if r["method"]=="loud" and r["metric"]=="skill"]
    assert skills and max(skills)<=1e-9                        # it is persistence

@pytest.fixture
def inside(folder, monkeypatch):
    "In this process, from that folder."
    monkeypatch.chdir(folder); monkeypatch.setenv("CFM_DATA",str(folder/"data")); monkeypatch.syspath_prepend(str(folder))
    import cfm_lab.outsiders as room
    return room

@pytest.mark.parametrize("model,says", [("misfits:Raises","KeyError, at misfits.py line"), ("misfits:Leaves","SystemExit"), ("misfits:Nan","not finite"), ("misfits:Flat","failed with"),
    ("misfits:Needs","making an instance failed"), ("misfits:NoDynamics","it lacks start and step"), ("misfits:Nobody","importing it failed"), ("nowhere:X","importing it failed"), ("./nowhere","no such file")])
def test_a_model_that_misbehaves_is_one_sentence(inside, mine, model, says):
    with pytest.raises(inside.BadInput) as e: inside.examine_outsider(model,("zero_shot",),quick=True,workers=0)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_a_folder_of_weights(inside, mine, tmp_path):
    from cfm_lab.artifacts import save_weights
    from cfm_lab.dynamics import dynamics_tiny
    save_weights(tmp_path/"Tiny",dynamics_tiny().build(),dynamics_tiny(),{})
    d = inside.examine_outsider(str(tmp_path/"Tiny"),("references","zero_shot"),quick=True,workers=0)
    assert d["name"]=="tiny" and d["left_out"]==[] and {"tiny","tiny_nocard"} <= {r["method"] for r in d["rows"]} and "zero_shot_skill" in d["headline"]

def test_the_command_says_it_too(folder, mine):
    p = cfm(folder,"dynamics","--quick","--only","zero_shot","--model","misfits:Raises","--json","bad.json")
    last = p.stderr.strip().splitlines()[-1]
    assert p.returncode==2 and last.startswith("cfm: misfits:Raises: ") and "Traceback" not in p.stderr and not (folder/"bad.json").exists()

def test_ours_is_never_overwritten(folder):
    p = cfm(ROOT,"dynamics","--quick","--model","damped:Damped","--json",ROOT/"data"/"results"/"dynamics.json")
    assert p.returncode==2 and "is where our own results lie" in p.stderr

def test_the_table(folder, mine, inside):
    p = cfm(folder,"table","mine.json")
    assert p.returncode==0 and "damped (quick)" in p.stdout and re.search(r"zero_shot_skill +.*\d\.\d\d \[",p.stdout) and "hopper" in p.stdout
    for change,says in ((dict(test_sets="dynamics-v0"),"is of dynamics-v0 (this is dynamics-v1)"),(dict(exam="policy"),"is no result of this exam"),(dict(rows=[dict(x=1)]),"can't be read"),(dict(headline=dict(a=1)),"can't be read")):
        (folder/"other.json").write_text(json.dumps(mine|change))
        with pytest.raises(inside.BadInput) as e: inside.table(("mine.json","other.json"))
        assert says in str(e.value)

def test_who_learns_by_a_loss_is_fine_tuned_as_ours_is(monkeypatch):
    import cfm_lab.outsiders as room
    said = []
    monkeypatch.setattr(room,"cross_fit",lambda model,spec,episodes,folds,seed: (said.append(("folds",folds,len(episodes),seed)),(model,None))[1])
    monkeypatch.setattr(room,"adapt",lambda model,spec,episodes,settings,seed: (said.append(("settings",settings,len(episodes),seed)),model)[1])
    o = room.Outsider("weights","weights",object,"loss")
    for n in (10,2): room.learned_by(o,None,[0]*n,1,"ours")
    assert said==[("folds",room.FOLDS,10,1),("settings","ours",2,1)]
