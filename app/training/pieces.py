"""The state of a DeepSpeed engine in pieces, from which any number of workers in any ZeRO stage can be made again.

A piece is a run of one parameter's elements, or of one of its optimizer states, and says where in the whole it lies.
Workers write those that they hold, without a word to each other, and read those that they need.

Source of the idea: Lian et al. 2024, Universal Checkpointing, section 3. DeepSpeed's own converter (`ds_to_universal`,
0.19.8) takes AdamW in stages 1 to 3 only: it asks for `exp_avg`, which Muon has none of, and for shards, which stage 0
does not write; and its files are pickles, these are safetensors.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WEIGHT = "weight"
"""What the piece of a parameter itself is of, beside `exp_avg`, `momentum_buffer` and so on; in fp32."""
MOMENTUM = "momentum_buffer"
UPDATES = "updates"
_MARK = "|"


@dataclass(frozen=True)
class _Part:
    """The elements of one parameter that this worker is in charge of."""

    parameter: str
    start: int
    tensors: dict[str, torch.Tensor]
    """By what they are of; each is flat and shares the engine's memory."""

    @property
    def stop(self) -> int:
        return self.start + len(self.tensors[WEIGHT])


def collect(engine: Any) -> tuple[dict[str, torch.Tensor], int]:
    """A copy of this worker's pieces, `<parameter>|<what>|<first element>` -> flat tensor; and Adam's count of steps.

    Steps that are taken afterwards do not change the copy.
    """
    pieces = {}
    # On all workers, or all with the same part of the matrices: each writes some.
    alike = engine.zero_optimization_stage() == 0
    together = max(1, engine.autotp_size())
    for index, part in enumerate(_parts(engine)):
        if alike and index % (engine.world_size // together) != engine.global_rank // together:
            continue
        for what, tensor in part.tensors.items():
            pieces[_MARK.join((part.parameter, what, str(part.start)))] = tensor.detach().to("cpu", copy=True)
    for parameter, tensor, is_first in _whole_momenta(engine):
        if is_first:
            pieces[_MARK.join((parameter, MOMENTUM, "0"))] = tensor.detach().to("cpu", copy=True)
    return pieces, _updates(engine)


def write(pieces: dict[str, torch.Tensor], updates: int, file: Path) -> None:
    """Write what `collect` gave."""
    from safetensors.torch import save_file

    save_file(pieces, file, metadata={UPDATES: str(updates)})


def put_back(engine: Any, files: list[Path]) -> None:
    """Give an engine the state that other workers have written, however many they were and whatever their stage."""
    from safetensors import safe_open

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
        held = _Held(opened)
        updates = max(int(file.metadata()[UPDATES]) for file in opened)
        _make_states(engine, held, updates)
        for part in _parts(engine):
            for what, tensor in part.tensors.items():
                tensor.copy_(held.read(part.parameter, what, part.start, part.stop))
        for parameter, tensor, _ in _whole_momenta(engine):
            tensor.copy_(held.read(parameter, MOMENTUM, 0, len(tensor)))
    _refresh_weights(engine)


class _Held:
    """What a checkpoint's files hold."""

    def __init__(self, files: list[Any]) -> None:
        self._places: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        for file in files:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                parameter, what, start = key.rsplit(_MARK, 2)
                self._places[parameter, what].append((int(start), file, key))

    def states(self, parameter: str) -> set[str]:
        """What there is of a parameter, beside the weight."""
        return {what for name, what in self._places if name == parameter and what != WEIGHT}

    def read(self, parameter: str, what: str, start: int, stop: int) -> torch.Tensor:
        """The elements from `start` to before `stop`; (stop - start,)."""
        found = torch.empty(stop - start)
        there = 0
        for first, file, key in self._places[parameter, what]:
            piece = file.get_slice(key)
            last = first + piece.get_shape()[0]
            low, high = max(start, first), min(stop, last)
            if low < high:
                found[low - start : high - start] = piece[low - first : high - first]
                there += high - low
        assert there == stop - start, (
            f"{there} of {stop - start} elements of {what} of {parameter} are in the checkpoint"
        )
        return found


def _parts(engine: Any) -> Iterator[_Part]:
    """Everything of the optimizer's that this worker holds, except for Muon's momenta in stages 1 and 2."""
    stage = engine.zero_optimization_stage()
    for name, weight in _trained(engine):
        if stage == 0:
            held = _fp32(engine).get(id(weight), weight)
            tensors = {WEIGHT: held, **_states(engine, held)}
            yield _Part(name, 0, {what: tensor.data.view(-1) for what, tensor in tensors.items()})
        elif stage == 3:
            yield _part_of_a_partition(engine, name, weight)
        elif (mapping := weight._hp_mapping) is not None:
            flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            place, tensors = mapping.hp_fragment_address, {WEIGHT: flat, **_states(engine, flat)}
            if _keeps_whole_momenta(engine):
                tensors.pop(MOMENTUM, None)
            cut = {what: tensor.data.narrow(0, place.start, place.numel) for what, tensor in tensors.items()}
            yield _Part(name, mapping.lp_fragment_address.start, cut)


def _part_of_a_partition(engine: Any, name: str, weight: Any) -> _Part:
    """Of stage 3, which cuts every parameter into as many equal parts as there are workers; the last is padded."""
    zero = engine.optimizer
    group, offset, count = zero.grad_position[zero.get_param_id(weight)]
    assert not zero._swappable_optimizer_subgroup(group), "optimizer state on NVMe has no checkpoints"
    flat = zero.fp32_partitioned_groups_flat[group]
    start = count * zero._get_param_partition_rank(weight)
    count = max(0, min(count, weight.ds_numel - start))
    tensors = {WEIGHT: flat, **_states(engine, flat)}
    return _Part(name, start, {what: tensor.data.narrow(0, offset, count) for what, tensor in tensors.items()})


def _whole_momenta(engine: Any) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Muon's momenta in stages 1 and 2: whole ones, one after the other, of each matrix that a worker has a part of;
    and whether that part is the first."""
    if not _keeps_whole_momenta(engine):
        return
    zero, names = engine.optimizer, {id(weight): name for name, weight in _trained(engine)}
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        momenta = _base(engine).state.get(flat, {}).get(MOMENTUM)
        offset = 0
        for weight in zero.params_in_partition[group] if momenta is not None else ():
            is_first = weight._hp_mapping is not None and weight._hp_mapping.lp_fragment_address.start == 0
            yield names[id(weight)], momenta.narrow(0, offset, weight.numel()), is_first
            offset += weight.numel()


def _keeps_whole_momenta(engine: Any) -> bool:
    return engine.zero_optimization_stage() in (1, 2) and _is_muon(engine) and not engine.optimizer.cpu_offload


def _make_states(engine: Any, held: _Held, updates: int) -> None:
    """What the optimizer would make at its first step, which is over."""
    for flat, parameters, whole_elements in _groups(engine):
        made: dict[str, Any] = {}
        for what in sorted(held.states(parameters[0])):
            shape = (whole_elements,) if what == MOMENTUM and whole_elements is not None else flat.shape
            made[what] = torch.zeros(shape, device=flat.device)
        if "exp_avg" in made:
            # torch's own counts in tensors, DeepSpeed's in numbers.
            torch_adam = isinstance(getattr(_base(engine), "aux_optimizer", None) or _base(engine), torch.optim.Adam)
            made["step"] = torch.tensor(float(updates)) if torch_adam else updates
        _base(engine).state[flat] = made


def _groups(engine: Any) -> Iterator[tuple[torch.Tensor, list[str], int | None]]:
    """What the optimizer takes for one parameter, the parameters in it, and how many elements their momenta have
    where those are kept whole."""
    names = {id(weight): name for name, weight in _trained(engine)}
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for weight in (weight for _, weight in _trained(engine)):
            yield _fp32(engine).get(id(weight), weight), [names[id(weight)]], None
    elif stage == 3:
        for flat, weights in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            yield flat, [names[id(weight)] for weight in weights], None
    else:
        for group, flat in enumerate(zero.single_partition_of_fp32_groups):
            elements = None
            if _keeps_whole_momenta(engine):
                elements = sum(weight.numel() for weight in zero.params_in_partition[group])
            yield flat, [names[id(weight)] for weight in zero.bit16_groups[group]], elements


def _refresh_weights(engine: Any) -> None:
    """Let the weights that are computed with follow those that are kept in fp32."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        for weight in (weight for _, weight in _trained(engine)):
            weight.data.copy_(_fp32(engine).get(id(weight), weight).data)
    elif stage == 3:
        for flat, computed, weights in zip(
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
            strict=True,
        ):
            computed.data.copy_(flat.data)
            for weight, values in zip(weights, zero.unflatten(computed, weights), strict=True):
                weight.data = values.data
        if zero.persistent_parameters:  # whole ones, which still have their old values
            zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
    else:
        zero.update_lp_params()


def _trained(engine: Any) -> Iterator[tuple[str, Any]]:
    """The parameters by name; of tensor-parallel workers the parts, which only as many of them can go on with."""
    size = engine.autotp_size()
    part = f" part {engine.global_rank % size} of {size}" if size > 1 else ""
    return ((name + part, weight) for name, weight in engine.module.named_parameters() if weight.requires_grad)


def _base(engine: Any) -> Any:
    """The optimizer that DeepSpeed's is wrapped around."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def _is_muon(engine: Any) -> bool:
    return any(group.get("use_muon") for group in _base(engine).param_groups)


def _fp32(engine: Any) -> dict[int, torch.Tensor]:
    """By the ids of bf16 parameters in stage 0, what the optimizer keeps of them; empty in fp32."""
    pairs = zip(getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=True)
    return {id(weight): kept for weights, group in pairs for weight, kept in zip(weights, group, strict=True)}


def _states(engine: Any, kept: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer's states of the same shape as what it keeps."""
    states = _base(engine).state.get(kept, {}).items()
    return {what: state for what, state in states if torch.is_tensor(state) and state.shape == kept.shape}


def _updates(engine: Any) -> int:
    return max((int(state["step"]) for state in _base(engine).state.values() if "step" in state), default=0)
