"Golden numbers of the references, their strength against scikit-learn, and their promises on hard robots."
import json
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from cfm_lab.base import ActionMap, BadInput, Body, Command, Episode, Joint, Spec, imagine, window
from cfm_lab.references import ALPHAS, MLPConfig, MLPEnsemble, RidgeARX, arx_rows, fit_linear, held_out, references, roams, state_features
from cfm_lab.statistics import channel_mask, channel_scale, errors

GOLDEN = Path(__file__).parent/"golden"/"references.json"      # remade by `python tests/test_references.py`
SMALL = MLPConfig(width=32, steps=300)

def brick(name, parent): return Body(name, parent, (0,0,0), (1,0,0,0), 1., (0,0,.2), (1,0,0,0), (.1,.1,.05))

def tumbler():
    "A body that tumbles through the world, with a leg that turns right round, a foot with limits, and a puck on a rail; the command of the leg is relative."
    joints = (Joint("root","free",1), Joint("leg","hinge",2,axis=(0,1.,0)), Joint("foot","hinge",3,axis=(0,1.,0),range=(-1.,1.)), Joint("puck","slide",4,"object",axis=(1.,0,0)))
    action = ActionMap(("leg","foot"), -np.ones(2), np.ones(2), np.diag([.2,1.]), np.zeros(2), np.array([1.,0.]), -np.ones(2), np.ones(2))
    acts = np.zeros((2,9),bool); acts[0,6] = acts[1,7] = True
    axis = np.concatenate([np.eye(3),np.eye(3),[[0,1.,0]],[[0,1.,0]],[[1.,0,0]]])
    home = np.zeros(19); home[3] = 1.
    return Spec("tumbler","tumbler","Tumbler-v0",.02,(brick("world",-1),brick("torso",0),brick("leg",1),brick("foot",2),brick("puck",0)),joints,
        (Command("leg","position",-1,1),Command("foot","motor",-1,1)),action,home,acts*1.,acts,np.ones(9),axis,np.zeros((9,3)))

