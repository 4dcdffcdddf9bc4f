"""What a worker will need of memory: the published formulas for its states, and the shapes of a forward pass.

Sources: Rajbhandari et al. 2020, ZeRO, sections 3.1 and 5 (weights, gradients and optimizer states, and who keeps which
share of them). What is held besides was read off DeepSpeed 0.19: gradients in fp32 of a worker's share, the two numbers
a weight of torch's AdamW while it computes, the weights that stage 3 gathers, the buffer that gradients are reduced in.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from app.errors import ModelError
from app.settings.training import TrainingConfig
from app.training import attention
from app.training.deepspeed_config import MOST_REDUCED, deepspeed_config

FP32_BYTES = 4
RUNTIME_BYTES = 620_000_000 if torch.version.cuda is None else 910_000_000
"""A worker's libraries, before it has a model: Ray, torch, transformers, DeepSpeed. On a GPU they lie in the host.
torch's build with CUDA, which is what most indexes give, loads it on a machine without a GPU too (torch 2.13)."""
KEPT_FREE_BYTES, KEPT_FREE_SHARE = 12, 0.5
"""What glibc does not give back of freed memory on a CPU: for each weight that stage 3 gathers (10.8 to 13.6
measured), and as a share of the activations (0.48). Nothing with MALLOC_MMAP_THRESHOLD_=1048576, which makes steps 10
to 30 % slower."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker, where it computes: of a GPU's memory, or of the machine's."""

    weights: int
    gradients: int
    optimizer_states: int
    update: int
    """Held besides while the optimizer takes its step."""
    activations: int
    """Of a micro batch, from its forward pass until the backward pass has come past them."""
    head: int
    """Logits of a chunk of tokens, and the gradients that are computed with them."""
    runtime: int
    """Libraries."""
    kept_free: int
    """Freed, and not given back to the system."""
    checkpoint: int
    """On worker 0, whatever it computes on always of the machine's memory, while a checkpoint is written beside the
    next steps: its pieces, a copy of the model, and the model that is loaded again and scored."""

    @property
    def peak(self) -> int:
        """The most at any time: as gradients come, activations go, and an update comes after both."""
        always = self.runtime + self.kept_free + self.weights + self.optimizer_states
        return always + max(self.activations + self.head, self.gradients + self.update)

    def to_json(self) -> dict[str, int]:
        """The parts, and their peak, which a checkpoint comes on top of."""
        return {**asdict(self), "peak": self.peak}


def predict(model: Any, training: TrainingConfig) -> Memory:
    """The memory of a worker that trains this model, the most workers taking part.

    The model is that which training starts from, on the CPU; it is of no use afterwards. Within 11 % of what AdamW was
    seen to need on 2 workers (8 to 39 million weights, all stages, both precisions); Muon needed up to 15 % more, and
    so did 52 million weights in stage 2 with micro batches of one block. What a checkpoint takes on top was within 4 %
    in stages 0 and 2, and less by a fifth in stage 3, where it does not fall on the peak.
    """
    shards = training.max_workers // training.tensor_parallel_size
    parts = training.tensor_parallel_size
    sizes = [weight.numel() for weight in model.parameters()]
    matrices = sum(weight.numel() for name, weight in model.named_parameters() if _is_muons(name, weight))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad) / parts
    frozen_bytes = sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad) / parts
    stage, number = training.zero_stage, _number_bytes(training)
    shared_1, shared_2, shared_3 = (shards if stage >= least else 1 for least in (1, 2, 3))
    moments = 2 * trained
    if training.optimizer == "muon":
        moments -= min(matrices / parts, trained)  # these have a momentum and nothing else
    # Weights in fp32 beside those that are computed with; ZeRO has them of its share even where those are fp32 too.
    master = trained if stage or number < FP32_BYTES else 0
    reduced = deepspeed_config(training, sizes)["zero_optimization"]["reduce_bucket_size"] if stage in (1, 2) else 0
    update = FP32_BYTES * _held_in_update(training, trained, max(sizes), shards, master > 0)
    if stage == 0:  # DeepSpeed makes one tensor of all gradients, to reduce them at once
        update = max(update, number * min(trained, MOST_REDUCED))
    if stage == 3:
        update += number * trained + frozen_bytes
    activations = _activations(model, training) / parts / training.sequence_parallel_size
    weights = (number * trained + frozen_bytes) / shared_3
    optimizer_states = FP32_BYTES * (master + moments) / shared_1
    on_gpu = training.use_gpu
    if on_gpu and training.offload_optimizer != "none":
        optimizer_states = update = 0
    if on_gpu and training.offload_parameters != "none":
        weights = 0
    return Memory(
        weights=round(weights),
        gradients=round(number * (trained / shared_2 + reduced)),
        optimizer_states=round(optimizer_states),
        update=round(update),
        activations=round(activations),
        head=round(_head(model, training)),
        runtime=0 if on_gpu else RUNTIME_BYTES,
        checkpoint=round(_checkpoint(training, trained, moments, shards, number * (sum(sizes) / parts))),
        kept_free=0 if on_gpu else round(KEPT_FREE_SHARE * activations + (KEPT_FREE_BYTES * trained) * (stage == 3)),
    )


