"""train_steps*.npz: consecutive optimizer steps of the authors' training loop, through the project's own step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from golden_checks.views import stored_crop

from alice_jax import optimizer, schedules, train_state
from alice_jax.interop import casa as casa_names
from alice_jax.interop import heads as head_names
from alice_jax.interop import names
from alice_jax.interop import nnformer as backbone_names
from alice_jax.models.casa import CASA
from alice_jax.models.heads import Head
from alice_jax.models.nnformer import NNFormer
from alice_jax.objectives import alice

PATTERNS = ("train_steps*.npz",)
KEY = jax.random.key(0)
# Losses: relative limits before and from this step on (rounding grows with every update).
EARLY_STEPS, EARLY_LOSS, LATE_LOSS = 3, 1e-4, 2e-3
PARAMETERS, CENTERS, GRADIENTS = 3e-5, 2e-5, 3e-3  # absolute, absolute, of the largest element
OUTPUTS = 5e-5
SCALAR = 1e-6


def check(report) -> None:
    """All steps of the file, from the stored start."""
    steps = len({name.split("/")[0] for name in report.arrays if name.startswith("step")})
    run = _Run(report)
    run.check_start()
    for index in range(steps):
        run.check_step(index)


def strict(tree, position_index: str) -> dict[str, np.ndarray]:
    """The whole state dict of a student or teacher, with buffers and what the project fills in."""
    backbone = backbone_names.to_torch(tree["backbone"], position_index)
    head = head_names.to_torch(tree["head"])
    return {f"backbone.{n}": x for n, x in backbone.items()} | {f"head.{n}": x for n, x in head.items()}


def named(tree, kind: str) -> dict[str, np.ndarray]:
    """The authors' names and layouts of what the project has, without what it fills in for strict loading."""
    state = {}
    for part, table in (("backbone", backbone_names), ("head", head_names)):
        tensors = names.to_torch(table.RULES, tree[part], part)
        state |= {f"{kind}/{part}.{name}": value for name, value in tensors.items()}
    if "casa" in tree:
        tensors = names.to_torch(casa_names.RULES, tree["casa"], "casa")
        state |= {f"casa/{name}": value for name, value in tensors.items()}
    return state


def labels(tree, values) -> dict[str, object]:
    """One value for each tensor, by the authors' names: `values` has the tree's structure."""
    wide = jax.tree.map(lambda x, value: np.full(np.shape(x), value), tree, values)
    return {name: tensor.flat[0] for name, tensor in named(wide, "student").items()}


