"""Alice: reconstruct, agree across patients, align tokens (Jiang et al., ICCV 2023, arXiv 2302.05615).

One code path serves the paper's method and the release's; `Mode` names every difference between them.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from alice_jax import losses, optimizer
from alice_jax.data.masks import hidden_count
from alice_jax.models.backbone import Backbone
from alice_jax.models.casa import CASA
from alice_jax.models.heads import Head, shared_last
from alice_jax.objectives import Batch, Objective

Tree = Any
Schedule = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Mode:
    """What the paper's figures and the released code do differently.

    Attributes:
      casa_on: CASA attends between the head's bottleneck "features" and prototypes follow, or on the prototype
        "logits" themselves.
      visible_queries: CASA's queries are the student's visible encoder tokens; otherwise all of them.
      target_tokens: the target side's keys and values are the teacher's "encoder" or "decoder" tokens.
      teacher_twins: the target side runs on EMA twins of the whole head and of CASA; otherwise on the student's CASA
        and on a head with one last layer for both kinds of logits.
      teacher_noise: drop path and dropout also act on the target side.
      share_mask: all samples of a batch hide the same cells.
      hidden_only: the reconstruction error runs over the hidden voxels; otherwise over all.
      reconstruction_scale: factor on λ₃.
      position_embedding: a fixed random table is added to the tokens, another one for the teacher.
      clip_each_tensor: clip each tensor of backbone and head, CASA not; otherwise the global norm.
    """

    casa_on: str
    visible_queries: bool
    target_tokens: str
    teacher_twins: bool
    teacher_noise: bool
    share_mask: bool
    hidden_only: bool
    reconstruction_scale: float
    position_embedding: bool
    clip_each_tensor: bool


MODES = {
    "paper": Mode(
        casa_on="features",
        visible_queries=True,
        target_tokens="encoder",
        teacher_twins=True,
        teacher_noise=False,
        share_mask=False,
        hidden_only=True,
        reconstruction_scale=1.0,
        position_embedding=False,
        clip_each_tensor=False,
    ),
    "release": Mode(
        casa_on="logits",
        visible_queries=False,
        target_tokens="decoder",
        teacher_twins=False,
        teacher_noise=True,
        share_mask=True,
        hidden_only=False,
        reconstruction_scale=0.5,
        position_embedding=True,
        clip_each_tensor=True,
    ),
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """λ₁, λ₂, λ₃ of the total loss; what a zero makes unnecessary is not computed."""

    invariance: float = 1.0
    alignment: float = 1.0
    reconstruction: float = 10.0


@flax.struct.dataclass
class Outputs:
    """Arrays of both views of a batch, one after the other on the first axis; None where no loss needs it."""

    student_cls: Any = None  # (2·batch, prototypes)
    teacher_cls: Any = None  # (2·batch, prototypes)
    aligned: Any = None  # (2·batch, queries, prototypes), S
    aligned_target: Any = None  # (2·batch, queries, prototypes), T
    reconstruction: Any = None  # (2·batch, depth, height, width, 1)


def stream(key: jax.Array, name: str) -> jax.Array:
    """The random stream of that name."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def as_sequence(tokens: jax.Array) -> jax.Array:
    """`(batch, d, h, w, channels)` to `(batch, d·h·w, channels)`."""
    return tokens.reshape(tokens.shape[0], -1, tokens.shape[-1])


def visible_tokens(tokens: jax.Array, hidden: jax.Array, mask_ratio: float) -> jax.Array:
    """The tokens `(batch, tokens, channels)` of the cells that are not hidden, in order; their number is fixed."""
    hidden = hidden.reshape(hidden.shape[0], -1)
    count = hidden.shape[1] - hidden_count(hidden.shape[1], mask_ratio)
    order = jnp.argsort(hidden, axis=1, stable=True)[:, :count]
    return jnp.take_along_axis(tokens, order[..., None], axis=1)


