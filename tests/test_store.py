"The store under faults: kills, torn files, NaN, two writers, the order of durable calls, equal content hashes."
import json, os, random, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
from cfm_lab.artifacts import new_run
from cfm_lab.base import ActionMap, BadInput, Body, Command, Episode, Joint, Spec
from cfm_lab.store import combined_hash, create_store, episode_hash, open_store

LONG = bool(os.environ.get("CFM_LONG"))
ENV = {**os.environ, "OMP_NUM_THREADS":"1", "PYTHONPATH":os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH","")])}

def cart():
    "A cart with one motor."
    bodies = Body("world",-1,(0,0,0),(1,0,0,0),0.,(0,0,0),(1,0,0,0),(0,0,0)), Body("cart",0,(0,0,0),(1,0,0,0),1.,(0,0,0),(1,0,0,0),(.1,.1,.1))
    return Spec("cart","cart","Cart-v0",.02,bodies,(Joint("slider","slide",1),),(Command("motor","motor",-1,1,gain=10.),),ActionMap.identity(["motor"],[-1],[1]),
        np.zeros(2),np.ones((1,1)),np.ones((1,1),bool),np.ones(1),np.eye(3)[:1],np.zeros((1,3)))

def push(seed, rows=50):
    "A random push of the cart."
    a = np.random.default_rng(seed).uniform(-1,1,(rows,1))
    v = .2*np.cumsum(a,0)
    return Episode("cart",np.c_[.02*np.cumsum(v,0),v],a,a,np.zeros(3),.02,seed,"cart-push","random")

@pytest.fixture
def store(tmp_path):
    s = create_store(tmp_path/"carts",[cart()])
    s.append("cart-push",[push(i) for i in range(3)])
    return s

def everything(store): return sorted(episode_hash(e) for e in store.read_all())

# ---- bad input: one clear error, nothing lost ----

def test_nan_episode_is_refused_whole(store):
    before,files = everything(store),sorted(p.name for p in store.root.rglob("*.safetensors"))
    bad = replace(push(9),state_TC=np.where(np.arange(50)[:,None]==7,np.nan,push(9).state_TC),valid_T=np.ones(50,bool))
    with pytest.raises(BadInput,match="state_TC is not finite at row 7, slider"): store.append("cart-push",[push(8),bad])
    assert everything(open_store(store.root))==before
    assert sorted(p.name for p in store.root.rglob("*.safetensors"))==files

@pytest.mark.parametrize("damage",["cut","flip","gone","zero"])
def test_torn_file_is_named_and_the_rest_is_usable(store,damage):
    store.append("other-push",[push(7)])
    entry = store.episodes("cart-push")[0]
    path = store.root/entry.file
    blob = bytearray(path.read_bytes())
    if damage=="cut": path.write_bytes(blob[:len(blob)//2])
    if damage=="flip": blob[-5]^=16; path.write_bytes(blob)
    if damage=="zero": path.write_bytes(b"")
    if damage=="gone": path.unlink()
    again = open_store(store.root)
    with pytest.raises(BadInput) as e: again.read(entry)
    assert path.name in str(e.value) and "set_aside" in str(e.value)
    assert again.read(again.episodes("other-push")[0]).seed==7
    with pytest.raises(BadInput,match=path.name): again.flat()
    lost = again.set_aside(entry.file)
    assert lost==(1 if damage=="flip" else 3)             # one bit: only the episode that holds it
    assert sum(len(f.ends) for f in again.flat())==4-lost
    assert again.card()["set_aside"]=={"damaged":lost}

def test_torn_catalogue_and_head_are_named(store):
    store._db().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for d in store._connections.values(): d.close()
    for name in ("catalog.sqlite-wal","catalog.sqlite-shm"): (store.root/name).unlink(missing_ok=True)
    catalogue = (store.root/"catalog.sqlite").read_bytes()
    (store.root/"catalog.sqlite").write_bytes(b"not a database at all"*100)
    with pytest.raises(BadInput,match="catalog.sqlite"): open_store(store.root)
    (store.root/"catalog.sqlite").write_bytes(catalogue)
    assert len(open_store(store.root).read_all())==3
    (store.root/"cfm_dataset.json").write_text('{"format": 1, "uu')
    with pytest.raises(BadInput,match="cfm_dataset.json"): open_store(store.root)

@pytest.mark.parametrize("task",["../x","/etc","a/b","","A","x"*65,"-x"])
def test_ids_that_are_no_slugs(store,task):
    with pytest.raises(BadInput,match="not a usable id"): store.append(task,[push(5)])

def test_existing_data_set_and_foreign_folder(store,tmp_path):
    with pytest.raises(BadInput,match="exists already"): create_store(store.root)
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"thesis.tex").write_text("x")
    with pytest.raises(BadInput,match="thesis.tex"): create_store(tmp_path/"mine")

def test_existing_run_folder(tmp_path):
    new_run("one",tmp_path).log(step=1)
    with pytest.raises(BadInput,match="exists already"): new_run("one",tmp_path)
    assert new_run("one",tmp_path,resume=True).rows()==[{"step":1}]

def test_unknown_task(tmp_path):
    from cfm_lab.collect import Part, Recipe, collect
    with pytest.raises(BadInput,match="Did you mean"): collect(Recipe("t/x-v0",(Part("Hoper-v5",1,10),)),tmp_path/"x",progress=False)
    assert not (tmp_path/"x").exists()

# ---- durability ----

def test_order_fsync_rename_commit(store,monkeypatch):
    calls,fsync,rename = [],os.fsync,os.replace
    monkeypatch.setattr(os,"fsync",lambda fd: calls.append("fsync") or fsync(fd))
    monkeypatch.setattr(os,"replace",lambda *a: calls.append("rename") or rename(*a))
    store._db().set_trace_callback(lambda sql: calls.append(sql.split()[0].lower()) if sql.split()[0] in ("BEGIN","COMMIT") else None)
    uids = store.append("new-task",[push(1)])
    assert calls==["fsync","fsync","rename","fsync","begin","commit"] and len(uids)==1      # the first one: the new folder's name
    assert store.query("PRAGMA synchronous")[0][0]==2 and store.query("PRAGMA journal_mode")[0][0]=="wal"

WRITER = """
import sys, itertools
sys.path.insert(0, {tests!r})
from test_store import push
from cfm_lab.store import open_store
store = open_store(sys.argv[1])
print("ready", flush=True)
for i in itertools.count(int(sys.argv[2])):
    uids = store.append("cart-push", [push(i*10+k) for k in range(1+i%3)])
    print(*uids, flush=True)
    if i-int(sys.argv[2])+1==int(sys.argv[3]): break
"""
def writer(root, first, n=0):
    code = WRITER.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable,"-c",code,str(root),str(first),str(n)],stdout=subprocess.PIPE,text=True,env=ENV)

