"Malformed and hostile robots: one clear error each, in time, with nothing written and nobody left running."
import json, os, struct, subprocess, sys, time, zlib
from pathlib import Path
import pytest
from cfm_lab.base import BadInput
from cfm_lab.foreign import LIMITS, add_task, extras, all_extras, foreign_tasks, read_foreign, remove_task

def mjcf(body='<body><joint name="a" damping="1"/><geom size=".1"/>{inner}</body>', inner="", top="", act='<motor joint="a" ctrlrange="-1 1"/>'):
    return f'<mujoco>{top}<worldbody>{body.format(inner=inner)}</worldbody><actuator>{act}</actuator></mujoco>'
GOOD = mjcf()
MESH = mjcf(body='<body><joint name="a"/><geom type="mesh" mesh="m"/></body>', top='<asset><mesh name="m" file="{}"/></asset>')
mesh = lambda name: MESH.replace("{}", name)
LAUGHS = '<!DOCTYPE m [<!ENTITY a "ha">'+"".join(f'<!ENTITY {b} "{10*f"&{a};"}">' for a,b in zip("abcdefgh","bcdefghi"))+']><mujoco model="&i;"/>'
NESTED = '<replicate count="100">'*5 + '<geom size=".1"/>' + '</replicate>'*5

def png(w, h):
    "A picture of w × h that is a few kB: zeros compress well."
    chunk = lambda kind,data: struct.pack(">I",len(data))+kind+data+struct.pack(">I",zlib.crc32(kind+data))
    z = zlib.compressobj(9)
    packed = b"".join(z.compress(bytes(3*w+1)) for _ in range(h))+z.flush()
    return b"\x89PNG\r\n\x1a\n"+chunk(b"IHDR",struct.pack(">IIBBBBB",w,h,8,2,0,0,0))+chunk(b"IDAT",packed)+chunk(b"IEND",b"")

