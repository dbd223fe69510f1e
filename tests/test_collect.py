"Collecting: labels are what the simulator says, change nothing, and the data of old recipes stay what they were."
import json, os, re
from dataclasses import replace
import mujoco, numpy as np, pytest
from cfm_lab.artifacts import plain
from cfm_lab.base import BadInput
from cfm_lab.behaviors import BEHAVIOURS, policies, smooth
from cfm_lab.cells import hardware
from cfm_lab.collect import EXPLORE, Part, Recipe, collect, episode_seed, labelled_recipe, pieces_of, prepare
from cfm_lab.edits import apply_edits
from cfm_lab.embodiments import set_command
from cfm_lab.families import FAMILIES
from cfm_lab.labels import UNLABELLED, labelled, others
from cfm_lab.rollout import rollout, rollout_many
from cfm_lab.shards import episode_hash
from cfm_lab.store import open_store
from cfm_lab.tasks import TASKS, load
from conftest import ROOT

# contacts and own sensors; edits and a mocap body; re-anchored and pinned; servos; a drawn body; a frame far from the root
DIVERSE = ("dm-quadruped-walk","mw-drawer-open","fetch-push","hand-reach","walker-family-1","arm-family-3")
NAMES = ("smooth-fast","bang-bang","posture","reflex")          # planned, looking, asked together
def run(id, T=40, labels=True, names=NAMES): return rollout_many(load(id), policies(names,id), T, range(len(names)), behaviours=names, labels=labels)

def forward(scene, e):
    "Pose of the frame and bodies in contact in every row, by a forward pass of the package's own model."
    model = apply_edits(mujoco.MjModel.__copy__(scene.base), e.edits)
    data,frame = mujoco.MjData(model),[b.name for b in scene.spec.bodies].index(scene.spec.frame)
    for t,state in enumerate(e.state_TC):
        data.qpos[:],data.qvel[:] = state[:model.nq],state[model.nq:]
        set_command(model, data, e.command_TU[min(t,len(e)-2)])        # the last row's command is not done
        mujoco.mj_forward(model, data)
        yield np.float32(np.r_[data.xpos[frame],data.xquat[frame]]), {int(b) for c in data.contact for b in model.geom_bodyid[c.geom]}

@pytest.mark.parametrize("id", DIVERSE)
def test_labels_are_what_a_forward_pass_says(id):
    scene = load(id)
    for e in run(id):
        assert e.sensors["frame"].dtype==np.float32 and e.sensors["contact"].dtype==bool and e.sensors["contact"].shape==(len(e),len(scene.spec.bodies))
        for t,(pose,touching) in enumerate(forward(scene, e)):
            np.testing.assert_array_equal(e.sensors["frame"][t], pose, err_msg=f"{e.behaviour}, row {t}")
            assert set(np.flatnonzero(e.sensors["contact"][t]))==touching, (e.behaviour,t)

@pytest.mark.parametrize("id", DIVERSE)
def test_labels_change_nothing(id):
    for a,b in zip(run(id), run(id,labels=False)):
        assert a.sensors and not b.sensors and episode_hash(replace(a,sensors={}))==episode_hash(b)

def test_something_is_touched_and_something_moves():
    eps = [e for id in DIVERSE for e in run(id)]
    assert any(e.sensors["contact"].any() for e in eps) and any(np.ptp(e.sensors["contact"].sum(1)) for e in eps)
    assert all(np.ptp(e.sensors["frame"],axis=0).max()>1e-4 for e in eps)

class Lame:
    "Says NaN from the eighth action on."
    def act(self, observation_C, spec, rng): return np.r_[np.zeros((7,spec.A)), np.full((9,spec.A),np.nan)]

class Planned(Lame):
    def plan(self, spec, rngs, T): return np.stack([np.resize(self.act(None,spec,None),(T,spec.A)) for _ in rngs])

@pytest.mark.parametrize("policy", (Lame,Planned))
def test_an_episode_that_broke_off_keeps_its_last_labels(policy):
    whole,e = (rollout(load("gym-hopper"), p, 16, 3, labels=True) for p in (smooth(.3),policy()))
    assert e.valid_T.sum()==7 and whole.valid_T.all()
    for x in e.sensors.values(): assert len(x)==16 and (x[8:]==x[7]).all()
    np.testing.assert_array_equal(e.state_TC[8:], np.tile(e.state_TC[7],(8,1)))

class OnlyAct:
    "A behaviour that doesn't say what it is going to do."
    def __init__(self, policy): self.policy = policy
    def act(self, observation_C, spec, rng): return self.policy.act(observation_C, spec, rng)

