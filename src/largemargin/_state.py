"""How a loss keeps state from step to step: in buffers that its forward pass in training mode writes in place, as batch norm does.

So the module keeps its tensors: checkpoints load into them, a CUDA graph that holds the step moves them, and where they cannot be written
(under ``torch.func``, say) the forward pass is refused before anything has changed. Two things need care.

**Compiled code.** A compiled backward pass recomputes cheap values from the inputs of the forward pass, and takes a buffer as it is then:
one step further (torch 2.13). The partitioner never recomputes an operator that it does not know. So what a forward pass makes of its state
comes out of one, ``torch.ops.largemargin.first_or_again``, and is saved. Exported programs have no backward pass and hold no such operator.

**Activation checkpointing** runs a forward pass again within the backward pass. The second run sees what the first saw, and does not move
the state: ``first_or_again(owner, first, again)`` returns ``first`` in a first run and ``again`` in a recomputation. A module remembers the
state of its last forward pass alone, so the recomputation of an earlier one is an error. So is one in another mode than the pass had, and
one in evaluation mode of a pass that came before the state last moved: :func:`check_evaluation`.

Torch has no public way to know a recomputation. So this file, and no other, asks by private names, each with a test in
``tests/test_state.py``: ``torch._C._current_graph_task_id`` is -1 outside of a backward pass; ``torch._C._current_autograd_node`` is the
node of the graph that asks for the recomputation; ``Node._sequence_nr`` and ``torch._C._autograd._get_sequence_nr`` number the nodes of a
thread in the order of their making.
"""

import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.utils.weak import WeakTensorKeyDictionary

NEVER = sys.maxsize  # later than any node
REFUSED = "a forward pass in training mode writes the buffers of its module in place, which torch refuses here"
OTHER_MODE = (
    "a forward pass runs within a backward pass, where it may recompute, for activation checkpointing, one that was in another mode or "
    "saw another state; leave the mode of a module alone between a checkpointed forward pass and its backward pass"
)


class Pass(NamedTuple):
    """The last forward pass of the owner of a buffer."""

    thread: threading.Thread  # each numbers its own nodes
    begins: int  # no node of a graph that can ask for its recomputation has a lower number
    again: tuple[int, int, bool] | None = None  # the last recomputation: its backward pass, the node that asked, whether it has a graph


_last: Any = WeakTensorKeyDictionary()  # of each owner
_evaluated: Any = WeakTensorKeyDictionary()  # the first forward pass of each owner in evaluation mode since its state moved


def first_or_again(owner: Tensor, first: Sequence[Tensor], again: Sequence[Tensor]) -> Sequence[Tensor]:
    """What a forward pass in training mode works with: ``first``, or in its recomputation ``again``; to be asked once a forward pass.

    Args:
        owner: a buffer of the module that asks.
        first: made of the state as it is.
        again: made of what the last forward pass left, equal to what that had; shaped as ``first``.
    """
    if torch.compiler.is_exporting():
        return first
    if torch.compiler.is_compiling():
        chosen: Sequence[Tensor] = torch.ops.largemargin.first_or_again(owner, first, again)
        return chosen
    return again if _is_recomputation(owner) else first


def write(buffer: Tensor, method: Callable[..., Tensor], *arguments: object) -> None:
    """Call a method of a tensor that writes into ``buffer``; where torch refuses, say what to do."""
    if torch.compiler.is_compiling():
        method(buffer, *arguments)
        return
    if buffer.is_inference() and not torch.is_inference_mode_enabled():  # torch would write, and then refuse
        raise RuntimeError(f"a module made in torch.inference_mode is called outside of it; {REFUSED}; make the module outside")
    try:
        method(buffer, *arguments)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise RuntimeError(
            f"{REFUSED} (see the error above); call eval(), or pass all buffers as arguments to the function that torch.func transforms, "
            "and there to torch.func.functional_call"
        ) from error


def check_evaluation(owner: Tensor) -> None:
    """Refuse a recomputation in evaluation mode of a forward pass that saw another state; to be asked once a pass in evaluation mode."""
    if torch.compiler.is_compiling() or owner not in _last:  # the state has not moved
        return
    first = _evaluated.get(owner)
    if torch._C._current_graph_task_id() == -1:
        if first is None or first.begins == NEVER:
            thread = threading.current_thread()
            _evaluated[owner] = Pass(thread, _first_node() if _last[owner].thread is thread else NEVER)
        return
    if torch.is_grad_enabled() and not _is_evaluated(owner):  # without a graph no gradient comes of it
        raise RuntimeError(OTHER_MODE)


def _is_evaluated(owner: Tensor) -> bool:
    """Whether the node that asks is of a forward pass in evaluation mode that saw the state as it is."""
    first, node = _evaluated.get(owner), torch._C._current_autograd_node()
    return first is not None and node is not None and node._sequence_nr() >= first.begins


def _is_recomputation(owner: Tensor) -> bool:
    last, task, thread = _last.get(owner), torch._C._current_graph_task_id(), threading.current_thread()
    if task == -1:
        _evaluated.pop(owner, None)
        _last[owner] = Pass(thread, _first_node() if last is None or last.thread is thread else NEVER)
        return False
    node = torch._C._current_autograd_node()
    if last is None:
        raise _unknown("no forward pass came before it, or none with these buffers: double(), to() and the like make new ones")
    if node is None:
        raise _unknown("compiled autograd does not say of which")
    asks = task, node._sequence_nr(), torch.is_grad_enabled()  # a reentrant checkpoint in another runs without a graph, then with one
    if node._sequence_nr() < last.begins:
        raise _unknown("this is of another, or cannot be told from another")
    if _is_evaluated(owner):
        raise RuntimeError(OTHER_MODE)
    if last.again == asks:
        raise _unknown("the checkpointed part calls the module twice")
    _last[owner] = last._replace(again=asks)
    return True


def _unknown(reason: str) -> RuntimeError:
    return RuntimeError(
        "a forward pass in training mode runs within a backward pass, where it recomputes one for activation checkpointing; a module with "
        f"state knows what its last forward pass saw, but {reason}. Run the backward pass of each forward pass before the next one, call "
        "the module once in the checkpointed part, or leave it out of that part"
    )


def _first_node() -> int:
    """The lowest number of a node that can ask for the recomputation of what runs now."""
    if torch.is_grad_enabled():
        return torch._C._autograd._get_sequence_nr()
    # without a graph of its own: the outermost autograd.Function that this runs in, such as a reentrant checkpoint or compiled code
    number, frame = NEVER, cast(FrameType | None, sys._getframe(1))
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_argcount:
            node = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(node, BackwardCFunction):
                number = int(node._sequence_nr())
        frame = frame.f_back
    return number


_library = torch.library.Library("largemargin", "FRAGMENT")
# a CUDA graph of compiled code would repeat the answer of its recording in a recomputation
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define("first_or_again(Tensor owner, Tensor[] first, Tensor[] again) -> Tensor[]", tags=_tags)


def _choose(owner: Tensor, first: list[Tensor], again: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in (again if _is_recomputation(owner) else first)]  # an operator returns none of its arguments


def _shapes(owner: Tensor, first: list[Tensor], again: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in first]


_library.impl("first_or_again", _choose, "CompositeExplicitAutograd")
_library.impl("first_or_again", _shapes, "Meta")