# name → (robot.xml as text or bytes, other files, a word that the error must say)
BAD = {
    "include": (mjcf(top='<include file="other.xml"/>'), {"other.xml":"<mujoco/>"}, "<include>"),
    "include-of-itself": (mjcf(top='<include file="robot.xml"/>'), {}, "<include>"),
    "plugin": (mjcf(inner='<plugin plugin="mujoco.pid"/>'), {}, "<plugin>"),
    "extension": (mjcf(top='<extension><plugin plugin="mujoco.elasticity.cable"/></extension>'), {}, "not allowed"),
    "sub-model": (mjcf(top='<asset><model name="x" file="x.xml"/></asset>'), {"x.xml":GOOD}, "<model>"),
    "attach-itself": (mjcf(inner='<attach model="robot" body="b" prefix="x"/>'), {}, "<attach>"),
    "absolute-path": (mesh("/etc/passwd"), {}, "leads out"),
    "dots": (mesh("../../../../etc/passwd"), {}, "leads out"),
    "dots-in-the-middle": (mesh("meshes/../../secret.stl"), {}, "leads out"),
    "dots-stripped": (mesh("../m.stl").replace("<mujoco>",'<mujoco><compiler strippath="true"/>'), {"m.stl":b"x"}, "leads out"),
    "meshdir": (mesh("passwd").replace("<mujoco>",'<mujoco><compiler meshdir="/etc"/>'), {}, "leads out"),
    "assetdir-dots": (mesh("passwd").replace("<mujoco>",'<mujoco><compiler assetdir="../../etc"/>'), {}, "leads out"),
    "texture-path": (mjcf(top='<asset><texture type="2d" name="t" file="/etc/hostname"/></asset>'), {}, "leads out"),
    "cube-texture-path": (mjcf(top='<asset><texture type="cube" name="t" fileright="../x.png"/></asset>'), {}, "leads out"),
    "url": (mesh("https://example.org/m.stl"), {}, "leads out"),
    "windows-path": (mesh(r"C:\secret.stl"), {}, "leads out"),
    "home-path": (mesh("~/secret.stl"), {}, "leads out"),
    "link-out": (mesh("link.stl"), {"link.stl":Path("/etc/hostname")}, "leads out"),
    "linked-folder": (mesh("link/hostname"), {"link":Path("/etc")}, "leads out"),
    "billion-laughs": (LAUGHS, {}, "document type"),
    "external-entity": ('<!DOCTYPE m [<!ENTITY x SYSTEM "file:///etc/passwd">]><mujoco>&x;</mujoco>', {}, "document type"),
    "unknown-entity": ('<mujoco model="&x;"/>', {}, "not XML"),
    "replicate": (mjcf(body='<replicate count="1e9"><geom size=".1"/></replicate>'), {}, "the limit is"),
    "replicate-of-nothing": (mjcf(body='<replicate count="1000000000"/>'), {}, "the limit is"),
    "replicate-nested": (mjcf(body=NESTED), {}, "the limit is"),
    "replicate-nan": (mjcf(body='<replicate count="nan"><geom size=".1"/></replicate>'), {}, "no number"),
    "replicate-negative": (mjcf(body='<replicate count="-1000000000"><geom size=".1"/></replicate>'), {}, "the limit is"),
    "composite": (mjcf(inner='<composite type="cable" count="1000000 1 1" size="1"/>'), {}, "the limit is"),
    "flexcomp": (mjcf(inner='<flexcomp name="f" type="grid" count="900 900 900" spacing=".1 .1 .1"/>'), {}, "the limit is"),
    "timestep-nan": (mjcf(top='<option timestep="nan"/>'), {}, "no number"),
    "timestep-hidden-nan": (mjcf(top='<custom><text name="nan" data="x"/></custom><option timestep="nan"/>'), {}, "time step"),
    "timestep-0": (mjcf(top='<option timestep="0"/>'), {}, "time step"),
    "timestep-negative": (mjcf(top='<option timestep="-1"/>'), {}, "time step"),
    "timestep-huge": (mjcf(top='<option timestep="1e9"/>'), {}, "time step"),
    "timestep-tiny": (mjcf(top='<option timestep="1e-9"/>'), {}, "time step"),
    "mass-negative": (GOOD.replace('size=".1"','size=".1" mass="-1"'), {}, "MuJoCo can't compile"),
    "size-negative": (GOOD.replace('size=".1"','size="-.1"'), {}, "MuJoCo can't compile"),
    "size-nan": (GOOD.replace('size=".1"','size="nan"'), {}, "no number"),
    "mass-nan": (GOOD.replace('size=".1"','size=".1" mass="nan"'), {}, "no number"),
    "inertia-nan": (mjcf(inner='<inertial pos="0 0 0" mass="1" diaginertia="nan 1 1"/>'), {}, "no number"),
    "inertia-impossible": (mjcf(inner='<inertial pos="0 0 0" mass="1" diaginertia="1 1 100"/>'), {}, "inertia"),
    "gravity-infinite": (mjcf(top='<option gravity="0 0 -inf"/>'), {}, ""),
    "range-infinite": (GOOD.replace('damping="1"','range="-inf inf" limited="true"'), {}, ""),
    "gear-infinite": (GOOD.replace('joint="a" ','joint="a" gear="inf" '), {}, ""),
    "missing-mesh": (mesh("nowhere.stl"), {}, "no such file"),
    "broken-xml": (GOOD[:-20], {}, "not XML"),
    "empty": ("", {}, "not XML"),
    "garbage": (bytes(range(256))*40, {}, "not XML"),
    "nulls": (b"<mujoco>\0</mujoco>", {}, "not XML"),
    "unknown-encoding": (b'<?xml version="1.0" encoding="x-evil"?><mujoco/>', {}, "not XML"),
    "other-root": ("<html><body/></html>", {}, "begins with <html>"),
    "urdf": ('<robot name="r"><link name="l"/></robot>', {}, "URDF"),
    "a-million-bodies": ("<mujoco><worldbody>"+"<body/>"*400_000+"</worldbody></mujoco>", {}, "the limit is"),
    "too-large": (b"<mujoco>"+b" "*LIMITS.xml+b"</mujoco>", {}, "larger than"),
    "deep": ("<mujoco><worldbody>"+"<body>"*10_000+"</body>"*10_000+"</worldbody></mujoco>", {}, "inside each other"),
    "height-field": (mjcf(top='<asset><hfield name="h" nrow="100000" ncol="100000" size="1 1 1 1"/></asset>'), {}, "the limit is"),
    "texture": (mjcf(top='<asset><texture name="t" type="2d" builtin="flat" width="100000" height="100000"/></asset>'), {}, "the limit is"),
    "picture-bomb": (mjcf(top='<asset><texture name="t" type="2d" file="t.png"/></asset>'), {"t.png":lambda: png(30_000,30_000)}, "30000 × 30000"),
    "memory": (mjcf(top='<size memory="1T"/>'), {}, "the limit is"),
    "memory-words": (mjcf(top='<size memory="lots"/>'), {}, "the limit is"),
    "keyframes": (mjcf(top='<size nkey="1000000000"/>'), {}, "the limit is"),
    "user-data": (mjcf(top='<size nuserdata="1000000000"/>'), {}, "the limit is"),
    "stl-claims": (mesh("m.stl"), {"m.stl":bytes(80)+struct.pack("<I",1_000_000_000)+bytes(50)}, "MuJoCo can't compile"),
    "mesh-of-text": (mesh("m.obj"), {"m.obj":"v 0 0 0\nf 1 2 999999999\n"}, ""),
    "mesh-is-a-folder": (mesh("m.stl"), {"m.stl/x":""}, "is no file"),
    "mesh-is-a-pipe": (mesh("m.stl"), {"m.stl":os.mkfifo}, "is no file"),
    "duplicate-names": (mjcf(inner='<joint name="a" axis="1 0 0"/>'), {}, "repeated name"),
    "duplicate-attributes": ('<mujoco><option timestep=".002" timestep="nan"/></mujoco>', {}, "not XML"),
    "no-joint": ('<mujoco><worldbody><geom size=".1"/></worldbody></mujoco>', {}, "no joint"),
    "no-actuator": (mjcf(act=""), {}, "no actuator"),
    "actuator-of-nothing": (mjcf(act='<motor joint="b"/>'), {}, "MuJoCo can't compile"),
    "keyframe-of-wrong-size": (GOOD.replace("</mujoco>",'<keyframe><key qpos="1 2 3"/></keyframe></mujoco>'), {}, "keyframe"),
    "unknown-element": (mjcf(top="<script>alert(1)</script>"), {}, "MuJoCo can't compile"),
    "class-of-itself": (mjcf(inner='<body childclass="x"/>'), {}, "MuJoCo can't compile"),
    "diverges": (mjcf(top='<option timestep=".1"/>', act='<position joint="a" kp="1e12"/>'), {}, "diverges"),
    "explodes": (mjcf(act='<motor joint="a" gear="1e300"/>'), {}, ""),
}

