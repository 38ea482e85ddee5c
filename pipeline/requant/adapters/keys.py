"""Keys of adapter files: what each means, however a trainer or wrapper spelled it.

PEFT writes `base_model.model.<module>.<tensor>`. torch.compile, FSDP, activation checkpointing and DDP add wrapper
names, doubled wrapping doubles the prefix, whole state dicts contain the adapter's name and PEFT's inner modules.
`normalise` removes exactly this noise. A key that can mean two things is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from requant.adapters.kinds import tensor_keys
from requant.errors import InputError

PREFIX = "base_model.model."
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_INNER = ("base_layer", "token_adapter")  # modules that PEFT puts around or into an adapted one
_COPIES = ("original_module", "trainable_tokens_original")  # the base's own values, kept for switching the adapter off
_OUTER = frozenset({"model", "language_model", "text_model"})


@dataclass(frozen=True, slots=True)
class Key:
    """What the key of an adapter file means: `tensor` of `module`.

    tensor: one of `kinds.tensor_keys`, with `.bias` for lora_B's; None: the file's tensor replaces `module`.`leaf`.
    wrapped: how many `base_layer` are between module and tensor. PEFT nests LoRA on several parameters of a module so.
    """

    module: str
    tensor: str | None
    leaf: str = ""
    wrapped: int = 0

    @property
    def replaces(self) -> str:
        """Name of the tensor of the base that this one replaces."""
        return f"{self.module}.{self.leaf}"


def normalise(key: str, names: Collection[str] = ("default",)) -> Key | None:
    """The meaning of a key of an adapter file; None for a copy of the base's values.

    Some trainers save such copies along.
    names: the adapter names that the file uses (`adapter_names`). Raises InputError for a key that can mean two things.
    """
    steps = _bare(key)
    if any(copy in steps for copy in _COPIES):
        return None
    at = _tensor_step(steps)
    if at is not None:
        return _adapter_key(key, steps, at, names)
    if "modules_to_save" in steps:
        steps = _saved(key, steps, names)
    steps = [s for s in steps if s not in _INNER]
    if len(steps) < 2:
        raise InputError(f"{key!r} is not a key of an adapter file: expected {PREFIX}<module>.<tensor>")
    return Key(".".join(steps[:-1]), None, steps[-1])


def spell(key: Key) -> str:
    """The key as PEFT's save_pretrained writes it; `normalise(spell(k)) == k`."""
    inner = ".base_layer" * key.wrapped
    if key.tensor is None:
        return f"{PREFIX}{key.replaces}"
    name, _, leaf = key.tensor.partition(".")
    spelling = tensor_keys()[name]
    if spelling.shared:
        return f"base_model.{name}"
    if spelling.wrapper:
        inner += f".{spelling.wrapper}"
    return f"{PREFIX}{key.module}{inner}.{name}" + (f".{leaf or 'weight'}" if spelling.has_weight else "")


def clean(key: str, names: Collection[str] = ("default",)) -> str | None:
    """The key in a form that PEFT's loader finds; None for a copy of the base's values.

    Noise is removed, PEFT's inner modules stay.
    """
    steps = _bare(key)
    if any(copy in steps for copy in _COPIES):
        return None
    at = _tensor_step(steps)
    if at is None:
        return PREFIX + ".".join(_saved(key, steps, names) if "modules_to_save" in steps else steps)
    spelled = spell(_adapter_key(key, steps, at, names))
    wrapper = tensor_keys()[steps[at]].wrapper
    inner = "".join(f".{s}" for s in steps[:at] if s in _INNER)
    return spelled.replace(f".{wrapper}", inner) if wrapper else spelled


def adapter_names(keys: Iterable[str]) -> frozenset[str]:
    """The adapter names in the keys of a file: `<name>` in `lora_A.<name>.weight`.

    "default", the name that PEFT uses by default, is always among them.
    """
    found = {"default"}
    for key in keys:
        steps = _bare(key)
        at = _tensor_step(steps)
        if at is not None:
            found.update(s for s in steps[at + 1 : at + 2] if s not in ("weight", "bias"))
    return frozenset(found)