@dataclasses.dataclass(frozen=True)
class Alice:
    """The networks and how a mode wires them.

    Parameters are {"backbone", "head", "casa"}; extra state is {"teacher", "center_cls", "center_tokens"} and, in
    release mode, {"position": {"student", "teacher"}}.
    """

    mode: Mode
    backbone: Backbone
    head: Head
    casa: CASA
    weights: Weights
    mask_ratio: float

    @property
    def teacher_head(self) -> Head:
        return self.head if self.mode.teacher_twins else self.head.clone(separate_last=False)

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """Random parameters, a teacher that starts as the student's copy, and centers at zero."""
        volumes = jnp.zeros_like(batch["volumes"][:1, 0])
        backbone = self.backbone.init(stream(key, "backbone"), volumes)["params"]
        encoder = jnp.zeros((1, 1, self.backbone.encoder_channels))
        decoder = jnp.zeros((1, 1, self.backbone.decoder_channels))
        head = self.head.init(stream(key, "head"), encoder[:, 0], encoder, decoder)["params"]
        token = jnp.zeros((1, 1, self.casa.width))
        casa = self.casa.init(stream(key, "casa"), token, token)["params"]
        params = {"backbone": backbone, "head": head, "casa": casa}
        extra = {
            "teacher": self.teacher_of(params),
            "center_cls": jnp.zeros((self.head.prototypes,)),
            "center_tokens": jnp.zeros((self.head.token_prototypes,)),
        }
        if self.mode.position_embedding:
            skips = jax.eval_shape(lambda: self.backbone.apply({"params": backbone}, volumes, method="encode"))
            shape = skips[0].shape
            extra["position"] = {
                name: 0.02 * jax.random.normal(stream(key, f"position_{name}"), shape)
                for name in ("student", "teacher")
            }
        return params, extra

    def teacher_of(self, params: Tree) -> Tree:
        """The student's copy that the teacher starts from."""
        if self.mode.teacher_twins:
            return jax.tree.map(jnp.copy, params)
        student = {"backbone": params["backbone"], "head": shared_last(params["head"])}
        return jax.tree.map(jnp.copy, student)

    def forward(self, params: Tree, extra: Tree, batch: Batch, key: jax.Array, train: bool) -> Outputs:
        """Student and teacher on both views of a batch.

        Args:
          batch: "volumes" `(batch, 2, depth, height, width, 1)` and "hidden" `(batch, 2, grid_d, grid_h, grid_w)`.
        """
        mode, weights = self.mode, self.weights
        volumes = batch["volumes"].reshape(-1, *batch["volumes"].shape[2:])
        hidden = batch["hidden"]
        if mode.share_mask:
            hidden = jnp.broadcast_to(hidden[:1], hidden.shape)
        hidden = hidden.reshape(-1, *hidden.shape[2:])
        teacher = jax.lax.stop_gradient(extra["teacher"])
        position = extra.get("position", {"student": None, "teacher": None})
        teacher_train = train and mode.teacher_noise

        def rngs(name: str) -> dict[str, jax.Array]:
            return {kind: stream(key, f"{name}_{kind}") for kind in ("drop_path", "dropout")}

        def backbone(tree, name, method, *args, train):
            return self.backbone.apply({"params": tree["backbone"]}, *args, train=train, method=method, rngs=rngs(name))

        def head(tree, module, method, *args):
            return module.apply({"params": tree["head"]}, *args, method=method)

        def casa(tree, name, query, context, train):
            return self.casa.apply({"params": tree["casa"]}, query, context, train=train, rngs=rngs(name))

        out = Outputs()
        skips = backbone(params, "encoder", "encode", volumes, hidden, position["student"], train=train)
        if weights.alignment or weights.reconstruction:
            decoder_tokens = backbone(params, "decoder", "decode_tokens", skips, train=train)
        if weights.reconstruction:
            voxels = backbone(params, "voxels", "decode_voxels", skips, decoder_tokens, train=train)
            out = dataclasses.replace(out, reconstruction=voxels)
        if not (weights.invariance or weights.alignment):
            return out

        teacher_skips = backbone(
            teacher, "teacher_encoder", "encode", volumes, None, position["teacher"], train=teacher_train
        )

        def cls_logits(tree, module, skips):
            features = head(tree, module, "project", self.backbone.cls_of(skips[-1]), "cls")
            return head(tree, module, "logits", features, "cls")

        if weights.invariance:
            out = dataclasses.replace(
                out,
                student_cls=cls_logits(params, self.head, skips),
                teacher_cls=cls_logits(teacher, self.teacher_head, teacher_skips),
            )
        if weights.alignment:

            def casa_input(tree, module, tokens, source):
                features = head(tree, module, "project", as_sequence(self.backbone.features_of(tokens)), source)
                return head(tree, module, "logits", features, "tokens") if mode.casa_on == "logits" else features

            target_tokens = teacher_skips[-1]
            if mode.target_tokens == "decoder":
                target_tokens = backbone(
                    teacher, "teacher_decoder", "decode_tokens", teacher_skips, train=teacher_train
                )
            query = casa_input(params, self.head, skips[-1], "encoder")
            if mode.visible_queries:
                query = visible_tokens(query, hidden, self.mask_ratio)
            online = casa_input(params, self.head, decoder_tokens, "decoder")
            target = casa_input(teacher, self.teacher_head, target_tokens, mode.target_tokens)
            # The queries are the student's on both sides, so the target side is cut off from the gradient here.
            target_query, target_casa = jax.lax.stop_gradient((query, params))
            if mode.teacher_twins:
                target_casa = teacher
            aligned = casa(params, "casa", query, online, train)
            aligned_target = casa(target_casa, "teacher_casa", target_query, target, teacher_train)
            if mode.casa_on == "features":
                aligned = head(params, self.head, "logits", aligned, "tokens")
                aligned_target = head(teacher, self.teacher_head, "logits", aligned_target, "tokens")
            out = dataclasses.replace(out, aligned=aligned, aligned_target=jax.lax.stop_gradient(aligned_target))
        return out

    def features(self, params: Tree, extra: Tree, batch: Batch) -> dict[str, jax.Array]:
        """The teacher's last tokens of whole crops, `(2·batch·tokens, channels)`, and each crop's feature."""
        volumes = batch["volumes"].reshape(-1, *batch["volumes"].shape[2:])
        position = extra["position"]["teacher"] if "position" in extra else None
        weights = {"params": extra["teacher"]["backbone"]}
        skips: Any = self.backbone.apply(weights, volumes, None, position, train=False, method="encode")
        tokens = skips[-1]
        return {"tokens": tokens.reshape(-1, tokens.shape[-1]), "crops": self.backbone.cls_of(tokens)}

    def losses(
        self, outputs: Outputs, extra: Tree, batch: Batch, temperature_cls: Any, temperature_tokens: Any
    ) -> tuple[jax.Array, tuple[Tree, dict[str, jax.Array]]]:
        """Total loss, the mean teacher logits that move the centers, and the metrics.

        Each pair's losses count `batch["weights"]` `(batch,)` times; the centers are those of all pairs alike.
        """
        weights, total = self.weights, jnp.zeros(())
        of_pairs = batch["weights"]
        metrics: dict[str, jax.Array] = {}
        stats: dict[str, jax.Array] = {}

        def by_pair(x: jax.Array) -> jax.Array:
            return x.reshape(-1, 2, *x.shape[1:])

        if weights.invariance:
            target = losses.teacher_distribution(outputs.teacher_cls, extra["center_cls"], temperature_cls)
            value = losses.invariance(by_pair(target), by_pair(outputs.student_cls), of_pairs)
            total += weights.invariance * value
            metrics |= {"loss_invariance": value, "teacher_entropy": losses.entropy(target)}
            stats["center_cls"] = outputs.teacher_cls.astype(jnp.float32).mean(0)
        if weights.alignment:
            target = losses.teacher_distribution(outputs.aligned_target, extra["center_tokens"], temperature_tokens)
            value = losses.alignment(by_pair(target), by_pair(outputs.aligned), of_pairs)
            total += weights.alignment * value
            metrics |= {"loss_alignment": value, "teacher_entropy_tokens": losses.entropy(target)}
            stats["center_tokens"] = outputs.aligned_target.astype(jnp.float32).mean((0, 1))
        if weights.reconstruction:
            volumes = batch["volumes"].reshape(outputs.reconstruction.shape)
            hidden = batch["hidden"].reshape(-1, *batch["hidden"].shape[2:]) if self.mode.hidden_only else None
            value = losses.reconstruction(outputs.reconstruction, volumes, hidden, of_pairs.repeat(2))
            total += weights.reconstruction * self.mode.reconstruction_scale * value
            metrics["loss_reconstruction"] = value
        metrics |= {f"norm_{name}": jnp.linalg.norm(extra[name]) for name in ("center_cls", "center_tokens")}
        return total, (stats, metrics)

    def update(self, params: Tree, extra: Tree, stats: Tree, momentum: Any) -> Tree:
        """The teacher follows the *updated* student, and the centers the teacher's mean logits."""
        student = {name: params[name] for name in extra["teacher"]}
        student["head"] = {name: student["head"][name] for name in extra["teacher"]["head"]}
        teacher = jax.tree.map(lambda t, s: momentum * t + (1 - momentum) * s, extra["teacher"], student)
        return self.moved_centers(extra, stats) | {"teacher": teacher}

    def moved_centers(self, extra: Tree, stats: Tree) -> Tree:
        """`extra` with the centers after a batch whose mean teacher logits are `stats`."""
        return extra | {name: losses.moved_center(extra[name], mean) for name, mean in stats.items()}


