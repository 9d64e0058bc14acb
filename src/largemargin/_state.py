"""State of a loss between steps: buffers that its forward pass in training mode writes in place, as batch norm does.

So checkpoints and CUDA graphs keep working with the same tensors. If torch forbids the write, as under ``torch.func``, the forward pass
raises before it changes anything. Two cases need care.

**Compiled code.** A compiled backward pass recomputes cheap values from the inputs of the forward pass, and would read the buffer one step
too late (torch 2.13). The partitioner does not recompute unknown operators. So values made from the state come out of the operator
``torch.ops.largemargin.first_or_again``, and are saved. Exported programs have no backward pass and no such operator.

**Activation checkpointing** repeats a forward pass within the backward pass. The recomputation must see what the first pass saw, and must
not move the state: ``first_or_again(owner, first, again)`` returns ``first`` in a first pass and ``again`` in a recomputation. A module
remembers the state of its last forward pass only. It is an error to recompute an earlier pass, a pass in another mode, or a pass in
evaluation mode from before the last change of the state (:func:`check_evaluation`). Torch has no public way to detect a recomputation.
This module compares the running backward pass and its current node: nodes are numbered in order of creation (see :mod:`._torch`).
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

from . import _torch

NEVER = sys.maxsize  # later than any node
REFUSED = "a forward pass in training mode writes the buffers of its module in place, which torch refuses here"
OTHER_MODE = (
    "a forward pass within a backward pass (activation checkpointing) may recompute a pass in another mode or with another state; do not "
    "change the mode of a module between a checkpointed forward pass and its backward pass"
)


class Pass(NamedTuple):
    thread: threading.Thread  # each thread numbers its own nodes
    begins: int  # nodes that can ask for its recomputation have at least this number
    again: tuple[int, int, bool] | None = None  # the last recomputation: its backward pass, the asking node, whether it has a graph


_last: Any = WeakTensorKeyDictionary()  # of each owner
_evaluated: Any = WeakTensorKeyDictionary()  # the first forward pass of each owner in evaluation mode since its state changed


def first_or_again(owner: Tensor, first: Sequence[Tensor], again: Sequence[Tensor]) -> Sequence[Tensor]:
    """``first`` in a forward pass in training mode, ``again`` in its recomputation. Call it once per forward pass.

    ``owner`` is a buffer of the module. ``first`` comes from the current state, ``again`` from what the last pass left: its own ``first``.
    """
    if torch.compiler.is_exporting():
        return first
    if torch.compiler.is_compiling():
        chosen: Sequence[Tensor] = torch.ops.largemargin.first_or_again(owner, first, again)
        return chosen
    return again if _is_recomputation(owner) else first


def write(buffer: Tensor, method: Callable[..., Tensor], *arguments: object) -> None:
    """Call a method of a tensor that writes into ``buffer``; if torch refuses, the error says what to do."""
    if torch.compiler.is_compiling():
        method(buffer, *arguments)
        return
    if buffer.is_inference() and not torch.is_inference_mode_enabled():  # torch would write, and then raise
        raise RuntimeError(f"a module made in torch.inference_mode is called outside of it; {REFUSED}; make the module outside")
    try:
        method(buffer, *arguments)
    except RuntimeError as error:
        if not _torch.is_transformed():
            raise
        raise RuntimeError(
            f"{REFUSED} (see the error above); call eval(), or pass all buffers through the transformed function to functional_call"
        ) from error


def forget(owner: Tensor) -> None:
    """Forget the last forward pass of the owner, whose state is made anew: a recomputation of that pass is an error."""
    for passes in (_last, _evaluated):
        passes.pop(owner, None)


def check_evaluation(owner: Tensor) -> None:
    """Refuse to recompute a forward pass that saw another state. Call it once per pass in evaluation mode."""
    if torch.compiler.is_compiling() or owner not in _last:  # the state has not changed
        return
    first = _evaluated.get(owner)
    if _torch.backward_pass() == -1:
        if first is None or first.begins == NEVER:
            thread = threading.current_thread()
            _evaluated[owner] = Pass(thread, _first_node() if _last[owner].thread is thread else NEVER)
        return
    if torch.is_grad_enabled() and not _is_evaluated(owner):  # without a graph there is no gradient
        raise RuntimeError(OTHER_MODE)


def _is_evaluated(owner: Tensor) -> bool:
    """Whether the asking node belongs to a forward pass in evaluation mode that saw the current state."""
    first, node = _evaluated.get(owner), _torch.asking_node()
    return first is not None and node is not None and _torch.number_of(node) >= first.begins


def _is_recomputation(owner: Tensor) -> bool:
    last, task, thread = _last.get(owner), _torch.backward_pass(), threading.current_thread()
    if task == -1:
        _evaluated.pop(owner, None)
        _last[owner] = Pass(thread, _first_node() if last is None or last.thread is thread else NEVER)
        return False
    node = _torch.asking_node()
    if last is None:
        raise _unknown("no forward pass with these buffers came before it: double(), to() and the like make new ones")
    if node is None:
        raise _unknown("compiled autograd does not say which pass it is")
    asks = task, _torch.number_of(node), torch.is_grad_enabled()  # a reentrant checkpoint in another runs without a graph, then with one
    if _torch.number_of(node) < last.begins:
        raise _unknown("this is, or may be, a recomputation of another pass")
    if _is_evaluated(owner):
        raise RuntimeError(OTHER_MODE)
    if last.again == asks:
        raise _unknown("the checkpointed part calls the module twice")
    _last[owner] = last._replace(again=asks)
    return True


def _unknown(reason: str) -> RuntimeError:
    return RuntimeError(
        "a forward pass in training mode runs within a backward pass, as a recomputation for activation checkpointing; a module with state "
        f"can repeat its last forward pass, but {reason}. Run the backward pass of each forward pass before the next one, call the module "
        "once in the checkpointed part, or leave it out of that part"
    )


def _first_node() -> int:
    """The lowest number of a node that can ask for the recomputation of the current pass."""
    if torch.is_grad_enabled():
        return _torch.next_number()
    # without a graph: the outermost enclosing autograd.Function, such as a reentrant checkpoint or compiled code
    number, frame = NEVER, cast(FrameType | None, sys._getframe(1))
    while frame is not None:
        if frame.f_code.co_name == "forward" and frame.f_code.co_argcount:
            node = frame.f_locals.get(frame.f_code.co_varnames[0])
            if isinstance(node, BackwardCFunction):
                number = _torch.number_of(node)
        frame = frame.f_back
    return number


_library = torch.library.Library("largemargin", "FRAGMENT")
# a CUDA graph of compiled code would repeat its recorded answer in a recomputation
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define("first_or_again(Tensor owner, Tensor[] first, Tensor[] again) -> Tensor[]", tags=_tags)


def _choose(owner: Tensor, first: list[Tensor], again: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in (again if _is_recomputation(owner) else first)]  # an operator must not return its arguments


def _shapes(owner: Tensor, first: list[Tensor], again: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in first]


_library.impl("first_or_again", _choose, "CompositeExplicitAutograd")
_library.impl("first_or_again", _shapes, "Meta")