@pytest.mark.parametrize("writers",[1,2])
def test_kill_loses_nothing_acknowledged(store,writers):
    rng,acknowledged = random.Random(writers),set()
    for n in range((50 if LONG else 6)//writers):
        ps = [writer(store.root,1000*(1+n*writers+w)) for w in range(writers)]
        for p in ps: assert p.stdout.readline()=="ready\n"
        time.sleep(rng.uniform(.02,.4))
        for p in ps: os.kill(p.pid,signal.SIGKILL)
        for p in ps:
            lines = p.stdout.read().split("\n")
            acknowledged |= {u for line in lines[:-1] for u in line.split()}      # the last line may be cut
            assert p.wait()==-signal.SIGKILL
        again = open_store(store.root)
        there = {e.uid for e in again.episodes()}
        assert acknowledged<=there
        assert len(again.read_all())==len(there)                                  # nothing torn
    assert len(acknowledged)>20

def test_two_writers_at_once(store):
    ps = [writer(store.root,1000*w,40) for w in (1,2)]
    uids = [u for p in ps for line in p.communicate()[0].splitlines()[1:] for u in line.split()]
    assert [p.returncode for p in ps]==[0,0]
    assert len(set(uids))==len(uids) and set(uids)<={e.uid for e in store.episodes()}
    want = [episode_hash(push(i)) for i in range(3)]+[episode_hash(push(i*10+k)) for f in (1000,2000) for i in range(f,f+40) for k in range(1+i%3)]
    assert store.content_hash()==combined_hash(want) and everything(store)==sorted(want)

# ---- the same content, whoever collects ----

COLLECT = """
import sys
from pathlib import Path
from cfm_lab.collect import Part, Recipe, collect
if __name__=="__main__":
    recipe = Recipe("t/same-v0",(Part("dm-cartpole-swingup",20,60),Part("dm-reacher-easy",4,40),Part("arm-family",1,40,bodies=3)),seed=5)
    print(collect(recipe,Path(sys.argv[1]),workers=int(sys.argv[2]),progress=False).content_hash())
"""
def collector(tmp_path, root, workers):
    script = tmp_path/"collect_it.py"
    script.write_text(COLLECT)
    return subprocess.Popen([sys.executable,str(script),str(root),str(workers)],stdout=subprocess.PIPE,text=True,env=ENV)

def test_same_hash_in_three_processes_and_with_two_workers(tmp_path):
    hashes = [collector(tmp_path,tmp_path/f"d{i}",w).communicate()[0].strip() for i,w in enumerate((1,1,1,2))]
    assert len(hashes[0])==64 and len(set(hashes))==1

def test_killed_collector_goes_on_to_the_same_hash(tmp_path):
    whole = collector(tmp_path,tmp_path/"whole",1).communicate()[0].strip()
    rng = random.Random(0)
    for n in range(10 if LONG else 2):
        p = collector(tmp_path,tmp_path/"cut",2)
        deadline = time.time()+60
        while not list((tmp_path/"cut").glob("spool/*/*.safetensors")) and p.poll() is None and time.time()<deadline: time.sleep(.05)
        time.sleep(rng.uniform(0,.5))
        p.kill(); p.communicate()
    assert collector(tmp_path,tmp_path/"cut",1).communicate()[0].strip()==whole
