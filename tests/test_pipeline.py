"papermill behind a schema: what gets in, what stays, what dies."
import os, re, signal, subprocess, sys, time
import psutil, pytest
from cfm_lab.artifacts import read_json
from cfm_lab.base import BadInput, Report, Row
from cfm_lab.pipeline import RunFailed, check_parameters, execute, fingerprint, parameters, parse_parameters, run_study, write_report
from conftest import ROOT, make_notebook

HEAD = "out = ''\nsteps = 3\nname = 'hopper'\ntasks = ['a']\nquick = {'steps': 1}\n"
gone = lambda pid: not psutil.pid_exists(pid) or psutil.Process(pid).status()==psutil.STATUS_ZOMBIE

def until(what, seconds=60):
    end = time.time()+seconds
    while not what():
        assert time.time()<end, "waited in vain"
        time.sleep(.05)

@pytest.fixture
def study(tmp_path): return make_notebook(tmp_path/"03_tiny.ipynb", "import json\nwith open(out+'/seen.json','w') as f: json.dump([steps,name,tasks], f)", head=HEAD)

@pytest.mark.parametrize("given,says", [
    (dict(stpes=1), "Did you mean 'steps'"), (dict(steps="x"), "does not fit"), (dict(steps=1.5), "does not fit"), (dict(name=3), "does not fit"),
    (dict(tasks="a"), "does not fit"), (dict(steps=float("nan")), "does not fit"), (dict(quick={}), "no parameter 'quick'"),
    ({"steps\nimport os; os.abort()":1}, "no parameter"), ({"steps=1;open('stolen','w')#":1}, "no parameter"), ({"__class__":1}, "no parameter"),
    (dict(tasks=(1,"open('stolen','w')")), "does not fit")])
def test_what_is_not_declared_does_not_get_in(study, given, says):
    with pytest.raises(BadInput) as e: check_parameters(study, given)
    assert says in str(e.value) and "\n" not in str(e.value).replace("\\n","")

def test_a_parameters_cell_is_never_executed(tmp_path):
    nb = make_notebook(tmp_path/"evil.ipynb", head=f"open({str(tmp_path/'stolen')!r},'w')\nsteps = 1")
    with pytest.raises(BadInput, match="line 1 of the parameters cell"): parameters(nb)
    assert not (tmp_path/"stolen").exists()

@pytest.mark.parametrize("out", ["..", "../../x", "/etc", "a/../../b"])
def test_out_stays_inside_the_run(study, data, out):
    with pytest.raises(BadInput, match="leads out of its folder"): run_study(study, dict(out=out))
    assert not [p for p in data.rglob("*") if p.suffix==".json" and p.name=="seen.json"]

EVIL = ["'; open('stolen','w') #", '"""\nopen("stolen","w")\n"""', "\\", "{name}", "a\nb", "\\\"+str(open('stolen','w'))+\"", "\u2028open('stolen','w')"]
def test_values_arrive_as_they_are_and_nothing_in_them_runs(study, data):
    run = run_study(study, dict(name=EVIL[5], tasks=(*EVIL,)))
    assert read_json(run.folder/"seen.json")==[3,EVIL[5],EVIL] and not list(data.rglob("stolen"))

def test_a_finished_run_is_not_repeated_and_a_changed_one_is(study, data):
    first = run_study(study, quick=True)
    status = read_json(first.folder/"status.json")
    assert (first.cached, status["state"], status["parameters"])==(False,"done",dict(steps=1)) and status["seconds"]>0
    assert sorted(p.name for p in first.folder.iterdir())==["03_tiny.ipynb","seen.json","status.json"]
    (first.folder/"seen.json").unlink()
    assert run_study(study, quick=True).cached and not (first.folder/"seen.json").exists()
    assert run_study(study, parse_parameters(study,["steps=2"])).folder!=first.folder
    key = fingerprint(study, {})
    make_notebook(study, "1", head=HEAD)
    assert fingerprint(study, {})!=key

def test_new_results_make_another_run(study, data, tmp_path, monkeypatch):
    import cfm_lab.pipeline as room
    monkeypatch.setattr(room, "results_root", lambda: tmp_path/"data"/"results")
    key = fingerprint(study, {})
    (tmp_path/"data"/"results"/"cells").mkdir(parents=True)
    (tmp_path/"data"/"results"/"cells"/"dynamics.jsonl").write_text("{}")
    assert fingerprint(study, {})!=key

