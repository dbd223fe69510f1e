"""Registering a task is writing its tests: every registered task, and some bodies of every family, goes through all of these."""
import copy
import importlib
import json
import sys
from pathlib import Path
from unittest import mock

import mujoco
import numpy as np
import pytest
from mujoco import mjtState

from cfm_lab.base import BadInput, check_episode, spec_from_dict, spec_to_dict
from cfm_lab.behaviors import BEHAVIOURS, expert, judge
from cfm_lab.edits import model_diff
from cfm_lab.embodiments import get_command, random_pose, rebuild, set_command, welded_bodies
from cfm_lab.families import FAMILIES
from cfm_lab.rewards import REWARDS, reward_of
from cfm_lab.rollout import Stepper, anchor_of, honest, replay, rollout
from cfm_lab.tasks import RELATIVES, TASKS, get_task, load, robot_lists, same_limbs, same_robot, skeleton, spec_of, task_print
from cfm_lab.tokens import drive
from cfm_lab.variation import Variation

BODIES = [f"{name}-family-{seed}" for name in FAMILIES for seed in (0, 1, 2)]
PACKAGED = [t.id for t in TASKS.values() if t.package != "cfm_lab"]
ALL = [*PACKAGED, *(id for id in TASKS if id not in PACKAGED), *BODIES]
GOLDEN = Path(__file__).parent / "golden" / "not_rebuilt.json"
STEPS, AGAIN = 200, 50       # control steps of an episode, and of its repetition


class Driver:
    "Random, bang-bang or no action; actions within the native limits."
    def __init__(self, kind): self.kind = kind
    def act(self, observation_C, spec, rng):
        low, high = spec.action.low_A, spec.action.high_A
        if self.kind == "zero": return np.zeros((1, spec.A))
        if self.kind == "random": return rng.uniform(low, high, (8, spec.A))       # "zero" is asked at every step
        return np.where(rng.random(spec.A) < .5, low, high)[None].repeat(8, 0)


def moved_joints(spec, low_UA, high_UA):
    "Joints of which a token changes between two commands."
    changed = (abs(drive(spec, high_UA) - drive(spec, low_UA)) > 0).any(-1)
    return set(spec.joint_J[changed])


