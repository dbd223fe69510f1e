"Kills, full disks, damage, writers at once, signals: what was acknowledged is never lost, and every fault ends in one clear sentence. CFM_LONG=1: the long versions, which write data/results/faults.json."
import json, os, random, shutil, signal, subprocess, sys, time, traceback
from pathlib import Path
import pytest
from cfm_lab.artifacts import new_run
from cfm_lab.base import BadInput
from cfm_lab.store import combined_hash, create_store, episode_hash, open_store
from faults import DAMAGES, ENV, LONG, cart, damage, everything, fill, garden, offspring, orphans, push, signalled, small_disk

def often(short, long): return long if LONG else short

@pytest.fixture
def store(tmp_path):
    s = create_store(tmp_path/"carts",[cart()])
    s.append("cart-push",[push(i) for i in range(3)])
    return s

# ---- kill -9 the collector ----

@pytest.mark.parametrize("writers",[1,4])
def test_kill_the_writers(nursery,store,figure,writers):
    rng,said,seen,inside,again = random.Random(writers),set(),set(),0,store
    rounds = often(20,100)
    for n in range(rounds):
        children = [nursery.start("write",str(store.root),1000*(1+n*writers+w)) for w in range(writers)]
        for c in children: c.until("ready")
        for at,c in sorted(((rng.uniform(.005,.25),c) for c in children),key=lambda x: x[0]):
            time.sleep(at/writers)
            assert c.kill()
            inside += c.lines[-1]=="begin"
        said |= {u for c in children for l in c.lines if l.startswith("stored") for u in l.split()[1:]}
        again = open_store(store.root)                                        # without a command
        there = {e.uid:e for e in again.episodes()}
        assert said<=set(there), f"{len(said-set(there))} of {len(said)} acknowledged episodes are lost"
        for u in set(there)-seen: assert episode_hash(again.read(u))==there[u].hash==episode_hash(push(there[u].seed))      # nothing torn
        seen = set(there)
    assert len(everything(again))==len(there) and len(said)>rounds
    figure(f"kill the collector, {writers} writer{'s'*(writers>1)}","Minari 15–100 % of episodes lost","0 acknowledged lost, 0 torn, opens without a command",
        f"0 of {len(said)} acknowledged lost, 0 torn",n=rounds*writers,inside=inside)

def drawn(rng, seconds, early=.02): return rng.uniform(early*seconds,seconds)

def undisturbed(start):
    "How long an operation takes from its `begin`, and what it says."
    c = start().until("begin")
    t = time.time()
    assert c.wait()==0, c.lines
    return time.time()-t,c.lines

@pytest.mark.parametrize("workers",[1,4])
def test_kill_collect_and_go_on(nursery,tmp_path,figure,workers):
    rng,left,hits,same,n,many = random.Random(workers),[],0,0,0,often(2 if workers>1 else 6,20 if workers>1 else 80)
    seconds,_ = undisturbed(lambda: nursery.start("collect_some",str(tmp_path/"whole"),1))
    whole = open_store(tmp_path/"whole").content_hash()
    files = lambda root: len(list(root.glob("spool/*/*.safetensors")))
    while hits<many:
        root,n = tmp_path/f"cut{same}",n+1
        c,until = nursery.start("collect_some",str(root),workers).until("begin"),rng.randrange(5)
        while files(root)<until and not list(root.glob("shards/*")) and c.more(.001): pass                          # up to a random piece of work, then a random time
        time.sleep(rng.uniform(0,seconds/(2 if until==0 else 8)))
        below = offspring(c.pid)
        hits += c.kill()
        left += orphans(below)
        assert len(everything(open_store(root)))==len(open_store(root).episodes()) if (root/"cfm_dataset.json").exists() else True
        if n%4==3 or hits==many:
            assert undisturbed(lambda: nursery.start("collect_some",str(root),workers))[1][1]==f"hash {whole}"
            shutil.rmtree(root)
            same += 1
    assert not left
    figure(f"kill `collect`, {workers} worker{'s'*(workers>1)}, go on","Minari 15–100 % of episodes lost","equal content hash, no orphans",f"equal hash {same} of {same} times, 0 orphans",n=n,inside=hits)

def test_same_seed_same_hash(tmp_path,figure):
    run = "import sys; from faults import collect_some\nif __name__=='__main__': collect_some(sys.argv[1],int(sys.argv[2]))"
    (tmp_path/"it.py").write_text(run)
    found = []
    for n,workers in enumerate(often((1,1,4),(1,1,1,4,4,4))):
        done = subprocess.run([sys.executable,"-W","ignore",str(tmp_path/"it.py"),str(tmp_path/f"d{n}"),str(workers)],env=ENV,capture_output=True,text=True)
        assert not done.returncode, done.stderr[-500:]
        found.append(done.stdout.split()[-1])
    assert len(found[0])==64 and len(set(found))==1
    figure("same seed, fresh processes, 1 and 4 workers","not promised","equal hashes",f"{len(found)} of {len(found)} equal",n=len(found))

# ---- many at once ----

