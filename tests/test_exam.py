"""The exam: without a simulator, and what a result file holds."""
import json, os, subprocess, sys, textwrap
import pytest

SMALL = textwrap.dedent("""
    import json, sys
    from dataclasses import replace
    from cfm_lab.collect import Part, Recipe
    import cfm_lab.exam_dynamics as room
    from cfm_lab.dynamics import dynamics_tiny
    recipe = Recipe("test/small-v0",(Part("dm-cartpole-swingup",4,100),Part("gym-inverted-double-pendulum",4,100)))
    plan = replace(room.quick_plan(), held_out=("dm-finger-spin",), validation=("gym-inverted-double-pendulum",), recipe=recipe, steps=3, size=4, rates=(1e-3,), lengths=(2,), longest=2)
""")
COLLECT = SMALL+"\nfrom cfm_lab.collect import collect, target_recipe\nfor r in (recipe,target_recipe('dm-finger-spin'),target_recipe('gym-inverted-double-pendulum')): collect(r,progress=False)\n"
EXAM = textwrap.dedent("""
    import sys
    class Block:
        def find_spec(self, name, path=None, target=None):
            if name.split('.')[0] in ('mujoco','dm_control','gymnasium','metaworld'): raise ImportError(name+' is blocked')
    sys.meta_path.insert(0,Block())
""")+SMALL+textwrap.dedent("""
    result = room.exam(quick=True, plan=plan, workers=0)
    assert 'mujoco' not in sys.modules
    print(json.dumps(result))
""")

@pytest.fixture(scope="module")
def result(tmp_path_factory):
    root = tmp_path_factory.mktemp("exam")
    env = dict(os.environ, CFM_DATA=str(root), OMP_NUM_THREADS="1")
    subprocess.run([sys.executable,"-W","ignore","-c",COLLECT], env=env, check=True, capture_output=True)
    p = subprocess.run([sys.executable,"-W","ignore","-c",EXAM], env=env, capture_output=True, text=True)
    assert p.returncode==0, p.stderr[-3000:]
    return json.loads(p.stdout.strip().splitlines()[-1])

def test_trains_and_examines_without_a_simulator(result):
    methods = {r["method"] for r in result["rows"]}
    assert {"persistence","constant_velocity","climatology","ridge_arx","mlp_ensemble","pretrained","scratch"} <= methods

def test_a_quick_result_says_so(result):
    assert result["quick"] is True and result["exam"]=="dynamics" and result["commit"] is not None

def test_headline_fields(result):
    for name,h in result["headline"].items(): assert set(h)=={"value","unit","low","high","target","met","seeds"}, name

def test_skill_is_measured_against_the_best_reference(result):
    rows = result["rows"]
    for r in rows:
        if r["metric"]!="skill" or r["data_n"]: continue
        refs = [x["value"] for x in rows if x["robot"]==r["robot"] and x["metric"]=="MAE" and x["data_n"]==0 and x["horizon"]==r["horizon"] and x["method"] not in ("pretrained","scratch")]
        mine = next(x["value"] for x in rows if x["robot"]==r["robot"] and x["metric"]=="MAE" and x["data_n"]==0 and x["horizon"]==r["horizon"] and x["method"]=="pretrained")
        assert r["value"]==pytest.approx(1-mine/min(refs))
