"""The run spec: one flat JSON object that says everything a training run depends on.

The field docstrings are the documentation: `docs/reference/spec.md` and `docs/spec.schema.json` are generated from them
(`python -m anchor_cli.spec.docs`). Validators only look and derive; nothing is opened, started or downloaded.

Long because every key stands here with its documentation, in the order of the reference page.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from anchor_cli.base.contract import INSTRUCTION_EN, INSTRUCTION_KO, TEXT_TEMPLATE, PoolingMode, check_template
from anchor_cli.spec.naming import fill

Reporter = Literal["none", "wandb", "tensorboard"]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]

# What a run's result does not depend on: free to change between the starts of one experiment.
NOT_OF_THE_RESULT = frozenset(
    "dataset_name output_dir experiment_id stop_after_n_steps max_tokens_per_micro_batch attn_implementation "
    "gradient_checkpointing torch_compile liger deepspeed eval_steps eval_on_start eval_batch_size eval_data "
    "save_steps save_total_limit logging_steps report_to run_name".split()
)

OF_STAGE_I = ("reconstruction_targets", "d2q_weight", "q2d_weight")
OF_STAGE_II = tuple(
    "temperature in_batch_negatives negatives_group_size margin_strategy margin guide_model_name_or_path hardness_mode "
    "hardness_strength matryoshka_dims matryoshka_weights kd_weight kd_temperature num_hard_negatives".split()
)
"""Keys that mean nothing in the other stage; there they must keep their defaults."""


def contradiction(key: str, problem: str, remedy: str = "") -> PydanticCustomError:
    """Keys that cannot both hold; `key` is the one to change."""
    return PydanticCustomError("contradiction", "{problem}", {"problem": problem, "key": key, "remedy": remedy})


class RunSpec(BaseModel):
    """A validated training run; unknown keys are refused, values are never converted from another type."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    # what is trained, on what, and where it goes
    model_name_or_path: Name
    """Base model: a folder or a Hugging Face Hub id of a causal language model."""
    dataset_name: str | None = None
    """Name of the data for people and for the experiment's name, such as `KoEnQP`; changes nothing else."""
    dataset_file_path: Name
    """Training pairs: what `anchor prepare` wrote, or a raw source, which `anchor train` prepares by itself."""
    output_dir: Name = "output"
    """Folder of runs; the run's own folder is `{output_dir}/{experiment_id}`."""
    experiment_id: Annotated[str, Field(min_length=1, pattern=r"^[^/\\]*[^/\\.][^/\\]*$")] | None = None
    """Name of the run's folder; may hold `{…}` fields: keys of the spec, `{data}`, `{folder}`, `{model}`, `{gpus}` and
    `{warmup}`. Default: made of data, model, learning rate, epochs, seed and a digest of the rest."""

    # text and method
    max_seq_length: Annotated[int, Field(ge=5)] = 512
    """Longest text in tokens, template, instruction and [EOS] included; over-long content loses tokens at its end."""
    pooling_mode: PoolingMode = "eos_token"
    """State that is the embedding: the closing [EOS], or content tokens pooled (`mean`, `weighted_mean`,
    `last_token`)."""
    instructions: dict[str, str] | None = None
    """Query instruction by language, for data with a `language` column; `*` is any other language. Default: the Korean
    instruction for every training row; Korean and English ones by language in evaluation. `; ` follows it; the query
    follows at once where it ends in white space, as in `Instruct: …\\nQuery: `."""
    text_template: str = TEXT_TEMPLATE
    """Text around `{text}`; what follows `{text}` is the closing special token, [EOS], and nothing else."""
    reconstruction_targets: Literal["text", "content"] = "text"
    """Tokens that are reconstructed: `text` is the whole text, template and instruction included (the paper's runs);
    `content` only the query or document itself."""
    d2q_weight: NotNegative = 0.8
    """Weight of reconstructing the query from the document's embedding (D2Q)."""
    q2d_weight: NotNegative = 0.2
    """Weight of reconstructing the document from the query's embedding (Q2D)."""

    # Stage II
    stage: Literal["I", "II"] = "I"
    """`I`: bidirectional reconstruction. `II`: contrastive training on queries, positives and their negatives."""
    temperature: AboveZero = 0.01
    """What cosines are divided by (InfoNCE)."""
    in_batch_negatives: Literal["all", "same_language", "none"] = "all"
    """Documents of other rows that a query is contrasted with: all of its block, those of its own language, or none."""
    negatives_group_size: Positive | None = None
    """Rows of a block: only documents of the own block are candidates. Default: the whole step. How many GPUs there are
    does not matter."""
    margin_strategy: Literal["absolute", "relative"] | None = None
    """Drops candidates that the guide finds too similar to be negatives: above the positive's cosine - `margin`
    (`absolute`), or above it x (1 - `margin`) (`relative`). null: none is dropped but texts of known positives."""
    margin: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Margin of `margin_strategy`; below 0 candidates may be that much more similar than the positive."""
    guide_model_name_or_path: Name | None = None
    """Model that judges candidates for `margin_strategy`: a folder or Hub id. null: the trained model itself."""
    hardness_mode: Literal["hard_negatives", "explicit_negatives", "in_batch_negatives", "all_negatives"] | None = None
    """Candidates whose logit is raised by `hardness_strength` x cosine: the row's own negatives, every row's negatives,
    all documents of other rows, or every candidate but the positive."""
    hardness_strength: NotNegative = 0.0
    """Strength of `hardness_mode`; no gradient flows through it."""
    matryoshka_dims: list[Positive] | None = None
    """Sizes at which the embedding's first dimensions are trained to work alone, such as [1024, 256, 64]."""
    matryoshka_weights: list[NotNegative] | None = None
    """Weight of each of `matryoshka_dims`. Default: all the same."""
    kd_weight: NotNegative = 0.0
    """Weight of distilling a teacher's scores (KL divergence over a row's own documents): the rows' `scores`, else a
    cross-encoder's, else those they were mined with."""
    kd_temperature: AboveZero = 1.0
    """Temperature of teacher and model in distillation."""
    num_hard_negatives: Annotated[int, Field(ge=0)] | None = None
    """At most so many of a row's negatives are used, the first ones. Default: all."""

    # optimisation
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4e-5
    """Highest learning rate of AdamW, reached when the warm-up ends."""
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.0
    """Passes over the rows; may be a fraction."""
    warmup_steps: Annotated[int, Field(ge=0)] = 300
    """Optimizer steps of linear warm-up. 0 when `warmup_ratio` is given instead."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    """Warm-up as a share of all steps, instead of `warmup_steps`."""
    max_steps: int = -1
    """Optimizer steps of the whole schedule, instead of `num_train_epochs`; -1: as many as the epochs have."""
    stop_after_n_steps: Positive | None = None
    """Optimizer step after which the run ends early; the schedule stays that of the whole run."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: NotNegative = 1.0
    """L2 norm to which the gradient of a step is clipped; 0 switches clipping off."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """Course of the learning rate after the warm-up: `linear` falls to 0 at the last step of the schedule."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of the order of rows."""

    # batches
    per_device_train_batch_size: Positive = 32
    """Pairs, a factor of the global batch as in Hugging Face's Trainer. How a GPU's share of a step is cut into
    micro-batches is decided by tokens instead, and changes nothing in the result."""
    gradient_accumulation_steps: Positive = 1
    """Factor of the global batch, as in Hugging Face's Trainer; see `per_device_train_batch_size`."""
    global_batch_size: Positive | None = None
    """Pairs of an optimizer step. Default: `per_device_train_batch_size` x `gradient_accumulation_steps` x GPUs. When
    given, the number of GPUs does not change the run."""
    max_tokens_per_micro_batch: Positive | None = None
    """Token budget of one forward and backward pass on one GPU. Default: chosen from the GPU's memory."""

    # arithmetic
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of forward and backward passes; master weights and optimizer state are float32 either way."""
    attn_implementation: Literal[
        "auto",
        "flash_attention_2",
        "flash_attention_3",
        "flash_attention_4",
        "varlen",
        "varlen_fa3",
        "varlen_fa4",
        "sdpa",
    ] = "auto"
    """Attention kernel. `auto`: flash-attn if installed, else PyTorch's varlen attention, else SDPA text by text.
    `varlen_fa3` and `varlen_fa4` are PyTorch's, routed to flash-attn 3 or 4 (torch >= 2.13)."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass to save memory. `auto`: only when they would not fit; of compiled
    layers first the MLP's norm and product, also where that saves a micro-batch."""
    torch_compile: bool | Literal["auto"] = "auto"
    """Compile the model's layers with `torch.compile`. `auto`: on GPUs where Triton kernels can be built, unless
    `liger` is true."""
    liger: bool | Literal["auto"] = "auto"
    """Liger's fused norms, rotary embedding and SwiGLU. `auto`: on GPUs, where it is installed, knows the model and its
    kernels run on this host; `true`: an error where they do not. Not used on a CPU."""
    deepspeed: Name = "zero2_bf16"
    """DeepSpeed config: a name in `ds_configs/` or a path. Default: `zero2_bf16`, or `zero2_fp32` when `precision` is
    `float32`."""

    # evaluation, saving, logging
    eval_steps: Share = 0.0
    """Retrieval evaluation every so many steps; below 1: a share of all steps; 0: off."""
    eval_on_start: bool = False
    """Evaluate before the first step, too."""
    eval_batch_size: Positive = 64
    """Texts encoded at once in evaluation on a CPU. A GPU packs by tokens: 64 short texts do not fill it."""
    eval_data: list[str] | None = None
    """Benchmarks, each `[LANG:]NAME_OR_DIR` as in `anchor eval --data`, or `suite:NAME` as in `anchor eval --suite`.
    Default: the four NanoBEIR sets of KURE."""
    save_steps: Share = 500.0
    """Checkpoint every so many steps; below 1: a share of all steps; 0: only at the end."""
    save_total_limit: Positive | None = None
    """Checkpoints kept; the oldest go first. Default: all."""
    logging_steps: Positive = 1
    """A line in `metrics.jsonl` every so many steps."""
    report_to: Reporter | list[Reporter] = "none"
    """Where metrics go besides `metrics.jsonl`: `none`, `wandb`, `tensorboard`, or a list."""
    run_name: str | None = None
    """The run's name in W&B. Default: the experiment's name."""

    @model_validator(mode="before")
    @classmethod
    def _derive_defaults(cls, data: Any) -> Any:
        return {**data, **derived_defaults(data)} if isinstance(data, dict) else data

    @model_validator(mode="after")
    def _fill_experiment_id(self) -> RunSpec:
        if self.experiment_id and set("{}") & set(self.experiment_id):
            try:
                name = fill(self.experiment_id, self.model_dump())
            except ValueError as error:
                raise contradiction("experiment_id", f"experiment_id {self.experiment_id}: expected {error}") from None
            self.__dict__["experiment_id"] = name  # frozen for everybody else
        return self

    @field_validator("text_template")
    @classmethod
    def _has_one_text(cls, template: str) -> str:
        return check_template(template)

    @field_validator("save_steps", "eval_steps")
    @classmethod
    def _is_share_or_whole(cls, steps: float) -> float:
        if steps > 1 and steps != int(steps):
            raise ValueError("a whole number of steps, or a share of all steps below 1")
        return steps

    @field_validator("max_steps")
    @classmethod
    def _is_not_zero(cls, steps: int) -> int:
        if steps == 0 or steps < -1:
            raise ValueError("a number of steps, or -1 for as many as num_train_epochs gives")
        return steps

    @model_validator(mode="after")
    def _agrees_with_its_stage(self) -> RunSpec:
        other, keys = ("II", OF_STAGE_II) if self.stage == "I" else ("I", OF_STAGE_I)
        for key in keys:
            if getattr(self, key) != RunSpec.model_fields[key].default:
                remedy = f'take it out, or set "stage" to "{other}"'
                raise contradiction(key, f"{key} belongs to Stage {other}, but stage is {self.stage}", remedy)
        return self

    @model_validator(mode="after")
    def _contrasts_sensibly(self) -> RunSpec:
        if self.margin_strategy is None:
            for key in ("margin", "guide_model_name_or_path"):
                if getattr(self, key):
                    remedy = 'add "margin_strategy": "absolute" or "relative"'
                    raise contradiction(key, f"{key} changes nothing without margin_strategy", remedy)
        if (self.hardness_mode is None) != (self.hardness_strength == 0):
            says = "hardness_mode and hardness_strength need each other"
            raise contradiction("hardness_strength", says, "give both, or neither")
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is not None and (not dims or len(set(dims)) < len(dims)):
            raise contradiction("matryoshka_dims", f"matryoshka_dims {dims} is empty or names a size twice")
        if weights is not None and (dims is None or len(dims) != len(weights) or not sum(weights)):
            says = f"matryoshka_weights {weights} are not one weight, not all 0, for each of matryoshka_dims {dims}"
            raise contradiction("matryoshka_weights", says)
        return self

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> RunSpec:
        if self.d2q_weight == 0 and self.q2d_weight == 0:
            raise contradiction("d2q_weight", "d2q_weight and q2d_weight are both 0: nothing would be learned")
        if self.warmup_steps and self.warmup_ratio:
            raise contradiction(
                "warmup_ratio",
                f"warmup_steps {self.warmup_steps} and warmup_ratio {self.warmup_ratio} contradict each other",
                "keep one of them, or set the other to 0",
            )
        product = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if self.global_batch_size and self.global_batch_size % product:
            raise contradiction(
                "global_batch_size",
                f"global_batch_size {self.global_batch_size} is not a multiple of per_device_train_batch_size "
                f"{self.per_device_train_batch_size} x gradient_accumulation_steps {self.gradient_accumulation_steps}",
                "leave the two out: global_batch_size alone is enough",
            )
        if isinstance(self.report_to, list) and "none" in self.report_to and len(self.report_to) > 1:
            raise contradiction("report_to", f"report_to {self.report_to} holds 'none' and something else")
        return self

    @property
    def experiment(self) -> str:
        """Name of the run's folder: `experiment_id`, or one made of what the result depends on."""
        if self.experiment_id:
            return self.experiment_id
        data = self.dataset_name or Path(self.dataset_file_path).name.split(".")[0] or "data"
        model = Path(self.model_name_or_path).name or "model"
        epochs = f"steps-{self.max_steps}" if self.max_steps > 0 else f"e-{self.num_train_epochs:g}"
        name = f"{data}_{model}_lr-{self.learning_rate:g}_{epochs}_s-{self.seed}_{self.fingerprint[:8]}"
        return re.sub(r"[^\w.+-]+", "-", name).lstrip(".")

    @property
    def run_folder(self) -> Path:
        """`{output_dir}/{experiment}`, relative to where the command is run unless `output_dir` is absolute."""
        return Path(self.output_dir).expanduser() / self.experiment

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the keys the result depends on, for names; a resume compares key by key (`train/start.py`)."""
        left_out = set(NOT_OF_THE_RESULT)
        if self.global_batch_size:
            left_out |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
        left_out |= {"stage", *OF_STAGE_II} if self.stage == "I" else set(OF_STAGE_I)  # as before there was a Stage II
        kept = {key: value for key, value in self.model_dump().items() if key not in left_out}
        return hashlib.sha256(json.dumps(kept, sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    @property
    def training_instructions(self) -> dict[str, str]:
        """Instruction of a training row by language; `*` is every other language."""
        return dict(self.instructions) if self.instructions else {"*": INSTRUCTION_KO}

    @property
    def query_instructions(self) -> dict[str, str]:
        """Instruction of a query by language, in evaluation and export; never one that `*` has replaced in training."""
        given = dict(self.instructions or {})
        return given if "*" in given else {"ko": INSTRUCTION_KO, "en": INSTRUCTION_EN} | given

    @property
    def reporters(self) -> tuple[Reporter, ...]:
        """Trackers asked for, without `none`."""
        asked = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        return tuple(name for name in asked if name != "none")

    def global_batch(self, world_size: int) -> int:
        """Pairs of an optimizer step on `world_size` GPUs or processes."""
        product = self.per_device_train_batch_size * self.gradient_accumulation_steps
        return self.global_batch_size or product * world_size


def derived_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Defaults that follow from other keys which are given, so that a resolved spec read again says the same."""
    derived: dict[str, Any] = {}
    if given.get("warmup_ratio") and "warmup_steps" not in given:
        derived["warmup_steps"] = 0
    if given.get("precision") == "float32" and "deepspeed" not in given:
        derived["deepspeed"] = "zero2_fp32"
    batch = given.get("global_batch_size")
    accumulation = given.get("gradient_accumulation_steps", 1)
    whole = type(batch) is int and type(accumulation) is int and batch > 0 and accumulation > 0
    if whole and "per_device_train_batch_size" not in given and batch % accumulation == 0:
        share = batch // accumulation
        derived["per_device_train_batch_size"] = max(n for n in range(1, min(32, share) + 1) if share % n == 0)
    return derived