@pytest.mark.parametrize("compaction",[False,True])
def test_writers_and_readers_at_once(nursery,store,tmp_path,figure,compaction):
    if compaction: pytest.importorskip("cfm_lab.upkeep")
    writers,readers,stop = often(4,8),often(2,4),tmp_path/"stop"
    looking = [nursery.start("look",str(store.root),i,str(stop)) for i in range(readers)]
    if compaction: looking.append(nursery.start("tidy_up",str(store.root),str(stop)))
    writing = [nursery.start("write",str(store.root),10_000*(1+w),200,1,.02*compaction) for w in range(writers)]
    assert [c.wait() for c in writing]==[0]*writers
    stop.touch()
    assert [c.wait() for c in looking]==[0]*len(looking), [c.lines[-2:] for c in looking]
    said = [u for c in writing for l in c.lines if l.startswith("stored") for u in l.split()[1:]]
    there,want = open_store(store.root),list(range(3))+[10_000*(1+w)+10*i for w in range(writers) for i in range(200)]
    assert len(set(said))==200*writers and set(said)<={e.uid for e in there.episodes()}
    assert there.content_hash()==combined_hash([episode_hash(push(i)) for i in want]) and everything(there)==sorted(episode_hash(push(i)) for i in want)
    reads = sum(int(l.split()[1]) for c in looking for l in c.lines if l.startswith("read "))
    assert reads>100
    extra = f", {[l for l in looking[-1].lines if l.startswith('compacted')][0].split()[1]} compactions" if compaction else ""
    figure(f"{writers} writers × 200 episodes, {readers} readers{', compaction in between' if compaction else ''}",'"database is locked"',f"{200*writers:,} of {200*writers:,}",f"{len(said):,} of {200*writers:,}; {reads} reads without an error{extra}",n=200*writers)

# ---- kill -9 the trainer ----

@pytest.fixture
def elsewhere(tmp_path):
    "A folder on another file system than the system's temporary folder."
    try: disk = small_disk(tmp_path/"disk",200); disk.__enter__()
    except OSError as e:
        other = Path("/dev/shm")
        if not other.is_dir() or os.stat(other).st_dev==os.stat(tmp_path).st_dev: pytest.skip(f"no second file system: {e}")
        disk,path = None,other/f"cfm-faults-{os.getpid()}"
        path.mkdir()
    else: path = tmp_path/"disk"
    assert os.stat(path).st_dev!=os.stat("/tmp").st_dev
    yield path
    if disk: disk.__exit__(None,None,None)
    else: shutil.rmtree(path)

STEPS,SAVE = 40,4
def learn(school, lessons, root, name): return school.start("train",lessons,str(root),name,STEPS,SAVE)

def test_kill_the_trainer(school,lessons,elsewhere,figure):
    import torch
    from cfm_lab.train import check_run, latest_checkpoint
    rng,inside,writing,left,worst,cuts,kills = random.Random(0),0,0,[],0,0,often(10,60)
    seconds,lines = undisturbed(lambda: learn(school,lessons,elsewhere,"whole"))
    whole = lines[-2]
    run,begun,n = elsewhere/"cut-0",0,0
    while inside<kills:
        n += 1
        assert n<3*kills
        c = learn(school,lessons,elsewhere,run.name).until("begin")
        if n%3==2:                     # as soon as a checkpoint is half written
            end = time.time()+20
            while not list((run/"checkpoints").glob(".*.tmp")) and time.time()<end and c.more(.0005): pass
        else:                          # at a random step, a random time after it began; or before the first
            k = rng.randrange(begun-1,STEPS)
            if k>=begun: c.until("step",k)
            time.sleep(rng.uniform(0,seconds/STEPS if k>=begun else seconds/4))
        below = offspring(c.pid)
        hit = c.kill()
        inside += hit; left += orphans(below)
        writing += bool(list((run/"checkpoints").glob(".*.tmp")))
        steps = [int(l.split()[1]) for l in c.lines if l.startswith("step")]
        if steps: assert steps[0]==begun                                                  # it went on where the checkpoint stood
        newest = latest_checkpoint(run/"checkpoints") if (run/"checkpoints").exists() else None
        assert newest or not begun and (not steps or max(steps)<SAVE)
        if newest:
            saved = torch.load(newest,weights_only=True)["global_step"]
            assert saved==int(newest.stem.split("-")[1])
            if steps: worst = max(worst,max(steps)-saved); assert saved>=max(steps)//SAVE*SAVE
            begun = saved
        if not hit or begun>=STEPS-2*SAVE or inside==kills:
            c = learn(school,lessons,elsewhere,run.name)
            assert c.wait()==0 and c.lines[-2]==whole
            assert check_run(new_run(run.name,elsewhere,resume=True))==[] and not list(elsewhere.rglob("*.tmp"))
            cuts += 1; run,begun = elsewhere/f"cut-{cuts}",0
    assert not left
    figure("kill the trainer, run folder on another file system","12 of 40 torn","0 unloadable, ≤ 1 save interval lost, 0 orphans",
        f"0 unloadable, at most {worst} of {SAVE} steps lost, 0 orphans; {writing} kills while a checkpoint was half written; {cuts} of {cuts} runs end with the same bits",n=n,inside=inside)

# ---- kill -9 the upkeep ----

def said_by(store):
    "All that must not change: episodes by uid with their hashes, what is set aside, the card."
    card = {k:v for k,v in store.card().items() if k!="megabytes"}
    return {e.uid:(e.hash,e.task,e.split,e.seed,e.behaviour,e.rows) for e in store.episodes()},sorted(tuple(r)[:1]+tuple(r)[2:] for r in store.query("SELECT * FROM set_aside")),card

@pytest.fixture(scope="module")
def gardens(tmp_path_factory):
    "The same kind of store twice: with a full spool, and compacted."
    root = tmp_path_factory.mktemp("gardens")
    return garden(root/"spool").root,garden(root/"shards",compacted=True).root

def sound(root, before):
    "Nothing lost, nothing twice, nothing torn; everything as before."
    from cfm_lab.upkeep import verify
    again = open_store(root)
    assert said_by(again)==before
    assert everything(again)==sorted(h for h,*_ in before[0].values())
    again.recover()
    assert said_by(again)==before
    verdict = verify(again)
    assert verdict, verdict
    return again

