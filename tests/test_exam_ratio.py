"""The efficiency ratio and its interval, on curves whose answer is known."""
import numpy as np
import pytest
from dataclasses import replace
from cfm_lab.efficiency import efficiency_ratio, meeting, reached
from cfm_lab.statistics import between

N = np.array([100,200,400,1000,1500,5000,15000])
law = lambda k, p=.5: [.1*(k*N/100)**-p]*3

@pytest.mark.parametrize("k",(.2,.5,1.,3.,9.,14.))
def test_a_model_that_is_k_times_ahead(k):
    r = efficiency_ratio(N,law(1),law(k))
    assert r.value==pytest.approx(k) and not r.open

def test_the_ends():
    assert repr(efficiency_ratio(N,law(1),law(16)))=="≥ 15"
    assert efficiency_ratio(N,law(1),law(15)).open
    assert efficiency_ratio(N,law(1),[[.5]*7]).value==0 and np.isinf(reached(N,np.full(7,.5),.1))
    assert efficiency_ratio(N,law(1),law(1)).value==pytest.approx(1)
    assert efficiency_ratio(N,[[.1]*7],[[.1]*7])==efficiency_ratio(N,[[.1]*7],[[.05]*7])       # a scratch that never learns needs no data for its level, and nobody needs less

def test_a_bump_is_no_loss_and_a_tie_no_gain():
    bump = np.array(law(4)); bump[:,3] *= 5
    assert efficiency_ratio(N,law(1),bump).value==pytest.approx(efficiency_ratio(N,law(1),law(4)).value, rel=.2)
    steps = [[.4,.2,.2,.2,.2,.1,.1]]
    assert efficiency_ratio(N,steps,steps).value==1 and meeting(N,steps,steps).transitions==pytest.approx(100)

def test_where_curves_meet():
    for at in (150,900,12_000):
        m = meeting(N,[.2*(N/at)**-.4]*3,[.2*(N/at)**-.1]*3)
        assert m.seen and m.transitions==pytest.approx(at,rel=1e-6)
    m = meeting(N,[.2*(N/60_000)**-.4]*3,[.2*(N/60_000)**-.1]*3)
    assert not m.seen and m.transitions==pytest.approx(60_000,rel=1e-6)
    assert np.isinf(meeting(N,law(1,.2),law(5,.4)).transitions)

def fake(rng, level, seeds=8, E=50):
    "Scores whose mean is about `level`: a seed's luck, and that of an episode."
    x = level*np.exp(.05*rng.normal(size=(seeds,1)))*np.exp(.3*rng.normal(size=(1,E)))
    return [dict(mae={},each={str(h):list(r) for h in (1,10,25,50,100)}) for r in x]

def test_the_interval_holds_the_truth():
    import cfm_lab.exam_dynamics as room
    e = room.Entrant("learned",None)
    plan = replace(room.ExamPlan((e,)),curves=("gym-hopper",),seeds=tuple(range(8)),resamples=200)
    held = []
    for trial in range(30):
        rng = np.random.default_rng(trial)
        scores = {(m,"gym-hopper",n):fake(rng,.1*(k*n)**-.5) for n in plan.sizes for m,k in (("learned",3),("learned_scratch",1))}
        d = room.Draws(plan,scores)
        low,high = between(room.efficiency(plan,d,e,"gym-hopper",1)[1])
        assert low<high
        held.append(low<=3<=high)
    assert np.mean(held)>.75      # eight seeds, fifty episodes: a percentile interval is a little too narrow

def test_draws_of_a_paired_ratio():
    import cfm_lab.exam_dynamics as room
    theirs = fake(np.random.default_rng(0),1.,3)
    ours = [dict(s,each={h:[.8*x for x in e] for h,e in s["each"].items()}) for s in theirs]
    d = room.Draws(replace(room.ExamPlan((room.Entrant("learned",None),)),resamples=500), {("learned","gym-hopper",2):ours,("learned_scratch","gym-hopper",2):theirs})
    assert between(d.ratio("learned","learned_scratch","gym-hopper",2,10)[1])==pytest.approx((.8,.8))

def test_a_line_of_one_seed_is_measured_by_the_references_of_that_seed():
    import cfm_lab.exam_dynamics as room
    e = [room.Entrant("learned",None),room.Entrant("mechanics",None,seeds=(2,))]
    plan = replace(room.ExamPlan(tuple(e)),held_out=("gym-hopper",),validation=(),check=(),curves=(),resamples=50)
    one = lambda level: dict(mae={},each={h:[level]*50 for h in ("1","10","25","50","100")})
    scores = {("persistence","gym-hopper",0):[one(1.)], ("ridge_arx","gym-hopper",10):[one(.8),one(.8),one(.2)], ("learned","gym-hopper",10):[one(.3)]*3, ("mechanics","gym-hopper",10):[one(.1)]}
    d = room.Draws(plan,scores)
    assert room.seeds_behind(plan,"mechanics",10)==(2,) and d.skill("mechanics","gym-hopper",10,1)[0]==pytest.approx(.5) and d.skill("learned","gym-hopper",10,1)[0]==pytest.approx(.5)
    lines = room.headlines(plan,scores)
    assert lines["few_shot_skill_mechanics"]["value"]==pytest.approx(.5)==room.seed_headlines(plan,scores,"mechanics",2)["few_shot_skill"]["value"]
