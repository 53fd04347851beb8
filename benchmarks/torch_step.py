"""Release mode's train step in plain PyTorch: losses, AdamW with each tensor clipped on its own, teacher, centers."""

import torch
from torch import nn
from torch.nn import functional
from torch_twin import Outputs, Twin

STUDENT_TEMPERATURE = 0.1
CENTER_MOMENTUM = 0.9
WEIGHTS = {"invariance": 1.0, "alignment": 1.0, "reconstruction": 10.0 * 0.5}


def teacher_distribution(logits, center, temperature: float):
    """Centred and sharpened probabilities: logits (..., prototypes), center (prototypes,) -> (..., prototypes)."""
    return ((logits.float() - center) / temperature).softmax(-1)


def cross_entropy(student_logits, target):
    """Mean of H(target, softmax(student / τ)): both (..., prototypes)."""
    logits = student_logits.float() / STUDENT_TEMPERATURE
    return functional.cross_entropy(logits.flatten(0, -2), target.flatten(0, -2))


def losses(outputs: Outputs, volumes, center_cls, center_tokens, temperature: float):
    """The three parts of the loss, unweighted; volumes (pairs, 2, 1, d, h, w)."""
    target_cls = teacher_distribution(outputs.teacher_cls, center_cls, temperature)
    target_tokens = teacher_distribution(outputs.aligned_target, center_tokens, temperature)
    return {
        "invariance": cross_entropy(outputs.student_cls.flip(1), target_cls),  # of the pair's other crop
        "alignment": cross_entropy(outputs.aligned, target_tokens),
        "reconstruction": functional.mse_loss(outputs.reconstruction.float(), volumes),
    }


class TrainStep:
    """One update of a twin, in place. Rates are constants, since a schedule costs nothing.

    Args:
      clip: limit of the gradient norm of each tensor of the student; CASA's are not clipped.
      momentum: of the teacher.
      temperature: of the teacher, for cls and tokens.
      autocast: the dtype of `torch.autocast`, or None for float32 throughout.
      compile: runs the networks through `torch.compile`.
    """

    def __init__(
        self,
        twin: Twin,
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.04,
        clip: float = 3.0,
        momentum: float = 0.996,
        temperature: float = 0.01,
        autocast: torch.dtype | None = None,
        compile: bool = False,
    ):
        self.twin, self.clip, self.momentum, self.temperature = twin, clip, momentum, temperature
        self.autocast = autocast
        self.networks = torch.compile(twin) if compile else twin
        trained = [p for p in twin.parameters() if p.requires_grad]
        decayed, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr)

    def outputs(self, volumes, hidden) -> Outputs:
        with torch.autocast(volumes.device.type, self.autocast, enabled=self.autocast is not None):
            return self.networks(volumes, hidden)

    def loss(self, outputs: Outputs, volumes):
        twin = self.twin
        parts = losses(outputs, volumes, twin.center_cls, twin.center_tokens, self.temperature)
        return sum(WEIGHTS[name] * value for name, value in parts.items())

    def forward(self, volumes, hidden):
        """The loss () alone: student and teacher on volumes (pairs, 2, 1, d, h, w), hidden (pairs, 2, c, c, c) bool."""
        return self.loss(self.outputs(volumes, hidden), volumes)

    def __call__(self, volumes, hidden, parts: int = 1):
        """Everything; arguments as in `forward`. The loss () is the one before the update.

        Gradients of `parts` equal parts of the batch are added up before the update, for less memory. Each part takes
        its own first mask, where the whole batch takes one.
        """
        self.optimizer.zero_grad()
        means = []
        total = torch.zeros((), device=volumes.device)
        for some, cells in zip(volumes.chunk(parts), hidden.chunk(parts), strict=True):
            of_part = self.outputs(some, cells)
            loss = self.loss(of_part, some) / parts
            loss.backward()
            total += loss.detach()
            means.append((of_part.teacher_cls.float().mean((0, 1)), of_part.aligned_target.float().mean((0, 1, 2))))
        for parameter in self.twin.student.parameters():
            nn.utils.clip_grad_norm_(parameter, self.clip)
        self.optimizer.step()
        self.move_centers(means)
        self.move_teacher()
        return total

    @torch.no_grad()
    def move_centers(self, means) -> None:
        """By the teacher's logits of the batch: the means of cls and of tokens (prototypes,) of each of its parts."""
        cls, tokens = (torch.stack(of_parts).mean(0) for of_parts in zip(*means, strict=True))
        self.twin.center_cls.lerp_(cls, 1 - CENTER_MOMENTUM)
        self.twin.center_tokens.lerp_(tokens, 1 - CENTER_MOMENTUM)

    @torch.no_grad()
    def move_teacher(self) -> None:
        """By the updated student; the teacher's one last layer follows the student's of the same name, that of cls."""
        student = dict(self.twin.student.named_parameters())
        for name, parameter in self.twin.teacher.named_parameters():
            parameter.lerp_(student[name], 1 - self.momentum)