@pytest.mark.parametrize("what",["compact","export","import","rebuild"])
def test_kill_the_upkeep(nursery,gardens,tmp_path,figure,what):
    from cfm_lab.upkeep import compact, export_store, import_store
    rng,inside,n,kills = random.Random(what),0,0,{"compact":often(12,50),"export":often(8,50)}.get(what,often(4,25))
    template = gardens[what in ("import","rebuild")]
    before = said_by(open_store(template))
    export = export_store(open_store(gardens[1]),tmp_path/"export") if what=="import" else tmp_path/"out"
    start = {"compact":lambda root: nursery.start("upkeep","compact",str(root)), "export":lambda root: nursery.start("upkeep","export_store",str(root),str(export)),
        "import":lambda root: nursery.start("upkeep","import_store",str(export),str(root)), "rebuild":lambda root: nursery.start("upkeep","rebuild",str(root))}[what]
    def fresh(): shutil.rmtree(tmp_path/"s",ignore_errors=True); return tmp_path/"s" if what=="import" else Path(shutil.copytree(template,tmp_path/"s"))
    seconds = min(undisturbed(lambda: start(fresh()))[0] for _ in range(2) if not shutil.rmtree(tmp_path/"out",ignore_errors=True))
    shutil.rmtree(tmp_path/"out",ignore_errors=True)
    while inside<kills:
        root,n = fresh(),n+1
        assert n<3*kills+5
        if what=="rebuild" and n%2: (root/"catalog.sqlite").unlink()
        c = start(root).until("begin")
        time.sleep(drawn(rng,seconds,.01))
        inside += c.kill()
        if what=="export" and export.exists():                    # complete, or not there at all
            assert said_by(import_store(export,tmp_path/"in"))==before
            shutil.rmtree(tmp_path/"in"); shutil.rmtree(export)
        if what=="import" and not root.exists() or what=="rebuild":
            again = start(root)                                   # killed, it is simply called again
            assert again.wait()==0, again.lines
        sound(root,before)
        if what=="export":
            assert export_store(open_store(root),export)==export and import_store(export,tmp_path/"in").content_hash()==before[2]["content_hash"]
            shutil.rmtree(tmp_path/"in"); shutil.rmtree(export)
            assert not list(tmp_path.glob(".*.tmp"))
        if what=="compact": compact(open_store(root)); assert not list((root/"spool").rglob("*.safetensors")); sound(root,before)
    figure({"compact":"kill compaction","export":"kill export","import":"kill import","rebuild":"kill the rebuilding of a catalogue"}[what],"silent index shift (LeRobot users)","0 lost, 0 duplicated",
        f"0 lost, 0 duplicated of {len(before[0])} episodes each time",n=n,inside=inside)

def test_kill_while_deleting(nursery,gardens,tmp_path,figure):
    from cfm_lab.upkeep import compact, rebuild, verify
    rng,kills,inside,n = random.Random(3),often(6,50),0,0
    while inside<kills:                     # of the calls, not between them
        n += 1
        root = Path(shutil.copytree(gardens[n%2],tmp_path/f"s{n}"))
        before = said_by(open_store(root))[0]
        c = nursery.start("prune",str(root),n).until("ready")
        time.sleep(rng.uniform(0,.15))
        assert c.kill()
        inside += c.lines[-1].startswith("begin")
        gone,maybe = ({u for l in c.lines if l.startswith(w) for u in l.split()[1:]} for w in ("deleted","begin"))
        for again in (lambda: open_store(root),lambda: compact(open_store(root)),lambda: rebuild(root)[0]):
            store = again()
            there = {e.uid:e.hash for e in store.episodes()}
            assert not gone&set(there) and set(before)-maybe<=set(there) and all(before[u][0]==h for u,h in there.items())      # nothing deleted rises, nothing else goes
            assert len(maybe&set(there)) in (0,len(maybe-gone)) and everything(store)==sorted(there.values())                    # all of a call or none
            store.recover()
        assert verify(store)
        shutil.rmtree(root)
    figure("kill while deleting","–","no acknowledged deletion undone, nothing else gone, also after compaction and rebuilding","0 risen, 0 lost",n=n,inside=inside)

# ---- the catalogue ----

@pytest.mark.parametrize("how",["deleted","damaged","older"])
def test_rebuild(gardens,tmp_path,figure,how):
    from cfm_lab.upkeep import rebuild
    root,hits = tmp_path/"s",0
    for n,template in enumerate(gardens):
        shutil.rmtree(root,ignore_errors=True); shutil.copytree(template,root)
        store = open_store(root)
        old = (root/"catalog.sqlite").read_bytes()
        store.append("cart-push",[push(9000),push(9001)]); store.quarantine("cart-push",[push(9002)],"it diverged"); store.delete([e.uid for e in store.episodes("sledge-push")[:4]],"not wanted")
        before,deleted = said_by(store),{r[0] for r in store.query("SELECT uid FROM set_aside")}
        store.query("PRAGMA wal_checkpoint(TRUNCATE)"); store.close()
        for end in ("-wal","-shm"): (root/f"catalog.sqlite{end}").unlink(missing_ok=True)
        path = root/"catalog.sqlite"
        if how=="deleted": path.unlink()
        if how=="older": path.write_bytes(old)
        if how=="damaged": path.write_bytes(path.read_bytes()[:4096]+os.urandom(4096)+path.read_bytes()[8192:])
        if how=="deleted":
            with pytest.raises(BadInput,match="rebuild"): open_store(root)
        again,said = rebuild(root)
        assert not said["damaged"] and said_by(again)==before
        assert not deleted&{e.uid for e in again.episodes()}           # nothing deleted rises again
        sound(root,before)
        hits += len(before[0])
    figure(f"catalogue {how if how!='older' else 'replaced by an older copy'}, rebuilt","no repair","100 % of episodes; nothing deleted rises",f"{hits} of {hits} episodes, 0 risen",n=hits)

