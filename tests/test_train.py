"""Training: killed with SIGKILL five times on its way, it ends with the same bits."""
import os, random, signal, subprocess, sys, textwrap, time
import pytest
from cfm_lab.artifacts import new_run

CHILD = textwrap.dedent("""
    import sys, torch
    from pathlib import Path
    torch.set_num_threads(1)
    from cfm_lab.artifacts import new_run, sha256
    from cfm_lab.dynamics import dynamics_tiny
    from cfm_lab.loader import Corpus, batch
    from cfm_lab.store import open_store
    from cfm_lab.train import fit
    data, root, name, steps = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    corpus, config = Corpus(open_store(data)), dynamics_tiny()
    torch.manual_seed(0)
    def batch_k(k):
        print("step", k, flush=True)
        return batch(corpus, None, 0, k, 4, 51+config.unroll)
    fit(config.build(), batch_k, steps, run=new_run(name,root,resume=True), save_every=4)
    print("weights", sha256(root/name/"model.safetensors"), flush=True)
""")
STEPS,CUTS = 48,(6,13,22,31,43)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from cfm_lab.collect import Part, Recipe, collect
    root = tmp_path_factory.mktemp("data")
    collect(Recipe("test/two-v0",(Part("dm-cartpole-swingup",4,100),Part("gym-inverted-double-pendulum",4,100))), root/"set", progress=False)
    return root/"set"

def train(data, root, name, kill_at=None, wait=0.):
    "Start the trainer; kill it at a step, or let it finish. Returns the hash of its weights, or None."
    p = subprocess.Popen([sys.executable,"-W","ignore","-c",CHILD,str(data),str(root),name,str(STEPS)], stdout=subprocess.PIPE, text=True, env=dict(os.environ,OMP_NUM_THREADS="1"))
    try:
        for line in p.stdout:
            word,value = line.split()
            if word=="weights": return value
            if kill_at is not None and int(value)==kill_at: time.sleep(wait); p.send_signal(signal.SIGKILL); return None
    finally: p.kill(); p.wait()
    raise AssertionError(f"the trainer ended with {p.returncode} and no weights")

def test_five_cuts_leave_no_trace(data, tmp_path):
    whole,rng = train(data,tmp_path,"whole"),random.Random(0)
    for cut in CUTS: assert train(data,tmp_path,"cut",cut,rng.uniform(0,.05)) is None
    assert train(data,tmp_path,"cut")==whole
    steps = [r["step"] for r in new_run("cut",tmp_path,resume=True).rows()]
    assert steps==sorted(set(steps))               # no metric row is missing or stands twice
    assert len(list((tmp_path/"cut"/"checkpoints").glob("*.ckpt")))<=2

def test_a_torn_checkpoint_is_passed_over(data, tmp_path):
    whole = train(data,tmp_path,"whole")
    assert train(data,tmp_path,"torn",30) is None
    newest = max((tmp_path/"torn"/"checkpoints").glob("*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train(data,tmp_path,"torn")==whole
