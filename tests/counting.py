"What an operation takes, counted and not timed: names of operations, bytes of tensors."
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


def peak_bytes(work):
    """The most memory that PyTorch's allocator handed out at a time, by its own record: what
    else runs on the machine has no say in it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        out = work()
    events = sorted(record.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    held = torch.tensor([e.nbytes() for e in events if e.name() == "[memory]"]).cumsum(dim=0)
    assert held[-1] >= out.nbytes  # the record is whole
    return held.max().item()


class Calls(TorchDispatchMode):
    "Names of the operations, and bytes of the largest new tensor with an entry for each key."
    def __init__(self, keys=None):
        super().__init__()
        self.keys, self.names, self.largest = keys, [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        is_new = isinstance(out, torch.Tensor) and not func.is_view
        if is_new and out.shape[-1:] == (self.keys,):
            self.largest = max(self.largest, out.nbytes)
        return out


def saved_bytes(work):
    "What autograd keeps for the backward pass of work(), each storage once."
    kept = {}
    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x): work()
    return sum(kept.values())