# ---- the order of the durable calls ----

@pytest.fixture
def calls(monkeypatch):
    "What is asked of the disk, in order: fsync and rename with the file's kind, unlink, begin, commit."
    found = []
    def kind(path):
        name = Path(path).name
        return "folder" if Path(path).is_dir() else next((k for k in ("crc","tombstone","sha256","ckpt","safetensors","jsonl","json") if f".{k}" in name),"other")
    def path_of(fd): return os.readlink(f"/proc/self/fd/{fd}")
    fsync,replace,unlink = os.fsync,os.replace,os.unlink
    monkeypatch.setattr(os,"fsync",lambda fd: (found.append(f"fsync {kind(path_of(fd))}"),fsync(fd))[1])
    monkeypatch.setattr(os,"replace",lambda a,b: (found.append(f"rename {kind(b)}"),replace(a,b))[1])
    monkeypatch.setattr(os,"unlink",lambda p,**k: (os.path.exists(p) and found.append(f"unlink {kind(p)}"),unlink(p,**k))[1])
    found_of = lambda store: store._db().set_trace_callback(lambda sql: found.append(sql.split()[0].lower()) if sql.split()[0] in ("BEGIN","COMMIT") else None)
    return found,found_of

DURABLE = lambda kind: [f"fsync {kind}",f"rename {kind}","fsync folder"]

def test_order_of_an_append(store,calls,figure):
    found,trace = calls
    trace(store)
    uids = store.append("new-task",[push(1)])
    assert found==["fsync folder"]+DURABLE("safetensors")+["begin","commit"] and len(uids)==1        # first the new folder's own name
    assert store.query("PRAGMA synchronous")[0][0]==2 and store.query("PRAGMA journal_mode")[0][0]=="wal"
    del found[:]
    store.delete(uids,"not wanted")
    assert found==DURABLE("tombstone")+["begin","commit"]
    del found[:]
    store.quarantine("new-task",[push(2)],"it diverged")
    assert found==DURABLE("safetensors")+["begin","commit"]
    figure("order of the durable calls: append, delete, quarantine","–","data durable before its row: fsync, rename, fsync of the folder, commit","that order",n=3)

def test_order_of_a_compaction(store,calls,figure):
    from cfm_lab.upkeep import compact
    found,trace = calls
    for i in range(3): store.append("cart-push",[push(10+i)])
    trace(store); del found[:]
    compact(store)
    shard,first = found.index("rename safetensors"),found.index("unlink safetensors")
    swap = max(i for i,f in enumerate(found[:first]) if f=="commit")
    assert found.index("fsync safetensors")<shard and found.index("fsync crc")<found.index("rename crc")<swap
    assert shard<found.index("fsync folder",shard)<found.index("begin",shard)<found.index("commit",shard)<first      # the shard, one transaction, then the spool
    assert found.count("unlink safetensors")==4 and not any(f.startswith("rename") for f in found[first:])
    figure("order of the durable calls: compaction","–","shard durable, one transaction, then the spool is unlinked","that order",n=1)

def test_order_of_a_checkpoint(tmp_path,calls,figure):
    import torch
    from cfm_lab.train import DurableCheckpoints
    found,_ = calls
    disk = DurableCheckpoints()
    for k in (1,2,3):
        del found[:]
        disk.save_checkpoint(dict(k=torch.tensor(k)),tmp_path/f"step-{k}.ckpt")
    assert found==["fsync ckpt"]+DURABLE("sha256")+DURABLE("ckpt")+["unlink sha256","unlink ckpt"]          # the oldest goes when the newest is durable
    figure("order of the durable calls: checkpoint","last.ckpt moved across file systems","checkpoint and hash durable before the oldest is removed","that order",n=1)

# ---- a full disk ----

@pytest.fixture
def disk(tmp_path, request):
    "A real file system of 6 MB. Where mounting is not allowed the test runs again in a name space of its own, or is skipped."
    try:
        with small_disk(tmp_path/"disk",6) as d: yield d
    except OSError as e:
        again = ["unshare","-rm",sys.executable,"-m","pytest","-q","-p","no:xdist",request.node.nodeid]
        if os.environ.get("CFM_IN_NAMESPACE") or not shutil.which("unshare"): pytest.skip(f"NO SMALL DISK HERE, a full disk was not tested: {e}")
        done = subprocess.run(again,cwd=request.config.rootpath,env=dict(ENV,CFM_IN_NAMESPACE="1"),capture_output=True,text=True)
        if " failed" in done.stdout or " error" in done.stdout[-60:]: pytest.fail(done.stdout[-2000:])
        if done.returncode or "passed" not in done.stdout: pytest.skip(f"NO SMALL DISK HERE, a full disk was not tested: {done.stdout[-200:]}")
        pytest.skip("tested in a name space of its own: passed")

def one_clear_error(e, disk):
    said = str(e)
    assert isinstance(e,BadInput) and "the disk is full" in said and str(disk) in said and "Free some space" in said and "\n" not in said
    return True

def with_less_and_less(disk, often_, act, check):
    "Try with ever less free space, until it fails for want of it, at every stage of the work. How often did it fail?"
    full = worked = 0
    for leave in often_:
        filler = fill(disk,leave)
        try: act(leave); worked += 1
        except BadInput as e: full += one_clear_error(e,disk)
        check()
        filler.unlink(missing_ok=True)
        check()
    return full,worked

