"""The ladder of mechanics against MuJoCo: masses and forces of every robot, steps with and without contact, and a guess for every robot of the zoo at once."""
import mujoco
import numpy as np
import pytest
import torch

from cfm_lab.contacts import ease, stack_mechanics, stack_robots
from cfm_lab.embodiments import embody, random_pose, set_command
from cfm_lab.guess import Dial, RigidGuess, advance_guess, coarse, control_step, coverage, fine, own_step
from cfm_lab.mechanics import States, link_forces, link_velocity, mass_matrix, posture, stack, to_joints
from cfm_lab.rollout import honest
from cfm_lab.tasks import TASKS, get_task, load
from cfm_lab.tokens import join_state, split_state, static

torch.set_num_threads(1)
FIRST = {t.robot: t.id for t in reversed(TASKS.values())}           # a task of each robot
FAMILIES = [f"{n}-family-4" for n in ("walker", "arm", "legged", "chain", "hand", "push", "rotor", "wheeled")]
DEEP = dict(dtype=torch.float64)
tensors = lambda spec, state_C: tuple(torch.tensor(a) for a in split_state(spec, np.asarray(state_C)[None]))


@pytest.fixture(scope="module")
def zoo():
    "id → (spec with the reset's edits, reset state, command at the start, what MuJoCo says of three random states)."
    out, rng = {}, np.random.default_rng(0)
    for id in [*FIRST.values(), *FAMILIES]:
        scene = load(get_task(id))
        initial, edits, command = scene.reset(np.random.default_rng(0))
        spec = scene.spec.edited(edits) if edits else scene.spec
        with honest(scene.apply(edits)) as m:
            d, said = mujoco.MjData(m), []
            for _ in range(3):
                d.qpos[:], d.qvel[:] = random_pose(m, rng), rng.normal(size=m.nv)
                mujoco.mj_forward(m, d)
                M = np.zeros((m.nv, m.nv))
                mujoco.mj_fullM(m, M, d.qM)
                said.append((np.r_[d.qpos, d.qvel], M, d.qfrc_bias - d.qfrc_gravcomp, m.dof_invweight0.copy(), m.body_invweight0.reshape(-1, 2).copy()))
        scene.apply()
        out[id] = spec, initial[1:1 + spec.C], np.asarray(command, float), said
    return out


def test_masses_and_bias_of_every_robot(zoo):
    wrong = {}
    for id, (spec, _, _, said) in zoo.items():
        me = stack([(spec, 1)], **DEEP)
        for state, M, bias, *_ in said:
            q, v, quat = tensors(spec, state)
            p = posture(me, q, quat)
            ours = mass_matrix(me, p)[0].numpy(), to_joints(me, p, link_forces(me, p, v, link_velocity(me, p, v)))[0].numpy()
            error = max(abs(a - b).max() / max(abs(b).max(), 1e-9) for a, b in zip(ours, (M, bias)))
            if error > 1e-5: wrong[id] = error
    assert not wrong


def test_inverse_weights_of_every_robot(zoo):
    "The scale of every row."
    wrong = {}
    for id, (spec, _, _, said) in zoo.items():
        joint, body = said[0][3:]
        touched = [b for b, x in enumerate(spec.bodies) if x.geoms]
        errors = abs(ease(spec).joint_J - joint).max() / joint.max(), abs(ease(spec).body_N2 - body)[touched].max(initial=0) / body.max()
        if max(errors) > 1e-4: wrong[id] = errors
    assert not wrong


FREE = ["dm-acrobot-swingup", "dm-cartpole-three_poles", "dm-pendulum-swingup", "dm-fish-swim", "dm-swimmer6", "gym-swimmer", "gym-reacher", "dm-lqr-lqr_6_2", "gym-inverted-double-pendulum", "arm-family-4"]


def one_step(scene, edits, spec, state, command, **how):
    "Velocities after one of the simulator's steps: MuJoCo's and ours, and the change."
    with honest(scene.apply(edits)) as m:
        m.opt.noslip_iterations = 0
        d = mujoco.MjData(m)
        d.qpos[:], d.qvel[:] = state[:m.nq], state[m.nq:]
        set_command(m, d, command)
        if m.na: d.act[:] = np.clip(command[:m.nu], *m.actuator_ctrlrange.T)[-m.na:]
        mujoco.mj_step(m, d)
        theirs = np.r_[d.qpos, d.qvel]
    scene.apply()
    me = stack_robots([(spec, 1)], **DEEP)
    u = torch.tensor(np.asarray(command, float))[None]
    clip = torch.minimum(torch.maximum(u, me.clip_U4[..., 0]), me.clip_U4[..., 1])
    with torch.no_grad(): q, v, quat, _ = own_step(me, *tensors(spec, state), clip, clip, u, Dial(0, 1, 12, 200))
    ours = join_state(spec, q.numpy(), v.numpy(), quat.numpy())[0]
    return abs(spec.subtract(ours, theirs)).max(), abs(spec.subtract(theirs, state)[spec.J:]).max()


