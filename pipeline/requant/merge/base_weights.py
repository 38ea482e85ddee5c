"""The base model's weights, decoded: bitsandbytes 4-bit, 16-bit, or 16-bit rounded to NF4.

Names and shapes are those of the 16-bit checkpoint. Opening reads headers; `read` loads and decodes one tensor.
Files in MXFP4 or FP8 are a 16-bit checkpoint already (`base_checkpoint`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from requant.checkpoint.device_loader import load_onto
from requant.checkpoint.reader import Checkpoint
from requant.errors import InputError, StageError
from requant.merge import packed_parts, simulated_weight
from requant.merge.base_checkpoint import DecodedCheckpoint
from requant.merge.packed_parts import AUXILIARY, STATE
from requant.numerics import nf4
from requant.numerics.dtypes import DTYPES

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nf4Settings:
    """Settings of the 4-bit quantization of a 16-bit base during training.

    adapter_config.json does not record them.
    load_dtype: of the weights before they are rounded. compute_dtype: of the products, None: load_dtype. skip: modules
    left in 16 bit.
    version: of transformers, which decides which other modules are left in 16 bit.
    """

    quant_type: nf4.QuantType
    double_quant: bool
    blocksize: int = 64
    load_dtype: Literal["float16", "bfloat16", "float32"] = "bfloat16"
    compute_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    skip: tuple[str, ...] = ()
    version: Literal[4, 5] = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseWeight:
    """One tensor of the base, named and shaped as in the 16-bit checkpoint.

    kind: `stored` as it is, `packed` in 4 bits on disk, `simulated`: 16 bit on disk, 4 bit in training, or `encoded`:
    in MXFP4 or FP8 on disk, 16 bit in training.
    dtype: of the values that `read` returns: fp32 for packed and simulated ones, else as stored or decoded.
    transposed: a Conv1D whose 4-bit form is [out, in] while the 16-bit file contains [in, out].
    casts: dtypes that training cast the decoded values to, one after the other, before it multiplied by them.
    parts: rows of a simulated weight that training held as weights of their own; none: all of it is one.
    whole: the stored weights, this one among them, that training held as one; none: it was one by itself.
    """

    name: str
    kind: Literal["stored", "packed", "simulated", "encoded"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    state: nf4.QuantState | None = None
    transposed: bool = False
    casts: tuple[torch.dtype, ...] = ()
    parts: tuple[Sequence[int], ...] = ()
    whole: tuple[str, ...] = ()

    @property
    def four_bit(self) -> bool:
        """Whether training held it in 4 bits."""
        return self.kind in ("packed", "simulated")

    @property
    def trained_dtype(self) -> torch.dtype:
        """The coarsest dtype that training held the decoded values in."""
        return max(self.casts, key=_eps, default=torch.float32)

    def as_trained(self, value: Tensor) -> Tensor:
        """Decoded values as training multiplied by them, in fp32."""
        for dtype in self.casts:
            value = value.to(dtype)
        return value.float() if self.casts else value

    def folded_as_trained(self, stored: torch.dtype) -> bool:
        """Whether adapters are folded onto the values that training multiplied by, not onto the exact ones.

        Where the file's dtype `stored` is finer than training's, so that it can hold what training saw. In a file as
        coarse, the exact values lose less: rounded ones would be rounded twice, and a small delta would vanish.
        """
        return finer(stored, self.trained_dtype)


def finer(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` has more digits than `other`."""
    return _eps(dtype) < _eps(other)


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


