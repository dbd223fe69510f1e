"""The exam: without a simulator, and what a result file holds."""
import json, os, subprocess, sys, textwrap
import numpy as np
import pytest

SMALL = textwrap.dedent("""
    import json, sys
    from dataclasses import replace
    from cfm_lab.collect import Part, Recipe
    import cfm_lab.exam_dynamics as room
    room.QUICK = Recipe("test/small-v0",(Part("dm-cartpole-swingup",4,100),Part("gym-inverted-double-pendulum",4,100)))
    plan = replace(room.quick_plan(), held_out=("dm-finger-spin",), validation=("gym-inverted-double-pendulum",), curves=("dm-finger-spin",), seeds=(0,1), rates=(1e-3,), lengths=(2,), longest=2, resamples=100)
""")
COLLECT = SMALL+"\nfrom cfm_lab.collect import collect\nfrom cfm_lab.test_sets import examined\nfor r in (room.QUICK,examined('dm-finger-spin').recipe,examined('gym-inverted-double-pendulum').recipe): collect(r,progress=False)\n"
EXAM = textwrap.dedent("""
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] in ('mujoco','dm_control','gymnasium','metaworld'): raise ImportError(name+' is blocked')
    sys.meta_path.insert(0,Block())
""")+SMALL+textwrap.dedent("""
    parts = ('references','zero_shot','tuning','few_shot')
    result = room.exam(parts, quick=True, plan=plan, workers=0)
    assert 'mujoco' not in sys.modules
    cells = room.Cells('dynamics',quick=True)
    lines = len(cells.path.read_text().splitlines())
    again = room.exam(parts, quick=True, plan=plan, workers=0)
    print(json.dumps(dict(result=result, again=again, cells=[lines,len(cells.path.read_text().splitlines())], kept=list(cells.kept.values()))))
""")

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("exam")
    env = dict(os.environ, CFM_DATA=str(root), OMP_NUM_THREADS="1")
    subprocess.run([sys.executable,"-W","ignore","-c",COLLECT], env=env, check=True, capture_output=True)
    p = subprocess.run([sys.executable,"-W","ignore","-c",EXAM], env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-3000:]
    return json.loads(p.stdout.strip().splitlines()[-1])

@pytest.fixture(scope="module")
def result(done): return done["result"]

def one(rows, **want):
    found = [r for r in rows if all(r[k]==v for k,v in want.items())]
    assert len(found)==1, (want,len(found))
    return found[0]

def test_trains_and_examines_without_a_simulator(result):
    methods = {r["method"] for r in result["rows"]}
    assert {"persistence","constant_velocity","climatology","ridge_arx","mlp_ensemble","learned","learned_nocard","learned_scratch"} <= methods

def test_a_quick_result_says_so(result):
    assert result["quick"] is True and result["exam"]=="dynamics" and result["test_sets"]=="dynamics-v1"

def test_headline_fields(result):
    assert {"zero_shot_skill","zero_shot_skill_worst","zero_shot_skill_nocard","few_shot_vs_scratch","few_shot_skill","efficiency_ratio_1","efficiency_ratio_10"} <= set(result["headline"])
    for name,h in result["headline"].items():
        assert set(h)=={"value","unit","low","high","target","met","seeds"}, name
        assert h["low"] is None or h["low"]<=h["high"], name

def test_skill_is_measured_against_the_best_reference(result):
    rows = result["rows"]
    for r in [r for r in rows if r["metric"]=="skill" and r["tier"]=="T1"]:
        same = dict(robot=r["robot"],horizon=r["horizon"],metric="MAE")
        refs = [x["value"] for x in rows if all(x[k]==v for k,v in same.items()) and x["data_n"] in (0,r["data_n"]) and x["method"] in ("persistence","constant_velocity","climatology","ridge_arx","mlp_ensemble")]
        mine = one(rows, method=r["method"], data_n=r["data_n"], **same)
        assert r["value"]==pytest.approx(1-mine["value"]/min(refs),abs=1e-5) and r["low"]<=r["high"]