def test_disk_full_while_appending(disk,figure):
    store = create_store(disk/"carts",[cart()])
    store.append("cart-push",[push(i) for i in range(3)])
    want = [episode_hash(push(i)) for i in range(3)]
    def act(leave): store.append("cart-push",[push(leave,400)]); want.append(episode_hash(push(leave,400)))
    def check(): assert everything(store)==everything(open_store(disk/"carts"))==sorted(want) and not list(disk.rglob("*.tmp"))
    steps = range(0,64_000,often(4096,1024))
    full,worked = with_less_and_less(disk,steps,act,check)
    assert full>=4 and worked>=4
    act(999_999); check()
    from cfm_lab.upkeep import verify
    assert verify(open_store(disk/"carts"))
    figure("disk full while appending","old data lost","one clear error, old artefacts intact, goes on after",f"{full} of {full} clear errors, old and later episodes readable",n=full)

@pytest.mark.parametrize("what",["delete","compact","export"])
def test_disk_full_while_tidying(disk,tmp_path,figure,what):
    from cfm_lab.upkeep import compact, export_store, import_store, verify
    root = disk/"carts" if what!="export" else tmp_path/"carts"
    store = create_store(root,[cart()])
    for i in range(12): store.append("cart-push",[push(10*i+k,400) for k in range(3)])
    state = dict(before=said_by(store))
    def act(leave):
        if what=="delete": uid = store.episodes()[0].uid; store.delete([uid],"not wanted"); state["before"] = said_by(store)
        if what=="compact": compact(store); store.append("cart-push",[push(1000+leave,400)]); state["before"] = said_by(store)
        if what=="export": export_store(store,disk/"out"); assert import_store(disk/"out",tmp_path/"in").content_hash()==store.content_hash(); shutil.rmtree(tmp_path/"in"); shutil.rmtree(disk/"out")
    def check():
        again = open_store(root)
        assert said_by(again)==said_by(store)==state["before"] and len(everything(again))==len(state["before"][0])
        assert not list(disk.rglob("*.tmp")) and not (disk/"out").exists()
    steps = {"delete":range(0,40_000,4096),"compact":range(0,1_500_000,often(120_000,30_000)),"export":range(0,1_600_000,often(150_000,25_000))}[what]
    full,worked = with_less_and_less(disk,steps,act,check)
    assert full>=3 and (worked>=2 or what=="export")
    act(999); check()
    store.recover()
    assert verify(store)
    names = dict(delete="deleting",compact="compacting",export="exporting")
    figure(f"disk full while {names[what]}","old data lost","one clear error, old artefacts intact, goes on after",f"{full} of {full} clear errors, everything readable, then it works",n=full)

@pytest.mark.parametrize("workers",[1,2])
def test_disk_full_while_collecting(nursery,disk,tmp_path,figure,workers):
    from cfm_lab.upkeep import verify
    whole,full,worked = undisturbed(lambda: nursery.start("collect_some",str(tmp_path/"whole"),1))[1][1],0,0
    root = disk/"set"
    c = nursery.start("collect_some",str(root),workers)          # a full disk at the beginning is refused by an estimate; so it begins with room
    while not (root/"cfm_dataset.json").exists() and c.more(.001): pass
    assert c.kill()
    for leave in often((0,60_000,200_000),(0,20_000,40_000,60_000,90_000,130_000,200_000,300_000)) if workers==1 else often((60_000,),(0,60_000,200_000)):
        filler = fill(disk,leave)
        c = nursery.start("collect_some",str(root),workers)
        if c.wait():
            word = next(l for l in c.lines if l.startswith("error "))
            assert word.startswith("error BadInput"), word
            full += one_clear_error(BadInput(json.loads(word.split(" ",2)[2])),disk)
        else: worked += 1
        if (root/"cfm_dataset.json").exists(): again = open_store(root); assert len(everything(again))==len(again.episodes()); again.close()
        filler.unlink(missing_ok=True)
    assert full
    assert undisturbed(lambda: nursery.start("collect_some",str(root),workers))[1][1]==whole and verify(open_store(root))
    figure(f"disk full while collecting, {workers} worker{'s'*(workers>1)}","old data lost","one clear error, old artefacts intact, goes on after",f"{full} of {full} clear errors, then the same hash",n=full)

def test_disk_full_while_training(school,lessons,disk,figure):
    import torch
    from cfm_lab.train import check_run, latest_checkpoint
    whole = undisturbed(lambda: learn(school,lessons,disk,"whole"))[1][-2]
    size = sum(f.stat().st_size for f in (disk/"whole").rglob("*") if f.is_file())
    shutil.rmtree(disk/"whole")
    run,full = disk/"cut",0
    for leave in (0,40_000,*(int(size*x) for x in often((.2,.5,.8),(.1,.2,.3,.4,.5,.6,.7,.8,.9,1.)))):
        old = {p.name:p.read_bytes() for p in (run/"checkpoints").glob("*") if p.name[0]!="."} if run.exists() else {}
        filler = fill(disk,leave)
        c = learn(school,lessons,disk,run.name)
        if c.wait():
            word = next(l for l in c.lines if l.startswith("error "))
            assert word.startswith("error BadInput"), word
            full += one_clear_error(BadInput(json.loads(word.split(" ",2)[2])),disk)
        kept = {p.name:p.read_bytes() for p in (run/"checkpoints").glob("*") if p.name[0]!="."} if run.exists() else {}
        newest = latest_checkpoint(run/"checkpoints") if kept else None
        assert not list(disk.rglob("*.tmp")) and len(kept)%2==0 and (newest or not old)
        if newest: torch.load(newest,weights_only=True); assert newest.name>=max(old,default="")[:13]
        filler.unlink(missing_ok=True)
        if c.code==0: shutil.rmtree(run)
    assert full>=3
    c = learn(school,lessons,disk,run.name)
    assert c.wait()==0 and c.lines[-2]==whole and check_run(new_run(run.name,disk,resume=True))==[]
    figure("disk full while training","old checkpoint lost","one clear error, old artefacts intact, goes on after",f"{full} of {full} clear errors, last checkpoint loads, then the same bits",n=full)

