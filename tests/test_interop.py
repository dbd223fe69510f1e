"Foreign data in and out: exact where the format can carry it, refused with one clear error where it is malformed, recorded without disturbing the loop."
import copy, json, os, pickle, shutil, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import h5py, minari, numpy as np, pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from scipy.io import loadmat, savemat
from conftest import ROOT
from cfm_lab import interop
from cfm_lab.base import BadInput, imagine, spec_to_dict, window
from cfm_lab.channels import Columns, channel_spec, has_card, table_episode
from cfm_lab.interop import from_csv, from_d4rl, from_lerobot, from_mat, from_minari, strangeness, take_in, to_lerobot, to_minari
from cfm_lab.recording import record
from cfm_lab.store import create_store, open_store

REAL = ROOT.parent/"shared"/"real"
ROBOTS = ("dm-cartpole-swingup","gym-hopper","mw-reach")
EPISODES = 20

@pytest.fixture(scope="module")
def robots(tmp_path_factory):
    "A store of 20 episodes of each of 3 robots, with rewards, a sensor and an episode that diverged."
    from cfm_lab.behaviors import BEHAVIOURS
    from cfm_lab.rollout import rollout_many
    from cfm_lab.tasks import load
    store = create_store(tmp_path_factory.mktemp("interop")/"robots")
    for task in ROBOTS:
        scene = load(task); store.add_spec(scene.spec)
        eps = rollout_many(scene, [BEHAVIOURS["smooth-fast"]() for _ in range(EPISODES)], 40, list(range(EPISODES)), behaviours=["smooth-fast"]*EPISODES)
        cut = eps[3].valid_T.copy(); cut[20:] = False
        eps[3] = replace(eps[3], valid_T=cut)
        store.append(task, [replace(e, sensors=dict(force=np.arange(80.).reshape(40,2)+i)) for i,e in enumerate(eps)])
    return store

def only(store, task, where):
    "A store of one task's episodes."
    out = create_store(where); out.add_spec(store.spec(task)); out.append(task, store.read_all(task))
    return out

FORMATS = {"minari":(lambda s,d,t: to_minari(s,"lab/x-v0",spec=t,root=d), lambda d,s: from_minari(d/"lab"/"x-v0",s)),
    "lerobot-v2.1":(lambda s,d,t: to_lerobot(s,d/"x","v2.1",spec=t), lambda d,s: from_lerobot(d/"x",s)),
    "lerobot-v3.0":(lambda s,d,t: to_lerobot(s,d/"x","v3.0",spec=t), lambda d,s: from_lerobot(d/"x",s))}

@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("task", ROBOTS)
def test_round_trip_is_exact(robots, format, task, tmp_path):
    out,back = FORMATS[format]
    begin = time.perf_counter(); gone = out(robots,tmp_path,task); middle = time.perf_counter()
    come = back(tmp_path, tmp_path/"back"); end = time.perf_counter()
    a,b = only(robots,task,tmp_path/"alone"),open_store(tmp_path/"back")
    assert (gone.episodes,come.episodes,come.rows)==(EPISODES,EPISODES,gone.rows) and not come.lost and not come.invented
    assert b.content_hash()==a.content_hash()
    for x,y in zip(a.read_all(),b.read_all()): assert (x.seed,x.task,x.behaviour,x.dt,x.edits,x.spec)==(y.seed,y.task,y.behaviour,y.dt,y.edits,y.spec)
    assert json.dumps(spec_to_dict(b.spec(task)))==json.dumps(spec_to_dict(a.spec(task)))
    size = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path/"back") and not p.is_relative_to(tmp_path/"alone"))
    print(f"\n{format} {task}: {gone.episodes} episodes, {gone.rows} rows, {size/gone.rows:.0f} bytes a row, out {middle-begin:.2f} s, in {end-middle:.2f} s, content hash equal; lost: {'; '.join(gone.lost)}")

@pytest.mark.parametrize("format", FORMATS)
def test_channels_go_round_too(format, tmp_path):
    spec = channel_spec("arm", ("a","b","vb"), .05, ("push",), angles=("a",), velocities={"b":"vb"}, source="Arm №1")
    columns,rng = Columns(("a","b","vb"),("push",),angles=("a",),velocities={"b":"vb"}),np.random.default_rng(0)
    store = create_store(tmp_path/"s"); store.add_spec(spec)
    store.append("arm", [table_episode(spec, columns, {n:rng.normal(size=30) for n in ("a","b","vb","push")}, i, "arm") for i in range(4)])
    out,back = FORMATS[format]; out(store,tmp_path,"arm"); back(tmp_path,tmp_path/"back")
    assert open_store(tmp_path/"back").content_hash()==store.content_hash()
    assert not has_card(open_store(tmp_path/"back").spec("arm"))

@pytest.mark.parametrize("format", FORMATS)
def test_sensors_of_any_shape_go_round(format, tmp_path):
    spec,columns,rng = channel_spec("arm",("a",),.05,("push",)),Columns(("a",),("push",)),np.random.default_rng(0)
    ep = table_episode(spec, columns, {"a":rng.normal(size=40),"push":rng.normal(size=40)}, task="arm")
    odd = dict(one=rng.normal(size=(40,1)), grid=rng.normal(size=(40,2,3)).astype(np.float32), gaps=np.full((40,2),np.nan), seen=rng.random((40,2,1))>.5)
    store = create_store(tmp_path/"a",[spec])
    store.append("arm", [replace(ep,sensors=odd),replace(ep,seed=1,sensors={n:x[::-1]*(n!="gaps") for n,x in odd.items()})])
    out,back = FORMATS[format]
    assert not [x for x in out(store,tmp_path,"arm").lost if "sensor" in x]
    back(tmp_path, tmp_path/"b")
    assert open_store(tmp_path/"b").content_hash()==store.content_hash()

