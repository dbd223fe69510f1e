"The store and bad input: NaN, torn files, ids that lead elsewhere. Kills, full disks and random damage are in test_faults."
import json, os, threading
from dataclasses import replace
import numpy as np
import pytest
import safetensors.numpy
from cfm_lab.artifacts import new_run, read_sealed, sha256, write_sealed
from cfm_lab.base import BadInput, spec_to_dict
from cfm_lab.shards import combined_hash, episode_hash, pack, part_of, unpack
from cfm_lab.store import create_store, open_store
from cfm_lab.upkeep import compact, export_store, import_store, rebuild, verify
from faults import cart, everything, push

@pytest.fixture
def store(tmp_path):
    s = create_store(tmp_path/"carts",[cart()])
    s.append("cart-push",[push(i) for i in range(3)])
    return s

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
    store.close()
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

def test_a_folder_that_cannot_be_written_to_can_be_read(store, monkeypatch):
    want = everything(store)
    store.query("PRAGMA wal_checkpoint(TRUNCATE)"); store.close()
    for name in ("catalog.sqlite-wal","catalog.sqlite-shm"): (store.root/name).unlink(missing_ok=True)
    monkeypatch.setattr(os,"access",lambda *_: False)
    again = open_store(store.root)
    assert everything(again)==want
    assert not list(store.root.glob("catalog.sqlite-*"))
    with pytest.raises(BadInput,match="readonly"): again.append("cart-push",[push(9)])
    again.close()
    (store.root/"catalog.sqlite-wal").write_bytes(b"rows")
    with pytest.raises(BadInput,match="catalog.sqlite-wal"): open_store(store.root)

def test_a_data_set_of_the_first_version_is_brought_up_to_date(tmp_path):
    eps,root = [push(i) for i in range(3)],tmp_path/"old"
    flat = {n:np.concatenate([getattr(e,n) for e in eps]) for n in ("state_TC","action_TA","command_TU","valid_T")} | dict(initial=np.stack([e.initial for e in eps]))
    table = [dict(uid=f"{i:032x}",seed=e.seed,behaviour=e.behaviour,dt=e.dt,rows=len(e),hash=episode_hash(e),edits=[]) for i,e in enumerate(eps)]
    for d in ("specs","spool/cart-push"): (root/d).mkdir(parents=True)
    (root/"spool"/"cart-push"/f"{'a'*32}.safetensors").write_bytes(safetensors.numpy.save(flat,dict(task="cart-push",split="train",format="cfm_lab group 1",spec="cart",episodes=json.dumps(table))))
    (root/"specs"/"cart.json").write_text(json.dumps(spec_to_dict(cart())))
    (root/"cfm_dataset.json").write_text(json.dumps(dict(format=1,uuid="u",created=1.,versions={},card=dict(note="old")),indent=1))
    with pytest.raises(BadInput,match="--rebuild"): open_store(root)
    again,said = rebuild(root)
    assert said==dict(taken_in=3,damaged=[]) and verify(again)
    assert again.content_hash()==combined_hash(map(episode_hash,eps)) and again.card()["note"]=="old" and again.head()["uuid"]=="u"
    assert everything(compact(open_store(root)))==sorted(map(episode_hash,eps)) and verify(again)

def test_an_open_store_writes_into_a_catalogue_that_was_made_again(store):
    seen = threading.Thread(target=lambda: (store.episodes(),ready.set(),go.wait(),done.append(store.append("cart-push",[push(21)]))))
    ready,go,done = threading.Event(),threading.Event(),[]
    seen.start(); ready.wait()                  # another thread has its own connection, opened before
    rebuild(store.root)
    store.append("cart-push",[push(20)])
    go.set(); seen.join()
    again = open_store(store.root)
    assert sorted(e.seed for e in again.episodes())==[0,1,2,20,21] and len(store.episodes())==5 and len(done)==1
    compact(store); rebuild(store.root); store.delete(store.append("cart-push",[push(22)]),"only tried")
    assert len(open_store(store.root).episodes())==5 and verify(compact(again))

def test_an_import_whose_episodes_do_not_fit_their_spec(store,tmp_path):
    out = export_store(store,tmp_path/"travels"); name = next(out.rglob("*.safetensors"))
    part = unpack(name.read_bytes())[0]
    bad = {n:x.copy() for n,x in part.flat.items()}; bad["state_TC"][3] = np.nan
    forged = replace(part,flat=bad); forged = replace(forged,table=[dict(t,hash=episode_hash(forged.episode(i))) for i,t in enumerate(part.table)])
    blob = pack([forged]); name.write_bytes(blob); said = read_sealed(out/"manifest.json")
    name.with_suffix(".crc.json").unlink()
    files = {k:v for k,v in said["files"].items() if not k.endswith(".crc.json")}|{str(name.relative_to(out)):[len(blob),sha256(blob)]}
    write_sealed(out/"manifest.json",said|dict(files=files,content_hash=combined_hash(t["hash"] for t in forged.table)),1)
    with pytest.raises(BadInput,match="state_TC is not finite at row 3"): import_store(out,tmp_path/"there")
    assert not (tmp_path/"there").exists()

def test_pieces_of_unequal_episodes_keep_the_limit():
    part = part_of([push(i,n) for i,n in enumerate((5,200,5,5,100,100,5))],"cart-push","train","cart")
    most = part.nbytes()//3
    pieces = part.cut(most)
    assert [t["seed"] for p in pieces for t in p.table]==list(range(7)) and all(p.nbytes()<=most or len(p)==1 for p in pieces)
    even = part_of([push(i) for i in range(17)],"cart-push","train","cart")
    for k in (2,3,5,16): assert [len(p) for p in even.cut(k*even.nbytes()//17)][0]==int(17*(k*even.nbytes()//17)/even.nbytes())
