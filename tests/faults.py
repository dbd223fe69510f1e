"What the fault tests share: a cart, processes to kill, a small disk, the figures."
import importlib, json, os, pickle, select, signal, socket, subprocess, sys, tempfile, time, traceback
from contextlib import contextmanager
from pathlib import Path
import numpy as np

LONG = bool(os.environ.get("CFM_LONG"))
HERE = Path(__file__).resolve().parent
ENV = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(HERE.parent),str(HERE),*filter(None,[os.environ.get("PYTHONPATH")])]))

def cart(name="cart", mass=1.):
    "A cart with one motor."
    from cfm_lab.base import ActionMap, Body, Command, Joint, Spec
    bodies = Body("world",-1,(0,0,0),(1,0,0,0),0.,(0,0,0),(1,0,0,0),(0,0,0)), Body("cart",0,(0,0,0),(1,0,0,0),mass,(0,0,0),(1,0,0,0),(.1,.1,.1))
    return Spec(name,name,"Cart-v0",.02,bodies,(Joint("slider","slide",1),),(Command("motor","motor",-1,1,gain=10.),),ActionMap.identity(["motor"],[-1],[1]),
        np.zeros(2),np.ones((1,1)),np.ones((1,1),bool),np.ones(1),np.eye(3)[:1],np.zeros((1,3)))

def push(seed, rows=50, name="cart"):
    "A random push of the cart."
    from cfm_lab.base import Episode
    a = np.random.default_rng(seed).uniform(-1,1,(rows,1))
    v = .2*np.cumsum(a,0)
    return Episode(name,np.c_[.02*np.cumsum(v,0),v],a,a,np.zeros(3),.02,seed,f"{name}-push","random")

def everything(store):
    "The hash of every episode, computed from what is read."
    from cfm_lab.store import episode_hash
    return sorted(episode_hash(e) for e in store.read_all())