def _held_in_update(training: TrainingConfig, trained: float, largest: int, shards: int, copies: bool) -> float:
    """Numbers in fp32 that are there only for the optimizer's step."""
    share = trained / (shards if training.zero_stage else 1)
    gradients = share if copies else 0.0
    # torch's AdamW makes two tensors of the size of each it updates; ZeRO's shares are one tensor each.
    made = 0 if training.adam_kernel != "torch" else 2 * (share if training.zero_stage else largest)
    return gradients + made


def _checkpoint(training: TrainingConfig, trained: float, moments: float, shards: int, model_bytes: float) -> float:
    """What app/training/checkpoint.py holds on worker 0: of adapters no copy of the base."""
    pieces = FP32_BYTES * (trained + moments) / shards
    return pieces + (2 * model_bytes if training.method == "full" else 0)


def _is_muons(name: str, weight: Any) -> bool:
    """Whether DeepSpeed (0.19) has Muon train it, where Muon is asked for."""
    return weight.ndim == 2 and "embed" not in name and "lm_head" not in name


def _number_bytes(training: TrainingConfig) -> int:
    return 2 if training.precision == "bf16" else FP32_BYTES


def _head(model: Any, training: TrainingConfig) -> int:
    """The chunked loss (app/training/loss.py): a chunk's logits, and the gradients of its two factors."""
    words, width = map(int, model.get_output_embeddings().weight.shape)
    number = _number_bytes(training)
    tokens = training.micro_batch_size * training.block_tokens
    if training.objective == "dpo":  # which looks at all logits at once: as they come, in fp32, and their gradients
        return 2 * tokens * words * (FP32_BYTES + number)
    chunk = min(tokens, training.logits_tokens)
    logits = chunk * words * (FP32_BYTES + number)
    learns = model.get_output_embeddings().weight.requires_grad
    return logits + tokens * width * number + (words * width * (FP32_BYTES + number) if learns else 0)


def _activations(model: Any, training: TrainingConfig) -> int:
    """What a forward pass of a micro batch keeps for its backward pass, from one block in one layer, and in two."""
    if training.attention in ("auto", "varlen"):
        attention.use(model, training)
    holder, name, layers = _layers(model)
    if training.precision == "bf16":
        for weight in model.parameters():
            if weight.is_floating_point():
                weight.data = weight.data.to(torch.bfloat16)
    found = []
    try:
        for count in (1, 2):
            setattr(holder, name, layers[:count])
            model.config.num_hidden_layers = count
            found.append(_kept(model, training))
    finally:
        setattr(holder, name, layers)
        model.config.num_hidden_layers = len(layers)
    one, two = found
    layer = two - one
    if training.activation_checkpointing:  # a layer's input is kept, and one layer at a time computed again
        tokens = training.micro_batch_size * training.block_tokens
        return one + (len(layers) - 1) * tokens * int(model.config.hidden_size) * _number_bytes(training)
    return one + (len(layers) - 1) * layer


def _kept(model: Any, training: TrainingConfig) -> int:
    """Bytes of what autograd keeps of a micro batch, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = training.block_tokens
    # Two conversations in the block: with one the mask would be left out.
    positions = torch.arange(tokens).remainder(tokens // 2 + 1)[None]
    causal = getattr(model, "get_base_model", lambda: model)()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = causal.base_model(
            input_ids=torch.zeros_like(positions), position_ids=positions, use_cache=False
        ).last_hidden_state
    del hidden
    return training.micro_batch_size * sum(kept.values())


def _layers(model: Any) -> tuple[Any, str, Any]:
    """Where a model's layers are: the module that has them, their name there, and the list."""
    count = model.config.num_hidden_layers
    for holder in model.modules():
        for name, child in holder.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == count:
                return holder, name, child
    raise ModelError(
        f"the {count} layers of {type(model).__name__} were not found, so its activations cannot be predicted",
        "train a decoder of transformers' usual build",
    )