@pytest.mark.parametrize("id", FREE)
def test_a_step_without_contact(id):
    scene, rng = load(get_task(id)), np.random.default_rng(1)
    for _ in range(3):
        state = np.r_[random_pose(scene.model, rng), rng.normal(size=scene.spec.J)]
        command = rng.uniform(scene.spec.action.low_U, scene.spec.action.high_U)
        error, change = one_step(scene, (), scene.spec, state, command)
        assert error <= 1e-6 * max(change, 1.), (error, change)


@pytest.mark.parametrize("id,most", [("dm-walker-walk", 1e-3), ("dm-humanoid-run", 1e-3), ("gym-ant", 1e-3), ("dm-quadruped-run", 1e-3), ("gym-hopper", 1e-3), ("car-cruise", 1e-2), ("walker-family-4", 1e-3)])
def test_a_step_on_the_floor(id, most):
    "States that MuJoCo has let fall for a while, from every second of them: limits, dry friction, cones, contacts of bodies."
    scene, rng, errors = load(get_task(id)), np.random.default_rng(2), []
    d = mujoco.MjData(scene.model)
    initial, edits, command = scene.reset(rng)
    spec = scene.spec.edited(edits) if edits else scene.spec
    d.qpos[:], d.qvel[:] = initial[1:1 + spec.Q], initial[1 + spec.Q:1 + spec.C]
    touched = 0
    for k in range(240):
        d.ctrl[:] = rng.uniform(-.5, .5, scene.model.nu)
        mujoco.mj_step(scene.model, d)
        if k % 40 == 39:
            touched += d.ncon
            error, change = one_step(scene, edits, spec, np.r_[d.qpos, d.qvel], np.r_[d.ctrl, command[scene.model.nu:]])
            errors.append(error / max(change, 1e-3))
    assert touched and np.median(errors) < most, errors


def world(xml, id, n=5):
    m = mujoco.MjModel.from_xml_string(xml)
    return m, embody(m, id, id, id, n)


BALL = '<mujoco><worldbody><geom type="plane" size="5 5 .1"/><body pos="0 0 .3"><freejoint/><geom type="sphere" size=".1" mass="1"/></body></worldbody></mujoco>'
TOWER = """<mujoco><worldbody><geom type="plane" size="5 5 .1"/><body pos="0 0 .1"><freejoint/><geom type="box" size=".2 .2 .1" mass="2"/></body>
  <body pos=".05 .02 .32"><freejoint/><geom type="box" size=".1 .1 .1" mass="1"/></body></worldbody></mujoco>"""
ROPE = """<mujoco><option cone="elliptic" integrator="implicitfast"/><worldbody><geom type="plane" size="5 5 .1"/><site name="hook" pos="0 0 1"/>
  <body pos="0 0 .5"><freejoint/><geom type="capsule" size=".05 .1" mass="1" friction=".4"/><site name="ring" pos="0 0 .1"/></body>
  <body name="arm" pos=".5 0 .5"><joint name="a" axis="0 1 0" damping=".1"/><geom type="capsule" fromto="0 0 0 .2 0 0" size=".02"/>
   <body name="tip" pos=".2 0 0"><joint name="b" axis="0 1 0" frictionloss=".05"/><geom type="capsule" fromto="0 0 0 .2 0 0" size=".02"/></body></body>
  <body name="far" pos="1 0 .5"><joint name="c" axis="0 1 0" stiffness="2"/><geom type="capsule" fromto="0 0 0 -.2 0 0" size=".02"/></body></worldbody>
  <tendon><spatial name="rope" limited="true" range="0 .45" stiffness="3" damping=".1"><site site="hook"/><site site="ring"/></spatial></tendon>
  <equality><connect body1="tip" body2="far" anchor=".2 0 0"/><joint joint1="b" joint2="a" polycoef="0 -.5 0 0 0"/></equality>
  <actuator><position joint="a" kp="4" kv=".2" ctrlrange="-1 1" forcerange="-2 2"/></actuator></mujoco>"""


def run_both(m, spec, state, command_TU, dial):
    d, q, theirs, ours = mujoco.MjData(m), tensors(spec, state), [], []
    d.qpos[:], d.qvel[:] = state[:m.nq], state[m.nq:]
    moment, me = States(*(x[:, None].float() for x in q)), stack_mechanics([(spec, 1)])
    for u in command_TU:
        d.ctrl[:] = u
        for _ in range(round(spec.dt / m.opt.timestep)): mujoco.mj_step(m, d)
        moment = advance_guess(me, moment, torch.tensor(u, dtype=torch.float32).view(1, 1, -1), dial)
        theirs.append(np.r_[d.qpos, d.qvel])
        ours.append(join_state(spec, *(x[0, 0].double().numpy() for x in (moment.q_BTJ, moment.v_BTJ, moment.quat_BTR4))))
    return spec.subtract(np.array(ours), np.array(theirs))


