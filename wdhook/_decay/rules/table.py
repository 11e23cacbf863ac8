"""Every rule as one row, in the order of the checks. Also the table of docs/limits.md."""

from __future__ import annotations

from ..._base.errors import (
    AmbiguousGradientError,
    DoubleDecayError,
    LearningRateError,
    LossScaleError,
    MasterWeightsError,
    UndecayedError,
    UnsupportedOptimizerError,
    WdhookWarning,
)
from . import engines, gradients, optimizers, ownership, scaling, targets
from .base import Moment, Rule
from .conditions import (
    at_step,
    default_mode,
    gradient_in_backward,
    in_backward,
    in_gradient,
    in_parameter,
    parameter_in_backward,
)

RULES = (
    # At `attach`.
    Rule(
        "own-decay-unannounced",
        DoubleDecayError,
        Moment.ATTACH,
        optimizers.own_decay,
        situation=(
            "an optimizer that decays by itself, and whose steps torch does not announce (LOMO), "
            "given"
        ),
        answer="names the group or attribute",
    ),
    # Before a step changes anything.
    Rule(
        "own-decay",
        DoubleDecayError,
        Moment.STEP,
        optimizers.own_decay,
        situation=(
            "the optimizer's own `weight_decay` is not 0 for a decayed parameter (AdamW's default "
            "is 0.01; a loaded checkpoint brings it back)"
        ),
        answer="names the group, `adopt`, and the line that sets it to 0",
    ),
    Rule(
        "learning-rate",
        LearningRateError,
        Moment.STEP,
        optimizers.lr_is_known,
        situation=(
            "decoupled: `lr` is `None` (Adafactor's relative step), negative or not finite, or is "
            "multiplied with more than the param group tells (the SGD and AdaGrad forms of "
            "D-Adaptation)"
        ),
        answer="names `lr=`",
        applies=in_parameter,
    ),
    Rule(
        "micro-batches-in-state",
        UnsupportedOptimizerError,
        Moment.STEP,
        optimizers.takes_micro_batches,
        situation=(
            "an optimizer that takes micro-batches into its state (`optimizer_accumulation` of "
            'optimi), at `"backward"`'
        ),
        answer='names `at="step"`',
        applies=in_backward,
    ),
    Rule(
        "not-stepped-by-those-given",
        MasterWeightsError,
        Moment.STEP,
        ownership.not_stepped_by_those_given,
        situation="decoupled: a parameter has a gradient, and none of the optimizers given owns it",
        answer="names the parameter",
        applies=in_parameter,
    ),
    Rule(
        "other-learning-rate",
        LearningRateError,
        Moment.STEP,
        optimizers.lr_is_of_another,
        situation=(
            'decoupled at `"backward"`, and another optimizer steps than the one whose `lr` was '
            "read, with another `lr`"
        ),
        answer="names both",
        applies=parameter_in_backward,
    ),
    Rule(
        "gradients-with-graph",
        UnsupportedOptimizerError,
        Moment.STEP,
        optimizers.differentiates_gradients,
        situation=(
            "decoupled decay, gradients that hold their graph (`backward(create_graph=True)`, as "
            "for AdaHessian)"
        ),
        answer="decay would change what they depend on",
        applies=in_parameter,
    ),
    Rule(
        "two-sequences",
        UnsupportedOptimizerError,
        Moment.STEP,
        optimizers.has_two_sequences,
        situation=(
            "decoupled decay with an optimizer that keeps a second sequence of weights "
            "(ScheduleFree, MADGRAD)"
        ),
        answer="names `param_groups`; at `attach` where the optimizer was given",
        applies=in_parameter,
        first_steps=True,
    ),
    Rule(
        "scaler-not-given",
        LossScaleError,
        Moment.STEP,
        scaling.scaler_was_not_given,
        situation='a `GradScaler` steps, and coupled decay at `"backward"` was not given `scaler=`',
        answer="names `scaler=`",
        applies=gradient_in_backward,
    ),
    Rule(
        "grad-scale-by-hand",
        LossScaleError,
        Moment.STEP,
        scaling.grad_scale_by_hand,
        situation='an optimizer was told its `grad_scale` by hand, coupled at `"backward"`',
        answer='names `at="step"`',
        applies=gradient_in_backward,
    ),
    Rule(
        "scaler-does-not-step",
        LossScaleError,
        Moment.STEP,
        scaling.scaler_does_not_step,
        situation=(
            'a `GradScaler` was given, coupled at `"backward"`, and another one or none steps the '
            "optimizer"
        ),
        answer="names `scaler.step`; a scaler with a step of its own is taken at its word",
        applies=gradient_in_backward,
    ),
    Rule(
        "sign-turned",
        UnsupportedOptimizerError,
        Moment.STEP,
        optimizers.sign_has_turned,
        situation=(
            "`maximize` was set or unset since the backward pass, or was not known there, coupled "
            'at `"backward"`'
        ),
        answer="names `zero_grad()` and `optimizer=`",
        applies=gradient_in_backward,
    ),
    Rule(
        "pipeline-divides",
        LossScaleError,
        Moment.STEP,
        optimizers.pipeline_divides,
        situation=(
            "a pipeline schedule with `scale_grads=True` (torch's default), coupled at "
            '`"backward"`'
        ),
        answer="the schedule would divide the decay",
        applies=gradient_in_backward,
        on_change=True,
    ),
    Rule(
        "ambiguous-gradient",
        AmbiguousGradientError,
        Moment.STEP,
        gradients.ambiguous,
        situation=(
            "gradients that were moved to a buffer of your own, replaced, or put back between the "
            'backward passes of one step, coupled at `"backward"`'
        ),
        answer='names `at="step"`',
        applies=in_gradient,
        asked=True,
    ),
    Rule(
        "moved-in-the-closure",
        UnsupportedOptimizerError,
        Moment.STEP,
        scaling.moved_in_the_closure,
        situation=(
            "a wrapper that moves the parameters and lets the optimizer inside run the closure "
            'there (heavyball\'s SAM), at `"step"`'
        ),
        answer='names `at="backward"`',
        asked=True,
    ),
    Rule(
        "two-optimizers-in-turn",
        WdhookWarning,
        Moment.STEP,
        ownership.TwoStep,
        situation=(
            "an optimizer that was given and another one step the same parameters in turn (DiLoCo, "
            "Reptile)"
        ),
        answer="both decay; names `paused`",
    ),
    Rule(
        "default-mode",
        WdhookWarning,
        Moment.STEP,
        optimizers.decay_would_be_decoupled,
        situation="`mode` was not given, and the optimizer's own decay would be decoupled (AdamW)",
        answer="coupled decay; names both ways to say what is meant",
        applies=default_mode,
        on_change=True,
    ),
    Rule(
        "rounds-away",
        WdhookWarning,
        Moment.STEP,
        scaling.rounds_away,
        situation="`lr·λ` below half a unit in the last place of a bfloat16 or float16 parameter, "
        'where decay is not deferred: coupled, cautious, `low_precision="round"`, a sparse '
        "gradient",
        answer="the decay rounds away",
        on_change=True,
    ),
    Rule(
        "lost-in-gradients",
        WdhookWarning,
        Moment.STEP,
        scaling.LostInGradients,
        situation="coupled decay of bfloat16 or float16 parameters, where λ·p is less than half a "
        "unit in the last place of most values of a gradient; sampled at the 3rd step",
        answer="at the 25th step; names decoupled",
        applies=in_gradient,
    ),
    Rule(
        "lower-precision-gradient",
        WdhookWarning,
        Moment.STEP,
        gradients.lower_precision_gradient,
        situation="a gradient of lower precision than its parameter (`grad_dtype`), coupled",
        answer="λ·p is rounded to the precision of the gradient",
        applies=in_gradient,
        first_steps=True,
    ),
    # Before a step of an optimizer that owns no decayed parameter.
    Rule(
        "gradient-taken-by-engine",
        MasterWeightsError,
        Moment.FOREIGN_STEP,
        engines.taken_by_engine,
        situation=(
            "DeepSpeed's ZeRO or Megatron-core, which take gradients away in the backward pass, "
            'at `"backward"`; or a feature of theirs that hides what is stepped (NVMe, ZenFlow, '
            "Muon)"
        ),
        answer='names `at="step"`; comes at `attach` where the engine is known by then',
        on_change=True,
    ),
    Rule(
        "master-weights",
        MasterWeightsError,
        Moment.FOREIGN_STEP,
        ownership.StepsCopies,
        situation=(
            "the optimizer steps copies of the parameters (master weights), or the only optimizer "
            "given owns nothing of the model"
        ),
        answer=(
            'names `param_groups`; coupled decay at `"backward"` travels in the gradient and works'
        ),
    ),
    Rule(
        "gradient-taken",
        MasterWeightsError,
        Moment.FOREIGN_STEP,
        engines.GradientsVanish,
        situation=("an engine of another kind takes gradients away, and steps tensors of its own"),
        answer="names `param_groups`",
    ),
    Rule(
        "never-steps",
        WdhookWarning,
        Moment.FOREIGN_STEP,
        ownership.NeverSteps,
        situation=(
            "20 optimizer steps, none by an optimizer that owns a decayed parameter, and no such "
            "optimizer exists: the model, or a copy of it, is not the one that is trained"
        ),
        answer="names the handle's first parameter",
    ),
    # When a step has ended.
    Rule(
        "undecayed",
        UndecayedError,
        Moment.STEP_END,
        gradients.undecayed,
        situation=(
            "a step that calls `backward()` itself, hides its closure in other arguments, or "
            "ignores the closure"
        ),
        answer='after the step, since its gradients come into being there; names `at="backward"`',
        asked=True,
    ),
    # Met in the backward pass, or while a step pays.
    Rule(
        "gradient-replaced",
        WdhookWarning,
        Moment.STEP,
        gradients.replaced,
        situation=(
            "a gradient replaced between its decay and the step (`p.grad = f(p.grad)`), coupled at "
            '`"backward"`'
        ),
        answer="taken as derived from the decayed one: nothing is added",
        asked=True,
    ),
    Rule(
        "changed-between",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.changed_between,
        situation=(
            "a gradient changed in place between two backward passes of one step (a running mean), "
            'coupled at `"backward"`'
        ),
        answer="the decay in it was changed too",
        asked=True,
    ),
    Rule(
        "zeroed-or-changed",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.zeroed_or_changed,
        situation=(
            "as above, and no other gradient tells whether it was zeroed (a model with one decayed "
            "parameter)"
        ),
        answer="decayed again; in a distributed run, and for slices of one buffer, not",
        asked=True,
    ),
    Rule(
        "sums-without-graph",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.sums_without_graph,
        situation=(
            "`backward(create_graph=True)` of a loss that is linear in the weights, more than once "
            "before the step"
        ),
        answer="taken as new gradients: each is decayed",
        asked=True,
    ),
    Rule(
        "sparse-then-dense",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.sparse_then_dense,
        situation='a gradient that is sparse, and then dense before the step, at `"backward"`',
        answer="rows of the first may be decayed twice",
        asked=True,
    ),
    Rule(
        "second-gradient",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.second_gradient,
        situation='decoupled at `"backward"` with a second gradient before the step',
        answer="decayed once; the micro-batches see different parameters",
        asked=True,
    ),
    Rule(
        "stepped-again",
        WdhookWarning,
        Moment.STEP,
        gradients.stepped_again,
        situation=(
            "a gradient that is stepped twice without a visible change: it was stepped as it is, "
            "or refilled by `.data`, numpy or a [CUDA graph](compile.md#cuda-graphs)"
        ),
        answer="taken to hold its decay still",
        asked=True,
    ),
    Rule(
        "replayed-backward",
        WdhookWarning,
        Moment.STEP,
        gradients.replayed_backward,
        situation=(
            'a CUDA gradient that changed without a call of its hook, coupled at `"backward"`'
        ),
        answer="decayed at the step",
        asked=True,
    ),
    Rule(
        "captured",
        WdhookWarning,
        Moment.SETTER,
        gradients.captured_weight_decay,
        situation="λ set after a step was captured in a CUDA graph",
        answer="the graph replays the old λ",
    ),
    Rule(
        "unannounced-steps",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.unannounced_steps,
        situation=(
            "parameters move between backward passes, and torch announces no step: a loop without "
            "`torch.optim`, an optimizer whose `step` is replaced or never called"
        ),
        answer='at `"step"` nothing is decayed; at `"backward"` each move counts as a step, which '
        "is right and needs no word",
        applies=at_step,
        asked=True,
    ),
    Rule(
        "moved-in-the-pass",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.moved_in_the_pass,
        situation=(
            "a parameter is updated during the backward pass, by something that is no "
            "post-accumulate-grad hook of it"
        ),
        answer="its decay comes when the pass ends, too late",
        asked=True,
    ),
    Rule(
        "schedule-waits",
        WdhookWarning,
        Moment.BACKWARD,
        gradients.schedule_waits,
        situation="a schedule of λ, and 1000 backward passes without an announced step",
        answer="λ stays at its beginning",
        asked=True,
    ),
    *targets.RULES,
)
