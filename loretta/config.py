"""The two configurations: upstream's names and meaning; a wrong value raises here, naming what is accepted."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from loretta_kernels import TTShape

from ._peft_types import extend_peft_type
from ._validation import (
    as_pattern,
    as_set,
    check_matrix_shapes,
    normalised_modes,
    require_bool,
    require_choice,
    require_dropout,
    require_int,
    require_number,
)

LORETTA_ADP = extend_peft_type("LORETTA_ADP")
LORETTA_REP = extend_peft_type("LORETTA_REP")
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "identity": "identity",
    "linear": "identity",
}
PLACEMENTS = ("mh_adapter", "output_adapter")
WIDEST = 65536  # far beyond any use, and what a slip of the pen is stopped by


@dataclass
class _LorettaConfig(PeftConfig):
    """What both methods share; see the subclasses for the fields that differ."""

    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={"help": "Names (suffixes), a regex, or 'all-linear'; None takes the model family's default."},
    )
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Names (suffixes) or a regex of modules that are not adapted."}
    )
    tensor_rank: int = field(default=5, metadata={"help": "The rank of every bond of the tensor trains."})
    tensor_shape: dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Explicit modes by size, such as {4096: [16, 16, 16]}; sizes not named take the default."},
    )
    matrix_shapes: dict[str, dict[str, list[int]]] | None = field(
        default=None,
        metadata={
            "help": "Explicit trains by the matrix they stand for, such as {'64x4096': {'in_modes': [16, 4], "
            "'out_modes': [4, 16, 4, 4, 4], 'ranks': [5, 20, 5, 5, 5, 5]}}: what converters write. Matrices not named "
            "follow tensor_shape and tensor_rank."
        },
    )
    bias: str = field(default="none", metadata={"help": "Which biases of the base model are trained."})
    init_weights: bool | str = field(
        default=True,
        metadata={
            "help": "True: the model starts as its base (last core of the up train is zero). 'gaussian': every core is "
            "random, as in the paper. False: random cores and biases, for tests."
        },
    )
    core_gain: str | None = field(
        default=None,
        metadata={
            "help": "How far a step of the optimiser moves a train. 'rate': as far as it moves a LoRA, whatever the "
            "width. 'paper': the cores are held as they are. None: 'rate', or 'paper' in a saved file, which is of a "
            "time before this field."
        },
    )
    train_layernorm: bool = field(
        default=True,
        metadata={"help": "Train the LayerNorms and RMSNorms, as the paper does (through modules_to_save)."},
    )
    tensorize_head: bool = field(
        default=True,
        metadata={"help": "SEQ_CLS: hold the dense layer of the classification head as a tensor train."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained and saved whole, such as a new head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "The layer indices to adapt; None adapts all. Needs a list of targets."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "The name of the nn.ModuleList that layers_to_transform counts in."}
    )
    tensor_rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "tensor_rank by module name or regex, overriding the default."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_int("tensor_rank", self.tensor_rank, 1)
        self.tensor_rank_pattern = as_pattern("tensor_rank_pattern", self.tensor_rank_pattern)
        for name, rank in self.tensor_rank_pattern.items():
            require_int(f"tensor_rank_pattern[{name!r}]", rank, 1)
        for name in ("train_layernorm", "tensorize_head"):
            require_bool(name, getattr(self, name))
        if self.init_weights not in (True, False, "gaussian") or isinstance(self.init_weights, (int, float)) != (
            isinstance(self.init_weights, bool)
        ):
            raise ValueError(f"init_weights must be True, False or 'gaussian', got {self.init_weights!r}")
        if self.core_gain is None:  # what reads a saved file gives its peft_type, which is set later otherwise
            self.core_gain = "rate" if self.peft_type is None else "paper"
        require_choice("core_gain", self.core_gain, ("rate", "paper"))
        self.tensor_shape = normalised_modes(self.tensor_shape)
        check_matrix_shapes(self.matrix_shapes)
        self.target_modules = as_set("target_modules", self.target_modules)
        self.exclude_modules = as_set("exclude_modules", self.exclude_modules)
        if self.modules_to_save is not None:
            given = self.modules_to_save
            if not isinstance(given, (list, tuple, set)) or not all(isinstance(name, str) for name in given):
                raise ValueError(f"modules_to_save must be a list of module names, got {given!r}")
            self.modules_to_save = list(given)
        indices = self.layers_to_transform
        for index in indices if isinstance(indices, (list, tuple)) else [] if indices is None else [indices]:
            require_int("layers_to_transform", index, 0)
        as_set("layers_pattern", self.layers_pattern)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform needs target_modules as a list of names, got a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no meaning without layers_to_transform")

    def modes(self, size: int) -> tuple[int, ...] | None:
        """The explicit modes of a side of this size, or None where the default applies."""
        given = (self.tensor_shape or {}).get(str(size))
        return None if given is None else tuple(given)

    def matrix_shape(self, in_features: int, out_features: int) -> TTShape | None:
        """The explicit train of a matrix of these sizes, or None where there is none."""
        given = (self.matrix_shapes or {}).get(f"{in_features}x{out_features}")
        return None if given is None else TTShape(**given)


@dataclass
class LorettaAdpConfig(_LorettaConfig):
    """LoRETTA_adp: a bottleneck adapter whose down and up projections are tensor trains.

        y = x + scaling · (act(drop(x)·W_down + b_down)·W_up + b_up)

    on the input or the output of the targeted modules, or beside them (``use_parallel_adapter``). A target is a linear,
    or a whole block from [..., hidden] to [..., hidden], such as a mixture of experts.

    Source: LoRETTA (Yang et al., NAACL 2024, arXiv 2402.11417). All fields have working defaults:

    Args:
        bottleneck_size: width of the bottleneck, 1 or more.
        non_linearity: one of relu, gelu, gelu_new (= gelu_tanh, gelu_pytorch_tanh), silu (= swish), tanh,
            identity (= linear). With identity the adapter is linear: it merges, and exports as a LoRA.
        adapter_dropout: dropout on the adapter's input, in [0, 1).
        target_modules: names (suffixes), a regex, or "all-linear"; None takes the model family's default.
        use_parallel_adapter: y = base(x) + adapter(x) instead of an adapter in series.
        use_adapterp: adapt the output of the feed-forward block only.
        adapter_type: "mh_adapter" (on the input of the module) or "output_adapter" (on its output), for all targets, or
            a dict from target name to one of them. None: the family's placement where it is known, else the output.
        scaling: a number, or "learned" (one scalar per adapter, from 1).
        bias: "none", "all" (every bias of the base model is trained) or "adapter_only" (those of targeted linears);
            they keep the base's dtype.
        tensorized: False keeps the two projections dense.
        tensor_rank, tensor_rank_pattern: the rank of every bond, and exceptions by module name or regex.
        tensor_shape: explicit modes by size, such as ``{4096: [16, 16, 16]}``.
        matrix_shapes: explicit trains, modes and one rank per bond, by the matrix they stand for.
        init_weights: True starts as the base model, "gaussian" as the paper, False is random (tests).
        core_gain: "rate" (the default) holds each core divided by a gain, so that a learning rate moves a train as far
            as it moves a LoRA; "paper" holds the cores as they are, which takes rates of about 1e-2. A saved adapter
            without this field is "paper".
        train_layernorm: train the norms of the base model too.
        tensorize_head: SEQ_CLS: the dense layer of the head is a tensor train.
        modules_to_save, exclude_modules, layers_to_transform, layers_pattern, inference_mode, task_type: as in PEFT.

    Raises:
        ValueError: a field has a value that is not accepted; the message names both.
    """

    bottleneck_size: int = field(default=64, metadata={"help": "Width of the bottleneck."})
    non_linearity: str = field(default="relu", metadata={"help": f"One of {', '.join(ACTIVATIONS)}."})
    adapter_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    use_parallel_adapter: bool = field(default=False, metadata={"help": "Adapt beside the module, not in series."})
    use_adapterp: bool = field(default=False, metadata={"help": "Adapt the output of the feed-forward block only."})
    adapter_type: str | dict[str, str] | None = field(
        default=None, metadata={"help": "'mh_adapter' (input) or 'output_adapter', for all targets or by target name."}
    )
    scaling: float | str = field(default=1.0, metadata={"help": "A number, or 'learned'."})
    tensorized: bool = field(default=True, metadata={"help": "False: dense projections."})
    rank_pattern: dict[str, int] = field(
        default_factory=dict,
        metadata={"help": "The former name of tensor_rank_pattern: taken as that, with a warning."},
    )

    def __post_init__(self) -> None:
        self.rank_pattern = as_pattern("rank_pattern", self.rank_pattern)
        if self.rank_pattern:
            self._rename_rank_pattern()
        super().__post_init__()
        self.peft_type = LORETTA_ADP
        require_int("bottleneck_size", self.bottleneck_size, 1, WIDEST)
        require_choice("non_linearity", self.non_linearity, tuple(ACTIVATIONS))
        require_dropout("adapter_dropout", self.adapter_dropout)
        require_choice("bias", self.bias, ("none", "all", "adapter_only"))
        for name in ("use_parallel_adapter", "use_adapterp", "tensorized"):
            require_bool(name, getattr(self, name))
        if self.scaling != "learned":
            require_number("scaling", self.scaling, also="'learned'")
        placements = self.adapter_type.values() if isinstance(self.adapter_type, dict) else [self.adapter_type]
        for placement in placements:
            if placement is not None:
                require_choice("adapter_type", placement, PLACEMENTS)
        if self.use_parallel_adapter and self.use_adapterp:
            raise ValueError("use_parallel_adapter and use_adapterp exclude each other: the latter adapts an output")
        if self.adapter_type is not None and (self.use_parallel_adapter or self.use_adapterp):
            raise ValueError("adapter_type has no meaning with use_parallel_adapter or use_adapterp")

    def _rename_rank_pattern(self) -> None:
        """Files of version 0.1 name the bond ranks rank_pattern, which in PEFT are values of r."""
        if self.tensor_rank_pattern:
            raise ValueError(
                f"rank_pattern is the former name of LoRETTA_adp's tensor_rank_pattern; give the latter only, "
                f"got {self.rank_pattern!r} and {self.tensor_rank_pattern!r}"
            )
        warnings.warn(
            f"LoRETTA_adp's rank_pattern is now called tensor_rank_pattern, since in PEFT rank_pattern overrides r: "
            f"{self.rank_pattern!r} are taken as the ranks of bonds, as before",
            FutureWarning,
            stacklevel=4,
        )
        self.tensor_rank_pattern, self.rank_pattern = self.rank_pattern, {}

    @property
    def activation(self) -> str:
        """The kernels' name of ``non_linearity``."""
        return ACTIVATIONS[self.non_linearity]


