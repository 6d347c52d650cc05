"""A step that the device's memory doesn't hold: how it is recognised, and all given back that it took."""

import traceback

import torch

# Errors of torch's allocator for CPUs, and of CUDA outside torch's allocator (kernels, libraries, graphs),
# have no class of their own.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an allocation failed, on the host or on the device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def forget_step(error: BaseException) -> None:
    """Let go of the tensors of the step that raised `error`: there may be no room for another beside them.

    They are locals of the functions that it passed through, and those that it was raised in place of. After
    an allocation that failed, what torch keeps for later is given back too: libraries, kernels and graphs
    allocate beside it.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and id(each) not in seen:
            seen.add(id(each))
            traceback.clear_frames(each.__traceback__)
            waiting += (each.__cause__, each.__context__)
    if is_out_of_memory(error):
        torch.cuda.empty_cache()  # nothing where no GPU is in use