# ---- damage ----

STORE_FILES = dict(spool="spool/*/*.safetensors",shard="shards/*/*.safetensors",crc="shards/*/*.crc.json",spec="specs/*.json",head="cfm_dataset.json",catalogue="catalog.sqlite",wal="catalog.sqlite-wal",
    tombstone="quarantine/*.tombstone.json",quarantined="quarantine/*.safetensors")
RUN_FILES = dict(weights="model.safetensors",config="config.json",card="card.json",metrics="metrics.jsonl",checkpoint="checkpoints/*.ckpt",sha256="checkpoints/*.sha256")

class Odd(AssertionError): "What must not happen: silence, or an error that is none of ours."

def attempt(f):
    "(value, None), or (None, the clear error)."
    try: return f(),None
    except BadInput as e:
        if len(str(e))>600 or "Traceback" in str(e): raise Odd(f"unclear: {e}")
        return None,e
    except Exception as e: raise Odd(f"{type(e).__name__}: {e} ({'; '.join(f'{Path(t.filename).name}:{t.lineno}' for t in traceback.extract_tb(e.__traceback__)[-3:])})")

def answers(store):
    from cfm_lab.base import spec_to_dict
    return (*said_by(store),{k:json.dumps(spec_to_dict(v)) for k,v in store.specs.items()})

def judge_store(root, before, victim):
    "Was the damage found, or is it harmless? And is the rest usable?"
    from cfm_lab.upkeep import rebuild, verify
    found,read,now,verdict = [],{},None,None
    def ask(f):
        value,error = attempt(f)
        if error: found.append(str(error))
        return value
    store = ask(lambda: open_store(root))
    if store:
        read = {e.uid:ask(lambda: episode_hash(store.read(e))) for e in ask(store.episodes) or ()}
        now,verdict = ask(lambda: answers(store)),ask(lambda: verify(store))
        specs = {k:ask(lambda: store.spec(k)) for k in before[3]}
        store.close()
    whole = now==before and read=={u:v[0] for u,v in before[0].items()}
    told = found+[repr(f) for f in (verdict.findings if verdict is not None else ())]
    kind = victim.relative_to(root).parts[0]
    if not whole and not told: raise Odd("not found, though something has changed")
    if not whole and kind[:7]!="catalog" and not any(victim.name in t or victim.stem in t for t in told): raise Odd(f"not named: {told[:3]}")
    if not store or kind in ("catalog.sqlite","catalog.sqlite-wal","cfm_dataset.json"):              # all but the card's own words is in the files
        again = rebuild(root)[0]
        then,n = answers(again),4 if kind!="cfm_dataset.json" else 2
        if then[:2]!=before[:2] or then[3]!=before[3] or n==4 and then!=before: raise Odd("rebuilt, but not as it was")
        if not verify(again) or everything(again)!=sorted(v[0] for v in before[0].values()): raise Odd(f"rebuilt, but {verify(again)}")
        again.close()
    elif kind in ("spool","shards") and victim.suffix==".safetensors":
        torn,again = {u for u,h in read.items() if h is None},open_store(root)
        if not whole: lost = again.set_aside(str(victim.relative_to(root)))
        left = {e.uid:e.hash for e in again.episodes()}
        if not whole and (lost>len(torn) or len(left)+lost!=len(read)) or everything(again)!=sorted(left.values()): raise Odd("the rest is not usable")
        again.close()
    elif kind=="specs":
        if len([s for s in specs.values() if s])<len(specs)-1 or None in read.values(): raise Odd("the rest is not usable")
    elif not whole: raise Odd(f"a {kind} file spoils what it does not hold: {told[:2]}")
    return "found" if told else "harmless"

def judge_run(path, before, victim):
    from cfm_lab.train import check_run, latest_checkpoint
    run = new_run(path.name,path.parent,resume=True)
    told,error = attempt(lambda: check_run(run))
    told = [str(e) for e in told or ()]+[str(error)]*bool(error)
    now,error = attempt(lambda: what_a_run_says(run))
    if error: told.append(str(error))
    if not told and now!=before: raise Odd("not found, though something has changed")
    if told and not any(victim.stem in t or victim.name in t for t in told): raise Odd(f"not named: {told}")
    if victim.parent.name=="checkpoints" or victim.suffix==".jsonl":
        if latest_checkpoint(path/"checkpoints") is None or attempt(lambda: weights_of(run))[0]!=before[0]: raise Odd("the rest is not usable")
    elif latest_checkpoint(path/"checkpoints").read_bytes()!=before[3] or run.rows()!=before[2]: raise Odd("the rest is not usable")
    return "found" if told else "harmless"

def weights_of(run):
    from cfm_lab.artifacts import load_weights
    model = load_weights(run.path)
    return repr(model.config),repr(model.card),[(n,p.numpy().tobytes()) for n,p in model.state_dict().items()]

