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

def write():
    "python tests/test_families.py writes the golden numbers anew: only for families that no published data set names."
    GOLDEN.write_text(json.dumps({f:{str(s):figures(f,s) for s in (0,1,7,1_000_000)} for f in FAMILIES}, indent=1)+"\n")

if __name__=="__main__": write()