# Which parameters are decayed, frozen at first, or never trained.
GROUP_RULES: optimizer.Rules = [
    (r"^head/last(_tokens)?/gain$", "frozen"),  # weight normalisation with its gain fixed at 1
    (r"^head/last(_tokens)?/", "held"),
    *optimizer.DECAY_RULES,
]


def clipping(alice: Alice, limit: float) -> optax.GradientTransformation:
    """By global norm over everything that is trained; release: each tensor on its own, CASA not at all."""
    if not alice.mode.clip_each_tensor:
        return optax.clip_by_global_norm(limit)
    return optax.masked(
        optimizer.clip_each_tensor(limit),
        lambda params: optimizer.by_rules(params, [(r"^casa/", False), (r"", True)]),
    )


def make(
    alice: Alice,
    *,
    learning_rate: Schedule,
    weight_decay: Schedule,
    momentum: Schedule,
    temperature_cls: Schedule,
    temperature_tokens: Schedule,
    clip: float,
    held_steps: int,
) -> Objective:
    """The objective for the training loop. All schedules are functions of the step.

    Args:
      clip: gradient norm limit.
      held_steps: updates during which the head's last layers stay as they are.
    """

    def loss(params, extra, batch, key, step, train):
        outputs = alice.forward(params, extra, batch, key, train)
        return alice.losses(outputs, extra, batch, temperature_cls(step), temperature_tokens(step))

    def update(params, extra, stats, step):
        return alice.update(params, extra, stats, momentum(step))

    return Objective(
        init=alice.init,
        loss=loss,
        update=update,
        optimizer=optimizer.grouped_adamw(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            group_rules=GROUP_RULES,
            clip=clipping(alice, clip),
            held_steps=held_steps,
        ),
        schedules={
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "teacher_momentum": momentum,
            "teacher_temperature": temperature_cls,
        },
        features=alice.features,
    )