@pytest.mark.parametrize("xml,speed,most", [(BALL, .5, 1e-3), (TOWER, 0., 2e-2), (ROPE, .3, 2e-2)])
def test_contact_scenes(xml, speed, most):
    "A ball that bounces and rolls, a box that falls on a box (contact between moving bodies), a rope, a connection and a coupling: half a second with the simulator's own steps, float32."
    m, spec = world(xml, "scene")
    state = np.r_[m.qpos0, np.full(m.nv, speed)]
    error = run_both(m, spec, state, np.full((50, m.nu), .4), fine())[:, :spec.J]
    assert abs(error).max() < most
    m, spec = world(xml, "scene", 1)                               # and one step, float64 on both sides
    d = mujoco.MjData(m)
    d.qpos[:], d.qvel[:], d.ctrl[:] = state[:m.nq], state[m.nq:], .4
    for _ in range(130): mujoco.mj_step(m, d)
    before = np.r_[d.qpos, d.qvel]
    mujoco.mj_step(m, d)
    me = stack_robots([(spec, 1)], **DEEP)
    with torch.no_grad(): after = control_step(me, *tensors(spec, before), None, torch.full((1, m.nu), .4, dtype=torch.float64), Dial(0, 1, 12, 64))
    assert abs(spec.subtract(join_state(spec, *(x.numpy() for x in after[:3]))[0], np.r_[d.qpos, d.qvel])).max() < 1e-4


def test_coarse_is_near_and_far_better_than_drifting():
    m, spec = world(BALL, "ball")
    state = np.r_[m.qpos0, .5, 0, 0, 0, 0, 0]
    error = run_both(m, spec, state, np.zeros((50, 0)), coarse())
    assert abs(error[:, 2]).max() < .02
    low = np.array([run_both(m, spec, state, np.zeros((50, 0)), Dial(looks, 5, 2, 8))[:, :3].__abs__().mean() for looks in (1, 2, 5)])
    assert low[2] < low[0]


def test_every_robot_in_one_batch(zoo):
    "Ten control steps of all robots from their resets, side by side: finite, and coverage says in words what is missing."
    specs = [z[0] for z in zoo.values()]
    J, R, U = max(s.J for s in specs), max(len(static(s)["rot_R6"]) for s in specs), max(s.U for s in specs)
    q, v, quat, u = torch.zeros(len(specs), 1, J), torch.zeros(len(specs), 1, J), torch.tensor([1., 0, 0, 0]).repeat(len(specs), 1, R, 1), torch.zeros(len(specs), 1, U)
    for k, (spec, state, command, _) in enumerate(zoo.values()):
        a, b, c = tensors(spec, state)
        q[k, 0, :spec.J], v[k, 0, :spec.J], quat[k, 0, :c.shape[1]], u[k, 0, :spec.U] = a[0], b[0], c[0], torch.tensor(command)
        assert all(isinstance(w, str) for w in coverage(spec))
    party, moment = stack_mechanics([(s, 1) for s in specs], J=J), States(q, v, quat)
    for _ in range(10): moment = advance_guess(party, moment, u, coarse())
    for x in (moment.q_BTJ, moment.v_BTJ, moment.quat_BTR4): assert torch.isfinite(x).all()


def test_padding_and_rows_change_nothing():
    a, b = (load(get_task(t)).spec for t in ("walker-family-4", "dm-swimmer6"))
    rng = np.random.default_rng(0)
    state = a.home_C + np.r_[np.zeros(a.Q), rng.normal(size=a.J)]
    q, v, quat = (x[:, None].float() for x in tensors(a, state))
    u = torch.tensor(rng.uniform(-1, 1, (1, 1, a.U)), dtype=torch.float32)
    alone = advance_guess(stack_mechanics([(a, 1)]), States(q, v, quat), u)
    J = max(a.J, b.J) + 3
    wide = lambda x: torch.nn.functional.pad(x, (0, J - x.shape[-1])).expand(3, 2, J)
    among = advance_guess(stack_mechanics([(b, 2), (a, 1)], J=J), States(wide(q), wide(v), torch.tensor([1., 0, 0, 0]).expand(3, 2, 2, 4)), torch.nn.functional.pad(u, (0, 9)).expand(3, 2, -1))
    for k in (0, 1): np.testing.assert_allclose(among.v_BTJ[2, k, :a.J], alone.v_BTJ[0, 0], atol=2e-3)


def test_the_guess_is_a_dynamics_and_beats_drifting():
    from cfm_lab.base import Dynamics, imagine, window
    from cfm_lab.behaviors import BEHAVIOURS
    from cfm_lab.references import ConstantVelocity
    from cfm_lab.rollout import rollout
    scene = load(get_task("walker-family-4"))
    e = rollout(scene, BEHAVIOURS["smooth-fast"](), 80, 0)
    w = window([e, e, e], [0, 15, 29], 51)
    assert isinstance(RigidGuess(), Dynamics)
    error = {type(m).__name__ + str(getattr(m, "dial", "")): abs(scene.spec.subtract(imagine(m, scene.spec, w.rows(0, 40), w.action_KTA[:, 39:49]), w.state_KTC[:, 40:50])).mean() for m in (ConstantVelocity(), RigidGuess(coarse()), RigidGuess(fine()))}
    drifting, rough, own = error.values()
    assert rough < .35 * drifting and own < .02 * drifting, error
