"""What `doctor` and a loading model say of this machine's kernels."""

from app.models.cpu.attention_kernel import load_attention
from app.models.cpu.building import NotBuilt
from app.models.cpu.library import load_kernels


def kernels_in_words() -> str:
    """Return a phrase: whether there are kernels on this machine, or why not."""
    try:
        load_kernels()
        load_attention()
    except NotBuilt as reason:
        return f"none of our own ({reason}): torch's are used, which are slower"
    return "our own, compiled for this processor"
