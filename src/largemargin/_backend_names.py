"""The values of ``backend=``, each the name of a module in :mod:`.backends`, and the one for each device."""

from typing import Literal, get_args

BackendName = Literal["reference", "cpu", "triton"]
BACKENDS = (None, *get_args(BackendName))
OF_DEVICE: dict[str, BackendName] = {"cpu": "cpu", "cuda": "triton", "xpu": "triton"}