def lay(folder, content, files):
    "Write a robot and what belongs to it."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"robot.xml").write_bytes(content if isinstance(content,bytes) else content.encode())
    for name,what in files.items():
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        if what is os.mkfifo: os.mkfifo(folder/name)
        elif isinstance(what,Path): (folder/name).symlink_to(what)
        else:
            if callable(what): what = what()
            (folder/name).write_bytes(what if isinstance(what,bytes) else what.encode())
    return folder/"robot.xml"

def children():
    "Processes that we have started and that still are."
    if not Path("/proc").is_dir(): return set()
    def parent(p):
        try: return int((p/"stat").read_text().rpartition(")")[2].split()[1])
        except OSError: return 0
    return {p.name for p in Path("/proc").iterdir() if p.name.isdigit() and parent(p)==os.getpid()}

def refuse(folder, name):
    "How long it took to refuse it, and what was said."
    content,files,word = BAD[name]
    path,before = lay(folder/name, content, files),children()
    begin = time.perf_counter()
    with pytest.raises(BadInput) as said: add_task(path, id="bad")
    seconds = time.perf_counter()-begin
    e = said.value
    assert seconds<LIMITS.seconds+2
    assert word in str(e) and e.what and e.where and (e.why or e.mend) and "\n" not in str(e) and len(str(e))<1000, str(e)
    assert children()<=before, "a process was left"
    return seconds,str(e)

@pytest.mark.parametrize("name", BAD)
def test_refused(name, tmp_path, data):
    refuse(tmp_path, name)
    assert not list(data.rglob("*")), "something was written"

def test_no_file(tmp_path, data):
    for path in (tmp_path/"nowhere.xml", tmp_path, "/dev/zero", tmp_path/("x"*5000)):
        with pytest.raises(BadInput): add_task(path, id="bad")
    assert not data.exists()