@dataclass
class LorettaRepConfig(_LorettaConfig):
    """LoRETTA_rep: a LoRA whose two factors are tensor trains, ``y = base(x) + lora_alpha/r · drop(x)·A·B``.

    Source: LoRETTA (Yang et al., NAACL 2024, arXiv 2402.11417). All fields have working defaults:

    Args:
        r: inner dimension of A [in, r] and B [r, out], 1 or more.
        lora_alpha: the delta is scaled by lora_alpha / r.
        lora_dropout: dropout on the input of A, in [0, 1). The default is 0.05, as in the released package; PEFT's LoRA
            has 0 by default: set both alike where the two are compared. TRL's DPO and KTO switch it off
            (``disable_dropout``); where it stays on, the policy drops elements and the reference does not, so that the
            first loss is off ln 2 for an adapter that does not start as its base.
        target_modules: names (suffixes), a regex, or "all-linear"; None takes the model family's default.
        merge_weights: merge on ``model.eval()``, unmerge on ``model.train()``, which gives the base weight back as it
            was. While merged, the base weight takes its memory twice.
        fan_in_fan_out: accepted as in PEFT's LoRA; how a base weight is stored follows from its layer's type.
        enable_lora: for fused projections: which of the ``len(enable_lora)`` equal slices of the output are adapted,
            such as ``[True, False, True]`` for q and v of a fused q, k, v.
        bias: "none", "all" (every bias of the base model is trained) or "lora_only" (those of targeted linears); they
            keep the base's dtype.
        tensor_rank, tensor_rank_pattern: the rank of every bond, and exceptions by module name or regex.
        rank_pattern, alpha_pattern: r and lora_alpha by module name or regex, as in PEFT's LoRA.
        tensor_shape: explicit modes by size, such as ``{4096: [16, 16, 16]}``.
        matrix_shapes: explicit trains, modes and one rank per bond, by the matrix they stand for.
        init_weights: True starts as the base model, "gaussian" as the paper, False is random (tests).
        core_gain: "rate" (the default) holds each core divided by a gain, so that a learning rate moves a train as far
            as it moves a LoRA; "paper" holds the cores as they are, which takes rates of about 1e-2. A saved adapter
            without this field is "paper".
        train_layernorm: train the norms of the base model too.
        tensorize_head: SEQ_CLS: the dense layer of the head is a tensor train.
        modules_to_save, exclude_modules, layers_to_transform, layers_pattern, inference_mode, task_type: as in PEFT.

    Raises:
        ValueError: a field has a value that is not accepted; the message names both.
    """

    r: int = field(default=8, metadata={"help": "Inner dimension of the two factors."})
    lora_alpha: float = field(default=16, metadata={"help": "The delta is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of A (0 in PEFT's LoRA)."})
    merge_weights: bool = field(default=False, metadata={"help": "Merge on eval(), unmerge on train()."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Follows from the layer's type; True on others warns."}
    )
    enable_lora: list[bool] | None = field(
        default=None, metadata={"help": "Which equal slices of a fused projection's output are adapted."}
    )
    rank_pattern: dict[str, int] = field(default_factory=dict, metadata={"help": "r by module name or regex."})
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "lora_alpha by module name or regex."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LORETTA_REP
        require_int("r", self.r, 1, WIDEST)
        require_number("lora_alpha", self.lora_alpha)
        self.rank_pattern = as_pattern("rank_pattern", self.rank_pattern)
        for name, r in self.rank_pattern.items():
            require_int(f"rank_pattern[{name!r}]", r, 1)
        self.alpha_pattern = as_pattern("alpha_pattern", self.alpha_pattern)
        for name, alpha in self.alpha_pattern.items():
            require_number(f"alpha_pattern[{name!r}]", alpha)
        require_dropout("lora_dropout", self.lora_dropout)
        require_choice("bias", self.bias, ("none", "all", "lora_only"))
        for name in ("merge_weights", "fan_in_fan_out"):
            require_bool(name, getattr(self, name))
        if self.enable_lora is not None:
            given: Sequence[Any] = self.enable_lora if isinstance(self.enable_lora, (list, tuple)) else ()
            if not any(given) or not all(isinstance(item, bool) for item in given):
                raise ValueError(
                    f"enable_lora must be a list of bools with at least one True, got {self.enable_lora!r}"
                )
            self.enable_lora = list(given)
