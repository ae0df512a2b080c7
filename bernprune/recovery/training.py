"""Training of adapters in steps that repeat to the bit, with the best state on held-out text as the result.

Letters: R rows, T tokens, D hidden size.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bernprune.data import TokenWindows
from bernprune.errors import LossError, RunError
from bernprune.losses import scale_of_mean, token_divergences, token_losses
from bernprune.models.adapters import Adapters
from bernprune.recovery.masks import SampledMasks
from bernprune.sections import RecoverConfig

_LARGEST_NORM = 1.0  # of the gradient
_ADVICE = "a lower recover.learning_rate, or model.dtype=float32, may do"


class Training:
    """Adam on adapters, its step size rising at first and then falling along a cosine.

    Attributes:
        steps: done so far.
        held_out: loss on the held-out windows after each evaluation, by the number of steps done.
    """

    def __init__(
        self,
        model: Any,
        adapters: Adapters,
        train: TokenWindows,
        held_out_WT: torch.Tensor,
        settings: RecoverConfig,
        *,
        teacher: Any = None,
        masks: SampledMasks | None = None,
    ) -> None:
        """
        Args:
            held_out_WT: windows by which the best state is chosen; none of them is in ``train``.
            teacher: a model that the predictions are drawn to, for ``settings.distill``.
            masks: those of a dense model whose kept part is trained.
        """
        self._model, self._adapters, self._train, self._settings = model, adapters, train, settings
        self._held_out_WT, self._teacher, self._masks = held_out_WT, teacher, masks
        self._parameters = list(adapters.parameters.values())
        self._optimizer = torch.optim.Adam(self._parameters, lr=settings.learning_rate)
        self.total = max(1, settings.tokens // (settings.batch * train.window))
        self._every = settings.evaluate_steps or -(-self.total // 20)
        self.steps = 0
        self.held_out: dict[int, float] = {}
        self._best = adapters.state_dict()
        self._stopped: str | None = None
        if settings.recompute:
            _recomputing(model, enabled=True)

    @property
    def ended(self) -> str | None:
        """Why there is nothing more to do; None if there is."""
        if self._stopped is not None:
            return self._stopped
        if self.steps not in self.held_out:
            return None
        since = sum(step > self.best_step for step in self.held_out)
        if since >= self._settings.patience and self.steps < self.total:
            return f"the loss on held-out text had not fallen for {since} evaluations"
        return "all tokens were trained on" if self.steps >= self.total else None

    @property
    def best_step(self) -> int:
        """The number of steps after which the loss on held-out text was least; 0 is the model as it came."""
        return min(self.held_out, key=lambda step: (self.held_out[step], step))

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.steps * self._settings.batch * self._train.window

    def stop(self, reason: str) -> None:
        """End it here, with the best state so far."""
        self._stopped = reason

    def evaluate(self) -> float:
        """Mean loss on the held-out windows, nats per token; the state is kept if it is the best so far."""
        if self._masks is not None:
            self._masks.set()
        with torch.no_grad():
            losses = [
                self._cross_entropy(_hidden(self._model, rows_RT), rows_RT).item() * len(rows_RT)
                for rows_RT in self._held_out_WT.split(self._settings.rows)
            ]
        loss = sum(losses) / len(self._held_out_WT)
        if not math.isfinite(loss):
            raise LossError(f"the loss on held-out text is {loss} after {self.steps} steps; {_ADVICE}")
        self.held_out[self.steps] = loss
        if self.best_step == self.steps:
            self._best = self._adapters.state_dict()
        return loss

    def step(self) -> dict[str, float]:
        """Take a step, and evaluate if that is due; returns what happened."""
        settings, rate = self._settings, self.learning_rate(self.steps)
        tokens_BT = self._train.batch(self.steps, settings.batch)
        masks_BU = None
        if self._masks is not None:
            masks_BU = self._masks.draw(self.steps, self.steps / self.total, len(tokens_BT))
        loss, scale = 0.0, scale_of_mean(tokens_BT)
        with self._training():
            for some in torch.arange(len(tokens_BT)).split(settings.rows):
                if self._masks is not None and masks_BU is not None:
                    self._masks.set(masks_BU[some])
                part = self._loss(tokens_BT[some]) * (len(some) / len(tokens_BT))
                (part * scale).backward()
                loss += part.item()
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= scale
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, _LARGEST_NORM).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise LossError(f"the loss of step {self.steps} is {loss}, its gradient's norm {norm}; {_ADVICE}")
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.steps += 1
        record = {"loss": loss, "learning_rate": rate, "gradient_norm": norm}
        if self.steps % self._every == 0 or self.steps == self.total:
            record["held_out"] = self.evaluate()
        return record

    def learning_rate(self, step: int) -> float:
        warming = min(1.0, (step + 1) / max(1, round(self._settings.warmup * self.total)))
        return self._settings.learning_rate * warming * 0.5 * (1 + math.cos(math.pi * step / self.total))

    def finish(self) -> Any:
        """The model with the best state in its weights."""
        self._adapters.load_state_dict(self._best)
        if self._settings.recompute:
            _recomputing(self._model, enabled=False)
        return self._adapters.merge()

    def state_dict(self) -> dict[str, Any]:
        states = self._optimizer.state_dict()["state"]
        return {
            "steps": self.steps,
            "held_out": {str(step): loss for step, loss in self.held_out.items()},
            "adapters": self._adapters.state_dict(),
            "best": self._best,
            "stopped": self._stopped,
            "optimizer": {
                str(index): {name: value.detach().cpu().clone() for name, value in state.items()}
                for index, state in states.items()
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``RunError`` if it is of other adapters."""
        ours, theirs = self._adapters.state_dict(), state["adapters"]
        if {name: value.shape for name, value in ours.items()} != {n: value.shape for n, value in theirs.items()}:
            raise RunError("the checkpoint was written for other adapters")
        self.steps = state["steps"]
        self.held_out = dict(sorted((int(step), loss) for step, loss in state["held_out"].items()))
        self._adapters.load_state_dict(theirs)
        self._best, self._stopped = state["best"], state.get("stopped")
        groups = self._optimizer.state_dict()["param_groups"]
        states = {int(index): each for index, each in state["optimizer"].items()}
        self._optimizer.load_state_dict({"state": states, "param_groups": groups})

    def _loss(self, tokens_RT: torch.Tensor) -> torch.Tensor:
        """Cross-entropy and, by its share, the divergence from the teacher, nats per token."""
        hidden_RTD, share = _hidden(self._model, tokens_RT), self._settings.distill
        loss = (1 - share) * self._cross_entropy(hidden_RTD, tokens_RT) if share < 1 else hidden_RTD.new_zeros(())
        if self._teacher is not None:
            with torch.no_grad():
                theirs_RTD = _hidden(self._teacher, tokens_RT)
            head, dense_head = (each.get_output_embeddings() for each in (self._model, self._teacher))
            loss = loss + share * token_divergences(head, hidden_RTD, theirs_RTD, dense_head=dense_head).mean()
        return loss

    def _cross_entropy(self, hidden_RTD: torch.Tensor, tokens_RT: torch.Tensor) -> torch.Tensor:
        return token_losses(self._model.get_output_embeddings(), hidden_RTD, tokens_RT.to(hidden_RTD.device)).mean()

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Recompute activations going back, if that is asked for: layers in training mode do so. Only they are put in
        it, as modules within them would drop out units."""
        layers = [module for module in self._model.modules() if getattr(module, "gradient_checkpointing", False)]
        for layer in layers:
            layer.training = True
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


def _hidden(model: Any, tokens_RT: torch.Tensor) -> torch.Tensor:
    """What the output embedding reads, ``[R, T, D]``."""
    return model.base_model(input_ids=tokens_RT.to(model.device), use_cache=False).last_hidden_state


def _recomputing(model: Any, *, enabled: bool) -> None:
    """Switch recomputing, by the method's name of today or that of older versions of transformers."""
    name = f"checkpointing_{'enable' if enabled else 'disable'}"
    switch = getattr(model, f"activation_{name}", None) or getattr(model, f"gradient_{name}")
    switch()