class _Run:
    def __init__(self, report):
        self.report, self.config = report, report.config
        config, arrays = self.config, report.arrays
        self.per_epoch = config["niter"]
        state = self._stored("init/student/")
        self.alice = alice.Alice(
            mode=alice.MODES["release"],
            backbone=NNFormer(
                width=config["E"],
                heads=tuple(config["heads"]),
                drop_path=0.0,
                position_index=backbone_names.position_index(_part(state, "backbone.")),
                mask_tokens=False,
            ),
            head=Head(
                width=8 * config["E"],
                hidden=config["hidden"],
                bottleneck=config["bott"],
                prototypes=config["out_dim"],
                token_prototypes=config["out_dim"],
            ),
            casa=CASA(
                width=config["out_dim"],
                inner=config["d_inner"],
                heads=config["n_head"],
                head_dim=config["d_k"],
                dropout=0.0,
                query_residual=True,
            ),
            weights=alice.Weights(),
            mask_ratio=config["ratio"],
        )
        params = {
            "backbone": backbone_names.from_torch(_part(state, "backbone."), mask_token=False),
            "head": head_names.from_torch(_part(state, "head."), separate_last=True),
            "casa": casa_names.from_torch(self._stored("init/casa/")),
        }
        grid = tuple(n // 2 for n in config["img"])
        extra = {
            "teacher": self.alice.teacher_of(params),
            "center_cls": jnp.zeros(config["out_dim"]),
            "center_tokens": jnp.zeros(config["out_dim"]),
            "position": {
                name: arrays[f"init/{name}_absolute_pos_embed"].reshape(1, *grid, -1) for name in ("student", "teacher")
            },
        }
        self.schedules = self._schedules()
        self.objective = alice.make(
            self.alice,
            **self.schedules,
            clip=config["clip"],
            held_steps=config["freeze"] * self.per_epoch,
        )
        self.state = train_state.TrainState(
            step=jnp.int32(0), params=params, extra=extra, opt_state=self.objective.optimizer.init(params)
        )
        self.groups = labels(params, optimizer.by_rules(params, alice.GROUP_RULES))
        self.step = jax.jit(self._step)

    def _stored(self, prefix: str) -> dict[str, np.ndarray]:
        return _part(self.report.arrays, prefix)

    def _schedules(self):
        config, per_epoch = self.config, self.per_epoch
        total, warmup = config["epochs"] * per_epoch, config["warmup"] * per_epoch
        cls_from, cls_to, tokens_from, tokens_to = config["temps"]
        return {
            "learning_rate": lambda i: schedules.warmup_cosine(i, config["lr"], config["min_lr"], total, warmup),
            "weight_decay": lambda i: schedules.warmup_cosine(i, *config["wd"], total),
            "momentum": lambda i: schedules.warmup_cosine(i, config["mom"], 1.0, total),
            "temperature_cls": lambda i: schedules.ramp(i // per_epoch, cls_from, cls_to, config["twarm"]),
            "temperature_tokens": lambda i: schedules.ramp(i // per_epoch, tokens_from, tokens_to, config["twarm"]),
        }

    def _step(self, state, batch):
        """The project's step, and what it hides: one compiled function, so that shared work is done once."""

        def loss(params):
            return self.objective.loss(params, state.extra, batch, KEY, state.step, True)[0]

        gradients = jax.grad(loss)(state.params)
        clip = alice.clipping(self.alice, self.config["clip"])
        clipped, _ = clip.update(gradients, clip.init(gradients))
        outputs = self.alice.forward(state.params, state.extra, batch, KEY, True)
        return *train_state.make_train_step(self.objective, KEY)(state, batch), gradients, clipped, outputs

    # ---------------------------------------------------------------- the start

    def check_start(self) -> None:
        report, arrays = self.report, self.report.arrays
        ours = named(self.state.params, "student")
        for name in [name for name in arrays if name.startswith(("init/student/", "init/casa/"))]:
            self._weight(name, ours.get(name.removeprefix("init/")))
        teacher = named(self.state.extra["teacher"], "teacher")
        index = self.alice.backbone.position_index
        whole = [strict(tree, index) for tree in (self.state.params, self.state.extra["teacher"])]
        equal = [name for name in whole[1] if np.array_equal(whole[0][name], whole[1][name])]
        self._same_names("init/teacher_names_equal_to_student", equal)
        report.equal("init/teacher_names_stored_separately", [name for name in whole[1] if name not in equal])
        for name in report.arrays["init/teacher_names_stored_separately"]:
            report.equal(f"init/teacher/{name}", teacher[f"teacher/{name}"])
        report.configuration("init/student_absolute_pos_embed", "init/teacher_absolute_pos_embed")
        report.configuration(*(name for name in arrays if name.startswith("volume")))
        self._same_names("named_parameters/student", ours, "student/")
        self._same_names("named_parameters/teacher", teacher, "teacher/")
        self._same_names("named_parameters/casa", ours, "casa/")
        self._same_names("ema_common_names", teacher, "teacher/")
        decayed = {name for name, group in self.groups.items() if group in ("decayed", "held")}
        self._same_names("optimizer_group0_decayed", decayed)
        self._same_names("optimizer_group1_not_decayed", {n for n, g in self.groups.items() if g == "plain"})
        self._same_names("preclip_grad_norm_names", {n for n, g in self.groups.items() if g != "frozen"}, "student/")
        self._same_names("sumsq_names", {**ours, **teacher})

        steps = np.arange(len(arrays["lr_schedule"]))
        for name, schedule in (("lr", "learning_rate"), ("wd", "weight_decay"), ("momentum", "momentum")):
            report.close(f"{name}_schedule", self.schedules[schedule](steps), SCALAR, scale="relative")
        epochs = np.arange(len(arrays["teacher_temp_schedule"])) * self.per_epoch
        for name, schedule in (("teacher_temp", "temperature_cls"), ("teacher_patch_temp", "temperature_tokens")):
            report.close(f"{name}_schedule", self.schedules[schedule](epochs), SCALAR, scale="relative")

    def _weight(self, name: str, ours: np.ndarray | None) -> None:
        """A weight of the start: what we have went to our layout and back; the rest is never used."""
        if ours is not None:
            self.report.equal(name, ours)
        elif name.endswith("relative_position_index"):
            part = _part(self._stored("init/student/"), "backbone.")
            filled = backbone_names.to_torch(self.state.params["backbone"], backbone_names.position_index(part))
            self.report.equal(name, filled[name.removeprefix("init/student/backbone.")])
        else:
            self.report.unused(name)

    def _same_names(self, array: str, ours, prefix: str = "") -> None:
        """The golden list of names, against ours in its order plus those that no output depends on."""
        golden = [str(name) for name in self.report.arrays[array]]
        mine = {name.removeprefix(prefix) for name in ours if name.startswith(prefix)}
        kept = [name for name in golden if name in mine or unused(name)]
        missing = sorted(mine - set(golden))
        self.report.equal(array, np.array(kept + missing))

    # ---------------------------------------------------------------- a step

    def check_step(self, index: int) -> None:
        report, at = self.report, f"step{index}/"
        batch = self._batch(at)
        before = self.state
        self.state, metrics, gradients, clipped, outputs = self.step(before, batch)

        limit = EARLY_LOSS if index < EARLY_STEPS else LATE_LOSS
        weights, mode = self.alice.weights, self.alice.mode
        losses = {
            "loss_cls": weights.invariance * metrics["loss_invariance"],
            "loss_patch": weights.alignment * metrics["loss_alignment"],
            "loss_recon": weights.reconstruction * mode.reconstruction_scale * metrics["loss_reconstruction"],
            "loss_loss": metrics["loss"],
        }
        for name, value in losses.items():
            report.close(at + name, value, limit, scale="relative")
        report.close(at + "lr", self.schedules["learning_rate"](index), SCALAR, scale="relative")
        decay = np.array([self.schedules["weight_decay"](index), 0.0])
        report.close(at + "weight_decay_group0_group1", decay, SCALAR, scale="relative")
        report.close(at + "ema_momentum", self.schedules["momentum"](index), SCALAR, scale="relative")
        report.equal(at + "epoch", np.array(index // self.per_epoch))
        report.configuration(at + "query_name", at + "anchor_name", at + "query_point_xyz", at + "anchor_point_xyz")
        self._check_outputs(at, before, batch, outputs)
        self._check_gradients(at, index, gradients, clipped)
        self._check_state(at, index)

    def _batch(self, at: str) -> dict[str, np.ndarray]:
        """The crops, cut from the stored volumes around the stored points, and the masks as cells."""
        arrays, report = self.report.arrays, self.report
        volumes = {}
        for view in ("query", "anchor"):
            volume = arrays[f"volume{str(arrays[at + view + '_name']).rsplit('_', 1)[1]}"]
            point, shape = arrays[f"{at}{view}_point_xyz"], np.array(self.config["img"])
            volumes[view] = np.stack([[stored_crop(item[0], point, shape)] for item in volume])
            report.equal(at + view, volumes[view])
        stride = self.config["mp"] // 2
        masks = [arrays[at + f"mask{view}"][:, 0, ::stride, ::stride, ::stride] for view in range(2)]
        report.configuration(at + "mask0", at + "mask1")
        crops = np.stack([volumes["query"][:, 0], volumes["anchor"][:, 0]], axis=1)
        hidden = np.stack(masks, axis=1) > 0
        hidden = np.repeat(hidden, len(crops) // len(hidden), axis=0)
        return {"volumes": crops[..., None], "hidden": hidden, "weights": np.ones(len(crops), np.float32)}

    def _check_outputs(self, at: str, state, batch, outputs) -> None:
        report, arrays = self.report, self.report.arrays
        recon = np.asarray(by_view(outputs.reconstruction), np.float64)[..., 0][:, None]
        statistics = [recon.mean(), recon.std(), recon.min(), recon.max(), np.abs(recon).sum()]
        limit = OUTPUTS if int(state.step) < EARLY_STEPS else LATE_LOSS
        report.close(at + "student_recon_stats", np.array(statistics), limit)
        if at + "student_cls" not in arrays:
            return
        report.close(at + "student_recon_sub2", recon[:, :, ::2, ::2, ::2], limit)
        got = {
            "student_cls": outputs.student_cls,
            "teacher_cls": outputs.teacher_cls,
            "feat1_ali": outputs.aligned,
            "feat2_ali": outputs.aligned_target,
        }
        sides = (
            ("student", state.params, self.alice.head, batch["hidden"]),
            ("teacher", state.extra["teacher"], self.alice.teacher_head, None),
        )
        for side, params, head, hidden in sides:
            volumes = batch["volumes"].reshape(-1, *batch["volumes"].shape[2:])
            flat = None if hidden is None else hidden.reshape(-1, *hidden.shape[2:])
            position = state.extra["position"][side]
            model, variables = self.alice.backbone, {"params": params["backbone"]}
            skips = model.apply(variables, volumes, flat, position, method="encode")
            # The release flattens the decoder's spatial axes in the order (height, width, depth).
            decoder = model.apply(variables, skips, method="decode_tokens").transpose(0, 2, 3, 1, 4)
            for name, tokens, source in (("enc", skips[-1], "encoder"), ("dec", decoder, "decoder")):
                head_variables = {"params": params["head"]}
                features = head.apply(head_variables, alice.as_sequence(tokens), source, method="project")
                got[f"{side}_{name}_tokens"] = head.apply(head_variables, features, "tokens", method="logits")
        for name, value in got.items():
            report.close(at + name, by_view(value), limit)

    def _check_gradients(self, at: str, index: int, gradients, clipped) -> None:
        report, arrays = self.report, self.report.arrays
        raw = {name: np.linalg.norm(value) for name, value in named(gradients, "student").items()}
        norms = [raw[f"student/{name}"] for name in arrays["preclip_grad_norm_names"]]
        report.close(at + "preclip_grad_norms", np.array(norms), GRADIENTS)
        seen = named(clipped, "student")
        for name in [name for name in arrays if name.startswith(at + "grad_after_clip/")]:
            report.close(name, seen[name.removeprefix(at + "grad_after_clip/")], GRADIENTS)
        held = index < self.config["freeze"] * self.per_epoch
        idle = {name for name, group in self.groups.items() if group == "frozen" or (held and group == "held")}
        self._same_names(at + "names_with_grad_None_at_optimizer_step", idle)

    def _check_state(self, at: str, index: int) -> None:
        report, arrays = self.report, self.report.arrays
        params, extra = self.state.params, self.state.extra
        ours = named(params, "student") | named(extra["teacher"], "teacher")
        for name in [name for name in arrays if name.startswith(at + "param/")]:
            key = name.removeprefix(at + "param/")
            if unused(key):
                report.unused(name)
            else:
                report.close(name, ours[key], PARAMETERS, scale="absolute")
        report.close(at + "center", extra["center_cls"][None], CENTERS, scale="absolute")
        report.close(at + "center2", extra["center_tokens"][None, None], CENTERS, scale="absolute")

        squares = arrays[at + "sumsq_all_params"].copy()  # what nothing depends on is never touched
        compared = np.ones(len(squares), bool)
        for i, name in enumerate(map(str, arrays["sumsq_names"])):
            compared[i] = not unused(name) and not name.endswith(("attn.qkv.bias", "attn.kv.bias"))
            if compared[i]:
                squares[i] = np.sum(np.square(ours[name].astype(np.float64)))
        for array in ("sumsq_all_params", "sumsq_all_params_f64run"):
            report.close(at + array, squares, SCALAR, scale="max", where=compared)
            report.key_bias(at + array)

        counts = {group: adam_count(state) for group, state in self.state.opt_state[1].inner_states.items()}
        active = {name: counts[group] for name, group in self.groups.items() if group != "frozen" and counts[group]}
        golden = [str(name) for name in arrays[at + "adamw_step_names"]]
        self._same_names(at + "adamw_step_names", active)
        report.equal(at + "adamw_step_count", np.array([active.get(name, 0) for name in golden], float))


def adam_count(state) -> int:
    """How many updates Adam has made in an optimizer state; 0 where there is no Adam."""
    is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
    return max((int(x.count) for x in jax.tree.leaves(state, is_leaf=is_adam) if is_adam(x)), default=0)


def unused(name: str) -> bool:
    """Parameters of the release that no output depends on; the project has none of them."""
    last = name.split("/")[-1]
    return "mask_token" in last or last.startswith("projection_") or "final.1." in last or "final.2." in last


def _part(state, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def by_view(rows):
    """Our order of rows, the two views of a sample side by side, in the release's: all of view 0, then of view 1."""
    return jnp.reshape(jnp.swapaxes(jnp.reshape(rows, (-1, 2, *rows.shape[1:])), 0, 1), rows.shape)
