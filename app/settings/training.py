"""`training`: distributed training with DeepSpeed."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from app.settings.finetuning import DpoConfig, LoraConfig
from app.settings.section import Count, Fraction, Positive, Section

HOW_A_RUN_IS_COMPUTED = (
    "num_workers",
    "resize_interval_s",
    "cpus_per_worker",
    "use_gpu",
    "zero_stage",
    "report_every_steps",
    "keep_checkpoints",
    "publish",
    "on_bad_loss",
    "bad_loss_factor",
    "max_bad_losses",
    "max_failures",
    "probe_steps",
    "offload_optimizer",
    "offload_parameters",
    "nvme_path",
    "sequence_parallel_size",
    "activation_checkpointing",
    "loss_chunk_tokens",
    "adam_kernel",
    "compile",
    "attention",
)
"""Settings of `training` that may change between two submissions of a run."""

Offload = Literal["none", "cpu", "nvme"]


class TrainingConfig(Section):
    """From a table version to a model version."""

    base_model: str = "preset:small"
    """Starting point: preset:tiny (0.1M parameters), preset:small (2M), preset:base (7M), all random; a registered
    model, models:/support/3 or models:/support@champion; a folder, local or s3://, gs://, abfs://, hdfs://; or a hub
    id. Safetensors only, no remote code."""
    method: Literal["full", "lora"] = "full"
    """full: every weight is trained. lora: the base model stays as it is and small adapters beside its layers are
    trained; the model version that is registered has them merged in, and holds them in `adapter/` too."""
    lora: LoraConfig = LoraConfig()
    """The adapters of `method` lora."""
    objective: Literal["sft", "dpo"] = "sft"
    """sft: learn to write the table's conversations (supervised fine-tuning). dpo: learn from preference pairs which
    of two replies people liked better; conversations of the table then only measure how well it still writes them."""
    dpo: DpoConfig = DpoConfig()
    """Preference tuning of `objective` dpo."""
    vocab_size: Annotated[int, Field(ge=300, le=200_000)] = 2_048
    """Tokens of the byte-level BPE tokenizer that is trained for a preset; a base model keeps its own."""
    block_tokens: Annotated[int, Field(ge=16)] = 256
    """Conversations are packed into blocks of this many tokens."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Which turns the model learns to write."""
    num_workers: Count | tuple[Count, Count] = 2
    """Ray Train workers. Two numbers, the fewest and the most: as many as the cluster has room for, and when that
    changes, training goes on from the last checkpoint with more or fewer; what a step learns from stays the same."""
    resize_interval_s: Positive = 60.0
    """Seconds between two looks at whether there is room for more workers."""
    cpus_per_worker: Positive = 1.0
    """Logical CPUs a worker reserves."""
    use_gpu: bool = False
    """One GPU a worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 replicates; 1 shards optimizer state; 2 gradients too; 3 parameters too."""
    offload_optimizer: Offload = "none"
    """Where ZeRO 1-3 keeps optimizer state and updates it: with the model, or in the CPU's memory."""
    offload_parameters: Offload = "none"
    """Where ZeRO 3 keeps parameters that are not being computed with: there, in the CPU's memory, or in `nvme_path`."""
    nvme_path: str | None = None
    """Local folder on a fast disk, for what is offloaded to nvme."""
    tensor_parallel_size: Count = 1
    """Workers that share every matrix of the layers (DeepSpeed AutoTP); divides `num_workers`."""
    sequence_parallel_size: Count = 1
    """Workers that share every block of tokens (DeepSpeed Ulysses); divides `num_workers` and `block_tokens`."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    adam_kernel: Literal["torch", "fused", "deepspeed"] = "torch"
    """AdamW's step: torch's loop over tensors; torch's fused one; DeepSpeed's FusedAdam or, offloaded to the CPU,
    DeepSpeedCPUAdam, which are compiled once and need nvcc or g++."""
    compile: bool = False
    """Whether torch.compile makes kernels of the model: half a minute at the start of each worker, and more."""
    attention: Literal["auto", "varlen", "sdpa", "flex", "flash"] = "auto"
    """How attention within packed conversations is computed. varlen: each at its own length, in Llama, Mistral and Qwen
    models without sliding windows. sdpa: with a mask. flex: by FlexAttention, compiled for their borders (GPU). flash:
    by FlashAttention over their lengths (GPU, package flash-attn). auto: varlen where it can be had, else sdpa."""
    loss_chunk_tokens: Count | None = None
    """Tokens whose logits are in memory at a time; none: 256 on a CPU, whose caches they then fit, 2,048 on a GPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the forward and backward pass."""
    micro_batch_size: Count = 8
    """Blocks a worker computes at once."""
    gradient_accumulation_steps: Count = 1
    """Micro batches added up before a step."""
    global_batch_size: Count | None = None
    """Blocks that a step learns from; none: (most) workers x micro batch x accumulation, as the run began. On another
    number of workers the accumulation changes instead; where they do not divide, some micro batches are smaller."""
    max_steps: Count = 300
    """Optimizer steps in all."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the layers learn by Muon, embeddings, norms and biases by AdamW; for training from
    random weights, where it takes far fewer steps. adamw: everything by AdamW; for going on from a base model."""
    learning_rate: Positive = 2e-3
    """AdamW's peak of the cosine schedule."""
    muon_learning_rate: Positive = 2e-2
    """Muon's peak of the same schedule."""
    warmup_fraction: Fraction = 0.05
    """Share of the steps in which the learning rate rises from zero."""
    min_learning_rate_fraction: Fraction = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay of matrices and embeddings."""
    gradient_clipping: Positive = 1.0
    """Largest gradient norm; with muon nothing is clipped, see app/training/deepspeed_config.py."""
    report_every_steps: Count = 100
    """Steps between validations; each leaves a checkpoint with a usable model in it."""
    validation_blocks: Count = 64
    """Blocks of held-out conversations a validation reads."""
    keep_checkpoints: Count = 2
    """Checkpoints kept: those with the lowest validation loss, and the newest besides."""
    publish: Literal["best", "last"] = "best"
    """Whether the model of the kept checkpoint with the lowest validation loss is registered, or the last step's."""
    on_bad_loss: Literal["skip", "roll_back", "stop"] = "skip"
    """What is done about a step whose loss is not finite or jumps. skip: its gradient is thrown away. roll_back: to
    the last checkpoint, and on without that step's blocks. stop: the stage fails."""
    bad_loss_factor: Annotated[float, Field(gt=1)] = 5.0
    """A loss this many times the median of the last 50 steps, and at least 1 above it, has jumped."""
    max_bad_losses: Annotated[int, Field(ge=0)] = 10
    """After more bad losses than these the stage fails, whatever `on_bad_loss` says."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Worker failures survived by going back to the last checkpoint; -1: any number."""
    probe_steps: Annotated[int, Field(ge=0)] = 8
    """Steps on made-up tokens that `--dry-run` measures, to tell how long training will take; 0: none."""
    seed: int = 17
    """Of initial weights and data order."""

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a run learns: submitted again with others of the rest, it goes on."""
        return self.model_dump(mode="json", exclude=set(HOW_A_RUN_IS_COMPUTED))

    @property
    def min_workers(self) -> int:
        """The fewest that training goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """The most that it uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def blocks_per_step(self) -> int:
        """Blocks that a step of a new run learns from."""
        return self.global_batch_size or self.max_workers * self.micro_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingConfig":
        if self.min_workers > self.max_workers:
            raise ValueError(f"num_workers is [fewest, most], got {list(self.num_workers)}")  # type: ignore[arg-type]
        if self.blocks_per_step * self.workers_per_batch < self.max_workers:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} has no block for each of num_workers={self.num_workers}: "
                f"raise it to {self.max_workers // self.workers_per_batch} at least, or use fewer workers"
            )
        return self

    @model_validator(mode="after")
    def _method_fits(self) -> "TrainingConfig":
        if self.objective == "dpo" and self.base_model.startswith("preset:"):
            raise ValueError(
                f"objective=dpo prefers among what a trained model says, and base_model={self.base_model} is random: "
                "name a registered model, a folder or a hub id"
            )
        if self.workers_per_batch > 1 and (self.method == "lora" or self.objective == "dpo"):
            raise ValueError(
                f"method={self.method} with objective={self.objective} is computed by one worker a batch: set "
                "tensor_parallel_size=1 and sequence_parallel_size=1"
            )
        if self.method == "full":
            if self.lora.load_in_8bit:
                raise ValueError("lora.load_in_8bit=true needs method=lora: int8 weights cannot be trained themselves")
            return self
        if self.base_model.startswith("preset:"):
            raise ValueError(
                f"method=lora adapts a trained model, and base_model={self.base_model} is random: "
                "name a registered model, a folder or a hub id, or use method=full"
            )
        if self.optimizer == "muon":
            raise ValueError("optimizer=muon orthogonalises whole weight matrices, method=lora has none: use adamw")
        if self.lora.load_in_8bit and self.zero_stage == 3:
            raise ValueError(
                "lora.load_in_8bit=true with zero_stage=3: bitsandbytes keeps int8 weights where DeepSpeed cannot "
                "shard them; use zero_stage 0 to 2, or load_in_8bit=false"
            )
        return self

    @property
    def logits_tokens(self) -> int:
        """Tokens whose logits are in memory at a time."""
        return self.loss_chunk_tokens or (2_048 if self.use_gpu else 256)

    @property
    def workers_per_batch(self) -> int:
        """Workers that compute one batch together."""
        return self.tensor_parallel_size * self.sequence_parallel_size

    @model_validator(mode="after")
    def _go_together(self) -> "TrainingConfig":
        tensor, sequence = self.tensor_parallel_size, self.sequence_parallel_size
        if tensor > 1 and sequence > 1:
            raise ValueError(
                f"tensor_parallel_size={tensor} and sequence_parallel_size={sequence} exclude each other: DeepSpeed "
                "0.19's Ulysses takes all heads of a layer, of which tensor parallel leaves a worker some; set one to 1"
            )
        for name, size in (("tensor_parallel_size", tensor), ("sequence_parallel_size", sequence)):
            if size > 1 and self.min_workers != self.max_workers:
                raise ValueError(
                    f"{name}={size} needs a fixed num_workers, got {self.min_workers} to {self.max_workers}"
                )
            if self.max_workers % size:
                raise ValueError(f"num_workers={self.num_workers} cannot be shared out to groups of {name}={size}")
        if self.block_tokens % sequence:
            raise ValueError(
                f"block_tokens={self.block_tokens} cannot be cut into sequence_parallel_size={sequence} parts"
            )
        if tensor > 1 and self.optimizer == "muon":
            raise ValueError(
                f"optimizer=muon needs whole matrices, tensor_parallel_size={tensor} leaves a worker a part of each: "
                "set optimizer=adamw, or tensor_parallel_size=1"
            )
        if self.attention in ("flex", "flash") and not self.use_gpu:
            raise ValueError(
                f"attention={self.attention} has no backward pass on a CPU (torch 2.13): set auto, or use_gpu=true"
            )
        if self.attention not in ("auto", "sdpa") and sequence > 1:
            raise ValueError(
                f"attention={self.attention} and sequence_parallel_size={sequence} exclude each other: DeepSpeed 0.19 "
                "would make a mask that forgets where conversations end; set attention=auto"
            )
        if (self.adam_kernel, self.precision, self.zero_stage) == ("deepspeed", "bf16", 0):
            raise ValueError(
                "adam_kernel=deepspeed with precision=bf16 and zero_stage=0 has no checkpoints: DeepSpeed 0.19 keeps "
                "its weights flat there; use zero_stage 1 to 3, or adam_kernel=fused"
            )
        if self.attention == "flash" and self.micro_batch_size > 1:
            raise ValueError(
                f"attention=flash needs micro_batch_size=1, got {self.micro_batch_size}: transformers 5 tells packed "
                "conversations apart in a single block only; raise block_tokens instead"
            )
        if self.adam_kernel != "torch" and self.optimizer == "muon":
            raise ValueError(f"adam_kernel={self.adam_kernel} is for optimizer=adamw; DeepSpeed's Muon has its own")
        self._check_offload()
        return self

    def _check_offload(self) -> None:
        if self.offload_optimizer != "none" and self.zero_stage == 0:
            raise ValueError(f"offload_optimizer={self.offload_optimizer} needs zero_stage 1, 2 or 3, not 0")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(f"offload_parameters={self.offload_parameters} needs zero_stage=3, not {self.zero_stage}")
        if self.offload_optimizer == "nvme":
            raise ValueError(
                "offload_optimizer=nvme has no checkpoints: DeepSpeed 0.19 swaps the state out of reach; use cpu"
            )
        if self.offload_parameters == "nvme" and self.nvme_path is None:
            raise ValueError("offload_parameters=nvme needs nvme_path, a local folder on a fast disk")