def acted_joints(model, commands, states):
    "What MuJoCo says that these commands act on, over several states."
    data, dofs = mujoco.MjData(model), np.zeros(model.nv, bool)
    for q in states:
        data.qpos[:] = q
        mujoco.mj_forward(model, data)
        for u in commands:
            if u < model.nu:
                row = np.zeros(model.nv)
                at = slice(data.moment_rowadr[u], data.moment_rowadr[u] + data.moment_rownnz[u])
                row[data.moment_colind[at]] = data.actuator_moment[at]
                dofs |= abs(row) > 1e-12
            else:
                for body in welded_bodies(model)[(u - model.nu) // 7]:
                    p, r = np.zeros((3, model.nv)), np.zeros((3, model.nv))
                    mujoco.mj_jacBody(model, data, p, r, body)
                    dofs |= (abs(np.concatenate([p, r])) > 1e-12).any(0)
    return set(model.dof_jntid[dofs])


def rebuilt_error(scene, states=24):
    "One control step of the scene and of the body rebuilt from its card, from states of two episodes: the largest difference, in units of what the channel moves."
    worst, spec = 0., scene.spec
    for kind in ("smooth-slow", "bang-bang"):
        e = rollout(scene, BEHAVIOURS[kind](), 101, 3)
        again, rows = rebuild(spec.edited(e.edits)), np.linspace(0, 99, states).astype(int)
        start = np.zeros((states, len(e.initial)))
        start[:, 1:1 + spec.C] = e.state_TC[rows]
        with honest(scene.apply(e.edits)) as model, honest(again):
            mine, its = (Stepper(m, scene.n_substeps).advance(start, e.command_TU[rows][:, None])[0][:, 0, 1:1 + spec.C] for m in (model, again))
        scene.apply()
        worst = max(worst, float((abs(mine - its) / (abs(mine - start[:, 1:1 + spec.C]).max(0) + 1e-3)).max()))
    return worst


def composed(task):
    "An environment of dm_control.composer without cameras, its model made from seed 0, its start from seed 7."
    from dm_control import composer, manipulation, mjcf
    from dm_control.locomotion import arenas, soccer, walkers
    from dm_control.locomotion.tasks import go_to_target
    if task.package.endswith("manipulation"):
        from dm_control.manipulation.shared import registry
        build = registry.get_constructor(task.source + "_features")
    elif task.source.startswith("soccer."): build = lambda: soccer.load(1, walker_type=soccer.WalkerType[task.source[7:]])
    elif task.source.startswith("go_to_target."):
        build = lambda: go_to_target.GoToTarget(getattr(walkers, task.source[13:])(), arenas.Floor(), physics_timestep=.005, control_timestep=.025)
    else:
        module, name = task.source.split(".")
        build = getattr(importlib.import_module("dm_control.locomotion.examples." + module), name)
    real = composer.Environment
    np.random.seed(0)                                   # mazes are drawn from it
    with mock.patch.object(composer, "Environment", lambda task, **_: task): job = build()
    for table in job.observables if isinstance(job.observables, list) else [job.observables]:
        for o in table.values(): o.enabled = False
    env = real(job, random_state=0, recompile_mjcf_every_episode=False)
    with mock.patch.object(mjcf.Physics, "contexts", None): env.reset()
    env.random_state.seed(7)
    np.random.seed(7)
    env.reset()
    def step(action):
        env._reset_next_step = False                    # a fall ends the package's episode: here it goes on
        return env.step(np.split(action, len(job.players)) if hasattr(job, "players") else action).reward
    return env.physics.model.ptr, env.physics.data.ptr, step


def own_environment(task):
    "The package's environment, built and reset as its manual says: (model, data, step)."
    if task.package == "dm_control":
        from dm_control import suite
        env = suite.load(*task.source.split("/"), task_kwargs=dict(random=7))
        env.reset()
        return env.physics.model.ptr, env.physics.data.ptr, lambda a: env.step(a).reward
    if task.package.startswith("dm_control."): return composed(task)
    if task.package == "metaworld":
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        env = ALL_V3_ENVIRONMENTS[task.source]()
        env._set_task_called, env._freeze_rand_vec, env.seeded_rand_vec = True, False, True
        env.seed(7)
    else:
        import gymnasium, gymnasium_robotics
        gymnasium.register_envs(gymnasium_robotics)
        env = gymnasium.make(task.source, **(dict(robot_noise_ratio=0.) if task.source == "FrankaKitchen-v1" else {})).unwrapped
    env.reset(seed=7)
    return env.model, env.data, lambda a: env.step(np.append(a, np.zeros(env.action_space.shape[0] - len(a))))[1]


@pytest.fixture(scope="class", params=ALL)
def scene(request):
    "Every task in turn; all tests of one task run one after the other, so that it is loaded once."
    spec_of(request.param)                  # remembered, for the comparison of all robots
    return load(request.param)


class TestTask:
    "What every task has to pass."

    def test_spec(self, scene):
        "The spec matches the compiled model and survives JSON."
        spec, model = scene.spec, scene.model
        assert spec.id == scene.task.id and spec.robot == scene.task.robot
        assert len(spec.channels) == spec.C == model.nq + model.nv
        assert (spec.Q, spec.J, spec.U) == (model.nq, model.nv, model.nu + 7 * model.nmocap)
        assert spec.dt == pytest.approx(scene.n_substeps * model.opt.timestep)
        assert len({b.name for b in spec.bodies}) == model.nbody and len({c.name for c in spec.channels}) == spec.C
        assert spec.A and all(j.entity in ("robot", "object") for j in spec.joints) and spec.frame in [b.name for b in spec.bodies]
        assert np.isfinite(spec.moment_UJ).all() and (spec.inertia_J > 0).all() and spec.acts_UJ.any()
        assert not (spec.moment_UJ[~spec.acts_UJ].any())
        assert (spec.action.low_A < spec.action.high_A).all() and np.isfinite(spec.action.low_A).all()
        again = spec_from_dict(json.loads(json.dumps(spec_to_dict(spec))))
        assert spec_to_dict(again) == spec_to_dict(spec)

    def test_reset_is_a_seeded_distribution(self, scene):
        draw = lambda seed: scene.reset(np.random.default_rng(seed))
        first, other, again = draw(1), draw(2), draw(1)
        assert np.array_equal(first[0], again[0]) and first[1] == again[1] and np.array_equal(first[2], again[2])
        assert not np.array_equal(first[0], other[0]) or first[1] != other[1], "two seeds, one start"
        assert np.isfinite(first[0]).all() and first[2].shape == (scene.spec.U,)
        model, data = scene.apply(first[1]), mujoco.MjData(scene.model)
        assert np.array_equal(data.eq_active, model.eq_active0)       # the full state doesn't hold these
        assert {(e.field, e.name) for e in first[1]} >= {(e.field, e.name) for e in model_diff(scene.base, model)}
        scene.apply(())
        assert model_diff(scene.base, scene.model) == ()

    @pytest.mark.parametrize("kind", ["random", "bang-bang", "zero"])
    def test_rollout(self, scene, kind):
        "Finite for 200 steps; the same seed gives the same episode bit by bit, another seed another."
        run = lambda seed, steps: rollout(scene, Driver(kind), steps + 1, seed)
        a, b, c = run(3, STEPS), run(3, AGAIN), run(4, AGAIN)
        check_episode(a, scene.spec)
        assert a.valid_T.all() and np.isfinite(a.state_TC).all() and len(a) == STEPS + 1
        assert np.array_equal(a.initial, b.initial) and a.edits == b.edits
        for name in ("state_TC", "action_TA", "command_TU"):
            assert np.array_equal(getattr(a, name)[:AGAIN], getattr(b, name)[:AGAIN]), name
        assert not np.array_equal(a.state_TC[:AGAIN], c.state_TC[:AGAIN]) or a.edits != c.edits

    def test_every_action_moves_exactly_the_tokens_of_its_joints(self, scene):
        spec, model, rng = scene.spec, scene.base, np.random.default_rng(0)
        states = [scene.reset(rng)[0][1:1 + model.nq] for _ in range(3)] + [random_pose(model, rng) for _ in range(5)]
        last = scene.reset(rng)[2]
        middle, width = (spec.action.low_A + spec.action.high_A) / 2, spec.action.high_A - spec.action.low_A
        for a in range(spec.A):
            step = .2 * width[a] * np.eye(spec.A)[a]
            low, high = spec.action(middle - step, last), spec.action(middle + step, last)
            commands = np.flatnonzero(low != high)
            assert len(commands), f"action {spec.action.names[a]} changes no command"
            want = acted_joints(model, commands, states)
            assert want, f"action {spec.action.names[a]} acts on nothing"
            got = moved_joints(spec, low, high)
            name = lambda s: sorted(spec.joints[j].name for j in s)
            assert got == want, f"action {spec.action.names[a]} moves the tokens of {name(got)}, acts on {name(want)}"
            assert set(spec.joint_J[spec.acts_UJ[commands].any(0)]) == want

    def test_drive_is_the_force_of_the_simulator(self, scene):
        "At home, the change of drive between two commands is the change of MuJoCo's own actuator forces (before any of its limits)."
        spec, model, rng = scene.spec, scene.apply(()), np.random.default_rng(0)
        free = copy.copy(model)
        free.actuator_forcelimited[:] = free.jnt_actfrclimited[:] = free.tendon_actfrclimited[:] = 0
        data = mujoco.MjData(free)
        def force(command):
            data.qpos[:], data.qvel[:] = spec.home_C[:spec.Q], 0
            set_command(free, data, command)
            for u in range(free.nu):
                if free.actuator_actnum[u]: data.act[free.actuator_actadr[u]] = data.ctrl[u]     # a lag that has settled
            mujoco.mj_forward(free, data)
            out = data.qfrc_actuator.copy()
            for j in np.flatnonzero(free.jnt_type == mujoco.mjtJoint.mjJNT_FREE):               # the card tells a free body's force in its own axes
                v = free.jnt_dofadr[j]
                out[v:v + 3] = data.xmat[free.jnt_bodyid[j]].reshape(3, 3).T @ out[v:v + 3]
            return out
        last = scene.reset(rng)[2]
        for _ in range(3):
            a, b = (spec.action(rng.uniform(spec.action.low_A, spec.action.high_A), last) for _ in range(2))
            want, got = force(b) - force(a), drive(spec, b)[:, 0] - drive(spec, a)[:, 0]
            np.testing.assert_allclose(got, want, atol=1e-9 * (1 + abs(want).max()))
            if (a[:model.nu] != b[:model.nu]).any(): assert abs(want).max() > 0           # a mocap body's pull is no actuator's force

    def test_a_body_rebuilt_from_its_card_moves_the_same(self, scene):
        "Where it doesn't, the card says what it lacks."
        try: error = rebuilt_error(scene)
        except ValueError: error = np.inf                 # MuJoCo can't compile what is left
        assert error < 1e-6 or scene.spec.lacks, error
        if "family" in scene.spec.id: assert error < 1e-6 and not scene.spec.lacks

    def test_varied_physics_is_recorded_and_taken_back(self, scene):
        "Mass, friction, damping, gear and gravity of one episode: it replays bit by bit, and the scene is as before."
        half = (.7, 1.4)
        e = rollout(scene, BEHAVIOURS["smooth-fast"](), 21, 5, vary=Variation(mass=half, friction=half, damping=half, gear=half, gravity=half))
        assert {x.field for x in e.edits} >= {"body_mass"} and model_diff(scene.base, scene.model) == ()
        if e.valid_T.all(): assert np.array_equal(replay(scene, e), e.state_TC)
        same = scene.spec.edited(e.edits)
        assert not np.allclose([b.mass for b in same.bodies[1:]], [b.mass for b in scene.spec.bodies[1:]])

    @pytest.mark.parametrize("scene", PACKAGED, indirect=True, scope="class")
    def test_steps_as_the_package_does(self, scene):
        "From the same state, with the same actions: 50 control steps of the package's own environment and of ours."
        model_, data_, step = own_environment(scene.task)
        model, everything = scene.apply(model_diff(scene.base, model_)), mjtState.mjSTATE_INTEGRATION
        assert model_diff(model, model_) == ()
        data, full = mujoco.MjData(model), np.empty(mujoco.mj_stateSize(model, everything))
        mujoco.mj_getState(model_, data_, full, everything)
        mujoco.mj_setState(model, data, full, everything)
        rng, u, anchor = np.random.default_rng(0), get_command(model, data), anchor_of(scene)
        state = lambda d: np.r_[d.qpos, d.qvel]
        rows, actions, rewards = [state(data)], [], []
        for t, action in enumerate(rng.uniform(scene.spec.action.low_A, scene.spec.action.high_A, (50, scene.spec.A))):
            if anchor:
                u, last = anchor(np.r_[float(t), state(data)][None], u[None])[0], u
                if t: np.testing.assert_allclose(scene.spec.anchored(last, state(data)), u, rtol=0, atol=1e-9, err_msg="what the card says of the anchor")
            u = scene.command(action, u)
            set_command(model, data, u)
            for c, low, high in scene.origin.clipped: data.qvel[c - model.nq] = np.clip(data.qvel[c - model.nq], low, high)
            mujoco.mj_step(model, data, scene.n_substeps)
            for q, value in scene.origin.pinned: data.qpos[q] = value
            rewards.append(step(action)); actions.append(action); rows.append(state(data))
            np.testing.assert_allclose(state(data), state(data_), rtol=1e-9, atol=1e-9, err_msg=f"step {len(actions)}")
        ours = scene.reward(np.array(rows), np.array([*actions, action]), model_diff(scene.base, model_))
        if ours is not None: np.testing.assert_allclose(ours[:-1], rewards, rtol=1e-6, atol=1e-8)


def test_robots_of_the_three_lists_are_disjoint(capsys):
    "By name and by nature, with the one exception that is known by name."
    lists = robot_lists()
    with capsys.disabled(): print(f"\n{json.dumps(lists, indent=1)}")
    assert all(lists.values())
    assert not {r for a in lists for b in lists for r in set(lists[a]) & set(lists[b]) if a != b}
    tasks = [*TASKS.values(), *map(get_task, BODIES)]
    limbs = {t.id: skeleton(spec_of(t)) for t in tasks}
    alike = {(a.robot, b.robot) for a in tasks for b in tasks if a.split < b.split and same_limbs(limbs[a.id], limbs[b.id])}
    assert alike == RELATIVES, alike


def test_the_shadow_hand_is_the_adroit_hand_with_other_motors():
    adroit, shadow = spec_of("adroit-pen"), spec_of("hand-reach")
    assert same_robot(adroit, shadow) and (adroit.A, shadow.A) == (24, 20)


def test_rewards_are_the_packages():
    "The test above compares them; here: there are enough, and none is of a task that isn't."
    assert sum(reward_of(id) is not None for id in TASKS) >= 25
    assert all(any(id == k or id.startswith(k) for id in TASKS) for k in REWARDS)


@pytest.mark.parametrize("id", ["mw-reach", "mw-drawer-open", "mw-button-press"])
def test_scripted_experts_succeed(id):
    "Three of fifty; `python tests/test_conformance.py` tries them all."
    scene = load(id)
    assert judge(scene, rollout(scene, expert(id), 251, 0, behaviour="expert")).any()


def test_most_tasks_can_be_rebuilt_from_their_cards():
    "The list of those that can't is written by `python tests/test_conformance.py`."
    lacking = json.loads(GOLDEN.read_text())
    assert set(lacking) <= set(TASKS) and len(lacking) <= .4 * len(TASKS)
    for id in list(lacking)[::6]: assert spec_of(id).lacks, id


def test_the_zoo_is_wide():
    outside = [t for t in TASKS.values() if t.package != "cfm_lab"]
    assert len(TASKS) >= 150 and len({t.package.split(".")[0] for t in outside}) >= 4 and len({t.robot for t in outside}) >= 40
    assert {t.domain for t in TASKS.values()} == {"classic", "locomotion", "navigation", "manipulation", "aviation", "driving"}
    assert {t.tier for t in TASKS.values() if t.split == "held-out"} == {"T1"} and not any(t.tier for t in TASKS.values() if t.split != "held-out")


def test_the_same_task_twice_is_seen():
    assert task_print(load("dm-humanoid-run")) == task_print(load("dm-humanoid-run_pure_state")) != task_print(load("dm-humanoid-walk"))


def test_a_scene_is_built_anew_the_same(monkeypatch):
    "What was dropped for want of room comes back bit by bit."
    first = load("dm-lqr-lqr_2_1")
    monkeypatch.setattr("cfm_lab.tasks.ROOM", 0)
    load("walker-family-424242")
    again = load("dm-lqr-lqr_2_1")
    assert again is not first and model_diff(first.base, again.base) == () and spec_to_dict(first.spec) == spec_to_dict(again.spec)


def test_family_seeds_are_split():
    name = next(iter(FAMILIES))
    assert get_task(f"{name}-family-999999").split == "train"
    assert get_task(f"{name}-family-1000000").split == "validation"


def test_unknown_task_is_one_clear_error():
    for id, hint in {"gym-hoper": "gym-hopper", "unicorn-family-3": "no family 'unicorn'"}.items():
        with pytest.raises(BadInput, match=hint): get_task(id)


def survey():
    "Which tasks can't be rebuilt from their cards and why (written to tests/golden), and how often the experts succeed."
    from cfm_lab.behaviors import expert_success
    lacking = {}
    for id in TASKS:
        scene = load(id)
        try: error = rebuilt_error(scene)
        except ValueError: error = np.inf
        if not error < 1e-6: lacking[id] = list(scene.spec.lacks)
    GOLDEN.write_text(json.dumps(lacking, indent=1) + "\n")
    experts = [expert_success(id) for id in TASKS if expert(id)] if "--experts" in sys.argv else []
    return dict(tasks=len(TASKS), rebuilt=len(TASKS) - len(lacking), share=round(1 - len(lacking) / len(TASKS), 3), lacking=lacking,
                experts=len(experts), succeeded=sum(e["succeeded"] for e in experts), of=sum(e["starts"] for e in experts), below_all={e["task"]: e["succeeded"] for e in experts if e["succeeded"] < e["starts"]})


if __name__ == "__main__": print(json.dumps(survey(), indent=1))