def test_errors_are_kept_per_test_episode(done):
    scores = [s for c in done["kept"] if c["config"]["kind"] in ("zero_shot","references") for s in (c["value"].values() if "mae" not in c["value"] else [c["value"]])]
    assert scores
    for s in scores:
        assert set(s["each"])=={"1","10","25","50","100"} and {len(x) for x in s["each"].values()}=={16}
        for h,x in s["each"].items(): assert np.mean(x)==pytest.approx(s["mae"][h],rel=1e-3)

def test_ratio_and_interval_are_those_of_the_kept_errors(done):
    rows = done["result"]["rows"]
    r = one(rows, method="learned", metric="MAE / scratch", data_n=2, horizon=10)
    kept = {k:np.array([next(iter(c["value"].values()))["each"]["10"] for c in sorted(done["kept"],key=lambda c: c["config"]["seed"]) if c["config"]["kind"]==k and c["config"]["n"]==2 and not c["config"]["sought"]]) for k in ("fine_tuned","scratch")}
    assert kept["scratch"].shape==(2,16)
    assert r["value"]==pytest.approx(kept["fine_tuned"].mean()/kept["scratch"].mean()) and r["low"]<=r["value"]<=r["high"]

def test_a_second_call_computes_nothing(done):
    assert done["cells"][0]==done["cells"][1]
    same = lambda d: {k:v for k,v in d.items() if k!="commit"}
    assert same(done["result"])==same(done["again"])

def test_cells_with_weights_are_keyed_by_their_hash(done):
    from cfm_lab.cells import reaches
    for c in done["kept"]:
        what = c["config"]
        assert (len(what.get("weights",""))==64) == (what["kind"] in ("zero_shot","fine_tuned"))
        code = reaches(c["modules"])
        assert "cfm_lab.exam_dynamics" not in code and ("cfm_lab.train" in code)==(what["kind"] in ("fine_tuned","scratch"))

def test_what_is_missing_is_said_with_the_command(tmp_path, monkeypatch):
    import cfm_lab.exam_dynamics as room
    monkeypatch.setenv("CFM_DATA",str(tmp_path)); monkeypatch.setattr(room,"results_root",lambda: tmp_path)
    with pytest.raises(room.BadInput, match="Run `.*learned.*0`"): room.full_plan()
    assert room.full_plan(()).entrants==()

def test_weights_that_are_not_those_of_the_card(tmp_path, monkeypatch):
    import cfm_lab.exam_dynamics as room
    from cfm_lab.artifacts import save_weights
    from cfm_lab.dynamics import dynamics_tiny
    monkeypatch.setenv("CFM_DATA",str(tmp_path)); monkeypatch.setattr(room,"results_root",lambda: tmp_path)
    (tmp_path/"runs").mkdir(); (tmp_path/"pretraining").mkdir()
    e = room.Entrant("m",dynamics_tiny())
    save_weights(tmp_path/"runs"/"m-0",e.config.build(),e.config,{})
    here = room.weights_of(e,0)
    assert here.folder and room.entrant("m").config==e.config
    (tmp_path/"pretraining"/"m-0.json").write_text(json.dumps(dict(weights_sha256="0"*64)))
    other = room.weights_of(e,0)
    assert other.sha256=="0"*64 and other.folder is None
    with pytest.raises(room.BadInput, match="others lie in their folder"): room.pretrained(room.ExamPlan((e,)),"m",0)

def test_the_trivial_references_are_drawn_as_such():
    from cfm_lab.exam_dynamics import TRIVIAL
    from cfm_lab.figures import REFERENCES
    assert set(TRIVIAL)==set(REFERENCES)

def test_history_tells_who_listens():
    from cfm_lab.history import hidden, history_errors, rise
    from cfm_lab.references import ConstantVelocity, Persistence, RidgeARX
    from cfm_lab.test_sets import target
    h,t = hidden("dm-finger-spin",6),target("dm-finger-spin")
    assert rise(history_errors(RidgeARX(),h,t))>.1
    for deaf in (Persistence(),ConstantVelocity()): assert rise(history_errors(deaf,h,t))==0