def what_a_run_says(run):
    from cfm_lab.train import latest_checkpoint
    return weights_of(run),None,run.rows(),latest_checkpoint(run.path/"checkpoints").read_bytes()

def judge_export(folder, before, victim):
    from cfm_lab.upkeep import import_store
    root = folder.with_name("in")
    shutil.rmtree(root,ignore_errors=True)
    store,error = attempt(lambda: import_store(folder,root))
    if error and victim.name not in str(error) and victim.name!="manifest.json": raise Odd(f"not named: {error}")
    if error and root.exists(): raise Odd("refused, but something is there")
    if store and answers(store)!=before: raise Odd("not found, though something has changed")
    if store: store.close()
    return "found" if error else "harmless"

@pytest.fixture(scope="module")
def targets(school, lessons, tmp_path_factory):
    "A store with everything in it, its like; a trained run, its like; an export, its like: (folder, another one, what it says, its judge, its files)."
    from cfm_lab.upkeep import export_store
    root,out = tmp_path_factory.mktemp("targets"),{}
    for name,shift in (("store",0),("store2",50_000)):
        store = open_store(garden(root/f"{name}-made",6,shift=shift).root)
        for n in ("cart","sledge"): store.append(f"{n}-push",[push(shift+8000+i,name=n) for i in range(4)])
        store.delete([e.uid for e in store.episodes("trolley-push")[1:3]],"not wanted"); store.quarantine("sledge-push",[push(shift+8100,name="sledge")],"it diverged")
        shutil.copytree(store.root,root/name,ignore=shutil.ignore_patterns("*-shm",".*"))           # while it is open, so the WAL is there
        before = answers(store)
        export_store(store,root/f"{name}-export")
        out[name] = before,answers(store)
    assert (root/"store"/"catalog.sqlite-wal").stat().st_size>10_000
    for name,steps in (("run",28),("run2",24)): assert school.start("train",lessons,str(root),name,steps,SAVE).wait()==0
    export_files = {f"export {k}":v for k,v in STORE_FILES.items() if k not in ("spool","catalogue","wal")}|{"export manifest":"manifest.json"}
    return [(root/"store",root/"store2",out["store"][0],judge_store,STORE_FILES), (root/"run",root/"run2",what_a_run_says(new_run("run",root,resume=True)),judge_run,{f"run {k}":v for k,v in RUN_FILES.items()}),
        (root/"store-export",root/"store2-export",out["store"][1],judge_export,export_files)]

def test_without_damage_nothing_is_found(targets,tmp_path):
    for folder,_,before,judge,globs in targets:
        for kind,glob in globs.items():
            copy = Path(shutil.copytree(folder,tmp_path/kind/folder.name))
            assert judge(copy,before,sorted(copy.glob(glob))[0])=="harmless", kind

@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part",range(4))
def test_random_damage(targets,tmp_path,figure,part):
    rng,odd,counts = random.Random(part),[],{}
    kinds = [(*t[:4],k,glob) for t in targets for k,glob in t[4].items()]
    for n in range(often(25,500)):
        folder,other,before,judge,kind,glob = kinds[(part+4*n)%len(kinds)]
        copy = tmp_path/folder.name
        shutil.rmtree(copy,ignore_errors=True); shutil.copytree(folder,copy)
        files = sorted(copy.glob(glob))
        victim = rng.choice(files)
        how = rng.choice(DAMAGES)
        while not damage(victim,how,rng,[*files,*other.glob(glob)]): how = rng.choice(DAMAGES)
        try: said = judge(copy,before,victim)
        except Exception as e: said = "odd"; odd.append(f"{kind}, {how}, {victim.name}: {type(e).__name__}: {e}")
        c = counts.setdefault(kind,{}); c[said] = c.get(said,0)+1
    total = sum(sum(c.values()) for c in counts.values())
    figure(f"random damage, part {part+1} of 4","0–7 % found","100 % found or proved harmless; the undamaged rest usable",
        f"{total-len(odd)} of {total}: "+"; ".join(f"{k}: {', '.join(f'{v} {w}' for w,v in sorted(c.items()))}" for k,c in sorted(counts.items())),n=total,bad=len(odd),chance=True)
    assert not odd, f"{len(odd)} of {total}\n"+"\n".join(odd[:20])

# ---- SIGINT and SIGTERM ----

SIGNALS = {signal.SIGINT:130,signal.SIGTERM:143}

class Tally:
    "What came of the signals."
    def __init__(self): self.coded = self.early = self.missed = self.before = 0; self.slowest = 0.
    def until(self, hits):
        "Numbers of attempts, until so many signals came in time."
        from itertools import count
        for n in count():
            if self.hits>=hits: return
            assert n<4*hits+4, f"{self.missed} of {n} came too late"
            yield n
    def take(self, sig, code, took, left, said, done=""):
        if code is None or code==0 and done and done in said: self.missed += 1; return False      # too late: all was done
        if code==1 and "init_import_site" in said: self.before += 1; return False                 # Python itself was still starting: no line of ours had run
        assert code in (SIGNALS[sig],-sig), f"{sig.name}: exit code {code}; {said[-600:]}"
        assert took<5 and not left, f"{sig.name}: {took:.1f} s, orphans {left}"
        self.coded += code>0; self.early += code<0; self.slowest = max(self.slowest,took)
        return True
    @property
    def hits(self): return self.coded+self.early
    def words(self): return f"{self.hits} of {self.hits} ended in time: {self.coded} with 130/143, {self.early} by the signal itself, slowest {self.slowest:.1f} s; 0 orphans"+(f"; {self.before} more fell into the interpreter's own start (exit 1)" if self.before else "")

