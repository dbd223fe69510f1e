"Training: killed with SIGKILL five times on its way, it ends with the same bits. CFM_LONG=1: four times five random cuts."
import random, subprocess, sys, time
from cfm_lab.artifacts import new_run
from faults import ENV, LONG

STEPS = 48
CUTS = [sorted(random.Random(i).sample(range(1,STEPS),5)) for i in range(4)] if LONG else [(6,13,22,31,43)]

def fresh(lessons, root):
    "The hash of the weights that a fresh interpreter trains without being disturbed."
    done = subprocess.run([sys.executable,"-W","ignore","-c","import sys, faults; faults.train(*sys.argv[1:4],int(sys.argv[4]))",lessons,str(root),"whole",str(STEPS)], env=ENV, capture_output=True, text=True)
    assert done.returncode==0, done.stderr[-1000:]
    return done.stdout.split("\n")[-2]

def train(school, lessons, root, name, kill_at=None, wait=0.):
    "Kill the trainer at a step, or let it finish. What it says of its weights, or None."
    c = school.start("train",lessons,str(root),name,STEPS)
    if kill_at is not None: c.until("step",kill_at); time.sleep(wait); assert c.kill(); return None
    assert c.wait()==0, c.lines
    return c.lines[-2]

def test_cuts_leave_no_trace(school, lessons, tmp_path, figure):
    whole,rng = fresh(lessons,tmp_path),random.Random(0)
    assert whole.startswith("weights ")
    for n,cuts in enumerate(CUTS):
        for cut in cuts: assert train(school,lessons,tmp_path,f"cut{n}",cut,rng.uniform(0,.02)) is None
        assert train(school,lessons,tmp_path,f"cut{n}")==whole
        run = new_run(f"cut{n}",tmp_path,resume=True)
        steps = [r["step"] for r in run.rows()]
        assert steps==sorted(set(steps))               # no metric row is missing or stands twice
        assert len(list((run.path/"checkpoints").glob("*.ckpt")))<=2
    many = sum(map(len,CUTS))
    figure(f"bitwise resume at {many} random cuts","0 of 4",f"{many} of {many}",f"{many} of {many}",n=many,inside=many)

def test_a_torn_checkpoint_is_passed_over(school, lessons, tmp_path):
    whole = train(school,lessons,tmp_path,"whole")
    assert train(school,lessons,tmp_path,"torn",30) is None
    newest = max((tmp_path/"torn"/"checkpoints").glob("*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(school,lessons,tmp_path,"torn")==whole
