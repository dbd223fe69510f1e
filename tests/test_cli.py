"The command: exit codes, one line for bad input, JSON and nothing else."
import json
import pytest
from cfm_lab.cli import main
from conftest import make_notebook

REPORT = "from cfm_lab.base import Row\nfrom cfm_lab.pipeline import write_report\nwrite_report(out, 'Tiny', [Row('dynamics','hopper','persistence','MAE',.5,horizon=1)], text='One seed.')"

@pytest.fixture
def clone(tmp_path, data, monkeypatch):
    "A clone of two files."
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nlib_name = cfm_lab\n")
    make_notebook(tmp_path/"nbs"/"studies"/"00_first_run.ipynb", REPORT, head="out = ''\nsteps = 3\ncaches = ['cfm/tiny-v0']")
    monkeypatch.chdir(tmp_path)
    return tmp_path

@pytest.mark.parametrize("words,says", [(["run","01_frist_run"],"first_run'?"), (["run","-s","stpes=1"],"Did you mean 'steps'"), (["run","-s","steps"],"Write NAME=VALUE"),
    (["run","-s","steps=many"],"does not fit"), (["exam","dnyamics"],"no exam"), (["exam","coverage","--sweep"],"only our own exam of dynamics"),
    (["collect","cfm/pretrain-v0","--episodes","1"],"a recipe stands alone"), (["collect","gym-ant","cfm/pretrain-v0"],"would not heed gym-ant")])
def test_bad_input_is_one_line_and_exit_code_2(clone, capsys, words, says):
    assert main(words)==2
    out,err = capsys.readouterr()
    assert out=="" and err.startswith("cfm: ") and err.count("\n")==1 and says in err

