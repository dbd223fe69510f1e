"What ships: small, whole, offline, and better than the references on a robot that it has never seen."
import json
from argparse import Namespace
import pytest
from conftest import ROOT
from cfm_lab.base import BadInput
from cfm_lab.dynamics import DynamicsTransformer

SHIPPED = sorted(p.parent for p in (ROOT/"data"/"pretrained").glob("*/config.json"))

def test_something_ships(): assert "dynamics-small" in [p.name for p in SHIPPED]

@pytest.mark.parametrize("folder", SHIPPED, ids=[p.name for p in SHIPPED])
def test_the_card_says_where_the_weights_come_from(folder):
    card = json.loads((folder/"card.json").read_text())
    assert {"command","data","steps","flops","hardware","seconds","exam"} <= set(card)
    assert len(card["data"]["content_hash"])==64 and card["flops"]>1e12 and card["exam"]
    record = json.loads((ROOT/"data"/"results"/"pretraining"/f"{card['record']['name']}-{card['seed']}.json").read_text())
    assert (card["command"],card["steps"],card["data"]) == (record["command"],record["steps"],record["data"])
    assert sum(f.stat().st_size for f in folder.iterdir())<8e6

@pytest.mark.parametrize("folder", SHIPPED, ids=[p.name for p in SHIPPED])
def test_its_figures_are_those_that_the_exam_found_for_its_seed(folder):
    card = json.loads((folder/"card.json").read_text())
    told = json.loads((ROOT/"data"/"results"/"dynamics.json").read_text())["shipped"][card["record"]["name"]]
    assert card["exam"]==told["headline"][str(card["seed"])]
    if not folder.name[-1].isdigit(): assert card["seed"]==told["seed"]          # the seed in the middle has the plain name

def test_a_seed_that_the_exam_has_not_chosen_does_not_ship():
    from cfm_lab.cli import ship
    with pytest.raises(BadInput, match="has not chosen a seed"): ship(Namespace(name="nobody", folder="nowhere"))

@pytest.fixture
def hopper(data):
    "Collected into this test's own folder, so that no other test collects it at the same time."
    from cfm_lab.test_sets import target
    target.cache_clear()
    yield target("gym-hopper")
    target.cache_clear()

def test_they_beat_the_references_on_a_robot_they_have_never_seen(hopper):
    from cfm_lab.references import references
    from cfm_lab.scoring import examine
    theirs = [examine(r,hopper,(1,10),episodes=8)["mae"] for r in references(hopper.spec).values()]
    for folder in SHIPPED:
        model = DynamicsTransformer.from_pretrained(folder.name)
        assert model.parameters_count()==model.card["parameters"]
        mine = examine(model,hopper,(1,10),episodes=8)["mae"]
        for h in ("1","10"): assert mine[h]<.9*min(x[h] for x in theirs), (folder.name,h)
