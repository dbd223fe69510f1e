"""Drawn bodies: the same seed gives the same body, in any process; what was drawn yesterday is drawn today; ranges lie inside the measured ones."""
import json
import numpy as np
import pytest

pytest.importorskip("mujoco")
from cfm_lab.artifacts import read_json
from cfm_lab.families import FAMILIES
from conftest import ROOT

GOLDEN = ROOT/"tests"/"golden"/"families.json"

def figures(name, seed):
    "Numbers that change when a draw changes."
    model,action,n = FAMILIES[name].make(seed)
    sums = lambda *fields: [float(f"{np.abs(getattr(model,f)).sum():.6g}") for f in fields]
    return [model.nbody, model.nv, model.nu, n, *sums("body_mass","body_pos","dof_damping","dof_armature","actuator_gear","actuator_ctrlrange","geom_size")]

@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_what_they_were(name):
    golden = read_json(GOLDEN)
    for seed,want in golden[name].items(): np.testing.assert_allclose(figures(name,int(seed)), want, rtol=1e-4, err_msg=f"{name}-family-{seed} has changed: data sets that name it are no longer what they say")

LOOSE = ("stiffness","suspension","friction")     # less than the least is nearly none, which most robots have

def test_draws_lie_within_what_robots_that_train_or_validate_are_like():
    "data/card_ranges.json is written by `cfm exam coverage`; of no quantity may more than 5 % of a family's values lie outside."
    from cfm_lab.exam_coverage import quantities
    from cfm_lab.families import measured_ranges
    from cfm_lab.tasks import load
    allowed,outside = measured_ranges(),{}
    for f in FAMILIES:
        for seed in range(12):
            for k,values in quantities(load(f"{f}-family-{seed}")).items():
                low,high = allowed[k]
                outside.setdefault((f,k),[]).extend(not (k in LOOSE or low<=x) or x>high for x in values if x>0)
    shares = {k:float(np.mean(v)) for k,v in outside.items() if v and np.mean(v)>.05}
    assert not shares, shares

def write():
    "python tests/test_families.py writes the golden numbers anew: only for families that no published data set names."
    GOLDEN.write_text(json.dumps({f:{str(s):figures(f,s) for s in (0,1,7,1_000_000)} for f in FAMILIES}, indent=1)+"\n")

if __name__=="__main__": write()