def test_words_outside_a_clone(tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run"])==2 and "Change into the clone" in capsys.readouterr().err

def test_run_twice_and_afresh(clone, data, capfd):
    mine = data/"datasets"/"mine"/"kept-v0"/"file"
    cache = data/"datasets"/"cfm"/"tiny-v0"/"file"
    for f in (mine,cache): f.parent.mkdir(parents=True); f.write_text("x")
    assert main(["run"])==0
    out,err = capfd.readouterr()
    assert "hopper" in out and "report.html" in out and "python3 -m cfm_lab lab" in out
    run = next((data/"runs").iterdir())
    assert main(["run","--json"])==0
    out,err = capfd.readouterr()
    said = json.loads(out)
    assert said["cached"] and said["state"]=="done" and said["report"]["rows"][0]["robot"]=="hopper" and f"there already: {run.name}" in err and "there already: cfm/tiny-v0" in err
    (run/"mark").write_text("old")
    assert main(["run","--fresh","--json",str(clone/"result.json")])==0
    assert not (run/"mark").exists() and mine.exists() and not cache.exists()
    assert json.loads((clone/"result.json").read_text())["cached"] is False

def test_a_study_that_fails_on_bad_input(clone, capfd):
    make_notebook(clone/"nbs"/"studies"/"01_bad.ipynb", "from cfm_lab.base import BadInput\nraise BadInput('no task of this name', where='hoper')")
    assert main(["run","bad"])==2
    err = capfd.readouterr().err
    assert "hoper: no task of this name" in err and "Traceback" not in err

def test_tasks_as_json(data, capsys, monkeypatch):
    pytest.importorskip("mujoco")
    from cfm_lab import tasks
    few = ("dm-cartpole-swingup","dm-finger-spin","gym-hopper","mw-reach","car-cruise")
    monkeypatch.setattr(tasks, "TASKS", {t:tasks.TASKS[t] for t in few})
    assert main(["tasks","--json"])==0
    table = {t["id"]:t for t in json.loads(capsys.readouterr().out)}
    assert set(table)==set(few) and {"train","validation","held-out"}=={t["split"] for t in table.values()}
    assert table["gym-hopper"]["actions"]==3 and table["gym-hopper"]["dt"]==.008 and table["gym-hopper"]["has_reward"] and table["mw-reach"]["has_expert"]
    assert main(["tasks"])==0 and "distinct: 3 train, 1 validation, 1 held-out" in capsys.readouterr().out

ROBOT = '<mujoco><worldbody><body name="arm"><joint name="j" axis="0 1 0"/><geom type="capsule" fromto="0 0 0 .3 0 0" size=".03"/></body></worldbody><actuator><motor joint="j" ctrlrange="-1 1" ctrllimited="true"/></actuator></mujoco>'

def test_a_robot_of_ones_own(clone, data, capsys, monkeypatch):
    pytest.importorskip("mujoco")
    from cfm_lab import tasks
    monkeypatch.setattr(tasks, "TASKS", {"gym-hopper":tasks.TASKS["gym-hopper"]})
    (clone/"lever.xml").write_text(ROBOT)
    assert main(["tasks","add","lever.xml"])==0 and "own-lever" in capsys.readouterr().out
    assert main(["tasks","--json"])==0
    mine = [t for t in json.loads(capsys.readouterr().out) if t["split"]=="own"]
    assert [t["id"] for t in mine]==["own-lever"] and mine[0]["actions"]==1
    assert main(["collect","own-lever","--episodes","2","--steps","20","--name","local/lever-v0"])==0 and "2 episodes" in capsys.readouterr().out
    assert main(["tasks","remove","own-lever"])==0 and not list((data/"tasks").glob("*/task.json"))
    (clone/"bad.xml").write_text(ROBOT.replace("<worldbody>",'<include file="/etc/passwd"/><worldbody>'))
    capsys.readouterr()
    assert main(["tasks","add","bad.xml"])==2 and capsys.readouterr().err.count("\n")==1

def test_collect_by_the_command(clone, data, capsys):
    pytest.importorskip("mujoco")
    assert main(["collect","dm-cartpole-swingup","--episodes","2","--steps","20","--name","local/two-v0","--json"])==0
    assert (data/"datasets"/"local"/"two-v0").is_dir() and len(json.loads(capsys.readouterr().out)["content_hash"])==64
    assert main(["collect","dm-cartpole-swingpu"])==2

def test_a_disk_that_says_no_is_one_line(clone, monkeypatch, capsys):
    (clone/"file").write_text("")
    monkeypatch.setenv("CFM_DATA", str(clone/"file"/"data"))
    assert main(["run"])==1
    err = capsys.readouterr().err
    assert err.startswith("cfm: ") and str(clone/"file") in err and err.count("\n")==1

def test_a_minari_folder_is_imported(clone, data, capsys):
    from cfm_lab.collect import Part, Recipe, collect
    from cfm_lab.interop import to_minari
    store = collect(Recipe("cfm/two-v0",(Part("dm-cartpole-swingup",2,20),)), progress=False)
    to_minari(store, "lab/two-v0", spec="dm-cartpole-swingup", root=clone/"theirs")
    assert main(["data","import",str(clone/"theirs"/"lab"/"two-v0"),"lab/back-v0"])==0 and json.loads(capsys.readouterr().out)["episodes"]==2
    (clone/"empty").mkdir()
    assert main(["data","import",str(clone/"empty"),"lab/none-v0"])==2 and "is no exported data set" in capsys.readouterr().err

def test_data_sets_on_the_command_line(clone, data, capfd):
    from cfm_lab.collect import Part, Recipe, collect
    store = collect(Recipe("cfm/two-v0",(Part("dm-cartpole-swingup",2,20),)), progress=False)
    assert main(["data"])==0 and "cfm/two-v0" in capfd.readouterr().out
    assert main(["data","--json"])==0
    said = json.loads(capfd.readouterr().out)[0]
    assert said["transitions"]==40 and "text" not in said
    assert main(["data","show","cfm/two-v0"])==0
    assert json.loads(capfd.readouterr().out)["content_hash"]==store.content_hash()
    assert main(["data","show","cfm/two-v0","dm-cartpole-swingup"])==0
    episode = json.loads(capfd.readouterr().out)[0]
    assert main(["data","show","cfm/two-v0",episode["uid"]])==0
    assert "slider" in json.loads(capfd.readouterr().out)["channels"]
    assert main(["data","export","cfm/two-v0",str(clone/"out")])==0 and main(["data","import",str(clone/"out"),"cfm/again-v0"])==0
    capfd.readouterr()
    assert main(["verify","cfm/again-v0","--replay","2","--json"])==0
    said = json.loads(capfd.readouterr().out)
    assert said["findings"]==[] and said["replay"]==dict(checked=2,equal=2)

def test_verify_names_the_damaged_file_and_rebuild_mends_the_catalogue(clone, data, capfd):
    from cfm_lab.collect import Part, Recipe, collect
    store = collect(Recipe("cfm/two-v0",(Part("dm-cartpole-swingup",2,20),)), progress=False)
    content = store.content_hash()
    store.query("PRAGMA wal_checkpoint(TRUNCATE)"); store.close()
    (store.root/"catalog.sqlite").write_bytes(b"x"*5000)
    assert main(["verify","cfm/two-v0"])==2 and "--rebuild" in capfd.readouterr().err
    assert main(["verify","cfm/two-v0","--rebuild","--json"])==0
    assert main(["data"])==0 and content[:12] in capfd.readouterr().out
    path = next(store.root.rglob("*.safetensors"))
    blob = bytearray(path.read_bytes()); blob[-9] ^= 1; path.write_bytes(blob)
    assert main(["verify","cfm/two-v0"])==1 and path.name in capfd.readouterr().out
    assert main(["verify","nobody/nothing-v0"])==2 and "no data set" in capfd.readouterr().err
