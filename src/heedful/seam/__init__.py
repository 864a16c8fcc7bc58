"""The seam: runs a model with parts in its attention calls.

`attach(model, *parts)` redirects the attention of the layers that a part asks about. A part is a `Kernel` (computes
the call), an `Edit` (changes it at one of four stages) or a `Probe` (reads it); each gets the `AttentionCall` and
tensors of just the heads and rows it asked for. `register_attention(name, kernel)` gives a kernel a name for
`attn_implementation=`. `Verification` is how `heedful.generate` marks forwards of drafted tokens.

Read in this order: parts (the three kinds), call (what a part sees), masks (who sees whom), selection (who acts on
which rows), weights (logits and probabilities of just these), site (one call, stage by stage), discovery (which
modules, and how they are redirected), attachment (attach, detach, report, and the errors), naming, verification.
"""

from heedful.seam.attachment import Attachment, attach
from heedful.seam.call import AttentionCall
from heedful.seam.naming import NamedAttention, register_attention
from heedful.seam.parts import Edit, Kernel, Part, PartError, Probe
from heedful.seam.verification import Verification

__all__ = [
    "Attachment",
    "AttentionCall",
    "Edit",
    "Kernel",
    "NamedAttention",
    "Part",
    "PartError",
    "Probe",
    "Verification",
    "attach",
    "register_attention",
]
