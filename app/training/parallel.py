"""Workers that compute one batch together: tensor parallel, each a part of every matrix; or sequence parallel, each a
part of every block.

A group of workers takes the place of one in the sequence of blocks. A step learns from as many blocks as ever, in more
micro batches, and comes to the same loss whatever the number of workers in a group.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from app.errors import ModelError
from app.settings.training import TrainingConfig
from app.training.packing import NOT_LEARNED

# Axes: B blocks of a micro batch, T tokens of a block, t tokens of this worker's part, H heads, D size of a head
Batch = dict[str, np.ndarray]
COLUMNS = ("input_ids", "position_ids", "labels")
PACKED_ATTENTION = "rayloop_packed"
"""A name of attention that transformers makes no mask for: each layer is given the position ids instead."""


@dataclass(frozen=True)
class Inputs:
    """What this worker computes of a batch."""

    input_ids: torch.Tensor
    """(B, t)"""
    position_ids: torch.Tensor
    """(B, t)"""
    targets: torch.Tensor
    """(B, t), the token after each one, or NOT_LEARNED"""
    learned: int
    """Targets in the whole batch, those of the group's other workers included."""


@dataclass(frozen=True)
class Group:
    """The workers that compute one batch together, this one among them; those of a group have ranks in a row."""

    size: int
    splits_blocks: bool
    """Whether each worker computes a part of every block (sequence parallel)."""

    @staticmethod
    def of(training: TrainingConfig) -> "Group":
        """This worker's group."""
        return Group(training.workers_per_batch, training.sequence_parallel_size > 1)

    @property
    def rank(self) -> int:
        """Of this worker in the group."""
        return dist.get_rank() % self.size

    @property
    def number(self) -> int:
        """Of the group."""
        return dist.get_rank() // self.size

    @property
    def groups(self) -> int:
        """How many there are."""
        return dist.get_world_size() // self.size

    def inputs(self, batch: Batch, device: Any) -> Inputs:
        """This worker's part of a batch."""
        ids_BT, positions_BT, labels_BT = (
            torch.from_numpy(np.ascontiguousarray(batch[name])).long() for name in COLUMNS
        )
        targets_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=NOT_LEARNED)
        learned = int((targets_BT != NOT_LEARNED).sum())
        part = slice(None)
        if self.splits_blocks:
            tokens = ids_BT.shape[1] // self.size
            part = slice(self.rank * tokens, (self.rank + 1) * tokens)
        ids, positions, targets = (
            tensor_BT[:, part].contiguous().to(device) for tensor_BT in (ids_BT, positions_BT, targets_BT)
        )
        return Inputs(ids, positions, targets, learned)


def share_blocks(model: Any, training: TrainingConfig) -> Any:
    """Make a model's attention sequence parallel; returns what `deepspeed.initialize` takes as `mpu`.

    Before attention the workers of a group exchange their parts of the blocks for parts of the heads, and back after
    it; the position ids of the whole blocks say where one conversation ends and the next begins.

    Raises:
        ModelError: The heads cannot be shared out.

    Source: Jacobs et al. 2023, DeepSpeed Ulysses, section 3.
    """
    from deepspeed import comm
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface

    shape = model.config.get_text_config()
    size = training.sequence_parallel_size
    if shape.num_attention_heads % size or shape.num_key_value_heads % size:
        raise ModelError(
            f"{shape.num_attention_heads} heads and {shape.num_key_value_heads} key-value heads of "
            f"{training.base_model} cannot be shared by training.sequence_parallel_size={size} workers",
            "choose a size that divides both",
        )
    comm.init_distributed(get_accelerator().communication_backend_name())
    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:  # it is made once a process
        parallel_state_sp.initialize_sequence_parallel(size)
    attention = UlyssesSPAttentionHF(
        attn=packed_attention,
        batch_size=training.micro_batch_size,
        attn_head_count=shape.num_attention_heads,
        attn_head_size=getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads,
        kv_head_count=shape.num_key_value_heads,
        num_hidden_layers=shape.num_hidden_layers,
        process_group=parallel_state_sp.get_sequence_parallel_group(),
        seq_length_is_variable=False,
        local_seq_length=training.block_tokens // size,
        global_seq_length=training.block_tokens,
    )

    def shared(module: Any, *arguments: Any, **options: Any) -> Any:
        return attention(module, *arguments, **options)

    AttentionInterface.register(PACKED_ATTENTION, shared)
    model.config._attn_implementation = PACKED_ATTENTION
    return parallel_state_sp


def packed_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, position_ids: Any, **options: Any
) -> Any:
    """Attention within each conversation of packed blocks.

    Args:
        module: The layer.
        query: (B, H, T, D); `key` and `value` may have fewer heads.
        attention_mask: None: the mask is made here.
        position_ids: (B, T), beginning anew at each conversation.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    assert attention_mask is None
    conversation_BT = (torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)
    same_BTT = conversation_BT[:, :, None] == conversation_BT[:, None, :]
    return sdpa_attention_forward(module, query, key, value, same_BTT.tril()[:, None], is_causal=False, **options)
