"""AdamW over the boxes of the parameters that this rank steps, with its states by parameter name.

Decides where the states lie and what is stepped; knows no ranks: whoever owns it brings complete
gradients and spreads the stepped parameters. AdamW: Loshchilov and Hutter, arXiv 1711.05101.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch.optim.adamw import adamw

from realloc.experiment import OptimizerSpec
from realloc.layout import Box
from runtime.parameters import views_of

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"


def learning_rate(spec: OptimizerSpec, step: int, total_steps: int) -> float:
    """The rate of the step about to be taken, after `step` of `total_steps`."""
    if step < spec.warmup_steps:
        return spec.learning_rate * (step + 1) / spec.warmup_steps
    if spec.decay == "constant":
        return spec.learning_rate
    done = (step - spec.warmup_steps) / max(1, total_steps - spec.warmup_steps)
    left = max(0.0, 1.0 - done)
    if spec.decay == "cosine":
        left = (1.0 - math.cos(math.pi * left)) / 2.0
    return spec.learning_rate * left


class AdamW:
    """Steps fp32 tensors; each state is one flat fp32 buffer over `boxes`, one after the other.

    Holds 8 bytes for each element (both moments), 12 with master weights, which narrower
    parameters need.
    """

    def __init__(
        self,
        boxes: Mapping[str, Box],
        weights: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        spec: OptimizerSpec,
        total_steps: int,
        device: torch.device,
    ) -> None:
        """`weights` and `gradients` (fp32) hold `boxes` and must stay in place.

        `total_steps`: optimizer steps of the whole run, for the decay of the learning rate.
        """
        self.num_steps = 0
        self._spec, self._total_steps = spec, total_steps
        self._boxes, self._weights = boxes, weights
        total = sum(box.num_elements for box in boxes.values())
        self._narrow = any(w.dtype != torch.float32 for w in weights.values())
        names = (*((MASTER,) if self._narrow else ()), EXP_AVG, EXP_AVG_SQ)
        self.flat: Mapping[str, torch.Tensor] = {
            name: torch.zeros(total, dtype=torch.float32, device=device) for name in names
        }
        """The states' buffers: everything that the optimizer keeps."""
        self.states: Mapping[str, Mapping[str, torch.Tensor]] = {
            name: views_of(flat, boxes) for name, flat in self.flat.items()
        }
        self.reload_master()
        stepped = self.states[MASTER] if self._narrow else weights
        pairs = _joined([(stepped[name].detach(), gradients[name]) for name in boxes])
        self._stepped = [weight for weight, _ in pairs]
        self.gradients: Sequence[torch.Tensor] = [gradient for _, gradient in pairs]
        """The same memory as the gradients given, in as few tensors as possible."""
        self._moments: Mapping[str, list[torch.Tensor]] = {
            name: list(self.flat[name].split([weight.numel() for weight in self._stepped]))
            for name in (EXP_AVG, EXP_AVG_SQ)
        }
        self._counts = [torch.zeros((), dtype=torch.float32, device=device) for _ in self._stepped]

    @torch.no_grad()
    def step(self) -> float:
        """One step with the gradients as they are; returns the learning rate it took."""
        rate = learning_rate(self._spec, self.num_steps, self._total_steps)
        if self._stepped:  # a rank may have no rows at all
            # the function alone: making a torch.optim.AdamW imports torch's compiler, for seconds
            adamw(
                self._stepped,
                list(self.gradients),
                self._moments[EXP_AVG],
                self._moments[EXP_AVG_SQ],
                [],
                self._counts,
                fused=True,
                amsgrad=False,
                beta1=self._spec.beta1,
                beta2=self._spec.beta2,
                lr=rate,
                weight_decay=self._spec.weight_decay,
                eps=self._spec.eps,
                maximize=False,
            )
        if self._narrow:
            for name in self._boxes:
                self._weights[name].copy_(self.states[MASTER][name])
        self.num_steps += 1
        return rate

    def resume(self, num_steps: int) -> None:
        """Continues after `num_steps` steps with what has been written into `states`."""
        self.num_steps = num_steps
        for count in self._counts:
            count.fill_(num_steps)

    @torch.no_grad()
    def reload_master(self) -> None:
        """Takes the parameters, newly loaded, as the master weights."""
        if self._narrow:
            for name in self._boxes:
                self.states[MASTER][name].copy_(self._weights[name])


Pair = tuple[torch.Tensor, torch.Tensor]


def _joined(pairs: Sequence[Pair]) -> list[Pair]:
    """(weight, gradient) pairs as few flat ones: what lies side by side in both storages becomes one."""
    runs: list[list[Pair]] = []
    for pair in pairs:
        if runs and all(_follows(a, b) for a, b in zip(runs[-1][-1], pair, strict=True)):
            runs[-1].append(pair)
        else:
            runs.append([pair])
    return [(_flat([w for w, _ in run]), _flat([g for _, g in run])) for run in runs]


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def _flat(neighbours: Sequence[torch.Tensor]) -> torch.Tensor:
    return neighbours[0].as_strided((sum(tensor.numel() for tensor in neighbours),), (1,))
