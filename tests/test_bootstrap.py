"From a fresh clone to a command, with a tiny package in place of the pins; real venv and real pip, no network."
import ast, base64, configparser, hashlib, importlib, importlib.metadata, os, shutil, signal, subprocess, sys, time, zipfile
from pathlib import Path
import pytest
from conftest import ROOT

main = importlib.import_module("cfm_lab.__main__")
BASE = getattr(sys,"_base_executable",None) or sys.executable
CLI = "import sys\nif __name__=='__main__':\n    print('words', sys.argv[1:], 'prefix', sys.prefix, flush=True)\n    sys.exit(5 if 'fail' in sys.argv else 0)\n"

def zip_wheel(folder, name, version, files):
    "A wheel of these files (name → bytes)."
    info,record = f"{name}-{version}.dist-info",[]
    files = {**files, f"{info}/METADATA":f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(), f"{info}/WHEEL":b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    with zipfile.ZipFile(folder/f"{name}-{version}-py3-none-any.whl", "w") as z:
        for n,b in files.items():
            z.writestr(n, b)
            record.append(f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(b).digest()).rstrip(b'=').decode()},{len(b)}")
        z.writestr(f"{info}/RECORD", "\n".join(record+[f"{info}/RECORD,,"])+"\n")

@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    "A folder in place of an index: setuptools as it is installed here, and a toy."
    folder = tmp_path_factory.mktemp("wheels")
    dist = importlib.metadata.distribution("setuptools")
    files = {str(f):Path(dist.locate_file(f)).read_bytes() for f in dist.files if not str(f).startswith("..") and ".dist-info" not in str(f) and f.suffix!=".pyc"}
    files["setuptools-1.dist-info/entry_points.txt".replace("-1",f"-{dist.version}")] = (dist.read_text("entry_points.txt") or "").encode()
    zip_wheel(folder, "setuptools", dist.version, files)
    zip_wheel(folder, "cfmtoy", "1.0", {"cfmtoy.py":b"x = 1\n"})
    return folder

def clone(folder, wheels, pins="cfmtoy==1.0"):
    "A project of the same shape with tiny pins, and the environment to call it in."
    (folder/"cfm_lab").mkdir(parents=True)
    for f in ("cfm_lab/__init__.py","cfm_lab/__main__.py","setup.py","LICENSE"): shutil.copy(ROOT/f, folder/f)
    (folder/"cfm_lab"/"cli.py").write_text(CLI)
    cfg = configparser.ConfigParser()
    cfg.read(ROOT/"settings.ini")
    cfg["DEFAULT"].update(requirements=pins, dev_requirements=f"setuptools=={importlib.metadata.version('setuptools')}")
    with open(folder/"settings.ini","w") as f: cfg.write(f)
    home = folder.with_name(folder.name+"-home")
    home.mkdir()
    keep = {k:v for k,v in os.environ.items() if not k.startswith(("CFM_","PIP_","PYTHON","VIRTUAL_ENV"))}
    return folder, dict(keep, HOME=str(home), CFM_PIP_ARGS=f"--no-index --find-links {wheels}")

