"""Several devices on a machine that has one: every tensor carries the device it would be on, and mixing them raises.

The numbers are computed where they always are, so that they can be compared.
"""

import torch
from accelerate import hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

HOME = torch.device("cpu")


def device_of(tensor: torch.Tensor) -> torch.device:
    return getattr(tensor, "emulated_device", HOME)


class EmulatedDevices(TorchFunctionMode):
    """`.to(device)`, `.device` and `device=` speak of emulated devices; all tensors of a call must be on one."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return device_of(args[0])
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.pop("device", None)
        if func is torch.Tensor.to:
            devices = [value for value in args[1:] if isinstance(value, (torch.device, str))]
            target, args = devices[0] if devices else target, [v for v in args if not any(v is d for d in devices)]
            target = device_of(args[0]) if target is None else target
        elif func is torch.Tensor.cpu:
            target = HOME
        else:
            devices = {device_of(tensor) for tensor in tensors if tensor.dim()}  # numbers may come from anywhere
            if len(devices) > 1:
                raise RuntimeError(f"{func.__name__} got tensors on {sorted(map(str, devices))}")
            if target is None:
                target = next(iter(devices or {device_of(tensor) for tensor in tensors[:1]}), HOME)
        if func is torch.Tensor.to and len(args) == 1 and not kwargs.keys() - {"non_blocking"}:
            result = args[0]
        else:
            result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and device_of(result) != torch.device(target):
            result = result.view_as(result)  # what was there stays on its device

        def place(tensor: torch.Tensor) -> torch.Tensor:
            tensor.emulated_device = torch.device(target)
            return tensor

        return tree_map_only(torch.Tensor, place, result)


def spread(model: torch.nn.Module, device_map: dict[str, torch.device], monkeypatch) -> None:
    """Puts modules on emulated devices, and has accelerate move what goes between them, as `device_map` does."""
    for name, device in device_map.items():
        for tensor in (*model.get_submodule(name).parameters(), *model.get_submodule(name).buffers()):
            tensor.emulated_device = device
    monkeypatch.setattr(hooks, "set_module_tensor_to_device", lambda *args, **kwargs: None)  # they are there
    hooks.attach_align_device_hook_on_blocks(
        model,
        execution_device={"": HOME, **device_map},
        offload=dict.fromkeys(device_map, False),
        skip_keys=model._skip_keys_device_placement,
    )