def garden(root, groups=30, compacted=False, shift=0):
    "A store with all that a store can hold: three robots, many groups, shards, deletions, episodes that diverged."
    from cfm_lab.store import create_store
    from cfm_lab.upkeep import compact
    names = ("cart","sledge","trolley")
    store = create_store(root,[cart(n,1+shift/1e5) for n in names],card=dict(what=f"garden {shift}"))
    for half in (0,1):
        for k in range(groups):
            for n,name in enumerate(names): store.append(f"{name}-push",[push(shift+100*n+10*k+1000*half+i,30+20*i,name) for i in range(3)],split="test" if k%5==4 else "train")
        store.quarantine("cart-push",[push(shift+5000+half)],"the simulation diverged")
        store.append("trolley-push",[push(shift+7000+half,25_000,"trolley")])                      # shards of more than one block
        store.delete([e.uid for e in store.episodes("cart-push")[half:9:4]],"not wanted")
        if half==0 or compacted: compact(store)
    store.query("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    return store

# ---- processes to kill ----

class Nursery:
    "A process that has imported what its children need and forks them in milliseconds. Each is a process of its own, to be killed."
    def __init__(self, *imports):
        self.line,theirs = socket.socketpair(socket.AF_UNIX,socket.SOCK_SEQPACKET)
        self.process = subprocess.Popen([sys.executable,"-W","ignore","-c","import sys, faults; faults._nurse(int(sys.argv[1]),sys.argv[2:])",str(theirs.fileno()),*imports], env=ENV, pass_fds=[theirs.fileno()])
        theirs.close()
        assert self.line.recv(9)==b"ready"
    def ask(self, what, *fds):
        socket.send_fds(self.line,[pickle.dumps(what)],list(fds))
        return int(self.line.recv(20))
    def start(self, function, *args):
        "Call a function of this module in a process of its own."
        r,w = os.pipe()
        pid = self.ask((function,args),w)
        os.close(w)
        return Child(self,pid,r)
    def close(self): self.line.close(); self.process.wait(20)

def _nurse(fd, imports):
    line = socket.socket(fileno=fd)
    for m in imports: importlib.import_module(m)
    line.send(b"ready")
    while True:
        message,fds,*_ = socket.recv_fds(line,60_000,1)
        if not message: return
        function,args = pickle.loads(message)
        if function=="wait": line.send(str(os.waitstatus_to_exitcode(os.waitpid(args,0)[1])).encode()); continue
        pid = os.fork()
        if not pid: _live(line,fds[0],globals()[function],args)
        os.close(fds[0]); line.send(str(pid).encode())

def _live(line, out, function, args):      # what a child does: as the interpreter would end it
    line.close(); os.dup2(out,1); os.close(out)
    sys.stdout = open(1,"w",closefd=False)
    signal.signal(signal.SIGINT,signal.default_int_handler); signal.signal(signal.SIGTERM,signal.SIG_DFL)
    code = 1
    try: function(*args); say("end"); code = 0
    except SystemExit as e: code = e.code or 0
    except KeyboardInterrupt: signal.signal(signal.SIGINT,signal.SIG_DFL); os.kill(os.getpid(),signal.SIGINT)
    except BaseException as e:
        say("error",type(e).__name__,json.dumps(str(e)))
        if type(e).__name__!="BadInput": traceback.print_exc()
    finally: sys.stderr.flush(); os._exit(code)

def say(*words): os.write(1,(" ".join(map(str,words))+"\n").encode())

class Child:
    "A child of a nursery."
    def __init__(self, nursery, pid, out): self.nursery,self.pid,self.out,self.text,self.code = nursery,pid,out,b"",None
    def more(self, seconds):      # read what has come; False: the pipe is closed
        if not select.select([self.out],[],[],seconds)[0]: return True
        new = os.read(self.out,1<<16)
        self.text += new
        return bool(new)
    @property
    def lines(self): return self.text.decode().split("\n")[:-1]      # the last line may be cut
    def until(self, word, least=0, seconds=60):
        "Wait for a line that begins with `word` (and has at least this number)."
        end,fits = time.time()+seconds,lambda w: w[0]==word and int((w+[0])[1])>=least
        while not any(fits(l.split(" ")) for l in self.lines if l.startswith(word)):
            assert self.more(.2) and time.time()<end, f"no {word!r}, but {self.lines[-3:]}"
        return self
    def send(self, sig): os.kill(self.pid,sig)
    def wait(self):
        "Its exit code; all it said is in `lines`."
        if self.code is None: self.code = self.nursery.ask(("wait",self.pid))
        while self.out is not None and self.more(10): pass
        if self.out is not None: os.close(self.out); self.out = None
        return self.code
    def kill(self):
        "SIGKILL. Did it hit while the child was at work?"
        self.send(signal.SIGKILL)
        self.wait()
        return self.code==-signal.SIGKILL and "end" not in self.lines

def offspring(pid):
    "All processes below this one."
    import psutil
    try: return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess: return []

def orphans(family, seconds=5):
    "Those that are still alive after a while."
    import psutil
    alive = lambda p: p.is_running() and p.status()!=psutil.STATUS_ZOMBIE
    end = time.time()+seconds
    def left():
        out = []
        for p in family:
            try: out += [p] if alive(p) else []
            except psutil.NoSuchProcess: pass
        return out
    while left() and time.time()<end: time.sleep(.05)
    return left()

def relatives(data):
    "All processes that work on a data folder, whoever started them."
    import psutil
    out = []
    for p in psutil.process_iter():
        try:
            if p.pid!=os.getpid() and p.environ().get("CFM_DATA")==str(data) and p.status()!=psutil.STATUS_ZOMBIE: out.append(p)
        except psutil.Error: pass
    return out

def signalled(command, data, at, sig, cwd):
    "Run a command and send it a signal after `at` seconds: (exit code, seconds until it ended, orphans, what it said). Code None: it had ended before."
    # a shell's background jobs ignore SIGINT, and what they start inherits that
    job = subprocess.Popen(command,cwd=cwd,env=dict(ENV,CFM_DATA=str(data)),start_new_session=True,stdout=subprocess.PIPE,stderr=subprocess.STDOUT,text=True,preexec_fn=lambda: signal.signal(signal.SIGINT,signal.SIG_DFL))
    try: return None,0.,[],job.communicate(timeout=at)[0]
    except subprocess.TimeoutExpired: pass
    job.send_signal(sig)
    begun = time.time()
    try: job.wait(20)
    finally: job.kill()
    took = time.time()-begun
    left = orphans(relatives(data))
    for p in left: p.kill()
    return job.returncode,took,left,job.communicate()[0]

# ---- what the children do ----

def write(root, first, n=0, most=3, pause=0.):
    "Append pushes for ever, or `n` times; every acknowledged uid is said."
    from itertools import count
    from cfm_lab.store import open_store
    store = open_store(root)
    say("ready")
    for i in count():
        say("begin")
        say("stored",*store.append("cart-push",[push(first+10*i+k) for k in range(1+i%most)]))
        if i+1==n: break
        time.sleep(pause)

def prune(root, seed):
    "Delete episodes at random, one or some at a time; every acknowledged one is said."
    import random
    from cfm_lab.store import open_store
    rng,store = random.Random(seed),open_store(root)
    say("ready")
    while True:
        uids = [e.uid for e in rng.sample(store.episodes(),rng.randrange(1,4))]
        say("begin",*uids)
        store.delete(uids,"not wanted")
        say("deleted",*uids)

def look(root, seed, stop):
    "Read at random until a file says stop; every episode must be what its seed says."
    import random
    from cfm_lab.store import episode_hash, open_store
    rng,store,n = random.Random(seed),open_store(root),0
    say("ready")
    while not Path(stop).exists():
        entries = store.episodes()
        for e in rng.sample(entries,min(len(entries),20)):
            if episode_hash(store.read(e.uid))!=e.hash or episode_hash(push(e.seed))!=e.hash: raise ValueError(f"{e.uid} is not what was stored")
            n += 1
        if rng.random()<.2: store = open_store(root)
    say("read",n)

def tidy_up(root, stop):
    "Compact again and again."
    from cfm_lab.store import open_store
    from cfm_lab.upkeep import compact
    n = 0
    while not Path(stop).exists(): compact(open_store(root)); n += 1; time.sleep(.05)
    say("compacted",n)

def collect_some(root, workers, seed=5, times=1):
    "A real collection."
    from cfm_lab.collect import Part, Recipe, collect
    say("begin")
    parts = Part("dm-cartpole-swingup",40*times,60),Part("dm-reacher-easy",16*times,40),Part("arm-family",1,40,bodies=3*times)
    say("hash",collect(Recipe("t/same-v0",parts,seed=seed),Path(root),workers=workers,progress=False).content_hash())

def collect_lessons(root):
    "What the trainer learns from."
    from cfm_lab.collect import Part, Recipe, collect
    collect(Recipe("test/two-v0",(Part("dm-cartpole-swingup",4,100),Part("gym-inverted-double-pendulum",4,100))),Path(root),progress=False)

def upkeep(what, root, *more):
    "compact, export_store, import_store, verify, rebuild."
    import cfm_lab.upkeep as room
    from cfm_lab.store import open_store
    first = Path(root) if what in ("import_store","rebuild") else open_store(root)
    say("begin")
    getattr(room,what)(first,*map(Path,more))

def train(data, root, name, steps, save_every=4):
    "The real trainer on a small model."
    import torch
    from cfm_lab.artifacts import new_run, sha256
    from cfm_lab.dynamics import dynamics_tiny
    from cfm_lab.loader import Corpus, batch
    from cfm_lab.store import open_store
    from cfm_lab.train import fit
    torch.set_num_threads(1)
    corpus,config = Corpus(open_store(data)),dynamics_tiny()
    torch.manual_seed(0)
    def batch_k(k):
        say("step",k)
        return batch(corpus,None,0,k,4,51+config.unroll)
    say("begin")
    fit(config.build(),batch_k,steps,run=new_run(name,Path(root),resume=True),save_every=save_every)
    say("weights",sha256(Path(root)/name/"model.safetensors"))

# ---- damage ----

DAMAGES = ("bit flip","bytes zeroed","truncated","bytes inserted","blocks swapped","deleted","replaced","emptied")

def damage(path, how, rng, others=()):
    "Damage a file; False if that would change nothing."
    old = path.read_bytes()
    n,b = len(old),bytearray(old)
    if how=="deleted": path.unlink(); return True
    if how=="replaced":
        others = [o for o in others if o!=path and o.read_bytes()!=old]
        if not others: return False
        b = rng.choice(others).read_bytes()
    if how=="emptied": b = b""
    if not n: return False
    if how=="bit flip": b[rng.randrange(n)] ^= 1<<rng.randrange(8)
    if how=="bytes zeroed": a = rng.randrange(n); m = min(n-a,rng.choice((1,8,64,512,4096))); b[a:a+m] = bytes(m)
    if how=="truncated": b = b[:rng.randrange(n)]
    if how=="bytes inserted": a = rng.randrange(n+1); b[a:a] = rng.randbytes(rng.choice((1,8,64)))
    if how=="blocks swapped" and n>3:
        m = rng.randrange(1,min(n//2,4096)+1); a = rng.randrange(n-2*m+1); c = rng.randrange(a+m,n-m+1)
        b[a:a+m],b[c:c+m] = old[c:c+m],old[a:a+m]
    if bytes(b)==old: return False
    path.write_bytes(b)
    return True

# ---- a small disk ----

@contextmanager
def small_disk(path, megabytes):
    "A file system of a few megabytes; OSError where mounting is not allowed."
    path = Path(path)
    path.mkdir(parents=True,exist_ok=True)
    done = subprocess.run(["mount","-t","tmpfs","-o",f"size={int(megabytes*1024)}k","tmpfs",str(path)],capture_output=True,text=True)
    if done.returncode: raise OSError(done.stderr.strip() or "can't mount")
    try: yield path
    finally: subprocess.run(["umount","-l",str(path)],check=True)

def fill(disk, leave):
    "Fill a disk but for so many bytes; returns the file to delete."
    s,f = os.statvfs(disk),Path(disk)/".filler"
    f.unlink(missing_ok=True)
    s = os.statvfs(disk)
    n = s.f_bavail*s.f_frsize-leave
    if n>0:
        with open(f,"wb") as io: os.posix_fallocate(io.fileno(),0,n)
    return f

# ---- figures ----

RESULTS = HERE.parent/"data"/"results"/"faults.json"

def keep_figure(test, anchor, target, figure, n, seconds, inside=None, bad=0, chance=None):
    "A row of data/results/faults.json: of `n` trials `bad` went wrong, `inside` of the kills hit the operation. Where chance decides, the bound of the rate is exact (Clopper-Pearson) at 95 %."
    import fcntl
    from scipy.stats import beta
    from cfm_lab.artifacts import write_json
    from cfm_lab.cells import commit, hardware
    trials = n if inside is None else inside
    if chance is None: chance = inside is not None
    bound = (round(float(beta.ppf(.95,bad+1,trials-bad)),4) if trials>bad else 1.) if chance else None
    row = dict(test=test,anchor=anchor,target=target,figure=figure,n=n,inside=inside,seconds=round(seconds,1),rate_below=bound,commit=commit(),hardware=hardware())
    if not LONG: return row
    with open(Path(tempfile.gettempdir())/"cfm-faults.lock","w") as lock:
        fcntl.flock(lock,fcntl.LOCK_EX)
        old = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        rows = sorted([r for r in old if r["test"]!=test]+[row],key=lambda r: r["test"])
        write_json(RESULTS,dict(exam="faults",quick=False,seconds=round(sum(r["seconds"] for r in rows),1),rows=rows))
    return row