def start(folder, env, *words): return subprocess.Popen([BASE,"-m","cfm_lab",*words], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
def call(folder, env, *words):
    job = start(folder, env, *words)
    out,err = job.communicate(timeout=200)
    return job.returncode,out,err
def toy(folder): return subprocess.run([folder/".venv"/"bin"/"python","-c","import cfmtoy, cfm_lab; print(cfm_lab.__file__)"], cwd=folder/".venv", capture_output=True, text=True).stdout.strip()

def pin(folder, was, now): (folder/"settings.ini").write_text((folder/"settings.ini").read_text().replace(f"cfmtoy=={was}",f"cfmtoy=={now}"))

def test_the_life_of_an_environment(tmp_path, wheels):
    folder,env = clone(tmp_path/"clone", wheels)
    site = folder/".venv"/"lib"/f"python3.{sys.version_info[1]}"/"site-packages"

    # two setups at the same time make one environment
    jobs = [start(folder,env,"setup") for _ in range(2)]
    said = [j.communicate(timeout=200)[1] for j in jobs]
    assert [j.returncode for j in jobs]==[0,0], said
    assert sum("installing" in err for err in said)==1 and sum("waiting for it" in err for err in said)==1
    assert toy(folder)==str(folder/"cfm_lab"/"__init__.py") and main.read_stamp(folder/".venv")["root"]==str(folder)

    # a second call costs about a second, and asks pip nothing
    log,t = (folder/".venv"/"setup.log").read_bytes(),time.time()
    code,out,_ = call(folder, env, "setup")
    assert code==0 and time.time()-t<2 and out.startswith("ready") and (folder/".venv"/"setup.log").read_bytes()==log

    # words and exit code are handed on
    assert call(folder,env,"run","--fresh","a b")[1]==f"words ['run', '--fresh', 'a b'] prefix {folder/'.venv'}\n"
    assert call(folder,env,"test","fail")[0]==5

    # a pin that can't be had: the log's end, what to do, no stamp
    pin(folder, "1.0", "7.0")
    code,out,err = call(folder, env, "run")
    assert code==1 and "cfmtoy==7.0" in err and "CFM_PIP_ARGS" in err and "words" not in out
    assert main.read_stamp(folder/".venv") is None

    # one that can: what is whole is finished, not made anew
    zip_wheel(wheels, "cfmtoy", "1.1", {"cfmtoy.py":b"x = 2\n"})
    pin(folder, "7.0", "1.1")
    code,_,err = call(folder, env, "setup")
    assert code==0 and "anew" not in err and (site/"cfmtoy.py").read_text()=="x = 2\n"

    # what an interrupted pip left is made anew
    (folder/".venv"/"cfm_stamp.json").unlink()
    (site/"cfmtoy.py").write_text("")
    code,_,err = call(folder, env, "setup")
    assert code==0 and "an interrupted installation left cfmtoy" in err and toy(folder)

def until(what, seconds=60):
    end = time.time()+seconds
    while not what():
        assert time.time()<end, "waited in vain"
        time.sleep(.005)

def test_kill_9_is_mended_by_the_next_call(tmp_path, wheels):
    folder,env = clone(tmp_path/"clone", wheels)
    env_dir = folder/".venv"
    job = start(folder, env, "setup")       # killed with its pip, half-way through a package
    until(lambda: list(env_dir.glob("lib/python*/site-packages/setuptools/command")) and (env_dir/"setup.log").read_bytes().count(b"Installing"))
    os.killpg(job.pid, signal.SIGKILL); job.communicate()
    assert main.read_stamp(env_dir) is None
    (env_dir/"setup.log").write_bytes(b"")
    job = start(folder, env, "setup")       # killed alone: its pip goes on, and is waited for
    until(lambda: (env_dir/"setup.log").exists() and (env_dir/"setup.log").read_bytes().count(b"Processing"))
    os.kill(job.pid, signal.SIGKILL); job.communicate()
    assert main.read_stamp(env_dir) is None
    code,_,err = call(folder, env, "setup")
    assert code==0 and "waiting for it" in err and main.read_stamp(env_dir), err
    assert toy(folder)==str(folder/"cfm_lab"/"__init__.py")

def test_an_environment_of_somebody_else_is_not_deleted(tmp_path, wheels):
    folder,env = clone(tmp_path/"clone", wheels)
    (folder/".venv"/"lib").mkdir(parents=True)
    (folder/".venv"/"lib"/"mine").write_text("x")
    code,_,err = call(folder, env, "run")
    assert code==1 and "made by somebody else" in err and (folder/".venv"/"lib"/"mine").exists()

def test_the_stamp_goes_first_and_comes_last(tmp_path, monkeypatch):
    (tmp_path/"settings.ini").write_text("[DEFAULT]\nrequirements = a==1\n")
    env,calls = tmp_path/".venv",[]
    env.mkdir()
    main.write_stamp(env, {})
    monkeypatch.setattr(main, "must_remake", lambda env,want: "")
    monkeypatch.setattr(main, "watch", lambda command,*a,**k: calls.append((command[-1], main.read_stamp(env))))
    monkeypatch.setattr(main, "write_stamp", lambda env,want: calls.append(("stamp",None)))
    main.install(tmp_path, env, main.wanted(tmp_path))
    assert calls==[("a==1",None),(tmp_path,None),("stamp",None)]

@pytest.mark.parametrize("name", ["__init__","__main__"])
def test_it_parses_on_python_3_8(name): ast.parse((ROOT/"cfm_lab"/f"{name}.py").read_text(), feature_version=(3,8))

def test_an_old_python_is_told_what_is_needed(tmp_path):
    with pytest.raises(SystemExit, match="needs Python 3.11 or newer; this is 3.8"): main.main(["run"], ROOT, version=(3,8,18))

@pytest.mark.parametrize("name", ["python3.8","python3.9","python3.10"])
def test_a_real_old_python(name, tmp_path):
    if subprocess.run(f"{name} --version", shell=True, capture_output=True).returncode: pytest.skip(f"no {name} here; the message is tested with a simulated version above")
    done = subprocess.run([name,"-m","cfm_lab","run"], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ, PYTHONDONTWRITEBYTECODE="1"))
    assert done.returncode==1 and done.stderr.startswith("cfm_lab needs Python 3.11") and done.stderr.count("\n")==1

def test_a_python_without_ensurepip_names_the_package(tmp_path, wheels):
    folder,env = clone(tmp_path/"clone", wheels)
    code = "import importlib.util as u, runpy, sys; real=u.find_spec; u.find_spec=lambda n,*a: None if n=='ensurepip' else real(n,*a); sys.argv=['cfm_lab','run']; runpy.run_module('cfm_lab',run_name='__main__',alter_sys=True)"
    done = subprocess.run([BASE,"-c",code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode==1 and f"apt-get install python3.{sys.version_info[1]}-venv" in done.stderr and done.stderr.count("\n")==1
    assert not (folder/".venv").exists()

def test_the_running_python_can_be_used_as_it_is(tmp_path, wheels):
    folder,env = clone(tmp_path/"clone", wheels)
    code,out,_ = call(folder, dict(env,CFM_PYTHON="current"), "run", "x")
    assert code==0 and out==f"words ['run', 'x'] prefix {sys.base_prefix}\n" and not (folder/".venv").exists()
    code,out,_ = call(folder, dict(env,CFM_PYTHON="current"), "setup")
    assert code==0 and "not installed here: cfmtoy==1.0" in out
    code,_,err = call(folder, dict(env,CFM_PYTHON="3.12"), "run")
    assert code==1 and "CFM_PYTHON can only be 'current'" in err

def test_an_unknown_word_installs_nothing(tmp_path, wheels):
    folder,env = clone(tmp_path/"clone", wheels)
    code,_,err = call(folder, env, "rnu")
    assert code==1 and "Did you mean 'run'?" in err and not (folder/".venv").exists()
    assert call(folder, env)[0]==2 and call(folder, env, "--help")[0]==0