@pytest.mark.parametrize("name", ["Gelenk_ü_関節","../../etc/passwd","<script>alert(1)</script>","a\nb","nan","x"*5000], ids=["unicode","path","html","newline","nan","long"])
def test_names_are_only_names(name, tmp_path, data):
    from xml.sax.saxutils import quoteattr
    path = lay(tmp_path/"odd", GOOD.replace('"a"',quoteattr(name)), {})
    kept = add_task(path)
    assert kept.id=="own-odd" and kept.model().joint(0).name==name
    assert {p.name for p in (data/"tasks"/"own-odd").iterdir()}=={"task.json",f"{kept.xml[:24]}.xml"}

CUBE = "".join(f"v {x} {y} {z}\n" for x in (0,.1) for y in (0,.1) for z in (0,.1))+"f 1 2 4\nf 1 4 3\nf 5 7 8\nf 5 8 6\nf 1 5 6\nf 1 6 2\nf 3 4 8\nf 3 8 7\nf 1 3 7\nf 1 7 5\nf 2 6 8\nf 2 8 4\n"

def test_a_mesh_robot_is_kept_and_comes_back(tmp_path, data):
    import mujoco
    path = lay(tmp_path/"Cube Bot", MESH.replace("{}","Parts/Cube 1.OBJ").replace(' name="m"','').replace('mesh="m"','mesh="Cube 1"'), {"Parts/Cube 1.OBJ":CUBE})
    kept = add_task(path, domain="classic", control_dt=.01)
    assert kept.id=="own-cube-bot" and kept.n_substeps==5 and foreign_tasks()=={kept.id:kept} and read_foreign(kept.id)==kept
    assert (kept.model().body_mass==mujoco.MjModel.from_xml_path(str(path)).body_mass).all()
    with pytest.raises(BadInput, match="exists already"): add_task(path)
    (data/"tasks"/kept.id/"files"/kept.files[0]).write_text("v 0 0 0\n")
    with pytest.raises(BadInput, match="was changed since"): kept.model()
    again = add_task(path, force=True, control_dt=.02)
    assert again.n_substeps==10 and again.model().nmesh==1
    remove_task(kept.id)
    assert not foreign_tasks() and not (data/"tasks"/kept.id).exists()

def test_a_refused_robot_does_not_replace_a_good_one(tmp_path, data):
    path = lay(tmp_path/"good", GOOD, {})
    kept = add_task(path)
    path.write_text(GOOD.replace('size=".1"','size="-.1"'))
    with pytest.raises(BadInput): add_task(path, force=True)
    assert read_foreign("own-good")==kept and kept.model().nu==1

def test_a_floating_robot_gets_a_floor(tmp_path, data):
    path = lay(tmp_path/"float", mjcf(body='<body pos="0 0 1"><freejoint/><geom size=".2"/><body pos="0 0 -.3"><joint name="a"/><geom size=".1"/></body></body>'), {})
    floor = add_task(path, domain="locomotion").model().geom("floor")
    assert abs(floor.pos[2]-.6)<1e-6
    assert add_task(path, domain="aviation", force=True).model().ngeom==2

@pytest.mark.parametrize("kw", [dict(domain="cooking"), dict(control_dt=0.), dict(control_dt=float("nan")), dict(id="../x"), dict(robot="A B")])
def test_bad_words(kw, tmp_path, data):
    with pytest.raises(BadInput): add_task(lay(tmp_path/"good", GOOD, {}), **kw)
    assert not data.exists()

def test_extras_need_nothing():
    assert len(all_extras())>=50 and set(extras())<=set(all_extras())

@pytest.mark.parametrize("id", extras() or ["none"])
def test_an_extra_robot_moves(id):
    "Only where one of the wheels is installed."
    if id=="none": pytest.skip("none of the optional wheels is installed")
    from cfm_lab.foreign import check_model, try_out
    model = extras()[id].model()
    check_model(model, id)
    try_out(model, max(1,round(.02/model.opt.timestep)), id)

def figures():
    "How the hostile files fare."
    import tempfile
    with tempfile.TemporaryDirectory() as t:
        os.environ["CFM_DATA"] = f"{t}/data"
        took = {n:refuse(Path(t), n)[0] for n in BAD}
        written = [str(p) for p in Path(t,"data").rglob("*")]
    slow = {n:round(s,1) for n,s in took.items() if s>2}
    return dict(files=len(took), refused=len(took), hangs=sum(s>LIMITS.seconds for s in took.values()), written=len(written), slower_than_2_s=slow, seconds_max=round(max(took.values()),2), seconds_total=round(sum(took.values()),1))

if __name__=="__main__": print(json.dumps(figures(), indent=1))
