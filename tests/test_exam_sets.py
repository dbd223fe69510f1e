"""The versioned test sets: every held-out robot, and what the committed file says."""
import json
import pytest
from cfm_lab.artifacts import read_json
from cfm_lab.test_sets import ROBOTS, VERSION, examined, fingerprint, of_tier, sets_path, target

LINES = {r["task"]:r for r in read_json(sets_path())["robots"]}

def test_the_committed_file_is_the_list():
    assert read_json(sets_path())["version"]==VERSION and list(LINES)==[e.task for e in ROBOTS]
    for e in ROBOTS:
        line = LINES[e.task]
        assert (line["tier"],line["family"],line["note"],line["seed"])==(e.tier,e.family,e.note,0)
        assert line["episodes"]==dict(test=50,reference=50,adapt=e.pool)

def test_every_held_out_robot_once():
    from cfm_lab.tasks import RELATIVES, get_task, robot_lists
    robots = [get_task(t).robot for t in of_tier("T1")]
    assert sorted(robots)==robot_lists()["held-out"]
    for held,_ in RELATIVES: assert next(e.note for e in ROBOTS if get_task(e.task).robot==held)

def test_tiers_and_splits_agree():
    from cfm_lab.tasks import get_task
    for e in ROBOTS: assert get_task(e.task).split==("held-out" if e.tier=="T1" else "validation"), e.task
    assert sum("-family-" in t for t in of_tier("tuning"))==4
    assert sorted(e.family for e in ROBOTS if e.family)==["arm or hand","flying","four-legged","planar walkers"]

@pytest.mark.parametrize("task", [e.task for e in ROBOTS])
def test_the_bodies_are_those_of_the_version(task):
    from cfm_lab.tasks import spec_of
    assert fingerprint(spec_of(task))==LINES[task]["fingerprint"]

def test_a_test_set_is_made_again_bit_by_bit(tmp_path, monkeypatch):
    from cfm_lab.test_sets import exam_store
    hashes = []
    for n in "ab":
        monkeypatch.setenv("CFM_DATA",str(tmp_path/n))
        hashes.append([exam_store(task).content_hash() for task in ("dm-finger-spin","quadrotor-hover")])
    assert hashes[0]==hashes[1]

def test_a_test_set_of_another_processor_is_the_same_exam(data):
    "Its last bits may differ (quadrotor-hover's do between two makers); the error of every single episode does not."
    from cfm_lab.cells import results_root
    from cfm_lab.references import references
    from cfm_lab.scoring import examine
    target.cache_clear()
    kept = [json.loads(line) for line in (results_root()/"cells"/"dynamics.jsonl").read_text().splitlines()]
    for task in ("dm-finger-spin","quadrotor-hover"):
        then = next(c["value"]["persistence"] for c in kept if c["config"]["kind"]=="references" and (c["config"]["task"],c["config"]["n"])==(task,0))
        now = examine(references(target(task).spec)["persistence"],target(task))
        for h,errors in then["each"].items(): assert now["each"][h]==pytest.approx(errors,rel=2e-3)

def test_curves_grow_and_seeds_differ():
    from cfm_lab.loader import pick
    pool = list(range(150))
    for s in range(3):
        sets = [set(pick(pool,n,s)) for n in (1,2,4,10,15,50,150)]
        assert all(a<b for a,b in zip(sets,sets[1:]))
    assert len({tuple(pick(pool,15,s)) for s in range(3)})==3 and examined("gym-ant").pool==150
