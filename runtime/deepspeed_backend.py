"""DeepSpeed as a training backend: ZeRO 0 to 3 and offload of the optimizer, for one role on all ranks.

Trains in fp32, in place of `runtime.training.Trainer`. DeepSpeed owns the parameters that are trained, their
gradients and the optimizer's states; after each step the trained parameters are copied to where the role's
other calls, reallocations and exports read them. So a rank keeps its parameters twice. Only this module knows
DeepSpeed.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from realloc.errors import InputError, RunError
from realloc.experiment import OptimizerSpec
from realloc.layout import Box, optimizer_boxes
from realloc.model_shape import ModelShape
from runtime.decoder import Decoder
from runtime.optimizer import EXP_AVG, EXP_AVG_SQ, learning_rate
from runtime.parallel import ParallelContext
from runtime.parameters import FlatParameters
from runtime.pipeline import MicroBatch

NO_RESUME = (
    "deepspeed cannot take up optimizer states; continue with training_backend: own, which can (give a "
    "plan that says so)."
)
Loss = Callable[[torch.Tensor, MicroBatch], torch.Tensor]


class _Work(nn.Module):
    """Holds the parameters; its forward runs whatever work is given, which reads them.

    DeepSpeed hooks into modules. One module means that under ZeRO 3 all parameters are gathered for a pass.
    """

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.by_name: Mapping[str, nn.Parameter] = {name: nn.Parameter(w) for name, w in weights.items()}
        for index, parameter in enumerate(self.by_name.values()):
            self.register_parameter(f"parameter_{index}", parameter)

    def forward(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()


class DeepSpeedTrainer:
    """Owns what DeepSpeed trains of one role; `decoder` computes with it, within `run` alone."""

    equal_passes = True
    """Whether all replicas must run equally many micro-batches."""

    def __init__(
        self,
        role: str,
        shape: ModelShape,
        context: ParallelContext,
        params: FlatParameters,
        weights: Mapping[str, torch.Tensor],
        spec: OptimizerSpec,
        total_steps: int,
    ) -> None:
        """`params`: where trained parameters go, whole or rows of them. `weights`: the whole ones."""
        self._role, self._context, self._params = role, context, params
        self._spec, self._total_steps = spec, total_steps
        module = _Work(weights)
        self._parameters = module.by_name
        self.optimizer_boxes: Mapping[str, Box] = optimizer_boxes(shape, context.strategy, context.at)
        """The box of each parameter whose optimizer states this rank gives away."""
        self.decoder = Decoder(shape, context, params.flat.dtype, dict(module.by_name))
        self._engine = self._initialize(module)
        self.num_steps = 0

    @property
    def state_buffers(self) -> Mapping[str, tuple[torch.Tensor, ...]]:
        """Nothing that others may move: DeepSpeed offloads its states itself."""
        return {"gradients": (), "optimizer": ()}

    @torch.no_grad()
    def optimizer_state(self) -> Mapping[str, Mapping[str, torch.Tensor]]:
        """Copies of the states as the own backend has them, for checkpoints; all ranks must call it."""
        names = (EXP_AVG, EXP_AVG_SQ)
        states: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
        for parameter_name, parameter in self._parameters.items():
            for name in names:
                whole = self._whole_state(parameter, name)
                box = self.optimizer_boxes.get(parameter_name)
                if box is not None:
                    states[name][parameter_name] = whole[box.slices].clone()
        return states

    def _whole_state(self, parameter: nn.Parameter, name: str) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._context.strategy.zero == 0:
            state: torch.Tensor | None = self._engine.optimizer.state[parameter][name]
        else:
            state = safe_get_full_optimizer_state(parameter, name)
        assert state is not None, f"deepspeed has no {name}"
        return state

    def resume(self, num_steps: int) -> None:
        raise InputError(f"experiment: training_backend: {NO_RESUME}")

    def zero_gradients(self) -> None:
        """DeepSpeed clears them after a step."""

    def run(self, batches: Sequence[MicroBatch], loss: Loss) -> None:
        """Forward and backward of all micro-batches; `loss` as in `runtime.pipeline.run_training`."""
        for index, batch in enumerate(batches):
            self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            contribution = self._engine(lambda batch=batch: self._pass(batch, loss))
            # DeepSpeed averages over replicas; the losses are contributions to a sum
            self._engine.backward(contribution * self._context.strategy.dp)

    def _pass(self, batch: MicroBatch, loss: Loss) -> torch.Tensor:
        assert batch.tokens is not None, "a model without a pipeline has its tokens"
        return loss(self.decoder.forward(batch.tokens, batch.packed), batch)

    def step(self) -> Mapping[str, float]:
        """Clips, steps, copies the parameters out; returns the gradient norm and the learning rate.

        Raises RunError when the norm is not finite.
        """
        rate = learning_rate(self._spec, self.num_steps, self._total_steps)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        replicated = self._replicated_norm() if self._context.strategy.zero == 0 else 0.0
        self._engine.step()
        known = self._engine.get_global_grad_norm()  # None where the optimizer is not DeepSpeed's
        norm = float(replicated if known is None else known)
        if not math.isfinite(norm):
            raise RunError(
                f"role {self._role}: the gradient norm is {norm} at optimizer step {self.num_steps + 1}; "
                f"lower its learning rate or look at the rewards."
            )
        self.num_steps += 1
        self._copy_out()
        return {"grad_norm": norm, "learning_rate": rate}

    @torch.no_grad()
    def _replicated_norm(self) -> float:
        """Without ZeRO every rank has all gradients, reduced by the last backward."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def _copy_out(self) -> None:
        for name, parameter in self._parameters.items():
            with self._whole(parameter):
                if name in self._params.boxes:
                    self._params.views[name].copy_(parameter.data[self._params.boxes[name].slices])

    @contextmanager
    def _whole(self, parameter: nn.Parameter) -> Iterator[None]:
        if self._context.strategy.zero < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield

    def _initialize(self, module: _Work) -> Any:
        try:
            import deepspeed
        except ImportError as error:
            raise InputError(
                f"experiment: training_backend: deepspeed cannot be imported ({error}); install it with: "
                f"pip install deepspeed."
            ) from None
        # set by torchrun where that started this rank; DeepSpeed insists on it, and picks no device by it
        os.environ.setdefault("LOCAL_RANK", str(self._context.rank))
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # otherwise its start compiles a shared-memory extension, for minutes, and hangs where that was killed
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        spec = self._spec
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=spec.learning_rate,
            betas=(spec.beta1, spec.beta2),
            eps=spec.eps,
            weight_decay=spec.weight_decay,
        )
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self._configuration(), dist_init_required=False
        )
        return engine

    def _configuration(self) -> dict[str, Any]:
        strategy = self._context.strategy
        zero: dict[str, Any] = {"stage": strategy.zero, "overlap_comm": False}
        if strategy.zero == 3:
            zero["stage3_param_persistence_threshold"] = 0
        if strategy.offload and strategy.zero:
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self._spec.clip_norm,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # its own AdamW would be compiled first
            "steps_per_print": 1 << 60,
        }