class BaseWeights:
    """The weights of a base checkpoint by name.

    auxiliary: names of the tensors that only describe packed ones (scales, tables, quant_state).
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        simulate: Nf4Settings | None = None,
        quantized: frozenset[str] = frozenset(),
        conv1d: frozenset[str] = frozenset(),
        in_fp32: frozenset[str] = frozenset(),
        parts: Mapping[str, tuple[Sequence[int], ...]] | None = None,
        whole: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Classify the tensors of a checkpoint: stored, packed, simulated or auxiliary.

        quantized: weight names to simulate with `simulate`. conv1d: weight names of Conv1D modules. in_fp32: tensors
        that training loaded in fp32 whatever `simulate.load_dtype` is. parts, whole: as in `BaseWeight`.
        Raises InputError for an 8-bit base, missing or contradictory parts of a packed weight, or `simulate` on a
        checkpoint that is already packed.
        """
        self.checkpoint = checkpoint
        self.simulate = simulate
        self.conv1d, self.in_fp32, self.parts = conv1d, in_fp32, parts or {}
        self.whole = whole or {}
        states = {n.split(STATE)[0]: n for n in checkpoint if STATE in n}
        eight_bit = [n for n in checkpoint if n.endswith((".SCB", ".weight_format"))]
        if eight_bit:
            raise InputError(
                f"{checkpoint.path}: an 8-bit bitsandbytes checkpoint ({eight_bit[0]}); "
                "only 4-bit (NF4/FP4) and 16-bit bases can be merged exactly"
            )
        if states and simulate:
            raise InputError(
                f"{checkpoint.path}: already 4-bit on disk; remove base.nf4 from the recipe, its settings are stored"
            )
        described = [n for n in checkpoint if any(n.endswith(s) and n.removesuffix(s) in states for s in AUXILIARY)]
        self._encoded = checkpoint if isinstance(checkpoint, DecodedCheckpoint) else None
        self.auxiliary = (
            frozenset(described) | {*states.values()} | (self._encoded.auxiliary if self._encoded else set())
        )
        self.weights: Mapping[str, BaseWeight] = {
            n: self._weight(n, states.get(n), simulated=n in quantized) for n in checkpoint if n not in self.auxiliary
        }

    @property
    def packed(self) -> bool:
        """Whether any weight is stored in 4 bits."""
        return any(w.kind == "packed" for w in self.weights.values())

    @property
    def four_bit(self) -> bool:
        """Whether any weight has the values of a 4-bit grid, on disk or in training."""
        return any(w.four_bit for w in self.weights.values())

    def onto(self, stored: torch.dtype) -> str:
        """What adapters are folded onto in a file of dtype `stored`, in words for the report."""
        packed = [w for w in self.weights.values() if w.four_bit]
        if self._encoded is not None:
            return f"{self._encoded.format_name} weights decoded to 16 bit or more"
        if not packed:
            return "16-bit weights"
        rounded = {str(w.trained_dtype).removeprefix("torch.") for w in packed if w.folded_as_trained(stored)}
        if rounded:
            return f"4-bit weights decoded to {' and '.join(sorted(rounded))}, as training multiplied by them"
        return "4-bit weights decoded to float32"

    def _weight(self, name: str, state_name: str | None, *, simulated: bool) -> BaseWeight:
        info = self.checkpoint[name]
        conv1d = name in self.conv1d
        if self._encoded is not None:
            kind: Literal["stored", "encoded"] = "encoded" if name in self._encoded.encoded else "stored"
            return BaseWeight(name=name, kind=kind, shape=info.shape, dtype=info.dtype)
        if state_name is None:
            if info.dtype in (torch.uint8, torch.int8) and name.endswith(".weight"):
                raise InputError(
                    f"{info.file}: {name} is {info.dtype} but has no quant_state: not a bitsandbytes 4-bit weight"
                )
            if simulated:
                return BaseWeight(
                    name=name,
                    kind="simulated",
                    shape=info.shape,
                    dtype=torch.float32,
                    transposed=conv1d,
                    casts=self._casts(self._loaded_in(name)),
                    parts=self.parts.get(name, ()),
                    whole=self.whole.get(name, ()),
                )
            dtype = info.dtype
            if self.simulate and dtype.is_floating_point:
                dtype = DTYPES[self._loaded_in(name)]
            return BaseWeight(name=name, kind="stored", shape=info.shape, dtype=dtype)
        state = packed_parts.read_state(self.checkpoint[state_name])
        packed_parts.check(self.checkpoint, name, state)
        shape = state.shape[::-1] if conv1d else state.shape
        return BaseWeight(
            name=name,
            kind="packed",
            shape=shape,
            dtype=torch.float32,
            state=state,
            transposed=conv1d,
            casts=self._casts(state.dtype),
        )

    def _loaded_in(self, name: str) -> str:
        """The dtype in which training loaded a weight before it quantized."""
        return self.simulate.load_dtype if self.simulate and name not in self.in_fp32 else "float32"

    def _casts(self, decoded: str) -> tuple[torch.dtype, ...]:
        """What bitsandbytes casts a decoded weight to: the dtype that was quantized, then that of the products.

        Up to bitsandbytes 0.49; 0.50 decodes straight to the second. Without a word on it, transformers computes in
        float32.
        """
        if self.simulate is not None:
            compute: str = self.simulate.compute_dtype or self.simulate.load_dtype
        else:
            stored = self.checkpoint.quantization.get("bnb_4bit_compute_dtype")
            compute = str(stored or "float32").removeprefix("torch.")
            if compute not in DTYPES:
                raise InputError(
                    f"{self.checkpoint.path / 'config.json'}: bnb_4bit_compute_dtype is {stored!r}, expected one of "
                    f"{', '.join(DTYPES)}"
                )
        return tuple(dict.fromkeys((DTYPES[decoded], DTYPES[compute])))

    def absmax(self, weight: BaseWeight, device: torch.device = CPU) -> Tensor:
        """First-level scales of a packed weight, fp32 [blocks]."""
        assert weight.state is not None
        stored = load_onto(self.checkpoint, weight.name + ".absmax", device)
        if stored.dtype != torch.uint8:
            return stored.float()
        parts = (weight.name + s for s in (".nested_quant_map", ".nested_absmax"))
        table, scales = (load_onto(self.checkpoint, part, device) for part in parts)
        try:
            return nf4.unnest(stored, table, scales, weight.state)
        except nf4.Nf4Error as error:
            raise StageError(f"{self.checkpoint[weight.name].file}: {weight.name}: {error}") from error

    def read(self, name: str, device: torch.device = CPU, *, as_trained: bool = False) -> Tensor:
        """One weight in the dtype and shape of its `BaseWeight`, decoded on `device`.

        as_trained: cast as training cast it before it multiplied. Every device gives the same values.
        Raises StageError when the stored bytes and the quant_state disagree.
        """
        weight = self.weights[name]
        if not weight.four_bit:
            return load_onto(self.checkpoint, name, device, weight.dtype)
        try:
            value = self._decode(weight, device) if weight.kind == "packed" else self._simulate(weight, device)
        except nf4.Nf4Error as error:
            raise StageError(f"{self.checkpoint[name].file}: {name}: {error}") from error
        value = weight.as_trained(value) if as_trained else value
        return value.T if weight.transposed else value

    def _decode(self, weight: BaseWeight, device: torch.device) -> Tensor:
        assert weight.state is not None
        nf4.check_table(self.checkpoint.read(weight.name + ".quant_map"), weight.state.quant_type)
        return nf4.decode(load_onto(self.checkpoint, weight.name, device), self.absmax(weight, device), weight.state)

    def _simulate(self, weight: BaseWeight, device: torch.device) -> Tensor:
        assert self.simulate is not None

        s = self.simulate

        def loaded(name: str) -> Tensor:
            stored = load_onto(self.checkpoint, name, device, DTYPES[self._loaded_in(name)])
            return stored.T.contiguous() if weight.transposed else stored

        round_trip = partial(
            nf4.round_trip, quant_type=s.quant_type, blocksize=s.blocksize, double_quant=s.double_quant
        )
        return simulated_weight.rounded(weight.name, loaded, round_trip, parts=weight.parts, whole=weight.whole)
