"A killed exam loses at most the cell under way."
import json, os, signal, subprocess, sys, time
import numpy as np
import psutil, pytest
from cfm_lab.cells import Cell, Cells

WRITER = """
import sys
from cfm_lab.cells import Cell, Cells
cells = Cells("kill", root=sys.argv[1])
for n in range(int(sys.argv[2]), 10**6):
    c = Cell(dict(n=n), lambda: list(range(n,n+4000)))
    cells.get(c); print(n, flush=True)
"""

def test_kill(tmp_path):
    rng,said = np.random.default_rng(0),set()
    for kill in range(5):
        p = subprocess.Popen([sys.executable,"-c",WRITER,str(tmp_path),str(1000*kill)],stdout=subprocess.PIPE,text=True,cwd=os.getcwd(),env={**os.environ,"PYTHONPATH":os.pathsep.join(sys.path)})
        said.add(int(p.stdout.readline())); time.sleep(rng.uniform(0,.15)); p.send_signal(signal.SIGKILL)
        said |= {int(l) for l in p.stdout.read().split()}; p.wait()
    assert len(said)>=5
    kept = {r["config"]["n"]:r["value"] for r in Cells("kill",root=tmp_path).kept.values()}
    assert said<=set(kept)
    assert all(v==list(range(n,n+4000)) for n,v in kept.items())

def test_torn_and_foreign_lines(tmp_path):
    cells = Cells("torn",root=tmp_path)
    make = lambda n: Cell(dict(n=n),lambda: n)
    for n in range(3): cells.get(make(n))
    with open(cells.path,"a") as f: f.write('[1]\nnull\n{"key": 7\n\x00\x00\n{"key":"half')
    again = Cells("torn",root=tmp_path)
    assert len(again)==3 and again.missing([make(n) for n in range(5)])[0].config["n"]==3
    again.get(make(3))
    assert Cells("torn",root=tmp_path).get(make(3))==3

SLEEPERS = """
import time
from cfm_lab.collect import side_by_side
for _ in side_by_side(time.sleep, [(60,)]*4, 2): pass
"""

@pytest.mark.parametrize("how", (signal.SIGINT,signal.SIGTERM,signal.SIGKILL), ids=lambda s: s.name)
def test_workers_end_with_their_parent(how):
    p = subprocess.Popen([sys.executable,"-c",SLEEPERS], stderr=subprocess.DEVNULL, env={**os.environ,"PYTHONPATH":os.pathsep.join(sys.path)}, preexec_fn=lambda: signal.signal(signal.SIGINT,signal.default_int_handler))
    workers,until = [],time.time()+60
    while len(workers)<2 and time.time()<until:
        time.sleep(.2); workers = [c for c in psutil.Process(p.pid).children() if "spawn_main" in " ".join(c.cmdline())]
    assert len(workers)==2
    time.sleep(3); p.send_signal(how); p.wait(30)
    assert not psutil.wait_procs(workers,timeout=15)[1]