def episode(spec, seed, rows=101):
    "Euler's method on a made-up law: torques, springs, spins that last."
    rng = np.random.default_rng(seed)
    a = np.repeat(rng.uniform(-1,1,(rows//8+1,2)),8,0)[:rows]
    s,u,last = np.zeros((rows,spec.C)),np.zeros((rows,2)),np.zeros(2)
    s[0] = spec.add(spec.home_C, rng.normal(size=18)*np.r_[np.full(9,.5),np.full(9,1.)])
    for t in range(rows):
        u[t] = last = spec.action(a[t],last)
        if t+1==rows: break
        d,v = spec.subtract(s[t],spec.home_C)[:9],s[t,spec.Q:]
        force = -4*d-.5*v; force[:2],force[3:6] = -.2*v[:2],-.1*v[3:6]+.3*np.r_[0,u[t,0],u[t,1]]
        force[6],force[7] = 8*u[t,0]-6*np.sin(d[6])-.3*v[6], 5*u[t,1]-3*d[7]-.4*v[7]
        n = s[t].copy(); n[spec.Q:] += spec.dt*force
        s[t+1] = spec.drift(n,spec.dt)
    return Episode(spec.id,s,a,u,s[0],spec.dt,seed,"tumbler-roll","held")

def measured():
    "MAE of every reference at horizons 1, 10 and 25, zero-shot and on four episodes."
    spec = tumbler()
    train,test,ref = ([episode(spec,s) for s in r] for r in (range(4),range(100,120),range(200,220)))
    scale,w,out = channel_scale(spec,ref),window(test,[0]*20,76),{}
    for n in (0,4):
        for name,m in references(spec,train[:n],SMALL).items():
            e = errors(spec, imagine(m,spec,w.rows(0,51),w.action_KTA[:,50:75]), w.state_KTC[:,51:], scale)
            out[f"{name}, {n} episodes"] = {k:[float(f"{v.at(h)[0]:.6g}") for h in (1,10,25)] for k,v in e.items()}
    return out

@pytest.fixture(scope="module")
def now(): return measured()

def test_golden(now):
    golden = json.loads(GOLDEN.read_text())
    assert set(now)==set(golden)
    for name,parts in golden.items():
        rtol = .15 if name.startswith("mlp") else 1e-3       # a network's bits differ from torch to torch
        for part,values in parts.items(): np.testing.assert_allclose(now[name][part],values,rtol=rtol,err_msg=f"{name}, {part}")

def test_references_are_strong(now):
    at = lambda name,h: now[name]["robot"][(1,10,25).index(h)]
    assert at("constant_velocity, 0 episodes",1) < .6*at("persistence, 0 episodes",1)
    assert at("ridge_arx, 0 episodes",1) < .5*at("constant_velocity, 0 episodes",1)      # fitted on 50 steps alone
    assert at("ridge_arx, 4 episodes",10) < .5*at("ridge_arx, 0 episodes",10)
    assert at("mlp_ensemble, 4 episodes",10) < at("persistence, 0 episodes",10)

def test_zero_shot_laws_are_fitted_apart():
    "A history's law does not depend on the histories beside it, and is RidgeCV's."
    from sklearn.linear_model import RidgeCV
    from sklearn.preprocessing import StandardScaler
    spec = tumbler(); w = window([episode(spec,s) for s in range(3)],[0]*3,51)
    X,Y = arx_rows(spec,w.state_KTC,w.command_KTU)
    law = fit_linear(X,Y)
    for k in range(3):
        z = StandardScaler().fit_transform(X[k])
        live = X[k].std(0)>1e-9
        sk = RidgeCV(ALPHAS*len(z),alpha_per_target=True).fit(z[:,live],Y[k])
        one = fit_linear(X[k:k+1],Y[k:k+1])
        np.testing.assert_allclose(law.weight_KFM[k],one.weight_KFM[0],atol=1e-8)
        np.testing.assert_allclose(law(X[:,-1])[k],sk.predict(z[-1:,live])[0],atol=1e-6)

def test_commands_of_the_horizon_are_relative():
    "The leg's command is added to the last executed one, so the last row's own command must not matter."
    spec = tumbler(); w = window([episode(spec,s) for s in range(3)],[0]*3,76)
    h = w.rows(0,51); wrong = replace(h,command_KTU=h.command_KTU.copy()); wrong.command_KTU[:,-1] = 99.
    mlp = MLPEnsemble.fit(spec,[episode(spec,9)],replace(SMALL,steps=25))
    for m in (RidgeARX(),mlp): np.testing.assert_array_equal(imagine(m,spec,h,w.action_KTA[:,50:75]),imagine(m,spec,wrong,w.action_KTA[:,50:75]))

def test_features_neither_jump_nor_roam():
    spec = tumbler(); s = episode(spec,0).state_TC[50]
    moved = spec.add(s,np.r_[3.,-2.,np.zeros(16)]); turned = s.copy(); turned[7] += 2*np.pi; flipped = s.copy(); flipped[3:7] *= -1
    for other in (moved,turned,flipped): np.testing.assert_allclose(state_features(spec,s),state_features(spec,other),atol=1e-9)
    assert roams(spec).tolist()==[True,True,False,False,False,True,False,False,False]
    assert list(channel_mask(spec,np.ones(18))[1])==["root.x","root.y","root.rz"]

def test_same_seed_same_bits():
    spec = tumbler(); w = window([episode(spec,5)],[0],76); eps = [episode(spec,s) for s in range(2)]
    guess = [imagine(MLPEnsemble.fit(spec,eps,replace(SMALL,steps=50),seed=s),spec,w.rows(0,51),w.action_KTA[:,50:75]) for s in (0,0,1)]
    np.testing.assert_array_equal(guess[0],guess[1])
    assert np.abs(guess[0]-guess[2]).max()>1e-6

def test_invalid_rows_are_not_learned_from():
    spec = tumbler(); ep = episode(spec,0)
    torn = ep.state_TC.copy(); torn[60:] = np.nan
    cut = replace(ep,state_TC=torn,valid_T=np.arange(101)<60)
    w = window([episode(spec,5)],[0],76)
    for m in references(spec,[cut],replace(SMALL,steps=25)).values(): assert np.isfinite(imagine(m,spec,w.rows(0,51),w.action_KTA[:,50:75])).all()
    with pytest.raises(BadInput,match="2 valid rows"): references(spec,[replace(ep,valid_T=np.arange(101)<2)],SMALL)

def test_a_short_episode_leaves_every_member_something():
    for n in (2,3,4,5,6,40):
        held = held_out([n],5)
        assert held.shape==(5,n) and held.any(1).all() and not held.all(1).any()
        if n>=5: assert np.array_equal(held,np.arange(n)*5//n==np.arange(5)[:,None])
    spec = tumbler(); w = window([episode(spec,5)],[0],76)
    m = MLPEnsemble.fit(spec,[episode(spec,0,4)],replace(SMALL,steps=25))
    assert np.isfinite(imagine(m,spec,w.rows(0,51),w.action_KTA[:,50:75])).all()

if __name__=="__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(measured(),indent=1)+"\n"); print(GOLDEN.read_text())