def normalise_all(keys: Iterable[str], same: Callable[[str, str], bool] = lambda a, b: False) -> dict[str, Key | None]:
    """`normalise` for all keys of one file.

    Raises InputError when two keys mean the same tensor, or the file contains several adapters.

    same: whether two keys hold the same values; then the second is only a copy (PEFT saves resized embeddings so).
    """
    keys = list(keys)
    names = adapter_names(keys)
    if len(names - {"default"}) > 1:
        raise InputError(f"holds several adapters ({', '.join(sorted(names))}): save each one to its own directory")
    found: dict[str, Key | None] = {}
    seen: dict[Key, str] = {}
    for spelled in keys:
        key = normalise(spelled, names)
        first = seen.setdefault(key, spelled) if key else spelled
        if key and first != spelled and not same(first, spelled):
            raise InputError(f"{first!r} and {spelled!r} are both {spell(key)!r}: which one counts? Remove one of them")
        found[spelled] = key if first == spelled else None
    return found


def locate(module: str, modules: Collection[str], by_stem: Mapping[str, Collection[str]]) -> str:
    """The name in the base of an adapter's module.

    A name that the base has is returned as it is. Otherwise it is the only name that differs in outer names alone:
    `model.language_model.layers.0.mlp` and `model.layers.0.mlp` are the same module of a model loaded with and without
    its other towers. A module that is not found comes back as it is. Raises InputError when two would fit.
    """
    if module in modules:
        return module
    fits = sorted(by_stem.get(stem(module), ()))
    if len(fits) > 1:
        raise InputError(f"{module} may be {' or '.join(fits)} of the base: rename it in the adapter's file")
    return fits[0] if fits else module


def stem(module: str) -> str:
    """A module's name without the outer names that change with the class it was loaded with."""
    steps = module.split(".")
    first = next((i for i, step in enumerate(steps) if step not in _OUTER), len(steps) - 1)
    return ".".join(steps[first:])


def stems(modules: Iterable[str]) -> dict[str, set[str]]:
    """stem -> modules, for `locate`."""
    found: dict[str, set[str]] = {}
    for module in modules:
        found.setdefault(stem(module), set()).add(module)
    return found


def _tensor_step(steps: list[str]) -> int | None:
    """Which step of a key is the name of one of the adapter's tensors."""
    names = tensor_keys()
    return next((i for i, step in enumerate(steps) if step in names), None)


def _is_shared(step: str) -> bool:
    """Whether a step is the name of a tensor that belongs to no module."""
    spelling = tensor_keys().get(step)
    return spelling is not None and spelling.shared


def _bare(key: str) -> list[str]:
    """The steps of a key without wrappers and prefixes."""
    steps = [s for s in key.split(".") if s not in WRAPPERS]
    while len(steps) > 1:
        if steps[:2] == ["base_model", "model"]:
            steps = steps[2:]
        elif steps[0] == "module" or (steps[0] == "base_model" and _is_shared(steps[1])):
            steps = steps[1:]
        else:
            break
    return steps


def _adapter_key(key: str, steps: list[str], at: int, names: Collection[str]) -> Key:
    """The key of one of the adapter's own tensors, whose name is step `at`."""
    module, rest = steps[:at], steps[at + 1 :]
    if rest and rest[0] in names and rest[0] not in ("weight", "bias"):
        rest = rest[1:]
    if len(rest) > 1 or (rest and rest[0] not in ("weight", "bias")):
        raise InputError(f"{key!r}: what is {'.'.join(rest)!r} after {steps[at]}? Expected weight or bias")
    name = steps[at]
    spelling = tensor_keys()[name]
    module = [s for s in module if s != "token_adapter"]
    wrapped = 0
    while module and module[-1] == "base_layer":
        module, wrapped = module[:-1], wrapped + 1
    if not module and not spelling.shared:
        raise InputError(f"{key!r} names no module: expected {PREFIX}<module>.{name}")
    tensor = f"{name}.bias" if rest == ["bias"] else name
    return Key("" if spelling.shared else ".".join(module), tensor, wrapped=wrapped)


def _saved(key: str, steps: list[str], names: Collection[str]) -> list[str]:
    """A key of modules_to_save without that step and the adapter's name after it."""
    at = steps.index("modules_to_save")
    after = steps[at + 1 :]
    if after and after[0] in names:
        after = after[1:]
    elif len(after) > 1:
        raise InputError(
            f"{key!r}: is {after[0]!r} the adapter's name or a module? Rename it to modules_to_save.default"
        )
    return [*steps[:at], *after]