def test_a_failed_run_says_where_and_is_tried_again(tmp_path, data):
    nb = make_notebook(tmp_path/"05_fails.ipynb", "import os", "if not os.path.exists('luck'): raise ValueError('no luck')", head="n = 1")
    with pytest.raises(RunFailed, match="05_fails.ipynb, cell 3: ValueError: no luck"): run_study(nb)
    folder = next((data/"runs").iterdir())
    assert read_json(folder/"status.json")["state"]=="failed"
    assert sorted(p.name for p in folder.iterdir())==["05_fails.failed.ipynb","status.json"]
    (folder/"luck").write_text("")
    (folder/".pretrain-0.1234abcd.tmp").mkdir()        # a training's half-written weights, left by a kill
    assert run_study(nb).status["state"]=="done" and not (folder/"05_fails.failed.ipynb").exists()

def test_a_cell_that_should_raise_must(tmp_path):
    execute(make_notebook(tmp_path/"a.ipynb", ("1/0","raises-exception"), "2"), tmp_path/"a_done.ipynb")
    with pytest.raises(RunFailed, match="did not raise"): execute(make_notebook(tmp_path/"b.ipynb", ("1","raises-exception")), tmp_path/"b_done.ipynb")

SLEEPER = "import os, subprocess, time\nchild = subprocess.Popen(['sleep','600'])\nwith open('pids.tmp','w') as f: f.write(f'{os.getpid()} {os.getppid()} {child.pid}')\nos.rename('pids.tmp','pids')\ntime.sleep(600)"

def test_a_time_out_leaves_no_process(tmp_path):
    nb = make_notebook(tmp_path/"long.ipynb", SLEEPER)
    with pytest.raises(RunFailed, match="stopped after"): execute(nb, tmp_path/"done.ipynb", timeout_s=10)
    pids = [int(p) for p in (tmp_path/"pids").read_text().split()]
    assert len(pids)==3 and all(map(gone,pids)) and not (tmp_path/"done.ipynb").exists()
    assert not list(tmp_path.glob(".*.tmp"))

def cfm(tmp_path, *words, **more):
    "The command in a clone of two files, its main job a notebook that sleeps."
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = cfm_lab\n")
    if not (tmp_path/"nbs").exists(): make_notebook(tmp_path/"nbs"/"studies"/"00_first_run.ipynb", SLEEPER)
    return subprocess.Popen([sys.executable,"-m","cfm_lab.cli",*words], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(ROOT), CFM_DATA=str(tmp_path/"data")), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT,signal.SIG_DFL), **more)     # a shell's background jobs ignore it, and what they start inherits that

@pytest.mark.parametrize("sig,code,state", [(signal.SIGINT,130,"interrupted"), (signal.SIGTERM,143,"running"), (signal.SIGKILL,-9,"running")])
def test_a_signal_to_the_command_ends_everything_below_it(tmp_path, sig, code, state):
    job = cfm(tmp_path, "run", start_new_session=True)
    until(lambda: list(tmp_path.glob("data/runs/*/pids")))
    pids = [int(p) for p in next(tmp_path.glob("data/runs/*/pids")).read_text().split()]
    t = time.time()
    job.send_signal(sig)
    job.communicate(timeout=20)
    assert job.returncode==code and time.time()-t<5
    until(lambda: all(map(gone,pids)), 5)
    folder = next(tmp_path.glob("data/runs/*"))
    assert read_json(folder/"status.json")["state"]==state and not (folder/"00_first_run.ipynb").exists()

def test_a_papermill_that_is_killed_leaves_no_kernel(tmp_path):
    job = cfm(tmp_path, "run")
    until(lambda: list(tmp_path.glob("data/runs/*/pids")))
    pids = [int(p) for p in next(tmp_path.glob("data/runs/*/pids")).read_text().split()]
    os.kill(pids[1], signal.SIGKILL)
    _,err = job.communicate(timeout=20)
    assert job.returncode==1 and "its process ended with code -9" in err and "Traceback" not in err
    until(lambda: all(map(gone,pids)), 5)

def test_the_report_is_inert_and_needs_no_connection(tmp_path):
    import plotly.graph_objects as go
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    rows = Report((Row("dynamics",evil,evil,"MAE",.5,horizon=1),))
    page = write_report(tmp_path, evil, rows, [go.Figure(go.Scatter(y=[1,2],name=evil), layout=dict(title=evil))], evil).read_text()
    plotly = __import__("plotly.offline").offline.get_plotlyjs()
    ours = page.replace(plotly,"")
    assert "<script>alert" not in ours and "<img" not in ours
    assert not re.findall(r"<(?:script|link|img|iframe|object)[^>]+(?:src|href|data)=", ours) and "default-src 'none'" in ours
    assert Report.from_dicts(read_json(tmp_path/"report.json")["rows"])==rows