def test_signals_to_collect(tmp_path,figure):
    from cfm_lab.upkeep import verify
    rng,tally,tries,same = random.Random(0),Tally(),often(6,50),0
    command = [sys.executable,"-W","ignore","-m","cfm_lab.cli","collect","dm-cartpole-swingup","dm-reacher-easy","arm-family","--episodes","48","--steps","80","--bodies","8","--workers","2","--name","local/some-v0"]
    t = time.time()
    whole = subprocess.run([*command,"--json"],env=dict(ENV,CFM_DATA=str(tmp_path/"whole")),capture_output=True,text=True)
    seconds,want = time.time()-t,json.loads(whole.stdout)["content_hash"]
    for n in tally.until(tries):
        sig,data = list(SIGNALS)[n%2],tmp_path/f"cut{n//5}"
        tally.take(sig,*signalled(command,data,rng.uniform(0,.7*seconds),sig,tmp_path),done=f"content {want[:12]}")
        root = data/"datasets"/"local"/"some-v0"
        if (root/"cfm_dataset.json").exists(): assert len(everything(open_store(root)))==len(open_store(root).episodes())
        if n%5==4 or tally.hits==tries:
            done = subprocess.run([*command,"--json"],env=dict(ENV,CFM_DATA=str(data)),capture_output=True,text=True)
            assert done.returncode==0 and json.loads(done.stdout)["content_hash"]==want and verify(open_store(root))
            shutil.rmtree(data)
            same += 1
    figure("SIGINT, SIGTERM to `cfm collect` with 2 workers","–","exit 130 / 143 within 5 s, resumable, no zombies",tally.words()+f"; {same} of {same} resumed to the same hash",n=tally.hits+tally.missed,inside=tally.hits)

def test_signals_to_the_trainer(school,lessons,tmp_path,figure):
    from cfm_lab.train import check_run
    rng,tally,tries,cuts = random.Random(1),Tally(),often(4,30),0
    seconds,lines = undisturbed(lambda: learn(school,lessons,tmp_path,"whole"))
    for n in tally.until(tries):
        sig,c = list(SIGNALS)[n%2],learn(school,lessons,tmp_path,f"cut{n//3}").until("begin")
        k = rng.randrange(-1,STEPS-SAVE)
        if k>=0: c.until("step",k)
        time.sleep(rng.uniform(0,seconds/STEPS if k>=0 else seconds/4))
        below,t = offspring(c.pid),time.time()
        c.send(sig)
        code = c.wait()
        tally.take(sig,None if "end" in c.lines else code,time.time()-t,orphans(below)," ".join(c.lines[-3:]))
        run = new_run(f"cut{n//3}",tmp_path,resume=True)
        assert check_run(run)==[] and not list(run.path.rglob("*.tmp"))
        if n%3==2 or tally.hits==tries:
            c = learn(school,lessons,tmp_path,run.path.name)
            assert c.wait()==0 and c.lines[-2]==lines[-2]
            cuts += 1
    figure("SIGINT, SIGTERM to the trainer","Lightning: exit 1 and 0","exit 130 / 143 within 5 s, resumable, no zombies",tally.words()+f"; {cuts} of {cuts} resumed to the same bits",n=tally.hits+tally.missed,inside=tally.hits)

LESSON = """
import torch
from torch import nn
from cfm_lab.artifacts import new_run
from cfm_lab.train import fit
class Half(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Linear(1,1)
    def loss(self, x): l = ((self.w(x)-x/2)**2).mean(); return l,dict(loss=l.item())
torch.manual_seed(0)
done = fit(Half(),lambda k: torch.randn(8,1,generator=torch.Generator().manual_seed(k)),steps,run=new_run("half",resume=True),save_every=100)
"""

@pytest.mark.skipif(not LONG,reason="the long version; tests/test_pipeline.py has a short one")
def test_signals_to_a_study_that_trains(tmp_path,figure):
    from conftest import make_notebook
    rng,tally,tries = random.Random(2),Tally(),often(2,10)
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = cfm_lab\n")
    make_notebook(tmp_path/"nbs"/"studies"/"00_first_run.ipynb",LESSON,"with open(out+'/weights','w') as f: f.write(repr([p.tolist() for p in done.model.parameters()]))",head="out = ''\nsteps = 3000\nquick = {'steps': 2000}\n")
    command = [sys.executable,"-W","ignore","-m","cfm_lab.cli","run","--quick"]
    t = time.time()
    assert subprocess.run(command,cwd=tmp_path,env=dict(ENV,CFM_DATA=str(tmp_path/"whole")),capture_output=True).returncode==0
    seconds = time.time()-t
    for n in tally.until(tries):
        sig = list(SIGNALS)[n%2]
        tally.take(sig,*signalled(command,tmp_path/"cut",rng.uniform(.1,.8)*seconds,sig,tmp_path),done="Notebook:")
        state = [json.loads(p.read_text())["state"] for p in (tmp_path/"cut").glob("runs/*/status.json")]
        assert set(state)<={"interrupted","running","done"}
        if n%5==4 or tally.hits==tries or "done" in state:
            assert subprocess.run(command,cwd=tmp_path,env=dict(ENV,CFM_DATA=str(tmp_path/"cut")),capture_output=True).returncode==0
            a,b = (next((tmp_path/w).glob("runs/*/weights")).read_text() for w in ("whole","cut"))
            assert a==b
            shutil.rmtree(tmp_path/"cut")
    figure("SIGINT, SIGTERM to `cfm run --quick` of a study that trains","–","exit 130 / 143 within 5 s, resumable, no zombies",tally.words()+", resumed to the same bits",n=tally.hits+tally.missed,inside=tally.hits)
