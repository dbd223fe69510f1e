"""A robot whose speeds fade: a model of dynamics in a few lines, and how it takes the exam.

    cfm exam dynamics --model damped:Damped --quick --json mine.json      (from this folder)
"""
import numpy as np
from cfm_lab.base import Prediction

class Damped:
    "Every joint goes on as it moves now, and its speed loses a share per second."
    def __init__(self):
        self.rate = None                            # per degree of freedom, 1/s; None: from the history

    def fit(self, spec, episodes, seed=0):
        "Least squares: velocity after a step = keep · velocity before it."
        self.rate = self.rate_of(spec, [e.state_TC[e.valid_T] for e in episodes])
        return self

    def rate_of(self, spec, states):
        v,w = (np.concatenate([s[a:b,spec.Q:] for s in states]) for a,b in ((0,-1),(1,None)))
        keep = (v*w).sum(0)/np.maximum((v*v).sum(0),1e-9)
        return -np.log(np.clip(keep,.05,1.))/spec.dt

    def start(self, spec, history, K):
        "history: K pieces (or one) of 51 rows; the last row is the present."
        h = history.repeat(K)
        rate = self.rate if self.rate is not None else self.rate_of(spec, list(history.state_KTC))
        return spec, h.state_KTC[:,-1], rate

    def step(self, carry, action_KA):
        "One control step; this model does not care what is done."
        spec,state_KC,rate = carry
        then = state_KC.copy()
        then[:,spec.Q:] *= np.exp(-rate*spec.dt)
        then = spec.drift(then, spec.dt)            # positions by the new velocities, orientations too
        return (spec,then,rate), Prediction(then)