@pytest.mark.parametrize("id,T", (("dm-cartpole-swingup",520), ("mw-drawer-open",30), ("fetch-push",20), ("pointmaze-umaze",40), ("arm-family-3",40)))
def test_planned_is_what_asked_step_by_step_is(id, T):
    names = [n for n,f in BEHAVIOURS.items() if hasattr(f(),"plan")]
    assert len(names)>=6
    asked = [OnlyAct(BEHAVIOURS[n]()) for n in names]
    for n,a,b in zip(names, run(id,T,False,names), rollout_many(load(id), asked, T, range(len(names)))): assert episode_hash(a)==episode_hash(b), n

SMALL = Recipe("test/small-v0", (*(Part(t,6,30) for t in ("dm-reacher-easy","dm-quadruped-walk","mw-drawer-open","hand-reach","fetch-pick-place","gym-ant")), Part("walker-family",2,30,bodies=2), Part("arm-family",2,30,bodies=2)), 3, (*EXPLORE,"reflex","sinusoid"))

def test_seeds_are_what_they_were():
    assert [episode_seed(0,"dm-fish-upright",0), episode_seed(3,"mw-reach",7,"test")]==[8805368224309955, 827138256682296]

def test_data_are_what_they_were(tmp_path):
    golden = json.loads((ROOT/"tests"/"golden"/"collect.json").read_text())["content"]
    processor = re.sub(r"^\d+ × |, .*", "", hardware())
    if processor not in golden: pytest.skip("rounding may differ on another processor")
    assert collect(SMALL, tmp_path/"small", progress=False).content_hash()==golden[processor]

def test_labelled_data_are_the_same_data(tmp_path):
    few = Recipe("test/few-v0", (Part("dm-cartpole-swingup",6,30),Part("gym-hopper",6,30),Part("arm-family",2,30,bodies=2)))
    bare,one = (collect(r, tmp_path/k, progress=False) for k,r in (("bare",few),("one",labelled_recipe(few))))
    two = collect(labelled_recipe(few), tmp_path/"two", workers=2, progress=False)
    assert one.content_hash()==two.content_hash()!=bare.content_hash()
    key = lambda e: (e.task,e.seed)
    for a,b in zip(sorted(bare.read_all(),key=key), sorted(one.read_all(),key=key)):
        assert not a.sensors and b.sensors["frame"].dtype==np.float32 and b.sensors["contact"].dtype==bool
        assert episode_hash(replace(b,sensors={}))==episode_hash(a)

def test_old_cards_fit_and_labelled_recipes_are_others(tmp_path):
    assert "labels" not in plain(SMALL)                                # as it was written before there were labels
    prepare(SMALL, tmp_path/"a"); prepare(SMALL, tmp_path/"a")
    with pytest.raises(BadInput, match="another recipe"): prepare(labelled_recipe(SMALL), tmp_path/"a")
    prepare(labelled_recipe(SMALL), tmp_path/"b"); prepare(labelled_recipe(SMALL), tmp_path/"b")

def test_every_worker_has_something_to_do():
    one,few,many = (Recipe("test/x-v0",(Part("gym-hopper",n,10),)) for n in (1,16,1000))
    assert [len(pieces_of(r)) for r in (one,few,many)]==[1,1,16]
    assert len(pieces_of(few,workers=2))==4 and len(pieces_of(many,workers=4))==16
    for r in (one,few,many): assert sorted(i for p in pieces_of(r,workers=3) for i in p.indices)==list(range(r.parts[0].episodes))

def test_a_collection_ends_compacted_and_says_what_it_cost(tmp_path):
    store = collect(replace(SMALL,parts=(Part("gym-hopper",4,20),)), tmp_path/"x", progress=False)
    assert not list((store.root/"spool").rglob("*.safetensors")) and list((store.root/"shards").rglob("*.safetensors"))
    assert open_store(store.root).card()["collected"]["transitions"]==80

@pytest.mark.skipif(not os.environ.get("CFM_LONG"), reason="two minutes; CFM_LONG=1 runs it")
def test_every_task_has_a_labelled_twin():
    without,ids = [],[*TASKS,*(f"{n}-family-{k}" for n in FAMILIES for k in (0,1,1_000_000))]
    for id in ids:
        scene = load(id)
        told = labelled(scene)
        if told is None: without.append(id)
        else: assert not others(scene.base, told.model)
    assert tuple(without)==UNLABELLED and len(ids)>=220
