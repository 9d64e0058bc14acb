"""The machine of a run: set as its recipe says, and what the processes that share a batch tell each other."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import LabError
from ..stopping import interrupts_end_at_once
from ..words import counted
from .environment import check_device
from .recipe import Recipe

if TYPE_CHECKING:
    from accelerate import Accelerator


def start(recipe: Recipe) -> "Accelerator":
    """Set the machine as the recipe says; the processes of the run."""
    with interrupts_end_at_once():
        from accelerate import Accelerator

    check_device(recipe.device if recipe.processes == 1 else "cpu")  # each of several has a device of its own
    if recipe.compile and recipe.compile not in torch.compiler.list_backends(exclude_tags=()):
        raise LabError(f"compile {recipe.compile} is no backend of torch.compile here; it has {', '.join(torch.compiler.list_backends())}")
    if recipe.nesterov and not recipe.momentum:
        raise LabError("nesterov true needs a momentum above 0; give one, or leave nesterov out")
    # a run of one process does not use the accelerator's device, and cpu=True is refused after a run on a GPU in the same process
    cpu = recipe.device == "cpu" and recipe.processes > 1
    # the precision is the recipe's, whatever the launcher was configured for
    accelerator = Accelerator(cpu=cpu, device_placement=False, mixed_precision="no")
    if accelerator.num_processes != recipe.processes:
        raise LabError(
            f"this run is of {counted(recipe.processes, 'process')}, and {accelerator.num_processes} came; start it as before, with "
            "torchrun or accelerate launch where it had several"
        )
    torch.set_num_threads(recipe.threads)
    device = accelerator.device if recipe.processes > 1 else torch.device(recipe.device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)  # on which kernels and graphs are launched
        torch.backends.cudnn.benchmark = True  # almost all batches have one shape: its fastest convolutions are looked for once
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = recipe.precision == "tf32"
    return accelerator


class Processes:
    """The processes of a run, each with its rank: most runs have one, for which nothing is exchanged."""

    def __init__(self, recipe: Recipe, accelerator: "Accelerator") -> None:
        self.accelerator = accelerator
        self.rank, self.world, self.main = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
        # the accelerator's own is cpu:0 among several processes, where no checkpoint can be loaded to
        self.device = accelerator.device if self.world > 1 and recipe.device != "cpu" else torch.device(recipe.device)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients that are averaged over processes."""
        wrapped: nn.Module = self.accelerator.prepare_model(module, device_placement=False) if self.world > 1 else module
        return wrapped

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, on the CPU."""
        return self.accelerator.reduce(values.to(self.device), "sum").cpu() if self.world > 1 else values.cpu()

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process: a signal may reach one of them, and clocks differ."""
        if self.world == 1:
            return list(flags)
        return [bool(flag) for flag in self.sum(torch.tensor(flags, dtype=torch.float64)).tolist()]

    def copy_buffers(self, module: nn.Module) -> None:
        """Those of the first process to all: what batch norm has seen differs, and the first has it as checkpoints do."""
        if self.world > 1:
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def all_rows(self, parts: list[Tensor], shape: tuple[int, ...], count: int) -> Tensor:
        """The rows of all processes, in order: only the last shares may be short."""
        mine = torch.cat(parts) if parts else torch.empty(0, *shape, device=self.device, dtype=torch.float32 if shape else torch.int64)
        if self.world == 1:
            return mine
        gathered: Tensor = self.accelerator.gather(self.accelerator.pad_across_processes(mine))
        return gathered[:count]