def test_an_import_that_was_cut_off_is_called_again(robots, tmp_path):
    to_minari(robots, "lab/x-v0", spec="gym-hopper", root=tmp_path)
    some = create_store(tmp_path/"s"); some.add_spec(robots.spec("gym-hopper")); some.append("gym-hopper", robots.read_all("gym-hopper")[:7])
    assert (from_minari(tmp_path/"lab"/"x-v0", some).known,len(some.episodes()))==(7,20)
    with pytest.raises(BadInput, match="exists already"): to_minari(robots, "lab/x-v0", spec="gym-hopper", root=tmp_path)
    with pytest.raises(BadInput, match="3 specs"): to_lerobot(robots, tmp_path/"all")
    with pytest.raises(BadInput, match="not a Minari id"): to_minari(robots, "../x-v0", spec="gym-hopper", root=tmp_path)

def test_an_export_is_whole_or_not_there(robots, tmp_path, monkeypatch):
    monkeypatch.setattr(interop, "_write_v30", lambda *a, **k: 1/0)
    with pytest.raises(ZeroDivisionError): to_lerobot(robots, tmp_path/"x", spec="gym-hopper")
    assert not list(tmp_path.iterdir())

# the other libraries' own readers

def test_minari_opens_our_exports(robots, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    for task in ROBOTS:
        to_minari(robots, f"lab/{task}-v0", spec=task)
        theirs = minari.load_dataset(f"lab/{task}-v0")
        eps = robots.read_all(task)
        assert theirs.total_episodes==EPISODES and theirs.total_steps==sum(len(e)-1 for e in eps) and theirs.observation_space.shape==(robots.spec(task).C,)
        by_seed = {e.seed:e for e in eps}
        for got,meta in zip(theirs.iterate_episodes(), theirs.storage.get_episode_metadata(theirs.episode_indices)):
            e = by_seed[meta["seed"]]
            assert np.array_equal(got.observations,e.state_TC) and np.array_equal(got.actions,e.action_TA[:-1]) and np.array_equal(got.infos["cfm_lab"]["valid"],e.valid_T)
            assert got.truncations[-1] and not got.terminations.any()
    assert set(minari.list_local_datasets())=={f"lab/{t}-v0" for t in ROBOTS}
    come = from_minari(minari.load_dataset("lab/mw-reach-v0").filter_episodes(lambda e: e.id<5), tmp_path/"five")
    assert come.episodes==5

READS = """
import sys, json, numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset, CODEBASE_VERSION
if len(sys.argv)<2: print(CODEBASE_VERSION); sys.exit()
d = LeRobotDataset("lab/x", root=sys.argv[1], video_backend="pyav")
rows = [d[i] for i in range(len(d))]
one = LeRobotDataset("lab/x", root=sys.argv[1], video_backend="pyav", episodes=[2])
two = LeRobotDataset("lab/x", root=sys.argv[1], video_backend="pyav", delta_timestamps={"observation.state":[-1/d.fps,0.]})
print(json.dumps(dict(version=str(d.meta._version), episodes=d.num_episodes, frames=d.num_frames, fps=d.fps, keys=sorted(rows[0]), dtype=str(rows[0]["observation.state"].dtype), task=rows[0]["task"], window=list(two[85]["observation.state"].shape), one=len(one),
    mean=np.asarray(d.meta.stats["observation.state"]["mean"]).ravel().tolist(), state=[r["observation.state"].tolist() for r in rows], action=[r["action"].reshape(-1).tolist() for r in rows])))
"""
def lerobots():
    "Pythons that have LeRobot: this one, or those that CFM_LEROBOT_PYTHON names."
    for p in filter(None, [*os.environ.get("CFM_LEROBOT_PYTHON","").split(os.pathsep), sys.executable]):
        done = subprocess.run([p,"-c",READS], capture_output=True, text=True, env=dict(os.environ,HF_HUB_OFFLINE="1"))
        if done.returncode==0: yield p,done.stdout.split()[-1]

def test_lerobot_opens_our_exports(robots, tmp_path):
    found = list(lerobots()) if os.environ.get("CFM_LEROBOT_PYTHON") or __import__("importlib.util").util.find_spec("lerobot") else []
    if not found: pytest.skip("NO LEROBOT HERE: its own reader was not asked. Name a Python that has one: CFM_LEROBOT_PYTHON=/path/to/python")
    for python,version in found:
        for task in ROBOTS:
            folder = tmp_path/f"{task}-{version}"; to_lerobot(robots, folder, version, spec=task)
            done = subprocess.run([python,"-c",READS,str(folder)], capture_output=True, text=True, env=dict(os.environ,HF_HUB_OFFLINE="1",HF_HOME=str(tmp_path/"hf"),HF_DATASETS_CACHE=str(tmp_path/"hf"/version/task)))
            assert done.returncode==0, done.stderr[-3000:]
            said,eps = json.loads(done.stdout.splitlines()[-1]),robots.read_all(task)
            assert (said["episodes"],said["frames"],said["one"],said["window"],said["task"])==(EPISODES,40*EPISODES,40,[2,robots.spec(task).C],task)
            assert said["fps"]==pytest.approx(1/robots.spec(task).dt, rel=1e-9)
            state = np.concatenate([e.state_TC for e in eps])
            assert np.array_equal(np.array(said["state"],np.float32), state.astype(np.float32)) and np.array_equal(np.array(said["action"],np.float32), np.concatenate([e.action_TA for e in eps]).astype(np.float32))
            np.testing.assert_allclose(said["mean"], state.mean(0), rtol=1e-6, atol=1e-9)
            print(f"\nLeRobot {said['version']} read {task}: {said['episodes']} episodes, {said['frames']} frames at {said['fps']:g}/s, {said['dtype']}, {', '.join(said['keys'])}")

# data of robots that we know

@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    "Episodes of Gymnasium's Hopper, as it ran itself."
    import gymnasium
    where = tmp_path_factory.mktemp("hopper")/"s"
    with record(gymnasium.make("Hopper-v5"), where) as env:
        env.reset(seed=0); env.action_space.seed(0)
        for _ in range(300):
            if any(env.step(env.action_space.sample())[2:4]): env.reset()
    return open_store(where)

def test_d4rl_of_a_known_robot(hopper, tmp_path):
    eps = hopper.read_all(); cat = lambda f: np.concatenate([f(e) for e in eps])
    with h5py.File(tmp_path/"hopper.hdf5","w") as f:
        f["actions"],f["rewards"],f["infos/qpos"],f["infos/qvel"] = cat(lambda e: e.action_TA),cat(lambda e: e.reward_T),cat(lambda e: e.state_TC[:,:6]),cat(lambda e: e.state_TC[:,6:])
        f["observations"],f["terminals"],f["timeouts"] = f["infos/qpos"][:,1:],cat(lambda e: np.zeros(len(e),bool)),cat(lambda e: np.arange(len(e))==len(e)-1)
    what = from_d4rl(tmp_path/"hopper.hdf5", tmp_path/"s", task="gym-hopper")
    got = open_store(tmp_path/"s")
    assert what.episodes==len(eps) and {e.seed for e in got.read_all()}==set(range(len(eps)))
    assert all(np.array_equal(got_e.state_TC,e.state_TC) and np.array_equal(got_e.command_TU,e.command_TU) for got_e,e in zip(sorted(got.read_all(),key=lambda e:e.seed),sorted(eps,key=lambda e:cat_index(eps,e))))
    with pytest.raises(BadInput, match="is not|shapes"): from_d4rl(tmp_path/"hopper.hdf5", tmp_path/"t", task="gym-walker2d")
    bare = from_d4rl(tmp_path/"hopper.hdf5", tmp_path/"u", dt=.008)
    assert any("card" in x for x in bare.invented) and not has_card(open_store(tmp_path/"u").spec("hopper"))

@pytest.mark.parametrize("task", ["gym-hopper",None])
def test_d4rl_of_single_rows(hopper, tmp_path, task):
    e = hopper.read_all()[0]; n = min(20,len(e))
    def file(ends):
        with h5py.File(tmp_path/"h.hdf5","w") as f: f["actions"],f["infos/qpos"],f["infos/qvel"],f["observations"],f["terminals"] = e.action_TA[:n],e.state_TC[:n,:6],e.state_TC[:n,6:],e.state_TC[:n,1:],ends
        return tmp_path/"h.hdf5"
    with pytest.raises(BadInput, match="holds no transition"): from_d4rl(file(np.ones(n,bool)), tmp_path/"s", dt=.008, task=task)
    what = from_d4rl(file(np.arange(n)==0), tmp_path/"s", dt=.008, task=task)
    assert what.episodes==1 and "1 episodes of fewer than two rows" in what.lost

def test_lerobot_of_a_known_robot_without_actions(hopper, tmp_path):
    to_lerobot(hopper, tmp_path/"x"); (tmp_path/"x/meta/cfm_lab.jsonl").unlink(); info = tmp_path/"x/meta/info.json"
    assert from_lerobot(tmp_path/"x", tmp_path/"s", task="gym-hopper").episodes==len(hopper.episodes())
    d = json.loads(info.read_text()); del d["features"]["action"]; info.write_text(json.dumps(d))
    with pytest.raises(BadInput, match="no feature 'action'"): from_lerobot(tmp_path/"x", tmp_path/"t", task="gym-hopper")

def cat_index(eps, e): return next(i for i,x in enumerate(eps) if x is e)

def foreign_minari(folder, eps, env_id="Hopper-v5", infos=True, twist=0., **kwargs):
    import gymnasium
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    said = copy.deepcopy(gymnasium.spec(env_id)); said.kwargs.update(kwargs)
    env = gymnasium.make(env_id)
    folder.mkdir(parents=True)
    s = MinariStorage.new(folder/"data", env.observation_space, env.action_space, said, "hdf5")
    s.update_episodes(EpisodeBuffer(observations=e.state_TC[:,1:], actions=e.action_TA[:-1].astype(np.float32), rewards=e.reward_T[:-1], terminations=np.zeros(len(e)-1,bool), truncations=np.arange(len(e)-1)==len(e)-2,
        infos=dict(qpos=e.state_TC[:,:6], qvel=e.state_TC[:,6:]+twist) if infos else None) for e in eps)
    s.update_metadata(dict(dataset_id="their/hopper-v0", minari_version=minari.__version__))
    return folder

def test_minari_of_a_known_robot_is_recognised_only_when_it_moves_like_it(hopper, tmp_path):
    eps = hopper.read_all()
    for name,kw,card in (("same",{},True),("no-infos",dict(infos=False),False),("changed",dict(frame_skip=5),False),("strange",dict(twist=100.),False)):
        what = from_minari(foreign_minari(tmp_path/name,eps,**kw), tmp_path/f"{name}-s", dt=.008 if name=="changed" else None)
        got = open_store(tmp_path/f"{name}-s")
        assert [has_card(s) for s in got.specs.values()]==[card], name
        assert what.episodes==len(eps) and len(what.invented)
        if card: assert set(got.specs)=={"gym-hopper"} and sum(len(e) for e in got.read_all())==sum(len(e) for e in eps)
    with pytest.raises(BadInput, match="is not gym-hopper"): from_minari(tmp_path/"strange", tmp_path/"x", task="gym-hopper")

def test_minari_in_other_formats_comes_through_their_reader(hopper, tmp_path, monkeypatch):
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage
    from gymnasium import spaces
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    (tmp_path/"nested-v0").mkdir()
    s = MinariStorage.new(tmp_path/"nested-v0"/"data", spaces.Dict(arm=spaces.Box(-9,9,(2,)),goal=spaces.Box(-9,9,(1,))), spaces.Discrete(3), data_format="arrow")
    s.update_episodes(EpisodeBuffer(observations=dict(arm=np.zeros((6,2),np.float32)+i,goal=np.ones((6,1),np.float32)), actions=np.arange(5)%3, rewards=np.ones(5), terminations=np.zeros(5,bool), truncations=np.arange(5)==4, infos={}) for i in range(3))
    s.update_metadata(dict(dataset_id="nested-v0", minari_version=minari.__version__))
    with pytest.raises(BadInput, match="Open it yourself"): from_minari("nested-v0", tmp_path/"s", dt=.1)
    what = from_minari(minari.load_dataset("nested-v0"), tmp_path/"s", dt=.1)
    spec = open_store(tmp_path/"s").spec("nested-v0")
    assert what.episodes==3 and [j.name for j in spec.joints]==["observation.arm.0","observation.arm.1","observation.goal.0"] and spec.action.names==("action",)

# channels in the model

@pytest.mark.parametrize("actions", [0,2,5])
def test_a_model_reads_trains_on_and_predicts_channels(actions):
    from cfm_lab.dynamics import dynamics_tiny
    from cfm_lab.tokens import drive, roams, static, tokenize
    torch.manual_seed(0)
    names,acts,rng = ("a","b","c"),[f"u{i}" for i in range(actions)],np.random.default_rng(0)
    spec = channel_spec("toy", names, .05, acts, angles=("a",))
    t = np.arange(90)*.05
    eps = [table_episode(spec, Columns(names,acts,angles=("a",)), {n:np.sin((i+1)*t+k) for i,n in enumerate(names)}|{u:rng.normal(size=90) for u in acts}, k) for k in range(6)]
    tk = tokenize([(spec, window(eps,[0]*6,75))])
    assert all(torch.isfinite(x.float()).all() for x in (tk.q_TN,tk.v_TN,tk.drive_TN4,tk.card_NF,tk.unit_N8)) and not roams(spec).any()
    for u in range(min(actions,spec.J)): assert np.abs(drive(spec,np.eye(actions)[u])).max()>.1      # every action arrives
    if 0<actions<=spec.J: assert np.linalg.matrix_rank(spec.moment_UJ)==actions
    model = dynamics_tiny().build(); opt = torch.optim.Adam(model.parameters(), 3e-3); losses = []
    for _ in range(8):
        loss,_ = model.loss(tk); opt.zero_grad(); loss.backward(); opt.step(); losses.append(loss.item())
    assert np.isfinite(losses).all() and losses[-1]<losses[0]
    w = window(eps[:1],[0],80)
    seen = imagine(model, spec, w.rows(0,51), w.action_KTA[:,50:60])
    assert seen.shape==(1,10,spec.C) and np.isfinite(seen).all()

# real recordings

def test_real_g1(tmp_path):
    if not (REAL/"g1").is_dir(): pytest.skip("no shared/real/g1 here")
    what = from_lerobot(REAL/"g1", tmp_path/"s")
    store = open_store(tmp_path/"s"); spec = store.spec("g1")
    assert (what.episodes,what.rows,spec.J,spec.A,spec.dt)==(60,22042,26,26,1/30) and set(store.query("SELECT DISTINCT task FROM episodes")[0])=={"pick-up-the-yellow-bottle-on-the-table"}
    assert all(c.kind=="position" for c in spec.commands) and any("video" in x for x in what.lost)
    raw = pq.read_table(REAL/"g1"/"data"/"chunk-000"/"episode_000007.parquet")["observation.state"].combine_chunks().flatten().to_numpy().reshape(-1,26)
    ep = next(e for e in store.read_all() if e.seed==7)
    assert np.array_equal(ep.state_TC[:,:26],raw) and np.allclose(ep.state_TC[1:,26:],np.diff(raw.astype(float),axis=0)*30)
    print(f"\n{what}")

def test_real_double_pendulum(tmp_path):
    path = REAL/"double_pendulum"/"identification.mat"
    if not path.is_file(): pytest.skip("no shared/real/double_pendulum here")
    columns = Columns(("θ1","θ2","ω1","ω2"), angles=("θ1","θ2"), velocities={"θ1":"ω1","θ2":"ω2"})
    what = from_mat(path, tmp_path/"s", {"Y_id":columns.state}, columns, dt_variable="dt")
    more = from_mat(path, tmp_path/"s", {"Y_vad":columns.state}, columns, dt_variable="dt", split="validation")
    store = open_store(tmp_path/"s"); spec = store.spec("identification")
    assert (what.episodes,more.episodes,spec.J,spec.A,spec.dt)==(26,4,2,0,.001) and what.rows==sum(max(y.shape) for y in loadmat(path)["Y_id"][:,0])
    ep = store.read_all()[0]; off = np.abs(np.gradient(ep.state_TC[:,0],.001)-ep.state_TC[:,2])
    assert np.median(off)<.5 and spec.lacks==("card",)       # the recorded velocity is the angle's
    print(f"\n{what}")

# recording

def loop(env, steps=150):
    obs,_ = env.reset(seed=3); env.action_space.seed(3); seen = [obs]
    for _ in range(steps):
        obs,r,terminated,truncated,_ = env.step(env.action_space.sample())
        seen.append((obs,r,terminated))
        if terminated or truncated: env.reset()
    return seen

@pytest.mark.parametrize("id,kwargs,task,card", [("Hopper-v5",{},"gym-hopper",True),("Hopper-v5",dict(frame_skip=5),"hopper-v5",True),("Ant-v5",{},"gym-ant",True),("FetchReach-v4",{},None,True),("CartPole-v1",{},"cartpole-v1",False),("MountainCarContinuous-v0",{},"mountaincarcontinuous-v0",False)])
def test_the_loop_sees_the_same_and_the_store_has_it_all(id, kwargs, task, card, tmp_path):
    import gymnasium
    if id.startswith("Fetch"): import gymnasium_robotics; gymnasium.register_envs(gymnasium_robotics)
    env = record(gymnasium.make(id,**kwargs), tmp_path/"s")
    for a,b in zip(loop(env), loop(gymnasium.make(id,**kwargs))): assert str(a)==str(b)
    env.close()
    store = open_store(tmp_path/"s"); eps = store.read_all()
    assert sum(len(e)-1 for e in eps)==150 and [has_card(s) for s in store.specs.values()]==[card] and (task is None or {e.task for e in eps}=={task})
    assert all(e.sensors["terminated"][:-1].any()==e.sensors["terminated"].any() for e in eps)
    if id=="Hopper-v5" and not kwargs: assert strangeness("gym-hopper",eps)<1e-6 and eps[0].edits==()
    if task=="gym-ant": assert strangeness("gym-ant",eps)<1e-6
    spec = next(iter(store.specs.values()))
    if card: assert all(np.array_equal(spec.action(e.action_TA,e.command_TU), np.clip(e.command_TU,spec.action.low_U,spec.action.high_U)) for e in eps)

LOOP = """
import sys, time, gymnasium, os
from cfm_lab.recording import record
env = record(gymnasium.make("CartPole-v1"), sys.argv[1], every=5, seconds=1e9)
env.action_space.seed(0); env.reset(seed=0)
for i in range(int(sys.argv[2])):
    if any(env.step(env.action_space.sample())[2:4]):
        env.reset(); print(env.recorder.tape.stored, flush=True)
"""
def test_what_was_acknowledged_survives_a_kill(tmp_path):
    p = subprocess.Popen([sys.executable,"-c",LOOP,str(tmp_path/"s"),"100000000"], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    acknowledged = 0
    while acknowledged<20: acknowledged = int(p.stdout.readline())
    p.send_signal(signal.SIGKILL); rest = p.stdout.read().split(); p.wait()
    acknowledged = max([acknowledged,*map(int,[x for x in rest if x.isdigit()])])
    assert acknowledged<=len(open_store(tmp_path/"s").episodes())<=acknowledged+5

def test_a_program_that_never_closes_loses_nothing(tmp_path):
    done = subprocess.run([sys.executable,"-c",LOOP,str(tmp_path/"s"),"500"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode==0, done.stderr
    assert sum(e.transitions for e in open_store(tmp_path/"s").episodes())==500

def test_what_the_recorder_refuses(tmp_path, monkeypatch):
    import gymnasium
    from cfm_lab import recording
    for bad in (gymnasium.make_vec("CartPole-v1",2,vectorization_mode="sync"), object()):
        with pytest.raises(BadInput): record(bad, tmp_path/"s")
    with pytest.raises(BadInput, match="is not gym-hopper"): record(gymnasium.make("Walker2d-v5"), tmp_path/"s", task="gym-hopper")
    with pytest.raises(BadInput, match="says no control step"): record(stepless(gymnasium), tmp_path/"s")
    with pytest.raises(BadInput, match="numbers"): monkeypatch.setattr(recording,"MOST",3); record(gymnasium.make("CartPole-v1"), tmp_path/"s")

def stepless(gymnasium):
    class Env(gymnasium.Env):
        observation_space = action_space = gymnasium.spaces.Box(-1,1,(1,))
    return Env()

@pytest.mark.parametrize("kind", ["dict","tuple","square","discrete","flags"])
def test_actions_of_any_space_are_recorded(kind, tmp_path):
    import gymnasium
    from gymnasium import spaces as s
    space,width = dict(dict=(s.Dict(arm=s.Box(-1,1,(2,)),grip=s.Discrete(3)),3), tuple=(s.Tuple((s.Box(-1,1,(1,)),s.MultiBinary(2))),3), square=(s.Box(-1,1,(2,2)),4), discrete=(s.Discrete(5,start=-2),1), flags=(s.MultiBinary((2,2)),4))[kind]
    class Env(gymnasium.Env):
        observation_space,action_space,dt = s.Box(-1,1,(2,)),space,.1
        def reset(self, seed=None, options=None): return np.zeros(2),{}
        def step(self, action): assert action in space; return np.ones(2),0.,False,False,{}
    with record(Env(), tmp_path/"s", name="odd") as env:
        env.reset(); space.seed(0); done = [space.sample() for _ in range(600)]
        for a in done: env.step(a)
    e, = open_store(tmp_path/"s").read_all()
    flat = dict(dict=lambda a: [*a["arm"],a["grip"]], tuple=lambda a: [*a[0],*a[1]], discrete=lambda a: [a]).get(kind,np.ravel)
    assert e.action_TA.shape==(601,width) and np.array_equal(e.action_TA[:600],[flat(a) for a in done])

def test_long_episodes_are_stored_in_pieces(tmp_path, monkeypatch):
    import gymnasium
    from cfm_lab import recording
    monkeypatch.setattr(recording,"LONGEST",400)
    with record(gymnasium.make("HalfCheetah-v5"), tmp_path/"s") as env:
        env.reset(seed=0)
        for _ in range(900): env.step(np.zeros(6))
    eps = sorted(open_store(tmp_path/"s").read_all(), key=lambda e: e.seed)
    assert [len(e) for e in eps]==[401,401,101] and np.array_equal(eps[0].state_TC[-1],eps[1].state_TC[0]) and np.array_equal(eps[1].initial[1:19],eps[1].state_TC[0])

# hostile and malformed files

X = Columns(("x",), time="t")
def csv_file(d, text, columns=X, **kw): (d/"a.csv").write_bytes(text if isinstance(text,bytes) else text.encode()); from_csv(d/"a.csv", d/"s", columns, **kw)
def mat_file(d, variables={"Y":"x"}, raw=None, cut=None, **data):
    p = d/"a.mat"
    if raw is None: savemat(p, data, do_compression=True)
    else: p.write_bytes(raw)
    if cut: p.write_bytes(p.read_bytes()[:cut])
    from_mat(p, d/"s", variables, Columns(("x",),dt=.1))
def cell(*xs):
    out = np.empty((len(xs),1),object)
    for i,x in enumerate(xs): out[i,0] = x
    return out
def d4rl_file(d, change=lambda f: None, cut=None, **kw):
    with h5py.File(d/"a.hdf5","w") as f:
        f["observations"],f["actions"],f["terminals"],f["timeouts"] = np.zeros((9,2)),np.zeros((9,1)),np.zeros(9,bool),np.zeros(9,bool)
        change(f)
    if cut: (d/"a.hdf5").write_bytes((d/"a.hdf5").read_bytes()[:cut])
    from_d4rl(d/"a.hdf5", d/"s", **(dict(dt=.1)|kw))
def put(name, x):
    def change(f):
        if name in f: del f[name]
        f[name] = x
    return change
def vast(f): del f["observations"]; f.create_dataset("observations",(10**11,2),float,chunks=(1024,2))
def deep(f):
    g = f
    for _ in range(40): g = g.create_group("g")
def loops(f): f.create_group("g"); f["g/again"] = f["g"]
def virtual(f):
    v = h5py.VirtualLayout((9,2),float); v[:] = h5py.VirtualSource("/etc/hostname","x",(9,2)); del f["observations"]; f.create_virtual_dataset("observations",v)
def outside(f): del f["observations"]; f.create_dataset("observations",(9,2),float,external=[("/etc/hostname",0,h5py.h5f.UNLIMITED)])
def toy(d):
    spec = channel_spec("toy",("x",),.1,("u",)); store = create_store(d/"toy"); store.add_spec(spec)
    store.append("toy", [table_episode(spec, Columns(("x",),("u",)), dict(x=np.arange(5.)+i,u=np.ones(5)), i, "toy") for i in range(3)])
    return store
def minari_file(d, meta=lambda m: m, change=lambda f: None, text=None):
    to_minari(toy(d), "lab/x-v0", root=d); data = d/"lab"/"x-v0"/"data"
    m = meta(json.loads((data/"metadata.json").read_text())); (data/"metadata.json").write_text(json.dumps(m) if text is None else text)
    with h5py.File(data/"main_data.hdf5","a") as f: change(f)
    from_minari(d/"lab"/"x-v0", d/"s", dt=.1)
def foreign(f):
    for k in list(f): del f[k+"/infos"]
def trap(m):       # an environment that is never to be made, and no spaces
    code = json.dumps(dict(id="Trap-v0",entry_point="os:getcwd",kwargs={},additional_wrappers=[]))
    return {k:v for k,v in m.items() if k not in ("observation_space","action_space","cfm_lab")}|dict(env_spec=code,data_format="parquet")
def lerobot_file(d, version="v3.0", info=lambda i: i, after=lambda f: None, ours=False):
    to_lerobot(toy(d), d/"x", version)
    if not ours: (d/"x/meta/cfm_lab.jsonl").unlink()
    i = info(json.loads((d/"x/meta/info.json").read_text())); (d/"x/meta/info.json").write_text(i if isinstance(i,str) else json.dumps(i))
    after(d/"x"); from_lerobot(d/"x", d/"s")
def table(change):
    def after(f):
        p = next(f.glob("data/*/*.parquet")); t = change(pq.read_table(p)); pq.write_table(t,p)
    return after
def column(name, x): return table(lambda t: t.set_column(t.schema.get_field_index(name), name, x if isinstance(x,pa.Array) else pa.array(x)))
def junk(pattern, raw=b"PAR1"+b"\0"*50): return lambda f: next(f.glob(pattern)).write_bytes(raw)
def link(f):
    p = next(f.glob("data/*/*.parquet")); p.rename(f.parent/"elsewhere.parquet"); p.symlink_to(f.parent/"elsewhere.parquet")
def jsonl(f, edit): rows = (f/"meta/cfm_lab.jsonl").read_text().splitlines(); (f/"meta/cfm_lab.jsonl").write_text("\n".join(edit(rows))+"\n")
def words(f, **w): jsonl(f, lambda r: [r[0],json.dumps(reseal(json.loads(r[1]),**w)),*r[2:]])
def reseal(x, **w): return interop.seal({k:v for k,v in x.items() if k!="seal"}|w)      # a liar can seal, too
def feature(i, name, **kw): i["features"][name] = i["features"].get(name,{})|kw; return i

MALFORMED = dict(
    csv_absent=lambda d: from_csv(d/"no.csv", d/"s", X), csv_empty=lambda d: csv_file(d,""), csv_binary=lambda d: csv_file(d,bytes(range(256))*9), csv_text=lambda d: csv_file(d,"t,x\n0,1\n1,one\n"), csv_twice=lambda d: csv_file(d,"t,x,x\n0,1,2\n1,1,2\n"),
    csv_column=lambda d: csv_file(d,"t,y\n0,1\n1,1\n"), csv_back=lambda d: csv_file(d,"t,x\n0,1\n1,1\n.5,1\n"), csv_uneven=lambda d: csv_file(d,"t,x\n0,1\n1,1\n2,1\n5,1\n"), csv_single=lambda d: csv_file(d,"t,x\n0,1\n"), csv_latin=lambda d: csv_file(d,"t,x\n0,1\n1,\xe9\n".encode("latin-1")),
    csv_ragged=lambda d: csv_file(d,"t,x\n0,1\n1,1,7,7,7\n2,3\n"), csv_nan_time=lambda d: csv_file(d,"t,x\n0,1\n,1\n2,1\n"), csv_no_step=lambda d: csv_file(d,"t,x\n0,1\n1,1\n",Columns(("x",))), csv_episode=lambda d: csv_file(d,"t,x,e\n0,1,0\n1,1,\n",replace(X,episode="e")), csv_negative_step=lambda d: csv_file(d,"t,x\n0,1\n1,1\n",Columns(("x",),dt=-1.)),
    csv_columns=lambda d: csv_file(d,"t,x\n0,1\n1,1\n",["x"]), csv_folder=lambda d: from_csv(d, d/"s", X), csv_nothing=lambda d: csv_file(d,"t,x\n0,1\n1,1\n",Columns((),dt=.1)), csv_velocity=lambda d: csv_file(d,"t,x\n0,1\n1,1\n",replace(X,velocities={"x":"v"})),
    csv_link=lambda d: ((d/"f").mkdir(), (d/"b.csv").write_text("t,x\n0,1\n1,1\n"), (d/"f/b.csv").symlink_to(d/"b.csv"), from_csv(d/"f",d/"s",X)),
    mat_junk=lambda d: mat_file(d,raw=b"junk"*99), mat_short=lambda d: mat_file(d,Y=np.ones((9,1)),cut=60), mat_cut=lambda d: mat_file(d,Y=np.random.default_rng(0).normal(size=(99,1)),cut=300), mat_73=lambda d: mat_file(d,raw=b"MATLAB 7.3 MAT-file".ljust(512)), mat_struct=lambda d: mat_file(d,Y=dict(a=1)), mat_text=lambda d: mat_file(d,Y="hello"),
    mat_words=lambda d: mat_file(d,Y=cell("a","b")), mat_nested=lambda d: mat_file(d,Y=cell(cell(np.ones((3,1))))), mat_complex=lambda d: mat_file(d,Y=np.ones((4,1))*1j), mat_cube=lambda d: mat_file(d,Y=np.ones((4,2,3))), mat_gone=lambda d: mat_file(d,Z=1.), mat_shape=lambda d: mat_file(d,Y=np.ones((4,3))), mat_cells=lambda d: mat_file(d,{"Y":"x","Z":"z"},Y=cell(*[np.ones((3,1))]*2),Z=np.ones((3,1))),
    mat_rows=lambda d: mat_file(d,{"Y":"x","Z":"z"},Y=np.ones((3,1)),Z=np.ones((4,1))), mat_pickle=lambda d: mat_file(d,raw=pickle.dumps(np.ones(3)).ljust(200)),
    h5_junk=lambda d: ((d/"a.hdf5").write_bytes(b"x"*999), from_d4rl(d/"a.hdf5",d/"s",dt=.1)), h5_cut=lambda d: d4rl_file(d,cut=900), h5_soft=lambda d: d4rl_file(d,put("infos",h5py.SoftLink("/nowhere"))), h5_far=lambda d: d4rl_file(d,put("observations",h5py.ExternalLink("/etc/hostname","/x"))), h5_virtual=lambda d: d4rl_file(d,virtual), h5_external=lambda d: d4rl_file(d,outside),
    h5_text=lambda d: d4rl_file(d,put("actions",np.array(["a"]*9,object))), h5_compound=lambda d: d4rl_file(d,put("actions",np.zeros(9,[("a",float)]))), h5_gone=lambda d: d4rl_file(d,lambda f: f.__delitem__("terminals")), h5_lengths=lambda d: d4rl_file(d,put("actions",np.zeros((8,1)))), h5_vast=lambda d: d4rl_file(d,vast), h5_deep=lambda d: d4rl_file(d,deep), h5_loop=lambda d: d4rl_file(d,loops), h5_flat=lambda d: d4rl_file(d,put("observations",np.zeros(()))),
    h5_task=lambda d: d4rl_file(d,task="gym-hopper"), h5_no_task=lambda d: d4rl_file(d,task="nobody"),
    minari_absent=lambda d: from_minari("lab/none-v0", d/"s"), minari_json=lambda d: minari_file(d,text="{"), minari_list=lambda d: minari_file(d,text="[]"), minari_nest=lambda d: minari_file(d,text="["*100_000), minari_torn=lambda d: minari_file(d,change=lambda f: f.__delitem__("episode_1")), minari_spec=lambda d: minari_file(d,lambda m: m|dict(cfm_lab=interop.seal(dict(id="../x")))), minari_words=lambda d: minari_file(d,change=lambda f: (f["episode_0/infos/cfm_lab"].__delitem__("words"), f["episode_0/infos/cfm_lab"].__setitem__("words",np.frombuffer(b"{}",np.uint8)))),
    minari_path=lambda d: minari_file(d,lambda m: m|dict(cfm_lab=reseal(m["cfm_lab"],id="../../x"))), minari_trap=lambda d: minari_file(d,trap), minari_short=lambda d: minari_file(d,change=lambda f: (foreign(f), f["episode_0"].__delitem__("rewards"), f["episode_0"].__setitem__("rewards",np.zeros(2)))), minari_bare=lambda d: minari_file(d,change=lambda f: [f[k].clear() for k in list(f)]), minari_link=lambda d: minari_file(d,change=lambda f: (f.__delitem__("episode_0"), f.__setitem__("episode_0",h5py.ExternalLink("/etc/hostname","/")))),
    lr_absent=lambda d: from_lerobot(d, d/"s"), lr_json=lambda d: lerobot_file(d,info=lambda i: "{]"), lr_version=lambda d: lerobot_file(d,info=lambda i: i|dict(codebase_version="v9")), lr_fps=lambda d: lerobot_file(d,info=lambda i: i|dict(fps=0)), lr_fps_text=lambda d: lerobot_file(d,info=lambda i: i|dict(fps="30")), lr_fps_inf=lambda d: lerobot_file(d,info=lambda i: i|dict(fps=float("inf"))), lr_features=lambda d: lerobot_file(d,info=lambda i: i|dict(features=[])), lr_no_state=lambda d: lerobot_file(d,info=lambda i: (i["features"].pop("observation.state"),i)[1]),
    lr_shape=lambda d: lerobot_file(d,info=lambda i: feature(i,"observation.state",shape=[10**12])), lr_width=lambda d: lerobot_file(d,info=lambda i: feature(i,"observation.state",shape=[3])), lr_odd=lambda d: lerobot_file(d,info=lambda i: feature(i,"observation.state",shape=["x"])), lr_junk=lambda d: lerobot_file(d,after=junk("data/*/*.parquet")), lr_cut=lambda d: lerobot_file(d,after=lambda f: (p := next(f.glob("data/*/*.parquet"))).write_bytes(p.read_bytes()[:-99])), lr_gone=lambda d: lerobot_file(d,"v2.1",after=lambda f: sorted(f.glob("data/*/*.parquet"))[1].unlink()), lr_last=lambda d: lerobot_file(d,"v2.1",after=lambda f: sorted(f.glob("data/*/*.parquet"))[2].unlink()),
    lr_empty=lambda d: lerobot_file(d,after=lambda f: next(f.glob("data/*/*.parquet")).unlink()), lr_shift=lambda d: lerobot_file(d,after=column("index",np.arange(15)+1)), lr_frame=lambda d: lerobot_file(d,after=column("frame_index",np.arange(15))), lr_episode=lambda d: lerobot_file(d,after=column("episode_index",np.repeat([0,2,1],5))), lr_null=lambda d: lerobot_file(d,after=column("action",pa.array([None]*15,pa.float64()))), lr_text=lambda d: lerobot_file(d,after=column("action",["a"]*15)), lr_ragged=lambda d: lerobot_file(d,after=column("observation.state",pa.array([[1.]]*14+[[1.,2.]]))),
    lr_binary=lambda d: lerobot_file(d,after=column("action",[pickle.dumps(print)]*15)), lr_column=lambda d: lerobot_file(d,after=table(lambda t: t.drop_columns(["action"]))), lr_link=lambda d: lerobot_file(d,after=link), lr_tasks=lambda d: lerobot_file(d,"v2.1",after=lambda f: (f/"meta/tasks.jsonl").write_text("[1]\n")), lr_tasks_junk=lambda d: lerobot_file(d,after=junk("meta/tasks.parquet")),
    our_lines=lambda d: lerobot_file(d,ours=True,after=lambda f: jsonl(f,lambda r: r[:2])), our_spec=lambda d: lerobot_file(d,ours=True,after=lambda f: jsonl(f,lambda r: [json.dumps(interop.seal({})),*r[1:]])), our_edits=lambda d: lerobot_file(d,ours=True,after=lambda f: words(f,edits=[1])), our_task=lambda d: lerobot_file(d,ours=True,after=lambda f: words(f,task="../../etc")), our_seed=lambda d: lerobot_file(d,ours=True,after=lambda f: words(f,seed="x")), our_json=lambda d: lerobot_file(d,ours=True,after=lambda f: jsonl(f,lambda r: ["not json"])), our_empty=lambda d: lerobot_file(d,ours=True,after=lambda f: (f/"meta/cfm_lab.jsonl").write_text("")), our_sensors=lambda d: lerobot_file(d,ours=True,after=lambda f: words(f,sensors=[1])))

@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_is_one_clear_error(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path/"minari"))
    d,begin = tmp_path/"here",time.perf_counter()
    d.mkdir()
    with pytest.raises(BadInput) as e: MALFORMED[name](d)
    assert time.perf_counter()-begin<10 and e.value.what and (e.value.where or e.value.why)
    assert [p.name for p in tmp_path.iterdir()]==["here"]           # nothing is written outside
    if (d/"s/cfm_dataset.json").exists(): open_store(d/"s").read_all()

DAMAGED = {"minari":(lambda s,d: to_minari(s,"lab/x-v0",root=d), lambda d,s: from_minari(d/"lab"/"x-v0",s,dt=.1)), "v2.1":(lambda s,d: to_lerobot(s,d/"x","v2.1"), lambda d,s: from_lerobot(d/"x",s)), "v3.0":(lambda s,d: to_lerobot(s,d/"x","v3.0"), lambda d,s: from_lerobot(d/"x",s))}

@pytest.mark.parametrize("format", DAMAGED)
def test_a_damaged_export_is_found_or_proved_harmless(format, tmp_path):
    out,back = DAMAGED[format]; store = toy(tmp_path); out(store,tmp_path/"whole"); found = 0
    for k in range(1000 if os.environ.get("CFM_LONG") else 30):
        rng,folder = np.random.default_rng(k),tmp_path/str(k); shutil.copytree(tmp_path/"whole",folder)
        files = sorted(p for p in folder.rglob("*") if p.is_file()); p = files[rng.integers(len(files))]; b = bytearray(p.read_bytes())
        i,n,how = int(rng.integers(len(b))),int(rng.integers(1,300)),rng.integers(4)
        if how==0: del b[i:]
        elif how==1: b[i] ^= 1<<int(rng.integers(8))
        elif how==2: b[i:i+n] = rng.bytes(len(b[i:i+n]))
        else: del b[i:i+n]
        p.write_bytes(bytes(b)); begin = time.perf_counter()
        try: what = back(folder, folder/"s")
        except BadInput: found += 1
        else:
            got = open_store(folder/"s")         # as it was; or, where the mark of our exports is gone, as anybody's, which is said
            assert what.invented or got.content_hash()==store.content_hash() and spec_to_dict(got.spec("toy"))==spec_to_dict(store.spec("toy")), (k,p)
        assert time.perf_counter()-begin<10
        shutil.rmtree(folder)
    print(f"\n{format}: {found} of {k+1} damages found, the others harmless")

def test_sizes_are_estimated_first(tmp_path, monkeypatch):
    savemat(tmp_path/"bomb.mat", dict(Y=np.zeros((2_000_000,1))), do_compression=True)
    assert (tmp_path/"bomb.mat").stat().st_size<40_000 and interop.mat_bytes(tmp_path/"bomb.mat")>16e6
    monkeypatch.setattr(interop,"LIMIT",1e6)
    with pytest.raises(BadInput, match="would need"): from_mat(tmp_path/"bomb.mat", tmp_path/"s", {"Y":"x"}, Columns(("x",),dt=.1))
    (tmp_path/"big.csv").write_text("t,x\n"+"0,1\n"*100_000)
    with pytest.raises(BadInput, match="would need"): from_csv(tmp_path/"big.csv", tmp_path/"s", X)
    to_lerobot(toy(tmp_path), tmp_path/"x"); monkeypatch.setattr(interop,"LIMIT",100.)
    with pytest.raises(BadInput, match="would need"): from_lerobot(tmp_path/"x", tmp_path/"s")

def test_the_rooms_open_light():
    code = "import sys, cfm_lab, cfm_lab.channels, cfm_lab.interop, cfm_lab.recording; bad = {'h5py','pyarrow','pandas','minari','scipy','torch','mujoco','gymnasium'}&set(sys.modules); print(bad); sys.exit(bool(bad))"
    done = subprocess.run([sys.executable,"-c",code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode==0, done.stdout+done.stderr[-500:]
