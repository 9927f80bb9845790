"""Work in turns, and what its pairs of times say: (ours, theirs), one right after the other.

A machine that changes its pace within seconds disturbs both of a pair alike. So what counts
are the ratios of the pairs, theirs to ours; above 1 ours is faster. The verdict is that of the
sign test (5 %, two-sided): if both were equally fast, each ratio would lie above or below 1 as
a coin falls. As many as coins would rarely bring to one side are left out at either end: one
of 9, 19 of 54. If the rest lies above 1, ours is "faster", below 1 "slower", and else this run
"cannot tell". Fewer than six pairs never can. What stays the same for a whole run, such as
where the weights lie in memory, is in every pair, and no single run shows it.
"""
import random
import time
from functools import partial
from math import comb
from statistics import median

import torch

from machine import Pace, percentile, timed


def interval(ratios): # sorted -> lowest and highest not left out; None: fewer than six
    n, out, tail = len(ratios), 0, 1  # of 2**n ways to fall, `tail` have at most `out` heads
    while 40 * tail <= 2**n:
        out += 1
        tail += comb(n, out)
    return [ratios[out - 1], ratios[n - out]] if out else None


def summary(pairs, memory=False): # memory is not disturbed: all pairs count, be they few
    ratios, (ours, theirs) = sorted(b / a for a, b in pairs), zip(*pairs)
    held = [ratios[0], ratios[-1]] if memory else interval(ratios)
    if held is None: verdict = "too few to tell"
    elif held[0] > 1: verdict = "smaller" if memory else "faster"
    elif held[1] < 1: verdict = "larger" if memory else "slower"
    else: verdict = "cannot tell"
    return dict(ours=median(ours), transformers=median(theirs), ratio=median(ratios),
                minima=[min(ours), min(theirs)], ratio_of_minima=min(theirs) / min(ours),
                spread=[percentile(ratios, q) for q in (0.1, 0.9)],
                interval=held, verdict=verdict, pairs=pairs)


def share_of_bound(times, reads, size):
    """At best and in the median: reading `size` bytes once takes which part of a token's time?
    `times` of the tokens and `reads` by `Pace` in the same turns, in milliseconds."""
    bounds = [size / Pace.block_bytes * read for read in reads]
    return [min(bounds) / min(times), median(b / t for b, t in zip(bounds, times))]


def in_turns(theirs, inputs, n, others, chance=random):
    """Transformers writes `n` tokens; after each, its loop lets every other one have its turn.
    Returns milliseconds {name: [n]}. `chance` shuffles the others: who comes after one that
    empties the caches is slower, so nobody may always follow the same one."""
    from transformers import StoppingCriteriaList
    times, order = {name: [] for name in ("transformers", *others)}, list(others)

    def turn(ids, scores, **kwargs):
        nonlocal start
        times["transformers"].append(1e3 * (time.perf_counter() - start))
        chance.shuffle(order)
        for name in order: times[name].append(timed(others[name]))
        start = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)

    start = time.perf_counter()
    theirs.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                    stopping_criteria=StoppingCriteriaList([turn]))
    return times


def answers_in_turns(theirs, ours, inputs, pace, rounds, n, warm_up=1): # ours {way: model}
    "Times {name: […]} of first tokens and of further ones: all ways, theirs and the pace."
    from paligemma_nb.generation import generate_tokens
    names, chance = ("transformers", *ours, *pace.works), random.Random(0)
    first, further = ({name: [] for name in names} for _ in range(2))
    for i in range(-warm_up, rounds):
        length = 2 if i < 0 else n
        answers = {way: partial(next, generate_tokens(model, inputs, max_new_tokens=length))
                   for way, model in ours.items()}
        found = in_turns(theirs, inputs, length, answers | pace.works, chance)
        for name in names if i >= 0 else ():
            first[name] += found[name][:1]
            further[name] += found[name][1:]
    for name in pace.works: pace.times[name] += first[name] + further[name]
    return first, further
